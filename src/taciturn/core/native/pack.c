/* Packing of codes, and the entropy coder. wire/packing.py and wire/ranges.py have the twins in numpy and Python, which give the
 * same bytes; the format is described there. Every reader stays within the lengths that it is told, whatever the bytes are.
 */
#include "kernels.h"

#include <string.h>

static inline __attribute__((always_inline)) uint64_t load(const uint8_t *from, int size)
{
    uint64_t value = 0;
    memcpy(&value, from, (size_t)size);
    return value;
}

/* The same where eight bytes may be read: two loads of a part of a word would wait for each other. */
static inline __attribute__((always_inline)) uint64_t load_inside(const uint8_t *from, int size)
{
    return load(from, 8) & (UINT64_MAX >> (64 - 8 * size));
}

/* --------------------------------------------------------------------------------------------------------- symbols */

/* A group of `many` symbols is the number sum s_i q^i, in `size` bytes, little-endian. */
static inline __attribute__((always_inline)) uint64_t number(const uint8_t *codes, int many, uint64_t q)
{
    uint64_t value = 0;
    for (int i = many - 1; i >= 0; i--)
        value = value * q + codes[i];
    return value;
}

static inline __attribute__((always_inline)) void bytes_of(const uint8_t *codes, int64_t groups, int many, int q, uint8_t *out)
{
    for (int64_t g = 0; g < groups; g++) {
        unsigned value = 0;
        for (int i = many - 1; i >= 0; i--)
            value = value * (unsigned)q + codes[g * many + i];
        out[g] = (uint8_t)value;
    }
}

/* The place of the first symbol that is not below q, or n. */
FAST API int64_t tc_first_wrong(const uint8_t *codes, int64_t n, int q)
{
    int64_t at = 0;
    for (; at < n; at += 4096) {
        int64_t end = n - at < 4096 ? n : at + 4096;
        uint8_t largest = 0;
        for (int64_t i = at; i < end; i++)
            largest = codes[i] > largest ? codes[i] : largest;
        if (largest >= q)
            break;
    }
    while (at < n && codes[at] < q)
        at++;
    return at < n ? at : n;
}

/* Whole groups; what is left over is for the caller. */
FAST API void tc_pack_symbols(const uint8_t *codes, int64_t groups, int many, int size, int q, uint8_t *out)
{
    if (size > 1) {
        for (int64_t g = 0; g < groups; g++) {
            uint64_t value = number(codes + g * many, many, (uint64_t)q);
            memcpy(out + g * size, &value, (size_t)size);
        }
    } else if (q == 2) {
        bytes_of(codes, groups, 8, 2, out);
    } else if (q == 4) {
        bytes_of(codes, groups, 4, 4, out);
    } else if (q == 16) {
        bytes_of(codes, groups, 2, 16, out);
    } else if (many == 1) {
        memcpy(out, codes, (size_t)groups);
    } else if (many == 2) {
        bytes_of(codes, groups, 2, q, out);
    } else if (many == 3) {
        bytes_of(codes, groups, 3, q, out);
    } else {
        bytes_of(codes, groups, many, q, out);
    }
}

static inline __attribute__((always_inline)) void split(const uint8_t *raw, int64_t groups, int many, int bits, uint8_t *out)
{
    for (int64_t g = 0; g < groups; g++)
        for (int i = 0; i < many; i++)
            out[g * many + i] = (uint8_t)((raw[g] >> (i * bits)) & ((1 << bits) - 1));
}

/* Groups of one byte, by a table of what each byte stands for. Returns the number of groups that are possible. */
static int64_t by_table(const uint8_t *raw, int64_t groups, int many, int q, uint8_t *out)
{
    uint8_t table[256][8];
    int64_t g = 0, most = 1;
    for (int i = 0; i < many; i++)
        most *= q;
    for (int value = 0; value < 256; value++)
        for (int i = 0, rest = value; i < 8; i++, rest /= q)
            table[value][i] = (uint8_t)(rest % q);
    for (; g < groups - 8; g++) { /* eight bytes at a time: what is too much is overwritten by the next */
        if (raw[g] >= most)
            return g;
        memcpy(out + g * many, table[raw[g]], 8);
    }
    for (; g < groups; g++) {
        if (raw[g] >= most)
            return g;
        memcpy(out + g * many, table[raw[g]], (size_t)many);
    }
    return groups;
}

/* The quotient; *value becomes the remainder. inverse = floor((2^64 - 1) / by), so the product is at most one too low. */
static inline __attribute__((always_inline)) uint64_t divide(uint64_t *value, uint64_t by, uint64_t inverse)
{
    uint64_t part = (uint64_t)(((unsigned __int128)*value * inverse) >> 64), rest = *value - part * by, more = rest >= by;
    *value = rest - (more ? by : 0);
    return part + more;
}

