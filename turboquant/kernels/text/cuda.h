// What the kernels' text is written in, for CUDA (compute capability 8.0 and later: products of halves in registers).
#define FUNCTION __device__ __forceinline__
#define SHARED __shared__
#define ALIGNED __attribute__((aligned(16)))
#define SHARED_POINTER
// Memory that the launch adds: more than a text may declare.
#define GROUP_SHARED(name) extern __shared__ __align__(128) u32 name[]
#define GLOBAL
#define THREAD
#define UNROLL _Pragma("unroll")
#define UNROLL_4 _Pragma("unroll 4")
#define BARRIER __syncthreads()
#define DEVICE_BARRIER __syncthreads()  // also of what is written to arrays
#define LANES_MEET __syncwarp()  // a SIMD-group's lanes; also what they have written to arrays
#define THREAD_INDEX int(threadIdx.x)
#define GROUP_X int(blockIdx.x)
#define GROUP_Y int(blockIdx.y)
#define GROUP_Z int(blockIdx.z)
#define ROW(lane) ((lane) / 4)
#define COLUMN(lane) ((lane) % 4 * 2)
#define LANE(row, pair) ((row) * 4 + (pair))  // of a row and a pair of columns
#define EXP2(x) fast_exp2(x)
#define LOG2(x) log2f(x)
#define ABSOLUTE(x) fabsf(x)
// A number that is the same in all lanes: the compiler then knows it, and keeps addresses in registers of the SIMD-group.
#define UNIFORM(x) __shfl_sync(0xffffffffu, x, 0)
#define SQRT(x) sqrtf(x)
// (x & mask) | others, in one instruction: written as C++ it would become a sum that takes two.
#define MASKED_OR(x, mask, others) masked_or(x, mask, others)
#define CHOSEN(x, y, mask) (((x) & (mask)) | ((y) & ~(mask)))
// Byte i of a word, as the second byte of `others`, whose other bytes but the first are 0.
#define PLACED_BYTE(word, i, others) __byte_perm(word, others, 0x5504 | (i) << 4)
#define EVEN_BYTES(x, y) __byte_perm(x, y, 0x6420)
#define ODD_BYTES(x, y) __byte_perm(x, y, 0x7531)
#define LOW_HALVES(x, y) __byte_perm(x, y, 0x5410)
// Byte i of x as the second byte, between bytes 0 and 2 of y, or bytes 1 and 3. The highest bits of y's bytes 2 and 3 are 0.
#define EVEN_PLACE(x, y, i) permuted(x, y, 0xe604 | (i) << 4)
#define ODD_PLACE(x, y, i) permuted(x, y, 0xf705 | (i) << 4)
// Of the 128 threads that work together; see attend_many.h.
#define TEAM_BARRIER asm volatile("bar.sync %0, 128;" ::"r"(int(threadIdx.x) / 128 + 1) : "memory")
#define HIGH_HALVES(x, y) __byte_perm(x, y, 0x7632)
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long size_type;

// Store a number as whatever an array holds.
template <typename T>
FUNCTION void put(GLOBAL T* to, float x) { *to = T(x); }

#define READ_8(from, to) { uint2 read_ = *(const uint2*)(from); (to)[0] = read_.x; (to)[1] = read_.y; }
#define READ_SHARED_8(from, to) READ_8(from, to)
#define READ_16(from, to) \
    { uint4 read_ = *(const uint4*)(from); (to)[0] = read_.x; (to)[1] = read_.y; (to)[2] = read_.z; (to)[3] = read_.w; }
// Four times the same word.
#define WRITE_4(to, x) { const u32 word_ = (x); *(uint4*)(to) = make_uint4(word_, word_, word_, word_); }
#define WRITE_8(to, x, y) *(float2*)(to) = make_float2(x, y)
#define READ_FLOATS(from, to) \
    { float4 read_ = *(const float4*)(from); (to)[0] = read_.x; (to)[1] = read_.y; (to)[2] = read_.z; (to)[3] = read_.w; }

