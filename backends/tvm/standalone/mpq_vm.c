/* Runs a denoiser by the functions of its kernels.so, with TVM's small runtime: libtvm_runtime.so and libtvm_ffi.so,
 * which lie beside the weights and are opened when the CPU and the files are known to be those of the build. */
#include "mpq_common.h"

#include <dlfcn.h>

static const mpq_build *const build = &mpq_the_build;
static const mpq_machine *const machine = &mpq_the_machine;

int mpq_models(void) { return 1; }

const char *mpq_name(int number) { return (void)number, "denoiser"; }

const mpq_function *mpq_functions_of(int number, int *count) {
    (void)number;
    *count = build->function_count;
    return build->functions;
}

/* ------------------------------------------------------------------------- the runtime (tvm/ffi/c_api.h) */

typedef struct { uint64_t count; int32_t type; uint32_t padding; void *deleter; } object;
typedef struct { const char *text; size_t bytes; } words;
typedef struct {
    int32_t type;
    uint32_t padding;
    union { int64_t number; void *pointer; const char *text; };
} value;
enum { NONE = 0, INTEGER = 1, BOOLEAN = 2, TEXT = 8, OBJECTS = 64, FUNCTION = 68, TENSOR = 70 };

/* DLManagedTensor; its memory lies behind it. */
typedef struct managed {
    tensor tensor;
    void *context;
    void (*deleter)(struct managed *);
} managed;

static struct {
    int (*global)(const words *name, void **function);
    int (*call)(void *function, const value *arguments, int32_t count, value *result);
    int (*tensor)(managed *from, int32_t alignment, int32_t contiguous, void **made);
    void (*error)(void **made);
    int (*release)(void *object);
} tvm;

static char folder[2048]; /* of the weights */

static const char *beside(const char *name) {
    static char path[sizeof folder + 64];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

/* Whether a library may be opened, which its owner has signed where somebody has to. */
static bool is_signed_library(const char *path) {
    struct stat about;
    int handle = open(path, O_RDONLY | O_CLOEXEC);
    void *data = MAP_FAILED;
    if (handle >= 0 && !fstat(handle, &about))
        data = mmap(NULL, (size_t)about.st_size, PROT_READ, MAP_PRIVATE, handle, 0);
    if (data == MAP_FAILED) fail("cannot load TVM's runtime: %s: %s", path, strerror(errno));
    if (handle >= 0) close(handle);
    if (data == MAP_FAILED) return false;
    bool right = is_signed(path, data, (uint64_t)about.st_size);
    munmap(data, (size_t)about.st_size);
    return right;
}

static bool load_runtime(void) {
    static const struct { const char *name; void *place; } functions[] = {
        {"TVMFFIFunctionGetGlobal", &tvm.global}, {"TVMFFIFunctionCall", &tvm.call},
        {"TVMFFITensorFromDLPack", &tvm.tensor}, {"TVMFFIErrorMoveFromRaised", &tvm.error},
        {"TVMFFIObjectDecRef", &tvm.release},
    };
    void *library = NULL;
    for (int i = 0; i < 2; i++) {
        const char *path = beside(i ? "libtvm_runtime.so" : "libtvm_ffi.so");
        if (!is_signed_library(path)) return false;
        void *opened = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
        if (!opened) return fail("cannot load TVM's runtime: %s", dlerror());
        if (!i) library = opened;
    }
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++)
        if (!(*(void **)functions[i].place = dlsym(library, functions[i].name)))
            return fail("%s is not that of this build: %s", beside("libtvm_ffi.so"), dlerror());
    return true;
}

static void release(value *held) {
    if (held->type >= OBJECTS) tvm.release(held->pointer);
    held->type = NONE;
}

/* A failure's sentence becomes mpq_error(). */
static bool good(int code) {
    if (!code) return true;
    value error = {.type = OBJECTS};
    tvm.error(&error.pointer);
    const words *about = (const words *)((const object *)error.pointer + 1); /* kind, message */
    fail("TVM's runtime: %.*s", (int)about[1].bytes, about[1].text);
    release(&error);
    return false;
}

