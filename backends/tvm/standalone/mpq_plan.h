/* What mpq_model.c holds (generated): mpq_the_build, and the plan that mpq.c runs or that mpq_vm.c runs. A program of
 * several models has one mpq_model.c for each, in which these two have the model's number for a name. */
#ifndef MPQ_PLAN_H
#define MPQ_PLAN_H

#include "mpq.h"

typedef struct {
    uint64_t bytes, sum; /* sum_of (mpq_common.h) */
} mpq_file;

/* A token of an input [batch, tokens, width] that was compiled in as a constant (pass bos-split). */
typedef struct {
    const char *input;
    int token, width;
    const float *values;
} mpq_token;

typedef struct {
    const char *target;
    const char *const *features; /* as /proc/cpuinfo spells them, NULL behind the last */
    mpq_file weights;
    const mpq_function *functions;
    int function_count;
    const mpq_token *tokens;
    int token_count;
} mpq_build;

extern const mpq_build mpq_the_build;

/* ------------------------------------------------------------------------------- mpq.c: calls of kernels */

/* Where a tensor lies: in the file as it was read, in the memory of the prepared weights, in that of a call, or in that of what
 * is kept between calls. */
enum { MPQ_FILE, MPQ_HELD, MPQ_CALL, MPQ_KEPT };

typedef struct {
    uint8_t space, type_code, type_bits, ndim;
    uint32_t shape; /* the first of its extents in mpq_plan.shapes */
    uint64_t offset, last; /* of the file: the bytes that no later call reads */
} mpq_operand;

/* The calling convention of TVM's packed functions; an argument is 16 bytes. */
typedef int (*mpq_kernel)(void *self, const void *arguments, int32_t count, void *result);

typedef struct {
    mpq_kernel kernel;
    const char *name;
    uint32_t first, count; /* of mpq_plan.operands */
} mpq_call;

/* What a part reads, and where a copy of it lies (MPQ_KEPT) from when the part was computed. */
typedef struct {
    uint8_t space;
    uint64_t at, copy, bytes;
} mpq_read;

/* What does not depend on the latents: what it makes is kept until it reads something else. */
typedef struct {
    uint32_t first, count; /* of mpq_plan.calls */
    uint32_t read, reads; /* of mpq_plan.reads */
} mpq_stage;

typedef struct {
    uint32_t first, count; /* of mpq_plan.calls */
    uint32_t stage, stages; /* of mpq_plan.stages, which come before those calls */
    const uint64_t *inputs; /* offsets in the memory of a call */
    uint64_t output;
} mpq_steps;

typedef struct {
    uint64_t from, to, bytes;
} mpq_copy;

typedef struct {
    uint64_t held_bytes, call_bytes, kept_bytes, workspace_bytes;
    uint64_t file_bytes; /* that functions read where the file has them */
    const int64_t *shapes;
    const mpq_operand *operands;
    uint32_t operand_count;
    const mpq_call *calls;
    const mpq_stage *stages;
    uint32_t stage_count;
    const mpq_read *reads;
    const mpq_copy *copies; /* small tensors of the file, which are not aligned there */
    uint32_t copy_count;
    mpq_steps prepare; /* once, when the weights are opened */
    const mpq_steps *steps; /* of each function */
} mpq_plan;

/* The models of a program of mpq.c. */
typedef struct {
    const char *name;
    const mpq_build *build;
    const mpq_plan *plan;
} mpq_numbered;

extern const mpq_numbered mpq_the_models[];
extern const int mpq_the_count;

/* --------------------------------------------------------------------- mpq_vm.c: functions of kernels.so */

/* What is computed for one sample at a time, from arguments of a function of these names; it makes others. */
typedef struct {
    const char *name;
    int inputs, outputs;
    const mpq_tensor *input, *output;
} mpq_part;

typedef struct {
    int arguments, parts;
    const mpq_tensor *argument; /* the inputs, then what each part makes */
    const int *part; /* of mpq_machine.parts, in the order in which they run */
} mpq_entry;

typedef struct {
    mpq_file kernels;
    uint64_t bytes; /* that the runtime takes for a call of a function, at most, and for prepared weights */
    int stored, parts;
    const mpq_tensor *tensor; /* of the weights file, as `prepare` takes them */
    const uint64_t *offset; /* where each lies */
    const mpq_part *part;
    const mpq_entry *entries; /* of each function */
} mpq_machine;

extern const mpq_machine mpq_the_machine;

#endif
