// What the kernels' text is written in, for Metal.
#include <metal_simdgroup_matrix>
#define FUNCTION inline
#define SHARED threadgroup
#define ALIGNED __attribute__((aligned(16)))
#define SHARED_POINTER threadgroup
#define GLOBAL device
#define THREAD thread
#define UNROLL _Pragma("unroll")
#define UNROLL_4 _Pragma("unroll 4")
#define BARRIER metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup)
#define DEVICE_BARRIER metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup | metal::mem_flags::mem_device)
#define LANES_MEET metal::simdgroup_barrier(metal::mem_flags::mem_threadgroup | metal::mem_flags::mem_device)
// MLX declares the positions that it finds by name in a kernel's body, so the body begins with metal_positions.h.
#define THREAD_INDEX int(index_in_group)
#define GROUP_X int(group.x)
#define GROUP_Y int(group.y)
#define GROUP_Z int(group.z)
// How a SIMD-group's lanes hold a matrix of 8 x 8.
#define ROW(lane) (((lane) / 4 & 4) + (lane) / 2 % 4)
#define COLUMN(lane) (((lane) / 4 & 2) * 2 + (lane) % 2 * 2)
#define LANE(row, pair) (((row) & 4) << 2 | ((pair) & 2) << 2 | ((row) & 3) << 1 | ((pair) & 1))  // pair: of columns
#define EXP2(x) metal::exp2(x)
#define LOG2(x) metal::log2(x)
#define ABSOLUTE(x) metal::fabs(x)
#define UNIFORM(x) (x)
#define SQRT(x) metal::sqrt(x)
#define CHOSEN(x, y, mask) (((x) & (mask)) | ((y) & ~(mask)))
#define PLACED_BYTE(word, i, others) (((word) >> (8 * (i)) & 0xffu) << 8 | (others))
#define MASKED_OR(x, mask, others) (((x) & (mask)) | (others))
#define EVEN_BYTES(x, y) (((x) & 0xffu) | ((x) >> 8 & 0xff00u) | ((y) & 0xffu) << 16 | ((y) << 8 & 0xff000000u))
#define ODD_BYTES(x, y) EVEN_BYTES((x) >> 8, (y) >> 8)
#define EVEN_PLACE(x, y, i) (((y) & 0xffu) | ((x) >> (8 * (i)) & 0xffu) << 8 | ((y) & 0xff0000u))
#define ODD_PLACE(x, y, i) EVEN_PLACE(x, (y) >> 8, i)
#define LOW_HALVES(x, y) (((x) & 0xffffu) | ((y) << 16))
#define HIGH_HALVES(x, y) (((x) >> 16) | ((y) & 0xffff0000u))
typedef uchar u8;
typedef ushort u16;
typedef uint u32;
typedef long size_type;

// Store a number as whatever an array holds.
template <typename T>
FUNCTION void put(GLOBAL T* to, float x) { *to = T(x); }

#define READ_8(from, to) { uint2 read_ = *(device const uint2*)(from); (to)[0] = read_.x; (to)[1] = read_.y; }
#define READ_SHARED_8(from, to) { uint2 read_ = *(threadgroup const uint2*)(from); (to)[0] = read_.x; (to)[1] = read_.y; }
#define READ_16(from, to) \
    { uint4 read_ = *(device const uint4*)(from); (to)[0] = read_.x; (to)[1] = read_.y; (to)[2] = read_.z; (to)[3] = read_.w; }
// Four times the same word.
#define WRITE_4(to, x) { *(threadgroup uint4*)(to) = uint4(x); }
#define READ_FLOATS(from, to) \
    { float4 read_ = *(device const float4*)(from); (to)[0] = read_.x; (to)[1] = read_.y; (to)[2] = read_.z; (to)[3] = read_.w; }

FUNCTION u32 pack_halves(float low, float high) { return as_type<u32>(half2(half(low), half(high))); }

FUNCTION float half_of(u32 pair, int i) { return float(as_type<half2>(pair)[i]); }