static bool call(value function, const value *arguments, int count, value *result) {
    *result = (value){.type = NONE};
    return good(tvm.call(function.pointer, arguments, count, result));
}

static bool global(const char *name, const value *arguments, int count, value *result) {
    value function = {.type = FUNCTION};
    bool done = good(tvm.global(&(words){name, strlen(name)}, &function.pointer)) && function.pointer &&
                call(function, arguments, count, result);
    if (!function.pointer) fail("TVM's runtime has no %s: it is not that of this build", name);
    else release(&function);
    return done;
}

static bool member(value module, const char *name, value *function) {
    value arguments[] = {module, {.type = TEXT, .text = name}, {.type = BOOLEAN, .number = 1}};
    if (!global("ffi.ModuleGetFunction", arguments, 3, function)) return false;
    return function->type == FUNCTION || fail("kernels.so has no function %s", name);
}

static tensor *laid_out(value held) { return (tensor *)((object *)held.pointer + 1); }

static void discard(managed *each) { free(each); }

/* A tensor on data, or with memory of its own. */
static bool make(const mpq_tensor *like, const void *data, value *made) {
    size_t room = data ? 0 : (like->bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    managed *block = aligned_alloc(ALIGNMENT, ALIGNMENT + room);
    if (!block) return fail("there is no memory for %zu bytes", room);
    bool truth = !strcmp(like->dtype, "BOOL");
    *block = (managed){
        .tensor = {
            .data = data ? (void *)data : (char *)block + ALIGNMENT, .device = {1, 0}, .ndim = like->ndim,
            .dtype = {truth ? 6 : *like->dtype == 'F' ? 2 : *like->dtype == 'U', truth ? 8 : atoi(like->dtype + 1), 1},
            .shape = like->shape,
        },
        .deleter = discard,
    };
    made->type = TENSOR;
    bool done = good(tvm.tensor(block, ALIGNMENT, 1, &made->pointer));
    if (!done) made->type = NONE;
    return done;
}

/* ---------------------------------------------------------------------------------------------- the model */

typedef struct {
    value call, *inputs; /* for one sample */
} part;

typedef struct {
    value call, *arguments; /* behind the tensors, what `prepare` made */
    bool *changed; /* since the call before */
    bool ready;
} entry;

struct mpq_model {
    char *file;
    uint64_t bytes;
    int threads;
    value machine, prepared, use_threads;
    part *parts;
    entry *entries;
};

/* A file without a name that holds the kernels, once they are known to be those of this build; -1: they are not. */
static int copy_kernels(void) {
    char *kernels = read_file(beside("kernels.so"), &machine->kernels, "kernels");
    if (!kernels) return -1;
    int copy = memfd_create("kernels.so", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    bool whole = copy >= 0;
    for (uint64_t at = 0; whole && at < machine->kernels.bytes;) {
        ssize_t done = write(copy, kernels + at, machine->kernels.bytes - at);
        whole = done > 0 || (done < 0 && errno == EINTR);
        at += done > 0 ? (uint64_t)done : 0;
    }
    whole = whole && !fcntl(copy, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
    munmap(kernels, machine->kernels.bytes);
    if (whole) return copy;
    fail("cannot copy the kernels %s: %s", beside("kernels.so"), strerror(errno));
    if (copy >= 0) close(copy);
    return -1;
}

/* From the copy, for the file may be another one by now. */
static bool load_kernels(mpq_model *model, int copy) {
    value library = {.type = NONE}, start = library, ignored;
    value cpu[] = {{.type = INTEGER, .number = 1}, {.type = INTEGER}, {.type = INTEGER, .number = 2}};
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", copy);
    value file[] = {{.type = TEXT, .text = path}, {.type = TEXT, .text = "so"}};
    if (!global("ffi.Module.load_from_file.so", file, 2, &library)) return false;
    bool done = member(library, "vm_load_executable", &start) && call(start, NULL, 0, &model->machine);
    done = done && member(library, "mpq_use_threads", &model->use_threads);
    release(&start);
    release(&library);
    done = done && member(model->machine, "vm_initialization", &start) && call(start, cpu, 3, &ignored);
    release(&start);
    return done;
}

/* For the loops of this thread (mpq_pool.c). */
static bool use_threads(mpq_model *model) {
    value code, count = {.type = INTEGER, .number = model->threads};
    if (!call(model->use_threads, &count, 1, &code)) return false;
    return !code.number || fail("cannot start %d threads: %s", model->threads, strerror((int)code.number));
}

/* Whether what `prepare` made hands a stored tensor on as it is. */
static bool is_handed_on(const mpq_model *model, const char *data) {
    const struct { value *elements; int64_t count; } *all = (const void *)((object *)model->prepared.pointer + 1);
    for (int64_t i = 0; i < all->count; i++)
        if (laid_out(all->elements[i])->data == data) return true;
    return false;
}

static bool prepare(mpq_model *model) {
    value function = {.type = NONE}, *stored = calloc((size_t)machine->stored + 1, sizeof *stored);
    bool done = (stored || fail("there is no memory")) && member(model->machine, "prepare", &function);
    for (int i = 0; done && i < machine->stored; i++) {
        const char *data = model->file + machine->offset[i];
        bool aligned = machine->offset[i] % ALIGNMENT == 0;
        done = make(&machine->tensor[i], aligned ? data : NULL, &stored[i]);
        if (done && !aligned) memcpy(laid_out(stored[i])->data, data, machine->tensor[i].bytes);
    }
    done = done && call(function, stored, machine->stored, &model->prepared);
    for (int i = 0; done && i < machine->stored; i++) {
        char *data = model->file + machine->offset[i];
        if (!is_handed_on(model, data)) drop(data, machine->tensor[i].bytes);
    }
    for (int i = 0; stored && i < machine->stored; i++) release(&stored[i]);
    free(stored);
    release(&function);
    return done;
}

/* A function of the machine, and memory for its arguments, with what was prepared behind them. */
static bool ready(mpq_model *model, const char *name, const mpq_tensor *like, int count, value *function, value **made) {
    if (!(*made = calloc((size_t)count + 1, sizeof **made))) return fail("there is no memory");
    for (int i = 0; i < count; i++) {
        if (!make(&like[i], NULL, &(*made)[i])) return false;
        model->bytes += like[i].bytes;
    }
    (*made)[count] = model->prepared;
    return member(model->machine, name, function);
}

static mpq_model *opened(int number, const char *weights, int threads) {
    (void)number;
    if (!fits_cpu(build)) return NULL;
    mpq_model *model = calloc(1, sizeof *model);
    if (!model) return fail("there is no memory");
    model->threads = thread_count(threads);
    const char *end = strrchr(weights, '/');
    snprintf(folder, sizeof folder, "%.*s", end ? (int)(end - weights) : 1, end ? weights : ".");
    model->parts = calloc((size_t)machine->parts + 1, sizeof *model->parts);
    model->entries = calloc((size_t)build->function_count, sizeof *model->entries);
    bool done = (model->parts && model->entries) || fail("there is no memory");
    int copy = -1;
    done = done && (model->file = read_file(weights, &build->weights, "weights")) && (copy = copy_kernels()) >= 0 &&
           load_runtime() && load_kernels(model, copy) && use_threads(model) && prepare(model);
    if (copy >= 0) close(copy);
    for (int i = 0; done && i < machine->parts; i++) {
        const mpq_part *own = &machine->part[i];
        done = ready(model, own->name, own->input, own->inputs, &model->parts[i].call, &model->parts[i].inputs);
    }
    for (int i = 0; done && i < build->function_count; i++) {
        const mpq_entry *own = &machine->entries[i];
        entry *each = &model->entries[i];
        done = (each->changed = calloc((size_t)own->arguments, 1)) || fail("there is no memory");
        done = done && ready(model, build->functions[i].name, own->argument, own->arguments, &each->call, &each->arguments);
    }
    if (done) return model;
    mpq_close(model);
    return NULL;
}

/* The rows that a part makes of the arguments it reads, where any of these is new. `first`: of what it makes. */
static bool run_part(part *own, const mpq_part *about, entry *all, const mpq_entry *known, int first) {
    int from[about->inputs];
    bool changed = false;
    for (int i = 0; i < about->inputs; i++) {
        for (from[i] = 0; strcmp(known->argument[from[i]].name, about->input[i].name);) from[i]++;
        changed |= all->changed[from[i]];
    }
    for (int i = 0; i < about->outputs; i++) all->changed[first + i] = changed;
    size_t samples = changed ? known->argument[first].bytes / about->output[0].bytes : 0;
    for (size_t sample = 0; sample < samples; sample++) {
        for (int i = 0; i < about->inputs; i++) {
            size_t bytes = about->input[i].bytes;
            memcpy(laid_out(own->inputs[i])->data, (char *)laid_out(all->arguments[from[i]])->data + sample * bytes, bytes);
        }
        value made;
        if (!call(own->call, own->inputs, about->inputs + 1, &made)) return false;
        const value *each = *(value **)((object *)made.pointer + 1); /* of an array: its elements, and how many */
        for (int i = 0; i < about->outputs; i++) {
            size_t bytes = about->output[i].bytes;
            memcpy((char *)laid_out(all->arguments[first + i])->data + sample * bytes, laid_out(each[i])->data, bytes);
        }
        release(&made);
    }
    return true;
}

static const mpq_build *build_of(const mpq_model *model) { return (void)model, build; }

static int called(mpq_model *model, int function, const void *const *inputs, void *output) {
    const mpq_function *about = &build->functions[function];
    const mpq_entry *known = &machine->entries[function];
    entry *own = &model->entries[function];
    bool done = use_threads(model);
    for (int i = 0; i < about->inputs; i++) {
        void *held = laid_out(own->arguments[i])->data;
        own->changed[i] = !own->ready || memcmp(held, inputs[i], about->input[i].bytes);
        memcpy(held, inputs[i], about->input[i].bytes);
    }
    own->ready = false;
    for (int i = 0, first = about->inputs; done && i < known->parts; i++) {
        const mpq_part *each = &machine->part[known->part[i]];
        done = run_part(&model->parts[known->part[i]], each, own, known, first);
        first += each->outputs;
    }
    value made;
    if (!done || !call(own->call, own->arguments, known->arguments + 1, &made)) return -1;
    memcpy(output, laid_out(made)->data, about->output.bytes);
    release(&made);
    own->ready = true;
    return 0;
}

void mpq_forget(mpq_model *model) {
    for (int i = 0; i < build->function_count; i++) model->entries[i].ready = false;
}

int mpq_watch(mpq_model *model, void (*watcher)(void *data, const char *kernel), void *data) {
    (void)model, (void)watcher, (void)data;
    fail("TVM's runtime does not tell its kernels: compile with --emit c in place of --standalone");
    return -1;
}

size_t mpq_bytes(const mpq_model *model) { return model->bytes + machine->bytes; }

static void close_call(value *function, value *arguments, int count) {
    for (int i = 0; arguments && i < count; i++) release(&arguments[i]);
    free(arguments);
    release(function);
}

void mpq_close(mpq_model *model) {
    if (!model) return;
    for (int i = 0; model->parts && i < machine->parts; i++)
        close_call(&model->parts[i].call, model->parts[i].inputs, machine->part[i].inputs);
    for (int i = 0; model->entries && i < build->function_count; i++) {
        close_call(&model->entries[i].call, model->entries[i].arguments, machine->entries[i].arguments);
        free(model->entries[i].changed);
    }
    release(&model->prepared);
    release(&model->machine);
    release(&model->use_threads);
    if (model->file) munmap(model->file, build->weights.bytes);
    free(model->parts);
    free(model->entries);
    free(model);
}
