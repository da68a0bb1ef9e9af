/* The kernels of the codecs: hash, quantize, select, rotate. Each has its twin in torch in core/kernel.py, which gives the
 * same bits; the docstrings there say what is computed.
 */
#include "kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

API const int tc_kernels_3 = 3; /* counts up with core/kernel.py when a kernel comes, goes or changes */

#define CHUNK 1024 /* values worked on at a time, so that what stands between two loops stays in the first cache */

/* ------------------------------------------------------------------------------------------------------------ hash */

FAST static void words(uint64_t key, int64_t n, int64_t *out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = (int64_t)word(key, (uint64_t)i);
}

API void tc_words(const uint64_t *keys, int64_t rows, int64_t n, int64_t *out)
{
    for (int64_t r = 0; r < rows; r++)
        words(keys[r], n, out + r * n);
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
static void quantize(const float *u, uint64_t key, int q, const int64_t *runs, int64_t n_runs, int norm, int nearest,
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

API void tc_quantize(const float *u, int64_t rows, int64_t d, const uint64_t *keys, const uint8_t *radix, const int64_t *runs,
                     int64_t n_runs, int64_t segments, int norm, int nearest, uint8_t *codes, float *steps)
{
    for (int64_t r = 0; r < rows; r++)
        quantize(u + r * d, keys[r], radix[r] + 1, runs, n_runs, norm, nearest, codes + r * d, steps + r * segments);
}

static void dequantize(const uint8_t *codes, const float *steps, int q, const int64_t *runs, int64_t n_runs, float *out)
{
    float middle = (float)(q - 1) * 0.5f;
    int64_t at = 0;
    for (int64_t r = 0; r < n_runs; r++)
        for (int64_t s = 0; s < runs[2 * r]; s++, at += runs[2 * r + 1], steps++)
            values_of(codes + at, runs[2 * r + 1], *steps, middle, out + at);
}

API void tc_dequantize(const uint8_t *codes, const float *steps, int64_t rows, int64_t d, const uint8_t *radix,
                       const int64_t *runs, int64_t n_runs, int64_t segments, float *out)
{
    for (int64_t r = 0; r < rows; r++)
        dequantize(codes + r * d, steps + r * segments, radix[r] + 1, runs, n_runs, out + r * d);
}

/* ------------------------------------------------------------------------------------------- what some machines have */

static int portable; /* 1: leave the instructions alone that only some machines have; for tests */

API void tc_portable(int on)
{
    portable = on;
}

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define WIDE __attribute__((target("avx512f,avx512dq")))

static int wide(void)
{
    return !portable && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
}
#else
static int wide(void)
{
    return 0;
}
#endif

/* ------------------------------------------------------------------------------------------------------------ cast */

#ifdef WIDE
/* The same to float16 for whole groups of sixteen -> how far it came. */
WIDE static int64_t halves_wide(const float *u, int64_t n, uint16_t *out)
{
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF), infinite = _mm512_set1_epi32(0x7F800000);
    const __m512 most = _mm512_set1_ps(65504.0f), least = _mm512_set1_ps(-65504.0f);
    int64_t a = 0;
    for (; a + 16 <= n; a += 16) {
        __m512 x = _mm512_loadu_ps(u + a);
        __m512i bits = _mm512_castps_si512(x), size = _mm512_and_si512(bits, magnitude);
        __mmask16 finite = _mm512_cmplt_epi32_mask(size, infinite), nan = _mm512_cmpgt_epi32_mask(size, infinite);
        x = _mm512_mask_min_ps(x, finite, x, most);
        x = _mm512_mask_max_ps(x, finite, x, least);
        bits = _mm512_mask_or_epi32(_mm512_castps_si512(x), nan, _mm512_andnot_si512(magnitude, bits),
                                    _mm512_set1_epi32(0x7FC00000));
        __m256i half = _mm512_cvtps_ph(_mm512_castsi512_ps(bits), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_storeu_si256((__m256i *)(void *)(out + a), half);
    }
    return a;
}
#else
#define halves_wide(...) 0
#endif

/* a where the condition holds, else b; a conditional expression would become a branch here, and the loop would stay scalar. */
static inline __attribute__((always_inline)) uint32_t pick(int condition, uint32_t a, uint32_t b)
{
    uint32_t mask = 0u - (uint32_t)condition;
    return (a & mask) | (b & ~mask);
}

/* Rounding to nearest, ties to even; finite values beyond the largest become the largest. kind 0: float16, 1: bfloat16. */
FAST API void tc_narrow(const float *restrict u, int64_t n, int kind, uint16_t *restrict out)
{
    const uint32_t *bits = (const uint32_t *)(const void *)u;
    if (kind == 1) {
        for (int64_t i = 0; i < n; i++) {
            uint32_t magnitude = bits[i] & 0x7FFFFFFFu, sign = bits[i] >> 16 & 0x8000u;
            uint32_t rounded = (magnitude + 0x7FFFu + (magnitude >> 16 & 1)) >> 16;
            rounded = rounded > 0x7F7Fu ? 0x7F7Fu : rounded;
            rounded = magnitude == 0x7F800000u ? 0x7F80u : rounded;
            out[i] = (uint16_t)(sign | (magnitude > 0x7F800000u ? 0x7FC0u : rounded));
        }
        return;
    }
    for (int64_t a = wide() ? halves_wide(u, n, out) : 0; a < n; a += CHUNK) {
        int64_t width = n - a < CHUNK ? n - a : CHUNK;
        /* below the smallest normal (2^-14): by adding one half, whose last place is the distance of two subnormals */
        float shifted[CHUNK];
        for (int64_t i = 0; i < width; i++)
            shifted[i] = fabsf(u[a + i]) + 0.5f;
        const uint32_t *small = (const uint32_t *)(const void *)shifted;
        for (int64_t i = 0; i < width; i++) {
            uint32_t magnitude = bits[a + i] & 0x7FFFFFFFu, sign = bits[a + i] >> 16 & 0x8000u;
            uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1)) >> 13;
            normal = pick(normal > 0x7BFFu, 0x7BFFu, normal);
            normal = pick(magnitude == 0x7F800000u, 0x7C00u, normal);
            normal = pick(magnitude > 0x7F800000u, 0x7E00u, normal);
            out[a + i] = (uint16_t)(sign | pick(magnitude < 0x38800000u, small[i] - 0x3F000000u, normal));
        }
    }
}

