// One query's attention over all splits, rotated back: a body of a kernel, see attention/gpu.py. With SUFFIX also over its
// own sequence's full-precision tokens. PARTS times as many threads as coordinates share out splits and tokens.

const int index = THREAD_INDEX, lane = index % 32, d = index % DIM, part = index / DIM;
const int r = GROUP_X, head = GROUP_Y;
const int n_heads = plan[1], n_kv_heads = plan[2], length = plan[3], splits = plan[7];
const int repeats = n_heads / n_kv_heads, rows = plan[0] * repeats * length;
const int sequence = r / (repeats * length), place = r % length, query_head = head * repeats + r / length % repeats;
GLOBAL const float* settings = (GLOBAL const float*)(plan + SIZES);

SHARED float factors[MOST_SPLITS], known[3];  // of each split; highest score, sum of weights, the mean's share
SHARED float vectors[PARTS][DIM];

const size_type stride = (size_type)rows * (DIM + 4);
GLOBAL const float* own = partials + ((size_type)head * splits * rows + r) * (DIM + 4);
if (index < 32) {
    float highest = -INFINITY, total = 0, mean_share = 0;
    for (int s = lane; s < splits; s += 32) highest = own[s * stride + DIM] > highest ? own[s * stride + DIM] : highest;
    UNROLL for (int i = 1; i < 32; i *= 2) {
        const float other = from_lane(highest, i);
        highest = other > highest ? other : highest;
    }
    for (int s = lane; s < splits; s += 32) {
        const float high = own[s * stride + DIM];
        factors[s] = high == -INFINITY ? 0.0f : EXP2(high - highest);
        total += factors[s] * own[s * stride + DIM + 1];
        mean_share += factors[s] * own[s * stride + DIM + 2];
    }
    total = over_lanes_sum(total);
    mean_share = over_lanes_sum(mean_share);
    if (lane == 0) {
        known[0] = highest;
        known[1] = total;
        known[2] = mean_share;
    }
}
BARRIER;
float highest = known[0], total = known[1], sum = 0;
const float mean_share = known[2];
for (int first = part; first < splits; first += PARTS * AT_ONCE) {
    UNROLL for (int i = 0; i < AT_ONCE; ++i) {
        const int s = first + i * PARTS;
        if (s < splits) sum += factors[s] * own[s * stride + d];
    }
}
vectors[part][d] = sum;
BARRIER;
sum = 0;
UNROLL for (int p = 0; p < PARTS; ++p) sum += vectors[p][d];
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
float value = sum * settings[1] * constants[SIGNS(n_kv_heads) + d] / constants[VALUE_FACTORS(n_kv_heads) + head] +
    mean_share * constants[VALUE_MEAN(n_kv_heads) + head * DIM + d];

#if SUFFIX
SHARED float scores[DIM * PARTS], part_totals[PARTS];
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
    for (int t = lane; t < count; t += 32) top = scores[t] > top ? scores[t] : top;
    UNROLL for (int i = 1; i < 32; i *= 2) {
        const float other = from_lane(top, i);
        top = other > top ? other : top;
    }
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
if (d == 0) part_totals[part] = total;
BARRIER;
total = value = 0;
UNROLL for (int p = 0; p < PARTS; ++p) {
    value += vectors[p][d];
    total += part_totals[p];
}
#endif
const int at = (sequence * n_heads + query_head) * length + place;
if (part == 0) put(&output[at * DIM + d], value / total);
#if !SUFFIX
if (index == 0) logsumexp[at] = (highest + LOG2(total)) * 0.69314718f;
#endif
