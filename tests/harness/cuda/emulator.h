// Runs CUDA C++ as TVM writes it on a CPU: a block of threads at a time, each thread a fiber.
//
// Between barriers warps run one after the other, in an order that turns around at every barrier; within a warp lanes
// run one after the other up to the next operation of the whole warp. Copies to shared memory (cp.async) happen as late
// as the program allows, when it waits for them, or, where the environment says MPQ_EMULATED_EARLY, as early, when they
// are asked for, warps then in the opposite order: a program is right only if both give the same. Likewise the products of
// four warps together (wgmma). Sums of floats that tensor cores make are in the order of the products, or, where the
// environment says MPQ_EMULATED_TRUNCATING, cut off as cores do: a program is right if both are near to what it means.
#include <cstdint>
#include <cstring>
#include <initializer_list>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;
#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_bit_cast(float, 0x7fffffff)  // what every float operation of a GPU gives for NaN
typedef _Float16 half;
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

#pragma GCC visibility push(hidden)  // each library of kernels has an emulator of its own, emulator.cpp
namespace emulator {
struct Index { int x = 0, y = 0, z = 0; };
struct __attribute__((visibility("default"))) Kernel {  // as driver.c knows and finds it
    void (*run)(const unsigned *grid, unsigned threads, void **arguments);
    unsigned arguments;
};
typedef uint32_t Word;

extern Index block;
extern int current;
extern Word asked_address;  // the last
extern char anchor;         // shared memory is addressed from here, in 32 bits

void launch(void (*kernel)(void **), const unsigned *grid, unsigned count, void **given, bool fibers);
void barrier();
void copy_async(unsigned size, Word target, const void *source, unsigned count);
void copy_or_fill(unsigned size, Word target, const void *source, Word word, int inside, unsigned count);
void commit();
void wait_group(size_t left);
void ldmatrix_x4(Word &r0, Word &r1, Word &r2, Word &r3, Word row);
void ldmatrix_x4_trans(Word &r0, Word &r1, Word &r2, Word &r3, Word row);
void cvt_bf16x2(Word &d, float high, float low);
void cvt_f16x2(Word &d, float high, float low);
void mma_u8_s8(Word &d0, Word &d1, Word &d2, Word &d3, Word a0, Word a1, Word a2, Word a3, Word b0, Word b1, Word c0,
               Word c1, Word c2, Word c3);
void mma_bf16(float &d0, float &d1, float &d2, float &d3, Word a0, Word a1, Word a2, Word a3, Word b0, Word b1, float c0,
              float c1, float c2, float c3);
void wgmma_fence();
void fence_async();
void wgmma_s8_u8(std::initializer_list<Word *> sums, Word a0, Word a1, Word a2, Word a3, uint64_t operand, bool adds);
void wgmma_bf16(std::initializer_list<float *> sums, Word a0, Word a1, Word a2, Word a3, uint64_t operand, bool adds,
                bool turned);
void wgmma_commit();
void wgmma_wait(size_t left);
float shuffle_xor(float value, int distance);
int any(int there);
float exp2(float x);
}  // namespace emulator
#pragma GCC visibility pop

#define threadIdx (emulator::Index{emulator::current, 0, 0})
#define blockIdx emulator::block

static inline float of_gpu(float x) { return x == x ? x : CUDART_NAN_F; }
static inline float __fmaf_rn(float a, float b, float c) { return of_gpu(__builtin_fmaf(a, b, c)); }
static inline float __fmul_rn(float a, float b) { return of_gpu(a * b); }
static inline float __fdiv_rn(float a, float b) { return of_gpu(a / b); }
static inline float __fsqrt_rn(float a) { return of_gpu(__builtin_sqrtf(a)); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
static inline float __shfl_xor_sync(unsigned, float value, int distance, int) {
    return emulator::shuffle_xor(value, distance);
}
static inline int __any_sync(unsigned, int there) { return emulator::any(there); }
static inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    uint64_t bytes = (uint64_t)high << 32 | low;
    unsigned found = 0;
    for (int i = 0; i < 4; ++i) found |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return found;
}
static inline unsigned __dp4a(unsigned a, unsigned b, unsigned sum) {
    for (int i = 0; i < 32; i += 8) sum += (a >> i & 0xff) * (b >> i & 0xff);
    return sum;
}
static inline uint32_t tvm_builtin_cuda_cvta_generic_to_shared(void *p) {
    return emulator::asked_address = (uint32_t)((char *)p - &emulator::anchor);
}