/* ----------------------------------------------------------------------------------------------------------- select */

static int ascending(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* Sixteen words at a time: bit i says whether word at + i, without its last bit, is in from .. to. */
static inline __attribute__((always_inline)) uint32_t chosen(uint64_t key, uint64_t at, int n, uint64_t from, uint64_t to)
{
    uint32_t mask = 0;
    for (int i = 0; i < n; i++)
        mask |= (uint32_t)((word(key, at + (uint64_t)i) >> 1) - from <= to - from) << i;
    return mask;
}

#ifdef WIDE
WIDE static inline __attribute__((always_inline)) __m512i mix8(__m512i x)
{
    x = _mm512_mullo_epi64(_mm512_xor_si512(x, _mm512_srli_epi64(x, 30)), _mm512_set1_epi64((int64_t)0xBF58476D1CE4E5B9ull));
    x = _mm512_mullo_epi64(_mm512_xor_si512(x, _mm512_srli_epi64(x, 27)), _mm512_set1_epi64((int64_t)0x94D049BB133111EBull));
    return _mm512_srli_epi64(_mm512_xor_si512(x, _mm512_srli_epi64(x, 31)), 1);
}

/* The counters of words at .. at + 7 of a key, before they are mixed. */
WIDE static inline __attribute__((always_inline)) __m512i counters(uint64_t key, uint64_t at)
{
    uint64_t c[8];
    for (uint64_t i = 0; i < 8; i++)
        c[i] = (key ^ STREAM) + (at + i + 1) * GOLDEN;
    return _mm512_loadu_si512(c);
}

/* The sixteen words from counters `c` on, compared with `edge`; c moves on. */
WIDE static inline __attribute__((always_inline)) uint32_t chosen16(__m512i *c, __m512i edge)
{
    const __m512i eight = _mm512_set1_epi64((int64_t)(8 * GOLDEN));
    __m512i low = mix8(*c), second = _mm512_add_epi64(*c, eight), high = mix8(second);
    *c = _mm512_add_epi64(second, eight);
    return (uint32_t)_mm512_cmple_epu64_mask(low, edge) | (uint32_t)_mm512_cmple_epu64_mask(high, edge) << 8;
}

/* Counts words below `from`, gathers those from there to `to`, for whole groups of sixteen -> how far it came. */
WIDE static int64_t gather_wide(uint64_t key, int64_t d, uint64_t from, uint64_t to, uint64_t *window, int64_t room,
                                int64_t *below, int64_t *found)
{
    __m512i c = counters(key, 0), upper = _mm512_set1_epi64((int64_t)to), lower = _mm512_set1_epi64((int64_t)from);
    const __m512i eight = _mm512_set1_epi64((int64_t)(8 * GOLDEN));
    int64_t a = 0;
    for (; a + 8 <= d && *found <= room; a += 8) {
        __m512i words = mix8(c);
        c = _mm512_add_epi64(c, eight);
        uint32_t less = _mm512_cmplt_epu64_mask(words, lower), inside = _mm512_cmple_epu64_mask(words, upper) & ~less;
        *below += __builtin_popcount(less);
        if (inside) {
            _mm512_storeu_si512(window + *found, _mm512_maskz_compress_epi64((__mmask8)inside, words));
            *found += __builtin_popcount(inside);
        }
    }
    return a;
}

WIDE static int64_t keep_wide(const float *u, int64_t d, uint64_t key, uint64_t threshold, float scale, float *out,
                              int64_t room, int64_t *count, uint32_t *most)
{
    __m512i c = counters(key, 0), edge = _mm512_set1_epi64((int64_t)threshold), sign = _mm512_set1_epi32(0x7FFFFFFF);
    __m512i largest = _mm512_setzero_si512();
    int64_t a = 0;
    for (; a + 16 <= d && *count + 16 <= room; a += 16) {
        __m512 x = _mm512_loadu_ps(u + a);
        uint32_t mask = chosen16(&c, edge);
        largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(x), sign));
        if (mask) {
            __m512 kept = _mm512_maskz_compress_ps((__mmask16)mask, x);
            _mm512_storeu_ps(out + *count, _mm512_mul_ps(kept, _mm512_set1_ps(scale)));
            *count += __builtin_popcount(mask);
        }
    }
    *most = _mm512_reduce_max_epu32(largest);
    return a;
}

