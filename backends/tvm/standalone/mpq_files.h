/* Options and files of tensors, of mpq_run.c and mpq_draw.c. Nothing of a claimed size is believed, or allocated,
 * before it is held against the file; the sentences are those of mpq_compiler/support/tensorfile.py. */
#ifndef MPQ_FILES_H
#define MPQ_FILES_H

#include "mpq.h"
#include "mpq_json.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

/* Says a sentence; returns the exit code of all that is refused. */
__attribute__((format(printf, 1, 2))) static int complain(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("error: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    return 1;
}

static int refuse(const char *what, const char *which) { return complain("%s%s%s", what, *which ? " " : "", which); }

/* -------------------------------------------------------------------------------------------------- options */

/* Whether the option in words[place] stands in an earlier pair of an option and its value. */
static bool is_repeated(char **words, int place) {
    for (int i = 1; i < place; i += 2)
        if (!strcmp(words[i], words[place])) return true;
    return false;
}

/* 0, and the number that an option's value is. */
static int count_of(const char *option, const char *value, int most, int *found) {
    int64_t number = 0;
    const char *at = value;
    for (; *at >= '0' && *at <= '9' && number <= most; at++) number = 10 * number + (*at - '0');
    if (*at || number < 1 || number > most)
        return complain("%s is '%s'; it must be a whole number from 1 to %d", option, value, most);
    *found = (int)number;
    return 0;
}

/* 0, where the value is the one that there is. */
static int one_of(const char *option, const char *value, const char *known) {
    return strcmp(value, known) ? complain("%s is '%s'; it can be '%s'", option, value, known) : 0;
}

enum { MOST_THREADS = 1024, MOST_REPEATS = 1000000 };

/* -------------------------------------------------------------------------------------------------- reading */

enum { MOST_EXTENTS = 8, MOST_HEADER = 1 << 20 };

typedef struct {
    const char *name, *dtype;
    int ndim;
    uint64_t shape[MOST_EXTENTS], begin, end;
} entry;

typedef struct {
    const char *path;
    int handle;
    uint64_t start, size; /* where tensors begin, where the file ends */
    char *header;
    entry *entries; /* by name */
    size_t count;
} tensor_file;

static int by_name(const void *a, const void *b) { return strcmp(((const entry *)a)->name, ((const entry *)b)->name); }

static int by_place(const void *a, const void *b) {
    const entry *x = a, *y = b;
    return x->begin != y->begin ? x->begin < y->begin ? -1 : 1 : (x->end > y->end) - (x->end < y->end);
}

/* The bits of an element; 0 of a type that there is not. */
static unsigned bits_of(const char *dtype) {
    static const struct { const char *name; unsigned bits; } all[] = {
        {"BOOL", 8}, {"U8", 8}, {"I8", 8}, {"U16", 16}, {"I16", 16}, {"U32", 32}, {"I32", 32}, {"U64", 64}, {"I64", 64},
        {"F16", 16}, {"F32", 32}, {"F64", 64}, {"C64", 64}, {"BF16", 16}, {"F8_E4M3", 8}, {"F8_E5M2", 8},
        {"F8_E8M0", 8}, {"F4", 4}, {"F6_E2M3", 6}, {"F6_E3M2", 6},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!strcmp(all[i].name, dtype)) return all[i].bits;
    return 0;
}

static bool read_sizes(json *text, const char *name, uint64_t *sizes, int most, int *count) {
    *count = 0;
    if (!json_needs(text, '[')) return false;
    if (json_is(text, ']')) return true;
    do
        if (*count == most || !json_size(text, &sizes[(*count)++]))
            return json_fault(text, "the entry of tensor '%s' holds something that is not a size", name);
    while (json_goes_on(text, ']'));
    return !*text->fault;
}

/* {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}, in any order and with nothing else. */
static bool read_entry(json *text, entry *made) {
    uint64_t span[2];
    int spans = 0;
    bool shaped = false;
    if (!json_needs(text, '{')) return false;
    do {
        const char *key = json_string(text);
        if (!key || !json_needs(text, ':')) return false;
        bool good = false;
        if (!strcmp(key, "dtype")) {
            good = !made->dtype;
            made->dtype = good ? json_string(text) : NULL;
        } else if (!strcmp(key, "shape")) {
            good = !shaped;
            shaped = good && read_sizes(text, made->name, made->shape, MOST_EXTENTS, &made->ndim);
        } else if (!strcmp(key, "data_offsets")) good = !spans && read_sizes(text, made->name, span, 2, &spans);
        if (*text->fault) return false;
        if (!good) return json_fault(text, "the entry of tensor '%s' says '%s', unknown or twice", made->name, key);
    } while (json_goes_on(text, '}'));
    if (*text->fault) return false;
    unsigned bits = made->dtype ? bits_of(made->dtype) : 0;
    if (!bits || !shaped || spans != 2)
        return json_fault(text, "the entry of tensor '%s' is incomplete or has an unknown type", made->name);
    made->begin = span[0], made->end = span[1];
    uint64_t needed = bits;
    bool fits = span[0] <= span[1];
    for (int i = 0; i < made->ndim; i++) fits &= !__builtin_mul_overflow(needed, made->shape[i], &needed);
    return (fits && needed % 8 == 0 && needed / 8 == span[1] - span[0]) ||
           json_fault(text, "tensor '%s' does not fill the bytes of its shape", made->name);
}

/* Sorts them by name. */
static bool differ(json *text, entry *all, size_t count) {
    qsort(all, count, sizeof *all, by_name);
    for (size_t i = 1; i < count; i++)
        if (!strcmp(all[i - 1].name, all[i].name)) return json_fault(text, "its header names '%s' twice", all[i].name);
    return true;
}

/* Texts by name, which nobody reads. `room`: for their names. */
static bool read_metadata(json *text, entry *room) {
    size_t count = 0;
    if (!json_needs(text, '{')) return false;
    if (json_is(text, '}')) return true;
    do
        if (!(room[count++].name = json_string(text)) || !json_needs(text, ':') || !json_string(text)) return false;
    while (json_goes_on(text, '}'));
    return !*text->fault && differ(text, room, count);
}

static bool is_printable(const char *name) {
    for (; *name; name++)
        if ((unsigned char)*name < ' ' || *name == 127) return false;
    return true;
}

/* Entries that differ, and fill the file behind the header from end to end. */
static bool read_entries(json *text, tensor_file *file) {
    bool described = false;
    uint64_t end = 0;
    if (!json_needs(text, '{')) return false;
    if (!json_is(text, '}')) {
        do {
            entry *each = &file->entries[file->count];
            memset(each, 0, sizeof *each);
            if (!(each->name = json_string(text)) || !json_needs(text, ':')) return false;
            if (!is_printable(each->name)) return json_fault(text, "the name of a tensor holds a control character");
            if (strcmp(each->name, "__metadata__")) {
                if (!read_entry(text, each)) return false;
                file->count++;
            } else if (described || !read_metadata(text, each))
                return described ? json_fault(text, "its header names '%s' twice", each->name) : false;
            else described = true;
        } while (json_goes_on(text, '}'));
    }
    json_space(text);
    if (*text->fault || text->at < text->end) return json_fault(text, not_json);
    qsort(file->entries, file->count, sizeof *file->entries, by_place);
    for (size_t i = 0; i < file->count; i++) {
        const entry *each = &file->entries[i];
        if (each->begin != end)
            return json_fault(text, "tensor '%s' begins at byte %" PRIu64 " where %" PRIu64 " is expected", each->name,
                              each->begin, end);
        end = each->end;
    }
    if (file->start + end != file->size)
        return json_fault(text, "its tensors end at byte %" PRIu64 ", the file has %" PRIu64, file->start + end,
                          file->size);
    return differ(text, file->entries, file->count);
}

static bool read_exactly(int handle, void *to, uint64_t bytes, uint64_t from) {
    for (ssize_t done; bytes; bytes -= (uint64_t)done, from += (uint64_t)done, to = (char *)to + done) {
        done = pread(handle, to, bytes, (off_t)from);
        if (done < 0 && errno == EINTR) done = 0;
        else if (done <= 0) return false;
    }
    return true;
}

static void close_tensors(tensor_file *file) {
    if (file->handle >= 0) close(file->handle);
    free(file->header);
    free(file->entries);
}

/* Reads and checks the header. 0, or 1 behind a sentence. */
static int open_tensors(const char *path, tensor_file *file) {
    struct stat about;
    *file = (tensor_file){.path = path, .handle = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
    if (file->handle < 0 || fstat(file->handle, &about)) return complain("cannot read %s: %s", path, strerror(errno));
    if (!S_ISREG(about.st_mode)) return complain("cannot read %s: it is not a file", path);
    file->size = (uint64_t)about.st_size;
    unsigned char first[8];
    uint64_t length = 0;
    json text = {0};
    if (file->size < 8) json_fault(&text, "it has only %" PRIu64 " bytes", file->size);
    else if (!read_exactly(file->handle, first, 8, 0)) return complain("cannot read %s", path);
    for (int i = 8; i-- && !*text.fault;) length = length << 8 | first[i];
    if (!*text.fault && (length > file->size - 8 || length > MOST_HEADER))
        json_fault(&text, "its header claims %" PRIu64 " bytes, the file has %" PRIu64, length, file->size);
    if (!*text.fault) {
        file->start = 8 + length;
        file->header = malloc(length + 1);
        file->entries = malloc((length / 6 + 2) * sizeof *file->entries); /* the least of all pairs is "":"", */
        if (!file->header || !file->entries) return refuse("there is no memory", "");
        if (!read_exactly(file->handle, file->header, length, 8)) return complain("cannot read %s", path);
        text.at = file->header, text.end = file->header + length;
        read_entries(&text, file);
    }
    return *text.fault ? complain("%s is not a sound safetensors file: %s; get the file again", path, text.fault) : 0;
}

static const entry *find(const tensor_file *file, const char *name) {
    const entry wanted = {.name = name};
    return file->count ? bsearch(&wanted, file->entries, file->count, sizeof wanted, by_name) : NULL;
}

/* The bytes of a tensor, in memory of their own; NULL behind a sentence. */
static void *read_tensor(const tensor_file *file, const entry *which) {
    void *data = malloc(which->end - which->begin + 1);
    if (!data) return refuse("there is no memory", ""), NULL;
    if (read_exactly(file->handle, data, which->end - which->begin, file->start + which->begin)) return data;
    free(data);
    return complain("cannot read %s: it was changed meanwhile", file->path), NULL;
}

/* Padding, which files of this compiler have between tensors. */
static bool is_padding(const entry *which) { return !strncmp(which->name, "__pad", 5); }

/* -------------------------------------------------------------------------------------------------- writing */

static bool is_same_file(const char *a, const char *b) {
    struct stat x, y;
    return a && b && !stat(a, &x) && !stat(b, &y) && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

static int filled(FILE *file, int (*fill)(FILE *, const void *), const void *data) {
    int bad = fill(file, data) || fflush(file);
    if (!bad && fsync(fileno(file)) && errno != EINVAL && errno != EROFS) bad = 1; /* pipes and devices have no disk */
    return fclose(file) || bad;
}

/* A file whole or not at all: written beside its place, brought to the disk, renamed. A symbolic link stays one; a pipe
 * or device is written to directly. 0, or 1 behind a sentence. */
static int write_whole(const char *path, int (*fill)(FILE *, const void *), const void *data) {
    struct stat about;
    char *real = realpath(path, NULL), beside[4096];
    const char *to = real ? real : path, *slash = strrchr(to, '/');
    sigset_t all, before;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, &before); /* what ends the program leaves nothing beside */
    int bad, folder = slash ? (int)(slash + 1 - to) : 0;
    if (!stat(to, &about) && !S_ISREG(about.st_mode)) {
        FILE *file = fopen(to, "wb");
        bad = !file || filled(file, fill, data);
    } else if (snprintf(beside, sizeof beside, "%.*s.%s.XXXXXX", folder, to, to + folder) >= (int)sizeof beside) {
        errno = ENAMETOOLONG;
        bad = 1;
    } else {
        int handle = mkstemp(beside);
        mode_t mask = umask(0);
        umask(mask);
        FILE *file = handle < 0 ? NULL : fdopen(handle, "wb");
        bad = !file || fchmod(handle, 0666 & ~mask) || filled(file, fill, data) || rename(beside, to);
        int reason = errno;
        if (bad && handle >= 0) unlink(beside);
        errno = reason;
    }
    if (bad) complain("cannot write %s: %s", path, strerror(errno));
    free(real);
    sigprocmask(SIG_SETMASK, &before, NULL);
    return bad;
}

#endif
