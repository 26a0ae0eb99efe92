#include "mpq_common.h"
#include "mpq_pool.h"

int mpq_models(void) { return mpq_the_count; }

const char *mpq_name(int number) { return mpq_the_models[number].name; }

const mpq_function *mpq_functions_of(int number, int *count) {
    *count = mpq_the_models[number].build->function_count;
    return mpq_the_models[number].build->functions;
}

/* ------------------------------------------------------------------- what the kernels ask of their runtime */

/* Working memory of a thread: taken and given back in reverse order, so that a mark is all there is to know. */
static _Thread_local char *workspace;
static _Thread_local uint64_t used;
static uint64_t most; /* what a model of this program asks for of a thread, at most */
static pthread_key_t ends; /* frees that of a thread that ends, whoever started it */
static pthread_once_t ends_made = PTHREAD_ONCE_INIT;
static bool has_ends;

static void make_ends(void) { has_ends = !pthread_key_create(&ends, free); }

static void *take(int type, int id, uint64_t bytes, int code, int bits) {
    (void)type, (void)id, (void)code, (void)bits;
    if (!workspace) {
        pthread_once(&ends_made, make_ends);
        if (!(workspace = aligned_alloc(ALIGNMENT, most))) return NULL;
        if (has_ends) pthread_setspecific(ends, workspace);
    }
    uint64_t size = ALIGNMENT + (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (used + size > most) return NULL;
    char *block = workspace + used;
    used += size;
    return block + ALIGNMENT;
}

static int give_back(int type, int id, void *block) {
    (void)type, (void)id;
    used = (uint64_t)((char *)block - ALIGNMENT - workspace);
    return 0;
}

static void free_workspace(void) {
    if (workspace && has_ends) pthread_setspecific(ends, NULL);
    free(workspace);
    workspace = NULL;
}

/* Kernels look for these names; their own objects hold weak ones without a value. */
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = take;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = give_back;
int (*__TVMBackendParallelLaunch)(lambda, void *, int) = launch;

/* What a kernel says of its end: a damaged weight, for one. Most kernels know no other than that there is no memory. */
static char said[256];

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
    (void)kind;
    said[0] = 0;
    for (int32_t i = 0; i < count; i++)
        if (parts[i]) strncat(said, parts[i], sizeof said - strlen(said) - 1);
}

void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) {
    TVMFFIErrorSetRaisedFromCStrParts(kind, &message, 1);
}

/* ---------------------------------------------------------------------------------------------- the model */

/* As TVM lays out an argument. */
typedef struct { int32_t type, padding; void *value; } argument;
enum { CPU = 1, TENSOR = 7 };

struct mpq_model {
    const mpq_build *build;
    const mpq_plan *plan;
    int threads;
    char *file, *held, *call, *kept;
    bool *known; /* of each stage: whether what it made is kept */
    tensor *tensors;
    argument *arguments;
    void (*watcher)(void *, const char *);
    void *watching;
};

static int run_calls(mpq_model *model, uint32_t first, uint32_t count) {
    for (uint32_t i = first; i < first + count; i++) {
        const mpq_call *each = &model->plan->calls[i];
        argument result = {0};
        if (each->kernel(NULL, model->arguments + each->first, (int32_t)each->count, &result)) {
            fail("kernel %s failed: %s", each->name, *said ? said : "there is no memory for it");
            *said = 0;
            return -1;
        }
        if (model->watcher) model->watcher(model->watching, each->name);
    }
    return 0;
}

/* Computes a stage where it reads something else than when it was computed. */
static int run_stage(mpq_model *model, uint32_t number) {
    const mpq_plan *plan = model->plan;
    const mpq_stage *stage = &plan->stages[number];
    bool known = model->known[number] && !model->watcher;
    for (uint32_t i = stage->read; i < stage->read + stage->reads; i++) {
        const mpq_read *each = &plan->reads[i];
        char *now = (each->space == MPQ_KEPT ? model->kept : model->call) + each->at, *then = model->kept + each->copy;
        if (known && !memcmp(now, then, each->bytes)) continue;
        memcpy(then, now, each->bytes);
        known = false;
    }
    if (known) return 0;
    model->known[number] = false;
    if (run_calls(model, stage->first, stage->count)) return -1;
    model->known[number] = true;
    return 0;
}

