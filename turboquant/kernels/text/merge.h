// One query's attention over all splits, rotated back: a body of a kernel, see attention/gpu.py. With SUFFIX also over its
// own sequence's full-precision tokens. PARTS times as many threads as coordinates share out splits and tokens.

const int index = THREAD_INDEX, lane = index % 32, d = index % DIM, part = index / DIM;
const int run = DIM / 8, place_of_d = d % run / 2 * 16 + d / run * 2 + d % 2;
const int r = GROUP_X, head = GROUP_Y;
const int n_heads = sizes[1], n_kv_heads = sizes[2], length = sizes[3], splits = sizes[7];
const int repeats = n_heads / n_kv_heads, rows = sizes[0] * repeats * length;
const int sequence = r / (repeats * length), place = r % length, query_head = head * repeats + r / length % repeats;

SHARED float highs[MOST_SPLITS], factors[MOST_SPLITS], totals[MOST_SPLITS], shares[MOST_SPLITS];
SHARED float vectors[PARTS][DIM];
SHARED float part_totals[PARTS][2];

const int own = ((head * splits + (index < splits ? index : 0)) * rows + r) * 3;
if (index < splits) highs[index] = sums[own];
BARRIER;
float highest = -INFINITY;
for (int s = 0; s < splits; ++s) highest = highs[s] > highest ? highs[s] : highest;
if (index < splits) {
    float factor = highs[index] == -INFINITY ? 0.0f : EXP2(highs[index] - highest);
    factors[index] = factor;
    totals[index] = factor * sums[own + 1];
    shares[index] = factor * sums[own + 2];
}
BARRIER;
float total = 0, mean_share = 0, sum = 0;
for (int s = part; s < splits; s += PARTS) {
    sum += factors[s] * outputs[((size_type)(head * splits + s) * rows + r) * DIM + place_of_d];
    total += totals[s];
    mean_share += shares[s];
}
vectors[part][d] = sum;
if (d == 0) {
    part_totals[part][0] = total;
    part_totals[part][1] = mean_share;
}
BARRIER;
total = mean_share = sum = 0;
UNROLL for (int p = 0; p < PARTS; ++p) {
    sum += vectors[p][d];
    total += part_totals[p][0];
    mean_share += part_totals[p][1];
}
// The Hadamard transform: within SIMD-groups, then over them.
UNROLL for (int span = 1; span < 32; span *= 2) {
    float other = from_lane(sum, span);
    sum = lane & span ? other - sum : sum + other;
}
BARRIER;
if (part == 0) vectors[0][d] = sum;
BARRIER;
sum = 0;
UNROLL for (int group = 0; group < DIM / 32; ++group) {
    int both = group & d / 32, odd = (both ^ both >> 1 ^ both >> 2) & 1;
    sum += odd ? -vectors[0][group * 32 + lane] : vectors[0][group * 32 + lane];
}
float value = sum * settings[1] * signs[d] / value_factors[head] + mean_share * value_mean[head * DIM + d];

#if SUFFIX
SHARED float scores[DIM * PARTS];
// Eight lanes share a token's product with the query.
const int eighth = index % 8, tokens = keys_shape[2];
const size_type keys_at = sequence * keys_strides[0] + head * keys_strides[1];
const size_type values_at = sequence * values_strides[0] + head * values_strides[1] + d * values_strides[3];
const size_type query_at = sequence * queries_strides[0] + query_head * queries_strides[1] + place * queries_strides[2];
float query[DIM / 8];
UNROLL for (int i = 0; i < DIM / 8; ++i) query[i] = float(queries[query_at + (8 * i + eighth) * queries_strides[3]]) * settings[0];
if (part) value = total = 0;  // what is known already counts once
for (int first = 0; first < tokens; first += DIM * PARTS) {
    const int count = tokens - first < DIM * PARTS ? tokens - first : DIM * PARTS;
    for (int from = 0; from < count; from += DIM * PARTS / 8) {
        const int t = from + index / 8;
        float score = 0;
        if (t < count) {
            const size_type at = keys_at + (first + t) * keys_strides[2];
            UNROLL for (int i = 0; i < DIM / 8; ++i) score += query[i] * float(keys[at + (8 * i + eighth) * keys_strides[3]]);
        }
        UNROLL for (int i = 1; i < 8; i *= 2) score += from_lane(score, i);
        bool seen = t < count;
#if MASKED
        seen = seen && mask[sequence * mask_strides[0] + place * mask_strides[2] + (first + t) * mask_strides[3]];
#endif
        if (eighth == 0 && t < count) scores[t] = seen ? score : -INFINITY;
    }
    BARRIER;
    float top = highest;
    for (int t = 0; t < count; ++t) top = scores[t] > top ? scores[t] : top;
    const float fade = highest == -INFINITY ? 0.0f : EXP2(highest - top);
    const float weight = index >= count || scores[index] == -INFINITY ? 0.0f : EXP2(scores[index] - top);
    highest = top;
    total *= fade;
    value *= fade;
    BARRIER;
    scores[index] = weight;
    BARRIER;
    for (int t = part; t < count; t += PARTS) {
        total += scores[t];
        value += scores[t] * float(values[values_at + (first + t) * values_strides[2]]);
    }
    BARRIER;
}
vectors[part][d] = value;
if (d == 0) part_totals[part][0] = total;
BARRIER;
total = value = 0;
UNROLL for (int p = 0; p < PARTS; ++p) {
    value += vectors[p][d];
    total += part_totals[p][0];
}
#endif
const int at = (sequence * n_heads + query_head) * length + place;
if (part == 0) put(&output[at * DIM + d], value / total);
if (index == 0) logsumexp[at] = (highest + LOG2(total)) * 0.69314718f;
