/* Draws with the parts of a compiled pipeline:
 *
 *   mpq_run --tokens FILE -o PICTURE.png [--folder DIR] [--threads N] [--key PUBLIC]
 *
 * `mpqc tokenize` makes the file. It holds tokens and noise, and a list of instructions: calls of the parts, and what is
 * computed between them, by the numbers of the scheduler (mpq_compiler/runtime/recording.py). A part is opened for its
 * first call and closed behind its last one, so that memory holds one of them at a time. Every instruction is checked
 * before the first one is run. */
#define _XOPEN_SOURCE 700
#include "mpq_files.h"

#include <math.h>
#include <stdbool.h>
#include <time.h>
#include <unistd.h>

#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STB_IMAGE_WRITE_STATIC
#define STBI_WRITE_NO_STDIO
#pragma GCC diagnostic ignored "-Wunused-function"
#include "stb_image_write.h"

/* Of mpq_parts.c (generated): the SHA-256 of each part's artifact, by number. */
extern const uint8_t mpq_the_parts[][32];

/* As recording.py numbers them. */
enum { COPY, ADD, SUBTRACT, MULTIPLY, DIVIDE, LEAST, MOST, NEGATE, ROUND, BYTE, INPUT, CALL, PICTURE };
enum { F32, I64, U8 };
enum { DIMENSIONS = 6, MOST_INPUTS = 64, MOST_PARTS = 16 };

/* A part of a buffer, in elements. Of a call `a` has the part's number and `b` that of its function. */
typedef struct { int64_t buffer, offset, stride[DIMENSIONS]; } view;

typedef struct {
    int64_t operation, shape[DIMENSIONS];
    view to, a, b;
} instruction;

typedef struct {
    int64_t type, elements, constant; /* where it lies among the constants, in bytes; less than 0: it is computed */
} description;

static const size_t size_of[] = {4, 8, 1};

static const description *buffers;
static const instruction *program;
static int64_t buffer_count, instruction_count;
static char **memory; /* of each buffer */
static int64_t *last; /* the last instruction that has it */

static const char *const damaged = "the file of tokens is damaged, or not of `mpqc tokenize`:";

static bool is_buffer(int64_t number, int type) {
    return number >= 0 && number < buffer_count && (type < 0 || buffers[number].type == type);
}

/* Whether an operand lies in its buffer; every element is written once, so there are no more of them than of the buffer. */
static bool lies_within(const view *v, const int64_t *shape, const view *to) {
    __int128 least = v->offset, most = v->offset, size = 1;
    for (int i = 0; i < DIMENSIONS; i++) {
        if (shape[i] < 1 || (size *= shape[i]) > buffers[to->buffer].elements) return false;
        __int128 reach = (__int128)(shape[i] - 1) * v->stride[i];
        *(reach < 0 ? &least : &most) += reach;
    }
    return least >= 0 && most < buffers[v->buffer].elements;
}

static bool is_call(const instruction *each, const int64_t *inputs, int given) {
    int functions;
    if (each->a.buffer < 0 || each->a.buffer >= mpq_models()) return false;
    const mpq_function *all = mpq_functions_of((int)each->a.buffer, &functions);
    if (each->b.buffer < 0 || each->b.buffer >= functions) return false;
    const mpq_function *own = &all[each->b.buffer];
    if (given != own->inputs || !is_buffer(each->to.buffer, F32)) return false;
    for (int i = 0; i < given; i++) {
        const description *d = &buffers[inputs[i]];
        if ((uint64_t)d->elements * size_of[d->type] != own->input[i].bytes) return false;
    }
    return (uint64_t)buffers[each->to.buffer].elements * 4 == own->output.bytes;
}