// Operations on both halves of a pair.
FUNCTION u32 low_twice(u32 x) { return (x & 0xffffu) * 0x10001u; }
FUNCTION u32 high_twice(u32 x) { return (x >> 16) * 0x10001u; }
FUNCTION u32 pair_multiply_add(u32 a, u32 b, u32 c) {
    return as_type<u32>(metal::fma(as_type<half2>(a), as_type<half2>(b), as_type<half2>(c)));
}
FUNCTION u32 pair_subtract(u32 a, u32 b) { return as_type<u32>(as_type<half2>(a) - as_type<half2>(b)); }
FUNCTION u32 pair_min(u32 a, u32 b) { return as_type<u32>(metal::min(as_type<half2>(a), as_type<half2>(b))); }
// All bits of a half where that of a is less, else none.
FUNCTION u32 pair_less(u32 a, u32 b) {
    return as_type<u32>(metal::select(ushort2(0), ushort2(0xffff), as_type<half2>(a) < as_type<half2>(b)));
}
FUNCTION u32 rotated(u32 x, u32 by) { return metal::rotate(x, by & 31); }

// x of the lane whose number differs in one bit.
FUNCTION float from_lane(float x, int bit) { return metal::simd_shuffle_xor(x, ushort(bit)); }

// x of the lane whose number differs in some bits, of which the lowest five count.
FUNCTION u32 word_from_lane(u32 x, u32 bits) { return metal::simd_shuffle_xor(x, ushort(bits & 31)); }

// x of a lane.
FUNCTION float of_lane(float x, int lane) { return metal::simd_shuffle(x, ushort(lane)); }
FUNCTION u32 word_of_lane(u32 x, int lane) { return metal::simd_shuffle(x, ushort(lane)); }

FUNCTION float over_rows_max(float x) {
    x = metal::max(x, metal::simd_shuffle_xor(x, ushort(2)));
    x = metal::max(x, metal::simd_shuffle_xor(x, ushort(4)));
    return metal::max(x, metal::simd_shuffle_xor(x, ushort(16)));
}

FUNCTION float over_rows_sum(float x) {
    x += metal::simd_shuffle_xor(x, ushort(2));
    x += metal::simd_shuffle_xor(x, ushort(4));
    return x + metal::simd_shuffle_xor(x, ushort(16));
}

FUNCTION float over_columns_sum(float x) {
    x += metal::simd_shuffle_xor(x, ushort(1));
    return x + metal::simd_shuffle_xor(x, ushort(8));
}

FUNCTION bool in_any_lane(bool x) { return metal::simd_any(x); }

FUNCTION float over_lanes_sum(float x) { return metal::simd_sum(x); }

// The two elements of a matrix that a lane holds.
template <typename T>
FUNCTION thread metal::vec<T, 2>& elements(thread metal::simdgroup_matrix<T, 8, 8>& matrix) {
    return reinterpret_cast<thread metal::vec<T, 2>&>(matrix.thread_elements());
}

// sums (16 rows, 8 columns) += left (16, 16) times right (16, 8), in blocks of 8 x 8; left's go down first.
FUNCTION void multiply_add(thread float (&sums)[4], thread const u32 (&left)[4], thread const u32 (&right)[2]) {
    for (int i = 0; i < 2; ++i) {
        metal::simdgroup_matrix<float, 8, 8> sum;
        elements(sum) = metal::vec<float, 2>(sums[2 * i], sums[2 * i + 1]);
        for (int k = 0; k < 2; ++k) {
            metal::simdgroup_matrix<half, 8, 8> one, other;
            elements(one) = as_type<metal::vec<half, 2>>(left[i + 2 * k]);
            elements(other) = as_type<metal::vec<half, 2>>(right[k]);
            metal::simdgroup_multiply_accumulate(sum, one, other, sum);
        }
        sums[2 * i] = elements(sum)[0];
        sums[2 * i + 1] = elements(sum)[1];
    }
}

// A block of sums, as halves, as a block of right factors: lanes hold both by rows.
FUNCTION u32 as_right_factor(u32 block) { return block; }

// A block of right factors from 8 vectors, `stride` apart: its columns are the vectors, and its rows 2 i and 2 i + 1 the
// coordinates i * run + first and the next.
FUNCTION u32 right_factor_of(threadgroup const float* vectors, int stride, int run, int first, float factor, int lane) {
    int k = ROW(lane);
    threadgroup const float* at = vectors + COLUMN(lane) * stride + k / 2 * run + first + k % 2;
    return pack_halves(at[0] * factor, at[stride] * factor);
}

// A block of right factors from 8 rows of pairs of halves, `stride` apart: its columns are the rows.
FUNCTION u32 right_factor_of_rows(device const u32* rows, int stride, int lane) {
    device const u32* at = rows + COLUMN(lane) * stride + ROW(lane) / 2;
    return ROW(lane) % 2 ? HIGH_HALVES(at[0], at[stride]) : LOW_HALVES(at[0], at[stride]);
}
