// One query's attention over all splits, rotated back: a body of a kernel, see attention_gpu.py.
// A thread-group has a thread for each coordinate.

const int d = THREAD_INDEX, run = DIM / 8, place_of_d = d % run / 2 * 16 + d / run * 2 + d % 2;
const int r = GROUP_X, head = GROUP_Y;
const int n_heads = sizes[1], n_kv_heads = sizes[2], length = sizes[3], splits = sizes[7];
const int repeats = n_heads / n_kv_heads, rows = sizes[0] * repeats * length;

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
const int sequence = r / (repeats * length), place = r % length;
const int at = (sequence * n_heads + head * repeats + r / length % repeats) * length + place;
output[at * DIM + d] = value / total;
if (d == 0) logsumexp[at] = (highest + LOG2(total)) * 0.69314718f;
