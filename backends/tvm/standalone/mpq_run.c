/* Runs a compiled denoiser on safetensors files:
 *
 *   mpq_run [--weights FILE] [--inputs FILE] [--output FILE] [--function NAME] [--threads N] [--repeat N]
 *           [--reuse yes] [--profile kernels] [--key PUBLIC]
 *
 * Without inputs all are zeros. Times go to standard output: of calls that compute everything, with `--reuse yes` of calls
 * that know what depends on timesteps and texts alone. `--profile kernels` adds those of each call of a kernel, in
 * order; of one thread it takes CPU time, which leaves out what else the device does. `--key` refuses what the owner of that
 * key has not signed. */
#define _XOPEN_SOURCE 700
#include "mpq_files.h"

#include <sys/utsname.h>
#include <time.h>

typedef struct {
    const mpq_tensor *about;
    const void *data;
} result;

static int save(FILE *file, const void *data) {
    const mpq_tensor *about = ((const result *)data)->about;
    char header[1024];
    int used = snprintf(header, sizeof header, "{\"%s\":{\"dtype\":\"%s\",\"shape\":[", about->name, about->dtype);
    for (int i = 0; i < about->ndim; i++)
        used += snprintf(header + used, sizeof header - used, "%s%" PRId64, i ? "," : "", about->shape[i]);
    used += snprintf(header + used, sizeof header - used, "],\"data_offsets\":[0,%zu]}}", about->bytes);
    while (used % 8) header[used++] = ' ';
    uint64_t size = (uint64_t)used;
    return fwrite(&size, 8, 1, file) != 1 || fwrite(header, (size_t)used, 1, file) != 1 ||
           fwrite(((const result *)data)->data, about->bytes, 1, file) != 1;
}

static const char *shape_of(char *text, size_t room, int count, const int64_t *shape) {
    size_t used = (size_t)snprintf(text, room, "[");
    for (int i = 0; i < count && used < room; i++)
        used += (size_t)snprintf(text + used, room - used, "%s%" PRId64, i ? ", " : "", shape[i]);
    if (used < room) snprintf(text + used, room - used, "]");
    return text;
}

static const char *names_of(char *text, size_t room, const mpq_function *own) {
    size_t used = 0;
    for (int i = 0; i < own->inputs && used < room; i++)
        used += (size_t)snprintf(text + used, room - used, "%s%s", i ? ", " : "", own->input[i].name);
    return text;
}

/* The inputs of a function, all of them and nothing else, from a file, or zeros. 0, or 1 behind a sentence. */
static int read_inputs(const char *path, const mpq_function *own, const void **data) {
    tensor_file file;
    char shape[256], taken[256], names[1024];
    if (path && open_tensors(path, &file)) return 1;
    for (size_t k = 0; path && k < file.count; k++) {
        int i = 0;
        while (i < own->inputs && strcmp(own->input[i].name, file.entries[k].name)) i++;
        if (i == own->inputs && !is_padding(&file.entries[k]))
            return complain("this artifact has no input '%s': there is: %s", file.entries[k].name,
                            names_of(names, sizeof names, own));
    }
    for (int i = 0; i < own->inputs; i++) {
        const mpq_tensor *input = &own->input[i];
        const entry *given = path ? find(&file, input->name) : NULL;
        if (path && !given)
            return complain("input '%s' is missing; this artifact takes %s", input->name,
                            names_of(names, sizeof names, own));
        if (given && strcmp(given->dtype, input->dtype))
            return complain("input '%s' is %s; this artifact takes %s", input->name, given->dtype, input->dtype);
        bool fits = !given || given->ndim == input->ndim;
        for (int d = 0; given && fits && d < input->ndim; d++) fits = given->shape[d] == (uint64_t)input->shape[d];
        if (!fits)
            return complain("input '%s' has shape %s; %s takes %s", input->name,
                            shape_of(shape, sizeof shape, given->ndim, (const int64_t *)given->shape), own->name,
                            shape_of(taken, sizeof taken, input->ndim, input->shape));
        data[i] = given ? read_tensor(&file, given) : calloc(1, input->bytes);
        if (!data[i]) return given ? 1 : refuse("there is no memory", "");
    }
    if (path) close_tensors(&file);
    return 0;
}

static double now(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a - *(const double *)b;
    return (x > 0) - (x < 0);
}

/* Milliseconds of each kernel call of a function, `repeat` for one behind those for another. */
typedef struct {
    clockid_t clock;
    double last, *times;
    const char **names;
    int repeat, turn, call;
} profile;

static void watch(void *data, const char *kernel) {
    profile *own = data;
    double time = now(own->clock);
    if (kernel) {
        own->times[own->call * own->repeat + own->turn] = time - own->last;
        own->names[own->call++] = kernel;
    }
    own->last = time;
}

