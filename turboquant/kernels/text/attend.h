// Attention of a block of queries over one split of a layer's tokens: a body of a kernel, see attention/gpu.py.
// A thread-group has WARPS SIMD-groups, which share out the tokens; all attend the same TILES * 8 queries. If TRELLIS, the
// coarse tokens are in trellis codes, and TILES is 1.

const int index = THREAD_INDEX, lane = index % 32, warp = index / 32;
const int split = GROUP_X, head = GROUP_Y, block = GROUP_Z;
const int n_heads = plan[1], n_kv_heads = plan[2], length = plan[3], splits = plan[7], fine_splits = plan[8];
const int counts[3] = {plan[4], plan[5], plan[6]};  // tokens encoded, encoded finer, kept as they are
const int repeats = n_heads / n_kv_heads, rows = plan[0] * repeats * length;
const int row = ROW(lane), column = COLUMN(lane);
GLOBAL const float* settings = (GLOBAL const float*)(plan + SIZES);
GLOBAL const float* key_mean = constants + KEY_MEAN(n_kv_heads);
GLOBAL const float* signs = constants + SIGNS(n_kv_heads);
GLOBAL const u32* levels = (GLOBAL const u32*)(constants + LEVELS(n_kv_heads));

// The queries at first, then tables, then outputs.
#ifdef DYNAMIC_SHARED
GROUP_SHARED(shared);
#else
SHARED ALIGNED u32 shared[SHARED_WORDS];
#endif
SHARED float statistics[WARPS][ROWS][3];
SHARED float means[ROWS], highest[ROWS];
SHARED u32 factors[ROWS * DIM / 2];  // the queries as they enter products

SHARED_POINTER float* vectors = (SHARED_POINTER float*)shared;
UNROLL for (int first = 0; first < ROWS; first += WARPS) {
    const int r = first + warp, own = block * ROWS + r, sequence = own / (repeats * length);
    if (r >= ROWS) continue;
    const int at = (sequence * n_heads + head * repeats + own / length % repeats) * length + own % length;
    float x[DIM / 32], mean_score = 0;
    UNROLL for (int i = 0; i < DIM / 32; ++i) {
        const int d = 32 * i + lane;
        x[i] = own < rows ? float(queries[at * DIM + d]) * settings[0] : 0.0f;
        mean_score += x[i] * key_mean[head * DIM + d];
        x[i] *= signs[d];
    }
    mean_score = over_lanes_sum(mean_score);
    if (lane == 0) means[r] = mean_score;
    hadamard(x, lane);
    UNROLL for (int i = 0; i < DIM / 32; ++i) vectors[r * DIM + 32 * i + lane] = x[i];
}
BARRIER;
for (int at = warp; at < TILES * DIM / 16; at += WARPS) {
    int n = at / (DIM / 16), k = at % (DIM / 16);
    UNROLL for (int i = 0; i < 2; ++i) {
        factors[(at * 32 + lane) * 2 + i] =
            right_factor_of(vectors + n * 8 * DIM, DIM, DIM / 4, 4 * k + 2 * i, settings[1], lane);
    }
}
#if TRELLIS
SHARED_POINTER u32* in_order = shared + TABLE_WORDS;  // the queries again, with their coordinates in order
for (int j = warp; j < DIM / 8; j += WARPS) {
    in_order[j * 32 + lane] = right_factor_of(vectors, DIM, 2, 8 * j, settings[1], lane);
}
#endif
BARRIER;
Queries of_group;
of_group.shared = factors;
of_group.hold(lane);
float mean_scores[TILES][2];
State state;
UNROLL for (int n = 0; n < TILES; ++n) {
    UNROLL for (int i = 0; i < 2; ++i) {
        mean_scores[n][i] = means[n * 8 + column + i];
        state.highest[n][i] = -INFINITY;
        state.total[n][i] = state.mean_share[n][i] = 0;
    }
    UNROLL for (int m = 0; m < DIM / 16; ++m) {
        UNROLL for (int i = 0; i < 4; ++i) state.output[n][m][i] = 0;
    }
}

Tokens tokens;
tokens.value_factor = constants[VALUE_FACTORS(n_kv_heads) + head];
tokens.set<KEY_BITS, VALUE_BITS>(key_codes, key_scales, value_codes, value_scales, head, counts[0]);
const int coarse_splits = splits - fine_splits;  // without splits for finer tokens alone, all share these out too
#if TRELLIS
if (split < coarse_splits && counts[0]) {  // the same for all threads
    attend_blocks<KEY_BITS, VALUE_BITS>(
        state, in_order, mean_scores[0], tokens, (GLOBAL const u32*)(constants + TRELLIS_PAIRS(n_kv_heads)), shared,
        in_order + DIM * 4 + warp * STAGE_WORDS, split, coarse_splits, counts[0] / 128, index);
    BARRIER;
    reorder(state, vectors + warp * 8 * STRIDE, lane);
    BARRIER;
}
#else
attend_split<KEY_BITS, VALUE_BITS, COPIES, true>(
    state, of_group, mean_scores, tokens, levels, shared, split, coarse_splits, counts[0], index);
