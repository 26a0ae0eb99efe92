/* What every way to run a denoiser begins with: its CPU, its files. Of mpq.c and mpq_vm.c, one of which is built. */
#define _GNU_SOURCE
#include "mpq_plan.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef __aarch64__
#include <sys/auxv.h>
#include <sys/prctl.h>
#else
#include <sys/syscall.h>
#include <xmmintrin.h>
#endif

#define ALIGNMENT 64

static _Thread_local char message[512];

const char *mpq_error(void) { return message; }

__attribute__((format(printf, 1, 2))) static void *fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return NULL;
}

static bool is_function(const mpq_build *build, int number) {
    bool known = number >= 0 && number < build->function_count;
    if (!known) fail("there is no function %d: there are %d", number, build->function_count);
    return known;
}

/* Rounding, denormals and exceptions as a C program begins with them, whatever the caller has set (-ffast-math): results
 * have the same bits everywhere. Threads take over what the one that starts them has. What was is returned. */
static uint64_t plain_floats(void) {
#ifdef __aarch64__
    uint64_t before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0));
    return before;
#else
    unsigned before = _mm_getcsr();
    _mm_setcsr(0x1f80);
    return before;
#endif
}

static void restore_floats(uint64_t before) {
#ifdef __aarch64__
    __asm__ volatile("msr fpcr, %0" : : "r"(before));
#else
    _mm_setcsr((unsigned)before);
#endif
}

/* Of mpq.c and mpq_vm.c: whose functions they are, and what they do under those floats. */
static const mpq_build *build_of(const mpq_model *model);
static mpq_model *opened(int number, const char *weights, int threads);
static int called(mpq_model *model, int function, const void *const *inputs, void *output);

mpq_model *mpq_open_model(int number, const char *weights, int threads) {
    if (number < 0 || number >= mpq_models()) return fail("there is no model %d: there are %d", number, mpq_models());
    uint64_t before = plain_floats();
    mpq_model *model = opened(number, weights, threads);
    restore_floats(before);
    return model;
}

mpq_model *mpq_open(const char *weights, int threads) { return mpq_open_model(0, weights, threads); }

const mpq_function *mpq_functions(int *count) { return mpq_functions_of(0, count); }

/* Of both (below): what Python does not take either (mpq_compiler/runtime/compiled_denoiser.py). */
static bool takes(const mpq_build *build, const mpq_function *own, const void *const *inputs);
static bool is_sound(const mpq_tensor *output, const void *data);

int mpq_run(mpq_model *model, int function, const void *const *inputs, void *output) {
    const mpq_build *build = build_of(model);
    if (!is_function(build, function)) return -1;
    const mpq_function *own = &build->functions[function];
    uint64_t before = plain_floats();
    int code = takes(build, own, inputs) ? called(model, function, inputs, output) : -1;
    if (!code && !is_sound(&own->output, output)) code = -1;
    restore_floats(before);
    return code;
}

/* 0: one for each CPU. */
static int thread_count(int threads) { return threads > 0 ? threads : (int)sysconf(_SC_NPROCESSORS_ONLN); }

/* ------------------------------------------------------------------------------------------------ the CPU */

#ifdef __aarch64__
static bool has(const char *feature) {
    /* Bits of AT_HWCAP, then those of AT_HWCAP2, by their names in /proc/cpuinfo (asm/hwcap.h). */
    static const struct { const char *name; int bit; } bits[] = {
        {"fp", 0}, {"asimd", 1}, {"crc32", 7}, {"atomics", 8}, {"fphp", 9}, {"asimdhp", 10}, {"asimdrdm", 12},
        {"lrcpc", 15}, {"asimddp", 20}, {"i8mm", 32 + 13}, {"bf16", 32 + 14}, {"sme", 32 + 23}, {"smei8i32", 32 + 26},
        {"sme2", 32 + 37},
    };
    for (size_t i = 0; i < sizeof bits / sizeof *bits; i++)
        if (!strcmp(bits[i].name, feature)) {
            unsigned long word = getauxval(bits[i].bit < 32 ? AT_HWCAP : AT_HWCAP2);
            return word >> (bits[i].bit < 32 ? bits[i].bit : bits[i].bit - 32) & 1;
        }
    return false;
}

