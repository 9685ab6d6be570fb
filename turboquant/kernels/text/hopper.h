// Products of a whole thread-group of four SIMD-groups, for CUDA's compute capability 9.0 (wgmma). A SIMD-group has 16 of
// 64 rows: its left factors and sums lie in registers as those of multiply_add do, its sums in blocks of 8 columns. Right
// factors lie in shared memory: a tile of tokens, of which 8 tokens' 8 coordinates stand together, see many.h.
// Products run while the thread-group does something else, until wait_for_products.

// Store four words, which lie at a multiple of 16 bytes.
#define STORE_16(to, from) { *(uint4*)(to) = make_uint4((from)[0], (from)[1], (from)[2], (from)[3]); }

// What this thread wrote to shared memory becomes visible to products that start behind the next barrier.
#define SHOW_TO_PRODUCTS asm volatile("fence.proxy.async.shared::cta;" ::: "memory")

// To be called before a group of products that change these sums.
template <int COUNT>
FUNCTION void begin_products(float (&sums)[COUNT]) {
    UNROLL for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sums[i])::"memory");
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
FUNCTION void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until the products are there: nothing that reads the sums may move before this.
template <int COUNT>
FUNCTION void wait_for_products(float (&sums)[COUNT]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    UNROLL for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// The descriptor of a tile from a word on; blocks of 8 x 8 halves are `along` bytes apart in the direction of the sum,
// and `across` bytes in the other.
FUNCTION unsigned long long described(const u32* from, int along, int across) {
    u32 address;
    asm("{ .reg .u64 at; cvta.to.shared.u64 at, %1; cvt.u32.u64 %0, at; }" : "=r"(address) : "l"(from));
    return (unsigned long long)(address >> 4 & 0x3fff) | (unsigned long long)(along >> 4) << 16 |
        (unsigned long long)(across >> 4) << 32;
}

#define SUMS_4(s, i) "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3])
#define SUMS_16(s, i) SUMS_4(s, i), SUMS_4(s, i + 4), SUMS_4(s, i + 8), SUMS_4(s, i + 12)
#define SUMS_32(s, i) SUMS_16(s, i), SUMS_16(s, i + 16)
#define NAMES_32 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_64 \
    NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57" \
             ",%58,%59,%60,%61,%62,%63"

// sums (16 rows a SIMD-group, 64 columns) = or += left (16, 16) times right (16, 64); the transposed one if `ACROSS`.
template <int ACROSS>
FUNCTION void group_multiply(float (&sums)[32], const u32 (&left)[4], unsigned long long right, bool more) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %37, 0;"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" NAMES_32 "}, {%32,%33,%34,%35}, %36, p, 1, 1, %38; }"
        : SUMS_32(sums, 0)
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "r"(int(more)), "n"(ACROSS));
}
template <int ACROSS>
FUNCTION void group_multiply(float (&sums)[64], const u32 (&left)[4], unsigned long long right, bool more) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %69, 0;"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" NAMES_64 "}, {%64,%65,%66,%67}, %68, p, 1, 1, %70; }"
        : SUMS_32(sums, 0), SUMS_32(sums, 32)
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "r"(int(more)), "n"(ACROSS));
}

// sums (16 rows a SIMD-group, 64 tokens) = or += left (16, 16) times coordinates 16 k to 16 k + 15 of a tile.
FUNCTION void multiply_keys(float (&sums)[32], const u32 (&left)[4], const u32* tile, int k) {
    group_multiply<0>(sums, left, described(tile + 2 * k * BLOCK_WORDS, BLOCK_WORDS * 4, DIM / 8 * BLOCK_WORDS * 4), k > 0);
}

// sums (16 rows a SIMD-group, DIM coordinates) += left (16, 16) times tokens 16 k to 16 k + 15 of a tile.
FUNCTION void multiply_values(float (&sums)[DIM / 2], const u32 (&left)[4], const u32* tile, int k) {
    const int row_of_blocks = DIM / 8 * BLOCK_WORDS;
    group_multiply<1>(sums, left, described(tile + 2 * k * row_of_blocks, row_of_blocks * 4, BLOCK_WORDS * 4), true);
}

// The same with tiles that have pairs of tokens side by side.
FUNCTION void multiply_pairs(float (&sums)[DIM / 2], const u32 (&left)[4], const u32* tile, int k) {
    const int row_of_blocks = DIM / 8 * BLOCK_WORDS;
    group_multiply<0>(sums, left, described(tile + 2 * k * row_of_blocks, row_of_blocks * 4, BLOCK_WORDS * 4), true);
}
