// The search for strings of a trellis code, as quant/viterbi.py does it: a SIMD-group works on two strings of LENGTH
// tokens, half of its lanes on each. A lane holds the costs of two of the 32 nodes, as a pair of halves. Needs a
// backend's header.
//
// A node that a branch enters takes the place of the one that the branch leaves, with some bits changed. So a place is a
// node's number, rotated by BITS for each token.

// What a SIMD-group shares. records: for each string, of each token a pair of its target and gain, and a mask. One is
// left free after every 16, so that lanes read from different banks. levels: of this lane, pairs of levels for each row.
// choices: for each 16 tokens and lane, bits: whether the second row is cheaper. origins: for each 16 tokens and place, the
// place before them on the cheapest path to it.
struct Strings {
    SHARED_POINTER u32* records;
    SHARED_POINTER const u32* levels;
    SHARED_POINTER u32* choices;
    SHARED_POINTER u16* origins;
    SHARED_POINTER u32* turned;
    SHARED_POINTER u32* codes;  // four in a word
    int lane, place, string;
};

// The cheapest paths to a lane's two places: costs, places at which they began, and choices of up to 16 tokens.
struct Paths {
    u32 costs, origins, choices;
};

// A step over a token, read ahead of it: pairs of levels of both rows, and where branches come from.
struct Step {
    u32 record[2], levels[2];
};

FUNCTION int rotated_node(int node, int times) {
    const int by = times * BITS % NODE_BITS;
    return (node << by | node >> (NODE_BITS - by)) & (NODES - 1);
}

FUNCTION int record_of(int string, int t) { return (string * RECORDS + t + t / 16) * 2; }

FUNCTION void read_record(THREAD const Strings& of, THREAD Step& step, int t) {
    READ_SHARED_8(of.records + record_of(of.string, t), step.record);
}

FUNCTION void read_levels(THREAD const Strings& of, THREAD Step& step) {
    SHARED_POINTER const u32* row = of.levels + (step.record[1] >> 20) * 32;
    step.levels[0] = row[0];
    step.levels[1] = row[32];
}

// Enter the nodes after a token by the cheaper branch of two rows; `bit` marks the choices.
FUNCTION void advance(THREAD const Step& step, THREAD Paths& paths, u32 bit) {
    const u32 target_twice = low_twice(step.record[0]), gain_twice = high_twice(step.record[0]), mask = step.record[1];
    const u32 off_one = pair_multiply_add(step.levels[0], gain_twice, target_twice);
    const u32 off_two = pair_multiply_add(step.levels[1], gain_twice, target_twice);
    const u32 turn_one = mask >> 10, turn_two = mask >> 15;
    const u32 one = rotated(word_from_lane(paths.costs, mask), turn_one);
    const u32 two = rotated(word_from_lane(paths.costs, mask >> 5), turn_two);
    const u32 origins_one = rotated(word_from_lane(paths.origins, mask), turn_one);
    const u32 origins_two = rotated(word_from_lane(paths.origins, mask >> 5), turn_two);
    const u32 first = pair_multiply_add(off_one, off_one, one);
    const u32 second = pair_multiply_add(off_two, off_two, two);
    const u32 less = pair_less(second, first);
    paths.choices |= less & bit;
    paths.origins = CHOSEN(origins_two, origins_one, less);
    paths.costs = pair_min(first, second);
}

// Begin paths at all places.
FUNCTION void begin(THREAD const Strings& of, THREAD Paths& paths) {
    paths.origins = u32(of.place) * 0x20002u + 0x10000u;
    paths.choices = 0;
}

// The least cost of a string's nodes, twice.
FUNCTION u32 least_of(u32 cost) {
    UNROLL for (int i = 1; i < LANES; i *= 2) cost = pair_min(cost, word_from_lane(cost, i));
    return pair_min(cost, rotated(cost, 16));
}

