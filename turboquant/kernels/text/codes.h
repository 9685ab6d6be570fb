// Packed codes to pairs of halves, and attention over a tile of tokens. Needs a backend's header, layout.h, DIM and TILES.
//
// Products are of 8 x 8 blocks in the lanes of a SIMD-group: in a block, a lane holds two neighbours of one row, of
// ROW(lane) and from COLUMN(lane) on. Which coordinate stands where in a product is free, as long as both factors agree,
// so each lane takes a run of a vector's coordinates that lie side by side in memory, and no code is ever moved.

// How codes of BITS bits lie in memory, see packing.py, and in the tables: two codes an entry, or one, or, of 16 bits,
// no codes at all but halves.
template <int BITS>
struct Format {
    enum {
        LOW = BITS == 3 ? 2 : BITS == 5 || BITS == 6 ? 4 : BITS,
        HIGH = BITS - LOW,
        PAIRED = BITS <= 4,
        ENTRIES = BITS == 16 ? 0 : PAIRED ? 1 << (2 * BITS) : 1 << BITS
    };
};

template <int BYTES>
FUNCTION void read_bytes(GLOBAL const u8* from, THREAD u32* to) {
    if (BYTES >= 16) {
        UNROLL for (int i = 0; i < BYTES / 16; ++i) READ_16(from + 16 * i, to + 4 * i);
    } else if (BYTES == 8) {
        READ_8(from, to);
    } else {
        to[0] = BYTES == 4 ? *(GLOBAL const u32*)from : BYTES == 2 ? u32(*(GLOBAL const u16*)from) : u32(*from);
    }
}

// Bits `shift` .. `shift + width` of a word, moved to `to`, in `others`.
FUNCTION u32 placed(u32 word, int shift, int width, int to, u32 others) {
    return MASKED_OR(shift >= to ? word >> (shift - to) : word << (to - shift), ((1u << width) - 1) << to, others);
}

// Fields of two words: `one` gets the even ones of both, a pair of neighbours for each, `other` the odd ones.
template <int WIDTH>
FUNCTION void weave(THREAD u32& one, THREAD u32& other) {
    const u32 even = WIDTH == 4 ? 0x0f0f0f0fu : WIDTH == 2 ? 0x33333333u : 0x55555555u;
    u32 evens = (one & even) | ((other & even) << WIDTH);
    other = ((one >> WIDTH) & even) | (other & (even << WIDTH));
    one = evens;
}

// A lane's run of one vector: DIM / PARTS coordinates.
template <int BITS, int PARTS>
struct Run {
    enum {
        LOW_BYTES = DIM / PARTS * Format<BITS>::LOW / 8,
        HIGH_BYTES = DIM / PARTS * Format<BITS>::HIGH / 8,
        LOW_WORDS = LOW_BYTES > 4 && BITS < 16 ? LOW_BYTES / 4 : 1,
        HIGH_WORDS = HIGH_BYTES > 4 ? HIGH_BYTES / 4 : 1
    };
    u32 low[LOW_WORDS], high[HIGH_WORDS];
    GLOBAL const u32* halves;  // of 16 bits there are few, and they are read when they are needed

    FUNCTION void read(GLOBAL const u8* vector, int part) {
        halves = (GLOBAL const u32*)(vector + part * LOW_BYTES);
        if (BITS < 16) read_bytes<BITS == 16 ? 4 : LOW_BYTES>(vector + part * LOW_BYTES, low);
        if (Format<BITS>::HIGH) {
            read_bytes<HIGH_BYTES == 0 ? 1 : HIGH_BYTES>(vector + DIM * Format<BITS>::LOW / 8 + part * HIGH_BYTES, high);
        }
    }

    // What a table of N copies says of code i, or, if it is of pairs, of codes 2 i and 2 i + 1. As bytes, entries are
    // 4 N apart, so a code moved there is an offset; `copy` is that of the lane's own copy.
    template <int N>
    FUNCTION u32 entry(SHARED_POINTER const u32* table, u32 copy, int i) {
        const int codes = Format<BITS>::PAIRED ? 2 : 1, place = N == 32 ? 7 : N == 16 ? 6 : N == 8 ? 5 : 2;
        const int width = codes * Format<BITS>::LOW, high_width = codes * Format<BITS>::HIGH;
        u32 offset = placed(low[i * width / 32], i * width % 32, width, place, copy);
        if (high_width) offset = placed(high[i * high_width / 32], i * high_width % 32, high_width, place + width, offset);
        return *(SHARED_POINTER const u32*)((SHARED_POINTER const u8*)table + offset);
    }

    // The levels of coordinates 2 i and 2 i + 1 as two halves.
    template <int N>
    FUNCTION u32 pair(SHARED_POINTER const u32* table, u32 copy, int i) {
        if (BITS == 16) return halves[i];
        if (Format<BITS>::PAIRED) return entry<N>(table, copy, i);
        return LOW_HALVES(entry<N>(table, copy, 2 * i), entry<N>(table, copy, 2 * i + 1));
    }

