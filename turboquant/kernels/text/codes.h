// Packed codes to pairs of halves, and attention over a tile of tokens. Needs a backend's header, DIM and TILES.
//
// Products are of 8 x 8 blocks in the lanes of a SIMD-group: in a block, a lane holds two neighbours of one row, of
// ROW(lane) and from COLUMN(lane) on. Which coordinate stands where in a product is free, as long as both factors agree,
// so each lane takes a run of a vector's coordinates that lie side by side in memory, and no code is ever moved.

// How codes of BITS bits lie in memory, see packing.py, and in the tables: two codes an entry, or one, or, of 16 bits,
// no codes at all but halves.
template <int BITS>
struct Format {
    enum {
        LOW = BITS == 3 ? 2 : BITS == 5 || BITS == 6 ? 4 : BITS,
        HIGH = BITS - LOW,
        PAIRED = BITS <= 4,
        ENTRIES = BITS == 16 ? 0 : PAIRED ? 1 << (2 * BITS) : 1 << BITS
    };
};

template <int BYTES>
FUNCTION void read_bytes(GLOBAL const u8* from, THREAD u32* to) {
    if (BYTES >= 16) {
        UNROLL for (int i = 0; i < BYTES / 16; ++i) READ_16(from + 16 * i, to + 4 * i);
    } else if (BYTES == 8) {
        READ_8(from, to);
    } else {
        to[0] = BYTES == 4 ? *(GLOBAL const u32*)from : BYTES == 2 ? u32(*(GLOBAL const u16*)from) : u32(*from);
    }
}

// A lane's run of one vector: DIM / PARTS coordinates.
template <int BITS, int PARTS>
struct Run {
    enum {
        LOW_BYTES = DIM / PARTS * Format<BITS>::LOW / 8,
        HIGH_BYTES = DIM / PARTS * Format<BITS>::HIGH / 8
    };
    u32 low[LOW_BYTES > 4 ? LOW_BYTES / 4 : 1];
    u32 high[HIGH_BYTES > 4 ? HIGH_BYTES / 4 : 1];

    FUNCTION void read(GLOBAL const u8* codes, int vector, int part) {
        GLOBAL const u8* first = codes + vector * (DIM * BITS / 8);
        read_bytes<LOW_BYTES>(first + part * LOW_BYTES, low);
        if (Format<BITS>::HIGH) {
            read_bytes<HIGH_BYTES == 0 ? 1 : HIGH_BYTES>(first + DIM * Format<BITS>::LOW / 8 + part * HIGH_BYTES, high);
        }
    }

    // Code i of the low plane's bits, with the high plane's above.
    FUNCTION u32 code(int i) {
        const int width = Format<BITS>::LOW, high_width = Format<BITS>::HIGH;
        u32 bits = (low[i * width / 32] >> (i * width % 32)) & ((1u << width) - 1);
        if (high_width) bits |= ((high[i * high_width / 32] >> (i * high_width % 32)) & ((1u << high_width) - 1)) << width;
        return bits;
    }

    // The levels of coordinates 2 i and 2 i + 1 as two halves; a table's entries are N words apart.
    template <int N>
    FUNCTION u32 pair(SHARED_POINTER const u32* table, int i) {
        if (BITS == 16) return low[i];
        if (Format<BITS>::PAIRED) {
            const int width = 2 * Format<BITS>::LOW, high_width = 2 * Format<BITS>::HIGH;
            u32 entry = (low[i * width / 32] >> (i * width % 32)) & ((1u << width) - 1);
            if (high_width) {
                entry |= ((high[i * high_width / 32] >> (i * high_width % 32)) & ((1u << high_width) - 1)) << width;
            }
            return table[entry * N];
        }
        return LOW_HALVES(table[code(2 * i) * N], table[code(2 * i + 1) * N]);
    }
};

// Fill a table with the levels of codes, N times, so that lanes meet in no bank.
template <int BITS, int N>
FUNCTION void fill_table(SHARED_POINTER u32* table, GLOBAL const float* levels, int index) {
    for (int i = index; i < Format<BITS>::ENTRIES * N; i += THREADS) {
        int entry = i / N, one = entry, other = entry;
        if (Format<BITS>::PAIRED) {
            const int low = (1 << Format<BITS>::LOW) - 1, width = Format<BITS>::LOW;
            one = (entry & low) | ((entry >> (2 * width)) & 1) << width;
            other = ((entry >> width) & low) | ((entry >> (2 * width + 1)) & 1) << width;
        }
        table[i] = pack_halves(levels[one], levels[other]);
    }
}

