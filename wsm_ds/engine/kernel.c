/* The inner loops of a merge: read, sum and round. `arithmetic.py` has the same sums in numpy, and a test checks that
 * both give the same bits.
 *
 * The functions are called through ctypes, which releases Python's global lock, so no Python headers are needed.
 * Built with -ffp-contract=off: a fused multiply-add rounds once, a multiplication and an addition round twice. With
 * contraction the result would depend on the machine.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

enum {
    BLOCK = 32,             /* elements whose sums stay in registers while all sources are added */
    MAX_PIECE = 1 << 15,    /* most elements of a source that are read and summed at a time */
    STORED_BYTES = 1 << 19, /* bytes of such pieces of all sources: they fit into the second-level cache */
    IN_MEMORY = INT32_MIN,  /* stands for a descriptor; unlike -1, no system call returns it */
};

/* One source in a sum: its elements as they are stored, their dtype (bf16, else fp32), and its coefficient. */
typedef struct {
    const char *stored;
    int64_t is_bf16;
    double coefficient;
} Term;

static inline float widened(const Term *term, size_t at) {
    float value;
    if (term->is_bf16) {
        uint16_t bf16;
        memcpy(&bf16, term->stored + 2 * at, sizeof bf16);
        uint32_t bits = (uint32_t)bf16 << 16;
        memcpy(&value, &bits, sizeof value);
    } else {
        memcpy(&value, term->stored + 4 * at, sizeof value);
    }
    return value;
}

/* out = float32(sum of the terms, in order). Each product and each sum is rounded to float64. `count` is a multiple of
 * BLOCK. Returns whether every sum is finite. */
static int summed_anywhere(float *out, const Term *terms, size_t term_count, size_t count) {
    int is_finite = 1;
    for (size_t at = 0; at < count; at += BLOCK) {
        double sums[BLOCK];
        for (size_t i = 0; i < BLOCK; i++) sums[i] = (double)widened(terms, at + i) * terms->coefficient;
        for (size_t k = 1; k < term_count; k++)
            for (size_t i = 0; i < BLOCK; i++) sums[i] += (double)widened(terms + k, at + i) * terms[k].coefficient;
        for (size_t i = 0; i < BLOCK; i++) {
            out[at + i] = (float)sums[i];
            is_finite &= isfinite(out[at + i]) != 0;
        }
    }
    return is_finite;
}

int wsm_vector_bits = 0; /* 512, 256 or 0. Set when the library is loaded; a test lowers it. */

#ifdef __x86_64__
__attribute__((constructor)) static void detect_vector_bits(void) {
    wsm_vector_bits = __builtin_cpu_supports("avx512f") ? 512 : __builtin_cpu_supports("avx2") ? 256 : 0;
}

#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f")))
#define INLINE __attribute__((always_inline)) static inline

/* Four elements of a term, times c. */
AVX2 INLINE __m256d scaled_4(const Term *term, size_t at, __m256d c) {
    __m128 values;
    if (term->is_bf16) {
        __m128i bf16 = _mm_loadl_epi64((const __m128i *)(term->stored + 2 * at));
        values = _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(bf16), 16));
    } else {
        values = _mm_loadu_ps((const float *)(const void *)(term->stored + 4 * at));
    }
    return _mm256_mul_pd(_mm256_cvtps_pd(values), c);
}

/* Eight elements of a term, times c. */
AVX512 INLINE __m512d scaled_8(const Term *term, size_t at, __m512d c) {
    __m256 values;
    if (term->is_bf16) {
        __m128i bf16 = _mm_loadu_si128((const __m128i *)(const void *)(term->stored + 2 * at));
        values = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
    } else {
        values = _mm256_loadu_ps((const float *)(const void *)(term->stored + 4 * at));
    }
    return _mm512_mul_pd(_mm512_cvtps_pd(values), c);
}

/* The same as summed_anywhere. The sums are explicitly in registers, where compilers do not keep them by themselves:
 * twice as fast. */
