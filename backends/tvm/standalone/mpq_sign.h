/* Files that the owner of a key has signed: signature.txt beside them has the SHA-512 of each (docs/artifact.md). Of
 * mpq_common.h, for whose fail() it stands there. */
#ifndef MPQ_SIGN_H
#define MPQ_SIGN_H

#include "monocypher-ed25519.h"
#include "mpq_owner.h"

#include <limits.h>

enum { KEY = 32, HASH = 64, SIGNATURE = 64, MOST_KEY = 1 << 16, MOST_SIGNATURE = 1 << 20 };

static uint8_t owner[KEY];
static bool has_owner; /* else nobody has to have signed */

/* Bytes of lower-case hexadecimal, as this program and Python write it. */
static bool from_hex(const char *text, uint8_t *bytes, size_t count) {
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < 2 * count; i++) {
        const char *at = text[i] ? strchr(digits, text[i]) : NULL;
        if (!at) return false;
        bytes[i / 2] = (uint8_t)(bytes[i / 2] << 4 | (at - digits));
    }
    return true;
}

static void to_hex(const uint8_t *bytes, size_t count, char *text) {
    for (size_t i = 0; i < count; i++) snprintf(text + 2 * i, 3, "%02x", bytes[i]);
}

/* A small file, with a NUL behind its end; NULL with errno, or 0 where it is larger than `most`. */
static char *small_file(const char *path, size_t most, size_t *bytes) {
    FILE *file = fopen(path, "rb");
    char *data = file ? malloc(most + 2) : NULL;
    if (data) {
        *bytes = fread(data, 1, most + 1, file);
        data[*bytes] = 0;
        errno = ferror(file) ? EIO : 0;
        if (errno || *bytes > most) {
            free(data);
            data = NULL;
        }
    }
    int code = errno;
    if (file) fclose(file);
    errno = code;
    return data;
}

/* The key in PEM: DER of 12 bytes that say Ed25519 (RFC 8410), and the 32 of the key, as base64. */
static bool from_pem(const char *text, uint8_t *key) {
    static const char begin[] = "-----BEGIN PUBLIC KEY-----", end[] = "-----END PUBLIC KEY-----";
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    static const uint8_t kind[] = {0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00};
    uint8_t found[sizeof kind + KEY];
    size_t count = 0, bits = 0;
    uint32_t held = 0;
    if (!(text = strstr(text, begin))) return false;
    for (text += sizeof begin - 1; *text && *text != '=' && *text != '-'; text++) {
        const char *at = strchr(digits, *text);
        if (!at && strchr(" \t\r\n", *text)) continue;
        if (!at || count == sizeof found) return false;
        held = held << 6 | (uint32_t)(at - digits);
        if ((bits += 6) >= 8) found[count++] = (uint8_t)(held >> (bits -= 8));
    }
    text += strspn(text, "= \t\r\n");
    if (count != sizeof found || strncmp(text, end, sizeof end - 1) || memcmp(found, kind, sizeof kind)) return false;
    memcpy(key, found + sizeof kind, KEY);
    return true;
}

/* 64 digits, with white space around them. */
static bool from_digits(const char *text, uint8_t *key) {
    char lower[2 * KEY];
    text += strspn(text, " \t\r\n");
    if (strspn(text, "0123456789abcdefABCDEF") != sizeof lower) return false;
    for (size_t i = 0; i < sizeof lower; i++) lower[i] = (char)(text[i] | 32); /* which leaves digits as they are */
    text += sizeof lower;
    return !text[strspn(text, " \t\r\n")] && from_hex(lower, key, KEY);
}

/* The key that was built in. */
static bool know_owner(void) {
    if (has_owner || !*MPQ_OWNER_KEY) return true;
    has_owner = from_digits(MPQ_OWNER_KEY, owner);
    return has_owner || fail("this program was built with an owner's key that is none: build it again (mpq_owner.h)");
}

int mpq_trust(const char *key) {
    uint8_t given[KEY];
    size_t bytes = 0;
    if (!know_owner()) return -1;
    if (!from_digits(key, given)) {
        char *text = small_file(key, MOST_KEY, &bytes);
        if (!text) return fail("cannot read the key %s: %s", key, errno ? strerror(errno) : "it is too large"), -1;
        bool known = strlen(text) == bytes && (from_digits(text, given) || from_pem(text, given));
        free(text);
        if (!known) return fail("%s holds no public key of Ed25519, as PEM or as 64 hexadecimal digits", key), -1;
    }
    if (*MPQ_OWNER_KEY && memcmp(given, owner, KEY))
        return fail("%s is another key than the one that was built into this program", key), -1;
    memcpy(owner, given, KEY);
    has_owner = true;
    return 0;
}

