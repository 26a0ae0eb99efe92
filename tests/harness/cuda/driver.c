// What of libcuda and libcudart TVM's CUDA runtime asks for, on the memory and the processor of the host. A module is an
// emulated kernel library: the image itself, or, of a fatbin or cubin, the file $MPQ_EMULATED/<FNV-1a of the image>.so.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream, *attributes;
    unsigned count;
} Launch;
typedef struct {  // of an emulated library
    void (*run)(const unsigned *grid, unsigned threads, void **arguments);
    unsigned arguments;
} Kernel;

// Threads take turns: an emulated library runs one block at a time.
static pthread_mutex_t turns = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static void leave(pthread_mutex_t **turn) { pthread_mutex_unlock(*turn); }
#define TAKE_TURNS __attribute__((cleanup(leave))) pthread_mutex_t *turn = &turns; pthread_mutex_lock(turn)

static int setting(const char *name, int otherwise) {
    const char *stated = getenv(name);
    return stated ? atoi(stated) : otherwise;
}
static int attribute_of(int attribute) {
    int level = setting("MPQ_EMULATED_SM", 87);
    return attribute == 75 ? level / 10 : attribute == 76 ? level % 10 : attribute == 10 ? 32 : 1024;
}

// A process that was forked from one that has called the driver cannot call it.
enum { NOT_INITIALIZED = 3 };
static pid_t caller;
static int forked(void) {
    if (!caller) caller = getpid();
    return caller != getpid();
}

int cuInit(unsigned flags) { return forked() ? NOT_INITIALIZED : setting("MPQ_EMULATED_DEVICES", 1) ? 0 : 100; }
int cuDeviceGetCount(int *count) { *count = setting("MPQ_EMULATED_DEVICES", 1); return 0; }
int cuDriverGetVersion(int *version) { *version = setting("MPQ_EMULATED_DRIVER", 13000); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    *bytes = (size_t)setting("MPQ_EMULATED_MEGABYTES", 8192) << 20;
    return 0;
}
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute_of(attribute); return 0; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "emulated"); return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuGetErrorName(int code, const char **text) { *text = "CUDA_ERROR_EMULATED"; return 0; }
int cuGetErrorString(int code, const char **text) { *text = "error of the emulator"; return 0; }
int cuTensorMapEncodeTiled(void) { return 801; }
int cuModuleUnload(void *module) { return dlclose(module) ? 999 : 0; }

int cuModuleLoadData(void **module, const void *image) {
    if (forked()) return NOT_INITIALIZED;
    TAKE_TURNS;
    char path[4096];
    uint64_t length;
    const Elf64_Ehdr *elf = image;
    const struct { uint32_t magic; uint16_t version, header; uint64_t rest; } *fatbin = image;
    if (!memcmp(image, ELFMAG, SELFMAG)) {  // ends with the table of its sections, a cubin with that of its segments
        uint64_t sections = elf->e_shoff + (uint64_t)elf->e_shentsize * elf->e_shnum;
        uint64_t segments = elf->e_phoff + (uint64_t)elf->e_phentsize * elf->e_phnum;
        length = sections > segments ? sections : segments;
    } else if (fatbin->magic == 0xba55ed50) {
        length = fatbin->header + fatbin->rest;
    } else {
        return 200;  // CUDA_ERROR_INVALID_IMAGE
    }
    if (elf->e_ident[EI_MAG0] == ELFMAG0 && elf->e_machine == EM_X86_64) {
        int file = memfd_create("kernel", 0);
        if (file < 0 || write(file, image, length) != (ssize_t)length) return 999;
        snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    } else {
        uint64_t hash = 0xcbf29ce484222325u;
        for (uint64_t i = 0; i < length; ++i) hash = (hash ^ ((const unsigned char *)image)[i]) * 0x100000001b3u;
        const char *folder = getenv("MPQ_EMULATED");
        snprintf(path, sizeof path, "%s/%016llx.so", folder ? folder : ".", (unsigned long long)hash);
    }
    *module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    // The file stays open: the loader would take another of its number for the library that it has loaded by that name.
    if (!*module) fprintf(stderr, "%s\n", dlerror());
    return *module ? 0 : 200;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    char symbol[512];
    snprintf(symbol, sizeof symbol, "kernel_%s", name);
    *function = dlsym(module, symbol);
    return *function ? 0 : 500;
}

