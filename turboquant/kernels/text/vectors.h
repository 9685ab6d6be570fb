// Rounding in a metric, VECTORS vectors at a time: what rounding.py does. Needs a backend's header and rotation.h.

// For each of a lane's vectors: sums += a row times x. A row is read once for all of them. Rows are laid out so that
// lanes which read together read side by side.
FUNCTION void add_row(
    THREAD float (&sums)[VECTORS][RUN], GLOBAL const float* row, THREAD const float (&x)[VECTORS], int lane) {
    UNROLL for (int i = 0; i < RUN; i += 4) {
        float four[4];
        READ_FLOATS(row + i * 8 + lane % 8 * 4, four);
        UNROLL for (int v = 0; v < VECTORS; ++v) {
            UNROLL for (int j = 0; j < 4; ++j) sums[v][i + j] += four[j] * x[v];
        }
    }
}

// Rows, each times its coordinate of a vector, summed up.
FUNCTION void add_product(
    THREAD float (&sums)[VECTORS][RUN], GLOBAL const float* rows, THREAD const float (&vectors)[VECTORS][RUN],
    int lane) {
    for (int owner = 0; owner < 8; ++owner) {
        UNROLL for (int j = 0; j < RUN; ++j) {
            float x[VECTORS];
            UNROLL for (int v = 0; v < VECTORS; ++v) x[v] = of_lane(vectors[v][j], lane / 8 * 8 + owner);
            add_row(sums, rows + (owner * RUN + j) * DIM, x, lane);
        }
    }
}

// The level nearest to x, but for bins that a boundary cuts; `own` is false for lanes that don't need it.
FUNCTION float nearest_level(SHARED_POINTER const float* level_of_bin, float x, bool own) {
    float bin = x * (BINS / (2 * REACH)) + BINS / 2;
    bin = bin < 0 ? 0 : bin > BINS - 1 ? BINS - 1 : bin;
    return level_of_bin[own ? int(bin) : 0];
}

// Choose coordinates one by one, each by what the errors of all others make of it; `pulled` is the rows' product with
// `error`, and stays it.
template <bool DOWN>
FUNCTION void sweep(
    THREAD const float (&unit)[VECTORS][RUN], THREAD float (&error)[VECTORS][RUN], THREAD float (&pulled)[VECTORS][RUN],
    GLOBAL const float* rows, SHARED_POINTER const float* level_of_bin, THREAD const float (&scale)[VECTORS], int lane) {
    float inverse[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; ++v) inverse[v] = 1.0f / scale[v];
    for (int n = 0; n < 8; ++n) {
        const int owner = DOWN ? 7 - n : n;
        const bool own = lane % 8 == owner;
        UNROLL for (int i = 0; i < RUN; ++i) {
            const int j = DOWN ? RUN - 1 - i : i;
            float change[VECTORS];
            UNROLL for (int v = 0; v < VECTORS; ++v) {
                float wanted = unit[v][j] - (pulled[v][j] - error[v][j]);
                float left = scale[v] * nearest_level(level_of_bin, wanted * inverse[v], own) - unit[v][j];
                change[v] = of_lane(left - error[v][j], lane / 8 * 8 + owner);
                error[v][j] = own ? left : error[v][j];
            }
            add_row(pulled, rows + (owner * RUN + j) * DIM, change, lane);
        }
    }
}

FUNCTION float clipped(float x, float least, float most) { return x < least ? least : x > most ? most : x; }

