// Trellis codes to pairs of halves, by a table in shared memory. Needs a backend's header and DIM.
//
// A lane has COUNT numbers of two strings, one after the other, whose bits stand in turn. A level depends on five bits of its
// string, sums (modulo 2) of the last ones up to it. They are computed for all numbers of a word at once, so that the ten
// bits of two numbers are an index: attention/trellis_tables.py says which sums they are. The table has 1,024 pairs of
// levels, TABLE_COPIES times: with a copy for each of 32 banks, lanes never wait for each other.

#define PAIRS 1024
#define TABLE_WORDS (PAIRS * TABLE_COPIES)

// A word of a stream of bits that is `by` bits late, or early.
FUNCTION u32 late_by(u32 before, u32 word, int by) { return word << by | before >> (32 - by); }
FUNCTION u32 early_by(u32 word, u32 next, int by) { return word >> by | next << (32 - by); }

// Of word i of a stream, the bits of a pattern that begins at bit `first` of the stream and at every twelfth from there.
FUNCTION u32 every_12(u32 pattern, int first, int i) {
    return u32((size_type)pattern * 0x1001001001001 >> (12 * 32 + 32 * i - first) % 12);
}

template <int BITS, int COUNT>
struct Strings {
    enum {
        WORDS = (BITS * COUNT + 15) / 16,
        TURNS = BITS == 4 ? 1 : 6 / BITS,  // numbers that are looked up from different words, because indices overlap
        PLACE = TABLE_COPIES == 32 ? 7 : TABLE_COPIES == 8 ? 5 : 4  // of an index in an offset
    };

    // Look up the pairs of levels. `words` are the codes, which begin with bit 0 of the first word, and `before` is the word
    // before them. `copy` is where the lane's own copy begins, in bytes.
    FUNCTION static void look_up(
        THREAD const u32 (&words)[WORDS], u32 before, SHARED_POINTER const u32* table, u32 copy, THREAD u32 (&found)[COUNT]) {
        u32 late[WORDS + 1], rows[WORDS + 1];  // the bits five places before, and what chooses the levels' rows
        UNROLL for (int i = 0; i < WORDS; ++i) {
            late[i] = late_by(i ? words[i - 1] : before, words[i], 10);
            rows[i] = words[i] ^ late[i];
        }
        late[WORDS] = words[WORDS - 1] >> 22;
        rows[WORDS] = 0;
        if (BITS == 4) {
            // A byte has the rows of both numbers. The first string's fifth bit stands five places before a code, and that
            // of the second one place, so that they are nine bits apart, and one shift brings both beside their rows.
            const u32 copies = PLACE == 7 ? copy * 0x0101u : 0;
            UNROLL for (int i = 0; i < WORDS; ++i) {
                UNROLL for (int h = 0; h < 2; ++h) {
                    const u32 bits = h ? early_by(late[i], late[i + 1], 9) : late[i] << 7;
                    const u32 others = MASKED_OR(bits, 0x01018080u, copies);
                    found[4 * i + 2 * h] = entry(table, moved(EVEN_PLACE(rows[i], others, 2 * h), copy));
                    found[4 * i + 2 * h + 1] = entry(table, moved(ODD_PLACE(rows[i], others, 2 * h + 1), copy));
                }
            }
            return;
        }
        // Indices are ten bits from the first of a code on: its rows, and then three or two sums for each number. As they
        // overlap, those of one number in TURNS are in one word.
        u32 indices[TURNS][WORDS + 1];
        UNROLL for (int i = 0; i <= WORDS; ++i) {
            const u32 last = i ? words[i - 1] : before, word = i < WORDS ? words[i < WORDS ? i : 0] : 0;
            const u32 three = late_by(last, word, 6);
            const u32 sum = three ^ (BITS == 3 ? late_by(last, word, 4) : late[i]);
            const u32 sums = CHOSEN(sum, late[i], every_12(BITS == 3 ? 0xc3u : 0x333u, 0, i));
            UNROLL for (int n = 0; n < TURNS; ++n) {
                indices[n][i] = CHOSEN(rows[i], sums, every_12((1u << 2 * BITS) - 1, 2 * BITS * n, i));
                if (BITS == 2) {
                    const u32 others = sum ^ late_by(last, word, 8);
                    indices[n][i] = CHOSEN(indices[n][i], others, ~every_12(3u, 4 * n + 8, i));
                }
            }
        }
        UNROLL for (int n = 0; n < COUNT; ++n) {
            const int at = 2 * BITS * n, i = at / 32, bit = at % 32;
            const u32 word = indices[n % TURNS][i], next = indices[n % TURNS][i + 1];
            const u32 place = bit < PLACE ? word << (PLACE - bit)
                : bit + 10 > 32 ? early_by(word, next, bit - PLACE) : word >> (bit - PLACE);
            found[n] = entry(table, MASKED_OR(place, (PAIRS - 1u) << PLACE, copy));
        }
    }

    // An offset in a table with a copy for each bank, as one in this table.
    FUNCTION static u32 moved(u32 offset, u32 copy) { return PLACE == 7 ? offset : offset >> (7 - PLACE) | copy; }

    FUNCTION static u32 entry(SHARED_POINTER const u32* table, u32 offset) {
        return *(SHARED_POINTER const u32*)((SHARED_POINTER const u8*)table + offset);
    }
};

// Where a lane's own copy of a table begins, in bytes. If keys and values have different bits, each has half of the copies.
template <int K_BITS, int V_BITS>
FUNCTION u32 copy_of(bool values, int lane) {
    const int each = K_BITS == V_BITS ? TABLE_COPIES : TABLE_COPIES / 2;
    return (lane % each + (K_BITS != V_BITS && values ? each : 0)) * 4;
}

// Copy the tables of pairs of levels, of keys and behind them of values, by `threads` threads.
template <int K_BITS, int V_BITS>
FUNCTION void fill_pairs(SHARED_POINTER u32* table, GLOBAL const u32* pairs, int index, int threads) {
    for (int at = 4 * index; at < TABLE_WORDS; at += 4 * threads) {
        const u32 first = pairs[at / TABLE_COPIES], second = pairs[at / TABLE_COPIES + (K_BITS == V_BITS ? 0 : PAIRS)];
        if (K_BITS != V_BITS && TABLE_COPIES == 4) {
            table[at] = table[at + 1] = first;
            table[at + 2] = table[at + 3] = second;
        } else {
            WRITE_4(table + at, at % TABLE_COPIES < TABLE_COPIES / 2 ? first : second);
        }
    }
}

// Before the first number of a lane come those of another lane: of keys, the one that has the tokens before, and of values
// too, in strings of 64 tokens, see quant/trellis.py.
FUNCTION int lane_before(bool values, int lane) {
    const int row = ROW(lane), pair = COLUMN(lane) / 2;
    return values ? LANE(row, (pair + 3) % 4) : LANE((row + 7) % 8, pair);
}
