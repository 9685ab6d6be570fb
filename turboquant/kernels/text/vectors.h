// Vectors of DIM coordinates in the registers of eight lanes each, RUN = DIM / 8 neighbours a lane, and rounding in a
// metric: what rounding.py does. Needs a backend's header.

FUNCTION float over_vector_sum(float x) {
    UNROLL for (int i = 1; i < 8; i *= 2) x += from_lane(x, i);
    return x;
}

// The normalised Hadamard transform.
FUNCTION void transform(THREAD float (&x)[RUN], int lane) {
    UNROLL for (int span = 1; span < RUN; span *= 2) {
        UNROLL for (int i = 0; i < RUN; ++i) {
            if (i & span) continue;
            float one = x[i], other = x[i + span];
            x[i] = one + other;
            x[i + span] = one - other;
        }
    }
    UNROLL for (int span = 1; span < 8; span *= 2) {
        UNROLL for (int i = 0; i < RUN; ++i) {
            float other = from_lane(x[i], span);
            x[i] = lane & span ? other - x[i] : x[i] + other;
        }
    }
    UNROLL for (int i = 0; i < RUN; ++i) x[i] *= ROOT;
}

// sums += a row times x. Rows are laid out so that lanes which read together read side by side.
FUNCTION void add_row(THREAD float (&sums)[RUN], GLOBAL const float* row, float x, int lane) {
    UNROLL for (int i = 0; i < RUN; i += 4) {
        float four[4];
        READ_FLOATS(row + i * 8 + lane % 8 * 4, four);
        UNROLL for (int j = 0; j < 4; ++j) sums[i + j] += four[j] * x;
    }
}

// Rows, each times its coordinate of a vector, summed up.
FUNCTION void add_product(
    THREAD float (&sums)[RUN], GLOBAL const float* rows, THREAD const float (&vector)[RUN], int lane) {
    for (int owner = 0; owner < 8; ++owner) {
        UNROLL for (int j = 0; j < RUN; ++j) {
            add_row(sums, rows + (owner * RUN + j) * DIM, of_lane(vector[j], lane / 8 * 8 + owner), lane);
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
    THREAD const float (&unit)[RUN], THREAD float (&error)[RUN], THREAD float (&pulled)[RUN], GLOBAL const float* rows,
    SHARED_POINTER const float* level_of_bin, float scale, int lane) {
    const float inverse = 1.0f / scale;
    for (int n = 0; n < 8; ++n) {
        const int owner = DOWN ? 7 - n : n;
        const bool own = lane % 8 == owner;
        UNROLL for (int i = 0; i < RUN; ++i) {
            const int j = DOWN ? RUN - 1 - i : i;
            float wanted = unit[j] - (pulled[j] - error[j]);
            float left = scale * nearest_level(level_of_bin, wanted * inverse, own) - unit[j];
            float change = of_lane(left - error[j], lane / 8 * 8 + owner);
            error[j] = own ? left : error[j];
            add_row(pulled, rows + (owner * RUN + j) * DIM, change, lane);
        }
    }
}

FUNCTION float clipped(float x, float least, float most) { return x < least ? least : x > most ? most : x; }

// Levels for a unit vector that are close to it in a metric; returns the factor for them. The diagonal is the metric's,
// its rows are divided by it.
FUNCTION float round_in_metric(
    THREAD const float (&unit)[RUN], THREAD float (&chosen)[RUN], GLOBAL const float* feedback, GLOBAL const float* rows,
    GLOBAL const float* diagonal, SHARED_POINTER const float* level_of_bin, int lane) {
    float looked[RUN], pulled[RUN], error[RUN];
    UNROLL for (int i = 0; i < RUN; ++i) looked[i] = pulled[i] = error[i] = 0;
    add_product(looked, rows, unit, lane);
    if (BITS < FEWEST_FOR_FEEDBACK) {
        UNROLL for (int i = 0; i < RUN; ++i) error[i] = nearest_level(level_of_bin, unit[i], true) - unit[i];
    } else {
        sweep<true>(unit, error, pulled, feedback, level_of_bin, 1.0f, lane);
    }
    UNROLL for (int i = 0; i < RUN; ++i) {
        chosen[i] = error[i] + unit[i];
        pulled[i] = 0;
    }
    add_product(pulled, rows, chosen, lane);
    for (int turn = 0; turn < SWEEPS; ++turn) {
        float kept = 0, size = 0;
        UNROLL for (int i = 0; i < RUN; ++i) {
            float weighted = diagonal[lane % 8 * RUN + i] * chosen[i];
            kept += weighted * looked[i];
            size += weighted * pulled[i];
        }
        float scale = clipped(over_vector_sum(kept) / over_vector_sum(size), 0.5f, 2.0f);
        UNROLL for (int i = 0; i < RUN; ++i) {
            error[i] = scale * chosen[i] - unit[i];
            pulled[i] = scale * pulled[i] - looked[i];
        }
        sweep<false>(unit, error, pulled, rows, level_of_bin, scale, lane);
        UNROLL for (int i = 0; i < RUN; ++i) {
            chosen[i] = (error[i] + unit[i]) / scale;
            pulled[i] = (pulled[i] + looked[i]) / scale;
        }
    }
    float kept = 0, whole = 0;
    UNROLL for (int i = 0; i < RUN; ++i) {
        float weighted = diagonal[lane % 8 * RUN + i] * looked[i];
        kept += weighted * chosen[i];
        whole += weighted * unit[i];
    }
    kept = over_vector_sum(kept);
    return clipped(over_vector_sum(whole) / (kept > 1e-9f ? kept : 1e-9f), 0.5f, 2.0f);
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