AVX2 static int summed_avx2(float *out, const Term *terms, size_t term_count, size_t count) {
    const __m128i exponent = _mm_set1_epi32(0x7f800000);
    __m128i not_finite = _mm_setzero_si128();
    for (size_t at = 0; at < count; at += BLOCK) {
        __m256d sums[BLOCK / 4], c = _mm256_set1_pd(terms->coefficient);
        for (size_t u = 0; u < BLOCK / 4; u++) sums[u] = scaled_4(terms, at + 4 * u, c);
        for (size_t k = 1; k < term_count; k++) {
            c = _mm256_set1_pd(terms[k].coefficient);
            for (size_t u = 0; u < BLOCK / 4; u++) sums[u] = _mm256_add_pd(sums[u], scaled_4(terms + k, at + 4 * u, c));
        }
        for (size_t u = 0; u < BLOCK / 4; u++) {
            __m128 rounded = _mm256_cvtpd_ps(sums[u]);
            __m128i bits = _mm_and_si128(_mm_castps_si128(rounded), exponent);
            not_finite = _mm_or_si128(not_finite, _mm_cmpeq_epi32(bits, exponent));
            _mm_storeu_ps(out + at + 4 * u, rounded);
        }
    }
    return _mm_testz_si128(not_finite, not_finite);
}

AVX512 static int summed_avx512(float *out, const Term *terms, size_t term_count, size_t count) {
    const __m256i exponent = _mm256_set1_epi32(0x7f800000);
    __m256i not_finite = _mm256_setzero_si256();
    for (size_t at = 0; at < count; at += BLOCK) {
        __m512d sums[BLOCK / 8], c = _mm512_set1_pd(terms->coefficient);
        for (size_t u = 0; u < BLOCK / 8; u++) sums[u] = scaled_8(terms, at + 8 * u, c);
        for (size_t k = 1; k < term_count; k++) {
            c = _mm512_set1_pd(terms[k].coefficient);
            for (size_t u = 0; u < BLOCK / 8; u++) sums[u] = _mm512_add_pd(sums[u], scaled_8(terms + k, at + 8 * u, c));
        }
        for (size_t u = 0; u < BLOCK / 8; u++) {
            __m256 rounded = _mm512_cvtpd_ps(sums[u]);
            __m256i bits = _mm256_and_si256(_mm256_castps_si256(rounded), exponent);
            not_finite = _mm256_or_si256(not_finite, _mm256_cmpeq_epi32(bits, exponent));
            _mm256_storeu_ps(out + at + 8 * u, rounded);
        }
    }
    return _mm256_testz_si256(not_finite, not_finite);
}
#else
#define summed_avx2 summed_anywhere
#define summed_avx512 summed_anywhere
#endif

/* summed_anywhere, in the version for this processor. */
static int summed(float *out, const Term *terms, size_t term_count, size_t count) {
    if (wsm_vector_bits == 512) return summed_avx512(out, terms, term_count, count);
    if (wsm_vector_bits == 256) return summed_avx2(out, terms, term_count, count);
    return summed_anywhere(out, terms, term_count, count);
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Returns whether all of the bytes could be read. */
static int read_all(int descriptor, char *into, size_t nbytes, int64_t offset) {
    while (nbytes) {
        ssize_t got = pread(descriptor, into, nbytes, (off_t)offset);
        if (got <= 0) return 0;
        into += got, offset += got, nbytes -= (size_t)got;
    }
    return 1;
}

/* CRC-32 (zlib's, reflected polynomial 0xEDB88320) of bytes, from that of the bytes before them. */
static uint32_t crc_anywhere(uint32_t crc, const unsigned char *data, size_t nbytes) {
    crc = ~crc;
    for (size_t i = 0; i < nbytes; i++) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (0xEDB88320u & -(crc & 1));
    }
    return ~crc;
}

int wsm_crc_bits = 0; /* 512, 128 or 0: polynomials that the processor multiplies. Set when the library is loaded. */

