// Attention of up to 8 queries of each KV head over tokens in trellis codes of 4 bits: a body of a kernel, see
// trellis_attention.py. It writes what attend.h writes. Needs cuda.h, layout.h, codes.h and the functions below.
//
// A SIMD-group takes 128 tokens at a time. A lane has 16 tokens of one coordinate of two strings, as four words: for keys
// two neighbouring coordinates, for values two runs of tokens. So a look-up gives the two levels that a product takes.

const int index = THREAD_INDEX, lane = index % 32, warp = index / 32;
const int split = GROUP_X, head = GROUP_Y;
const int n_heads = plan[1], n_kv_heads = plan[2], splits = plan[7];
const int blocks = plan[4] / 128, repeats = n_heads / n_kv_heads, rows = plan[0] * repeats;
const int row = lane / 4, column = lane % 4 * 2;
GLOBAL const float* settings = (GLOBAL const float*)(plan + SIZES);
GLOBAL const float* key_mean = constants + KEY_MEAN(n_kv_heads);
GLOBAL const float* signs = constants + SIGNS(n_kv_heads);

GROUP_SHARED(shared);  // the table, and before and after its use vectors; then what else is shared
SHARED_POINTER u32* factors = shared + TABLE_WORDS;
SHARED_POINTER float* statistics = (SHARED_POINTER float*)(factors + DIM / 8 * 32);  // (WARPS, 8, 3)
SHARED_POINTER float* means = statistics + WARPS * 24;
SHARED_POINTER float* highest = means + 8;
SHARED_POINTER float* vectors = (SHARED_POINTER float*)shared;
if (warp < 8) {
    const int at = warp / repeats * n_heads + head * repeats + warp % repeats;
    float x[DIM / 32], mean_score = 0;
    UNROLL for (int i = 0; i < DIM / 32; ++i) {
        const int d = 32 * i + lane;
        x[i] = warp < rows ? float(queries[at * DIM + d]) * settings[0] : 0.0f;
        mean_score += x[i] * key_mean[head * DIM + d];
        x[i] *= signs[d];
    }
    mean_score = over_lanes_sum(mean_score);
    if (lane == 0) means[warp] = mean_score;
    hadamard(x, lane);
    UNROLL for (int i = 0; i < DIM / 32; ++i) vectors[warp * DIM + 32 * i + lane] = x[i];
}
BARRIER;
for (int j = warp; j < DIM / 8; j += WARPS) {
    factors[j * 32 + lane] = right_factor_of(vectors, DIM, 2, 8 * j, settings[1], lane);
}
BARRIER;
for (int first = 4 * index; first < TABLE_WORDS; first += 4 * THREADS) WRITE_4(shared + first, levels[first / 32]);
const float mean_scores[2] = {means[column], means[column + 1]};
float output[DIM / 16][4], high[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0}, mean_share[2] = {0, 0};
UNROLL for (int m = 0; m < DIM / 16; ++m) {
    UNROLL for (int i = 0; i < 4; ++i) output[m][i] = 0;
}
BARRIER;

// The table's words at 16 places of two strings; `before` is the word before these four.
const u32 copies = lane * 4 * 0x0101u;
auto look_up = [&](const u32 (&words)[4], u32 before, u32 (&found)[16]) {
    u32 late[5];
    UNROLL for (int i = 0; i < 4; ++i) late[i] = SHIFTED_IN(i ? words[i - 1] : before, words[i]);
    late[4] = words[3] >> 22;
    UNROLL for (int i = 0; i < 4; ++i) {
        const u32 levels_rows = words[i] ^ late[i];
        const u32 first = MASKED_OR(late[i] << 7, 0x01018080u, copies);
        const u32 second = MASKED_OR(SHIFTED_OUT(late[i], late[i + 1]), 0x01018080u, copies);
        found[4 * i] = LEVELS_AT(PLACE(levels_rows, first, 0));
        found[4 * i + 1] = LEVELS_AT(NEXT_PLACE(levels_rows, first, 1));
        found[4 * i + 2] = LEVELS_AT(PLACE(levels_rows, second, 2));
        found[4 * i + 3] = LEVELS_AT(NEXT_PLACE(levels_rows, second, 3));
    }
};

