// One query's attention over all splits, rotated back: a body of a kernel, see attention_gpu.py. With SUFFIX also over its
// own sequence's full-precision tokens. A thread-group has a thread for each coordinate.

const int d = THREAD_INDEX, run = DIM / 8, place_of_d = d % run / 2 * 16 + d / run * 2 + d % 2;
const int r = GROUP_X, head = GROUP_Y;
const int n_heads = sizes[1], n_kv_heads = sizes[2], length = sizes[3], splits = sizes[7];
const int repeats = n_heads / n_kv_heads, rows = sizes[0] * repeats * length;
const int sequence = r / (repeats * length), place = r % length, query_head = head * repeats + r / length % repeats;

SHARED float statistics[MOST_SPLITS][3];
SHARED float vector[DIM];

for (int i = d; i < splits * 3; i += DIM) statistics[i / 3][i % 3] = sums[((head * splits + i / 3) * rows + r) * 3 + i % 3];
BARRIER;
float highest = -INFINITY;
for (int s = 0; s < splits; ++s) highest = statistics[s][0] > highest ? statistics[s][0] : highest;
float total = 0, mean_share = 0, sum = 0;
for (int s = 0; s < splits; ++s) {
    float factor = statistics[s][0] == -INFINITY ? 0.0f : EXP2(statistics[s][0] - highest);
    total += factor * statistics[s][1];
    mean_share += factor * statistics[s][2];
    sum += factor * outputs[((size_type)(head * splits + s) * rows + r) * DIM + place_of_d];
}
vector[d] = sum;
BARRIER;
for (int half_span = 1; half_span < DIM; half_span *= 2) {
    float own = vector[d], other = vector[d ^ half_span];
    BARRIER;
    vector[d] = d & half_span ? other - own : own + other;
    BARRIER;
}
float value = vector[d] * settings[1] * signs[d] / value_factors[head] + mean_share * value_mean[head * DIM + d];

#if SUFFIX
SHARED float scores[DIM];
// Eight lanes share a token's product with the query.
const int part = d % 8, tokens = keys_shape[2];
const size_type keys_at = sequence * keys_strides[0] + head * keys_strides[1];
const size_type values_at = sequence * values_strides[0] + head * values_strides[1] + d * values_strides[3];
const size_type query_at = sequence * queries_strides[0] + query_head * queries_strides[1] + place * queries_strides[2];
float query[DIM / 8];
UNROLL for (int i = 0; i < DIM / 8; ++i) query[i] = float(queries[query_at + (8 * i + part) * queries_strides[3]]) * settings[0];
for (int first = 0; first < tokens; first += DIM) {
    const int count = tokens - first < DIM ? tokens - first : DIM;
    for (int from = 0; from < count; from += DIM / 8) {
        const int t = from + d / 8;
        float score = 0;
        if (t < count) {
            const size_type at = keys_at + (first + t) * keys_strides[2];
            UNROLL for (int i = 0; i < DIM / 8; ++i) score += query[i] * float(keys[at + (8 * i + part) * keys_strides[3]]);
        }
        UNROLL for (int i = 1; i < 8; i *= 2) score += from_lane(score, i);
        bool seen = t < count;
#if MASKED
        seen = seen && mask[sequence * mask_strides[0] + place * mask_strides[2] + (first + t) * mask_strides[3]];
#endif
        if (part == 0) scores[t] = seen ? score : -INFINITY;
    }
    BARRIER;
    float top = highest;
    for (int t = 0; t < count; ++t) top = scores[t] > top ? scores[t] : top;
    const float fade = highest == -INFINITY ? 0.0f : EXP2(highest - top);
    const float weight = d >= count || scores[d] == -INFINITY ? 0.0f : EXP2(scores[d] - top);
    highest = top;
    total *= fade;
    value *= fade;
    BARRIER;
    scores[d] = weight;
    BARRIER;
    for (int t = 0; t < count; ++t) {
        total += scores[t];
        value += scores[t] * float(values[values_at + (first + t) * values_strides[2]]);
    }
    BARRIER;
}
#endif
const int at = (sequence * n_heads + query_head) * length + place;
put(&output[at * DIM + d], value / total);
if (d == 0) logsumexp[at] = (highest + LOG2(total)) * 0.69314718f;
