#define _GNU_SOURCE
#include "mpq_plan.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef __aarch64__
#include <sys/auxv.h>
#endif

#define ALIGNMENT 64
static const mpq_plan *const plan = &mpq_the_plan;

static _Thread_local char message[512];

const char *mpq_error(void) { return message; }

__attribute__((format(printf, 1, 2))) static void *fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return NULL;
}

const mpq_function *mpq_functions(int *count) {
    *count = plan->function_count;
    return plan->functions;
}

/* ------------------------------------------------------------------------------------------------ the CPU */

#ifdef __aarch64__
static bool has(const char *feature) {
    /* Bits of AT_HWCAP, then those of AT_HWCAP2, by their names in /proc/cpuinfo (asm/hwcap.h). */
    static const struct { const char *name; int bit; } bits[] = {
        {"fp", 0}, {"asimd", 1}, {"crc32", 7}, {"atomics", 8}, {"fphp", 9}, {"asimdhp", 10}, {"asimdrdm", 12},
        {"lrcpc", 15}, {"asimddp", 20}, {"i8mm", 32 + 13}, {"bf16", 32 + 14},
    };
    for (size_t i = 0; i < sizeof bits / sizeof *bits; i++)
        if (!strcmp(bits[i].name, feature)) {
            unsigned long word = getauxval(bits[i].bit < 32 ? AT_HWCAP : AT_HWCAP2);
            return word >> (bits[i].bit & 31) & 1;
        }
    return false;
}
#else
static bool has(const char *feature) {
    FILE *file = fopen("/proc/cpuinfo", "r");
    char *line = NULL, word[64];
    size_t room = 0;
    bool found = false;
    snprintf(word, sizeof word, " %s ", feature);
    while (file && !found && getline(&line, &room, file) > 0)
        if (!strncmp(line, "flags", 5)) {
            line[strcspn(line, "\n")] = ' ';
            found = strstr(line, word) != NULL;
        }
    free(line);
    if (file) fclose(file);
    return found;
}
#endif

static bool fits_cpu(void) {
    char lacking[256] = "";
    size_t used = 0;
    for (const char *const *feature = plan->features; *feature; feature++)
        if (!has(*feature) && used + strlen(*feature) + 3 < sizeof lacking)
            used += (size_t)sprintf(lacking + used, "%s%s", used ? ", " : "", *feature);
    if (used)
        fail("this CPU lacks %s, which the kernels for '%s' need: compile for another target", lacking, plan->target);
    return !used;
}

/* ------------------------------------------------------------------- what the kernels ask of their runtime */

/* Working memory of a thread: taken and given back in reverse order, so that a mark is all there is to know. */
static _Thread_local char *workspace;
static _Thread_local uint64_t used;