// Levels for unit vectors that are close to them in a metric, and factors for them. The diagonal is the metric's, its
// rows are divided by it.
FUNCTION void round_in_metric(
    THREAD const float (&unit)[VECTORS][RUN], THREAD float (&chosen)[VECTORS][RUN], THREAD float (&factor)[VECTORS],
    GLOBAL const float* feedback, GLOBAL const float* rows, GLOBAL const float* diagonal,
    SHARED_POINTER const float* level_of_bin, int lane) {
    float looked[VECTORS][RUN], pulled[VECTORS][RUN], error[VECTORS][RUN], scale[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; ++v) {
        scale[v] = 1;
        UNROLL for (int i = 0; i < RUN; ++i) looked[v][i] = pulled[v][i] = error[v][i] = 0;
    }
    add_product(looked, rows, unit, lane);
    if (BITS < FEWEST_FOR_FEEDBACK) {
        UNROLL for (int v = 0; v < VECTORS; ++v) {
            UNROLL for (int i = 0; i < RUN; ++i) {
                error[v][i] = nearest_level(level_of_bin, unit[v][i], true) - unit[v][i];
            }
        }
    } else {
        sweep<true>(unit, error, pulled, feedback, level_of_bin, scale, lane);
    }
    UNROLL for (int v = 0; v < VECTORS; ++v) {
        UNROLL for (int i = 0; i < RUN; ++i) {
            chosen[v][i] = error[v][i] + unit[v][i];
            pulled[v][i] = 0;
        }
    }
    add_product(pulled, rows, chosen, lane);
    for (int turn = 0; turn < SWEEPS; ++turn) {
        UNROLL for (int v = 0; v < VECTORS; ++v) {
            float kept = 0, size = 0;
            UNROLL for (int i = 0; i < RUN; ++i) {
                float weighted = diagonal[lane % 8 * RUN + i] * chosen[v][i];
                kept += weighted * looked[v][i];
                size += weighted * pulled[v][i];
            }
            scale[v] = clipped(over_vector_sum(kept) / over_vector_sum(size), 0.5f, 2.0f);
            UNROLL for (int i = 0; i < RUN; ++i) {
                error[v][i] = scale[v] * chosen[v][i] - unit[v][i];
                pulled[v][i] = scale[v] * pulled[v][i] - looked[v][i];
            }
        }
        sweep<false>(unit, error, pulled, rows, level_of_bin, scale, lane);
        UNROLL for (int v = 0; v < VECTORS; ++v) {
            UNROLL for (int i = 0; i < RUN; ++i) {
                chosen[v][i] = (error[v][i] + unit[v][i]) / scale[v];
                pulled[v][i] = (pulled[v][i] + looked[v][i]) / scale[v];
            }
        }
    }
    UNROLL for (int v = 0; v < VECTORS; ++v) {
        float kept = 0, whole = 0;
        UNROLL for (int i = 0; i < RUN; ++i) {
            float weighted = diagonal[lane % 8 * RUN + i] * looked[v][i];
            kept += weighted * chosen[v][i];
            whole += weighted * unit[v][i];
        }
        kept = over_vector_sum(kept);
        factor[v] = clipped(over_vector_sum(whole) / (kept > 1e-9f ? kept : 1e-9f), 0.5f, 2.0f);
    }
}

// The code of the level nearest to x.
FUNCTION u32 nearest_code(SHARED_POINTER const float* boundaries, float x) {
    u32 code = 0;
    UNROLL for (int bit = BITS - 1; bit >= 0; --bit) code += u32(x > boundaries[code + (1 << bit) - 1]) << bit;
    return code;
}

// Bits `shift` .. `shift + WIDTH` of a lane's codes, packed into its bytes of a plane.
template <int WIDTH>
FUNCTION void write_plane(GLOBAL u8* plane, THREAD const u32 (&codes)[RUN], int shift, int lane) {
    UNROLL for (int byte = 0; byte < RUN * WIDTH / 8; ++byte) {
        u32 packed = 0;
        UNROLL for (int i = 0; i < 8 / WIDTH; ++i) {
            packed |= (codes[byte * (8 / WIDTH) + i] >> shift & ((1u << WIDTH) - 1)) << (i * WIDTH);
        }
        plane[lane % 8 * (RUN * WIDTH / 8) + byte] = u8(packed);
    }
}
