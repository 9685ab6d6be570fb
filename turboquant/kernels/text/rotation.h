// Vectors of DIM coordinates in the registers of eight lanes each, RUN = DIM / 8 neighbours a lane: centred, rotated and
// normalised, as ``Codec.normalise`` does it. Needs a backend's header.

FUNCTION float over_vector_sum(float x) {
    UNROLL for (int i = 1; i < 8; i *= 2) x += from_lane(x, i);
    return x;
}

// The normalised Hadamard transform.
FUNCTION void transform(THREAD float (&x)[RUN], int lane) {
    UNROLL for (int span = 1; span < RUN; span *= 2) {
        UNROLL for (int i = 0; i < RUN; ++i) {
            if (i & span) continue;
            float one = x[i], other = x[i + span];
            x[i] = one + other;
            x[i + span] = one - other;
        }
    }
    UNROLL for (int span = 1; span < 8; span *= 2) {
        UNROLL for (int i = 0; i < RUN; ++i) {
            float other = from_lane(x[i], span);
            x[i] = lane & span ? other - x[i] : x[i] + other;
        }
    }
    UNROLL for (int i = 0; i < RUN; ++i) x[i] *= ROOT;
}

// Read a vector, whose coordinates are `stride` apart, without the mean if that makes it shorter, and rotate it. `norm` is
// its norm, divided by that of a unit vector. Returns whether the mean was subtracted.
template <typename T>
FUNCTION bool read_unit(
    THREAD float (&unit)[RUN], THREAD float& norm, GLOBAL const T* x, size_type stride, GLOBAL const float* mean,
    GLOBAL const float* signs, int lane) {
    float whole_norm = 0, centred_norm = 0;
    UNROLL for (int i = 0; i < RUN; ++i) {
        unit[i] = float(x[(lane % 8 * RUN + i) * stride]);
        float centred = unit[i] - mean[lane % 8 * RUN + i];
        whole_norm += unit[i] * unit[i];
        centred_norm += centred * centred;
    }
    whole_norm = SQRT(over_vector_sum(whole_norm));
    centred_norm = SQRT(over_vector_sum(centred_norm));
    const bool removed = centred_norm < whole_norm;
    norm = (removed ? centred_norm : whole_norm) * ROOT;
    UNROLL for (int i = 0; i < RUN; ++i) {
        const int d = lane % 8 * RUN + i;
        unit[i] = (removed ? unit[i] - mean[d] : unit[i]) * signs[d];
    }
    transform(unit, lane);
    UNROLL for (int i = 0; i < RUN; ++i) unit[i] /= norm > 1e-30f ? norm : 1e-30f;
    return removed;
}
