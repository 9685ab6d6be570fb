// Attention of 64 queries over tiles of 64 tokens in trellis codes, which a team of four SIMD-groups unpacks into shared
// memory. Needs many.h and trellis.h.
//
// A tile has half of the tokens of a block: of each lane's 16 the first or the last 8. Tiles of values have pairs of tokens
// side by side, not of coordinates; token 8 i + n of a tile is the lane's row n's i-th.

// What a thread reads of a tile: a quarter of the rows of coordinates.
template <int K_BITS, int V_BITS>
struct Halves {
    enum { K_WORDS = (K_BITS + 1) / 2, V_WORDS = (V_BITS + 1) / 2 };
    u32 keys[DIM / 32][K_WORDS + 1], values[DIM / 32][V_WORDS + 1];  // the word before, and words
    half scale;  // of keys in the first 64 threads of a team, else of values; not yet a float: to convert it would wait

    FUNCTION void read(THREAD const Tokens& tokens, int tile, int index) {
        const int lane = index % 32, warp = index / 32;
        UNROLL for (int j = 0; j < DIM / 32; ++j) {
            read_half<K_BITS>(row_of<K_BITS>(tokens.key_codes, tile / 2, warp, j), tile % 2, lane, false, keys[j]);
            read_half<V_BITS>(row_of<V_BITS>(tokens.value_codes, tile / 2, warp, j), tile % 2, lane, true, values[j]);
        }
        const int n = index % 64;
        scale = (index < 64 ? tokens.key_scales : tokens.value_scales)[tile / 2 * 128 + n % 8 * 16 + tile % 2 * 8 + n / 8];
    }

    FUNCTION void write_scales(THREAD const Tokens& tokens, SHARED_POINTER float* scales, int index) {
        const float own = float(scale);
        scales[index * 2] = ABSOLUTE(own) * (index < 64 ? 1.0f : tokens.value_factor);
        scales[index * 2 + 1] = own > 0 ? 1.0f : 0.0f;
    }

    template <int BITS>
    FUNCTION static GLOBAL const u32* row_of(GLOBAL const u8* codes, int block, int warp, int j) {
        return (GLOBAL const u32*)codes + ((size_type)block * (DIM / 8) + warp * (DIM / 32) + j) * (32 * BITS);
    }

    template <int BITS>
    FUNCTION static void read_half(
        GLOBAL const u32* row, bool second, int lane, bool values, THREAD u32 (&words)[(BITS + 1) / 2 + 1]) {
        const int from = second ? lane : lane_before(values, lane);
        if (BITS == 4) {
            words[0] = row[(second ? 0 : 64) + from * 2 + 1];
            READ_8(row + (second ? 64 : 0) + lane * 2, words + 1);
        } else if (BITS == 3) {  // a half ends in the middle of a word
            words[0] = row[second ? from * 2 + 1 : 64 + from];
            words[1] = row[second ? 64 + lane : lane * 2];
            words[2] = row[lane * 2 + 1];
        } else {
            words[0] = row[from * 2 + (second ? 0 : 1)];
            words[1] = row[lane * 2 + (second ? 1 : 0)];
        }
    }
};

// Look up a thread's pairs of levels, and store them in a tile.
template <int BITS>
FUNCTION void unpack_pairs(
    THREAD const u32 (&read)[DIM / 32][(BITS + 1) / 2 + 1], bool second, SHARED_POINTER u32* tile, SHARED_POINTER const u32* table,
    u32 copy, int index) {
    UNROLL for (int j = 0; j < DIM / 32; ++j) {
        u32 before = read[j][0], words[(BITS + 1) / 2], found[8];
        UNROLL for (int i = 0; i < (BITS + 1) / 2; ++i) words[i] = read[j][1 + i];
        if (BITS == 3 && second) {
            words[1] = words[0] >> 16;
            words[0] = early_by(before, words[0], 16);
            before <<= 16;
        }
        Strings<BITS, 8>::look_up(words, before, table, copy, found);
        // At the place of the products' coordinates that has this row's; see many.h.
        UNROLL for (int i = 0; i < 8; ++i) tile[(i * (DIM / 8) + j * 4 + index / 32) * BLOCK_WORDS + index % 32] = found[i];
    }
}

// Attention over a split's share of `blocks` blocks. To be called by all threads of a team.
template <int K_BITS, int V_BITS>
FUNCTION void attend_halves(
    THREAD Rows& own, THREAD const Tokens& tokens, THREAD const Tiles& tiles, SHARED_POINTER const u32* table, int split,
    int splits, int blocks, int index) {
    const int share = (2 * blocks + splits - 1) / splits;
    const int stop = (split + 1) * share < 2 * blocks ? (split + 1) * share : 2 * blocks;
    const u32 of_keys = copy_of<K_BITS, V_BITS>(false, index % 32), of_values = copy_of<K_BITS, V_BITS>(true, index % 32);
    int tile = split * share;
    if (tile >= stop) return;  // the same for all threads of a team
    Halves<K_BITS, V_BITS> codes;
    codes.read(tokens, tile, index);
    TEAM_BARRIER;  // nobody reads what was in the tiles before
    unpack_pairs<K_BITS>(codes.keys, tile % 2, tiles.keys, table, of_keys, index);
    codes.write_scales(tokens, tiles.scales, index);
    SHOW_TO_PRODUCTS;
    TEAM_BARRIER;
    for (; tile < stop; ++tile) {
        float scores[32];
        begin_products(scores);
        UNROLL for (int k = 0; k < DIM / 16; ++k) multiply_keys(scores, own.queries[k], tiles.keys, k);
        end_products();
        unpack_pairs<V_BITS>(codes.values, tile % 2, tiles.values, table, of_values, index);
        SHOW_TO_PRODUCTS;
        if (tile + 1 < stop) codes.read(tokens, tile + 1, index);
        wait_for_products(scores);
        u32 weights[4][4];
        weigh(own, scores, weights, tiles, 64, index % 32);
        TEAM_BARRIER;
        begin_products(own.output);
        UNROLL for (int k = 0; k < 4; ++k) multiply_pairs(own.output, weights[k], tiles.values, k);
        end_products();
        if (tile + 1 < stop) {
            unpack_pairs<K_BITS>(codes.keys, (tile + 1) % 2, tiles.keys, table, of_keys, index);
            codes.write_scales(tokens, tiles.scales, index);
            SHOW_TO_PRODUCTS;
        }
        wait_for_products(own.output);
        TEAM_BARRIER;
    }
}
