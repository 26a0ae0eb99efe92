/* Files of tensors, of mpq_run.c and mpq_draw.c. */
#ifndef MPQ_FILES_H
#define MPQ_FILES_H

#include "mpq.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int refuse(const char *what, const char *which) {
    fprintf(stderr, "error: %s%s%s\n", what, *which ? " " : "", which);
    return 1;
}

static char *whole(const char *path, size_t *bytes) {
    FILE *file = fopen(path, "rb");
    char *data = NULL;
    long size = -1;
    if (file && !fseek(file, 0, SEEK_END) && (size = ftell(file)) >= 0 && !fseek(file, 0, SEEK_SET) &&
        (data = malloc((size_t)size + 1)) && fread(data, 1, (size_t)size, file) == (size_t)size)
        data[*bytes = (size_t)size] = 0;
    else {
        free(data);
        data = NULL;
    }
    if (file) fclose(file);
    return data;
}

/* Where a tensor's bytes lie in a safetensors file, and how many, if it has this name and type there. Headers are JSON;
 * names and types hold nothing that would be escaped. */
static const char *find(const char *data, size_t bytes, const char *name, const char *dtype, size_t *found) {
    uint64_t header, from, to;
    if (bytes < 8) return NULL;
    memcpy(&header, data, 8);
    if (header > bytes - 8) return NULL;
    char key[512], type[32];
    snprintf(key, sizeof key, "\"%s\"", name);
    snprintf(type, sizeof type, "\"%s\"", dtype);
    const char *end = data + 8 + header, *at = data + 8;
    size_t length = strlen(key);
    for (; (at = memchr(at, '"', (size_t)(end - at))); at++) { /* metadata may have the name too, with no {...} */
        const char *next = at + length;
        if ((size_t)(end - at) <= length || memcmp(at, key, length) || *next != ':') continue;
        while (++next < end && *next == ' ') continue;
        if (next < end && *next == '{') break;
    }
    if (!at) return NULL;
    const char *close = memchr(at, '}', (size_t)(end - at));
    char entry[1024];
    if (!close || (size_t)(close - at) >= sizeof entry) return NULL;
    memcpy(entry, at, (size_t)(close - at));
    entry[close - at] = 0;
    const char *offsets = strstr(entry, "\"data_offsets\"");
    if (!offsets || !strstr(entry, type) || !(offsets = strchr(offsets, '[')) ||
        sscanf(offsets, "[%" SCNu64 ",%" SCNu64, &from, &to) != 2)
        return NULL;
    uint64_t room = bytes - 8 - header;
    if (from > to || to > room) return NULL;
    *found = to - from;
    return end + from;
}

#endif
