/* Passing over JSON values that a header has and nobody wants, as the reference parser of safetensors headers judges them.
 *
 * The same rules are in header_text.py, which is used where nothing was compiled and says what is wrong: here a refusal is
 * a position and a number. The text is known to be UTF-8. Nothing is allocated, and nothing outside the text is read.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define DEPTH_MAX 127

enum { REASON_NONE, REASON_NOT_JSON, REASON_DEPTH, REASON_RANGE, REASON_TEXT, REASON_NAME, REASON_COLON, REASON_COMMA };

typedef struct {
    const uint8_t *text;
    uint64_t length, position;
    uint32_t reason;
} reader;

static int peek(const reader *r) { return r->position < r->length ? r->text[r->position] : -1; }

static void skip_space(reader *r) {
    int c;
    while ((c = peek(r)) == ' ' || c == '\t' || c == '\n' || c == '\r') r->position++;
}

static int accept(reader *r, int wanted) {
    skip_space(r);
    if (peek(r) != wanted) return 0;
    r->position++;
    return 1;
}

static int refuse(reader *r, uint32_t reason) {
    r->reason = reason;
    return 0;
}

static int hexadecimal(int c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
}

/* The number of an escape that begins at `at` as \uXXXX, or -1. */
static int code_unit(const reader *r, uint64_t at) {
    int unit = 0;
    if (r->length - at < 6 || r->text[at] != '\\' || r->text[at + 1] != 'u') return -1;
    for (uint64_t i = at + 2; i < at + 6; i++) {
        int digit = hexadecimal(r->text[i]);
        if (digit < 0) return -1;
        unit = unit * 16 + digit;
    }
    return unit;
}

/* Reads a text; on a refusal the position stays at its beginning. */
static int read_text(reader *r, uint32_t reason) {
    uint64_t at = r->position + 1;
    if (peek(r) != '"') return refuse(r, reason);
    while (at < r->length) {
        int c = r->text[at], unit;
        if (c == '"') {
            r->position = at + 1;
            return 1;
        }
        if (c < 0x20) break;
        if (c != '\\') at++;
        else if (r->length - at >= 2 && r->text[at + 1] && strchr("\"\\/bfnrt", r->text[at + 1])) at += 2;
        else if ((unit = code_unit(r, at)) < 0 || (unit >= 0xdc00 && unit <= 0xdfff)) break;
        else if (unit < 0xd800 || unit > 0xdbff) at += 6;
        else {
            int low = code_unit(r, at + 6);
            if (low < 0xdc00 || low > 0xdfff) break;
            at += 12;
        }
    }
    return refuse(r, reason);
}

/* The first digits that fit 64 bits; returns how many they were. */
static uint64_t leading_digits(uint64_t *significand, const uint8_t *digits, uint64_t count) {
    for (uint64_t used = 0; used < count; used++) {
        uint64_t digit = (uint64_t)(digits[used] - '0');
        if (*significand > (UINT64_MAX - digit) / 10) return used;
        *significand = *significand * 10 + digit;
    }
    return count;
}

static uint64_t digits_at(const reader *r, uint64_t at) {
    uint64_t end = at;
    while (end < r->length && r->text[end] >= '0' && r->text[end] <= '9') end++;
    return end - at;
}

/* Whether the reference parser finds a number out of the range of a double; see number_range.py. */
static int out_of_range(const uint8_t *whole, uint64_t wholes, const uint8_t *fraction, uint64_t fractions,
                        const uint8_t *exponent, uint64_t exponents, int negative) {
    uint64_t significand = 0, given = 0;
    int64_t scale = (int64_t)(wholes - leading_digits(&significand, whole, wholes));
    scale -= (int64_t)leading_digits(&significand, fraction, fractions);
    while (exponents && *exponent == '0') exponent++, exponents--;
    for (uint64_t i = 0; i < exponents && given <= INT32_MAX; i++) given = given * 10 + (uint64_t)(exponent[i] - '0');
    if (given > INT32_MAX) return significand && !negative;
    scale += negative ? -(int64_t)given : (int64_t)given;
    if (scale < 289 || !significand) return 0; /* 2^64 x 10^288 is a double still */
    char power[16] = "1e309";
    if (scale < 309) snprintf(power, sizeof power, "1e%d", (int)scale);
    return isinf((double)significand * strtod(power, NULL)) != 0;
}