    // Of two vectors' runs, coordinates 2 i of both and 2 i + 1 of both, after `weave_with`.
    template <int N>
    FUNCTION void of_two(
        THREAD Run& next, SHARED_POINTER const u32* table, u32 copy, int i, THREAD u32& even, THREAD u32& odd) {
        u32 one = pair<N>(table, copy, i), other = next.template pair<N>(table, copy, i);
        even = Format<BITS>::PAIRED ? one : LOW_HALVES(one, other);
        odd = Format<BITS>::PAIRED ? other : HIGH_HALVES(one, other);
    }

    FUNCTION void weave_with(THREAD Run& next) {
        if (!Format<BITS>::PAIRED) return;
        UNROLL for (int i = 0; i < LOW_WORDS; ++i) weave<Format<BITS>::LOW>(low[i], next.low[i]);
        UNROLL for (int i = 0; i < HIGH_WORDS && Format<BITS>::HIGH; ++i) weave<Format<BITS>::HIGH>(high[i], next.high[i]);
    }
};

// Copy a table of levels N times, so that lanes meet in no bank. A thread writes four copies at a time.
template <int BITS, int N>
FUNCTION void fill_table(SHARED_POINTER u32* table, GLOBAL const u32* levels, int index) {
    UNROLL for (int first = 0; first < Format<BITS>::ENTRIES * N; first += 4 * THREADS) {
        const int i = first + 4 * index;
        if (i < Format<BITS>::ENTRIES * N) WRITE_4(table + i, levels[i / N]);
    }
}

// The Hadamard transform of a vector, of which a lane has coordinates lane, lane + 32, and so on; not normalised.
FUNCTION void hadamard(THREAD float (&x)[DIM / 32], int lane) {
    UNROLL for (int span = 1; span < 32; span *= 2) {
        UNROLL for (int i = 0; i < DIM / 32; ++i) {
            float other = from_lane(x[i], span);
            x[i] = lane & span ? other - x[i] : x[i] + other;
        }
    }
    UNROLL for (int span = 1; span < DIM / 32; span *= 2) {
        UNROLL for (int i = 0; i < DIM / 32; ++i) {
            if (i & span) continue;
            float one = x[i], other = x[i + span];
            x[i] = one + other;
            x[i + span] = one - other;
        }
    }
}

// What a SIMD-group knows of TILES * 8 queries so far. Queries are columns; of each block a lane has two.
struct State {
    float output[TILES][DIM / 16][4];  // not normalised, in the rotated basis; rows of blocks are coordinates
    float highest[TILES][2];           // of the scores, in powers of two
    float total[TILES][2];             // of the weights; this and the next of this lane's rows only
    float mean_share[TILES][2];        // of the weights of those values whose mean was removed
};

// A layer's tokens of one kind, and the tables of their levels.
struct Tokens {
    GLOBAL const u8* key_codes;
    GLOBAL const half* key_scales;
    GLOBAL const u8* value_codes;
    GLOBAL const half* value_scales;
    SHARED_POINTER const u32* key_table;
    SHARED_POINTER const u32* value_table;
    float value_factor;

    // Those of a head, of which memory holds 16 at least; scales of halves are not read.
    template <int K_BITS, int V_BITS>
    FUNCTION void set(
        GLOBAL const u32* keys, GLOBAL const half* scales_of_keys, GLOBAL const u32* values,
        GLOBAL const half* scales_of_values, int head, int count) {
        const size_type first = (size_type)head * (count < 16 ? 16 : count);
        key_codes = (GLOBAL const u8*)keys + first * (DIM * K_BITS / 8);
        value_codes = (GLOBAL const u8*)values + first * (DIM * V_BITS / 8);
        key_scales = scales_of_keys + first;
        value_scales = scales_of_values + first;
    }
};

// What a lane reads of 16 tokens, of which those from `begin` on and before `end` count.
template <int K_BITS, int V_BITS>
struct Tile {
    Run<K_BITS, 4> keys[2];
    Run<V_BITS, 8> values[4];
    float key_scale[2], value_scale[2];
    int begin, end;

    // The 16 tokens from `first` on; where there are fewer, the last 16.
    FUNCTION void read(THREAD const Tokens& tokens, int first, int stop, int lane) {
        const int row = ROW(lane), column = COLUMN(lane);
        const int from = first + 16 <= stop ? first : stop > 16 ? stop - 16 : 0;
        begin = first - from;
        end = stop - from;
        GLOBAL const u8* key = tokens.key_codes + (from + row) * (DIM * K_BITS / 8);
        GLOBAL const u8* value = tokens.value_codes + (from + column) * (DIM * V_BITS / 8);
        UNROLL for (int i = 0; i < 2; ++i) {
            keys[i].read(key + 8 * i * (DIM * K_BITS / 8), column / 2);
            key_scale[i] = K_BITS == 16 ? -1.0f : float(tokens.key_scales[from + row + 8 * i]);
            value_scale[i] = V_BITS == 16 ? -1.0f : float(tokens.value_scales[from + row + 8 * i]);
        }
        UNROLL for (int i = 0; i < 4; ++i) values[i].read(value + ((i & 1) + (i & 2) * 4) * (DIM * V_BITS / 8), row);
    }
};

