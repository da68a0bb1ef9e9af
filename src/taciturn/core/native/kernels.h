/* What every kernel shares: how a function is made for several instruction sets, and the counter hash.
 *
 * Compiled with -ffp-contract=off: a fused multiply-add would round otherwise than torch does, and the bits must agree.
 */
#ifndef TACITURN_KERNELS_H
#define TACITURN_KERNELS_H

#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define FAST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FAST
#endif

#define API __attribute__((visibility("default")))

#define GOLDEN 0x9E3779B97F4A7C15ull
#define STREAM 0xD1B54A32D192ED03ull

/* The finalizer of SplitMix64; core/random.py says the same in torch. */
static inline __attribute__((always_inline)) uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

/* Word i of a key: random.bits(key, n)[i]. */
static inline __attribute__((always_inline)) uint64_t word(uint64_t key, uint64_t i)
{
    return mix((key ^ STREAM) + (i + 1) * GOLDEN);
}

#endif