/* Symbol by symbol, from group g on. */
static inline __attribute__((always_inline)) int64_t divided(
    const uint8_t *raw, int64_t g, int64_t groups, int many, int size, uint64_t q, uint8_t *out)
{
    uint64_t inverse = UINT64_MAX / q;
    for (; g < groups; g++) {
        uint64_t value = g < groups - 8 ? load_inside(raw + g * size, size) : load(raw + g * size, size);
        for (int i = 0; i < many; i++) {
            uint64_t next = divide(&value, q, inverse);
            out[g * many + i] = (uint8_t)value;
            value = next;
        }
        if (value)
            return g;
    }
    return groups;
}

#define LONGEST 4096 /* numbers in a table of parts */

/* Several symbols at a time: a group's number in parts below q^k, and a table of the k symbols of a part. */
static inline __attribute__((always_inline)) int64_t by_parts(
    const uint8_t *raw, int64_t groups, int many, int size, uint64_t q, uint8_t *out)
{
    static _Thread_local uint8_t table[LONGEST][8];
    uint64_t by = q * q, limit = q, inverse;
    int k = 2, parts;
    int64_t g = 0;
    if (by > LONGEST || groups * many < LONGEST)
        return divided(raw, 0, groups, many, size, q, out);
    while (by * q <= LONGEST && k < 8) {
        by *= q;
        k++;
    }
    parts = (many - 1) / k;
    for (int i = 1; i < many - parts * k; i++)
        limit *= q;
    for (uint64_t value = 0; value < by; value++) {
        uint64_t rest = value;
        for (int i = 0; i < 8; i++) {
            table[value][i] = (uint8_t)(rest % q);
            rest /= q;
        }
    }
    inverse = UINT64_MAX / by;
    for (; g < groups - 8; g++) { /* eight bytes at a time: what is too much is overwritten by the next */
        uint64_t value = load_inside(raw + g * size, size);
        uint8_t *to = out + g * many;
        for (int i = 0; i < parts; i++) {
            uint64_t next = divide(&value, by, inverse);
            memcpy(to + i * k, table[value], 8);
            value = next;
        }
        if (value >= limit)
            return g;
        memcpy(to + parts * k, table[value], 8);
    }
    return divided(raw, g, groups, many, size, q, out);
}

/* Returns `groups`, or the first group whose number is q^many or more: no writer makes it. */
FAST API int64_t tc_unpack_symbols(const uint8_t *raw, int64_t groups, int many, int size, int q, uint8_t *out)
{
    if (size == 1) {
        if (many == 1) {
            int64_t good = q < 256 ? tc_first_wrong(raw, groups, q) : groups;
            memcpy(out, raw, (size_t)good);
            return good;
        } else if (q == 16) {
            split(raw, groups, 2, 4, out);
        } else if (q == 4) {
            split(raw, groups, 4, 2, out);
        } else if (q == 2) {
            split(raw, groups, 8, 1, out);
        } else {
            return by_table(raw, groups, many, q, out);
        }
        return groups;
    }
    switch (size) {
    case 2: return by_parts(raw, groups, many, 2, (uint64_t)q, out);
    case 3: return by_parts(raw, groups, many, 3, (uint64_t)q, out);
    case 4: return by_parts(raw, groups, many, 4, (uint64_t)q, out);
    case 5: return by_parts(raw, groups, many, 5, (uint64_t)q, out);
    case 6: return by_parts(raw, groups, many, 6, (uint64_t)q, out);
    case 7: return by_parts(raw, groups, many, 7, (uint64_t)q, out);
    default: return by_parts(raw, groups, many, 8, (uint64_t)q, out);
    }
}

/* ------------------------------------------------------------------------------------------------------------ width */

/* n values of `width` bits, one after the other. Returns n, or the place of the first that does not fit. */
#define PACK_WIDTH(TYPE)                                                                                                          \
    FAST API int64_t tc_pack_width_##TYPE(const TYPE##_t *values, int64_t n, int width, uint8_t *out)                             \
    {                                                                                                                             \
        uint64_t word = 0, limit = (uint64_t)1 << width;                                                                          \
        int filled = 0;                                                                                                           \
        for (int64_t i = 0; i < n; i++) {                                                                                         \
            uint64_t value = (uint64_t)(int64_t)values[i];                                                                        \
            if (value >= limit)                                                                                                   \
                return i;                                                                                                         \
            word |= value << filled;                                                                                              \
            filled += width;                                                                                                      \
            if (filled >= 64) {                                                                                                   \
                memcpy(out, &word, 8);                                                                                            \
                out += 8;                                                                                                         \
                filled -= 64;                                                                                                     \
                word = filled ? value >> (width - filled) : 0;                                                                    \
            }                                                                                                                     \
        }                                                                                                                         \
        memcpy(out, &word, (size_t)(filled + 7) / 8);                                                                             \
        return n;                                                                                                                 \
    }

