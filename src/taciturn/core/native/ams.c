/* The sketch of Alon, Matias and Szegedy: its hashes and its sums. The twins in core/eager.py give the same bits; core/kernel.py
 * says what is computed.
 */
#include "kernels.h"

#include <stdlib.h>
#include <string.h>

#define BUCKETS 32768 /* what 15 bits can name */
#define TOGETHER 3    /* rows that share one pass over u */

/* ------------------------------------------------------------------------------------------------------------ table */

/* fold(a i + c): all three below 2^31, so that nothing overflows. */
static inline __attribute__((always_inline)) uint64_t hash(uint64_t a, uint64_t i, uint64_t c)
{
    uint64_t r = (uint64_t)(uint32_t)a * (uint32_t)i + c;
    return (r ^ r >> 31) & 0x7FFFFFFFu;
}

/* f: six coefficients that lie `stride` apart. inverse = floor((2^32 - 1) / b), so the quotient is at most one too low. */
FAST static void row_of_table(const int64_t *f, int64_t stride, int64_t first, int64_t d, uint64_t b, uint16_t *restrict out)
{
    uint64_t c[6], inverse = 0xFFFFFFFFu / b;
    for (int k = 0; k < 6; k++)
        c[k] = (uint64_t)f[k * stride];
    for (int64_t at = 0; at < d; at++) {
        uint64_t i = (uint64_t)(first + at), h = hash(c[0], i, c[1]);
        uint64_t bucket = h - (h * inverse >> 32) * b;
        bucket -= bucket >= b ? b : 0;
        uint64_t sign = hash(hash(hash(c[2], i, c[3]), i, c[4]), i, c[5]);
        out[at] = (uint16_t)(bucket | (~sign & 0x8000u)); /* bit 15 of the hash set: plus */
    }
}

API void tc_ams_table(const int64_t *coefficients, int64_t sets, int64_t m, int64_t first, int64_t d, int64_t b, uint16_t *out)
{
    for (int64_t s = 0; s < sets; s++)
        for (int64_t j = 0; j < m; j++)
            row_of_table(coefficients + s * 6 * m + j, m, first, d, (uint64_t)b, out + (s * m + j) * d);
}

/* ----------------------------------------------------------------------------------------------------------- sketch */

static inline __attribute__((always_inline)) void add(double *sums, uint64_t entry, uint64_t bits)
{
    double value;
    bits ^= (entry & 0x8000u) << 48;
    memcpy(&value, &bits, sizeof value);
    sums[entry & 0x7FFFu] += value;
}

/* The values of u in turn, each to the sums of `rows` rows of the table at once. */
static inline __attribute__((always_inline)) void gather(const float *u, const uint16_t *table, int64_t d, int rows, double *sums)
{
    for (int64_t i = 0; i < d; i++) {
        double value = (double)u[i];
        uint64_t bits;
        memcpy(&bits, &value, sizeof bits);
        for (int j = 0; j < rows; j++)
            add(sums + j * BUCKETS, table[j * d + i], bits);
    }
}

FAST static void gather_1(const float *u, const uint16_t *table, int64_t d, double *sums)
{
    gather(u, table, d, 1, sums);
}

FAST static void gather_2(const float *u, const uint16_t *table, int64_t d, double *sums)
{
    gather(u, table, d, 2, sums);
}

FAST static void gather_3(const float *u, const uint16_t *table, int64_t d, double *sums)
{
    gather(u, table, d, 3, sums);
}

/* Every bucket that an entry can name has its sum, so no table writes elsewhere. Returns 1 if there is no memory. */
API int tc_ams(const float *u, int64_t rows, int64_t d, const uint16_t *table, int64_t m, int64_t b, float *out)
{
    double *sums = calloc(TOGETHER * BUCKETS, sizeof(double));
    if (!sums)
        return 1;
    for (int64_t r = 0; r < rows; r++, u += d)
        for (int64_t j = 0; j < m; j += TOGETHER) {
            int64_t n = m - j < TOGETHER ? m - j : TOGETHER;
            (n == 1 ? gather_1 : n == 2 ? gather_2 : gather_3)(u, table + j * d, d, sums);
            for (int64_t k = 0; k < n; k++) {
                for (int64_t q = 0; q < b; q++)
                    *out++ = (float)sums[k * BUCKETS + q];
                memset(sums + k * BUCKETS, 0, (size_t)b * sizeof(double));
            }
        }
    free(sums);
    return 0;
}