#define READ_WORDS(from, to) { READ_8(from, to) READ_8((from) + 64, (to) + 2) }
const float value_factor = constants[VALUE_FACTORS(n_kv_heads) + head];
const int share = (blocks + splits - 1) / splits, stop = (split + 1) * share < blocks ? (split + 1) * share : blocks;
const int key_lane = (lane + 28) % 32, value_lane = lane / 4 * 4 + (lane + 3) % 4;
for (int block = split * share + warp; block < stop; block += WARPS) {
    const size_type at = ((size_type)head * blocks + block) * (DIM / 8 * 128) + lane * 2;
    GLOBAL const u32* keys = key_codes + at;
    GLOBAL const u32* values = value_codes + at;
    const size_type token = ((size_type)head * blocks + block) * 128 + row * 16;
    u32 next[2][4], scales[2][8];
    READ_WORDS(keys, next[0]);
    READ_WORDS(keys + 128, next[1]);
    float scores[8][4];
    UNROLL for (int i = 0; i < 8; ++i) {
        UNROLL for (int e = 0; e < 4; ++e) scores[i][e] = 0;
    }
    GLOBAL const u32* from = keys;
    SHARED_POINTER const u32* own_factors = factors + lane;
    for (int k = 0; k < DIM / 16; ++k) {
        u32 words[2][4], found[2][16];
        UNROLL for (int h = 0; h < 2; ++h) {
            UNROLL for (int i = 0; i < 4; ++i) words[h][i] = next[h][i];
        }
        from = k + 1 < DIM / 16 ? from + 256 : values;
        READ_WORDS(from, next[0]);
        READ_WORDS(from + 128, next[1]);
        const u32 factor[2] = {own_factors[0], own_factors[32]};
        own_factors += 64;
        UNROLL for (int h = 0; h < 2; ++h) look_up(words[h], word_of_lane(words[h][3], key_lane), found[h]);
        UNROLL for (int i = 0; i < 8; ++i) {
            const u32 left[4] = {found[0][2 * i], found[0][2 * i + 1], found[1][2 * i], found[1][2 * i + 1]};
            multiply_add(scores[i], left, factor);
        }
    }
    UNROLL for (int i = 0; i < 2; ++i) {
        READ_16((GLOBAL const u32*)(key_scales + token) + 4 * i, scales[0] + 4 * i);
        READ_16((GLOBAL const u32*)(value_scales + token) + 4 * i, scales[1] + 4 * i);
    }
    bool higher = false;
    UNROLL for (int i = 0; i < 8; ++i) {
        UNROLL for (int e = 0; e < 4; ++e) {
            const float of_key = half_of(scales[0][i], e >> 1), of_mean = of_key > 0 ? 1.0f : 0.0f;
            scores[i][e] = scores[i][e] * ABSOLUTE(of_key) + mean_scores[e & 1] * of_mean;
            higher = higher || scores[i][e] > high[e & 1] + HEADROOM;
        }
    }
    if (in_any_lane(higher)) {
        UNROLL for (int e = 0; e < 2; ++e) {
            float most = -INFINITY;
            UNROLL for (int i = 0; i < 8; ++i) {
                most = scores[i][e] > most ? scores[i][e] : most;
                most = scores[i][e + 2] > most ? scores[i][e + 2] : most;
            }
            most = over_rows_max(most);
            if (most > high[e]) {
                const float fade = EXP2(high[e] - most);
                high[e] = most;
                total[e] *= fade;
                mean_share[e] *= fade;
                UNROLL for (int m = 0; m < DIM / 16; ++m) {
                    output[m][e] *= fade;
                    output[m][e + 2] *= fade;
                }
            }
        }
    }
    u32 weights[8][2];
    UNROLL for (int i = 0; i < 8; ++i) {
        UNROLL for (int e = 0; e < 4; ++e) {
            const float weight = EXP2(scores[i][e] - high[e & 1]), of_value = half_of(scales[1][i], e >> 1);
            total[e & 1] += weight;
            mean_share[e & 1] += weight * (of_value > 0 ? 1.0f : 0.0f);
            scores[i][e] = weight * (ABSOLUTE(of_value) * value_factor);
        }
        UNROLL for (int h = 0; h < 2; ++h) weights[i][h] = as_right_factor(pack_halves(scores[i][2 * h], scores[i][2 * h + 1]));
    }
    UNROLL for (int m = 0; m < DIM / 16; ++m) {
        u32 words[2][4], found[2][16];
        UNROLL for (int h = 0; h < 2; ++h) {
            UNROLL for (int i = 0; i < 4; ++i) words[h][i] = next[h][i];
            if (m + 1 < DIM / 16) READ_WORDS(values + (2 * m + 2 + h) * 128, next[h]);
        }
        UNROLL for (int h = 0; h < 2; ++h) look_up(words[h], word_of_lane(words[h][3], value_lane), found[h]);
        UNROLL for (int i = 0; i < 8; ++i) {
            const u32 left[4] = {found[0][2 * i], found[1][2 * i], found[0][2 * i + 1], found[1][2 * i + 1]};
            multiply_add(output[m], left, weights[i]);
        }
    }
}

