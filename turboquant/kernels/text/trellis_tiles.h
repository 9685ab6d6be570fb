// Attention of 8 queries over blocks of 128 tokens in trellis codes. Needs tiles.h and trellis.h.
//
// A SIMD-group takes a block at a time. A lane has 16 tokens of two strings: of keys of two neighbouring coordinates, and of
// values of two runs of tokens. So a look-up gives the two levels that a product takes.

// Read a lane's words of a row.
template <int BITS, typename Pointer, int SIZE>
FUNCTION void read_row(Pointer row, int lane, THREAD u32 (&words)[SIZE]) {
    const int place = ROW(lane) * 4 + COLUMN(lane) / 2;  // in the order of quant/trellis.py
    UNROLL for (int i = 0; i < BITS / 2; ++i) READ_8(row + 64 * i + 2 * place, words + 2 * i);
    if (BITS % 2) words[BITS - 1] = row[32 * (BITS - 1) + place];
}

// What a SIMD-group reads of its blocks: steps of two rows, of keys and then of values. While it works on a step, others are
// on their way: STAGES - 1 to its own part of shared memory, with the scales of their blocks; or one to registers.
template <int K_BITS, int V_BITS>
struct Steps {
    enum { KEYS = DIM / 16, ALL = DIM / 8, MOST_BITS = K_BITS > V_BITS ? K_BITS : V_BITS };
    GLOBAL const u32* keys;
    GLOBAL const u32* values;
    GLOBAL const half* scales[2];  // of keys and values
    int stop;                      // blocks before this one are read
#if STAGES
    SHARED_POINTER u32* stages;
    SHARED_POINTER u32* scales_here;
#else
    u32 next[2][MOST_BITS];
#endif

    // `own` is the SIMD-group's part of shared memory.
    FUNCTION void begin(THREAD const Tokens& tokens, SHARED_POINTER u32* own, int first, int stop_at, int lane) {
        keys = (GLOBAL const u32*)tokens.key_codes;
        values = (GLOBAL const u32*)tokens.value_codes;
        scales[0] = tokens.key_scales;
        scales[1] = tokens.value_scales;
        stop = stop_at;
#if STAGES
        scales_here = own;
        stages = own + 128;
        for (int step = 0; step + 1 < STAGES; ++step) start(first, step, lane);
#else
        start(first, 0, lane);
#endif
    }

    // Take the words of a block's step, and start another step.
    template <int BITS>
    FUNCTION void take(int block, int step, int lane, THREAD u32 (&words)[2][BITS]) {
#if STAGES
        WAIT_FOR_COPIES(STAGES - 2);
        LANES_MEET;
        UNROLL for (int h = 0; h < 2; ++h) {
            read_row<BITS>((SHARED_POINTER const u32*)stages + step % STAGES * (64 * MOST_BITS) + h * (32 * BITS), lane, words[h]);
        }
        start(block, step + STAGES - 1, lane);
#else
        UNROLL for (int h = 0; h < 2; ++h) {
            UNROLL for (int i = 0; i < BITS; ++i) words[h][i] = next[h][i];
        }
        start(block, step + 1, lane);
#endif
    }

    // Read the scales of a block's 16 tokens of a row: after its last step of keys, and before the next step.
    FUNCTION void read_scales(int block, int row, THREAD u32 (&found)[2][8]) {
        UNROLL for (int kind = 0; kind < 2; ++kind) {
#if STAGES
            SHARED_POINTER const u32* from = scales_here + kind * 64 + row * 8;
#else
            GLOBAL const u32* from = (GLOBAL const u32*)(scales[kind] + block * 128 + row * 16);
#endif
            UNROLL for (int i = 0; i < 2; ++i) READ_16(from + 4 * i, found[kind] + 4 * i);
        }
    }

    // Steps behind a block's last are the first of the next block.
    FUNCTION void start(int block, int step, int lane) {
        if (step >= ALL) {
            step -= ALL;
            block += WARPS;
        }
        if (block < stop) {
            if (step < KEYS) start_rows<K_BITS>(keys + ((size_type)block * ALL + 2 * step) * (32 * K_BITS), step, lane);
            else start_rows<V_BITS>(values + ((size_type)block * ALL + 2 * (step - KEYS)) * (32 * V_BITS), step, lane);
#if STAGES
            if (step == 0) {
                UNROLL for (int kind = 0; kind < 2; ++kind) {
                    COPY_8(scales_here + kind * 64 + 2 * lane, scales[kind] + block * 128 + 4 * lane);
                }
            }
#endif
        }
#if STAGES
        END_COPIES;
#endif
    }

    template <int BITS>
    FUNCTION void start_rows(GLOBAL const u32* rows, int step, int lane) {
#if STAGES
        SHARED_POINTER u32* stage = stages + step % STAGES * (64 * MOST_BITS);
        UNROLL for (int i = 0; i < BITS / 2; ++i) COPY_16(stage + 128 * i + 4 * lane, rows + 128 * i + 4 * lane);
        if (BITS % 2) COPY_8(stage + 64 * (BITS - 1) + 2 * lane, rows + 64 * (BITS - 1) + 2 * lane);
#else
        UNROLL for (int h = 0; h < 2; ++h) read_row<BITS>(rows + h * (32 * BITS), lane, next[h]);
#endif
    }
};

