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
    float whole_norm = 0, centred_norm = 0;
    const size_type at = head * x_strides[0] + order[vector] * x_strides[1] + lane % 8 * RUN * x_strides[2];
    UNROLL for (int i = 0; i < RUN; ++i) {
        unit[v][i] = float(x[at + i * x_strides[2]]);
        float centred = unit[v][i] - mean[head * DIM + lane % 8 * RUN + i];
        whole_norm += unit[v][i] * unit[v][i];
        centred_norm += centred * centred;
    }
    whole_norm = SQRT(over_vector_sum(whole_norm));
    centred_norm = SQRT(over_vector_sum(centred_norm));
    removed[v] = centred_norm < whole_norm;
    norm[v] = (removed[v] ? centred_norm : whole_norm) * ROOT;
    UNROLL for (int i = 0; i < RUN; ++i) {
        const int d = lane % 8 * RUN + i;
        unit[v][i] = (removed[v] ? unit[v][i] - mean[head * DIM + d] : unit[v][i]) * signs[d];
    }
    transform(unit[v], lane);
    UNROLL for (int i = 0; i < RUN; ++i) unit[v][i] /= norm[v] > 1e-30f ? norm[v] : 1e-30f;
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