static bool is_sound(const instruction *each, const int64_t *inputs, int given) {
    switch (each->operation) {
    case COPY:
        return is_buffer(each->to.buffer, -1) && is_buffer(each->a.buffer, (int)buffers[each->to.buffer].type) &&
               lies_within(&each->to, each->shape, &each->to) && lies_within(&each->a, each->shape, &each->to);
    case ADD: case SUBTRACT: case MULTIPLY: case DIVIDE: case LEAST: case MOST:
        if (!is_buffer(each->to.buffer, F32) || !is_buffer(each->b.buffer, F32) || !lies_within(&each->b, each->shape, &each->to)) return false; /* fall through */
    case NEGATE: case ROUND: case BYTE:
        return is_buffer(each->to.buffer, each->operation == BYTE ? U8 : F32) && is_buffer(each->a.buffer, F32) &&
               lies_within(&each->to, each->shape, &each->to) && lies_within(&each->a, each->shape, &each->to);
    case INPUT: return is_buffer(each->a.buffer, -1) && given < MOST_INPUTS;
    case CALL: return is_call(each, inputs, given);
    case PICTURE: {
        __int128 size = 1;
        for (int i = 0; i < 3; i++) size *= each->shape[i] < 1 || each->shape[i] > 1 << 20 ? 0 : each->shape[i];
        return is_buffer(each->a.buffer, U8) && size == buffers[each->a.buffer].elements && each->shape[2] <= 4;
    }
    default: return false;
    }
}

/* Every instruction is sound, and reads nothing that was not made before it. */
static bool is_program(size_t constants) {
    bool *made = calloc((size_t)buffer_count + 1, 1);
    int64_t inputs[MOST_INPUTS];
    int given = 0;
    bool sound = made;
    for (int64_t i = 0; sound && i < buffer_count; i++) {
        const description *d = &buffers[i];
        sound = d->type >= F32 && d->type <= U8 && d->elements > 0 && d->elements < (int64_t)1 << 40;
        made[i] = d->constant >= 0;
        if (sound && made[i])
            sound = (uint64_t)d->constant <= constants && d->constant % 8 == 0 &&
                    (uint64_t)d->elements * size_of[d->type] <= constants - (uint64_t)d->constant;
    }
    for (int64_t i = 0; sound && i < instruction_count; i++) {
        const instruction *each = &program[i];
        sound = is_sound(each, inputs, given);
        if (!sound) break;
        bool call = each->operation == CALL, input = each->operation == INPUT, picture = each->operation == PICTURE;
        if (!call) sound = made[each->a.buffer], last[each->a.buffer] = i;
        if (each->operation >= ADD && each->operation <= MOST) sound &= made[each->b.buffer], last[each->b.buffer] = i;
        for (int k = 0; call && k < given; k++) last[inputs[k]] = i;
        if (input) inputs[given++] = each->a.buffer;
        else given = 0;
        if (!input && !picture) {
            sound &= buffers[each->to.buffer].constant < 0;
            made[each->to.buffer] = true;
            last[each->to.buffer] = i;
        }
    }
    free(made);
    return sound;
}

/* ---------------------------------------------------------------------------------------------- arithmetic */

/* One row of an operation, which is rounded once. */
static void row(int64_t operation, int64_t n, size_t size, char *to, int64_t step, const char *a, int64_t of_a,
                const char *b, int64_t of_b) {
#define EACH(expression)                                                                                               \
    for (int64_t i = 0; i < n; i++) {                                                                                  \
        float x = ((const float *)a)[i * of_a], y = ((const float *)b)[i * of_b];                                      \
        (void)y;                                                                                                       \
        ((float *)to)[i * step] = (expression);                                                                        \
    }                                                                                                                  \
    break
    switch (operation) {
    case COPY:
        for (int64_t i = 0; i < n; i++) memcpy(to + i * step * (int64_t)size, a + i * of_a * (int64_t)size, size);
        break;
    case ADD: EACH(x + y);
    case SUBTRACT: EACH(x - y);
    case MULTIPLY: EACH(x * y);
    case DIVIDE: EACH(x / y);
    case LEAST: EACH(x < y ? x : y);
    case MOST: EACH(x > y ? x : y);
    case NEGATE: EACH(-x);
    case ROUND: EACH(rintf(x));
    case BYTE:
        for (int64_t i = 0; i < n; i++) ((uint8_t *)to)[i * step] = (uint8_t)((const float *)a)[i * of_a];
        break;
    }
#undef EACH
}