// Attention of queries over a split's share of `blocks` blocks. `factors` are the queries as right factors, two words of each
// lane for two coordinates in order, as blocks have them. `pairs` are copied to `table`. `own` is shared memory of the
// SIMD-group alone. To be called by all threads.
template <int K_BITS, int V_BITS>
FUNCTION void attend_blocks(
    THREAD State& state, SHARED_POINTER const u32* factors, THREAD const float (&mean_scores)[2], THREAD const Tokens& tokens,
    GLOBAL const u32* pairs, SHARED_POINTER u32* table, SHARED_POINTER u32* own, int split, int splits, int blocks, int index) {
    const int lane = index % 32, row = ROW(lane);
    const int share = (blocks + splits - 1) / splits, stop = (split + 1) * share < blocks ? (split + 1) * share : blocks;
    const int first = split * share + UNIFORM(index / 32);
    Steps<K_BITS, V_BITS> steps;
    steps.begin(tokens, own, first, stop, lane);
    fill_pairs<K_BITS, V_BITS>(table, pairs, index, THREADS);
    BARRIER;
    for (int block = first; block < stop; block += WARPS) {
        float scores[8][4];  // block i of products has tokens 16 r + 2 i and 16 r + 2 i + 1 of the lane's row r
        UNROLL for (int i = 0; i < 8; ++i) {
            UNROLL for (int e = 0; e < 4; ++e) scores[i][e] = 0;
        }
        for (int k = 0; k < DIM / 16; ++k) {
            u32 words[2][K_BITS], found[2][16];
            steps.template take<K_BITS>(block, k, lane, words);
            const u32 factor[2] = {factors[2 * k * 32 + lane], factors[(2 * k + 1) * 32 + lane]};
            UNROLL for (int h = 0; h < 2; ++h) {
                const u32 before = word_of_lane(words[h][K_BITS - 1], lane_before(false, lane));
                Strings<K_BITS, 16>::look_up(words[h], before, table, copy_of<K_BITS, V_BITS>(false, lane), found[h]);
            }
            UNROLL for (int i = 0; i < 8; ++i) {
                const u32 left[4] = {found[0][2 * i], found[0][2 * i + 1], found[1][2 * i], found[1][2 * i + 1]};
                multiply_add(scores[i], left, factor);
            }
        }
        u32 scales[2][8];  // of keys and values of the lane's row
        steps.read_scales(block, row, scales);
        bool higher = false;
        UNROLL for (int i = 0; i < 8; ++i) {
            UNROLL for (int e = 0; e < 4; ++e) {
                const float of_key = half_of(scales[0][i], e >> 1), of_mean = of_key > 0 ? 1.0f : 0.0f;
                scores[i][e] = scores[i][e] * ABSOLUTE(of_key) + mean_scores[e & 1] * of_mean;
                higher = higher || scores[i][e] > state.highest[0][e & 1] + HEADROOM;
            }
        }
        if (in_any_lane(higher)) {
            UNROLL for (int e = 0; e < 2; ++e) {
                float most = -INFINITY;
                UNROLL for (int i = 0; i < 8; ++i) {
                    most = scores[i][e] > most ? scores[i][e] : most;
                    most = scores[i][e + 2] > most ? scores[i][e + 2] : most;
                }
                state.raise(0, e, over_rows_max(most));
            }
        }
        u32 weights[8][2];
        UNROLL for (int i = 0; i < 8; ++i) {
            UNROLL for (int e = 0; e < 4; ++e) {
                const float weight = EXP2(scores[i][e] - state.highest[0][e & 1]), of_value = half_of(scales[1][i], e >> 1);
                state.total[0][e & 1] += weight;
                state.mean_share[0][e & 1] += weight * (of_value > 0 ? 1.0f : 0.0f);
                scores[i][e] = weight * (ABSOLUTE(of_value) * tokens.value_factor);
            }
            UNROLL for (int h = 0; h < 2; ++h) {
                weights[i][h] = as_right_factor(pack_halves(scores[i][2 * h], scores[i][2 * h + 1]));
            }
        }
        UNROLL for (int m = 0; m < DIM / 16; ++m) {
            u32 words[2][V_BITS], found[2][16];
            steps.template take<V_BITS>(block, DIM / 16 + m, lane, words);
            UNROLL for (int h = 0; h < 2; ++h) {
                const u32 before = word_of_lane(words[h][V_BITS - 1], lane_before(true, lane));
                Strings<V_BITS, 16>::look_up(words[h], before, table, copy_of<K_BITS, V_BITS>(true, lane), found[h]);
            }
            UNROLL for (int i = 0; i < 8; ++i) {
                const u32 left[4] = {found[0][2 * i], found[1][2 * i], found[0][2 * i + 1], found[1][2 * i + 1]};
                multiply_add(state.output[0][m], left, weights[i]);
            }
        }
    }
}

// Put outputs of coordinates in order into the order of tiles.h. `own` is a SIMD-group's own part of shared memory, of 8
// vectors, with a gap behind each run of coordinates. To be called by all threads.
FUNCTION void reorder(THREAD State& state, SHARED_POINTER float* own, int lane) {
    const int row = ROW(lane), column = COLUMN(lane);
    UNROLL for (int m = 0; m < DIM / 16; ++m) {
        UNROLL for (int i = 0; i < 4; ++i) {
            const int d = 16 * m + (i >> 1) * 8 + row;
            own[(column + (i & 1)) * STRIDE + d + d / (DIM / 8)] = state.output[0][m][i];
        }
    }
    BARRIER;
    UNROLL for (int m = 0; m < DIM / 16; ++m) {
        UNROLL for (int i = 0; i < 4; ++i) {
            state.output[0][m][i] = own[(column + (i & 1)) * STRIDE + row * (DIM / 8 + 1) + 2 * m + (i >> 1)];
        }
    }
}