/* Large blocks in large pages where the system has them: weights are read from end to end in every call. */
static void *room(uint64_t bytes) {
    enum { LARGE = 1 << 21 };
    void *block = NULL;
    if (posix_memalign(&block, bytes < LARGE ? ALIGNMENT : LARGE, bytes)) return NULL;
    if (bytes >= LARGE) madvise(block, bytes / LARGE * LARGE, MADV_HUGEPAGE);
    return block;
}

static void close_file(mpq_model *model) {
    if (model->file) munmap(model->file, model->build->weights.bytes);
    model->file = NULL;
}

static mpq_model *opened(int number, const char *weights, int threads) {
    const mpq_build *build = mpq_the_models[number].build;
    const mpq_plan *plan = mpq_the_models[number].plan;
    for (int i = 0; i < mpq_the_count; i++)
        if (mpq_the_models[i].plan->workspace_bytes > most) most = mpq_the_models[i].plan->workspace_bytes;
    if (!fits_cpu(build)) return NULL;
    mpq_model *model = calloc(1, sizeof *model);
    if (!model) return fail("there is no memory");
    model->build = build;
    model->plan = plan;
    if (!(model->file = read_file(weights, &build->weights, "weights"))) {
        free(model);
        return NULL;
    }
    uint64_t memory = plan->held_bytes + plan->call_bytes + plan->kept_bytes;
    model->held = room(plan->held_bytes);
    model->call = room(plan->call_bytes);
    model->kept = room(plan->kept_bytes);
    model->known = calloc(plan->stage_count + 1, sizeof *model->known);
    model->tensors = calloc(plan->operand_count, sizeof *model->tensors);
    model->arguments = calloc(plan->operand_count, sizeof *model->arguments);
    bool all = model->held && model->call && model->kept && model->known && model->tensors && model->arguments;
    if (!all) fail("there is no memory for %llu bytes", (unsigned long long)memory);
    model->threads = thread_count(threads);
    pool.ends = free_workspace;
    int code = all ? use_threads(model->threads) : 0;
    if (code) {
        fail("cannot start %d threads: %s", model->threads, strerror(code));
        all = false;
    }
    if (!all) {
        mpq_close(model);
        return NULL;
    }
    char *const spaces[] = {model->file, model->held, model->call, model->kept};
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
    for (uint32_t i = 0; i < plan->prepare.count; i++) {
        const mpq_call *each = &plan->calls[plan->prepare.first + i];
        if (run_calls(model, plan->prepare.first + i, 1)) {
            mpq_close(model);
            return NULL;
        }
        for (const mpq_operand *o = plan->operands + each->first; o < plan->operands + each->first + each->count; o++)
            drop(model->file + o->offset, o->last); /* else weights are in memory twice */
    }
    if (!plan->file_bytes) close_file(model);
    return model;
}

static const mpq_build *build_of(const mpq_model *model) { return model->build; }

static int called(mpq_model *model, int function, const void *const *inputs, void *output) {
    const mpq_function *own = &model->build->functions[function];
    const mpq_steps *steps = &model->plan->steps[function];
    use_threads(model->threads);
    for (int i = 0; i < own->inputs; i++) memcpy(model->call + steps->inputs[i], inputs[i], own->input[i].bytes);
    if (model->watcher) model->watcher(model->watching, NULL);
    for (uint32_t i = 0; i < steps->stages; i++)
        if (run_stage(model, steps->stage + i)) return -1;
    if (run_calls(model, steps->first, steps->count)) return -1;
    memcpy(output, model->call + steps->output, own->output.bytes);
    return 0;
}

void mpq_forget(mpq_model *model) { memset(model->known, 0, model->plan->stage_count * sizeof *model->known); }

int mpq_watch(mpq_model *model, void (*watcher)(void *data, const char *kernel), void *data) {
    model->watcher = watcher;
    model->watching = data;
    return 0;
}

size_t mpq_bytes(const mpq_model *model) {
    const mpq_plan *plan = model->plan;
    uint64_t tables = plan->operand_count * (sizeof(tensor) + sizeof(argument));
    uint64_t weights = plan->held_bytes + plan->file_bytes;
    return weights + plan->call_bytes + plan->kept_bytes + (uint64_t)model->threads * most + tables;
}

void mpq_close(mpq_model *model) {
    if (!model) return;
    stop_threads();
    free_workspace();
    close_file(model);
    free(model->held);
    free(model->call);
    free(model->kept);
    free(model->known);
    free(model->tensors);
    free(model->arguments);
    free(model);
}