static void compute(const instruction *each) {
    const view *to = &each->to, *a = &each->a, *b = each->operation >= ADD && each->operation <= MOST ? &each->b : a;
    size_t made = size_of[buffers[to->buffer].type], read = size_of[buffers[a->buffer].type];
    int64_t at[DIMENSIONS] = {0};
    enum { INNER = DIMENSIONS - 1 };
    for (;;) {
        int64_t place = to->offset, left = a->offset, right = b->offset;
        for (int i = 0; i < INNER; i++) place += at[i] * to->stride[i], left += at[i] * a->stride[i], right += at[i] * b->stride[i];
        row(each->operation, each->shape[INNER], read, memory[to->buffer] + place * (int64_t)made, to->stride[INNER],
            memory[a->buffer] + left * (int64_t)read, a->stride[INNER],
            memory[b->buffer] + right * (int64_t)read, b->stride[INNER]);
        int axis = INNER - 1;
        while (axis >= 0 && ++at[axis] == each->shape[axis]) at[axis--] = 0;
        if (axis < 0) return;
    }
}

/* --------------------------------------------------------------------------------------------------- parts */

static struct { mpq_model *model; int64_t last; int calls; double ms; } parts[MOST_PARTS];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static int call(const instruction *each, int64_t number, const int64_t *inputs, int given, const char *folder, int threads) {
    int part = (int)each->a.buffer;
    double begin = now();
    if (!parts[part].model) {
        char path[4096];
        snprintf(path, sizeof path, "%s/%s/weights.safetensors", folder, mpq_name(part));
        if (!(parts[part].model = mpq_open_model(part, path, threads))) return refuse(mpq_error(), "");
    }
    const void *data[MOST_INPUTS];
    for (int i = 0; i < given; i++) data[i] = memory[inputs[i]];
    if (mpq_run(parts[part].model, (int)each->b.buffer, data, memory[each->to.buffer]))
        return complain("%s: %s", mpq_name(part), mpq_error());
    parts[part].calls++;
    if (parts[part].last == number) {
        mpq_close(parts[part].model);
        parts[part].model = NULL;
    }
    parts[part].ms += now() - begin;
    if (isatty(2)) fprintf(stderr, "\r%s: call %d\033[K", mpq_name(part), parts[part].calls);
    return 0;
}

static void written(void *file, void *data, int size) { fwrite(data, 1, (size_t)size, file); }

static int save(FILE *file, const void *data) {
    const instruction *each = data;
    int height = (int)each->shape[0], width = (int)each->shape[1], channels = (int)each->shape[2];
    return !stbi_write_png_to_func(written, file, width, height, channels, memory[each->a.buffer], width * channels) ||
           ferror(file);
}

static int run(const char *constants, const char *folder, const char *output, int threads) {
    int64_t inputs[MOST_INPUTS];
    int given = 0;
    for (int64_t i = 0; i < instruction_count; i++)
        if (program[i].operation == CALL) parts[program[i].a.buffer].last = i;
    for (int64_t i = 0; i < buffer_count; i++)
        if (buffers[i].constant >= 0) memory[i] = (char *)constants + buffers[i].constant;
    for (int64_t i = 0; i < instruction_count; i++) {
        const instruction *each = &program[i];
        if (each->operation == INPUT) {
            inputs[given++] = each->a.buffer;
            continue;
        }
        if (each->operation != PICTURE && !memory[each->to.buffer]) {
            const description *d = &buffers[each->to.buffer];
            if (!(memory[each->to.buffer] = malloc((size_t)d->elements * size_of[d->type]))) return refuse("there is no memory", "");
        }
        if (each->operation == PICTURE && write_whole(output, save, each)) return 1;
        if (each->operation == CALL && call(each, i, inputs, given, folder, threads)) return 1;
        if (each->operation < INPUT) compute(each);
        int64_t had[] = {each->to.buffer, each->a.buffer, each->b.buffer};
        for (int k = 0; k < (each->operation == CALL ? given : 3); k++) {
            int64_t buffer = each->operation == CALL ? inputs[k] : had[k];
            if (!is_buffer(buffer, -1) || last[buffer] != i || buffers[buffer].constant >= 0) continue;
            free(memory[buffer]);
            memory[buffer] = NULL;
        }
        given = 0;
    }
    return 0;
}

