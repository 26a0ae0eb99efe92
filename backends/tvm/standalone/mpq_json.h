/* Strict JSON (RFC 8259) for headers of tensors, of mpq_files.h: the caller says what comes next, so that nothing nests
 * deeper than it asks. Text is that of a buffer, in which strings are decoded in place. */
#ifndef MPQ_JSON_H
#define MPQ_JSON_H

#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef struct {
    char *at, *end;
    char fault[512]; /* what is wrong, once a function has said false or NULL */
} json;

static const char *const not_json = "its header is not JSON";

__attribute__((format(printf, 2, 3))) static bool json_fault(json *text, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text->fault, sizeof text->fault, format, arguments);
    va_end(arguments);
    return false;
}

static void json_space(json *text) {
    while (text->at < text->end && strchr(" \t\r\n", *text->at) && *text->at) text->at++;
}

/* Whether this character comes next, which is then behind. */
static bool json_is(json *text, char wanted) {
    json_space(text);
    bool found = text->at < text->end && *text->at == wanted;
    text->at += found;
    return found;
}

static bool json_needs(json *text, char wanted) { return json_is(text, wanted) || json_fault(text, not_json); }

/* Whether another item of a list or object follows. Its end is then behind; else there is a fault. */
static bool json_goes_on(json *text, char end) { return json_is(text, ',') || (json_needs(text, end), false); }

static bool json_hex(json *text, uint32_t *code) {
    *code = 0;
    if (text->end - text->at < 4) return false;
    for (int i = 0; i < 4; i++) {
        const char *digits = "0123456789abcdef0123456789ABCDEF", c = *text->at++, *place = c ? strchr(digits, c) : NULL;
        if (!place) return false;
        *code = *code << 4 | (uint32_t)((place - digits) & 15);
    }
    return true;
}

/* What follows a backslash, as a code point. */
static bool json_escape(json *text, uint32_t *code) {
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    uint32_t low;
    if (text->at == text->end) return false;
    char c = *text->at++;
    if (c == 'u') {
        if (!json_hex(text, code) || *code >> 10 == 0x37) return false;
        if (*code >> 10 != 0x36) return true;
        if (text->end - text->at < 2 || *text->at++ != '\\' || *text->at++ != 'u') return false;
        if (!json_hex(text, &low) || low >> 10 != 0x37) return false;
        *code = 0x10000 + ((*code & 0x3ff) << 10 | (low & 0x3ff));
        return true;
    }
    const char *place = c ? strchr(names, c) : NULL;
    if (place) *code = (uint32_t)values[place - names];
    return place;
}

/* A character of UTF-8, in its shortest form. */
static bool json_utf8(json *text, uint32_t *code) {
    static const uint32_t least[] = {0, 0x80, 0x800, 0x10000};
    unsigned char first = (unsigned char)*text->at++;
    int more = first < 0x80 ? 0 : first >> 5 == 6 ? 1 : first >> 4 == 14 ? 2 : first >> 3 == 30 ? 3 : -1;
    if (more < 0 || text->end - text->at < more) return false;
    *code = more ? first & (0x3f >> more) : first;
    for (int i = 0; i < more; i++) {
        unsigned char next = (unsigned char)*text->at++;
        if (next >> 6 != 2) return false;
        *code = *code << 6 | (next & 0x3f);
    }
    return *code >= least[more] && *code >> 11 != 0x1b && *code < 0x110000;
}

static char *json_encoded(char *to, uint32_t code) {
    int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    *to++ = (char)(more ? (0xf00u >> more & 0xff) | code >> 6 * more : code);
    while (more--) *to++ = (char)(0x80 | (code >> 6 * more & 0x3f));
    return to;
}

/* A string, which ends with a zero; it cannot hold one. */
static char *json_string(json *text) {
    if (!json_needs(text, '"')) return NULL;
    char *begin = text->at, *to = begin;
    while (text->at < text->end && *text->at != '"') {
        uint32_t code;
        bool escaped = *text->at == '\\';
        text->at += escaped;
        bool good = escaped ? json_escape(text, &code) : json_utf8(text, &code) && code >= ' ';
        if (!good || !code) return json_fault(text, not_json), NULL;
        to = json_encoded(to, code); /* no longer than what it is made of */
    }
    if (!json_needs(text, '"')) return NULL;
    *to = 0;
    return begin;
}

/* A size: a whole number from 0 to 2^63 - 1. */
static bool json_size(json *text, uint64_t *found) {
    json_space(text);
    const char *begin = text->at;
    for (*found = 0; text->at < text->end && *text->at >= '0' && *text->at <= '9'; text->at++) {
        uint64_t digit = (uint64_t)(*text->at - '0');
        if (__builtin_mul_overflow(*found, 10u, found) || __builtin_add_overflow(*found, digit, found)) return false;
    }
    bool other = text->at < text->end && strchr(".eE", *text->at) && *text->at;
    return text->at > begin && !(*begin == '0' && text->at > begin + 1) && !other && *found <= INT64_MAX;
}

#endif
