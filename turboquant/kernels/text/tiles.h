// Attention over a tile of tokens. Needs a backend's header, layout.h, codes.h, DIM and TILES.
//
// Products are of 8 x 8 blocks in the lanes of a SIMD-group: in a block, a lane holds two neighbours of one row, of
// ROW(lane) and from COLUMN(lane) on. Which coordinate stands where in a product is free, as long as both factors agree,
// so each lane takes a run of a vector's coordinates that lie side by side in memory, and no code is ever moved.

// What a SIMD-group knows of TILES * 8 queries so far. Queries are columns; of each block a lane has two.
struct State {
    float output[TILES][DIM / 16][4];  // not normalised, in the rotated basis; rows of blocks are coordinates
    float highest[TILES][2];           // of the scores, in powers of two
    float total[TILES][2];             // of the weights; this and the next of this lane's rows only
    float mean_share[TILES][2];        // of the weights of those values whose mean was removed

    // Make a query's highest score this one, if it is higher.
    FUNCTION void raise(int n, int i, float most) {
        if (most <= highest[n][i]) return;
        const float fade = EXP2(highest[n][i] - most);
        highest[n][i] = most;
        total[n][i] *= fade;
        mean_share[n][i] *= fade;
        UNROLL for (int m = 0; m < DIM / 16; ++m) {
            output[n][m][i] *= fade;
            output[n][m][i + 2] *= fade;
        }
    }
};

// The token that stands in a row of a block: two of each four change places, so that lanes which read values together read
// from different banks.
#define TOKEN(row) ((row) ^ ((row) >> 1 & 1))

// What a lane reads of 16 tokens, of which those from `begin` on and before `end` count.
template <int K_BITS, int V_BITS>
struct Tile {
    Run<K_BITS, 4> keys[2];
    Run<V_BITS, 8> values[4];
    half key_scale[2], value_scale[2];  // not yet floats: to convert them would wait for them
    int begin, end;

    // The 16 tokens from `first` on; where there are fewer, the last 16.
    FUNCTION void read(THREAD const Tokens& tokens, int first, int stop, int lane) {
        const int row = ROW(lane), column = COLUMN(lane);
        const int from = first + 16 <= stop ? first : stop > 16 ? stop - 16 : 0;
        begin = first - from;
        end = stop - from;
        GLOBAL const u8* key = tokens.key_codes + (from + TOKEN(row)) * (DIM * K_BITS / 8);
        GLOBAL const u8* value = tokens.value_codes + from * (DIM * V_BITS / 8);
        UNROLL for (int i = 0; i < 2; ++i) {
            keys[i].read(key + 8 * i * (DIM * K_BITS / 8), column / 2);
            key_scale[i] = K_BITS == 16 ? half(-1.0f) : tokens.key_scales[from + TOKEN(row) + 8 * i];
            value_scale[i] = V_BITS == 16 ? half(-1.0f) : tokens.value_scales[from + TOKEN(row) + 8 * i];
        }
        UNROLL for (int i = 0; i < 4; ++i) {
            values[i].read(value + (TOKEN(column + (i & 1)) + (i & 2) * 4) * (DIM * V_BITS / 8), row);
        }
    }
};

// The queries as right factors: blocks, of which a lane has two words, in shared memory, or in registers if HELD.
struct Queries {
    SHARED_POINTER const u32* shared;
    u32 held[HELD ? DIM / 16 : 1][2];  // only of 8 queries

    FUNCTION void hold(int lane) {
        UNROLL for (int k = 0; k < DIM / 16 && HELD; ++k) read_shared(0, k, lane, held[k]);
    }

    FUNCTION void read_shared(int n, int k, int lane, THREAD u32 (&factor)[2]) {
        SHARED_POINTER const u32* at = shared + ((n * (DIM / 16) + k) * 32 + lane) * 2;
        factor[0] = at[0];
        factor[1] = at[1];
    }

    FUNCTION void read(int n, int k, int lane, THREAD u32 (&factor)[2]) {
        if (!HELD) read_shared(n, k, lane, factor);
        if (HELD) factor[0] = held[HELD ? k : 0][0];
        if (HELD) factor[1] = held[HELD ? k : 0][1];
    }
};