/* A signature, and the name that it has for a file. */
typedef struct {
    char place[PATH_MAX + 32], name[PATH_MAX + 2];
} reference;

/* The text of the signature over a file: beside it, or, of a part of a pipeline, beside the part's folder. */
static char *signature_of(const char *path, reference *found, size_t *bytes) {
    const char *end = strrchr(path, '/'), *base = end ? end + 1 : path;
    char folder[PATH_MAX], whole[PATH_MAX];
    snprintf(folder, sizeof folder, "%.*s/", end ? (int)(end - path) : 1, end ? path : ".");
    snprintf(found->place, sizeof found->place, "%ssignature.txt", folder);
    snprintf(found->name, sizeof found->name, "%s", base);
    char *text = small_file(found->place, MOST_SIGNATURE, bytes), *part;
    if (text || errno != ENOENT || !realpath(folder, whole) || !(part = strrchr(whole, '/'))) return text;
    *part++ = 0;
    snprintf(found->place, sizeof found->place, "%s/signature.txt", whole);
    snprintf(found->name, sizeof found->name, "%s/%s", part, base);
    return small_file(found->place, MOST_SIGNATURE, bytes);
}

/* Whether a signature holds, all of it: lines `mpq-signature 1`, `key` ..., those of files, and `signature` ... */
static bool is_right(const char *place, const char *text, size_t bytes) {
    static const char first[] = "mpq-signature 1\nkey ", last[] = "\nsignature ";
    enum { HEAD = sizeof first - 1 + 2 * KEY + 1, TAIL = sizeof last - 1 + 2 * SIGNATURE + 1 };
    uint8_t key[KEY], made[SIGNATURE];
    const char *end = text + (bytes < TAIL ? 0 : bytes - TAIL); /* of what is signed, but for its last character */
    if (bytes < HEAD + TAIL || strlen(text) != bytes || memcmp(text, first, sizeof first - 1) ||
        !from_hex(text + sizeof first - 1, key, KEY) || text[HEAD - 1] != '\n' || memcmp(end, last, sizeof last - 1) ||
        !from_hex(end + sizeof last - 1, made, SIGNATURE) || text[bytes - 1] != '\n')
        return fail("%s is no signature, or only a part of one: copy it again", place);
    if (memcmp(key, owner, KEY)) {
        char hex[2 * KEY + 1];
        to_hex(key, KEY, hex);
        return fail("%s is of another key, %s, than whoever has to have signed", place, hex);
    }
    if (crypto_ed25519_check(made, owner, (const uint8_t *)text, (size_t)(end + 1 - text)))
        return fail("%s is altered: the owner of the key did not make it", place);
    return true;
}

/* Whether the owner signed a file of these bytes, or nobody has to. */
static bool is_signed(const char *path, const void *data, uint64_t bytes) {
    static const char none[] = "there is no signature.txt beside it";
    reference at;
    size_t length = 0;
    if (!know_owner()) return false;
    if (!has_owner) return true;
    char *text = signature_of(path, &at, &length);
    if (!text)
        return fail("%s has no signature, and has to be signed by the owner of the key: %s", path,
                    errno == ENOENT ? none : errno ? strerror(errno) : "signature.txt is too large");
    bool right = is_right(at.place, text, length);
    uint8_t hash[HASH];
    char hex[2 * HASH + 1], line[2 * HASH + 64], name[PATH_MAX + 8];
    size_t size = (size_t)snprintf(name, sizeof name, " %s\n", at.name);
    const char *listed = right ? strstr(text, name) : NULL; /* what is right is laid out as its owner did */
    if (right && !listed) right = fail("%s is none of the files that %s is over", path, at.place);
    while (listed && listed[-1] != '\n') listed--;
    if (right) {
        crypto_sha512(hash, data, bytes);
        to_hex(hash, HASH, hex);
        size_t used = (size_t)snprintf(line, sizeof line, "file %s %llu", hex, (unsigned long long)bytes);
        right = (!strncmp(listed, line, used) && !strncmp(listed + used, name, size)) ||
                fail("%s is not the file that was signed: take the one that its owner gives", path);
    }
    free(text);
    return right;
}

#endif
