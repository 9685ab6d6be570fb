// Strings of trellis codes for keys or values, their words and the factors of vectors, see trellis_search.py: a body of a
// kernel. A SIMD-group works on two strings beside each other: of keys the same coordinate in two blocks of tokens, of
// values both strings of a coordinate in one block. It finds those of COORDINATES coordinates, one after the other. In a
// metric, these are all, twice: with feedback, and then as rounding.py's sweeps do.
// Rows and columns of the metric's matrices are in the order in which coordinates are searched.

#define PAIRS (LENGTH / 32)  // pairs of tokens of a lane
#define WIDTH (LENGTH)       // pairs of tokens of a SIMD-group
#define LAST_PASS (METRIC ? SWEEPS : 0)
#define STREAM (2 * BITS)

SHARED ALIGNED u32 all_records[WARPS * 4 * RECORDS], all_codes[WARPS * LENGTH / 2];
SHARED u32 levels[LEVEL_WORDS], rows[BINS / 2], all_choices[WARPS * LENGTH * 2], all_turned[WARPS * 32];
SHARED u32 all_origins[WARPS * LENGTH], all_masks[MASK_WORDS], all_changes[CHANGE_WORDS], pulls[PULL_WORDS], ends[END_WORDS];
SHARED float level_of[STATE_WORDS], scales[SCALE_WORDS];

const int lane = THREAD_INDEX % 32, warp = THREAD_INDEX / 32;
const int parts = DIM / COORDINATES, head = GROUP_Y / parts, first = GROUP_Y % parts * COORDINATES;
const int tokens = sizes[0], blocks = tokens / BLOCK;
const int block = (GROUP_X * WARPS + warp) * (KEYS ? 2 : 1);  // of tokens; that of keys' second string is the next

Strings strings;
strings.lane = lane, strings.place = lane % LANES, strings.string = lane / LANES;
strings.records = all_records + warp * 4 * RECORDS;
strings.levels = levels + lane;
strings.choices = all_choices + warp * LENGTH * 2;
strings.turned = all_turned + warp * 32;
strings.codes = all_codes + warp * (LENGTH / 2);
strings.origins = (SHARED_POINTER u16*)(all_origins + warp * LENGTH);
for (int i = lane; i < 4 * RECORDS; i += 32) strings.records[i] = 0;
for (int i = THREAD_INDEX; i < BINS / 2; i += WARPS * 32) rows[i] = ((GLOBAL const u32*)row_of_bin)[i];
for (int i = THREAD_INDEX; i < MASK_WORDS; i += WARPS * 32) all_masks[i] = masks[i];

// A lane's pairs of tokens, of which p is in string p / (PAIRS / 2). All that is read of blocks beyond the last one is
// that of the last one, and nothing is written for them.
int token_of[PAIRS];
bool exists[PAIRS];
float roots[PAIRS][2], gains[PAIRS][2], squares[PAIRS][2];
UNROLL for (int p = 0; p < PAIRS; ++p) {
    const int string = p / (PAIRS / 2), t = p % (PAIRS / 2) * 64 + 2 * lane, own = block + (KEYS ? string : 0);
    exists[p] = own < blocks;
    token_of[p] = (exists[p] ? own : blocks - 1) * BLOCK + (KEYS ? t : t / 16 * 32 + string * 16 + t % 16);
    UNROLL for (int e = 0; e < 2; ++e) {
        roots[p][e] = root[head * tokens + token_of[p] + e];
        gains[p][e] = 1;
        squares[p][e] = 0;
    }
}
GLOBAL const u32* unit_pairs = (GLOBAL const u32*)unit + (size_type)head * DIM * (tokens / 2);
#if METRIC
GLOBAL u32* error_pairs = (GLOBAL u32*)errors + (size_type)head * DIM * (tokens / 2);
const int first_begin = token_of[0] - 2 * lane, second_begin = token_of[PAIRS / 2] - 2 * lane;  // of strings
#endif

