// What the GPU kernels' text is written in, for a C++ compiler: a thread-group's threads take turns, each until it waits
// for others. With METAL_LANES lanes hold blocks as Metal's do, else as CUDA's.
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef long long size_type;
typedef _Float16 half;
#define FUNCTION inline
#define SHARED static
#define ALIGNED __attribute__((aligned(16)))
#define SHARED_POINTER
#define GLOBAL
#define THREAD
#define UNROLL
#define UNROLL_4
#define BARRIER wait(group_gate, thread_count)
#define DEVICE_BARRIER BARRIER
#define LANES_MEET wait_for_lanes()
#define TEAM_BARRIER wait(team_gates[current / 128], 128)
#define THREAD_INDEX current
#define GROUP_X group_place[0]
#define GROUP_Y group_place[1]
#define GROUP_Z group_place[2]
#define EXP2(x) exp2f(x)
#define LOG2(x) log2f(x)
#define ABSOLUTE(x) fabsf(x)
#define UNIFORM(x) (x)
#define SQRT(x) sqrtf(x)
#define MASKED_OR(x, mask, others) (((x) & (mask)) | (others))
#define CHOSEN(x, y, mask) (((x) & (mask)) | ((y) & ~(mask)))
#define PLACED_BYTE(word, i, others) (((word) >> (8 * (i)) & 0xff) << 8 | (others))
#define EVEN_BYTES(x, y) (((x) & 0xffu) | ((x) >> 8 & 0xff00u) | ((y) & 0xffu) << 16 | ((y) << 8 & 0xff000000u))
#define ODD_BYTES(x, y) EVEN_BYTES((x) >> 8, (y) >> 8)
#define EVEN_PLACE(x, y, i) (((y) & 0xffu) | ((x) >> (8 * (i)) & 0xffu) << 8 | ((y) & 0xff0000u))
#define ODD_PLACE(x, y, i) EVEN_PLACE(x, (y) >> 8, i)
#define LOW_HALVES(x, y) (((x) & 0xffffu) | ((y) << 16))
#define HIGH_HALVES(x, y) (((x) >> 16) | ((y) & 0xffff0000u))
#define READ_8(from, to) memcpy(to, from, 8)
#define READ_SHARED_8(from, to) memcpy(to, from, 8)
#define READ_16(from, to) memcpy(to, from, 16)
#define WRITE_8(to, x, y) ((to)[0] = (x), (to)[1] = (y))
#define READ_FLOATS(from, to) memcpy(to, from, 16)
#define STORE_16(to, from) memcpy(to, from, 16)
#define GROUP_SHARED(name) static ALIGNED u32 name[SHARED_WORDS]
#define SHOW_TO_PRODUCTS
#define WRITE_4(to, x) { for (int n_ = 0; n_ < 4; ++n_) (to)[n_] = (x); }
#ifdef METAL_LANES
#define ROW(lane) (((lane) / 4 & 4) + (lane) / 2 % 4)
#define COLUMN(lane) (((lane) / 4 & 2) * 2 + (lane) % 2 * 2)
#define LANE(row, pair) (((row) & 4) << 2 | ((pair) & 2) << 2 | ((row) & 3) << 1 | ((pair) & 1))
#else
#define ROW(lane) ((lane) / 4)
#define COLUMN(lane) ((lane) % 4 * 2)
#define LANE(row, pair) ((row) * 4 + (pair))
#endif

// Store a number as whatever an array holds.
template <typename T>
FUNCTION void put(GLOBAL T* to, float x) { *to = T(x); }

struct Gate {
    int arrived = 0, opened = 0;
};
struct Box {
    u32 left[4], right[2];
    float value;
};
static ucontext_t beginnings[1024];
static jmp_buf scheduler, places[1024];  // not contexts, whose every change of turns is two calls of the system
static Gate* closed[1024];               // the gate at which a thread waits
static int closed_since[1024];
static bool begun[1024], done[1024];
static Gate group_gate, lane_gates[32], team_gates[8];
// Lanes swap numbers through these. They take turns, so that a lane that is ahead does not overwrite what others read.
static Box boxes_of_turn[2][1024];
static u8 turns[1024];
static int current, thread_count, group_place[3];