// Attention of queries over a tile.
template <int K_BITS, int V_BITS, int N>
FUNCTION void attend_tile(
    THREAD State& state, THREAD Queries& queries, THREAD const float (&mean_scores)[TILES][2], THREAD const Tokens& tokens,
    THREAD Tile<K_BITS, V_BITS>& tile, int lane) {
    const int row = ROW(lane);
    const u32 copy = lane % (N < 32 ? N : 32) * 4;
    float scores[TILES][4];
    UNROLL for (int n = 0; n < TILES; ++n) {
        UNROLL for (int i = 0; i < 4; ++i) scores[n][i] = 0;
    }
    UNROLL for (int k = 0; k < DIM / 16; ++k) {
        u32 block[4];
        UNROLL for (int i = 0; i < 4; ++i) block[i] = tile.keys[i & 1].template pair<N>(tokens.key_table, copy, 2 * k + (i >> 1));
        UNROLL for (int n = 0; n < TILES; ++n) {
            u32 factor[2];
            queries.read(n, k, lane, factor);
            multiply_add(scores[n], block, factor);
        }
    }
    // Of each of this lane's two tokens: its scales, and whether the means count.
    float key_scale[2], value_scale[2], key_mean[2], value_mean[2], outside[2];
    UNROLL for (int i = 0; i < 2; ++i) {
        const float of_key = float(tile.key_scale[i]), of_value = float(tile.value_scale[i]);
        key_scale[i] = ABSOLUTE(of_key);
        value_scale[i] = ABSOLUTE(of_value) * tokens.value_factor;
        key_mean[i] = of_key > 0 ? 1.0f : 0.0f;
        value_mean[i] = of_value > 0 ? 1.0f : 0.0f;
        outside[i] = TOKEN(row) + 8 * i >= tile.begin && TOKEN(row) + 8 * i < tile.end ? 0.0f : -INFINITY;
    }
    // Weights are relative to the highest score so far, or one that is not much lower. The SIMD-group asks once for all
    // queries, so that their exponentials are not computed one after the other.
    bool higher = false;
    UNROLL for (int n = 0; n < TILES; ++n) {
        UNROLL for (int i = 0; i < 4; ++i) {
            scores[n][i] = scores[n][i] * key_scale[i >> 1] + (mean_scores[n][i & 1] * key_mean[i >> 1] + outside[i >> 1]);
            higher = higher || scores[n][i] > state.highest[n][i & 1] + HEADROOM;
        }
    }
    if (in_any_lane(higher)) {
        UNROLL for (int n = 0; n < TILES; ++n) {
            UNROLL for (int i = 0; i < 2; ++i) {
                state.raise(n, i, over_rows_max(scores[n][i] > scores[n][i + 2] ? scores[n][i] : scores[n][i + 2]));
            }
        }
    }
    u32 weights[TILES][2];
    UNROLL for (int n = 0; n < TILES; ++n) {
        UNROLL for (int i = 0; i < 4; ++i) {
            float weight = EXP2(scores[n][i] - state.highest[n][i & 1]);
            state.total[n][i & 1] += weight;
            state.mean_share[n][i & 1] += weight * value_mean[i >> 1];
            scores[n][i] = weight * value_scale[i >> 1];
        }
        UNROLL for (int i = 0; i < 2; ++i) {
            weights[n][i] = as_right_factor(pack_halves(scores[n][2 * i], scores[n][2 * i + 1]));
        }
    }
    UNROLL for (int i = 0; i < 4; i += 2) tile.values[i].weave_with(tile.values[i + 1]);
    UNROLL for (int m = 0; m < DIM / 16; ++m) {
        u32 block[4];
        UNROLL for (int i = 0; i < 4; i += 2) {
            tile.values[i].template of_two<N>(tile.values[i + 1], tokens.value_table, copy, m, block[i], block[i + 1]);
        }
        UNROLL for (int n = 0; n < TILES; ++n) multiply_add(state.output[n][m], block, weights[n]);
    }
}

// The share of one of `splits` splits in `count` tokens: whole tiles of 16.
FUNCTION void share_of(int split, int splits, int count, THREAD int& first, THREAD int& stop) {
    const int share = (count + 16 * splits - 1) / (16 * splits) * 16;
    first = split * share;
    stop = first + share < count ? first + share : count;
}

// Attention of queries over a split's share of `count` tokens of a kind. Its tables lie in `shared`, one behind the other
// where they differ; `levels` has those of keys, and behind 256 entries those of values. If AHEAD, a tile is read while
// that before is worked on; the first is always read before tables are there. To be called by all threads.
template <int K_BITS, int V_BITS, int N, bool AHEAD>
FUNCTION void attend_split(
    THREAD State& state, THREAD Queries& queries, THREAD const float (&mean_scores)[TILES][2], THREAD Tokens& tokens,
    GLOBAL const u32* levels, SHARED_POINTER u32* shared, int split, int splits, int count, int index) {
    int first, stop;
    share_of(split, splits, count, first, stop);
    if (first >= stop) return;  // the same for all threads
    Tile<K_BITS, V_BITS> tile, next;
    first += 16 * UNIFORM(index / 32);
    if (first < stop) next.read(tokens, first, stop, index % 32);
    tokens.key_table = shared;
    tokens.value_table = shared + second_table<K_BITS, V_BITS, N>();
    if (K_BITS < 16) {
        fill_table<K_BITS, N>(shared, levels, index);
        if (V_BITS != K_BITS) fill_table<V_BITS, N>(shared + second_table<K_BITS, V_BITS, N>(), levels + 256, index);
        BARRIER;
    }
    for (; first < stop; first += 16 * WARPS) {
        const bool more = first + 16 * WARPS < stop;
        tile = next;
        if (AHEAD && more) next.read(tokens, first + 16 * WARPS, stop, index % 32);
        attend_tile<K_BITS, V_BITS, N>(state, queries, mean_scores, tokens, tile, index % 32);
        if (!AHEAD && more) next.read(tokens, first + 16 * WARPS, stop, index % 32);
    }
    BARRIER;
}