// Copies of 8 or 16 bytes from arrays to shared memory, which run while the lane does something else. Lanes end groups of
// them, and wait until all but the last n groups are there; LANES_MEET shows a lane what others have copied.
#define COPY_8(to, from) COPY_AHEAD(8, "ca", to, from)
#define COPY_16(to, from) COPY_AHEAD(16, "cg", to, from)
#define COPY_AHEAD(size, cache, to, from) \
    asm volatile("cp.async." cache ".shared.global [%0], [%1], " #size ";" \
                 ::"r"(u32(__cvta_generic_to_shared(to))), "l"(from) : "memory")
#define END_COPIES asm volatile("cp.async.commit_group;" ::: "memory")
#define WAIT_FOR_COPIES(n) asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory")

FUNCTION u32 masked_or(u32 x, u32 mask, u32 others) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(x), "r"(mask), "r"(others));
    return result;
}

// __byte_perm has no signs.
FUNCTION u32 permuted(u32 x, u32 y, u32 which) {
    u32 result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(y), "r"(which));
    return result;
}

FUNCTION u32 pack_halves(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

FUNCTION float half_of(u32 pair, int i) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(u16(pair >> (16 * i))));
    return x;
}

// Operations on both halves of a pair.
FUNCTION u32 low_twice(u32 x) {  // written so that it becomes a part of the instruction that uses it
    u32 pair;
    asm("{ .reg .f16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {low, low}; }" : "=r"(pair) : "r"(x));
    return pair;
}
FUNCTION u32 high_twice(u32 x) {
    u32 pair;
    asm("{ .reg .f16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {high, high}; }" : "=r"(pair) : "r"(x));
    return pair;
}
FUNCTION u32 pair_multiply_add(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
FUNCTION u32 pair_subtract(u32 a, u32 b) {
    u32 c;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
FUNCTION u32 pair_min(u32 a, u32 b) {
    u32 c;
    asm("min.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
// All bits of a half where that of a is less, else none.
FUNCTION u32 pair_less(u32 a, u32 b) {
    u32 c;
    asm("set.lt.u32.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
FUNCTION u32 rotated(u32 x, u32 by) { return __funnelshift_l(x, x, by); }

// x of the lane whose number differs in one bit.
FUNCTION float from_lane(float x, int bit) { return __shfl_xor_sync(0xffffffffu, x, bit); }

// x of the lane whose number differs in some bits, of which the lowest five count.
FUNCTION u32 word_from_lane(u32 x, u32 bits) { return __shfl_xor_sync(0xffffffffu, x, int(bits)); }

// x of a lane.
FUNCTION float of_lane(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
FUNCTION u32 word_of_lane(u32 x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

FUNCTION float over_rows_max(float x) {
    UNROLL for (int i = 4; i < 32; i *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, i));
    return x;
}

FUNCTION float over_rows_sum(float x) {
    UNROLL for (int i = 4; i < 32; i *= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}

FUNCTION float over_columns_sum(float x) {
    UNROLL for (int i = 1; i < 4; i *= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}

FUNCTION bool in_any_lane(bool x) { return __any_sync(0xffffffffu, x); }

FUNCTION float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

FUNCTION float over_lanes_sum(float x) {
    UNROLL for (int i = 1; i < 32; i *= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}

// sums (16 rows, 8 columns) += left (16, 16) times right (16, 8), in blocks of 8 x 8; left's go down first.
FUNCTION void multiply_add(float (&sums)[4], const u32 (&left)[4], const u32 (&right)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

// A block of sums, as halves, as a block of right factors, which lanes hold by columns.
FUNCTION u32 as_right_factor(u32 block) {
    u32 transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(block));
    return transposed;
}

// A block of right factors from 8 vectors, `stride` apart: its columns are the vectors, and its rows 2 i and 2 i + 1 the
// coordinates i * run + first and the next.
FUNCTION u32 right_factor_of(const float* vectors, int stride, int run, int first, float factor, int lane) {
    const float* at = vectors + lane / 4 * stride + lane % 4 * run + first;
    return pack_halves(at[0] * factor, at[1] * factor);
}

// A block of right factors from 8 rows of pairs of halves, `stride` apart: its columns are the rows.
FUNCTION u32 right_factor_of_rows(const u32* rows, int stride, int lane) { return rows[lane / 4 * stride + lane % 4]; }