/* The inverse, from `length` = ceil(n width / 8) bytes; bits after the last value are for the caller to check. */
#define UNPACK_WIDTH(TYPE)                                                                                                        \
    FAST API void tc_unpack_width_##TYPE(const uint8_t *raw, int64_t length, int64_t n, int width, TYPE##_t *out)                 \
    {                                                                                                                             \
        uint64_t mask = ((uint64_t)1 << width) - 1;                                                                               \
        int64_t whole = width <= 57 && length >= 8 ? (length - 8) * 8 / width : 0, i = 0; /* values that 8 bytes hold */          \
        for (; i < whole; i++) {                                                                                                  \
            uint64_t bit = (uint64_t)i * (uint64_t)width;                                                                         \
            out[i] = (TYPE##_t)(load(raw + (bit >> 3), 8) >> (bit & 7) & mask);                                                   \
        }                                                                                                                         \
        int64_t nine = length >= 9 ? (length - 9) * 8 / width : 0; /* and those that a ninth holds */                             \
        for (; i < nine; i++) {                                                                                                   \
            uint64_t bit = (uint64_t)i * (uint64_t)width;                                                                         \
            const uint8_t *from = raw + (bit >> 3);                                                                               \
            uint64_t high = ((uint64_t)from[8] << 1) << (63 - (bit & 7));                                                         \
            out[i] = (TYPE##_t)((load(from, 8) >> (bit & 7) | high) & mask);                                                      \
        }                                                                                                                         \
        for (; i < n; i++) {                                                                                                      \
            uint64_t bit = (uint64_t)i * (uint64_t)width;                                                                         \
            int64_t at = (int64_t)(bit >> 3);                                                                                     \
            int shift = (int)(bit & 7), left = length - at < 8 ? (int)(length - at) : 8;                                          \
            uint64_t value = load(raw + at, left) >> shift;                                                                       \
            if (shift + width > 64)                                                                                               \
                value |= (uint64_t)raw[at + 8] << (64 - shift);                                                                   \
            out[i] = (TYPE##_t)(value & mask);                                                                                    \
        }                                                                                                                         \
    }

PACK_WIDTH(int16)
PACK_WIDTH(int32)
PACK_WIDTH(int64)
UNPACK_WIDTH(int16)
UNPACK_WIDTH(int32)
UNPACK_WIDTH(int64)

/* ----------------------------------------------------------------------------------------------------- entropy coder */

#define SCALE 14 /* bits of the frequencies' sum */
#define LOW (1u << 23)

/* n symbols by their frequencies [256]; writes backward from out + room. Returns how many bytes: they end at out + room. */
API int64_t tc_rans_encode(const uint8_t *symbols, int64_t n, const uint32_t *frequencies, uint8_t *out, int64_t room)
{
    uint32_t state[2] = {LOW, LOW}, start[256], sum = 0;
    uint8_t *at = out + room;
    for (int s = 0; s < 256; s++) {
        start[s] = sum;
        sum += frequencies[s];
    }
    for (int64_t i = n - 1; i >= 0; i--) {
        uint32_t f = frequencies[symbols[i]], x = state[i & 1];
        while (x >= ((LOW >> SCALE) << 8) * f) {
            *--at = (uint8_t)x;
            x >>= 8;
        }
        state[i & 1] = ((x / f) << SCALE) + x % f + start[symbols[i]];
    }
    for (int k = 1; k >= 0; k--) {
        at -= 4;
        memcpy(at, &state[k], 4);
    }
    return out + room - at;
}

/* The inverse, from at most `length` bytes. Returns how many bytes it took, or -1 if no writer makes them. */
API int64_t tc_rans_decode(const uint8_t *raw, int64_t length, int64_t n, const uint32_t *frequencies, uint8_t *out)
{
    static _Thread_local struct { uint16_t f, offset; } slots[1 << SCALE];
    static _Thread_local uint8_t symbol[1 << SCALE];
    uint32_t state[2], place = 0;
    if (length < 8)
        return -1;
    for (uint32_t s = 0; s < 256; s++)
        for (uint32_t k = 0; k < frequencies[s]; k++, place++) {
            slots[place].f = (uint16_t)frequencies[s];
            slots[place].offset = (uint16_t)k;
            symbol[place] = (uint8_t)s;
        }
    memcpy(state, raw, 8);
    if (state[0] < LOW || state[1] < LOW || state[0] >> 31 || state[1] >> 31)
        return -1;
    int64_t at = 8;
    for (int64_t i = 0; i < n; i++) {
        uint32_t x = state[i & 1], slot = x & ((1u << SCALE) - 1);
        out[i] = symbol[slot];
        x = slots[slot].f * (x >> SCALE) + slots[slot].offset;
        while (x < LOW) {
            if (at == length)
                return -1;
            x = x << 8 | raw[at++];
        }
        state[i & 1] = x;
    }
    return state[0] == LOW && state[1] == LOW ? at : -1;
}
