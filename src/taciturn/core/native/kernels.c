/* The kernels of the codecs: hash, quantize, select, rotate. Each has its twin in torch in core/kernel.py, which gives the
 * same bits; the docstrings there say what is computed.
 */
#include "kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK 1024 /* values worked on at a time, so that what stands between two loops stays in the first cache */

/* ------------------------------------------------------------------------------------------------------------ hash */

FAST API void tc_words(uint64_t key, int64_t n, int64_t *out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = (int64_t)word(key, (uint64_t)i);
}

/* --------------------------------------------------------------------------------------------------------- quantize */

/* Sums in the order of a fixed tree: lanes of 1024 are halved ten times; the sums of the lanes again, until one is left. */
FAST static double halve(double *lanes, int64_t width)
{
    for (int64_t w = width / 2; w > 0; w /= 2)
        for (int64_t i = 0; i < w; i++)
            lanes[i] += lanes[i + w];
    return lanes[0];
}

static double tree(double *sums, int64_t n)
{
    double lanes[CHUNK];
    while (n > 1) {
        int64_t blocks = (n + CHUNK - 1) / CHUNK;
        for (int64_t b = 0; b < blocks; b++) {
            int64_t width = n - b * CHUNK < CHUNK ? n - b * CHUNK : CHUNK;
            memcpy(lanes, sums + b * CHUNK, (size_t)width * sizeof(double));
            memset(lanes + width, 0, (size_t)(CHUNK - width) * sizeof(double));
            sums[b] = halve(lanes, CHUNK);
        }
        n = blocks;
    }
    return sums[0];
}

FAST static void squares(const float *u, int64_t n, double *out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = (double)u[i] * (double)u[i];
}

FAST static void absolutes(const float *u, int64_t n, double *out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = fabs((double)u[i]);
}

static double total(const float *u, int64_t n, int square)
{
    int64_t blocks = (n + CHUNK - 1) / CHUNK;
    double lanes[CHUNK], *sums = malloc((size_t)blocks * sizeof(double));
    if (!sums)
        return NAN;
    for (int64_t b = 0; b < blocks; b++) {
        int64_t width = n - b * CHUNK < CHUNK ? n - b * CHUNK : CHUNK, padded = CHUNK;
        while (padded / 2 >= width && padded > 1)
            padded /= 2;
        (square ? squares : absolutes)(u + b * CHUNK, width, lanes);
        memset(lanes + width, 0, (size_t)(padded - width) * sizeof(double));
        sums[b] = halve(lanes, padded);
    }
    double result = tree(sums, blocks);
    free(sums);
    return result;
}

/* The largest magnitude, by its bits: they grow with the value, and those of NaN lie above infinity. */
FAST static uint32_t largest_bits(const float *u, int64_t n)
{
    const uint32_t *bits = (const uint32_t *)(const void *)u;
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t magnitude = bits[i] & 0x7FFFFFFFu;
        most = magnitude > most ? magnitude : most;
    }
    return most;
}

/* norm 0: largest magnitude, 1: euclidean, 2: mean magnitude. -> the distance of two levels, NaN if u is not finite. */
static float step_of(const float *u, int64_t n, int norm, int q)
{
    double scale;
    if (n == 0)
        return 0.0f;
    if (norm == 0) {
        uint32_t bits = largest_bits(u, n);
        float most;
        memcpy(&most, &bits, sizeof most);
        scale = (double)most;
    } else if (norm == 1) {
        scale = sqrt(total(u, n, 1));
        if (scale > 3.4028234663852886e38 && scale < INFINITY)
            scale = 3.4028234663852886e38;
    } else {
        scale = total(u, n, 0) / (double)n;
    }
    if (!(scale < INFINITY))
        return NAN;
    return q > 1 ? (float)(scale / ((double)(q - 1) * 0.5)) : 0.0f;
}