static void *take(int type, int id, uint64_t bytes, int code, int bits) {
    (void)type, (void)id, (void)code, (void)bits;
    if (!workspace && !(workspace = aligned_alloc(ALIGNMENT, plan->workspace_bytes))) return NULL;
    uint64_t size = ALIGNMENT + (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (used + size > plan->workspace_bytes) return NULL;
    char *block = workspace + used;
    used += size;
    return block + ALIGNMENT;
}

static int give_back(int type, int id, void *block) {
    (void)type, (void)id;
    used = (uint64_t)((char *)block - ALIGNMENT - workspace);
    return 0;
}

/* Threads wait for work, a while without sleeping: there are hundreds of kernels in a call. */
typedef struct { void *sync; int32_t count; } group;
typedef int (*lambda)(int number, group *env, void *data);
enum { SPINS = 20000 };
static struct {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    _Atomic unsigned turn, left;
    atomic_bool failed, stop;
    lambda work;
    void *data;
    int threads;
    pthread_t *others;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .threads = 1};

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void share(int number) {
    group env = {NULL, pool.threads};
    if (pool.work(number, &env, pool.data)) atomic_store(&pool.failed, true);
}

static void *serve(void *number) {
    for (unsigned seen = 0;;) {
        for (int spin = 0; spin < SPINS && atomic_load(&pool.turn) == seen; spin++) relax();
        if (atomic_load(&pool.turn) == seen) {
            pthread_mutex_lock(&pool.lock);
            while (atomic_load(&pool.turn) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
            pthread_mutex_unlock(&pool.lock);
        }
        seen++;
        if (atomic_load(&pool.stop)) break;
        share((int)(intptr_t)number);
        atomic_fetch_sub(&pool.left, 1);
    }
    free(workspace);
    return NULL;
}

static void next_turn(void) {
    pthread_mutex_lock(&pool.lock);
    atomic_fetch_add(&pool.turn, 1);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
}

static int launch(lambda work, void *data, int count) {
    (void)count; /* 0 in all kernels: as many tasks as threads */
    pool.work = work;
    pool.data = data;
    atomic_store(&pool.failed, false);
    atomic_store(&pool.left, (unsigned)pool.threads - 1);
    if (pool.threads > 1) next_turn();
    share(0);
    while (atomic_load(&pool.left)) relax();
    return atomic_load(&pool.failed) ? -1 : 0;
}

static int start_threads(int threads) {
    if (threads <= 0) threads = (int)sysconf(_SC_NPROCESSORS_ONLN);
    if (threads > 1) pool.others = calloc((size_t)threads - 1, sizeof *pool.others);
    atomic_store(&pool.stop, false);
    atomic_store(&pool.turn, 0);
    for (pool.threads = 1; pool.threads < threads; pool.threads++)
        if (!pool.others || pthread_create(&pool.others[pool.threads - 1], NULL, serve, (void *)(intptr_t)pool.threads))
            return -1;
    return 0;
}

static void stop_threads(void) {
    atomic_store(&pool.stop, true);
    if (pool.threads > 1) next_turn();
    for (; pool.threads > 1; pool.threads--) pthread_join(pool.others[pool.threads - 2], NULL);
    free(pool.others);
    pool.others = NULL;
    free(workspace);
    workspace = NULL;
}

/* Kernels look for these names; their own objects hold weak ones without a value. */
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = take;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = give_back;
int (*__TVMBackendParallelLaunch)(lambda, void *, int) = launch;

/* ---------------------------------------------------------------------------------------------- the model */

/* As DLPack lays out a tensor (dlpack.h), and TVM an argument. */
typedef struct {
    void *data;
    struct { int32_t type, id; } device;
    int32_t ndim;
    struct { uint8_t code, bits; uint16_t lanes; } dtype;
    const int64_t *shape, *strides;
    uint64_t byte_offset;
} tensor;
typedef struct { int32_t type, padding; void *value; } argument;
enum { CPU = 1, TENSOR = 7 };

struct mpq_model {
    char *file, *held, *call;
    tensor *tensors;
    argument *arguments;
};

/* Of 64-bit words, each times an odd number of its own: no change of one word goes unseen. */
static uint64_t sum_of(const char *data, uint64_t bytes) {
    uint64_t sum = bytes, word;
    for (uint64_t i = 0; i * 8 < bytes; i++) {
        uint64_t left = bytes - i * 8;
        word = 0;
        memcpy(&word, data + i * 8, left < 8 ? left : 8);
        sum += word * (2 * i + 1);
    }
    return sum;
}

static char *map(const char *path) {
    struct stat about;
    int handle = open(path, O_RDONLY | O_CLOEXEC);
    if (handle < 0 || fstat(handle, &about)) {
        fail("cannot read the weights %s: %s", path, strerror(errno));
        if (handle >= 0) close(handle);
        return NULL;
    }
    char *data = MAP_FAILED;
    if ((uint64_t)about.st_size == plan->weights_bytes)
        data = mmap(NULL, plan->weights_bytes, PROT_READ, MAP_PRIVATE, handle, 0);
    else
        fail("%s has %lld bytes, and the weights of this build %llu: take the file that was compiled with it", path,
             (long long)about.st_size, (unsigned long long)plan->weights_bytes);
    if (data == MAP_FAILED && (uint64_t)about.st_size == plan->weights_bytes)
        fail("cannot map the weights %s: %s", path, strerror(errno));
    close(handle);
    if (data == MAP_FAILED) return NULL;
    if (sum_of(data, plan->weights_bytes) != plan->weights_sum) {
        munmap(data, plan->weights_bytes);
        return fail("%s holds other weights than those of this build: take the file that was compiled with it", path);
    }
    return data;
}

static int run_calls(mpq_model *model, const mpq_steps *steps) {
    for (uint32_t i = steps->first; i < steps->first + steps->count; i++) {
        const mpq_call *each = &plan->calls[i];
        argument result = {0};
        if (each->kernel(NULL, model->arguments + each->first, (int32_t)each->count, &result)) {
            fail("kernel %s failed: there is no memory for it", each->name);
            return -1;
        }
    }
    return 0;
}

mpq_model *mpq_open(const char *weights, int threads) {
    if (!fits_cpu()) return NULL;
    mpq_model *model = calloc(1, sizeof *model);
    if (!model) return fail("there is no memory");
    if (!(model->file = map(weights))) {
        free(model);
        return NULL;
    }
    model->held = aligned_alloc(ALIGNMENT, plan->held_bytes);
    model->call = aligned_alloc(ALIGNMENT, plan->call_bytes);
    model->tensors = calloc(plan->operand_count, sizeof *model->tensors);
    model->arguments = calloc(plan->operand_count, sizeof *model->arguments);
    bool all = model->held && model->call && model->tensors && model->arguments;
    if (!all) fail("there is no memory for %llu bytes", (unsigned long long)(plan->held_bytes + plan->call_bytes));
    if (all && start_threads(threads)) {
        fail("cannot start %d threads: %s", threads, strerror(errno));
        all = false;
    }
    if (!all) {
        mpq_close(model);
        return NULL;
    }
    char *const spaces[] = {model->file, model->held, model->call};
    for (uint32_t i = 0; i < plan->operand_count; i++) {
        const mpq_operand *o = &plan->operands[i];
        model->tensors[i] = (tensor){
            .data = spaces[o->space] + o->offset, .device = {CPU, 0}, .ndim = o->ndim,
            .dtype = {o->type_code, o->type_bits, 1}, .shape = plan->shapes + o->shape,
        };
        model->arguments[i] = (argument){TENSOR, 0, &model->tensors[i]};
    }
    for (uint32_t i = 0; i < plan->copy_count; i++)
        memcpy(model->held + plan->copies[i].to, model->file + plan->copies[i].from, plan->copies[i].bytes);
    if (run_calls(model, &plan->prepare)) {
        mpq_close(model);
        return NULL;
    }
    return model;
}

int mpq_run(mpq_model *model, int function, const void *const *inputs, void *output) {
    if (function < 0 || function >= plan->function_count) {
        fail("there is no function %d: there are %d", function, plan->function_count);
        return -1;
    }
    const mpq_function *own = &plan->functions[function];
    const mpq_steps *steps = &plan->steps[function];
    for (int i = 0; i < own->inputs; i++) memcpy(model->call + steps->inputs[i], inputs[i], own->input[i].bytes);
    if (run_calls(model, steps)) return -1;
    memcpy(output, model->call + steps->output, own->output.bytes);
    return 0;
}

size_t mpq_bytes(const mpq_model *model) {
    (void)model;
    uint64_t tables = plan->operand_count * (sizeof(tensor) + sizeof(argument));
    return plan->held_bytes + plan->call_bytes + (uint64_t)pool.threads * plan->workspace_bytes + tables;
}

void mpq_close(mpq_model *model) {
    if (!model) return;
    stop_threads();
    munmap(model->file, plan->weights_bytes);
    free(model->held);
    free(model->call);
    free(model->tensors);
    free(model->arguments);
    free(model);
}
