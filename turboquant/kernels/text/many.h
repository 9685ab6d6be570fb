// Attention of 64 queries over tiles of 64 tokens, which a thread-group unpacks into shared memory. Needs hopper.h, layout.h
// and codes.h. A SIMD-group has 16 queries, a lane parts of two of them, 8 apart: those of its row in a block of products.

// The word of a tile where eight coordinates of a token begin. Those of 8 tokens stand together, with a gap behind them, so
// that lanes which write together write to different banks. For the same reason a quarter of a token's coordinates has
// every fourth of the places, which are in the order of the products' coordinates.
#define TILE_WORD(token, place) (((token) / 8 * (DIM / 8) + (place)) * BLOCK_WORDS + (token) % 8 * 4)
#define COORDINATE(place) ((place) % 4 * (DIM / 4) + (place) / 4 * 8)

// What a SIMD-group knows of its queries so far.
struct Rows {
    u32 queries[DIM / 16][4];          // as left factors
    float output[DIM / 2];             // not normalised, in the rotated basis, in blocks of 8 coordinates
    float highest[2], mean_score[2];   // of the scores so far, or one not much lower; the score of the keys' mean
    float total[2], mean_share[2];     // of the weights; of those of values whose mean was removed; this lane's alone
    bool none;                         // no tokens were there yet
};

// A thread-group's shared memory: tiles of 64 tokens as right factors, and what belongs to each token: for keys and then
// for values its scale, and 1 if its mean was removed, else 0.
struct Tiles {
    SHARED_POINTER u32* keys;
    SHARED_POINTER u32* values;
    SHARED_POINTER float* scales;
};

// What a thread reads of a tile: a quarter of two tokens' coordinates.
template <int K_BITS, int V_BITS>
struct Codes {
    Run<K_BITS, 4> keys[2];
    Run<V_BITS, 4> values[2];
    half scale[2];  // of keys in even quarters, else of values; not yet floats: to convert them would wait for them

    FUNCTION void read(THREAD const Tokens& tokens, int first, int stop, int index) {
        const int part = index % 4;
        UNROLL for (int i = 0; i < 2; ++i) {
            const int wanted = first + index / 32 * 16 + i * 8 + index / 4 % 8, t = wanted < stop ? wanted : stop - 1;
            keys[i].read(tokens.key_codes + t * (DIM * K_BITS / 8), part);
            values[i].read(tokens.value_codes + t * (DIM * V_BITS / 8), part);
            if ((part & 1 ? V_BITS : K_BITS) < 16) scale[i] = (part & 1 ? tokens.value_scales : tokens.key_scales)[t];
        }
    }

    FUNCTION void write_scales(THREAD const Tokens& tokens, SHARED_POINTER float* scales, int index) {
        const int part = index % 4;
        if (part > 1) return;
        UNROLL for (int i = 0; i < 2; ++i) {
            SHARED_POINTER float* to = scales + part * 128 + (index / 32 * 16 + i * 8 + index / 4 % 8) * 2;
            const float own = (part & 1 ? V_BITS : K_BITS) < 16 ? float(scale[i]) : -1.0f;
            to[0] = ABSOLUTE(own) * (part & 1 ? tokens.value_factor : 1.0f);
            to[1] = own > 0 ? 1.0f : 0.0f;
        }
    }
};

// Unpack a thread's runs of two tokens into a tile. All levels are looked up before one is stored.
template <int N, int BITS>
FUNCTION void unpack(THREAD Run<BITS, 4> (&runs)[2], SHARED_POINTER u32* tile, SHARED_POINTER const u32* table, int index) {
    u32 pairs[2][DIM / 32][4];
    UNROLL for (int i = 0; i < 2; ++i) {
        UNROLL for (int j = 0; j < DIM / 8; ++j) {
            pairs[i][j / 4][j % 4] = runs[i].template pair<N>(table, index % (N < 32 ? N : 32) * 4, j);
        }
    }
    UNROLL for (int i = 0; i < 2; ++i) {
        UNROLL for (int c = 0; c < DIM / 32; ++c) {
            STORE_16(tile + TILE_WORD(index / 32 * 16 + i * 8 + index / 4 % 8, c * 4 + index % 4), pairs[i][c]);
        }
    }
}

// Of scores relative to the highest so far, the weights; returns whether one is so large that there must be a new highest.
FUNCTION bool weights_of(THREAD const float (&scores)[32], THREAD float (&weights)[32], THREAD float (&sums)[2]) {
    sums[0] = sums[1] = 0;
    UNROLL for (int i = 0; i < 32; ++i) {
        weights[i] = EXP2(scores[i]);
        sums[i / 2 % 2] += weights[i];
    }
    return sums[0] > float(1 << HEADROOM) || sums[1] > float(1 << HEADROOM);
}