// A block of the queries as right factors, of which a lane holds two words; they lie in shared memory.
FUNCTION void read_factor(SHARED_POINTER const u32* queries, int n, int k, int lane, THREAD u32 (&factor)[2]) {
    SHARED_POINTER const u32* at = queries + ((n * (DIM / 16) + k) * 32 + lane) * 2;
    factor[0] = at[0];
    factor[1] = at[1];
}

// Attention of queries over a tile.
template <int K_BITS, int V_BITS, int N>
FUNCTION void attend_tile(
    THREAD State& state, SHARED_POINTER const u32* queries, THREAD const float (&mean_scores)[TILES][2], THREAD const Tokens& tokens,
    THREAD Tile<K_BITS, V_BITS>& tile, int lane) {
    const int row = ROW(lane);
    const u32 copy = lane % N * 4;
    float scores[TILES][4];
    UNROLL for (int n = 0; n < TILES; ++n) {
        UNROLL for (int i = 0; i < 4; ++i) scores[n][i] = 0;
    }
    UNROLL for (int k = 0; k < DIM / 16; ++k) {
        u32 block[4];
        UNROLL for (int i = 0; i < 4; ++i) block[i] = tile.keys[i & 1].template pair<N>(tokens.key_table, copy, 2 * k + (i >> 1));
        UNROLL for (int n = 0; n < TILES; ++n) {
            u32 factor[2];
            read_factor(queries, n, k, lane, factor);
            multiply_add(scores[n], block, factor);
        }
    }
    // Of each of this lane's two tokens: its scales, and whether the means count.
    float key_scale[2], value_scale[2], key_mean[2], value_mean[2], outside[2];
    UNROLL for (int i = 0; i < 2; ++i) {
        key_scale[i] = ABSOLUTE(tile.key_scale[i]);
        value_scale[i] = ABSOLUTE(tile.value_scale[i]) * tokens.value_factor;
        key_mean[i] = tile.key_scale[i] > 0 ? 1.0f : 0.0f;
        value_mean[i] = tile.value_scale[i] > 0 ? 1.0f : 0.0f;
        outside[i] = row + 8 * i >= tile.begin && row + 8 * i < tile.end ? 0.0f : -INFINITY;
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
                const float highest = over_rows_max(scores[n][i] > scores[n][i + 2] ? scores[n][i] : scores[n][i + 2]);
                if (highest <= state.highest[n][i]) continue;
                float fade = EXP2(state.highest[n][i] - highest);
                state.highest[n][i] = highest;
                state.total[n][i] *= fade;
                state.mean_share[n][i] *= fade;
                UNROLL for (int m = 0; m < DIM / 16; ++m) {
                    state.output[n][m][i] *= fade;
                    state.output[n][m][i + 2] *= fade;
                }
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

// Attention of queries over tokens from `first` on, `step` between tiles; if AHEAD, a tile is read while that before is
// worked on.
template <int K_BITS, int V_BITS, int N, bool AHEAD>
FUNCTION void attend_tokens(
    THREAD State& state, SHARED_POINTER const u32* queries, THREAD const float (&mean_scores)[TILES][2], THREAD const Tokens& tokens,
    int first, int stop, int step, int lane) {
    Tile<K_BITS, V_BITS> tile, next;
    if (AHEAD && first < stop) next.read(tokens, first, stop, lane);
    for (; first < stop; first += step) {
        if (AHEAD) {
            tile = next;
            if (first + step < stop) next.read(tokens, first + step, stop, lane);
        } else {
            tile.read(tokens, first, stop, lane);
        }
        attend_tile<K_BITS, V_BITS, N>(state, queries, mean_scores, tokens, tile, lane);
    }
}

// Attention of queries over a split's share of `count` tokens of a kind. Its tables lie in `shared`, one behind the other
// where they differ; `levels` has those of keys, and behind 256 entries those of values. To be called by all threads.
template <int K_BITS, int V_BITS, int N, bool AHEAD>
FUNCTION void attend_split(
    THREAD State& state, SHARED_POINTER const u32* queries, THREAD const float (&mean_scores)[TILES][2], THREAD Tokens& tokens,
    GLOBAL const u32* levels, SHARED_POINTER u32* shared, int split, int splits, int count, int index) {
    const int share = (count + 16 * splits - 1) / (16 * splits) * 16;
    const int stop = (split + 1) * share < count ? (split + 1) * share : count;
    if (split * share >= stop) return;  // the same for all threads
    const int other = V_BITS == K_BITS ? 0 : Format<K_BITS>::ENTRIES * N;
    fill_table<K_BITS, N>(shared, levels, index);
    if (other) fill_table<V_BITS, N>(shared + other, levels + 256, index);
    BARRIER;
    tokens.key_table = shared;
    tokens.value_table = shared + other;
    attend_tokens<K_BITS, V_BITS, N, AHEAD>(
        state, queries, mean_scores, tokens, split * share + 16 * (index / 32), stop, 16 * WARPS, index % 32);
    BARRIER;
}
