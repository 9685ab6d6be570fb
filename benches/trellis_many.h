// Attention of 64 queries of each KV head over tokens in trellis codes of 4 bits: a body of a kernel, see
// trellis_attention.py. Two groups of four SIMD-groups share a table; each does what attend_many.h does.

const int index = THREAD_INDEX % 128, group = THREAD_INDEX / 128, lane = index % 32, warp = index / 32;
const int split = GROUP_X * 2 + group, head = GROUP_Y, block = GROUP_Z;
const int n_heads = plan[1], n_kv_heads = plan[2], splits = plan[7];
const int blocks = plan[4] / 128, repeats = n_heads / n_kv_heads, rows = plan[0] * repeats;
GLOBAL const float* settings = (GLOBAL const float*)(plan + SIZES);
GLOBAL const float* key_mean = constants + KEY_MEAN(n_kv_heads);
GLOBAL const float* signs = constants + SIGNS(n_kv_heads);

GROUP_SHARED(shared);
Tiles tiles;
tiles.keys = shared + TABLE_WORDS + group * (2 * TILE_WORDS + 256);
tiles.values = tiles.keys + TILE_WORDS;
tiles.scales = (SHARED_POINTER float*)(tiles.keys + 2 * TILE_WORDS);

for (int first = 4 * THREAD_INDEX; first < TABLE_WORDS; first += 4 * 256) WRITE_4(shared + first, levels[first / 32]);
SHARED_POINTER int* places = (SHARED_POINTER int*)tiles.scales;  // of the queries in their array
if (index < 64) {
    const int query = block * 64 + index, sequence = query / repeats;
    places[index] = query < rows ? (sequence * n_heads + head * repeats + query % repeats) * DIM : -1;
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
        own.queries[k][i] = tiles.keys[(r * DIM + 16 * k + (i >> 1) * 8) / 2 + lane % 4];
    }
}
UNROLL for (int i = 0; i < 2; ++i) own.highest[i] = own.total[i] = own.mean_share[i] = 0;
own.none = true;
UNROLL for (int i = 0; i < DIM / 2; ++i) own.output[i] = 0;
BARRIER;

const float value_factor = constants[VALUE_FACTORS(n_kv_heads) + head];
const u32 copies = lane * 4 * 0x0101u;
const int key_lane = (lane + 28) % 32, value_lane = lane / 4 * 4 + (lane + 3) % 4;

// What a thread reads of 64 tokens: of four runs of 8 tokens of two strings of keys, and of values, two words and the one
// before them; and a token's scale, of keys in the first 64 threads.
struct Read {
    u32 words[2][4][3];
    half scale;
} next;
auto read = [&](int tile) {
    const size_type of_block = (size_type)head * blocks + tile / 2;
    UNROLL for (int kind = 0; kind < 2; ++kind) {
        GLOBAL const u32* codes = (kind ? value_codes : key_codes) + (of_block * (DIM / 8) + warp * 4) * 128;
        const int before = tile % 2 ? lane * 2 + 1 : 64 + (kind ? value_lane : key_lane) * 2 + 1;
        UNROLL for (int j = 0; j < 4; ++j) {
            next.words[kind][j][0] = codes[j * 128 + before];
            READ_8(codes + j * 128 + tile % 2 * 64 + lane * 2, next.words[kind][j] + 1);
        }
    }
    const int n = index % 64;
    next.scale = (index < 64 ? key_scales : value_scales)[of_block * 128 + n % 8 * 16 + tile % 2 * 8 + n / 8];
};
auto write_scales = [&] {
    const float own_scale = float(next.scale);
    SHARED_POINTER float* to = tiles.scales + index * 2;
    to[0] = ABSOLUTE(own_scale) * (index < 64 ? 1.0f : value_factor);
    to[1] = own_scale > 0 ? 1.0f : 0.0f;
};
auto unpack_words = [&](int kind, SHARED_POINTER u32* tile) {
    UNROLL for (int j = 0; j < 4; ++j) {
        const u32* words = next.words[kind][j];
        const u32 late[3] = {SHIFTED_IN(words[0], words[1]), SHIFTED_IN(words[1], words[2]), words[2] >> 22};
        u32 found[8];
        UNROLL for (int i = 0; i < 2; ++i) {
            const u32 level_rows = words[i + 1] ^ late[i];
            const u32 first = MASKED_OR(late[i] << 7, 0x01018080u, copies);
            const u32 second = MASKED_OR(SHIFTED_OUT(late[i], late[i + 1]), 0x01018080u, copies);
            found[4 * i] = LEVELS_AT(PLACE(level_rows, first, 0));
            found[4 * i + 1] = LEVELS_AT(NEXT_PLACE(level_rows, first, 1));
            found[4 * i + 2] = LEVELS_AT(PLACE(level_rows, second, 2));
            found[4 * i + 3] = LEVELS_AT(NEXT_PLACE(level_rows, second, 3));
        }
        UNROLL for (int i = 0; i < 8; ++i) tile[i * (DIM / 8 * 32) + (warp * 4 + j) * 32 + lane] = found[i];
    }
};

const int share = (2 * blocks + splits - 1) / splits;
const int stop = (split + 1) * share < 2 * blocks ? (split + 1) * share : 2 * blocks;
int tile = split * share;
if (tile < stop) {  // the same for all threads of a group
    read(tile);
    unpack_words(0, tiles.keys);
    write_scales();
    SHOW_TO_PRODUCTS;
}
GROUP_BARRIER(group);
for (; tile < stop; ++tile) {
    float scores[32];
    begin_products(scores);
    UNROLL for (int k = 0; k < DIM / 16; ++k) multiply_keys(scores, own.queries[k], tiles.keys, k);
    end_products();
    unpack_words(1, tiles.values);
    SHOW_TO_PRODUCTS;
    if (tile + 1 < stop) read(tile + 1);
    wait_for_products(scores);
    u32 weights[4][4];
    weigh(own, scores, weights, tiles, 64, lane);
    GROUP_BARRIER(group);
    begin_products(own.output);
    UNROLL for (int k = 0; k < 4; ++k) multiply_pairs(own.output, weights[k], tiles.values, k);
    end_products();
    if (tile + 1 < stop) {
        unpack_words(0, tiles.keys);
        write_scales();
        SHOW_TO_PRODUCTS;
    }
    wait_for_products(own.output);
    GROUP_BARRIER(group);
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
        WRITE_8(to + n * 8 + lane % 4 * 2, own.output[n * 4 + h * 2], own.output[n * 4 + h * 2 + 1]);
    }
    if (lane % 4 == 0) {
        to[DIM] = own.none ? -INFINITY : own.highest[h];
        to[DIM + 1] = own.total[h];
        to[DIM + 2] = own.mean_share[h];
    }
}
