/* The two inner loops of a merge, fused. `arithmetic.py` has the same in numpy, and a test holds them equal bit for bit.
 *
 * No Python headers are needed: the functions are called through ctypes, which lets go of the interpreter's lock.
 * Built with -ffp-contract=off: a fused multiply-add rounds once where multiply and add round twice, so that the
 * result would depend on the machine.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#pragma STDC FP_CONTRACT OFF

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define ON_ANY_MACHINE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define ON_ANY_MACHINE
#endif

enum { LINE = 1024 }; /* elements summed at a time: their float64 sums stay in the first-level cache */

static inline float widened(uint16_t bf16) {
    uint32_t bits = (uint32_t)bf16 << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* out[i] = float32(sum over k, in order, of coefficients[k] * sources[k][i]), summed in float64, rounded once.
 * Returns whether every out[i] is finite. */
ON_ANY_MACHINE
int wsm_weighted_sum(float *restrict out, const void *const *sources, const uint8_t *is_bf16,
                     const double *coefficients, size_t source_count, size_t numel) {
    double sums[LINE];
    uint32_t not_finite = 0;
    for (size_t begin = 0; begin < numel; begin += LINE) {
        size_t count = numel - begin < LINE ? numel - begin : LINE;
        for (size_t k = 0; k < source_count; k++) {
            double c = coefficients[k];
            if (is_bf16[k]) {
                const uint16_t *values = (const uint16_t *)sources[k] + begin;
                if (k == 0)
                    for (size_t i = 0; i < count; i++) sums[i] = (double)widened(values[i]) * c;
                else
                    for (size_t i = 0; i < count; i++) sums[i] += (double)widened(values[i]) * c;
            } else {
                const float *values = (const float *)sources[k] + begin;
                if (k == 0)
                    for (size_t i = 0; i < count; i++) sums[i] = (double)values[i] * c;
                else
                    for (size_t i = 0; i < count; i++) sums[i] += (double)values[i] * c;
            }
        }
        for (size_t i = 0; i < count; i++) {
            float rounded = (float)sums[i];
            uint32_t bits;
            memcpy(&bits, &rounded, sizeof bits);
            not_finite |= (bits & 0x7f800000u) == 0x7f800000u;
            out[begin + i] = rounded;
        }
    }
    return !not_finite;
}

/* out[i] = bfloat16(values[i]), rounded to nearest even. The values are finite. */
ON_ANY_MACHINE
void wsm_round_to_bf16(uint16_t *restrict out, const float *restrict values, size_t numel) {
    for (size_t i = 0; i < numel; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, sizeof bits);
        out[i] = (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
}
