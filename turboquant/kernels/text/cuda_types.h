// What MLX's headers would define, for kernels that are compiled without them: numbers of 16 bits.
struct half {
    unsigned short bits;
    __device__ half() {}
    __device__ explicit half(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
    __device__ operator float() const {
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
        return x;
    }
};
struct bfloat16 {
    unsigned short bits;
    __device__ bfloat16() {}
    __device__ explicit bfloat16(float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
    __device__ operator float() const { return __uint_as_float((unsigned int)bits << 16); }
};
