// The runtime library of CUDA 13, as far as TVM's runtime calls it, on that of CUDA 12: for drivers of CUDA 12.
//
// TVM's wheel is built with CUDA 13, whose runtime wants a driver of that release. What TVM calls of it, CUDA 12 has under
// the same names and with the same arguments; only the properties of a device lie elsewhere. This library calls itself
// libcudart.so.13 and needs libcudart.so.12; every name is there twice, once in the version of each. With -DSTUB it is
// the libcudart.so.12 that the linker looks names up in.
#include <string.h>

// Arguments are integers and pointers, six at most, which the ABIs of x86-64 and AArch64 pass in registers.
#define PARAMETERS long a, long b, long c, long d, long e, long f
#define CALL(name) cuda12_##name(a, b, c, d, e, f)
#ifdef STUB
#define NEEDED(name) long name(PARAMETERS) { return 0; }
#define FORWARDED(name) NEEDED(name)
#else
#define NEEDED(name) __asm__(".symver cuda12_" #name ", " #name "@libcudart.so.12"); long cuda12_##name(PARAMETERS);
#define FORWARDED(name) NEEDED(name) long name(PARAMETERS) { return CALL(name); }
#endif

FORWARDED(cudaDeviceGetAttribute)
FORWARDED(cudaEventCreate)
FORWARDED(cudaEventDestroy)
FORWARDED(cudaEventElapsedTime)
FORWARDED(cudaEventRecord)
FORWARDED(cudaEventSynchronize)
FORWARDED(cudaFree)
FORWARDED(cudaFreeHost)
FORWARDED(cudaGetDevice)
FORWARDED(cudaGetDeviceCount)
FORWARDED(cudaGetErrorName)
FORWARDED(cudaGetErrorString)
FORWARDED(cudaGetLastError)
FORWARDED(cudaGraphDestroy)
FORWARDED(cudaGraphExecDestroy)
FORWARDED(cudaGraphInstantiate)
FORWARDED(cudaGraphLaunch)
FORWARDED(cudaMalloc)
FORWARDED(cudaMallocHost)
FORWARDED(cudaMemGetInfo)
FORWARDED(cudaMemcpyAsync)
FORWARDED(cudaMemcpyPeerAsync)
FORWARDED(cudaPeekAtLastError)
FORWARDED(cudaSetDevice)
FORWARDED(cudaStreamBeginCapture)
FORWARDED(cudaStreamCreate)
FORWARDED(cudaStreamCreateWithFlags)
FORWARDED(cudaStreamDestroy)
FORWARDED(cudaStreamEndCapture)
FORWARDED(cudaStreamSynchronize)
FORWARDED(cudaStreamWaitEvent)
NEEDED(cudaGetDeviceProperties_v2)

#ifndef STUB
enum { PROPERTIES_12 = 1032, PROPERTIES_13 = 1008 };  // sizeof(struct cudaDeviceProp)

// CUDA 13 has dropped some fields, clockRate for one, so that those behind moved up.
static const struct {
    unsigned short to, from, bytes;
} moves[] = {
    {0, 0, 384},      // up to texturePitchAlignment
    {384, 388, 4},    // multiProcessorCount
    {388, 396, 8},    // integrated, canMapHostMemory
    {396, 408, 8},    // maxTexture1D, maxTexture1DMipmap
    {404, 420, 188},  // maxTexture2D .. unifiedAddressing
    {592, 612, 28},   // memoryBusWidth .. localL1CacheSupported
    {624, 640, 28},   // sharedMemPerMultiprocessor .. hostNativeAtomicSupported
    {652, 672, 20},   // pageableMemoryAccess .. cooperativeLaunch
    {672, 696, 84},   // sharedMemPerBlockOptin .. unifiedFunctionPointers
};

// What CUDA 12 does not tell is 0.
long cudaGetDeviceProperties(char *properties, long device) {
    char known[PROPERTIES_12] __attribute__((aligned(8)));
    long failed = cuda12_cudaGetDeviceProperties_v2((long)known, device, 0, 0, 0, 0);
    if ((int)failed) return failed;
    memset(properties, 0, PROPERTIES_13);
    for (unsigned i = 0; i < sizeof moves / sizeof *moves; ++i)
        memcpy(properties + moves[i].to, known + moves[i].from, moves[i].bytes);
    return 0;
}
#endif
