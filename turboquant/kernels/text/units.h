// Vectors centred, rotated and normalised, coordinate by coordinate, for search.h; see trellis_search.py: a body of a
// kernel. Eight lanes work on two vectors, one beside the other.

const int index = THREAD_INDEX, lane = index % 32, head = GROUP_Y, count = order_shape[1];
const int place = (GROUP_X * (THREADS / 8) + index / 8) * 2;

float unit[2][RUN];
UNROLL for (int v = 0; v < 2; ++v) {
    const int vector = head * count + (place + v < count ? place + v : count - 1), token = order[vector];
    float norm;
    const bool removed = read_unit(
        unit[v], norm, x + head * x_strides[0] + token * x_strides[1], x_strides[2], mean + head * DIM, signs, lane);
    if (lane % 8 == 0 && place + v < count) {
        norm = norm > 1e-30f ? norm : 1e-30f;
        norms[vector] = removed ? norm : -norm;
#if WEIGHTED
        roots[vector] = norm * SQRT(weights[head * weights_shape[1] + token]);
#else
        roots[vector] = norm;
#endif
    }
}
if (place < count) {  // an even number
    GLOBAL u32* pairs = (GLOBAL u32*)units + (size_type)head * DIM * (count / 2) + place / 2;
    UNROLL for (int i = 0; i < RUN; ++i) {
        pairs[(lane % 8 * RUN + i) * (count / 2)] = pack_halves(unit[0][i], unit[1][i]);
    }
}
