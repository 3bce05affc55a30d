/* Reading the tensors of a safetensors header into columns, and passing over JSON values that nobody wants, as the reference
 * parser of such headers judges them.
 *
 * The same rules are in header_scanner.py and header_text.py, which are used where nothing was compiled and say what is
 * wrong: here a refusal is a position and a number. The text is known to be UTF-8. Nothing is allocated, nothing outside
 * the text is read, and nothing is written outside the columns that are handed in.
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

/* Where a text stands, without its quotes. */
typedef struct {
    uint64_t begin, end;
} span;

static int read_name(reader *r, span *name) {
    skip_space(r);
    name->begin = r->position + 1;
    if (!read_text(r, REASON_NAME)) return 0;
    name->end = r->position - 1;
    if (!accept(r, ':')) return refuse(r, REASON_COLON);
    skip_space(r);
    return 1;
}

static int read_key(reader *r) {
    span name;
    return read_name(r, &name);
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

/* Whether a text that was read is this word of ASCII letters, its escapes resolved. */
static int is_word(const reader *r, span text, const char *word) {
    uint64_t at = text.begin;
    while (at < text.end && *word) {
        int c = r->text[at], is_escape = c == '\\';
        if (is_escape) c = r->text[at + 1] == 'u' ? code_unit(r, at) : -1; /* no short escape stands for a letter */
        if (c != (unsigned char)*word++) return 0;
        at += is_escape ? 6 : 1;
    }
    return at == text.end && !*word;
}

/* Reads a whole number of 64 bits that has neither a fraction nor an exponent. */
static int read_integer(reader *r, uint64_t *number) {
    skip_space(r);
    uint64_t digits = digits_at(r, r->position), end = r->position + digits;
    *number = 0;
    if (!digits || (digits > 1 && r->text[r->position] == '0')) return 0;
    if (end < r->length && (r->text[end] == '.' || (r->text[end] | 0x20) == 'e')) return 0;
    if (leading_digits(number, r->text + r->position, digits) != digits) return 0;
    r->position = end;
    return 1;
}

/* What is read of many tensors: one entry a tensor in each column, and the dimensions of all one after the other. */
typedef struct {
    uint64_t *name_begins, *name_ends, *begins, *ends, *dims; /* names with their quotes */
    uint32_t *ranks;
    uint8_t *codes;
    uint64_t rows_max, dims_max, rows, dims_used;
} columns;

enum { FIELD_DTYPE = 1, FIELD_SHAPE = 2, FIELD_OFFSETS = 4, FIELDS_ALL = 7 };

typedef struct {
    const char *dtypes; /* their names, each with a zero behind it, and one more behind the last */
    int strict;
    columns *table;
} rules;

/* Reads a data type, which may be written as the key of an object that holds null. */
static int read_dtype(reader *r, const rules *by) {
    span text = {0, 0};
    uint8_t code = 0;
    int wrapped = !by->strict && accept(r, '{');
    skip_space(r);
    text.begin = r->position + 1;
    if (!read_text(r, REASON_TEXT)) return 0;
    text.end = r->position - 1;
    if (wrapped) {
        if (!accept(r, ':')) return 0;
        skip_space(r);
        if (r->length - r->position < 4 || memcmp(r->text + r->position, "null", 4)) return 0;
        r->position += 4;
        if (!accept(r, '}')) return 0;
    }
    for (const char *name = by->dtypes; *name; name += strlen(name) + 1, code++) {
        if (!is_word(r, text, name)) continue;
        by->table->codes[by->table->rows] = code;
        return 1;
    }
    return 0;
}

static int read_shape(reader *r, columns *table) {
    uint64_t first = table->dims_used;
    if (!accept(r, '[')) return 0;
    if (!accept(r, ']')) {
        do {
            if (table->dims_used == table->dims_max || !read_integer(r, table->dims + table->dims_used)) return 0;
            table->dims_used++;
        } while (accept(r, ','));
        if (!accept(r, ']')) return 0;
    }
    table->ranks[table->rows] = (uint32_t)(table->dims_used - first);
    return 1;
}

static int read_offsets(reader *r, columns *table) {
    return accept(r, '[') && read_integer(r, table->begins + table->rows) && accept(r, ',') &&
           read_integer(r, table->ends + table->rows) && accept(r, ']');
}

static int read_field(reader *r, const rules *by, int field) {
    if (field == FIELD_DTYPE) return read_dtype(r, by);
    return field == FIELD_SHAPE ? read_shape(r, by->table) : read_offsets(r, by->table);
}

static int read_fields(reader *r, const rules *by) {
    int seen = 0;
    do {
        span name;
        int field = 0;
        if (!read_name(r, &name)) return 0;
        if (is_word(r, name, "dtype")) field = FIELD_DTYPE;
        else if (is_word(r, name, "shape")) field = FIELD_SHAPE;
        else if (is_word(r, name, "data_offsets")) field = FIELD_OFFSETS;
        if (seen & field || (!field && by->strict)) return 0;
        if (!(field ? read_field(r, by, field) : read_value(r, 2))) return 0;
        seen |= field;
    } while (accept(r, ','));
    return seen == FIELDS_ALL && accept(r, '}');
}

/* Reads a tensor, an object or a list of its three fields, into the row after the last. */
static int read_tensor(reader *r, const rules *by) {
    if (accept(r, '{')) return read_fields(r, by);
    return !by->strict && accept(r, '[') && read_dtype(r, by) && accept(r, ',') && read_shape(r, by->table) &&
           accept(r, ',') && read_offsets(r, by->table) && accept(r, ']');
}

/* Reads members of a header that are tensors, as long as a comma follows and the columns have room. Returns where the next
 * member begins; one that is refused, or is no tensor, is left to the caller. */
EXPORT uint64_t wl_read_tensors(const uint8_t *text, uint64_t length, uint64_t position, const char *dtypes, uint32_t strict,
                                columns *table) {
    reader r = {text, length, position, REASON_NONE};
    rules by = {dtypes, strict != 0, table};
    while (table->rows < table->rows_max) {
        uint64_t before = r.position, dims = table->dims_used;
        span name;
        if (!read_name(&r, &name) || is_word(&r, name, "__metadata__") || !read_tensor(&r, &by) || !accept(&r, ',')) {
            table->dims_used = dims;
            return before;
        }
        table->name_begins[table->rows] = name.begin - 1;
        table->name_ends[table->rows++] = name.end + 1;
    }
    return r.position;
}

/* The first tensor whose range of bytes does not have the size of its data type and shape, with products in 64 bits as the
 * reference parser takes them; `count` if all have. `bits` are those of an element by data type. */
EXPORT uint64_t wl_first_wrong_size(const uint8_t *codes, const uint32_t *ranks, const uint64_t *dims, const uint64_t *begins,
                                    const uint64_t *ends, uint64_t count, const uint64_t *bits) {
    for (uint64_t row = 0; row < count; dims += ranks[row++]) {
        uint64_t elements = 1, width = bits[codes[row]];
        if (ends[row] < begins[row]) return row;
        for (uint32_t i = 0; i < ranks[row]; i++) {
            if (dims[i] && elements > UINT64_MAX / dims[i]) return row;
            elements *= dims[i];
        }
        if (elements > UINT64_MAX / width) return row;
        elements *= width;
        if (elements % 8 || elements / 8 != ends[row] - begins[row]) return row;
    }
    return count;
}
