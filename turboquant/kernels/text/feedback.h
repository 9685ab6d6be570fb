// Unit upper triangular factors of symmetric positive definite matrices, without their diagonals, by elimination row after
// row: a body of a kernel, see encoding_gpu.py. A thread-group works on a matrix, in what becomes the factor.

const int index = THREAD_INDEX, lane = index % 32;
const size_type matrix = (size_type)GROUP_X * DIM * DIM;
GLOBAL float* left = factor + matrix;
SHARED float row[DIM];

for (int i = index; i < DIM * DIM; i += THREADS) left[i] = metric[matrix + i];
for (int j = 0; j < DIM; ++j) {
    DEVICE_BARRIER;
    for (int k = index; k < DIM; k += THREADS) row[k] = left[j * DIM + k];
    BARRIER;
    const float inverse = 1.0f / (row[j] > SMALLEST_PIVOT ? row[j] : SMALLEST_PIVOT);
    for (int i = j + 1 + index / 32; i < DIM; i += THREADS / 32) {
        const float share = row[i] * inverse;
        UNROLL for (int k = 0; k < DIM; k += 32) {
            if (k + lane >= i) left[i * DIM + k + lane] -= share * row[k + lane];
        }
    }
    for (int k = index; k < DIM; k += THREADS) left[j * DIM + k] = k > j ? row[k] * inverse : 0.0f;
}
