// The search of viterbi.py, for strings of BLOCK coordinates one after the other: a body of a kernel. A SIMD-group works
// on GROUPS strings of one head. Each of a string's LANES lanes holds the costs of two nodes, as a pair of halves.
//
// A node that a branch enters takes the place of the one that the branch leaves, with some bits changed. So a place is a
// node's number, rotated by BITS for each token.

const int lane = THREAD_INDEX, place = lane % LANES, group = lane / LANES, head = GROUP_Y;
const int tokens = sizes[0], strings = sizes[1], down = sizes[2];

// Of each token a pair of its target and gain, and a mask. One record is left free after those that one lane follows
// back, so that lanes read from different banks.
SHARED ALIGNED u32 records[GROUPS][(LENGTH + LANES + 1) * 2];
SHARED u32 changes[BLOCK][GROUPS * LENGTH / 2];  // of the errors of a coordinate, as pairs
SHARED u32 choices[LENGTH / 16][32];             // for each lane, bits of 16 tokens: whether the second row is cheaper
SHARED u32 levels[PERIOD * BRANCHES][32];        // pairs of levels, for each lane
SHARED u32 turned[32], pulls[BLOCK * BLOCK];
SHARED float level_of[NODES * BRANCHES];
SHARED u8 codes[GROUPS][LENGTH], rows[BINS], best_places[LENGTH / 16][GROUPS];
SHARED int begins[GROUPS], counts[GROUPS];

if (lane < GROUPS) {
    const int string = GROUP_X * GROUPS + lane;
    begins[lane] = string < strings ? int(size_type(string) * tokens / strings) : tokens;
    counts[lane] = string < strings ? int(size_type(string + 1) * tokens / strings) - begins[lane] : 0;
}
for (int i = 0; i < PERIOD * BRANCHES; ++i) levels[i][lane] = level_pairs[i * LANES + place];
for (int i = lane; i < NODES * BRANCHES; i += 32) level_of[i] = table[i];
for (int i = lane; i < BINS; i += 32) rows[i] = row_of_bin[i];
for (int i = lane; i < GROUPS * 2; i += 32) records[i / 2][(LENGTH + LANES) * 2 + i % 2] = 0;  // read but not used
for (int i = lane; DEPENDENT && i < BLOCK * BLOCK; i += 32) pulls[i] = within[head * (BLOCK * BLOCK) + i];
LANES_MEET;

// Each lane prepares the records of PAIRS pairs of tokens. All that it reads is read at once, and from the last token
// for those beyond.
float gains[PAIRS][2], bins[PAIRS][2], roots[PAIRS][2];
auto number_of = [&](int p, int e) {
    const int at = p * 64 + 2 * lane + e, last = counts[at / LENGTH] - 1;
    return begins[at / LENGTH] + (at % LENGTH < last ? at % LENGTH : last);
};
UNROLL for (int p = 0; p < PAIRS; ++p) {
    UNROLL for (int e = 0; e < 2; ++e) {
        gains[p][e] = gain[head * tokens + number_of(p, e)];
        roots[p][e] = root[head * tokens + number_of(p, e)];
        bins[p][e] = BINS / (2 * REACH) / gains[p][e];
    }
}

u32 cost = 0, bits = 0;
const int count = counts[group];
const u32* own_records = records[group];