static int read_number(reader *r) {
    uint64_t at = r->position;
    if (peek(r) == '-') at++;
    uint64_t whole = at, wholes = digits_at(r, at);
    if (!wholes) return refuse(r, REASON_NOT_JSON);
    if (r->text[at] == '0') wholes = 1;
    at += wholes;
    uint64_t fraction = at, fractions = 0, exponent = at, exponents = 0;
    int negative = 0;
    if (at + 1 < r->length && r->text[at] == '.' && (fractions = digits_at(r, at + 1))) {
        fraction = at + 1;
        at = fraction + fractions;
    }
    if (at + 1 < r->length && (r->text[at] | 0x20) == 'e') {
        uint64_t first = at + 1 + (r->text[at + 1] == '+' || r->text[at + 1] == '-');
        if ((exponents = digits_at(r, first))) {
            negative = r->text[at + 1] == '-';
            exponent = first;
            at = first + exponents;
        }
    }
    const uint8_t *text = r->text;
    if ((exponents || wholes > 288) &&
        out_of_range(text + whole, wholes, text + fraction, fractions, text + exponent, exponents, negative))
        return refuse(r, REASON_RANGE);
    r->position = at;
    return 1;
}

static int read_plain(reader *r) {
    static const char *const literals[] = {"true", "false", "null"};
    int c = peek(r);
    if (c == '"') return read_text(r, REASON_TEXT);
    for (int i = 0; i < 3; i++) {
        if (c != literals[i][0]) continue;
        size_t count = strlen(literals[i]);
        if (r->length - r->position >= count && !memcmp(r->text + r->position, literals[i], count)) {
            r->position += count;
            return 1;
        }
    }
    return read_number(r);
}

static int read_key(reader *r) {
    skip_space(r);
    if (!read_text(r, REASON_NAME)) return 0;
    if (!accept(r, ':')) return refuse(r, REASON_COLON);
    skip_space(r);
    return 1;
}

static int read_value(reader *r, uint32_t depth) {
    uint8_t ends[DEPTH_MAX]; /* the brackets that close what the value is in */
    uint32_t open = 0;
    for (;;) {
        int c = peek(r);
        if (c == '[' || c == '{') {
            if (depth + open >= DEPTH_MAX) return refuse(r, REASON_DEPTH);
            ends[open++] = c == '[' ? ']' : '}';
            r->position++;
            if (!accept(r, ends[open - 1])) {
                skip_space(r);
                if (c == '{' && !read_key(r)) return 0;
                continue;
            }
            open--;
        } else if (!read_plain(r)) return 0;
        while (open && accept(r, ends[open - 1])) open--;
        if (!open) return 1;
        if (!accept(r, ',')) return refuse(r, REASON_COMMA);
        skip_space(r);
        if (ends[open - 1] == '}' && !read_key(r)) return 0;
    }
}

/* Passes over a value that begins at a position, below some levels of nesting. Returns where it ends; where it is refused,
 * `reason` is set. */
EXPORT uint64_t wl_skip_value(const uint8_t *text, uint64_t length, uint64_t position, uint32_t depth, uint32_t *reason) {
    reader r = {text, length, position, REASON_NONE};
    read_value(&r, depth);
    *reason = r.reason;
    return r.position;
}

static int is_known(const uint8_t *name, uint64_t length) {
    static const char *const known[] = {"dtype", "shape", "data_offsets"};
    for (int i = 0; i < 3; i++)
        if (strlen(known[i]) == length && !memcmp(known[i], name, length)) return 1;
    return memchr(name, '\\', length) != NULL; /* an escape may hide a known name */
}

/* Passes over members of a tensor that are not known, as long as a comma follows. Returns where the next member begins; a
 * member that is refused is left to the caller, like those that are known. */
EXPORT uint64_t wl_skip_unknown(const uint8_t *text, uint64_t length, uint64_t position, uint32_t depth) {
    reader r = {text, length, position, REASON_NONE};
    for (;;) {
        uint64_t before = r.position;
        skip_space(&r);
        uint64_t name = r.position + 1;
        if (!read_key(&r)) return before;
        uint64_t end = name;
        while (text[end] != '"' && text[end] != '\\') end++;
        if (text[end] == '\\' || is_known(text + name, end - name) || !read_value(&r, depth) || !accept(&r, ','))
            return before;
    }
}
