// Vectors compressed, from floats to packed codes and scales: a body of a kernel, see encoding_gpu.py. Eight lanes work
// on a vector.

const int index = THREAD_INDEX, lane = index % 32, head = GROUP_Y, count = order_shape[1];
const int place = GROUP_X * (THREADS / 8) + index / 8;
const int vector = head * count + (place < count ? place : count - 1);

SHARED float tables[(1 << BITS) + (METRIC ? BINS : 0)];  // boundaries between levels, the levels of bins
for (int i = index; i < 1 << BITS; i += THREADS) tables[i] = boundaries[i];
#if METRIC
for (int i = index; i < BINS; i += THREADS) tables[(1 << BITS) + i] = levels[code_of_bin[i]];
#endif
BARRIER;

float unit[RUN], norm = 0, centred_norm = 0;
const size_type at = head * x_strides[0] + order[vector] * x_strides[1] + lane % 8 * RUN * x_strides[2];
UNROLL for (int i = 0; i < RUN; ++i) {
    unit[i] = float(x[at + i * x_strides[2]]);
    float centred = unit[i] - mean[head * DIM + lane % 8 * RUN + i];
    norm += unit[i] * unit[i];
    centred_norm += centred * centred;
}
norm = SQRT(over_vector_sum(norm));
centred_norm = SQRT(over_vector_sum(centred_norm));
const bool removed = centred_norm < norm;
norm = (removed ? centred_norm : norm) * ROOT;
UNROLL for (int i = 0; i < RUN; ++i) {
    const int d = lane % 8 * RUN + i;
    unit[i] = (removed ? unit[i] - mean[head * DIM + d] : unit[i]) * signs[d];
}
transform(unit, lane);
UNROLL for (int i = 0; i < RUN; ++i) unit[i] /= norm > 1e-30f ? norm : 1e-30f;

float chosen[RUN], factor;
#if METRIC
factor = round_in_metric(
    unit, chosen, feedback + head * DIM * DIM, rows + head * DIM * DIM, diagonal + head * DIM, tables + (1 << BITS), lane);
#else
UNROLL for (int i = 0; i < RUN; ++i) chosen[i] = unit[i];
#endif
u32 found[RUN];
float size = 0;
UNROLL for (int i = 0; i < RUN; ++i) {
    found[i] = nearest_code(tables, chosen[i]);
    float level = levels[found[i]];
    size += level * level;
}
#if !METRIC
factor = 1.0f / (ROOT * SQRT(over_vector_sum(size)));
#endif
if (place < count) {
    GLOBAL u8* bytes = (GLOBAL u8*)codes + (size_type)vector * (DIM * BITS / 8);
    write_plane<LOW>(bytes, found, 0, lane);
    if (BITS > LOW) write_plane<BITS == LOW ? 1 : BITS - LOW>(bytes + DIM * LOW / 8, found, LOW, lane);
    float scale = clipped(norm * factor, SMALLEST_SCALE, LARGEST_SCALE);
    if (lane % 8 == 0) put(&scales[vector], removed ? scale : -scale);
}