FAST static void codes_stochastic(const float *u, int64_t n, uint64_t key, int64_t first, float step, int q, uint8_t *out)
{
    uint32_t halves[CHUNK + 2];
    float offset = q % 2 ? 0.0f : 0.5f;
    int32_t middle = q / 2, top = q - 1;
    for (int64_t a = 0; a < n; a += CHUNK) {
        int64_t width = n - a < CHUNK ? n - a : CHUNK;
        uint64_t j = (uint64_t)(first + a) / 2; /* two draws of 24 bits from each word */
        const uint32_t *draws = halves + (first + a) % 2;
        int64_t count = width / 2 + 1;
        uint64_t words[CHUNK / 2 + 1];
        for (int64_t i = 0; i < count; i++)
            words[i] = word(key, j + (uint64_t)i);
        memcpy(halves, words, (size_t)count * 8);
        for (int64_t i = 0; i < width; i++) {
            float r = u[a + i] / step;
            r = r > 300.0f ? 300.0f : r;
            r = r < -300.0f ? -300.0f : r;
            r -= offset;
            float below = floorf(r);
            float draw = (float)(int32_t)(draws[i] >> 8) * 0x1p-24f;
            int32_t code = (int32_t)below + (draw < r - below) + middle;
            code = code < 0 ? 0 : code;
            out[a + i] = (uint8_t)(code > top ? top : code);
        }
    }
}

FAST static void codes_nearest(const float *u, int64_t n, float step, int q, uint8_t *out)
{
    int odd = q % 2;
    int32_t middle = q / 2, top = q - 1;
    for (int64_t i = 0; i < n; i++) {
        float r = u[i] / step;
        r = r > 300.0f ? 300.0f : r;
        r = r < -300.0f ? -300.0f : r;
        int32_t code = (int32_t)(odd ? rintf(r) : floorf(r)) + middle;
        code = code < 0 ? 0 : code;
        out[i] = (uint8_t)(code > top ? top : code);
    }
}

/* runs: pairs (count, size) of equal segments that lie one after the other. */
API void tc_quantize(const float *u, uint64_t key, int q, const int64_t *runs, int64_t n_runs, int norm, int nearest,
                     uint8_t *codes, float *steps)
{
    int64_t at = 0;
    for (int64_t r = 0; r < n_runs; r++) {
        int64_t size = runs[2 * r + 1];
        for (int64_t s = 0; s < runs[2 * r]; s++, at += size, steps++) {
            float step = step_of(u + at, size, norm, q);
            *steps = step;
            if (!(step > 0.0f))
                memset(codes + at, q / 2, (size_t)size);
            else if (nearest)
                codes_nearest(u + at, size, step, q, codes + at);
            else
                codes_stochastic(u + at, size, key, at, step, q, codes + at);
        }
    }
}

FAST static void values_of(const uint8_t *codes, int64_t n, float step, float middle, float *out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = ((float)codes[i] - middle) * step;
}

API void tc_dequantize(const uint8_t *codes, const float *steps, int q, const int64_t *runs, int64_t n_runs, float *out)
{
    float middle = (float)(q - 1) * 0.5f;
    int64_t at = 0;
    for (int64_t r = 0; r < n_runs; r++)
        for (int64_t s = 0; s < runs[2 * r]; s++, at += runs[2 * r + 1], steps++)
            values_of(codes + at, runs[2 * r + 1], *steps, middle, out + at);
}

/* ----------------------------------------------------------------------------------------------------------- select */