/* What the device is called: by its CPU, else its board, else its architecture (as mpq_compiler/support/host.py has it). */
static const char *device(void) {
    static char line[4096], name[256];
    static struct utsname system;
    FILE *file = fopen("/proc/cpuinfo", "r");
    while (file && fgets(line, sizeof line, file))
        if (!*name) sscanf(line, "model name : %255[^\n]", name);
    if (file) fclose(file);
    if (!*name && (file = fopen("/proc/device-tree/model", "r"))) {
        if (!fgets(name, sizeof name, file)) *name = 0;
        fclose(file);
    }
    return *name || uname(&system) ? name : system.machine;
}

int main(int count, char **words) {
    const char *weights = "weights.safetensors", *inputs = NULL, *output = NULL, *name = NULL, *profiled = NULL;
    int threads = 1, repeat = 1, reuse = 0, bad = 0, functions, chosen = 0;
    for (int i = 1; i < count; i++) {
        const char *option = words[i], *value = i + 1 < count ? words[i + 1] : NULL;
        if (!strcmp(option, "--help")) {
            puts("mpq_run [--weights FILE] [--inputs FILE] [--output FILE] [--function NAME] [--threads N] [--repeat N]\n"
                 "        [--reuse yes] [--profile kernels] [--key PUBLIC]");
            return 0;
        }
        if (!value) return refuse("this option needs a value, or is not known:", option);
        if (is_repeated(words, i)) return complain("%s is given twice; give it once", option);
        if (!strcmp(option, "--weights")) weights = value;
        else if (!strcmp(option, "--inputs")) inputs = value;
        else if (!strcmp(option, "--output")) output = value;
        else if (!strcmp(option, "--function")) name = value;
        else if (!strcmp(option, "--threads")) bad |= count_of(option, value, MOST_THREADS, &threads);
        else if (!strcmp(option, "--repeat")) bad |= count_of(option, value, MOST_REPEATS, &repeat);
        else if (!strcmp(option, "--reuse")) bad |= one_of(option, value, "yes"), reuse = 1;
        else if (!strcmp(option, "--profile")) bad |= one_of(option, value, "kernels"), profiled = value;
        else if (!strcmp(option, "--key")) {
            if (mpq_trust(value)) return refuse(mpq_error(), "");
        } else return refuse("this option is not known:", option);
        i++;
    }
    if (bad) return 1;
    if (output && (is_same_file(output, inputs) || is_same_file(output, weights)))
        return complain("--output %s is a file that is read; name another", output);
    const mpq_function *all = mpq_functions(&functions);
    while (name && chosen < functions && strcmp(all[chosen].name, name)) chosen++;
    if (chosen == functions) {
        fprintf(stderr, "error: there is no function '%s'; there are", name);
        for (int i = 0; i < functions; i++) fprintf(stderr, " %s", all[i].name);
        fputc('\n', stderr);
        return 1;
    }
    const mpq_function *own = &all[chosen];
    const void **data = calloc((size_t)own->inputs, sizeof *data);
    void *made = malloc(own->output.bytes);
    double *times = calloc((size_t)repeat, sizeof *times);
    profile each = {.clock = profiled && threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, .repeat = repeat};
    each.times = calloc((size_t)own->calls * (size_t)repeat, sizeof *each.times);
    each.names = calloc((size_t)own->calls, sizeof *each.names);
    if (!data || !made || !times || !each.times || !each.names) return refuse("there is no memory", "");
    if (read_inputs(inputs, own, data)) return 1;
    double begin = now(each.clock);
    mpq_model *model = mpq_open(weights, threads);
    if (!model) return refuse(mpq_error(), "");
    printf("%s: opened in %.1f ms, %.1f MiB of memory\n", own->name, now(each.clock) - begin,
           (double)mpq_bytes(model) / (1 << 20));
    for (int i = 0; i < repeat; i++) {
        if (!reuse) mpq_forget(model);
        begin = now(each.clock);
        if (mpq_run(model, chosen, data, made)) return refuse(mpq_error(), "");
        times[i] = now(each.clock) - begin;
        if (!profiled) continue;
        each.turn = i;
        each.call = 0;
        if (mpq_watch(model, watch, &each)) return refuse(mpq_error(), "");
        if (mpq_run(model, chosen, data, made)) return refuse(mpq_error(), "");
        mpq_watch(model, NULL, NULL);
    }
    qsort(times, (size_t)repeat, sizeof *times, by_value);
    printf("%d calls: median %.3f ms, least %.3f ms, most %.3f ms\n", repeat, times[repeat / 2], times[0],
           times[repeat - 1]);
    if (profiled) printf("kernels on %s, %s time\n", device(), threads == 1 ? "CPU" : "wall");
    for (int i = 0; profiled && i < own->calls; i++) {
        double *row = each.times + (size_t)i * (size_t)repeat;
        qsort(row, (size_t)repeat, sizeof *row, by_value);
        printf("%12.3f us  %s\n", 1e3 * row[repeat / 2], each.names[i]);
    }
    mpq_close(model);
    return output ? write_whole(output, save, &(result){&own->output, made}) : 0;
}
