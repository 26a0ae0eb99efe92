/* The plan of a denoiser, which mpq_model.c holds (generated) and mpq.c runs. */
#ifndef MPQ_PLAN_H
#define MPQ_PLAN_H

#include "mpq.h"

/* Where a tensor lies: in the mapped file, in the memory of the prepared weights, or in that of a call. */
enum { MPQ_FILE, MPQ_HELD, MPQ_CALL };

typedef struct {
    uint8_t space, type_code, type_bits, ndim;
    uint32_t shape; /* the first of its extents in mpq_plan.shapes */
    uint64_t offset;
} mpq_operand;

/* The calling convention of TVM's packed functions; an argument is 16 bytes. */
typedef int (*mpq_kernel)(void *self, const void *arguments, int32_t count, void *result);

typedef struct {
    mpq_kernel kernel;
    const char *name;
    uint32_t first, count; /* of mpq_plan.operands */
} mpq_call;

typedef struct {
    uint32_t first, count; /* of mpq_plan.calls */
    const uint64_t *inputs; /* offsets in the memory of a call */
    uint64_t output;
} mpq_steps;

typedef struct {
    uint64_t from, to, bytes;
} mpq_copy;

typedef struct {
    const char *target;
    const char *const *features; /* as /proc/cpuinfo spells them, NULL behind the last */
    uint64_t weights_bytes, weights_sum; /* size of the file, and mpq_sum of it */
    uint64_t held_bytes, call_bytes, workspace_bytes;
    const int64_t *shapes;
    const mpq_operand *operands;
    uint32_t operand_count;
    const mpq_call *calls;
    const mpq_copy *copies; /* small tensors of the file, which are not aligned there */
    uint32_t copy_count;
    mpq_steps prepare; /* once, when the weights are opened */
    const mpq_function *functions;
    const mpq_steps *steps; /* of each function */
    int function_count;
} mpq_plan;

extern const mpq_plan mpq_the_plan;

#endif