static __attribute__((noinline)) void let_others_go_on(int self) {
    if (!_setjmp(places[self])) _longjmp(scheduler, 1);
}
static __attribute__((noinline)) void let_go_on(int thread) {
    if (_setjmp(scheduler)) return;
    current = thread;
    if (begun[thread]) _longjmp(places[thread], 1);
    begun[thread] = true;
    setcontext(&beginnings[thread]);
}
static void wait(Gate& gate, int count) {
    int self = current;
    if (++gate.arrived == count) {
        gate.arrived = 0;
        ++gate.opened;
        return;
    }
    closed[self] = &gate, closed_since[self] = gate.opened;
    let_others_go_on(self);
}

static void wait_for_lanes() { wait(lane_gates[current / 32], 32); }

// Copies that run while a thread does something else: here they happen as late as they may.
struct Copy {
    void* to;
    const void* from;
    int size;
};
struct Copies {
    Copy of_group[16][16];
    int sizes[16], begun, done;
    void add(void* to, const void* from, int size) { of_group[begun % 16][sizes[begun % 16]++] = {to, from, size}; }
    void end() { ++begun; }
    void wait_for(int left) {
        for (; done + left < begun; ++done) {
            for (int i = 0; i < sizes[done % 16]; ++i) {
                const Copy& copy = of_group[done % 16][i];
                memcpy(copy.to, copy.from, copy.size);
            }
            sizes[done % 16] = 0;
        }
    }
};
static Copies copies_of[1024];
#define COPY_8(to, from) copies_of[current].add(to, from, 8)
#define COPY_16(to, from) copies_of[current].add(to, from, 16)
#define END_COPIES copies_of[current].end()
#define WAIT_FOR_COPIES(n) copies_of[current].wait_for(n)
static int lane_at[8][8];  // by row and column
static Box* next_boxes() { return boxes_of_turn[turns[current] ^= 1]; }
static Box& box_at(Box* boxes, int row, int column) { return boxes[current / 32 * 32 + lane_at[row][column]]; }
static float half_of(u32 pair, int i) {
    u16 bits = u16(pair >> (16 * i));
    half value;
    memcpy(&value, &bits, 2);
    return float(value);
}
static u32 pack_halves(float low, float high) {
    half pair[2] = {half(low), half(high)};
    u32 packed;
    memcpy(&packed, pair, 4);
    return packed;
}

template <typename F>
static u32 of_pair(u32 a, u32 b, u32 c, F f) {
    return pack_halves(f(half_of(a, 0), half_of(b, 0), half_of(c, 0)), f(half_of(a, 1), half_of(b, 1), half_of(c, 1)));
}
static u32 pair_multiply_add(u32 a, u32 b, u32 c) {
    return of_pair(a, b, c, [](float x, float y, float z) { return x * y + z; });
}
static u32 pair_subtract(u32 a, u32 b) { return of_pair(a, b, 0, [](float x, float y, float) { return x - y; }); }
static u32 pair_min(u32 a, u32 b) { return of_pair(a, b, 0, [](float x, float y, float) { return x < y ? x : y; }); }
static u32 pair_less(u32 a, u32 b) {
    return (half_of(a, 0) < half_of(b, 0) ? 0xffffu : 0) | (half_of(a, 1) < half_of(b, 1) ? 0xffff0000u : 0);
}
static u32 low_twice(u32 x) { return (x & 0xffffu) * 0x10001u; }
static u32 high_twice(u32 x) { return low_twice(x >> 16); }
static u32 rotated(u32 x, u32 by) { return by & 31 ? x << (by & 31) | x >> (32 - (by & 31)) : x; }