WIDE static int64_t spread_wide(const float *values, int64_t room, uint64_t key, uint64_t threshold, float *out, int64_t d,
                                int64_t *count)
{
    __m512i c = counters(key, 0), edge = _mm512_set1_epi64((int64_t)threshold);
    int64_t a = 0;
    for (; a + 16 <= d && *count + 16 <= room; a += 16) {
        uint32_t mask = chosen16(&c, edge);
        _mm512_storeu_ps(out + a, _mm512_maskz_expand_ps((__mmask16)mask, _mm512_loadu_ps(values + *count)));
        *count += __builtin_popcount(mask);
    }
    return a;
}

#else
#define gather_wide(...) 0
#define keep_wide(...) 0
#define spread_wide(...) 0
#endif

/* Counts the words below `from`, and gathers those from there to `to` -> how many; more than `room`: not all are there. */
FAST static int64_t gather(uint64_t key, int64_t d, uint64_t from, uint64_t to, uint64_t *window, int64_t room, int64_t *below)
{
    int64_t found = 0, a = 0;
    *below = 0;
    if (wide())
        a = gather_wide(key, d, from, to, window, room, below, &found);
    for (; a < d && found <= room; a++) {
        uint64_t one = word(key, (uint64_t)a) >> 1;
        *below += one < from;
        window[found] = one;
        found += one - from <= to - from;
    }
    return found;
}

