/* The unidrop stream in C, written from docs/spec.md and checked with the golden vectors.
 *
 *     unidrop vectors --out vectors
 *     cc -O2 -o check examples/c/check.c -lm && ./check vectors/vectors.json
 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- The implementation: sections 2 to 5, 11 and 12 of the specification ----------------------- */

static void philox(uint32_t x[4], uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        uint64_t p0 = (uint64_t)0xD2511F53u * x[0], p1 = (uint64_t)0xCD9E8D57u * x[2];
        x[0] = (uint32_t)(p1 >> 32) ^ x[1] ^ k0;
        x[2] = (uint32_t)(p0 >> 32) ^ x[3] ^ k1;
        x[1] = (uint32_t)p1;
        x[3] = (uint32_t)p0;
    }
}

static uint64_t fold_in(uint64_t key, uint64_t integer) {
    uint32_t x[4] = {(uint32_t)integer, (uint32_t)(integer >> 32), 0, 1};
    philox(x, (uint32_t)key, (uint32_t)(key >> 32));
    return (uint64_t)x[1] << 32 | x[0];
}

static uint32_t compute_u(uint64_t key, uint64_t i) {
    uint32_t x[4] = {(uint32_t)(i / 8), (uint32_t)(i / 8 >> 32), 0, 0};
    philox(x, (uint32_t)key, (uint32_t)(key >> 32));
    return i % 2 ? x[i / 2 % 4] * 0x6C078965u : x[i / 2 % 4];
}

static int keeps(uint64_t key, uint64_t i, double p) { return compute_u(key, i) >= (uint64_t)rint(p * 0x1p32); }

/* Return the index in the global mask of element j of a window with these lengths. */
static uint64_t index_of(uint64_t j, int axes, const uint64_t *lengths, const uint64_t *whole,
                         const uint64_t *start) {
    uint64_t i = 0, stride = 1;
    for (int d = axes - 1; d >= 0; d--, j /= lengths[d + 1]) {
        i += (start[d] + j % lengths[d]) * stride;
        stride *= whole[d];
    }
    return i;
}

/* --- The vectors: JSON with one vector per line ------------------------------------------------ */

static const char *field(const char *line, const char *name) {
    char quoted[32];
    snprintf(quoted, sizeof quoted, "\"%s\": ", name);
    const char *at = strstr(line, quoted);
    return at ? at + strlen(quoted) : NULL;
}

static uint64_t hex(const char *line, const char *name) { return strtoull(field(line, name) + 1, NULL, 16); }

/* Read an array of numbers in a base, quoted or not. A null is an empty array. */
static int array(const char *line, const char *name, int base, uint64_t *into) {
    const char *at = field(line, name), *end = strpbrk(at, "]n");
    int count = 0;
    for (at += strspn(at, "[\""); at < end; at += strspn(at, "\", "))
        into[count++] = strtoull(at, (char **)&at, base);
    return count;
}

static int checked, failed, skipped;

static void expect(int holds, const char *line) {
    checked++;
    if (!holds && failed++ < 5) fprintf(stderr, "vector failed: %.120s\n", line);
}

static void check_generator(const char *line) {
    uint64_t counter[4], key[2], words[4];
    array(line, "counter", 16, counter), array(line, "key", 16, key), array(line, "words", 16, words);
    uint32_t x[4];
    for (int i = 0; i < 4; i++) x[i] = (uint32_t)counter[i];
    philox(x, (uint32_t)key[0], (uint32_t)key[1]);
    expect(x[0] == words[0] && x[1] == words[1] && x[2] == words[2] && x[3] == words[3], line);
}

static void check_key(const char *line) {
    if (strstr(line, "{\"str\"")) { skipped++; return; } /* strings need BLAKE2b, RFC 7693 */
    uint64_t key = hex(line, "seed");
    for (const char *at = line; (at = field(at, "int"));) key = fold_in(key, strtoull(at + 1, NULL, 16));
    expect(key == hex(strrchr(line, ']'), "key"), line);
}

static void check_mask(const char *line) {
    static uint64_t u[64], lengths[65], whole[64], start[64];
    uint64_t shared[64], key = hex(line, "key");
    double p = strtod(field(line, "p"), NULL);
    int axes = array(line, "mask_shape", 10, lengths), given = array(line, "global_shape", 10, whole);
    if (given) array(line, "start", 10, start);
    else memcpy(whole, lengths, sizeof whole), memset(start, 0, sizeof start);
    for (int d = array(line, "broadcast_axes", 10, shared); d-- > 0;) {
        uint64_t axis = (int64_t)shared[d] < 0 ? shared[d] + axes : shared[d];
        whole[axis] = 1, start[axis] = 0;
    }
    const char *keep = field(line, "keep") + 1;
    int shown = array(line, "u", 16, u), holds = 1;
    lengths[axes] = 1;
    for (uint64_t j = 0; keep[j] != '"'; j++) {
        uint64_t i = index_of(j, axes, lengths, whole, start);
        holds &= keeps(key, i, p) == (keep[j] == '1');
        if (j < (uint64_t)shown) holds &= compute_u(key, i) == u[j];
    }
    expect(holds, line);
}

static void check_output(const char *line) {
    static uint64_t x[4096], y[4096];
    int wide = !!strstr(line, "\"float64\"") + !!strstr(line, "\"complex128\"");
    int parts = strstr(line, "\"complex") ? 2 : 1;
    if (strstr(line, "float16\"")) { skipped++; return; } /* not every C compiler has 16-bit types */
    double p = strtod(field(line, "p"), NULL), s = 1 / (1 - p), d = 0;
    float f = 0;
    int count = array(line, "x", 16, x), holds = array(line, "y", 16, y) == count;
    for (int i = 0; i < count; i++) {
        uint32_t low = (uint32_t)x[i];
        if (wide) memcpy(&d, &x[i], 8), d = keeps(hex(line, "key"), i / parts, p) ? d * s : 0;
        else memcpy(&f, &low, 4), f = keeps(hex(line, "key"), i / parts, p) ? f * (float)s : 0, d = f;
        uint64_t actual = 0;
        memcpy(&actual, wide ? (void *)&d : (void *)&f, wide ? 8 : 4);
        int is_nan = y[i] << (wide ? 1 : 33) > (wide ? 0x7FFull << 53 : 0xFFull << 56);
        holds &= actual == y[i] || (isnan(d) && is_nan);
    }
    expect(holds, line);
}

int main(int argc, char **argv) {
    static char line[1 << 20], section[32];
    FILE *file = argc == 2 ? fopen(argv[1], "r") : NULL;
    if (!file) return fprintf(stderr, "usage: check vectors.json\n"), 2;
    while (fgets(line, sizeof line, file)) {
        if (sscanf(line, "\"stream\": %31[^,]", section) == 1 && strcmp(section, "1"))
            return fprintf(stderr, "stream must be 1, got %s\n", section), 2;
        if (sscanf(line, "\"%31[a-z]\": [", section) == 1 || line[0] != '{' || !line[1]) continue;
        if (!strcmp(section, "generator")) check_generator(line);
        if (!strcmp(section, "keys")) check_key(line);
        if (!strcmp(section, "masks")) check_mask(line);
        if (!strcmp(section, "outputs")) check_output(line);
    }
    printf("%d vectors checked, %d failed, %d skipped\n", checked, failed, skipped);
    return failed || !checked;
}
