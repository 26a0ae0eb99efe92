/* A compiled denoiser in a program of C, C++ or anything that calls C. docs/standalone.md */
#ifndef MPQ_H
#define MPQ_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const char *name;
    const char *dtype; /* as safetensors spell it: "F32", "I64", ... */
    int ndim;
    const int64_t *shape;
    size_t bytes;
    int64_t below; /* of whole numbers, such as labels: they go from 0 to below - 1; 0: there is no bound */
} mpq_tensor;

/* The denoiser at one batch and image size. */
typedef struct {
    const char *name;
    int inputs;
    const mpq_tensor *input;
    mpq_tensor output;
    int calls; /* of kernels, where nothing is known; 0 where the program does not know them */
} mpq_function;

typedef struct mpq_model mpq_model;

/* The functions of this program, `*count` of them. */
const mpq_function *mpq_functions(int *count);

/* Reads the weights file, prepares the weights for the kernels, closes it for good, and starts threads - 1 threads (0:
 * one for each CPU). NULL, with mpq_error(): a CPU without what the kernels need, a file that cannot be read or is not that of this build,
 * or no memory. Threads and their number are those of the process. */
mpq_model *mpq_open(const char *weights, int threads);

/* One call of mpq_functions()[function]: inputs in its order, each of its bytes; the output of its bytes. Allocates
 * nothing of its own. 0, or -1 with mpq_error(): values that Python refuses too, which are NaN and infinity, there or
 * in the output, inputs beyond 1e18, labels out of range, and texts that do not begin as they did when it was compiled. One call at a
 * time. */
int mpq_run(mpq_model *model, int function, const void *const *inputs, void *output);

/* The next call computes everything; others only what their inputs, the latents aside, were not known for: timesteps and
 * texts are those of the call of this function before. No bit depends on it. */
void mpq_forget(mpq_model *model);

/* For timing: from now on mpq_run() calls `watcher` with NULL once the inputs are in place, and with a kernel's name
 * behind each call of one, and computes everything. NULL: no longer. 0, or -1 with mpq_error() where the program does not know them. */
int mpq_watch(mpq_model *model, void (*watcher)(void *data, const char *kernel), void *data);

/* Memory that the model keeps. */
size_t mpq_bytes(const mpq_model *model);

void mpq_close(mpq_model *model);

/* A program of a pipeline has several models: its parts, by number, in the order of their names. What stands above is of
 * the first, which of other programs is the only one. */
int mpq_models(void);
const char *mpq_name(int number);
const mpq_function *mpq_functions_of(int number, int *count);
mpq_model *mpq_open_model(int number, const char *weights, int threads);

/* From now on models are opened only of files that the owner of this key signed (docs/artifact.md): a public key of Ed25519
 * in hexadecimal, or the name of a file with it, as such text or as PEM. 0, or -1 with mpq_error(): it is no key, or another
 * than the one that was built in (mpq_owner.h), which needs no call. */
int mpq_trust(const char *key);

/* What went wrong last, one sentence. */
const char *mpq_error(void);

#ifdef __cplusplus
}
#endif
#endif
