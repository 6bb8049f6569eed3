/* Convolutions with AVX2 and FMA. */
#include "nn.h"
#include "levels.h"
#include "pixels.h"

#ifdef NN_X86
#include <immintrin.h>
#include <string.h>

#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define LANES 8
#define PIXELS 6
#define VECTORS 2

typedef __m256 V;

TARGET static INLINE __m256i v_first(int n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
TARGET static INLINE V v_load(const float *p) { return _mm256_loadu_ps(p); }
TARGET static INLINE V v_fetch(const float *p) /* for several uses: compilers would load it again for each */
{
    V v = v_load(p);
    __asm__("" : "+x"(v));
    return v;
}
TARGET static INLINE V v_some(const float *p, int n) { return _mm256_maskload_ps(p, v_first(n)); }
TARGET static INLINE void v_store(float *p, V v) { _mm256_storeu_ps(p, v); }
TARGET static INLINE void v_keep(float *p, V v, int n) { _mm256_maskstore_ps(p, v_first(n), v); }
TARGET static INLINE V v_set(float x) { return _mm256_set1_ps(x); }
TARGET static INLINE V v_add(V a, V b) { return _mm256_add_ps(a, b); }
TARGET static INLINE V v_mul(V a, V b) { return _mm256_mul_ps(a, b); }
TARGET static INLINE V v_fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
TARGET static INLINE V v_max(V a, V b) { return _mm256_max_ps(a, b); }
TARGET static INLINE V v_min(V a, V b) { return _mm256_min_ps(a, b); }
TARGET static INLINE V v_halves(V v) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8)); }
TARGET static INLINE V v_even(V a, V b) { return v_halves(_mm256_shuffle_ps(a, b, 0x88)); }
TARGET static INLINE V v_odd(V a, V b) { return v_halves(_mm256_shuffle_ps(a, b, 0xdd)); }

#define TILES TILE(6, 2) TILE(6, 1) TILE(1, 2) TILE(1, 1)
#define CHOOSE(count, vectors, arguments) \
    if (vectors == 2) \
        (count > 1 ? NAME(tile_6_2) : NAME(tile_1_2)) arguments; \
    else \
        (count > 1 ? NAME(tile_6_1) : NAME(tile_1_1)) arguments;
#include "conv_f32.h"

#define SPARSE_MOST(block) ((block) == 4 ? 2 : 4)
#define SPARSES SPARSE(1, 4) SPARSE(1, 3) SPARSE(1, 2) SPARSE(1, 1) SPARSE(2, 4) SPARSE(2, 3) SPARSE(2, 2) SPARSE(2, 1) \
            SPARSE(4, 2) SPARSE(4, 1)
#include "planes_f32.h"

#define UNIT 8
#define UNITS 1
#define INTEGER_PIXELS 4

/* Products of bytes as products of 16 bits: two sums for each output, of four outputs in each half. */
typedef struct {
    __m256i first, second;
} A;
typedef __m256i B;
typedef A W;
typedef __m256i D;
typedef __m256i P;

/* Even and odd lanes are multiplied to 64 bits apart. There is no arithmetic shift of 64 bits: a large number added
 * first and taken off after keeps values positive. */
typedef struct {
    __m256i factor, negative, even_start, odd_start, even_shift, odd_shift, even_less, odd_less, zero, low, high;
    int signs;
} R;

