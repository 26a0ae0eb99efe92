/* The threads of kernels.so: whoever runs its functions says how many, for the calls of his own thread. */
#include "mpq_pool.h"

typedef struct { int32_t type; uint32_t padding; int64_t number; } value; /* as TVM lays one out */
enum { NONE = 0, INTEGER = 1 };

/* What kernels call; the runtime that loads the library sets it to its own. */
__attribute__((weak)) int (*__TVMBackendParallelLaunch)(lambda, void *, int);

/* mpq_use_threads(count): 0, or the error that kept them from being started. */
int __tvm_ffi_mpq_use_threads(void *self, const value *arguments, int32_t count, value *result) {
    (void)self, (void)count;
    __TVMBackendParallelLaunch = launch;
    *result = (value){.type = INTEGER, .number = use_threads((int)arguments[0].number)};
    return 0;
}

/* Before the library goes, so do the threads that run its code. */
__attribute__((destructor)) static void leave(void) { stop_threads(); }