static int ascending(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

FAST static void halves63(uint64_t key, int64_t first, int64_t n, uint64_t *out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = word(key, (uint64_t)(first + i)) >> 1;
}

/* The k-th smallest of d words (63 bits each): looked for in a narrow window around where it must be, else among all. */
API int64_t tc_threshold(uint64_t key, int64_t d, int64_t k)
{
    double spread = 10.0 * sqrt((double)k * (double)(d - k) / (double)d) + 20.0;
    double low = ((double)k - spread) / (double)d * 0x1p63, high = ((double)k + spread) / (double)d * 0x1p63;
    for (int all = 0; all < 2; all++) {
        uint64_t from = all || low <= 0 ? 0 : (uint64_t)low, to = all || high >= 0x1p63 ? UINT64_MAX : (uint64_t)high;
        int64_t room = all ? d : (int64_t)(3.0 * spread) + 1000, below = 0, found = 0;
        room = room < d ? room : d;
        uint64_t words[CHUNK], *window = malloc((size_t)(room + CHUNK) * sizeof(uint64_t));
        if (!window)
            return -1;
        for (int64_t a = 0; a < d && found <= room; a += CHUNK) {
            int64_t width = d - a < CHUNK ? d - a : CHUNK;
            halves63(key, a, width, words);
            for (int64_t i = 0; i < width; i++) {
                below += words[i] < from;
                window[found] = words[i];
                found += words[i] >= from && words[i] <= to;
            }
        }
        int inside = found <= room && below < k && below + found >= k;
        int64_t result = -1;
        if (inside) {
            qsort(window, (size_t)found, sizeof(uint64_t), ascending);
            result = (int64_t)window[k - below - 1];
        }
        free(window);
        if (inside)
            return result;
    }
    return -1;
}

/* u[i] * scale for every i whose word is at most the threshold, one after the other -> how many. out holds `room`.
 * Only NaN, and `room`, if u is not finite. */
FAST API int64_t tc_keep(const float *u, int64_t d, uint64_t key, int64_t threshold, float scale, float *out, int64_t room)
{
    uint64_t words[CHUNK];
    float kept[CHUNK + 1];
    int64_t count = 0;
    uint32_t most = 0;
    for (int64_t a = 0; a < d; a += CHUNK) {
        int64_t width = d - a < CHUNK ? d - a : CHUNK, n = 0;
        for (int64_t i = 0; i < width; i++)
            words[i] = word(key, (uint64_t)(a + i)) >> 1;
        for (int64_t i = 0; i < width; i++) {
            uint32_t bits;
            memcpy(&bits, u + a + i, 4);
            bits &= 0x7FFFFFFFu;
            most = bits > most ? bits : most;
        }
        for (int64_t i = 0; i < width; i++) {
            kept[n] = u[a + i];
            n += (int64_t)words[i] <= threshold;
        }
        n = n < room - count ? n : room - count;
        for (int64_t i = 0; i < n; i++)
            out[count + i] = kept[i] * scale;
        count += n;
    }
    memset(out + count, 0, (size_t)(room - count) * sizeof(float));
    if (most < 0x7F800000u)
        return count;
    for (int64_t i = 0; i < room; i++)
        out[i] = NAN;
    return room;
}

/* The inverse: values in their places, zeros elsewhere -> how many places there are. values holds `room`. */
FAST API int64_t tc_spread(const float *values, int64_t room, uint64_t key, int64_t threshold, float *out, int64_t d)
{
    float next[CHUNK];
    int32_t place[CHUNK], here[CHUNK];
    int64_t count = 0;
    memset(next, 0, sizeof next);
    for (int64_t a = 0; a < d; a += CHUNK) {
        int64_t width = d - a < CHUNK ? d - a : CHUNK, left = room - count;
        left = left < 0 ? 0 : left < width ? left : width;
        for (int64_t i = 0; i < width; i++)
            here[i] = (int64_t)(word(key, (uint64_t)(a + i)) >> 1) <= threshold;
        int32_t n = 0;
        for (int64_t i = 0; i < width; i++) {
            place[i] = n;
            n += here[i];
        }
        memcpy(next, values + count * (left > 0), (size_t)left * sizeof(float));
        for (int64_t i = 0; i < width; i++)
            out[a + i] = here[i] ? next[place[i]] : 0.0f;
        count += n;
    }
    return count;
}

/* The k values of largest magnitude (of equals those that come first), in their order, and their places. */
FAST API int tc_largest(const float *u, int64_t d, int64_t k, float *values, int64_t *places)
{
    const uint32_t *bits = (const uint32_t *)(const void *)u;
    int64_t *counts = calloc(1 << 16, sizeof(int64_t));
    if (!counts)
        return -1;
    uint32_t high = 0x7FFF, low = 0xFFFF;
    int64_t above = 0;
    for (int64_t i = 0; i < d; i++)
        counts[(bits[i] & 0x7FFFFFFFu) >> 16]++;
    while (above + counts[high] < k)
        above += counts[high--];
    memset(counts, 0, (1 << 16) * sizeof(int64_t));
    for (int64_t i = 0; i < d; i++)
        if ((bits[i] & 0x7FFFFFFFu) >> 16 == high)
            counts[bits[i] & 0xFFFFu]++;
    while (above + counts[low] < k)
        above += counts[low--];
    free(counts);
    uint32_t edge = high << 16 | low;
    int64_t equal = k - above, n = 0;
    for (int64_t a = 0; a < d && n < k; a += 16) {
        int64_t width = d - a < 16 ? d - a : 16;
        uint32_t most = 0;
        for (int64_t i = 0; i < width; i++) {
            uint32_t magnitude = bits[a + i] & 0x7FFFFFFFu;
            most = magnitude > most ? magnitude : most;
        }
        if (most < edge)
            continue;
        for (int64_t i = a; i < a + width && n < k; i++) {
            uint32_t magnitude = bits[i] & 0x7FFFFFFFu;
            if (magnitude > edge || (magnitude == edge && equal > 0)) {
                equal -= magnitude == edge;
                values[n] = u[i];
                places[n++] = i;
            }
        }
    }
    return 0;
}

/* ----------------------------------------------------------------------------------------------------------- rotate */

#if defined(__GNUC__)
typedef float lanes16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t order16 __attribute__((vector_size(64)));

/* Butterflies at distances 1, 2, 4, 8 within sixteen values; the same sums as in the loop over distances. */
FAST static void within16(float *x, int64_t n)
{
    const order16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int64_t a = 0; a < n; a += 16) {
        lanes16 v;
        memcpy(&v, x + a, sizeof v);
        for (int32_t h = 1; h < 16; h *= 2) {
            lanes16 other = __builtin_shuffle(v, lane ^ h);
            order16 upper = (lane & h) != 0;
            lanes16 sum = other + v, difference = other - v;
            v = (lanes16)(((order16)sum & ~upper) | ((order16)difference & upper));
        }
        memcpy(x + a, &v, sizeof v);
    }
}
#endif