UNROLL for (int e = 0; e < 2; ++e) {
    const float sum = over_rows_sum(total[e]), of_mean = over_rows_sum(mean_share[e]);
    if (row == 0) {
        statistics[(warp * 8 + column + e) * 3 + 0] = high[e];
        statistics[(warp * 8 + column + e) * 3 + 1] = sum;
        statistics[(warp * 8 + column + e) * 3 + 2] = of_mean;
    }
}
BARRIER;
if (index < 8) {
    float top = statistics[index * 3];
    for (int w = 1; w < WARPS; ++w) top = statistics[(w * 8 + index) * 3] > top ? statistics[(w * 8 + index) * 3] : top;
    highest[index] = top;
}
BARRIER;
UNROLL for (int e = 0; e < 2; ++e) {
    const float factor = high[e] == -INFINITY ? 0.0f : EXP2(high[e] - highest[column + e]);
    UNROLL for (int m = 0; m < DIM / 16; ++m) {
        SHARED_POINTER float* to = vectors + (warp * 8 + column + e) * (DIM + 4) + 16 * m + row;
        to[0] = output[m][e] * factor;
        to[8] = output[m][e + 2] * factor;
    }
}
BARRIER;
const int from = (head * splits + split) * rows;
for (int i = index; i < rows * DIM; i += THREADS) {
    float sum = 0;
    UNROLL for (int w = 0; w < WARPS; ++w) sum += vectors[(w * 8 + i / DIM) * (DIM + 4) + i % DIM];
    partials[(size_type)(from + i / DIM) * (DIM + 4) + i % DIM] = sum;
}
if (index < rows) {
    float sum = 0, of_mean = 0;
    for (int w = 0; w < WARPS; ++w) {
        const float factor = statistics[(w * 8 + index) * 3] == -INFINITY ? 0.0f : EXP2(statistics[(w * 8 + index) * 3] - highest[index]);
        sum += statistics[(w * 8 + index) * 3 + 1] * factor;
        of_mean += statistics[(w * 8 + index) * 3 + 2] * factor;
    }
    GLOBAL float* own = partials + (size_type)(from + index) * (DIM + 4) + DIM;
    own[0] = highest[index];
    own[1] = sum;
    own[2] = of_mean;
}