/* Kernels take streaming vectors of 64 bytes (PR_SME_SET_VL); threads have the length of the one that starts them. */
static bool permitted(const char *feature) {
    if (strcmp(feature, "sme2")) return true;
    int length = prctl(63, 64, 0, 0, 0);
    if (length >= 0 && (length & 0xffff) != 64) errno = EOPNOTSUPP;
    return length >= 0 && (length & 0xffff) == 64;
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

/* Linux ends a process that uses the tiles of AMX and did not ask: ARCH_REQ_XCOMP_PERM, of their state, number 18. */
static bool permitted(const char *feature) {
    return strcmp(feature, "amx_tile") || !syscall(SYS_arch_prctl, 0x1023, 18);
}
#endif

static bool fits_cpu(const mpq_build *build) {
    char lacking[256] = "";
    size_t used = 0;
    for (const char *const *feature = build->features; *feature; feature++)
        if (!has(*feature) && used + strlen(*feature) + 3 < sizeof lacking)
            used += (size_t)sprintf(lacking + used, "%s%s", used ? ", " : "", *feature);
    if (used)
        fail("this CPU lacks %s, which the kernels for '%s' need: compile for another target", lacking, build->target);
    for (const char *const *feature = build->features; !used && *feature; feature++)
        if (!permitted(*feature)) {
            fail("the system lets no process use %s (%s), which the kernels for '%s' need: compile for another target",
                 *feature, strerror(errno), build->target);
            return false;
        }
    return !used;
}

/* ------------------------------------------------------------------------------------------- inputs, output */

static int64_t elements(const mpq_tensor *about) {
    int64_t count = 1;
    for (int i = 0; i < about->ndim; i++) count *= about->shape[i];
    return count;
}

/* The sample that an element is of. */
static long long sample_of(const mpq_tensor *about, int64_t place) {
    return about->ndim ? place / (elements(about) / about->shape[0]) : place;
}

/* How many values of a tensor are NaN or infinite, and the place of the first: all bits of the exponent are set. */
static int64_t odd_values(const mpq_tensor *about, const void *data, int64_t *first) {
    int64_t found = 0, count = elements(about);
    if (*about->dtype != 'F') return 0;
#define COUNT(type, mask)                                                                                              \
    for (int64_t i = count; i--;) {                                                                                    \
        type word;                                                                                                     \
        memcpy(&word, (const char *)data + i * (int64_t)sizeof word, sizeof word); /* it need not be aligned */        \
        bool odd = (word & (type)(mask)) == (type)(mask);                                                              \
        *first = odd ? i : *first;                                                                                     \
        found += odd;                                                                                                  \
    }                                                                                                                  \
    break
    switch (about->bytes / (size_t)count) {
    case 2: COUNT(uint16_t, 0x7c00);
    case 4: COUNT(uint32_t, 0x7f800000);
    case 8: COUNT(uint64_t, 0x7ff0000000000000);
    }
#undef COUNT
    return found;
}

/* Whether squares of the values do not overflow (LARGEST); the least value of a mask stands for minus infinity. */
static bool is_moderate(const mpq_tensor *about, const void *data) {
    if (strcmp(about->dtype, "F32") || strstr(about->name, "mask")) return true;
    int64_t count = elements(about), largest = 0;
    float most = 0;
    for (int64_t i = 0; i < count; i++) {
        float value;
        memcpy(&value, (const char *)data + i * (int64_t)sizeof value, sizeof value);
        float size = value < 0 ? -value : value;
        if (size > most) most = size, largest = i;
    }
    if (most <= 1e18f) return true;
    float value;
    memcpy(&value, (const char *)data + largest * (int64_t)sizeof value, sizeof value);
    return fail("input '%s' holds %.3g in sample %lld, and at most 1e+18 can be computed with: squares of more overflow; "
                "check what made it",
                about->name, (double)value, sample_of(about, largest));
}

static bool in_range(const mpq_tensor *about, const void *data) {
    int64_t count = elements(about);
    size_t size = about->bytes / (size_t)count;
    for (int64_t i = 0; i < count; i++) {
        uint64_t word = 0; /* of little-endian bytes, whose sign is the highest bit */
        memcpy(&word, (const char *)data + (size_t)i * size, size);
        int64_t label = (int64_t)(word << (64 - 8 * size)) >> (64 - 8 * size);
        if (label < 0 || label >= about->below)
            return fail("input '%s' is %lld in sample %lld; it goes from 0 to %lld", about->name, (long long)label,
                        sample_of(about, i), (long long)about->below - 1);
    }
    return true;
}

/* Whether every sample has the token within 2 % (ASSUMED_TO): encoders of texts differ by thousandths. */
static bool begins_with(const mpq_token *token, const mpq_tensor *about, const void *data) {
    double magnitude = 0;
    for (int i = 0; i < token->width; i++) magnitude += token->values[i] < 0 ? -token->values[i] : token->values[i];
    for (int64_t sample = 0; sample < about->shape[0]; sample++) {
        int64_t begin = (sample * about->shape[1] + token->token) * token->width;
        double difference = 0;
        for (int i = 0; i < token->width; i++) {
            float value;
            memcpy(&value, (const char *)data + (begin + i) * (int64_t)sizeof value, sizeof value);
            difference += value < token->values[i] ? token->values[i] - value : value - token->values[i];
        }
        if (difference > 0.02 * magnitude)
            return fail("token %d of '%s' in sample %lld is not the one with which every prompt began when this "
                        "artifact was compiled; its keys and values are constants since: encode texts as they were "
                        "for calibration, or compile without the pass 'bos-split'",
                        token->token, token->input, (long long)sample);
    }
    return true;
}

static bool takes(const mpq_build *build, const mpq_function *own, const void *const *inputs) {
    int64_t first = 0;
    for (int i = 0; i < own->inputs; i++) {
        const mpq_tensor *about = &own->input[i];
        if (odd_values(about, inputs[i], &first))
            return fail("input '%s' holds NaN or infinity in sample %lld; check what made it", about->name,
                        sample_of(about, first));
        if (!is_moderate(about, inputs[i])) return false;
        if (about->below && !in_range(about, inputs[i])) return false;
        for (int k = 0; k < build->token_count; k++) {
            const mpq_token *token = &build->tokens[k];
            if (!strcmp(token->input, about->name) && !begins_with(token, about, inputs[i])) return false;
        }
    }
    return true;
}

static bool is_sound(const mpq_tensor *output, const void *data) {
    int64_t first = 0, found = odd_values(output, data, &first);
    if (!found) return true;
    return fail("output '%s' holds NaN or infinity in %lld of %lld values, first in sample %lld; inputs far outside the "
                "calibrated range do that, and so may too few bits",
                output->name, (long long)found, (long long)elements(output), sample_of(output, first));
}

/* ---------------------------------------------------------------------------------------------- the files */

/* Of 64-bit words, each times an odd number of its own: no change of one word goes unseen. `at`: where the bytes begin
 * in their file, a multiple of 8. */
static uint64_t sum_of(const char *data, uint64_t at, uint64_t bytes) {
    uint64_t sum = 0, word;
    for (uint64_t i = 0; i * 8 < bytes; i++) {
        uint64_t left = bytes - i * 8;
        word = 0;
        memcpy(&word, data + i * 8, left < 8 ? left : 8);
        sum += word * (2 * (at / 8 + i) + 1);
    }
    return sum;
}

#include "mpq_sign.h"

/* Reads an open file to its end, which must come where it is expected; returns whether it did, and the sum. */
static bool read_in(int handle, char *data, uint64_t bytes, uint64_t *sum) {
    enum { PIECE = 1 << 20 }; /* which is summed while it is at hand */
    *sum = bytes;
    for (uint64_t at = 0, end; at < bytes; at = end) {
        end = bytes - at < PIECE ? bytes : at + PIECE;
        for (uint64_t to = at; to < end;) {
            ssize_t done = read(handle, data + to, end - to);
            if (done < 0 && errno == EINTR) continue;
            if (!done) errno = EIO; /* it became shorter meanwhile */
            if (done <= 0) return false;
            to += (uint64_t)done;
        }
        *sum += sum_of(data + at, at, end - at);
    }
    return true;
}

/* The bytes of a file in memory of this process, if they are those of this build: what is compared is what is used, and
 * what becomes of the file later changes nothing (a mapping would see it, and end the process where a page is gone).
 * what: "weights", for sentences. */
static char *read_file(const char *path, const mpq_file *file, const char *what) {
    struct stat about;
    int handle = open(path, O_RDONLY | O_CLOEXEC);
    if (handle < 0 || fstat(handle, &about)) {
        fail("cannot read the %s %s: %s", what, path, strerror(errno));
        if (handle >= 0) close(handle);
        return NULL;
    }
    char *data = MAP_FAILED;
    uint64_t sum = 0;
    if ((uint64_t)about.st_size != file->bytes)
        fail("%s has %lld bytes, and the %s of this build %llu: take the file that was compiled with it", path,
             (long long)about.st_size, what, (unsigned long long)file->bytes);
    else if ((data = mmap(NULL, file->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) == MAP_FAILED)
        fail("there is no memory for the %s, %llu bytes", what, (unsigned long long)file->bytes);
    else if (!read_in(handle, data, file->bytes, &sum))
        fail("cannot read the %s %s: %s", what, path, strerror(errno));
    else if (is_signed(path, data, file->bytes)) { /* else it has said what is wrong */
        if (sum == file->sum) {
            close(handle);
            return data;
        }
        fail("%s holds other %s than those of this build: take the file that was compiled with it", path, what);
    }
    if (data != MAP_FAILED) munmap(data, file->bytes);
    close(handle);
    return NULL;
}

/* Gives memory of whole pages back: what was read in for once. */
static void drop(char *data, uint64_t bytes) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)data, end = begin + bytes;
    begin = (begin + page - 1) / page * page;
    end = end / page * page;
    if (begin < end) madvise((void *)begin, end - begin, MADV_DONTNEED);
}

/* As DLPack lays out a tensor (dlpack.h), and TVM an argument. */
typedef struct {
    void *data;
    struct { int32_t type, id; } device;
    int32_t ndim;
    struct { uint8_t code, bits; uint16_t lanes; } dtype;
    const int64_t *shape, *strides;
    uint64_t byte_offset;
} tensor;
