/* Convolutions with AVX2 and FMA. */
#include "nn.h"
#include "levels.h"

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
TARGET static INLINE V v_some(const float *p, int n) { return _mm256_maskload_ps(p, v_first(n)); }
TARGET static INLINE void v_store(float *p, V v) { _mm256_storeu_ps(p, v); }
TARGET static INLINE void v_keep(float *p, V v, int n) { _mm256_maskstore_ps(p, v_first(n), v); }
TARGET static INLINE V v_set(float x) { return _mm256_set1_ps(x); }
TARGET static INLINE V v_add(V a, V b) { return _mm256_add_ps(a, b); }
TARGET static INLINE V v_mul(V a, V b) { return _mm256_mul_ps(a, b); }
TARGET static INLINE V v_fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
TARGET static INLINE V v_max(V a, V b) { return _mm256_max_ps(a, b); }
TARGET static INLINE V v_min(V a, V b) { return _mm256_min_ps(a, b); }

#define TILES TILE(6, 2) TILE(6, 1) TILE(1, 2) TILE(1, 1)
#define CHOOSE(count, vectors, arguments) \
    if (vectors == 2) \
        (count > 1 ? NAME(tile_6_2) : NAME(tile_1_2)) arguments; \
    else \
        (count > 1 ? NAME(tile_6_1) : NAME(tile_1_1)) arguments;
#include "conv_f32.h"

#include "rounding.h"

#define UNIT 8
#define UNITS 1
#define INTEGER_PIXELS 4
#define D_LANES 8

/* Products of bytes as products of 16 bits: two sums for each output, of four outputs in each half. */
typedef struct {
    __m256i first, second;
} A;
typedef __m256i B;
typedef A W;
typedef __m256i D;

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

/* There is no arithmetic shift of 64 bits: a large number added first and taken off after keeps values positive. */
TARGET static INLINE __m256i i_half(__m256i sum, __m256i factor, __m256i shift)
{
    const __m256i one = _mm256_set1_epi64x(1), large = _mm256_set1_epi64x((int64_t)1 << 62);
    const __m256i half = _mm256_sllv_epi64(one, _mm256_sub_epi64(shift, one));
    const __m256i moved = _mm256_add_epi64(_mm256_add_epi64(_mm256_mul_epi32(sum, factor), half), large);
    return _mm256_sub_epi64(_mm256_srlv_epi64(moved, shift), _mm256_srlv_epi64(large, shift));
}
TARGET static INLINE void d_store(const nn_requantize *q, int channel, D v, int8_t *out, int n)
{
    const __m256i some = v_first(n), low_half = _mm256_set1_epi64x(0xffffffff);
    __m256i factor = _mm256_maskload_epi32(q->multiplier + channel, some);
    __m256i shift = _mm256_maskload_epi32(q->shift + channel, some);
    __m256i even, odd, whole;
    int8_t bytes[16];
    shift = _mm256_max_epi32(shift, _mm256_set1_epi32(1));
    if (q->negative)
        factor = _mm256_blendv_epi8(factor, _mm256_maskload_epi32(q->negative + channel, some), _mm256_srai_epi32(v, 31));
    even = i_half(v, factor, _mm256_and_si256(shift, low_half));
    odd = i_half(_mm256_srli_epi64(v, 32), _mm256_srli_epi64(factor, 32), _mm256_srli_epi64(shift, 32));
    whole = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    whole = _mm256_add_epi32(whole, _mm256_set1_epi32(q->zero));
    whole = _mm256_max_epi32(_mm256_min_epi32(whole, _mm256_set1_epi32(q->high)), _mm256_set1_epi32(q->low));
    whole = _mm256_packs_epi32(whole, whole);
    whole = _mm256_packs_epi16(_mm256_permute4x64_epi64(whole, 0x08), whole);
    _mm_storeu_si128((__m128i *)(void *)bytes, _mm256_castsi256_si128(whole));
    if (n == 8)
        memcpy(out, bytes, 8);
    else
        memcpy(out, bytes, (size_t)n);
}
TARGET static INLINE void i_store(const nn_requantize *q, int channel, A v, int8_t *out, int n)
{
    const __m256i sums = _mm256_permute4x64_epi64(_mm256_hadd_epi32(v.first, v.second), 0xd8);
    d_store(q, channel, sums, out, n);
}

TARGET static INLINE D d_start(const nn_requantize *q, int channel, int n)
{
    return _mm256_maskload_epi32(q->bias + channel, v_first(n));
}
TARGET static INLINE D d_load(const int8_t *p, int n)
{
    int64_t bytes = 0;
    if (n == 8)
        memcpy(&bytes, p, 8);
    else
        memcpy(&bytes, p, (size_t)n);
    return _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bytes));
}
TARGET static INLINE D d_add(D sum, D x, D w) { return _mm256_add_epi32(sum, _mm256_mullo_epi32(x, w)); }

#define INTEGER_TILES INTEGER_TILE(4, 1) INTEGER_TILE(1, 1)
#define INTEGER_CHOOSE(count, units, arguments) \
    (count > 1 ? NAME(integer_tile_4_1) : NAME(integer_tile_1_1)) arguments;
#include "conv_s8.h"
#include "sums.h"
#endif
