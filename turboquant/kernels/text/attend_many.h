// Attention of 64 queries over one split of a layer's tokens, for GPUs with products of thread-groups (hopper.h): a body of
// a kernel, see attention/gpu.py. Each of four SIMD-groups has 16 of the queries. All of them unpack 64 tokens at a time
// into shared memory: values while the scores of their keys are computed, and the next keys while values are summed up.
// If TRELLIS, the coarse tokens are in trellis codes, and TEAMS teams of four SIMD-groups share their table; each has its own
// split.

const int team = UNIFORM(THREAD_INDEX / THREADS);
const int index = THREAD_INDEX % THREADS, lane = index % 32, warp = index / 32;
const int split = GROUP_X * TEAMS + team, head = GROUP_Y, block = GROUP_Z;
const int n_heads = plan[1], n_kv_heads = plan[2], length = plan[3], splits = plan[7], fine_splits = plan[8];
const int counts[3] = {plan[4], plan[5], plan[6]};  // tokens encoded, encoded finer, kept as they are
const int repeats = n_heads / n_kv_heads, rows = plan[0] * repeats * length;
GLOBAL const float* settings = (GLOBAL const float*)(plan + SIZES);
GLOBAL const float* key_mean = constants + KEY_MEAN(n_kv_heads);
GLOBAL const float* signs = constants + SIGNS(n_kv_heads);
GLOBAL const u32* levels = (GLOBAL const u32*)(constants + LEVELS(n_kv_heads));

GROUP_SHARED(shared);
Tiles tiles;
tiles.keys = shared + team * (2 * TILE_WORDS + 256);
tiles.values = tiles.keys + TILE_WORDS;
tiles.scales = (SHARED_POINTER float*)(tiles.values + TILE_WORDS);
SHARED_POINTER u32* tables = shared + TEAMS * (2 * TILE_WORDS + 256);
#if TRELLIS
if (counts[0]) fill_pairs<KEY_BITS, VALUE_BITS>(
    tables, (GLOBAL const u32*)(constants + TRELLIS_PAIRS(n_kv_heads)), THREAD_INDEX, TEAMS * THREADS);
#endif

// Rotate the queries. A SIMD-group passes its own through shared memory.
SHARED_POINTER int* places = (SHARED_POINTER int*)tiles.scales;  // of the queries in their array
if (index < 64) {
    const int query = block * 64 + index, sequence = query / (repeats * length);
    const int of_head = (sequence * n_heads + head * repeats + query / length % repeats) * length + query % length;
    places[index] = query < rows ? of_head * DIM : -1;
}
BARRIER;
SHARED_POINTER half* vectors = (SHARED_POINTER half*)tiles.keys;
Rows own;
UNROLL_4 for (int first = 0; first < 16; ++first) {
    const int r = warp * 16 + first, at = places[r];
    float x[DIM / 32], mean_score = 0;
    UNROLL for (int i = 0; i < DIM / 32; ++i) {
        const int d = 32 * i + lane;
        x[i] = at >= 0 ? float(queries[at + d]) * settings[0] : 0.0f;
        mean_score += x[i] * key_mean[head * DIM + d];
        x[i] *= signs[d];
    }
    mean_score = over_lanes_sum(mean_score);
    UNROLL for (int h = 0; h < 2; ++h) own.mean_score[h] = lane / 4 + 8 * h == first ? mean_score : own.mean_score[h];
    hadamard(x, lane);
    UNROLL for (int i = 0; i < DIM / 32; ++i) vectors[r * DIM + 32 * i + lane] = half(x[i] * settings[1]);
}
BARRIER;
UNROLL for (int k = 0; k < DIM / 16; ++k) {
    UNROLL for (int i = 0; i < 4; ++i) {
        const int r = warp * 16 + lane / 4 + (i & 1) * 8;
        own.queries[k][i] = tiles.keys[(r * DIM + COORDINATE(2 * k + (i >> 1))) / 2 + lane % 4];
    }
}
UNROLL for (int i = 0; i < 2; ++i) {
    own.highest[i] = own.total[i] = own.mean_share[i] = 0;
}
own.none = true;
UNROLL for (int i = 0; i < DIM / 2; ++i) own.output[i] = 0;

Tokens tokens;
tokens.value_factor = constants[VALUE_FACTORS(n_kv_heads) + head];
tokens.set<KEY_BITS, VALUE_BITS>(key_codes, key_scales, value_codes, value_scales, head, counts[0]);
const int coarse_splits = splits - fine_splits;  // without splits for finer tokens alone, all share these out too
#if TRELLIS
BARRIER;
if (split < coarse_splits) {  // the same for all threads of a team
    attend_halves<KEY_BITS, VALUE_BITS>(own, tokens, tiles, tables, split, coarse_splits, counts[0] / 128, index);
}
BARRIER;  // nobody reads the tables any more
tables += team * (TABLE_WORDS / TEAMS);
#else
attend_share<KEY_BITS, VALUE_BITS, COPIES>(own, tokens, levels, tiles, tables, split, coarse_splits, counts[0], index);
#endif
const int fine_heads = n_kv_heads * (counts[1] < 16 ? 16 : counts[1]);
tokens.set<FINE_KEY_BITS, FINE_VALUE_BITS>(
    fine_key_codes, fine_scales, fine_value_codes, fine_scales + fine_heads, head, counts[1]);
const int fine_split = fine_splits ? split - coarse_splits : split;
if (fine_split >= 0) {  // the same for all threads of a team
    attend_share<FINE_KEY_BITS, FINE_VALUE_BITS, FINE_COPIES>(
        own, tokens, levels + 512, tiles, tables, fine_split, fine_splits ? fine_splits : splits, counts[1], index);
}
if (split == splits - 1) {
    const size_type halves = (size_type)n_kv_heads * (counts[2] < 16 ? 16 : counts[2]) * (DIM / 2);
    tokens.set<16, 16>(
        (GLOBAL const u32*)sinks, key_scales, (GLOBAL const u32*)sinks + halves, value_scales, head, counts[2]);
    attend_share<16, 16, 1>(own, tokens, levels, tiles, tables, 0, 1, counts[2], index);
}

UNROLL for (int h = 0; h < 2; ++h) {
    const int r = block * 64 + warp * 16 + lane / 4 + h * 8;
    UNROLL for (int i = 1; i < 4; i *= 2) {
        own.total[h] += from_lane(own.total[h], i);
        own.mean_share[h] += from_lane(own.mean_share[h], i);
    }
    if (r >= rows) continue;
    GLOBAL float* to = partials + (size_type)((head * splits + split) * rows + r) * (DIM + 4);
    UNROLL for (int n = 0; n < DIM / 8; ++n) {
        WRITE_8(to + COORDINATE(n) + lane % 4 * 2, own.output[n * 4 + h * 2], own.output[n * 4 + h * 2 + 1]);
    }
    if (lane % 4 == 0) {
        to[DIM] = own.none ? -INFINITY : own.highest[h];
        to[DIM + 1] = own.total[h];
        to[DIM + 2] = own.mean_share[h];
    }
}