FAST static void hadamard(float *x, int64_t n, float factor)
{
    int64_t h = 1;
#if defined(__GNUC__)
    if (n >= 16) {
        within16(x, n);
        h = 16;
    }
#endif
    for (; h < n; h *= 2)
        for (int64_t a = 0; a < n; a += 2 * h)
            for (int64_t i = a; i < a + h; i++) {
                float p = x[i], q = x[i + h];
                x[i] = p + q;
                x[i + h] = p - q;
            }
    for (int64_t i = 0; i < n; i++)
        x[i] *= factor;
}

FAST static void flip(const float *u, int64_t first, int64_t n, uint64_t key, float *out)
{
    for (int64_t i = 0; i < n;) {
        int64_t at = first + i, width = 64 - at % 64;
        width = width < n - i ? width : n - i;
        uint64_t signs = word(key, (uint64_t)at / 64) >> (at % 64);
        for (int64_t j = 0; j < width; j++) {
            uint32_t bits;
            memcpy(&bits, u + i + j, 4);
            bits ^= (uint32_t)((signs >> j) & 1) << 31;
            memcpy(out + i + j, &bits, 4);
        }
        i += width;
    }
}

/* Blocks of powers of two: as many of `block` as fit, then the binary digits of what is left. */
API void tc_rotate(const float *u, int64_t d, uint64_t key, int64_t block, int inverse, float *out)
{
    int64_t at = 0;
    while (at < d) {
        while (block > d - at)
            block /= 2;
        float factor = (float)(1.0 / sqrt((double)block));
        if (inverse) {
            memcpy(out + at, u + at, (size_t)block * sizeof(float));
            hadamard(out + at, block, factor);
            flip(out + at, at, block, key, out + at);
        } else {
            flip(u + at, at, block, key, out + at);
            hadamard(out + at, block, factor);
        }
        at += block;
    }
}