// What a SIMD-group knows of TILES * 8 queries so far. Queries are columns; of each block a lane has two.
struct State {
    float output[TILES][DIM / 16][4];  // not normalised, in the rotated basis; rows of blocks are coordinates
    float highest[TILES][2];           // of the scores, in powers of two
    float total[TILES][2];             // of the weights; this and the next of this lane's rows only
    float mean_share[TILES][2];        // of the weights of those values whose mean was removed
};

// Attention of queries over 16 tokens from `first` on, of which those before `stop` count.
template <int K_BITS, int V_BITS, int N>
FUNCTION void attend_tile(
    THREAD State& state, THREAD const u32 (&queries)[TILES][DIM / 16][2], THREAD const float (&mean_scores)[TILES][2],
    GLOBAL const u8* key_codes, GLOBAL const half* key_scales, GLOBAL const u8* value_codes,
    GLOBAL const half* value_scales, SHARED_POINTER const u32* key_table, SHARED_POINTER const u32* value_table,
    float value_factor, int first, int stop, int lane) {
    const int row = ROW(lane), column = COLUMN(lane), last = stop - 1;
    const int tokens[2] = {first + row < last ? first + row : last, first + row + 8 < last ? first + row + 8 : last};
    Run<K_BITS, 4> keys[2];
    Run<V_BITS, 8> values[4];
    UNROLL for (int i = 0; i < 2; ++i) keys[i].read(key_codes, tokens[i], column / 2);
    UNROLL for (int i = 0; i < 4; ++i) {
        int token = first + column + (i & 1) + (i & 2) * 4;
        values[i].read(value_codes, token < last ? token : last, row);
    }
    float key_scale[2], value_scale[2];
    UNROLL for (int i = 0; i < 2; ++i) {
        key_scale[i] = K_BITS == 16 ? -1.0f : float(key_scales[tokens[i]]);
        value_scale[i] = V_BITS == 16 ? -1.0f : float(value_scales[tokens[i]]);
    }
    float scores[TILES][4];
    UNROLL for (int n = 0; n < TILES; ++n) {
        UNROLL for (int i = 0; i < 4; ++i) scores[n][i] = 0;
    }
    UNROLL for (int k = 0; k < DIM / 16; ++k) {
        u32 block[4];
        UNROLL for (int i = 0; i < 4; ++i) block[i] = keys[i & 1].template pair<N>(key_table, 2 * k + (i >> 1));
        UNROLL for (int n = 0; n < TILES; ++n) multiply_add(scores[n], block, queries[n][k]);
    }
    u32 weights[TILES][2];
    UNROLL for (int n = 0; n < TILES; ++n) {
        UNROLL for (int i = 0; i < 4; ++i) {
            float scale = key_scale[i >> 1], mean_score = scale > 0 ? mean_scores[n][i & 1] : 0.0f;
            bool counts = first + row + 8 * (i >> 1) < stop;
            scores[n][i] = counts ? scores[n][i] * ABSOLUTE(scale) + mean_score : -INFINITY;
        }
        UNROLL for (int i = 0; i < 2; ++i) {
            float tile = over_rows_max(scores[n][i] > scores[n][i + 2] ? scores[n][i] : scores[n][i + 2]);
            if (tile > state.highest[n][i]) {
                float fade = EXP2(state.highest[n][i] - tile);
                state.highest[n][i] = tile;
                state.total[n][i] *= fade;
                state.mean_share[n][i] *= fade;
                UNROLL for (int m = 0; m < DIM / 16; ++m) {
                    state.output[n][m][i] *= fade;
                    state.output[n][m][i + 2] *= fade;
                }
            }
        }
        UNROLL for (int i = 0; i < 4; ++i) {
            float weight = EXP2(scores[n][i] - state.highest[n][i & 1]);
            state.total[n][i & 1] += weight;
            if (value_scale[i >> 1] > 0) state.mean_share[n][i & 1] += weight;
            scores[n][i] = weight * ABSOLUTE(value_scale[i >> 1]) * value_factor;
        }
        UNROLL for (int i = 0; i < 2; ++i) {
            weights[n][i] = as_right_factor(pack_halves(scores[n][2 * i], scores[n][2 * i + 1]));
        }
    }
    UNROLL for (int m = 0; m < DIM / 16; ++m) {
        u32 pairs[4], block[4];
        UNROLL for (int i = 0; i < 4; ++i) pairs[i] = values[i].template pair<N>(value_table, m);
        UNROLL for (int i = 0; i < 2; ++i) {
            block[2 * i] = LOW_HALVES(pairs[2 * i], pairs[2 * i + 1]);
            block[2 * i + 1] = HIGH_HALVES(pairs[2 * i], pairs[2 * i + 1]);
        }
        UNROLL for (int n = 0; n < TILES; ++n) multiply_add(state.output[n][m], block, weights[n]);
    }
}