for (int pass = 0; pass <= LAST_PASS; ++pass) {
    const bool down = METRIC && pass == 0;
#if METRIC
    GLOBAL const u32* matrix = (GLOBAL const u32*)(down ? feedback : pull) + head * (DIM * DIM / 2);
#endif
    u32 next_exact[PAIRS], next_before[PAIRS] = {};
    {
        const int number = down ? COORDINATES - 1 : first, coordinate = KEYS ? searched(number) : number;
        UNROLL for (int p = 0; p < PAIRS; ++p) {
            const int at = (coordinate * tokens + token_of[p]) / 2;
            next_exact[p] = unit_pairs[at];
#if METRIC
            if (!down) next_before[p] = error_pairs[at];
#endif
        }
    }
    for (int turn = 0; turn < COORDINATES; ++turn) {
        const int number = first + (down ? COORDINATES - 1 - turn : turn), i = number % STEP;
        const int coordinate = KEYS ? searched(number) : number;
        const int second = KEYS ? number / STEP % 2 : 0;  // whether it belongs to second strings

        if (turn % STEP == 0) {  // the tables of its code, and what the errors of all other coordinates move
            const int block_first = number / STEP * STEP;
            BARRIER;
            for (int n = warp; n < LEVEL_WORDS / 32; n += WARPS) {
                levels[n * 32 + lane] = level_pairs[((KEYS ? second : lane / LANES) * PERIOD * ROWS + n) * LANES + lane % LANES];
            }
            for (int n = THREAD_INDEX; n < STATE_WORDS; n += WARPS * 32) {
                level_of[n] = table[second * ROWS * NODES + n];
            }
#if METRIC
            for (int n = lane; n < STEP * STEP; n += 32) {
                const int at = (block_first + n / STEP) * DIM + block_first + n % STEP;
                pulls[n] = low_twice(((GLOBAL const u16*)matrix)[at]);
            }
            for (int part = 0; part < 2 * LENGTH / 64; ++part) {
                const int token = (part < LENGTH / 64 ? first_begin : second_begin) + part * 64 % LENGTH;
                float sums[4][2][4] = {};
                GLOBAL const u32* left = matrix + block_first * (DIM / 2);
                if (down) {  // the errors of later coordinates alone
                    add_products(sums, left, error_pairs + token / 2, tokens / 2, block_first + STEP, lane);
                } else {
                    add_products(sums, left, error_pairs + token / 2, tokens / 2, 0, lane);
                }
                UNROLL for (int m = 0; m < 4; ++m) {
                    UNROLL for (int n = 0; n < 4; ++n) {
                        const int row = n / 2 * 8 + COLUMN(lane) + n % 2;
                        all_changes[row * WIDTH + part * 32 + ROW(lane) * 4 + m] =
                            pack_halves(sums[m][n / 2][n % 2], sums[m][n / 2][n % 2 + 2]);
                    }
                }
            }
#endif
            BARRIER;
        }

        u32 exact[PAIRS], moved[PAIRS], before[PAIRS];
        UNROLL for (int p = 0; p < PAIRS; ++p) {
            exact[p] = next_exact[p];
            before[p] = next_before[p];
            moved[p] = METRIC ? all_changes[i * WIDTH + p * 32 + lane] : 0;
        }
        if (turn + 1 < COORDINATES) {  // read the next one's numbers ahead
            const int next = number + (down ? -1 : 1), next_coordinate = KEYS ? searched(next) : next;
            UNROLL for (int p = 0; p < PAIRS; ++p) {
                const int at = (next_coordinate * tokens + token_of[p]) / 2;
                next_exact[p] = unit_pairs[at];
#if METRIC
                if (!down) next_before[p] = error_pairs[at];
#endif
            }
        }
#if METRIC
        UNROLL_4 for (int done = 0; done < turn % STEP; ++done) {
            const int j = down ? STEP - 1 - done : done;
            const u32 by = pulls[i * STEP + j];
            UNROLL for (int p = 0; p < PAIRS; ++p) {
                moved[p] = pair_multiply_add(by, all_changes[j * WIDTH + p * 32 + lane], moved[p]);
            }
        }
#endif
        UNROLL for (int p = 0; p < PAIRS; ++p) {
            UNROLL for (int e = 0; e < 2; ++e) {
                const int string = p / (PAIRS / 2), t = p % (PAIRS / 2) * 64 + 2 * lane + e;
                const float x = half_of(exact[p], e) - half_of(moved[p], e);
                float bin = x * (BINS / (2 * REACH) / gains[p][e]) + BINS / 2;
                bin = bin < 0 ? 0 : bin > BINS - 1 ? BINS - 1 : bin;
                const int row = ((SHARED_POINTER const u8*)rows)[(KEYS ? second : string) * BINS + int(bin)];
                const int at = record_of(string, t);
                strings.records[at] = pack_halves(-x * roots[p][e], gains[p][e] * roots[p][e]);
                strings.records[at + 1] = all_masks[t % PERIOD * (ROWS - 1) + row];
            }
        }
        LANES_MEET;
#if METRIC
        SHARED_POINTER u8* own_end = (SHARED_POINTER u8*)ends + number * 2 + lane / LANES;
        const int end = pass ? int(*own_end) : best_end(strings);
        if (pass == 0 && lane % LANES == 0) *own_end = u8(end);
#else
        const int end = best_end(strings);
#endif
        find_string(strings, end);

        UNROLL for (int p = 0; p < PAIRS; ++p) {
            const int string = p / (PAIRS / 2), t = p % (PAIRS / 2) * 64 + 2 * lane;
            SHARED_POINTER const u8* codes = (SHARED_POINTER const u8*)strings.codes + string * LENGTH;
            int state = 0;
            UNROLL for (int back = (NODE_BITS + BITS - 1) / BITS; back > 0; --back) {
                state = state << BITS | codes[(t - back + LENGTH) % LENGTH];
            }
            float level[2];
            UNROLL for (int e = 0; e < 2; ++e) {
                state = (state << BITS | codes[t + e]) & (NODES * ROWS - 1);
                level[e] = level_of[(KEYS ? 0 : string * ROWS * NODES) + state];
                squares[p][e] += level[e] * level[e];
            }
#if METRIC
            float left[2], change[2];
            UNROLL for (int e = 0; e < 2; ++e) {
                left[e] = gains[p][e] * level[e] - half_of(exact[p], e);
                change[e] = left[e] - half_of(before[p], e);
            }
            all_changes[i * WIDTH + p * 32 + lane] = pack_halves(change[0], change[1]);
            if (exists[p]) error_pairs[(coordinate * tokens + token_of[p]) / 2] = pack_halves(left[0], left[1]);
#endif
        }

        if (pass == LAST_PASS) {  // lane r has the codes of 16 tokens: first those of the first string
            const int run = lane % (LENGTH / 8), string = run / (LENGTH / 16);
            u32 four[4], found[BITS] = {};
            UNROLL for (int q = 0; q < 4; ++q) four[q] = strings.codes[run * 4 + q];
            UNROLL for (int q = 0; q < 4; ++q) {
                u32 bits = 0;  // of each byte, highest first and apart from each other
                UNROLL for (int k = 0; k < BITS; ++k) bits |= (four[q] >> (BITS - 1 - k) & 0x01010101u) << (2 * k);
                u32 packed = 0;
                UNROLL for (int n = 0; n < 4; ++n) packed |= (bits >> (8 * n) & 0xffu) << (STREAM * n);
                const int at = 4 * STREAM * q;
                found[at / 32] |= packed << at % 32;
                if (at % 32 + 4 * STREAM > 32) found[at / 32 + 1] |= packed >> (32 - at % 32);
            }
            const int target = KEYS ? run % 8 * 4 + coordinate % 8 / 2 : coordinate % 8 * 4 + run % 4;
            const int to_block = block + (KEYS ? string : 0);
            GLOBAL u32* to = words + ((size_type)(head * blocks + to_block) * (DIM / 8) + coordinate / 8) * (32 * BITS);
            UNROLL for (int w = 0; w < BITS; ++w) {
                GLOBAL u32* word = to + w / 2 * 64 + (w / 2 * 2 + 1 < BITS ? target * 2 + w % 2 : target);
                const u32 both = KEYS ? found[w] << second : found[w] << string | word_from_lane(found[w] << string, 4);
                // Of keys, the other coordinate of a pair comes 16 turns later.
                if (lane < (KEYS ? 16 : 4) && to_block < blocks) *word = KEYS && second != down ? *word | both : both;
            }
        }
        LANES_MEET;
    }

#if METRIC
    // The factors that make the products of vectors and their levels right, from those of vectors and errors.
    GLOBAL const u32* whole = (GLOBAL const u32*)damped + head * (DIM * DIM / 2);
    for (int part = 0; part < 2 * LENGTH / 64; ++part) {
        const int string = part * 64 / LENGTH;
        const int token = (string ? second_begin : first_begin) + part * 64 % LENGTH;
        float exact[8] = {}, crossed[8] = {}, error[8] = {};
        for (int from = 0; from < DIM; from += STEP) {
            float sums[4][2][4] = {}, of_errors[4][2][4] = {};
            if (pass == 0) add_products(sums, whole + from * (DIM / 2), unit_pairs + token / 2, tokens / 2, 0, lane);
            add_products(of_errors, whole + from * (DIM / 2), error_pairs + token / 2, tokens / 2, 0, lane);
            UNROLL for (int n = 0; n < 4; ++n) {
                const int at = (searched(from + n / 2 * 8 + COLUMN(lane) + n % 2) * tokens + token) / 2 + ROW(lane) * 4;
                u32 x[4], off[4];
                READ_16(unit_pairs + at, x);
                READ_16(error_pairs + at, off);
                UNROLL for (int t = 0; t < 8; ++t) {
                    const float by_unit = sums[t / 2][n / 2][n % 2 + t % 2 * 2];
                    const float by_error = of_errors[t / 2][n / 2][n % 2 + t % 2 * 2];
                    exact[t] += half_of(x[t / 2], t % 2) * by_unit;
                    crossed[t] += half_of(x[t / 2], t % 2) * by_error;
                    error[t] += half_of(off[t / 2], t % 2) * by_error;
                }
            }
        }
        UNROLL for (int t = 0; t < 8; ++t) {
            const int at = part * 64 + ROW(lane) * 8 + t, vector = head * tokens + token + ROW(lane) * 8 + t;
            const float of_unit = pass == 0 ? over_columns_sum(exact[t]) : factors[vector];
            const float with_levels = of_unit + over_columns_sum(crossed[t]);
            const float of_levels = with_levels + over_columns_sum(crossed[t]) + over_columns_sum(error[t]);
            const float gain = pass == 0 ? 1.0f : scales[at];
            LANES_MEET;
            if (COLUMN(lane) == 0) {
                const float product = with_levels / gain;
                const float factor = clipped(of_unit / (product > 1e-9f ? product : 1e-9f), 0.5f, 2.0f);
                scales[at] = clipped(gain * with_levels / of_levels, 0.5f, 2.0f);
                if (block + string < blocks) factors[vector] = pass == LAST_PASS ? factor : of_unit;
            }
        }
    }
    LANES_MEET;
    if (pass < LAST_PASS) {
        UNROLL for (int p = 0; p < PAIRS; ++p) {
            float of_before[2];
            UNROLL for (int e = 0; e < 2; ++e) {
                const float gain = scales[p * 64 + 2 * lane + e];
                of_before[e] = gain / gains[p][e];
                gains[p][e] = gain;
            }
            if (!exists[p]) continue;
            UNROLL_4 for (int d = 0; d < DIM; ++d) {
                const int at = (d * tokens + token_of[p]) / 2;
                float left[2];
                UNROLL for (int e = 0; e < 2; ++e) {
                    const float x = half_of(unit_pairs[at], e);
                    left[e] = of_before[e] * (half_of(error_pairs[at], e) + x) - x;
                }
                error_pairs[at] = pack_halves(left[0], left[1]);
            }
        }
        LANES_MEET;
    }
#endif
}

#if !METRIC
UNROLL for (int p = 0; p < PAIRS; ++p) {
    UNROLL for (int e = 0; e < 2; ++e) {
        if (exists[p]) factors[(head * parts + first / COORDINATES) * tokens + token_of[p] + e] = squares[p][e];
    }
}
#endif