enum Lanes { ALL, OF_COLUMN, OF_ROW };
template <class Combine>
static float over(float x, Lanes of, Combine combine) {
    Box* boxes = next_boxes();
    boxes[current].value = x;
    wait_for_lanes();
    float result = NAN;
    for (int lane = 0; lane < 32; ++lane) {
        if (of == OF_COLUMN && COLUMN(lane) != COLUMN(current % 32)) continue;
        if (of == OF_ROW && ROW(lane) != ROW(current % 32)) continue;
        float other = boxes[current / 32 * 32 + lane].value;
        result = isnan(result) ? other : combine(result, other);
    }
    return result;
}
static float of_lane(float x, int lane) {
    Box* boxes = next_boxes();
    boxes[current].value = x;
    wait_for_lanes();
    float other = boxes[current / 32 * 32 + lane].value;
    return other;
}
static float from_lane(float x, int bit) { return of_lane(x, current % 32 ^ bit); }
static u32 word_of_lane(u32 x, int lane) {
    Box* boxes = next_boxes();
    boxes[current].left[0] = x;
    wait_for_lanes();
    u32 other = boxes[current / 32 * 32 + lane].left[0];
    return other;
}
static u32 word_from_lane(u32 x, u32 bits) { return word_of_lane(x, current % 32 ^ (bits & 31)); }
static float over_rows_max(float x) { return over(x, OF_COLUMN, [](float a, float b) { return a > b ? a : b; }); }
static float over_rows_sum(float x) { return over(x, OF_COLUMN, [](float a, float b) { return a + b; }); }
static float over_columns_sum(float x) { return over(x, OF_ROW, [](float a, float b) { return a + b; }); }
static bool in_any_lane(bool x) {
    return over(x ? 1.0f : 0.0f, ALL, [](float a, float b) { return a > b ? a : b; }) > 0;
}
static float over_lanes_sum(float x) { return over(x, ALL, [](float a, float b) { return a + b; }); }

static void multiply_add(float (&sums)[4], const u32 (&left)[4], const u32 (&right)[2]) {
    Box* boxes = next_boxes();
    memcpy(boxes[current].left, left, sizeof left);
    memcpy(boxes[current].right, right, sizeof right);
    wait_for_lanes();
    int row = ROW(current % 32), column = COLUMN(current % 32);
    for (int i = 0; i < 4; ++i) {
        for (int k = 0; k < 16; ++k) {
            float one = half_of(box_at(boxes, row, k % 8).left[i / 2 + k / 8 * 2], k % 2);
#ifdef METAL_LANES
            float other = half_of(box_at(boxes, k % 8, column).right[k / 8], i % 2);
#else
            float other = half_of(box_at(boxes, column + i % 2, k % 8).right[k / 8], k % 2);
#endif
            sums[i] += one * other;
        }
    }
}

// Products of hopper.h, at once: each SIMD-group's own rows. The words of a right factor are where hopper.h says.
template <int COUNT>
static void begin_products(float (&sums)[COUNT]) {}
static void end_products() {}
template <int COUNT>
static void wait_for_products(float (&sums)[COUNT]) {}
template <int COUNT, class Right>
static void group_multiply(float (&sums)[COUNT], const u32 (&left)[4], bool more, Right right) {
    Box* boxes = next_boxes();
    memcpy(boxes[current].left, left, sizeof left);
    wait_for_lanes();
    int row = ROW(current % 32), column = COLUMN(current % 32);
    for (int i = 0; i < COUNT; ++i) {
        if (!more) sums[i] = 0;
        for (int k = 0; k < 16; ++k) {
            float one = half_of(box_at(boxes, row, k % 8).left[i / 2 % 2 + k / 8 * 2], k % 2);
            sums[i] += one * right(k, i / 4 * 8 + column + i % 2);
        }
    }
}
#ifdef BLOCK_WORDS
static float of_tile(const u32* tile, int token, int coordinate) {
    return half_of(tile[(token / 8 * (DIM / 8) + coordinate / 8) * BLOCK_WORDS + token % 8 * 4 + coordinate % 8 / 2], coordinate % 2);
}
static void multiply_keys(float (&sums)[32], const u32 (&left)[4], const u32* tile, int k) {
    group_multiply(sums, left, k > 0, [&](int i, int n) { return of_tile(tile, n, 16 * k + i); });
}
static void multiply_values(float (&sums)[DIM / 2], const u32 (&left)[4], const u32* tile, int k) {
    group_multiply(sums, left, true, [&](int i, int n) { return of_tile(tile, 16 * k + i, n); });
}
static void multiply_pairs(float (&sums)[DIM / 2], const u32 (&left)[4], const u32* tile, int k) {
    group_multiply(sums, left, true, [&](int i, int n) {
        return half_of(tile[((2 * k + i / 8) * (DIM / 8) + n / 8) * BLOCK_WORDS + n % 8 * 4 + i % 8 / 2], i % 2);
    });
}
#endif

