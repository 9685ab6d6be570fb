// A block of coordinates chosen one by one, a thread a vector: a body of a kernel, see rounding_gpu.py.
// Arrays as in rounding.round_block; sizes holds H and T.

const int tokens = sizes[1], vector = GROUP_X * THREADS + THREAD_INDEX;
if (vector >= sizes[0] * tokens) return;
const int head = vector / tokens, base = head * BLOCK * tokens + vector % tokens;
const float levels_scale = scale[vector];
float changes[BLOCK];
UNROLL for (int i = 0; i < BLOCK; ++i) changes[i] = 0;
UNROLL for (int n = 0; n < BLOCK; ++n) {
    const int i = DOWN ? BLOCK - 1 - n : n, at = base + i * tokens;
    float now = wanted[at];
    UNROLL for (int j = 0; j < BLOCK; ++j) now -= own[(head * BLOCK + i) * BLOCK + j] * changes[j];
    float bin = now / levels_scale * (BINS / (2 * REACH)) + BINS / 2;
    bin = bin < 0 ? 0 : bin > BINS - 1 ? BINS - 1 : bin;
    int code = code_of_bin[int(bin)];
    float left = levels_scale * levels[code] - unit[at];
    changes[i] = left - error[at];
    codes[at] = code;
    errors[at] = left;
}