// A step over a token, read ahead of it: how far levels are from the target, in both rows, and where branches come from.
struct Step { u32 off[2], mask; };
auto read = [&](int t) {
    u32 record[2];
    READ_8(own_records + (t + t / OWN) * 2, record);
    const u32* row = &levels[record[1] >> 20][lane];
    const u32 target_twice = low_twice(record[0]), gain_twice = high_twice(record[0]);
    Step step;
    step.off[0] = pair_multiply_add(row[0], gain_twice, target_twice);
    step.off[1] = pair_multiply_add(row[32], gain_twice, target_twice);
    step.mask = record[1];
    return step;
};
// Enter the nodes after a token by the cheaper branch of two rows; `bit` marks the choices.
auto advance = [&](const Step& step, u32 bit) {
    const u32 one = rotated(lane_xor(cost, step.mask), step.mask >> 10);
    const u32 two = rotated(lane_xor(cost, step.mask >> 5), step.mask >> 15);
    const u32 first = pair_multiply_add(step.off[0], step.off[0], one);
    const u32 second = pair_multiply_add(step.off[1], step.off[1], two);
    bits |= pair_less(second, first) & bit;
    cost = pair_min(first, second);
};
auto subtract_least = [&] {
    u32 least = cost;
    UNROLL for (int i = 1; i < LANES; i *= 2) least = pair_min(least, lane_xor(least, i));
    cost = pair_subtract(cost, pair_min(least, rotated(least, 16)));
};
// The place before a token, of the one after it.
auto place_before = [&](int t, int after) {
    const u32 mask = own_records[(t + t / OWN) * 2 + 1];
    const int second = choices[t / 16][group * LANES + after / 2] >> (after % 2 * 16 + t % 16) & 1;
    return after ^ int(second ? mask >> 4 & 62 | mask >> 19 & 1 : mask << 1 & 62 | mask >> 14 & 1);
};
auto rotated_node = [](int node, int times) {
    const int by = times * BITS % NODE_BITS;
    return (node << by | node >> (NODE_BITS - by)) & (NODES - 1);
};

