/* Convolutions with AVX-512. */
#include "nn.h"
#include "levels.h"

#ifdef NN_X86
#include <immintrin.h>
#include <string.h>

#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")))
#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define LANES 16
#define PIXELS 8
#define VECTORS 2

typedef __m512 V;

TARGET static INLINE V v_load(const float *p) { return _mm512_loadu_ps(p); }
TARGET static INLINE V v_some(const float *p, int n)
{
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1u), p);
}
TARGET static INLINE void v_store(float *p, V v) { _mm512_storeu_ps(p, v); }
TARGET static INLINE void v_keep(float *p, V v, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1u), v); }
TARGET static INLINE V v_set(float x) { return _mm512_set1_ps(x); }
TARGET static INLINE V v_add(V a, V b) { return _mm512_add_ps(a, b); }
TARGET static INLINE V v_mul(V a, V b) { return _mm512_mul_ps(a, b); }
TARGET static INLINE V v_fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
TARGET static INLINE V v_max(V a, V b) { return _mm512_max_ps(a, b); }
TARGET static INLINE V v_min(V a, V b) { return _mm512_min_ps(a, b); }

#define TILES TILE(8, 2) TILE(8, 1) TILE(4, 2) TILE(4, 1) TILE(1, 2) TILE(1, 1)
#define CHOOSE(count, vectors, arguments) \
    if (vectors == 2) \
        (count > 4 ? NAME(tile_8_2) : count > 1 ? NAME(tile_4_2) : NAME(tile_1_2)) arguments; \
    else \
        (count > 4 ? NAME(tile_8_1) : count > 1 ? NAME(tile_4_1) : NAME(tile_1_1)) arguments;
#include "conv_f32.h"

#define UNIT 16
#define UNITS 2
#define INTEGER_PIXELS 8
#define D_LANES 16

typedef __m512i A;
typedef __m512i B;
typedef __m512i W;
typedef __m512i D;

TARGET static INLINE __mmask16 i_first(int n) { return (__mmask16)((1u << n) - 1u); }

/* Inputs become unsigned by 128 more; what that adds is taken off at the start. */
TARGET static INLINE A i_start(const nn_requantize *q, int channel)
{
    return _mm512_sub_epi32(_mm512_loadu_si512(q->bias + channel), _mm512_loadu_si512(q->offset + channel));
}
TARGET static INLINE W i_weights(const int8_t *p) { return _mm512_loadu_si512(p); }
TARGET static INLINE B i_four(const int8_t *p)
{
    int32_t four;
    memcpy(&four, p, 4);
    return _mm512_xor_si512(_mm512_set1_epi32(four), _mm512_set1_epi32((int32_t)0x80808080u));
}
TARGET static INLINE A i_dot(A sum, B x, W w) { return _mm512_dpbusd_epi32(sum, x, w); }

/* Even and odd lanes are multiplied to 64 bits apart. */
TARGET static INLINE __m512i i_half(__m512i sum, __m512i factor, __m512i shift)
{
    const __m512i one = _mm512_set1_epi64(1);
    const __m512i half = _mm512_sllv_epi64(one, _mm512_sub_epi64(shift, one));
    return _mm512_srav_epi64(_mm512_add_epi64(_mm512_mul_epi32(sum, factor), half), shift);
}
TARGET static INLINE void i_round(const nn_requantize *q, __m512i factor, __m512i negative, __m512i shift, A v, int8_t *out,
                                  __mmask16 kept)
{
    const __m512i low_half = _mm512_set1_epi64(0xffffffff);
    __m512i even, odd;
    if (q->negative)
        factor = _mm512_mask_mov_epi32(factor, _mm512_movepi32_mask(v), negative);
    even = i_half(v, factor, _mm512_and_si512(shift, low_half));
    odd = i_half(_mm512_srli_epi64(v, 32), _mm512_srli_epi64(factor, 32), _mm512_srli_epi64(shift, 32));
    v = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
    v = _mm512_add_epi32(v, _mm512_set1_epi32(q->zero));
    v = _mm512_max_epi32(_mm512_min_epi32(v, _mm512_set1_epi32(q->high)), _mm512_set1_epi32(q->low));
    _mm512_mask_cvtepi32_storeu_epi8(out, kept, v);
}
TARGET static INLINE void i_store(const nn_requantize *q, int channel, A v, int8_t *out, int n)
{
    const __m512i factor = _mm512_loadu_si512(q->multiplier + channel);
    const __m512i negative = q->negative ? _mm512_loadu_si512(q->negative + channel) : factor;
    i_round(q, factor, negative, _mm512_loadu_si512(q->shift + channel), v, out, i_first(n));
}

TARGET static INLINE D d_start(const nn_requantize *q, int channel, int n)
{
    return _mm512_maskz_loadu_epi32(i_first(n), q->bias + channel);
}
TARGET static INLINE D d_load(const int8_t *p, int n)
{
    return _mm512_cvtepi8_epi32(n == D_LANES ? _mm_loadu_si128((const __m128i *)(const void *)p)
                                             : _mm_maskz_loadu_epi8(i_first(n), p));
}
TARGET static INLINE D d_add(D sum, D x, D w) { return _mm512_add_epi32(sum, _mm512_mullo_epi32(x, w)); }
TARGET static INLINE void d_store(const nn_requantize *q, int channel, D v, int8_t *out, int n)
{
    const __mmask16 some = i_first(n);
    const __m512i factor = _mm512_maskz_loadu_epi32(some, q->multiplier + channel);
    const __m512i negative = q->negative ? _mm512_maskz_loadu_epi32(some, q->negative + channel) : factor;
    const __m512i shift = _mm512_mask_loadu_epi32(_mm512_set1_epi32(1), some, q->shift + channel);
    i_round(q, factor, negative, shift, v, out, some);
}

#define INTEGER_TILES \
    INTEGER_TILE(8, 2) INTEGER_TILE(8, 1) INTEGER_TILE(4, 2) INTEGER_TILE(4, 1) INTEGER_TILE(1, 2) INTEGER_TILE(1, 1)
#define INTEGER_CHOOSE(count, units, arguments) \
    if (units == 2) \
        (count > 4 ? NAME(integer_tile_8_2) : count > 1 ? NAME(integer_tile_4_2) : NAME(integer_tile_1_2)) arguments; \
    else \
        (count > 4 ? NAME(integer_tile_8_1) : count > 1 ? NAME(integer_tile_4_1) : NAME(integer_tile_1_1)) arguments;
#include "conv_s8.h"
#include "sums.h"
#endif