// The node at which a string best bites its tail, for the WINDOW tokens before its end and after its beginning.
FUNCTION int best_end(THREAD const Strings& of) {
    Step now, next, later;
    Paths paths;
    paths.costs = 0;
    begin(of, paths);
    read_record(of, now, LENGTH - WINDOW);
    read_record(of, next, LENGTH - WINDOW + 1);
    read_record(of, later, LENGTH - WINDOW + 2);
    read_levels(of, now);
    read_levels(of, next);
    UNROLL for (int n = 0; n < 2 * WINDOW; ++n) {
        Step last;
        read_record(of, last, n + AHEAD < WINDOW ? LENGTH - WINDOW + n + AHEAD : n + AHEAD - WINDOW);
        read_levels(of, later);
        if (n == WINDOW) {
            for (int e = 0; e < 2; ++e) {
                const int at = of.string * NODES + rotated_node(2 * of.place + e, LENGTH);
                ((SHARED_POINTER u16*)of.turned)[at] = u16(paths.costs >> (16 * e));
            }
            LANES_MEET;
            paths.costs = of.turned[of.lane];
            begin(of, paths);
        }
        advance(now, paths, 0);
        now = next;
        next = later;
        later = last;
    }
    const bool odd = half_of(paths.costs, 1) < half_of(paths.costs, 0);
    int place = 2 * of.place + int(odd);  // after the last token; of equal ones, the first
    int end = int(paths.origins >> (odd ? 16 : 0) & 0xffffu);
    float least = half_of(paths.costs, int(odd));
    UNROLL for (int bit = 1; bit < LANES; bit *= 2) {
        const float other = from_lane(least, bit);
        const int both = int(word_from_lane(u32(place << 8 | end), u32(bit)));
        const bool better = other < least || (other == least && both >> 8 < place);
        place = better ? both >> 8 : place;
        end = better ? both & 0xff : end;
        least = better ? other : least;
    }
    return end;
}

// Find the cheapest path from a node to it, and write the codes on it. Of each 16 tokens, one lane follows the path back.
FUNCTION void find_string(THREAD const Strings& of, int end) {
    const u32 far = 0x74e274e2;  // 20,000 twice
    Paths paths;
    paths.costs = end / 2 != of.place ? far : end % 2 ? far & 0xffffu : far & 0xffff0000u;
    Step now, next, later;
    read_record(of, now, 0);
    read_record(of, next, 1);
    read_record(of, later, 2);
    read_levels(of, now);
    read_levels(of, next);
    for (int chunk = 0; chunk < LENGTH / 16; ++chunk) {
        begin(of, paths);
        UNROLL for (int n = 0; n < 16; ++n) {
            Step last;
            READ_SHARED_8(of.records + record_of(of.string, n + AHEAD) + chunk * 34, last.record);
            read_levels(of, later);
            advance(now, paths, 0x10001u << n);
            now = next;
            next = later;
            later = last;
        }
        of.choices[chunk * 32 + of.lane] = paths.choices;
        of.origins[chunk * 32 + of.lane] = u16(paths.origins | paths.origins >> 8);
        paths.costs = pair_subtract(paths.costs, least_of(paths.costs));
    }
    LANES_MEET;
    const int own = of.place % (LENGTH / 16);
    int place = rotated_node(end, NODE_BITS - LENGTH % NODE_BITS), last = place;
    SHARED_POINTER const u8* origins = (SHARED_POINTER const u8*)of.origins + of.string * NODES;
    UNROLL for (int chunk = LENGTH / 16 - 1; chunk > 0; --chunk) {
        last = own == chunk ? place : last;
        place = origins[chunk * 64 + place];
    }
    place = own ? last : place;
    SHARED_POINTER const u32* records = of.records + record_of(of.string, own * 16);
    SHARED_POINTER const u32* choices = of.choices + own * 32 + of.string * LANES;
    const int turn = 2 * NODE_BITS - own * BITS % NODE_BITS;
    u32 codes[4] = {};
    UNROLL for (int n = 15; n >= 0; --n) {
        // The node is the place, rotated.
        const u32 code = u32(place) * 0x421u >> (turn - (n + 1) * BITS % NODE_BITS) & ((1u << BITS) - 1);
        codes[n / 4] = codes[n / 4] << 8 | code;
        const u32 bit = choices[place / 2] >> (place % 2 * 16 + n) & 1;
        const u32 changed = records[2 * n + 1] >> (bit * 5);
        place ^= int((changed << 1 & 62) | (changed >> 14 & 1));
    }
    if (of.place < LENGTH / 16) {
        UNROLL for (int q = 0; q < 4; ++q) of.codes[of.string * (LENGTH / 4) + own * 4 + q] = codes[q];
    }
    LANES_MEET;
}
