/* The inner loops of a merge, fused. `arithmetic.py` has the same in numpy, and a test holds them equal bit for bit.
 *
 * No Python headers are needed: the functions are called through ctypes, which lets go of the interpreter's lock.
 * Built with -ffp-contract=off: a fused multiply-add rounds once where multiply and add round twice, so that the
 * result would depend on the machine.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#pragma STDC FP_CONTRACT OFF

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define ON_ANY_MACHINE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define ON_ANY_MACHINE
#endif

enum { PIECE = 8192 }; /* elements read and summed at a time: what they need stays in the second-level cache */

static inline float widened(uint16_t bf16) {
    uint32_t bits = (uint32_t)bf16 << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* sums = values * c, or sums += values * c: multiplied and added in float64, each rounded. */
ON_ANY_MACHINE
static void accumulate(double *restrict sums, const void *restrict stored, int is_bf16, double c, int is_first,
                       size_t count) {
    if (is_bf16) {
        const uint16_t *values = stored;
        if (is_first)
            for (size_t i = 0; i < count; i++) sums[i] = (double)widened(values[i]) * c;
        else
            for (size_t i = 0; i < count; i++) sums[i] += (double)widened(values[i]) * c;
    } else {
        const float *values = stored;
        if (is_first)
            for (size_t i = 0; i < count; i++) sums[i] = (double)values[i] * c;
        else
            for (size_t i = 0; i < count; i++) sums[i] += (double)values[i] * c;
    }
}

/* out = float32(sums); whether all of it is finite. */
ON_ANY_MACHINE
static int rounded(float *restrict out, const double *restrict sums, size_t count) {
    uint32_t not_finite = 0;
    for (size_t i = 0; i < count; i++) {
        float value = (float)sums[i];
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        not_finite |= (bits & 0x7f800000u) == 0x7f800000u;
        out[i] = value;
    }
    return !not_finite;
}

/* out[i] = float32(sum over k, in order, of coefficients[k] * sources[k][i]), summed in float64, rounded once.
 * Returns whether every out[i] is finite. */
int wsm_weighted_sum(float *out, const void *const *sources, const uint8_t *is_bf16, const double *coefficients,
                     size_t source_count, size_t numel) {
    double sums[PIECE];
    int is_finite = 1;
    for (size_t begin = 0; begin < numel; begin += PIECE) {
        size_t count = numel - begin < PIECE ? numel - begin : PIECE;
        for (size_t k = 0; k < source_count; k++)
            accumulate(sums, (const char *)sources[k] + begin * (is_bf16[k] ? 2 : 4), is_bf16[k], coefficients[k],
                       k == 0, count);
        is_finite &= rounded(out + begin, sums, count);
    }
    return is_finite;
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* The same for several sums of the same sources, which are read here, piece by piece, while they are hot.
 *
 *   outs           sum_count arrays of numel floats
 *   descriptors, offsets, is_bf16
 *                  where each source's elements begin, and what they are
 *   coefficients   [sum_count][source_count]; is_member says which of them count
 *   scratch        8 * PIECE * (sum_count + 1) bytes
 *   spent_s        gets the seconds spent in reading
 *
 * Returns 1 if every out is finite, 0 if not, -1 if a source could not be read in full: the caller then reads again in
 * its own, slower way, which tells why. */
int wsm_read_and_sum(float *const *outs, const int *descriptors, const int64_t *offsets, const uint8_t *is_bf16,
                     const double *coefficients, const uint8_t *is_member, size_t source_count, size_t sum_count,
                     size_t numel, void *scratch, double *spent_s) {
    double *sums = scratch;
    void *stored = sums + PIECE * sum_count;
    int is_finite = 1;
    for (size_t begin = 0; begin < numel; begin += PIECE) {
        size_t count = numel - begin < PIECE ? numel - begin : PIECE;
        uint64_t begun = 0; /* a bit for each sum that has its first source */
        for (size_t k = 0; k < source_count; k++) {
            size_t size = is_bf16[k] ? 2 : 4, done = 0;
            double started_s = seconds();
            while (done < count * size) {
                ssize_t got = pread(descriptors[k], (char *)stored + done, count * size - done,
                                    (off_t)(offsets[k] + (int64_t)(begin * size + done)));
                if (got <= 0) return -1;
                done += (size_t)got;
            }
            *spent_s += seconds() - started_s;
            for (size_t s = 0; s < sum_count; s++) {
                if (!is_member[s * source_count + k]) continue;
                accumulate(sums + s * PIECE, stored, is_bf16[k], coefficients[s * source_count + k],
                           !(begun >> s & 1), count);
                begun |= (uint64_t)1 << s;
            }
        }
        for (size_t s = 0; s < sum_count; s++) is_finite &= rounded(outs[s] + begin, sums + s * PIECE, count);
    }
    return is_finite;
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