/* A tensor of this name and type, of rows where these have bytes; NULL: there is none. */
static const void *table_of(const tensor_file *file, const char *name, const char *dtype, size_t row, uint64_t *bytes) {
    const entry *found = find(file, name);
    if (!found || strcmp(found->dtype, dtype) || found->ndim != (row ? 2 : 1)) return NULL;
    if (row && found->shape[1] * sizeof(int64_t) != row) return NULL;
    *bytes = found->end - found->begin;
    return read_tensor(file, found);
}

int main(int count, char **words) {
    const char *tokens = NULL, *output = NULL, *folder = NULL;
    static char own[4096];
    int threads = 1, bad = 0;
    for (int i = 1; i < count; i++) {
        const char *option = words[i], *value = i + 1 < count ? words[i + 1] : NULL;
        if (!strcmp(option, "--help")) {
            puts("mpq_run --tokens FILE -o PICTURE.png [--folder DIR] [--threads N] [--key PUBLIC]\n\n"
                 "FILE is made by `mpqc tokenize`; DIR has the parts, each with its weights (that of this program), and with\n"
                 "--key the signature of the owner of that key.");
            return 0;
        }
        if (!value) return refuse("this option needs a value, or is not known:", option);
        if (!strcmp(option, "--output")) option = words[i] = "-o";
        if (is_repeated(words, i)) return complain("%s is given twice; give it once", option);
        if (!strcmp(option, "--tokens")) tokens = value;
        else if (!strcmp(option, "-o")) output = value;
        else if (!strcmp(option, "--folder")) folder = value;
        else if (!strcmp(option, "--threads")) bad |= count_of(option, value, MOST_THREADS, &threads);
        else if (!strcmp(option, "--key")) {
            if (mpq_trust(value)) return refuse(mpq_error(), "");
        } else return refuse("this option is not known:", option);
        i++;
    }
    if (!tokens || !output) return refuse("give the file of tokens and the picture: --tokens FILE -o PICTURE.png", "");
    if (bad) return 1;
    if (is_same_file(output, tokens)) return complain("-o %s is a file that is read; name another", output);
    if (!folder) {
        const char *end = strrchr(words[0], '/');
        snprintf(own, sizeof own, "%.*s", end ? (int)(end - words[0]) : 1, end ? words[0] : ".");
        folder = own;
    }
    tensor_file file;
    if (open_tensors(tokens, &file)) return 1;
    uint64_t described, listed, constant_bytes, digests;
    buffers = table_of(&file, "buffers", "I64", sizeof *buffers, &described);
    program = table_of(&file, "instructions", "I64", sizeof *program, &listed);
    const char *constants = table_of(&file, "constants", "U8", 0, &constant_bytes);
    const uint8_t *made_for = table_of(&file, "parts", "U8", 0, &digests);
    size_t known = 4;
    for (size_t i = 0; i < file.count; i++) known += is_padding(&file.entries[i]);
    if (!buffers || !program || !constants || !made_for || file.count != known) return refuse(damaged, tokens);
    close_tensors(&file);
    if (digests != 32u * (size_t)mpq_models() || memcmp(made_for, mpq_the_parts, digests))
        return refuse("made for another pipeline than this one, tokenize with it again:", tokens);
    buffer_count = (int64_t)(described / sizeof *buffers);
    instruction_count = (int64_t)(listed / sizeof *program);
    memory = calloc((size_t)buffer_count + 1, sizeof *memory);
    last = calloc((size_t)buffer_count + 1, sizeof *last);
    if (!memory || !last) return refuse("there is no memory", "");
    if (mpq_models() > MOST_PARTS || !is_program(constant_bytes)) return refuse(damaged, tokens);
    if (run(constants, folder, output, threads)) return 1;
    if (isatty(2)) fputs("\r\033[K", stderr);
    for (int i = 0; i < mpq_models(); i++) printf("%s: %d calls, %.1f ms\n", mpq_name(i), parts[i].calls, parts[i].ms);
    printf("wrote %s\n", output);
    return 0;
}
