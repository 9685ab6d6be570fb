// The search for strings of a trellis code, as quant/viterbi.py does it: a SIMD-group works on two strings of LENGTH
// tokens, half of its lanes on each. A lane holds the costs of two of the 32 nodes, as a pair of halves. Needs a
// backend's header.
//
// A node that a branch enters takes the place of the one that the branch leaves, with some bits changed. So a place is a
// node's number, rotated by BITS for each token.

// What a SIMD-group shares. records: for each string, of each token a pair of its target and gain, and a mask. One is
// left free after those that one lane follows back, so that lanes read from different banks. levels: pairs of levels, for
// each row and lane. choices: for each lane, bits of 16 tokens: whether the second row is cheaper. best_places: after
// every 16 tokens, of both strings.
struct Strings {
    SHARED_POINTER u32* records;
    SHARED_POINTER const u32* levels;
    SHARED_POINTER u32* choices;
    SHARED_POINTER u32* turned;
    SHARED_POINTER u8* codes;
    SHARED_POINTER u8* best_places;
    int lane, place, string;
};

// A step over a token, read ahead of it: pairs of levels of both rows, and where branches come from.
struct Step {
    u32 record[2], levels[2];
};

FUNCTION int rotated_node(int node, int times) {
    const int by = times * BITS % NODE_BITS;
    return (node << by | node >> (NODE_BITS - by)) & (NODES - 1);
}

FUNCTION int record_of(int string, int t) { return (string * RECORDS + t + t / OWN) * 2; }

FUNCTION void read_record(THREAD const Strings& of, THREAD Step& step, int t) {
    READ_SHARED_8(of.records + record_of(of.string, t), step.record);
}

FUNCTION void read_levels(THREAD const Strings& of, THREAD Step& step) {
    SHARED_POINTER const u32* row = of.levels + (step.record[1] >> 20) * 32 + of.lane;
    step.levels[0] = row[0];
    step.levels[1] = row[32];
}

// Enter the nodes after a token by the cheaper branch of two rows; `bit` marks the choices.
FUNCTION void advance(THREAD const Step& step, THREAD u32& cost, THREAD u32& choices, u32 bit) {
    const u32 target_twice = low_twice(step.record[0]), gain_twice = high_twice(step.record[0]), mask = step.record[1];
    const u32 off_one = pair_multiply_add(step.levels[0], gain_twice, target_twice);
    const u32 off_two = pair_multiply_add(step.levels[1], gain_twice, target_twice);
    const u32 one = rotated(word_from_lane(cost, mask), mask >> 10);
    const u32 two = rotated(word_from_lane(cost, mask >> 5), mask >> 15);
    const u32 first = pair_multiply_add(off_one, off_one, one);
    const u32 second = pair_multiply_add(off_two, off_two, two);
    choices |= pair_less(second, first) & bit;
    cost = pair_min(first, second);
}

// The least cost of a string's nodes, twice.
FUNCTION u32 least_of(u32 cost) {
    UNROLL for (int i = 1; i < LANES; i *= 2) cost = pair_min(cost, word_from_lane(cost, i));
    return pair_min(cost, rotated(cost, 16));
}

// The place before a token, of the one after it.
FUNCTION int place_before(THREAD const Strings& of, int t, int after) {
    const u32 mask = of.records[record_of(of.string, t) + 1];
    const u32 second = of.choices[t / 16 * 32 + of.string * LANES + after / 2] >> (after % 2 * 16 + t % 16) & 1;
    return after ^ int(second ? (mask >> 4 & 62) | (mask >> 19 & 1) : (mask << 1 & 62) | (mask >> 14 & 1));
}

// The node at which a string best bites its tail, for the WINDOW tokens before its end and after its beginning.
FUNCTION int best_end(THREAD const Strings& of) {
    Step now, next, later;
    u32 cost = 0, choices = 0;
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
                ((SHARED_POINTER u16*)of.turned)[at] = u16(cost >> (16 * e));
            }
            LANES_MEET;
            cost = of.turned[of.lane];
            choices = 0;
        }
        advance(now, cost, choices, 0x10001u << n % 16);
        now = next;
        next = later;
        later = last;
    }
    of.choices[of.lane] = choices;
    int end = half_of(cost, 1) < half_of(cost, 0) ? 2 * of.place + 1 : 2 * of.place;
    float least = half_of(cost, end % 2);
    UNROLL for (int bit = 1; bit < LANES; bit *= 2) {
        const float other = from_lane(least, bit);
        const int node = int(word_from_lane(u32(end), u32(bit)));
        const bool better = other < least || (other == least && node < end);
        end = better ? node : end;
        least = better ? other : least;
    }
    LANES_MEET;
    for (int t = WINDOW - 1; t >= 0; --t) end = place_before(of, t, end);
    LANES_MEET;
    return end;
}

// Follow the cheapest path from a node to it, and write the codes on it.
//
// Each lane follows it back through its own tokens, from a place that the best path some tokens later leads to. Where this
// is not the place that the lane of the next tokens comes to, it does so again from there.
FUNCTION void find_string(THREAD const Strings& of, int end) {
    const u32 far = 0x74e274e2;  // 20,000 twice
    u32 cost = end / 2 != of.place ? far : end % 2 ? far & 0xffffu : far & 0xffff0000u;
    Step now, next, later;
    read_record(of, now, 0);
    read_record(of, next, 1);
    read_record(of, later, 2);
    read_levels(of, now);
    read_levels(of, next);
    for (int chunk = 0; chunk < LENGTH / 16; ++chunk) {
        u32 choices = 0;
        UNROLL for (int n = 0; n < 16; ++n) {
            Step last;
            read_record(of, last, chunk * 16 + n + AHEAD);
            read_levels(of, later);
            advance(now, cost, choices, 0x10001u << n);
            now = next;
            next = later;
            later = last;
        }
        of.choices[chunk * 32 + of.lane] = choices;
        cost = pair_subtract(cost, least_of(cost));
        for (int e = 0; e < 2; ++e) {
            if ((cost >> (16 * e) & 0xffffu) == 0) of.best_places[chunk * 2 + of.string] = u8(2 * of.place + e);
        }
    }
    LANES_MEET;
    const int after = (of.place + 1) * OWN, from = (after + LOOKAHEAD + 15) / 16 * 16;
    int node = from < LENGTH ? of.best_places[(from / 16 - 1) * 2 + of.string]
                             : rotated_node(end, NODE_BITS - LENGTH % NODE_BITS);
    for (int t = (from < LENGTH ? from : LENGTH) - 1; t >= after; --t) node = place_before(of, t, node);
    for (bool again = true; again;) {
        const int began = node;
        for (int t = after - 1; t >= after - OWN; --t) {
            of.codes[of.string * LENGTH + t] = u8(rotated_node(node, t + 1) & ((1 << BITS) - 1));
            node = place_before(of, t, node);
        }
        const int behind = int(word_of_lane(u32(node), of.lane < 31 ? of.lane + 1 : 31));
        node = of.place < LANES - 1 ? behind : began;
        again = in_any_lane(node != began);
    }
    LANES_MEET;
}
