// Packed codes to pairs of halves, by tables in shared memory. Needs a backend's header, layout.h and DIM.

// So many words between entries of a table leave room for a byte and for two tables with 32 copies each.
#define SPACED 64

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
    const u32 evens = CHOSEN(one, other << WIDTH, even);
    other = CHOSEN(one >> WIDTH, other, even);
    one = evens;
}

// Codes of 3 bits as bytes, of which each names a pair's entry and has two bits that mean nothing: of 16 pairs, with the
// low plane in two words and the high plane in one, those of pairs i, i + 4, i + 8 and i + 12, for i < 4.
FUNCTION u32 entries_of_3_bits(u32 low, u32 next_low, u32 high, int i) {
    const u32 four = i < 2 ? EVEN_BYTES(low, next_low) : ODD_BYTES(low, next_low);
    const u32 upper = i == 0 ? high << 4 : i == 1 ? high << 2 : i == 2 ? high : high >> 2;
    return CHOSEN(i % 2 ? four >> 4 : four, upper, 0x0f0f0f0fu);
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

    // What a table says of code i, or, if it is of pairs, of codes 2 i and 2 i + 1. Entries are N words apart, so a code
    // that is moved there is an offset; `copy` is that of the lane's own copy. If they are SPACED words apart, the code is
    // a byte of the offset, and one instruction moves it.
    template <int N>
    FUNCTION u32 entry(SHARED_POINTER const u32* table, u32 copy, int i) {
        const int codes = Format<BITS>::PAIRED ? 2 : 1;
        const int place = N == SPACED ? 8 : N == 32 ? 7 : N == 16 ? 6 : N == 8 ? 5 : 2;
        const int width = codes * Format<BITS>::LOW, high_width = codes * Format<BITS>::HIGH;
        if (N == SPACED && BITS == 4) return entry_at(table, PLACED_BYTE(low[i / 4], i % 4, copy));
        if (N == SPACED && BITS == 3 && LOW_WORDS == 2) {
            const u32 four = entries_of_3_bits(low[0], low[LOW_WORDS - 1], high[0], i % 4);
            return entry_at(table, PLACED_BYTE(four, i / 4, copy));
        }
        u32 offset = placed(low[i * width / 32], i * width % 32, width, place, copy);
        if (high_width) offset = placed(high[i * high_width / 32], i * high_width % 32, high_width, place + width, offset);
        return entry_at(table, offset);
    }

    FUNCTION u32 entry_at(SHARED_POINTER const u32* table, u32 offset) {
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
        if (N == SPACED && BITS == 3 && LOW_BYTES == 4) {
            const u32 four = entries_of_3_bits(low[0], next.low[0], high[0] | next.high[0] << 16, i % 4);
            even = entry_at(table, PLACED_BYTE(four, i / 4, copy));
            odd = entry_at(table, PLACED_BYTE(four, i / 4 + 2, copy));
            return;
        }
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

// Copy a table of levels, so that lanes meet in no bank: N times, or 32 times if entries are SPACED words apart. A thread
// writes four copies at a time.
template <int BITS, int N>
FUNCTION void fill_table(SHARED_POINTER u32* table, GLOBAL const u32* levels, int index) {
    const int copies = N == SPACED ? 32 : N;
    const int entries = N == SPACED && BITS == 3 ? 256 : Format<BITS>::ENTRIES;  // see entries_of_3_bits
    UNROLL for (int first = 0; first < entries * copies; first += 4 * THREADS) {
        const int i = first + 4 * index, entry = i / copies;
        if (i < entries * copies) WRITE_4(table + entry * N + i % copies, levels[entry % Format<BITS>::ENTRIES]);
    }
}

// Where the values' table begins behind that of the keys. Where entries are SPACED words apart, it lies between them.
template <int K_BITS, int V_BITS, int N>
FUNCTION int second_table() {
    return V_BITS == K_BITS ? 0 : N == SPACED ? 32 : Format<K_BITS>::ENTRIES * N;
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