static u32 as_right_factor(u32 block) {
#ifdef METAL_LANES
    return block;
#else
    Box* boxes = next_boxes();
    boxes[current].right[0] = block;
    wait_for_lanes();
    int row = ROW(current % 32), column = COLUMN(current % 32);
    float one = half_of(box_at(boxes, column, row).right[0], row % 2), other = half_of(box_at(boxes, column + 1, row).right[0], row % 2);
    return pack_halves(one, other);
#endif
}

static u32 right_factor_of(const float* vectors, int stride, int run, int first, float factor, int lane) {
    int row = ROW(lane), column = COLUMN(lane);
#ifdef METAL_LANES
    const float* at = vectors + column * stride + row / 2 * run + first + row % 2;
    return pack_halves(at[0] * factor, at[stride] * factor);
#else
    const float* at = vectors + row * stride + column / 2 * run + first;
    return pack_halves(at[0] * factor, at[1] * factor);
#endif
}

static u32 right_factor_of_rows(const u32* rows, int stride, int lane) {
    int row = ROW(lane), column = COLUMN(lane);
#ifdef METAL_LANES
    const u32* at = rows + column * stride + row / 2;
    return row % 2 ? HIGH_HALVES(at[0], at[stride]) : LOW_HALVES(at[0], at[stride]);
#else
    return rows[row * stride + column / 2];
#endif
}

static void body();
static void enter(int thread) {
    while (true) {  // once for each group
        body();
        done[thread] = true;
        let_others_go_on(thread);
    }
}

// Where a thread read or wrote outside of all arrays, if one did: arrays lie between pages that nobody may touch.
static bool outside;
extern "C" { void* outside_at; }
static void leave(int, siginfo_t* info, void*) {
    outside = true;
    outside_at = info->si_addr;
    _longjmp(scheduler, 1);
}

enum Result { ENDED, WAITS_FOR_EVER, OUTSIDE };

static Result run_all(int x, int y, int z, int threads) {
    static char* stacks = (char*)malloc(1024 << 16);
    thread_count = threads;
    outside = false;
    for (int lane = 0; lane < 32; ++lane) {
        lane_at[ROW(lane)][COLUMN(lane)] = lane_at[ROW(lane)][COLUMN(lane) + 1] = lane;
    }
    for (int thread = 0; thread < threads; ++thread) {
        getcontext(&beginnings[thread]);
        beginnings[thread].uc_stack.ss_sp = stacks + (size_t(thread) << 16);
        beginnings[thread].uc_stack.ss_size = 1 << 16;
        makecontext(&beginnings[thread], (void (*)())enter, 1, thread);
        begun[thread] = false, turns[thread] = 0;
    }
    for (int group = 0; group < x * y * z; ++group) {
        group_place[0] = group % x, group_place[1] = group / x % y, group_place[2] = group / x / y;
        group_gate = Gate();
        for (Gate& gate : lane_gates) gate = Gate();
        for (Gate& gate : team_gates) gate = Gate();
        for (int thread = 0; thread < threads; ++thread) closed[thread] = nullptr, done[thread] = false;
        int left = threads;
        while (left) {
            bool any = false;
            left = 0;
            for (int thread = 0; thread < threads; ++thread) {
                if (done[thread]) continue;
                ++left;
                if (closed[thread] && closed[thread]->opened == closed_since[thread]) continue;
                closed[thread] = nullptr;
                any = true;
                let_go_on(thread);
                if (outside) return OUTSIDE;
            }
            if (left && !any) return WAITS_FOR_EVER;
        }
    }
    return ENDED;
}

static Result run_groups(int x, int y, int z, int threads) {
    struct sigaction ours = {}, before;
    ours.sa_sigaction = leave;
    ours.sa_flags = SA_SIGINFO | SA_NODEFER;  // a jump out of the handler leaves the signal as it was
    sigaction(SIGSEGV, &ours, &before);
    Result result = run_all(x, y, z, threads);
    sigaction(SIGSEGV, &before, nullptr);
    return result;
}
