// Vectors compressed, from floats to packed codes and scales: a body of a kernel, see encoding_gpu.py. Eight lanes work
// on VECTORS vectors, one beside the other.

const int index = THREAD_INDEX, lane = index % 32, head = GROUP_Y, count = order_shape[1];
const int place = (GROUP_X * (THREADS / 8) + index / 8) * VECTORS;

SHARED float tables[(1 << BITS) + (METRIC ? BINS : 0)];  // boundaries between levels, the levels of bins
for (int i = index; i < 1 << BITS; i += THREADS) tables[i] = boundaries[i];
#if METRIC
for (int i = index; i < BINS; i += THREADS) tables[(1 << BITS) + i] = levels[code_of_bin[i]];
#endif
BARRIER;

float unit[VECTORS][RUN], norm[VECTORS];
bool removed[VECTORS];
UNROLL for (int v = 0; v < VECTORS; ++v) {
    const int vector = head * count + (place + v < count ? place + v : count - 1);
    removed[v] = read_unit(
        unit[v], norm[v], x + head * x_strides[0] + order[vector] * x_strides[1], x_strides[2], mean + head * DIM, signs,
        lane);
}

float chosen[VECTORS][RUN], factor[VECTORS];
#if METRIC
round_in_metric(
    unit, chosen, factor, feedback + head * DIM * DIM, rows + head * DIM * DIM, diagonal + head * DIM,
    tables + (1 << BITS), lane);
#endif
UNROLL for (int v = 0; v < VECTORS; ++v) {
    u32 found[RUN];
    float size = 0;
    UNROLL for (int i = 0; i < RUN; ++i) {
        found[i] = nearest_code(tables, METRIC ? chosen[v][i] : unit[v][i]);
        float level = levels[found[i]];
        size += level * level;
    }
#if !METRIC
    factor[v] = 1.0f / (ROOT * SQRT(over_vector_sum(size)));
#endif
    if (place + v < count) {
        const int vector = head * count + place + v;
        GLOBAL u8* bytes = (GLOBAL u8*)codes + (size_type)vector * (DIM * BITS / 8);
        write_plane<LOW>(bytes, found, 0, lane);
        if (BITS > LOW) write_plane<BITS == LOW ? 1 : BITS - LOW>(bytes + DIM * LOW / 8, found, LOW, lane);
        float scale = clipped(norm[v] * factor[v], SMALLEST_SCALE, LARGEST_SCALE);
        if (lane % 8 == 0) put(&scales[vector], removed[v] ? scale : -scale);
    }
}