/* The k-th smallest of d words (63 bits each): looked for in a narrow window around where it must be, else among all. */
static int64_t threshold(uint64_t key, int64_t d, int64_t k)
{
    double margin = 10.0 * sqrt((double)k * (double)(d - k) / (double)d) + 20.0;
    double low = ((double)k - margin) / (double)d * 0x1p63, high = ((double)k + margin) / (double)d * 0x1p63;
    for (int all = 0; all < 2; all++) {
        uint64_t from = all || low <= 0 ? 0 : (uint64_t)low, to = all || high >= 0x1p63 ? UINT64_MAX : (uint64_t)high;
        int64_t room = all ? d : (int64_t)(3.0 * margin) + 1000, below = 0;
        room = room < d ? room : d;
        uint64_t *window = malloc((size_t)(room + 16) * sizeof(uint64_t));
        if (!window)
            return -1;
        int64_t found = gather(key, d, from, to, window, room, &below);
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

API void tc_threshold(const uint64_t *keys, int64_t rows, int64_t d, int64_t k, int64_t *out)
{
    for (int64_t r = 0; r < rows; r++)
        out[r] = threshold(keys[r], d, k);
}

/* u[i] * scale for every i whose word is at most the threshold, one after the other -> how many. out holds `room`.
 * Only NaN, and `room`, if u is not finite. */
FAST static int64_t keep(const float *restrict u, int64_t d, uint64_t key, int64_t threshold, float scale,
                         float *restrict out, int64_t room)
{
    int64_t count = 0, a = 0;
    uint32_t most = 0;
    if (wide() && threshold >= 0)
        a = keep_wide(u, d, key, (uint64_t)threshold, scale, out, room, &count, &most);
    for (; a < d; a += 16) {
        int width = d - a < 16 ? (int)(d - a) : 16;
        uint32_t mask = threshold < 0 ? 0 : chosen(key, (uint64_t)a, width, 0, (uint64_t)threshold);
        for (int i = 0; i < width; i++) {
            uint32_t bits;
            memcpy(&bits, u + a + i, 4);
            bits &= 0x7FFFFFFFu;
            most = bits > most ? bits : most;
        }
        for (; mask && count < room; mask &= mask - 1)
            out[count++] = u[a + __builtin_ctz(mask)] * scale;
    }
    memset(out + count, 0, (size_t)(room - count) * sizeof(float));
    if (most < 0x7F800000u)
        return count;
    for (int64_t i = 0; i < room; i++)
        out[i] = NAN;
    return room;
}

API void tc_keep(const float *u, int64_t rows, int64_t d, const uint64_t *keys, const int64_t *thresholds, float scale, float *out,
                 int64_t room, int32_t *counts)
{
    for (int64_t r = 0; r < rows; r++)
        counts[r] = (int32_t)keep(u + r * d, d, keys[r], thresholds[r], scale, out + r * room, room);
}

/* The inverse: values in their places, zeros elsewhere -> how many places there are. values holds `room`. */
FAST static int64_t spread(const float *restrict values, int64_t room, uint64_t key, int64_t threshold, float *restrict out,
                           int64_t d)
{
    int64_t count = 0, a = 0;
    if (wide() && threshold >= 0)
        a = spread_wide(values, room, key, (uint64_t)threshold, out, d, &count);
    memset(out + a, 0, (size_t)(d - a) * sizeof(float));
    for (; a < d && threshold >= 0; a += 16) {
        int width = d - a < 16 ? (int)(d - a) : 16;
        for (uint32_t mask = chosen(key, (uint64_t)a, width, 0, (uint64_t)threshold); mask; mask &= mask - 1, count++)
            if (count < room)
                out[a + __builtin_ctz(mask)] = values[count];
    }
    return count;
}

API void tc_spread(const float *values, int64_t rows, int64_t room, const uint64_t *keys, const int64_t *thresholds, float *out,
                   int64_t d, int32_t *places)
{
    for (int64_t r = 0; r < rows; r++)
        places[r] = (int32_t)spread(values + r * room, room, keys[r], thresholds[r], out + r * d, d);
}

/* The k values of largest magnitude (of equals those that come first), in their order, and their places. */
FAST static int largest(const float *u, int64_t d, int64_t k, float *values, int64_t *places)
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

/* 0, or 1 where there is no memory. */
API int tc_largest(const float *u, int64_t rows, int64_t d, int64_t k, float *values, int64_t *places)
{
    int failed = 0;
    for (int64_t r = 0; r < rows; r++)
        failed |= largest(u + r * d, d, k, values + r * k, places + r * k) != 0;
    return failed;
}

/* ----------------------------------------------------------------------------------------------------------- rotate */

#if defined(__GNUC__)
typedef float lanes16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t order16 __attribute__((vector_size(64)));

/* Butterflies at distances 1, 2, 4, 8 within sixteen values; the same sums as in the loop over distances. The orders are
 * spelled out, for the compiler makes one instruction only of a shuffle that it knows. */
#define BUTTERFLY(v, h, ...)                                                                                           \
    do {                                                                                                               \
        const order16 partner = {__VA_ARGS__};                                                                         \
        lanes16 other = __builtin_shuffle(v, partner), sum = other + v, difference = other - v;                        \
        const order16 upper = (lane & (h)) != 0;                                                                       \
        v = (lanes16)(((order16)sum & ~upper) | ((order16)difference & upper));                                        \
    } while (0)

FAST static void within16(float *x, int64_t n)
{
    const order16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int64_t a = 0; a < n; a += 16) {
        lanes16 v;
        memcpy(&v, x + a, sizeof v);
        BUTTERFLY(v, 1, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
        BUTTERFLY(v, 2, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
        BUTTERFLY(v, 4, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
        BUTTERFLY(v, 8, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
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
    for (; 2 * h < n; h *= 4) /* two distances in one pass over memory; the same sums */
        for (int64_t a = 0; a < n; a += 4 * h)
            for (int64_t i = a; i < a + h; i++) {
                float p = x[i] + x[i + h], q = x[i] - x[i + h];
                float r = x[i + 2 * h] + x[i + 3 * h], s = x[i + 2 * h] - x[i + 3 * h];
                x[i] = p + r;
                x[i + h] = q + s;
                x[i + 2 * h] = p - r;
                x[i + 3 * h] = q - s;
            }
    if (h < n)
        for (int64_t i = 0; i < h; i++) {
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
static void rotate(const float *u, int64_t d, uint64_t key, int64_t block, int inverse, float *out)
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

API void tc_rotate(const float *u, int64_t rows, int64_t d, const uint64_t *keys, int64_t block, int inverse, float *out)
{
    for (int64_t r = 0; r < rows; r++)
        rotate(u + r * d, d, keys[r], block, inverse, out + r * d);
}