TARGET static INLINE __m256i r_start(__m256i shift)
{
    const __m256i one = _mm256_set1_epi64x(1);
    return _mm256_add_epi64(_mm256_sllv_epi64(one, _mm256_sub_epi64(shift, one)), _mm256_set1_epi64x((int64_t)1 << 62));
}
TARGET static INLINE R r_load(const nn_requantize *q, int channel, int n)
{
    const __m256i some = v_first(n), large = _mm256_set1_epi64x((int64_t)1 << 62);
    const __m256i shift = _mm256_max_epi32(_mm256_maskload_epi32(q->shift + channel, some), _mm256_set1_epi32(1));
    R r;
    r.signs = q->negative != NULL;
    r.factor = _mm256_maskload_epi32(q->multiplier + channel, some);
    r.negative = r.signs ? _mm256_maskload_epi32(q->negative + channel, some) : r.factor;
    r.even_shift = _mm256_and_si256(shift, _mm256_set1_epi64x(0xffffffff));
    r.odd_shift = _mm256_srli_epi64(shift, 32);
    r.even_start = r_start(r.even_shift);
    r.odd_start = r_start(r.odd_shift);
    r.even_less = _mm256_srlv_epi64(large, r.even_shift);
    r.odd_less = _mm256_srlv_epi64(large, r.odd_shift);
    r.zero = _mm256_set1_epi32(q->zero);
    r.low = _mm256_set1_epi32(q->low);
    r.high = _mm256_set1_epi32(q->high);
    return r;
}
TARGET static INLINE void r_store(const R *r, D v, int8_t *out, int n)
{
    const __m256i factor = r->signs ? _mm256_blendv_epi8(r->factor, r->negative, _mm256_srai_epi32(v, 31)) : r->factor;
    __m256i even = _mm256_mul_epi32(v, factor);
    __m256i odd = _mm256_mul_epi32(_mm256_srli_epi64(v, 32), _mm256_srli_epi64(factor, 32));
    int64_t bytes;
    even = _mm256_sub_epi64(_mm256_srlv_epi64(_mm256_add_epi64(even, r->even_start), r->even_shift), r->even_less);
    odd = _mm256_sub_epi64(_mm256_srlv_epi64(_mm256_add_epi64(odd, r->odd_start), r->odd_shift), r->odd_less);
    v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    v = _mm256_add_epi32(v, r->zero);
    v = _mm256_max_epi32(_mm256_min_epi32(v, r->high), r->low);
    v = _mm256_packs_epi32(v, v);
    v = _mm256_packs_epi16(_mm256_permute4x64_epi64(v, 0x08), v);
    bytes = _mm_cvtsi128_si64(_mm256_castsi256_si128(v));
    if (n == UNIT)
        memcpy(out, &bytes, UNIT);
    else
        memcpy(out, &bytes, (size_t)n);
}

TARGET static INLINE __m256i i_wide(const int32_t *p) { return _mm256_loadu_si256((const __m256i *)(const void *)p); }
TARGET static INLINE A i_start(const nn_requantize *q, int channel)
{
    const __m256i zero = _mm256_setzero_si256(), bias = i_wide(q->bias + channel);
    /* outputs 0 1 | 4 5 and 2 3 | 6 7, each beside a zero */
    const __m256i early = _mm256_unpacklo_epi32(bias, zero), late = _mm256_unpackhi_epi32(bias, zero);
    const A v = {_mm256_permute2x128_si256(early, late, 0x20), _mm256_permute2x128_si256(early, late, 0x31)};
    return v;
}
TARGET static INLINE W i_weights(const int8_t *p)
{
    const W w = {_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)p)),
                 _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(p + 16)))};
    return w;
}
TARGET static INLINE B i_four(const int8_t *p)
{
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(four)));
}
TARGET static INLINE A i_dot(A sum, B x, W w)
{
    sum.first = _mm256_add_epi32(sum.first, _mm256_madd_epi16(x, w.first));
    sum.second = _mm256_add_epi32(sum.second, _mm256_madd_epi16(x, w.second));
    return sum;
}
TARGET static INLINE D i_sums(A sum)
{
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(sum.first, sum.second), 0xd8);
}

TARGET static INLINE D d_start(const nn_requantize *q, int channel, int n)
{
    return _mm256_maskload_epi32(q->bias + channel, v_first(n));
}
TARGET static INLINE P d_single(const int8_t *p, int n)
{
    int64_t bytes = 0;
    if (n == UNIT)
        memcpy(&bytes, p, UNIT);
    else
        memcpy(&bytes, p, (size_t)n);
    return _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bytes));
}
TARGET static INLINE P d_pair(const int8_t *p, const int8_t *q, int n)
{
    return _mm256_blend_epi16(d_single(p, n), _mm256_slli_epi32(d_single(q, n), 16), 0xaa);
}
TARGET static INLINE D d_dot(D sum, P x, P w) { return _mm256_add_epi32(sum, _mm256_madd_epi16(x, w)); }
TARGET static INLINE D d_add(D sum, P x, P w)
{
    return d_dot(sum, x, _mm256_and_si256(w, _mm256_set1_epi32(0xffff))); /* signs are no second product */
}

#define INTEGER_TILES INTEGER_TILE(4, 1) INTEGER_TILE(1, 1)
#define INTEGER_CHOOSE(count, units, arguments) \
    (count > 1 ? NAME(integer_tile_4_1) : NAME(integer_tile_1_1)) arguments;
#include "conv_s8.h"
#include "rows.h"
#endif
