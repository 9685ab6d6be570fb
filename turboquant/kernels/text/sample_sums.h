// The log-sum-exp of each sampled query's scores of the tokens that it sees: a body of a kernel, see query_stats_gpu.py.
// A thread-group works on one query of one KV head.

const int index = THREAD_INDEX, row = GROUP_X, head = GROUP_Y;
const int rows = sizes[0], tokens = sizes[1], samples = sizes[2];
const int stop = positions[row % samples] + 1;
GLOBAL const float* own = scores + ((size_type)head * rows + row) * tokens;

SHARED float highs[THREADS], totals[THREADS];
float highest = -INFINITY, total = 0;
for (int t = index; t < stop; t += THREADS) {
    float score = own[t] * 1.44269504f;
    if (score > highest) {
        total = total * EXP2(highest - score) + 1;
        highest = score;
    } else {
        total += EXP2(score - highest);
    }
}
highs[index] = highest;
totals[index] = total;
for (int half = THREADS / 2; half > 0; half /= 2) {
    BARRIER;
    if (index < half && highs[index + half] != -INFINITY) {
        const float top = highs[index] > highs[index + half] ? highs[index] : highs[index + half];
        totals[index] = totals[index] * EXP2(highs[index] - top) + totals[index + half] * EXP2(highs[index + half] - top);
        highs[index] = top;
    }
}
if (index == 0) sums[head * rows + row] = (highs[0] + LOG2(totals[0])) * 0.69314718f;