// A graph is the launches of a stream between the begin and the end of a capture, which runs none of them. As TVM begins
// it, what any thread asks for meanwhile that may wait for the device, or goes to the stream that all wait for, fails,
// and so does the capture.
enum { MOST_ARGUMENTS = 64 };
typedef struct { const Kernel *kernel; unsigned grid[3], threads; uint64_t values[MOST_ARGUMENTS];
    int device;
} Node;
typedef struct { unsigned count, users; Node *nodes; } Graph;
static Graph *capture;
static void *captured_stream;
static int spoiled;
static int refused(int code) { spoiled = 1; return code; }
static int elsewhere(void *stream) { return capture && stream != captured_stream; }
static int of_all(void *stream) { return (uintptr_t)stream < 2; }
static unsigned launches, graphs;
unsigned cuEmulatedLaunches(void) { return launches; }  // one by one
unsigned cuEmulatedGraphs(void) { return graphs; }  // launched

// Blocks lie between two pages that nobody may touch, as close to the second as their alignment allows; what lies between
// stays as it is.
typedef struct Block {
    void *base;
    size_t size;
    const unsigned char *front, *first, *end, *page;
    int device;
    struct Block *next;
} Block;
static Block *blocks;
static __thread int current;  // device of a thread
static Block *block_of(void *place) {
    Block *found = blocks;
    while (found && found->first != place) found = found->next;
    return found;
}

static void run(const Node *node) {
    if (!node->kernel) {
        memcpy((void *)node->values[0], (const void *)node->values[1], node->values[2]);
        return;
    }
    void *arguments[MOST_ARGUMENTS];
    for (unsigned i = 0; i < node->kernel->arguments; ++i) arguments[i] = (void *)&node->values[i];
    for (const Block *block = blocks; block; block = block->next)
        for (unsigned i = 0; i < node->kernel->arguments; ++i) {
            const unsigned char *place = (const unsigned char *)node->values[i];
            if (place >= block->first && place < block->end && block->device != node->device) {
                fprintf(stderr, "emulator: a kernel on device %d is given memory of another\n", node->device);
                abort();
            }
        }
    node->kernel->run(node->grid, node->threads, arguments);
    for (const Block *block = blocks; block; block = block->next)
        for (const unsigned char *at = block->front; at < block->page; ++at) {
            if (at == block->first) at = block->end;
            if (at < block->page && *at != 0xa5) {
                const char *where = at < block->first ? "before the beginning" : "behind the end";
                fprintf(stderr, "emulator: a kernel has written %s of a block\n", where);
                abort();
            }
        }
}

static void keep(const Node *node);
int cuLaunchKernelEx(const Launch *launch, void *function, void **arguments, void **extra) {
    TAKE_TURNS;
    Node node = {.kernel = function, .threads = launch->block[0], .device = current};
    if (node.kernel->arguments > MOST_ARGUMENTS) return 1;
    memcpy(node.grid, launch->grid, sizeof node.grid);
    for (unsigned i = 0; i < node.kernel->arguments; ++i) memcpy(&node.values[i], arguments[i], 8);
    if (elsewhere(launch->stream) && of_all(launch->stream)) return refused(906);  // ..._STREAM_CAPTURE_IMPLICIT
    if (!capture || elsewhere(launch->stream)) {
        ++launches;
        run(&node);
        return 0;
    }
    keep(&node);
    return 0;
}
int cudaStreamCreate(void **stream) { *stream = malloc(1); return 0; }
int cudaStreamDestroy(void *stream) { free(stream); return 0; }
int cudaStreamBeginCapture(void *stream, int mode) {
    TAKE_TURNS;
    if (!stream || capture) return 900;
    captured_stream = stream;
    spoiled = 0;
    capture = calloc(1, sizeof *capture);
    capture->users = 1;
    return 0;
}
static __thread int capture_mode;  // of a thread: 2 allows what is not ordered by a stream
int cudaThreadExchangeStreamCaptureMode(int *mode) {
    int own = capture_mode;
    capture_mode = *mode;
    *mode = own;
    return 0;
}
static void keep(const Node *node) {
    capture->nodes = realloc(capture->nodes, (capture->count + 1) * sizeof *node);
    capture->nodes[capture->count++] = *node;
}
int cudaGraphDestroy(Graph *graph) {
    TAKE_TURNS;
    if (--graph->users) return 0;
    free(graph->nodes);
    free(graph);
    return 0;
}
int cudaStreamEndCapture(void *stream, Graph **graph) {
    usleep(setting("MPQ_EMULATED_CAPTURE_MS", 0) * 1000);  // in which other threads go on
    TAKE_TURNS;
    *graph = capture;
    capture = NULL;
    if (!spoiled) return 0;
    cudaGraphDestroy(*graph);
    *graph = NULL;
    return 901;  // cudaErrorStreamCaptureInvalidated
}
int cudaGraphInstantiate(Graph **executable, Graph *graph, unsigned long long flags) {
    TAKE_TURNS;
    ++(*executable = graph)->users;
    return 0;
}
int cudaGraphLaunch(Graph *graph, void *stream) {
    TAKE_TURNS;
    if (capture && (!elsewhere(stream) || of_all(stream))) return refused(900);
    ++graphs;
    for (unsigned i = 0; i < graph->count; ++i) run(&graph->nodes[i]);
    return 0;
}
int cudaGraphExecDestroy(Graph *graph) { return cudaGraphDestroy(graph); }