#endif
const int fine_heads = n_kv_heads * (counts[1] < 16 ? 16 : counts[1]);
tokens.set<FINE_KEY_BITS, FINE_VALUE_BITS>(
    fine_key_codes, fine_scales, fine_value_codes, fine_scales + fine_heads, head, counts[1]);
const int fine_split = fine_splits ? split - coarse_splits : split;
if (fine_split >= 0) {  // the same for all threads
    attend_split<FINE_KEY_BITS, FINE_VALUE_BITS, FINE_COPIES, false>(
        state, of_group, mean_scores, tokens, levels + 512, shared, fine_split, fine_splits ? fine_splits : splits, counts[1],
        index);
}
if (split == splits - 1) {
    const size_type halves = (size_type)n_kv_heads * (counts[2] < 16 ? 16 : counts[2]) * (DIM / 2);
    tokens.set<16, 16>(
        (GLOBAL const u32*)sinks, key_scales, (GLOBAL const u32*)sinks + halves, value_scales, head, counts[2]);
    attend_split<16, 16, 1, false>(state, of_group, mean_scores, tokens, levels, shared, 0, 1, counts[2], index);
}

// What the SIMD-groups found, put together, AT_A_TIME at a time: runs of DIM / 8 coordinates, with a gap behind each.
UNROLL for (int n = 0; n < TILES; ++n) {
    UNROLL for (int i = 0; i < 2; ++i) {
        float total = over_rows_sum(state.total[n][i]), mean_share = over_rows_sum(state.mean_share[n][i]);
        if (row == 0) {
            int r = n * 8 + column + i;
            statistics[warp][r][0] = state.highest[n][i];
            statistics[warp][r][1] = total;
            statistics[warp][r][2] = mean_share;
        }
    }
}
BARRIER;
for (int r = index; r < ROWS; r += THREADS) {
    float top = statistics[0][r][0];
    for (int w = 1; w < WARPS; ++w) top = statistics[w][r][0] > top ? statistics[w][r][0] : top;
    highest[r] = top;
}
BARRIER;
for (int turn = 0; turn < WARPS / AT_A_TIME; ++turn) {
    if (warp / AT_A_TIME == turn) {
        UNROLL for (int n = 0; n < TILES; ++n) {
            UNROLL for (int i = 0; i < 2; ++i) {
                int r = n * 8 + column + i;
                float factor = state.highest[n][i] == -INFINITY ? 0.0f : EXP2(state.highest[n][i] - highest[r]);
                UNROLL for (int m = 0; m < DIM / 16; ++m) {
                    int at = (warp % AT_A_TIME * ROWS + r) * STRIDE + row * (DIM / 8 + 1) + m * 2;
                    float one = state.output[n][m][i] * factor, other = state.output[n][m][i + 2] * factor;
                    vectors[at] = turn ? vectors[at] + one : one;
                    vectors[at + 1] = turn ? vectors[at + 1] + other : other;
                }
            }
        }
    }
    BARRIER;
}
const int from = (head * splits + split) * rows + block * ROWS;
const int here = rows - block * ROWS < ROWS ? rows - block * ROWS : ROWS;
for (int i = index; i < here * DIM; i += THREADS) {
    float sum = 0;
    UNROLL for (int w = 0; w < AT_A_TIME; ++w) {
        sum += vectors[(w * ROWS + i / DIM) * STRIDE + i % DIM + i % DIM / (DIM / 8)];
    }
    partials[(size_type)(from + i / DIM) * (DIM + 4) + i % DIM] = sum;
}
for (int r = index; r < here; r += THREADS) {
    float total = 0, mean_share = 0;
    for (int w = 0; w < WARPS; ++w) {
        float factor = statistics[w][r][0] == -INFINITY ? 0.0f : EXP2(statistics[w][r][0] - highest[r]);
        total += statistics[w][r][1] * factor;
        mean_share += statistics[w][r][2] * factor;
    }
    GLOBAL float* own = partials + (size_type)(from + r) * (DIM + 4) + DIM;
    own[0] = highest[r];
    own[1] = total;
    own[2] = mean_share;
}