#ifdef __x86_64__
__attribute__((constructor)) static void detect_crc_bits(void) {
    if (__builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1")) wsm_crc_bits = 128;
    if (wsm_crc_bits && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq")) wsm_crc_bits = 512;
}

#define PCLMUL __attribute__((target("pclmul,sse4.1")))
#define VPCLMUL __attribute__((target("pclmul,sse4.1,avx512f,vpclmulqdq")))

/* The remainder `x` times a power of x, plus the next 16 bytes. */
PCLMUL INLINE __m128i folded(__m128i x, __m128i powers, __m128i next) {
    __m128i low = _mm_clmulepi64_si128(x, powers, 0x00), high = _mm_clmulepi64_si128(x, powers, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

PCLMUL INLINE __m128i loaded(const unsigned char *data) { return _mm_loadu_si128((const __m128i *)(const void *)data); }

/* Method of the three functions, and the values of the constants: V. Gopal et al., Fast CRC Computation for Generic
 * Polynomials Using PCLMULQDQ Instruction, Intel 2009. A constant is x^n modulo the polynomial, bits reversed; n is the
 * distance in bits to the bytes that the remainder is added to. */

/* Reduces a remainder of 128 bits after Barrett, with the bytes that follow it. */
PCLMUL static uint32_t crc_reduced(__m128i rest, const unsigned char *data, size_t nbytes) {
    const __m128i k3k4 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0), k5 = _mm_set_epi64x(0, 0x163cd6124);
    const __m128i poly = _mm_set_epi64x(0x1f7011641, 0x1db710641), low_32 = _mm_setr_epi32(-1, 0, -1, 0);
    for (; nbytes >= 16; data += 16, nbytes -= 16) rest = folded(rest, k3k4, loaded(data));
    rest = _mm_xor_si128(_mm_srli_si128(rest, 8), _mm_clmulepi64_si128(rest, k3k4, 0x10));
    rest = _mm_xor_si128(_mm_srli_si128(rest, 4), _mm_clmulepi64_si128(_mm_and_si128(rest, low_32), k5, 0x00));
    __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(rest, low_32), poly, 0x10);
    rest = _mm_xor_si128(rest, _mm_clmulepi64_si128(_mm_and_si128(quotient, low_32), poly, 0x00));
    return crc_anywhere(~(uint32_t)_mm_extract_epi32(rest, 1), data, nbytes);
}

/* crc_anywhere, 64 bytes at a time. */
PCLMUL static uint32_t crc_128(uint32_t crc, const unsigned char *data, size_t nbytes) {
    if (nbytes < 64) return crc_anywhere(crc, data, nbytes);
    const __m128i k1k2 = _mm_set_epi64x(0x1c6e41596, 0x154442bd4), k3k4 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
    __m128i x[4];
    for (int i = 0; i < 4; i++) x[i] = loaded(data + 16 * i);
    x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128((int)~crc));
    for (data += 64, nbytes -= 64; nbytes >= 64; data += 64, nbytes -= 64)
        for (int i = 0; i < 4; i++) x[i] = folded(x[i], k1k2, loaded(data + 16 * i));
    return crc_reduced(folded(folded(folded(x[0], k3k4, x[1]), k3k4, x[2]), k3k4, x[3]), data, nbytes);
}

VPCLMUL INLINE __m512i folded_4(__m512i x, __m512i powers, __m512i next) {
    __m512i low = _mm512_clmulepi64_epi128(x, powers, 0x00), high = _mm512_clmulepi64_epi128(x, powers, 0x11);
    return _mm512_ternarylogic_epi64(low, high, next, 0x96); /* the exclusive or of the three */
}

/* crc_anywhere, 256 bytes at a time. */
VPCLMUL static uint32_t crc_512(uint32_t crc, const unsigned char *data, size_t nbytes) {
    if (nbytes < 256) return crc_128(crc, data, nbytes);
    const __m512i by_256 = _mm512_broadcast_i32x4(_mm_set_epi64x(0x1322d1430, 0x11542778a));
    const __m512i by_64 = _mm512_broadcast_i32x4(_mm_set_epi64x(0x1c6e41596, 0x154442bd4));
    const __m128i by_16 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
    __m512i x[4];
    for (int i = 0; i < 4; i++) x[i] = _mm512_loadu_si512(data + 64 * i);
    x[0] = _mm512_xor_si512(x[0], _mm512_inserti32x4(_mm512_setzero_si512(), _mm_cvtsi32_si128((int)~crc), 0));
    for (data += 256, nbytes -= 256; nbytes >= 256; data += 256, nbytes -= 256)
        for (int i = 0; i < 4; i++) x[i] = folded_4(x[i], by_256, _mm512_loadu_si512(data + 64 * i));
    __m512i all = folded_4(folded_4(folded_4(x[0], by_64, x[1]), by_64, x[2]), by_64, x[3]);
    __m128i rest = folded(_mm512_extracti32x4_epi32(all, 0), by_16, _mm512_extracti32x4_epi32(all, 1));
    rest = folded(rest, by_16, _mm512_extracti32x4_epi32(all, 2));
    return crc_reduced(folded(rest, by_16, _mm512_extracti32x4_epi32(all, 3)), data, nbytes);
}
#else
#define crc_128 crc_anywhere
#define crc_512 crc_anywhere
#endif

/* The CRC-32 of bytes, from that of the bytes before them. Slow if wsm_crc_bits is 0. */
uint32_t wsm_crc32(uint32_t crc, const void *data, size_t nbytes) {
    if (wsm_crc_bits == 512) return crc_512(crc, data, nbytes);
    if (wsm_crc_bits == 128) return crc_128(crc, data, nbytes);
    return crc_anywhere(crc, data, nbytes);
}

/* Elements of each source that are read and summed at a time; a multiple of BLOCK. */
static size_t piece_numel(size_t source_count) {
    size_t numel = STORED_BYTES / (4 * source_count) / BLOCK * BLOCK;
    return numel > MAX_PIECE ? MAX_PIECE : numel < BLOCK ? BLOCK : numel;
}

/* Bytes of scratch that wsm_sums needs. */
size_t wsm_scratch_bytes(size_t source_count) {
    return source_count * (sizeof(Term) + 4 * piece_numel(source_count));
}

/* Makes several weighted sums of the same elements. Reads the elements piece by piece and sums each piece while the
 * cache holds it.
 *
 *   outs           sum_count arrays of numel floats, with space up to the next multiple of BLOCK
 *   descriptors    [source_count]; of an open file, or IN_MEMORY
 *   offsets        [source_count]; byte offset of the first element in the file, or its address if IN_MEMORY
 *   is_bf16        [source_count]; else the elements are fp32
 *   coefficients   [sum_count][source_count]
 *   is_member      [sum_count][source_count]; whether the source is in the sum (a coefficient of 0 times an infinity
 *                  is not 0)
 *   crcs           [source_count], or null; the CRC-32 of the bytes before the source's, which becomes that of all
 *   scratch        see wsm_scratch_bytes
 *   read_s         the seconds spent in reading are added to it
 *
 * Returns 1 if every sum is finite, 0 if not, -1 if a source could not be read in full. After -1 the caller reads again
 * in Python, which is slower and says what is wrong. */
int wsm_sums(float *const *outs, const int *descriptors, const int64_t *offsets, const uint8_t *is_bf16,
             const double *coefficients, const uint8_t *is_member, size_t source_count, size_t sum_count, size_t numel,
             uint32_t *crcs, void *scratch, double *read_s) {
    Term *terms = scratch;
    char *stored = (char *)(terms + source_count);
    size_t piece = piece_numel(source_count);
    int is_finite = 1;
    for (size_t begin = 0; begin < numel; begin += piece) {
        size_t count = numel - begin < piece ? numel - begin : piece, padded = (count + BLOCK - 1) / BLOCK * BLOCK;
        double started_s = seconds();
        for (size_t k = 0; k < source_count; k++) {
            size_t size = is_bf16[k] ? 2 : 4;
            char *elements = stored + 4 * piece * k;
            int64_t offset = offsets[k] + (int64_t)(begin * size);
            if (descriptors[k] == IN_MEMORY)
                memcpy(elements, (const char *)(intptr_t)offset, count * size);
            else if (!read_all(descriptors[k], elements, count * size, offset))
                return -1;
            if (crcs) crcs[k] = wsm_crc32(crcs[k], elements, count * size);
            memset(elements + count * size, 0, (padded - count) * size);
        }
        *read_s += seconds() - started_s;
        for (size_t s = 0; s < sum_count; s++) {
            size_t term_count = 0;
            for (size_t k = 0; k < source_count; k++)
                if (is_member[s * source_count + k])
                    terms[term_count++] = (Term){stored + 4 * piece * k, is_bf16[k], coefficients[s * source_count + k]};
            is_finite &= summed(outs[s] + begin, terms, term_count, padded);
        }
    }
    return is_finite;
}

/* out[i] = bfloat16(values[i]), rounded to nearest even. The values are finite. */
void wsm_round_to_bf16(uint16_t *restrict out, const float *restrict values, size_t numel) {
    for (size_t i = 0; i < numel; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, sizeof bits);
        out[i] = (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
}

/* Moves the means of `numel` elements towards a sample: each mean is the sum of `means` and of `rests`, which hold what
 * the rounding of `means` leaves (Dekker's fast two-sum). */
void wsm_add_to_means(float *restrict means, float *restrict rests, const float *restrict sample, float weight,
                      size_t numel) {
    for (size_t i = 0; i < numel; i++) {
        float mean = means[i], rest = rests[i];
        rest += ((sample[i] - mean) - rest) * weight;
        float total = mean + rest;
        rests[i] = rest + (mean - total);
        means[i] = total;
    }
}
