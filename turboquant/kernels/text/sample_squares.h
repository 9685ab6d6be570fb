// The squared attention of sampled queries to distant tokens, summed over the tokens of a SIMD-group and over queries: a
// body of a kernel, see query_stats_gpu.py. A thread has one token of one KV head, and takes all queries in turn.

const int index = THREAD_INDEX, lane = index % 32, head = GROUP_Y;
const int rows = sizes[0], tokens = sizes[1], samples = sizes[2], sinks = sizes[3], near = sizes[4];
const int t = GROUP_X * THREADS + index, groups = sizes[5], group = GROUP_X * (THREADS / 32) + index / 32;
GLOBAL const float* own = scores + (size_type)head * rows * tokens + t;

float of_token = 0;
for (int row = 0; row < rows; ++row) {
    float share = 0;
    if (t < tokens && t >= sinks && t <= positions[row % samples] - near) {
        share = EXP2((own[(size_type)row * tokens] - sums[head * rows + row]) * 1.44269504f);
    }
    of_token += share * share;
    const float of_group = over_lanes_sum(share * share);
    if (lane == 0) by_query[(head * groups + group) * rows + row] = of_group;
}
if (t < tokens) by_token[head * tokens + t] = of_token;