// Products of queries and 64 tokens' keys to weights, as left factors; tokens from `stop` on have none.
FUNCTION void weigh(
    THREAD Rows& own, THREAD float (&scores)[32], THREAD u32 (&factors)[4][4], THREAD const Tiles& tiles, int stop,
    int lane) {
    UNROLL for (int n = 0; n < 8; ++n) {
        float of_keys[4];  // of two neighbours
        READ_FLOATS(tiles.scales + (n * 8 + lane % 4 * 2) * 2, of_keys);
        UNROLL for (int i = 0; i < 4; ++i) {
            scores[4 * n + i] = scores[4 * n + i] * of_keys[i % 2 * 2] +
                (own.mean_score[i / 2] * of_keys[i % 2 * 2 + 1] - own.highest[i / 2]);
        }
    }
    if (stop < 64) {  // the same for all threads
        UNROLL for (int i = 0; i < 32; ++i) {
            if (i / 4 * 8 + lane % 4 * 2 + i % 2 >= stop) scores[i] = -INFINITY;
        }
    }
    float weights[32], sums[2];
    const bool high = weights_of(scores, weights, sums);
    if (in_any_lane(high || own.none)) {
        UNROLL for (int h = 0; h < 2; ++h) {
            float highest = own.none ? -INFINITY : 0.0f;
            UNROLL for (int i = 0; i < 32; ++i) {
                if (i / 2 % 2 == h) highest = scores[i] > highest ? scores[i] : highest;
            }
            UNROLL for (int i = 1; i < 4; i *= 2) {
                const float other = from_lane(highest, i);
                highest = other > highest ? other : highest;
            }
            const float fade = own.none ? 0.0f : EXP2(-highest);
            own.highest[h] += highest;
            own.total[h] *= fade;
            own.mean_share[h] *= fade;
            UNROLL for (int i = 0; i < DIM / 2; ++i) {
                if (i / 2 % 2 == h) own.output[i] *= fade;
            }
            UNROLL for (int i = 0; i < 32; ++i) {
                if (i / 2 % 2 == h) scores[i] -= highest;
            }
        }
        weights_of(scores, weights, sums);
        own.none = false;
    }
    UNROLL for (int h = 0; h < 2; ++h) own.total[h] += sums[h];
    UNROLL for (int n = 0; n < 8; ++n) {
        float of_values[4];
        READ_FLOATS(tiles.scales + 128 + (n * 8 + lane % 4 * 2) * 2, of_values);
        UNROLL for (int h = 0; h < 2; ++h) {
            const float one = weights[4 * n + 2 * h], other = weights[4 * n + 2 * h + 1];
            own.mean_share[h] += one * of_values[1] + other * of_values[3];
            factors[n / 2][n % 2 * 2 + h] = pack_halves(one * of_values[0], other * of_values[2]);
        }
    }
}

// Attention over a split's share of `count` tokens of a kind. Its tables lie in `table`, one behind the other where they
// differ; `levels` has those of keys, and behind 256 entries those of values. To be called by all threads of a team.
template <int K_BITS, int V_BITS, int N>
FUNCTION void attend_share(
    THREAD Rows& own, THREAD const Tokens& tokens, GLOBAL const u32* levels, THREAD const Tiles& tiles,
    SHARED_POINTER u32* table, int split, int splits, int count, int index) {
    const int share = (count + 64 * splits - 1) / (64 * splits) * 64;
    const int stop = (split + 1) * share < count ? (split + 1) * share : count;
    int first = split * share;
    if (first >= stop) return;  // the same for all threads of a team
    Codes<K_BITS, V_BITS> codes;
    codes.read(tokens, first, stop, index);
    SHARED_POINTER u32* other = table + second_table<K_BITS, V_BITS, N>();
    TEAM_BARRIER;  // nobody reads what was in the tables and the tiles before
    fill_table<K_BITS, N>(table, levels, index);
    if (V_BITS != K_BITS) fill_table<V_BITS, N>(other, levels + 256, index);
    TEAM_BARRIER;
    unpack<N>(codes.keys, tiles.keys, table, index);
    codes.write_scales(tokens, tiles.scales, index);
    SHOW_TO_PRODUCTS;
    TEAM_BARRIER;
    for (; first < stop; first += 64) {
        float scores[32];
        begin_products(scores);
        UNROLL for (int k = 0; k < DIM / 16; ++k) multiply_keys(scores, own.queries[k], tiles.keys, k);
        end_products();
        unpack<N>(codes.values, tiles.values, other, index);
        SHOW_TO_PRODUCTS;
        if (first + 64 < stop) codes.read(tokens, first + 64, stop, index);
        wait_for_products(scores);
        u32 weights[4][4];
        weigh(own, scores, weights, tiles, stop - first, index % 32);
        TEAM_BARRIER;
        begin_products(own.output);
        UNROLL for (int k = 0; k < 4; ++k) multiply_values(own.output, weights[k], tiles.values, k);
        end_products();
        if (first + 64 < stop) {
            unpack<N>(codes.keys, tiles.keys, table, index);
            codes.write_scales(tokens, tiles.scales, index);
            SHOW_TO_PRODUCTS;
        }
        wait_for_products(own.output);
        TEAM_BARRIER;
    }
}