for (int turn = 0; turn < BLOCK; ++turn) {
    const int i = down ? BLOCK - 1 - turn : turn;
    const int row = (head * BLOCK + i) * tokens;

    float aim[PAIRS][2], wanted[PAIRS][2], error_before[PAIRS][2];
    u32 moved[PAIRS];
    UNROLL for (int p = 0; p < PAIRS; ++p) {
        moved[p] = 0;
        UNROLL for (int e = 0; e < 2; ++e) {
            const int number = row + number_of(p, e);
            aim[p][e] = float(target[number]);
            wanted[p][e] = DEPENDENT ? float(exact[number]) : 0.0f;
            error_before[p][e] = DEPENDENT ? float(before[number]) : 0.0f;
        }
    }
    for (int done = 0; DEPENDENT && done < turn; ++done) {
        const int j = down ? BLOCK - 1 - done : done;
        const u32 pull = pulls[i * BLOCK + j];
        UNROLL for (int p = 0; p < PAIRS; ++p) moved[p] = pair_multiply_add(pull, changes[j][p * 32 + lane], moved[p]);
    }
    UNROLL for (int p = 0; p < PAIRS; ++p) {
        UNROLL for (int e = 0; e < 2; ++e) {
            const int at = p * 64 + 2 * lane + e, t = at % LENGTH;
            const bool some = t < counts[at / LENGTH];
            const float x = aim[p][e] - half_of(moved[p], e);
            float bin = x * bins[p][e] + BINS / 2;
            bin = bin < 0 ? 0 : bin > BINS - 1 ? BINS - 1 : bin;
            const u32 mask = masks[t % PERIOD * (BRANCHES - 1) + rows[int(bin)]];
            const u32 pair = pack_halves(-x * roots[p][e], gains[p][e] * roots[p][e]);
            // A record of zeros changes no cost.
            WRITE_8(records[at / LENGTH] + (t + t / OWN) * 2, some ? pair : 0, some ? mask : 0);
        }
    }
    LANES_MEET;

    // The node where the string bites its tail: the former one, or the best one for the tokens around it.
    int end = 0;
#if FORMER
    if (count) end = former[row + begins[group] + count - 1] & (NODES - 1);
#else
    const int last = count > WINDOW ? count - WINDOW : 0;
    cost = 0;
    Step around = read(last < count ? last : LENGTH - 1);
    UNROLL for (int t = 1; t <= WINDOW; ++t) {
        const Step next = read(t == WINDOW ? 0 : last + t);
        advance(around, 0);
        around = next;
    }
    for (int e = 0; e < 2; ++e) {
        ((u16*)turned)[group * LANES * 2 + rotated_node(2 * place + e, count)] = u16(cost >> (16 * e));
    }
    LANES_MEET;
    cost = turned[lane];
    bits = 0;
    UNROLL for (int t = 0; t < WINDOW; ++t) {
        const Step next = read(t + 1);
        advance(around, 0x10001u << t);
        around = next;
    }
    choices[0][lane] = bits;
    end = half_of(cost, 1) < half_of(cost, 0) ? 2 * place + 1 : 2 * place;
    float least = half_of(cost, end % 2);
    UNROLL for (int bit = 1; bit < LANES; bit *= 2) {
        const float other = lane_xor(least, bit);
        const int node = lane_xor(end, bit);
        const bool better = other < least || (other == least && node < end);
        end = better ? node : end;
        least = better ? other : least;
    }
    LANES_MEET;
    for (int t = WINDOW - 1; t >= 0; --t) end = place_before(t, end);
    LANES_MEET;
#endif

    // The cheapest path from that node to it.
    const u32 far = 0x74e274e2;  // 20,000 twice
    cost = end / 2 != place ? far : end % 2 ? far & 0xffffu : far & 0xffff0000u;
    Step step = read(0);
    for (int chunk = 0; chunk < LENGTH / 16; ++chunk) {
        bits = 0;
        UNROLL for (int n = 0; n < 16; ++n) {
            const Step next = read(chunk * 16 + n + 1);
            advance(step, 0x10001u << n);
            step = next;
        }
        choices[chunk][lane] = bits;
        subtract_least();
        for (int e = 0; e < 2; ++e) {
            if ((cost >> (16 * e) & 0xffffu) == 0) best_places[chunk][group] = u8(2 * place + e);
        }
    }
    LANES_MEET;

    // Each lane follows it back through its own tokens, from a place that the best path some tokens later leads to. Where
    // this is not the place that the lane of the next tokens comes to, it does so again from there.
    const int after = (place + 1) * OWN, from = (after + LOOKAHEAD + 15) / 16 * 16;
    int node = from < LENGTH ? best_places[from / 16 - 1][group] : rotated_node(end, NODE_BITS - count % NODE_BITS);
    for (int t = (from < LENGTH ? from : LENGTH) - 1; t >= after; --t) node = place_before(t, node);
    for (bool again = true; again;) {
        const int began = node;
        for (int t = after - 1; t >= after - OWN; --t) {
            codes[group][t] = u8(rotated_node(node, t + 1) & (BRANCHES - 1));
            node = place_before(t, node);
        }
        const int next = of_lane(node, lane < 31 ? lane + 1 : 31);
        node = place < LANES - 1 ? next : began;
        again = in_any_lane(node != began);
    }
    LANES_MEET;

    UNROLL for (int p = 0; p < PAIRS; ++p) {
        const int at = p * 64 + 2 * lane, of = at / LENGTH;
        float change[2] = {0, 0};
        int state = 0;
        for (int back = (NODE_BITS + BITS - 1) / BITS; back > 0; --back) {
            int token = at % LENGTH - back;
            while (token < 0 && counts[of]) token += counts[of];
            state = state << BITS | codes[of][token];
        }
        UNROLL for (int e = 0; e < 2; ++e) {
            const int t = at % LENGTH + e, number = row + begins[of] + t;
            state = (state << BITS | codes[of][t]) & (NODES * BRANCHES - 1);
            const float level = level_of[state];
            if (t < counts[of]) {
                chosen[number] = u16(state);
                put(&chosen_levels[number], level);
                change[e] = gains[p][e] * level - wanted[p][e] - error_before[p][e];
            }
        }
        if (DEPENDENT) changes[i][p * 32 + lane] = pack_halves(change[0], change[1]);
    }
    LANES_MEET;
}