#define NOTHING(name) int name(void) { return 0; }
NOTHING(cudaDeviceSynchronize) NOTHING(cudaEventDestroy) NOTHING(cudaEventSynchronize) NOTHING(cudaGetLastError)
NOTHING(cudaPeekAtLastError) NOTHING(cudaStreamCreateWithFlags) NOTHING(cudaStreamSynchronize)
NOTHING(cudaStreamWaitEvent)
int cudaEventCreate(struct timespec **event) { *event = calloc(1, sizeof **event); return 0; }
int cudaEventRecord(struct timespec *event, void *stream) { return clock_gettime(CLOCK_MONOTONIC, event); }
int cudaEventElapsedTime(float *milliseconds, const struct timespec *begin, const struct timespec *end) {
    *milliseconds = (end->tv_sec - begin->tv_sec) * 1e3f + (end->tv_nsec - begin->tv_nsec) * 1e-6f;
    return 0;
}
int cudaSetDevice(int device) {
    if (forked()) return NOT_INITIALIZED;
    if (device < 0 || device >= setting("MPQ_EMULATED_DEVICES", 1)) return 101;  // cudaErrorInvalidDevice
    current = device;
    return 0;
}
int cudaGetDevice(int *device) { *device = current; return 0; }
int cudaGetDeviceCount(int *count) {
    if (forked()) return NOT_INITIALIZED;
    *count = setting("MPQ_EMULATED_DEVICES", 1);
    return *count ? 0 : 100;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute_of(attribute); return 0; }
int cudaGetDeviceProperties(void *properties, int device) { memset(properties, 0, 512); return 0; }
int cudaGetDeviceProperties_v2(unsigned *properties, int device) {  // of CUDA 12: every four bytes are their number
    for (unsigned i = 0; i < 1032 / 4; ++i) properties[i] = i;
    return 0;
}
static size_t held;
int cudaMemGetInfo(size_t *free, size_t *total) {
    cuDeviceTotalMem_v2(total, 0);
    *free = *total - held - ((size_t)setting("MPQ_EMULATED_HELD_MEGABYTES", 0) << 20);
    return 0;
}
int cudaMalloc(void **place, size_t size) {
    if (forked()) return NOT_INITIALIZED;
    TAKE_TURNS;
    if (capture && capture_mode != 2) return refused(900);  // cudaErrorStreamCaptureUnsupported
    size_t kept = (size + 255) / 256 * 256 + !size * 256, pages = (kept + 4095) / 4096 * 4096;
    char *base = mmap(0, pages + 3 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return 2;
    memset(base + 2 * 4096, 0xa5, pages);  // as any memory that was used before
    mprotect(base + 4096, 4096, PROT_NONE);
    mprotect(base + 2 * 4096 + pages, 4096, PROT_NONE);
    *place = base + 2 * 4096 + pages - kept;
    unsigned char *first = *place, *front = (unsigned char *)base + 2 * 4096;
    Block *own = (Block *)base;
    *own = (Block){base, pages + 3 * 4096, front, first, first + size, first + kept, current, blocks};
    blocks = own;
    held += pages;
    return 0;
}
int cudaMallocHost(void **place, size_t size) { return cudaMalloc(place, size); }
int cudaFree(void *place) {
    if (!place) return 0;
    TAKE_TURNS;
    Block *own = block_of(place), **link = &blocks;
    while (*link != own) link = &(*link)->next;
    *link = own->next;
    held -= own->size - 3 * 4096;
    munmap(own->base, own->size);
    return 0;
}
int cudaFreeHost(void *place) { return cudaFree(place); }
int cudaMemcpyAsync(void *target, const void *source, size_t size, int kind, void *stream) {
    TAKE_TURNS;
    if (elsewhere(stream) && of_all(stream)) return refused(906);
    if (!capture || elsewhere(stream)) {
        memcpy(target, source, size);
        return 0;
    }
    keep(&(Node){.values = {(uintptr_t)target, (uintptr_t)source, size}});
    return 0;
}
int cudaMemcpyPeerAsync(void *target, int to, const void *source, int from, size_t size, void *stream) {
    memcpy(target, source, size);
    return 0;
}
const char *cudaGetErrorName(int code) { return "cudaErrorEmulated"; }
const char *cudaGetErrorString(int code) { return "error of the emulator"; }
