/* Convolutions with AVX-512. */
#include "nn.h"
#include "levels.h"
#include "pixels.h"

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
TARGET static INLINE V v_fetch(const float *p) /* for several uses: compilers would load it again for each */
{
    V v = v_load(p);
    __asm__("" : "+v"(v));
    return v;
}
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
TARGET static INLINE V v_even(V a, V b)
{
    const __m512i places = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_ps(a, places, b);
}
TARGET static INLINE V v_odd(V a, V b)
{
    const __m512i places = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return _mm512_permutex2var_ps(a, places, b);
}

#define TILES TILE(8, 2) TILE(8, 1) TILE(4, 2) TILE(4, 1) TILE(1, 2) TILE(1, 1)
#define CHOOSE(count, vectors, arguments) \
    if (vectors == 2) \
        (count > 4 ? NAME(tile_8_2) : count > 1 ? NAME(tile_4_2) : NAME(tile_1_2)) arguments; \
    else \
        (count > 4 ? NAME(tile_8_1) : count > 1 ? NAME(tile_4_1) : NAME(tile_1_1)) arguments;
#include "conv_f32.h"

#define SPARSE_MOST(block) 4
#define SPARSES SPARSE(1, 4) SPARSE(1, 3) SPARSE(1, 2) SPARSE(1, 1) SPARSE(2, 4) SPARSE(2, 3) SPARSE(2, 2) SPARSE(2, 1) \
            SPARSE(4, 4) SPARSE(4, 3) SPARSE(4, 2) SPARSE(4, 1)
#include "planes_f32.h"

#define UNIT 16
#define UNITS 2
#define INTEGER_PIXELS 8

typedef __m512i A;
typedef __m512i B;
typedef __m512i W;
typedef __m512i D;
typedef __m512i P;

/* Even and odd lanes are multiplied to 64 bits apart. */
typedef struct {
    __m512i factor, negative, even_half, odd_half, even_shift, odd_shift, zero, low, high;
    __mmask16 kept;
    int signs;
} R;

TARGET static INLINE __mmask16 i_first(int n) { return (__mmask16)((1u << n) - 1u); }
TARGET static INLINE __m512i i_half(__m512i shift)
{
    return _mm512_sllv_epi64(_mm512_set1_epi64(1), _mm512_sub_epi64(shift, _mm512_set1_epi64(1)));
}
TARGET static INLINE R r_load(const nn_requantize *q, int channel, int n)
{
    const __mmask16 kept = i_first(n);
    const __m512i shift = _mm512_mask_loadu_epi32(_mm512_set1_epi32(1), kept, q->shift + channel);
    R r;
    r.kept = kept;
    r.signs = q->negative != NULL;
    r.factor = _mm512_maskz_loadu_epi32(kept, q->multiplier + channel);
    r.negative = r.signs ? _mm512_maskz_loadu_epi32(kept, q->negative + channel) : r.factor;
    r.even_shift = _mm512_and_si512(shift, _mm512_set1_epi64(0xffffffff));
    r.odd_shift = _mm512_srli_epi64(shift, 32);
    r.even_half = i_half(r.even_shift);
    r.odd_half = i_half(r.odd_shift);
    r.zero = _mm512_set1_epi32(q->zero);
    r.low = _mm512_set1_epi32(q->low);
    r.high = _mm512_set1_epi32(q->high);
    return r;
}
TARGET static INLINE void r_store(const R *r, D v, int8_t *out, int n)
{
    const __m512i factor = r->signs ? _mm512_mask_mov_epi32(r->factor, _mm512_movepi32_mask(v), r->negative) : r->factor;
    __m512i even = _mm512_mul_epi32(v, factor);
    __m512i odd = _mm512_mul_epi32(_mm512_srli_epi64(v, 32), _mm512_srli_epi64(factor, 32));
    even = _mm512_srav_epi64(_mm512_add_epi64(even, r->even_half), r->even_shift);
    odd = _mm512_srav_epi64(_mm512_add_epi64(odd, r->odd_half), r->odd_shift);
    v = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
    v = _mm512_add_epi32(v, r->zero);
    v = _mm512_max_epi32(_mm512_min_epi32(v, r->high), r->low);
    if (n == UNIT)
        _mm_storeu_si128((__m128i *)(void *)out, _mm512_cvtepi32_epi8(v));
    else
        _mm512_mask_cvtepi32_storeu_epi8(out, r->kept, v);
}

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
TARGET static INLINE D i_sums(A sum) { return sum; }

TARGET static INLINE D d_start(const nn_requantize *q, int channel, int n)
{
    return _mm512_maskz_loadu_epi32(i_first(n), q->bias + channel);
}
TARGET static INLINE P d_single(const int8_t *p, int n)
{
    return _mm512_cvtepi8_epi32(n == UNIT ? _mm_loadu_si128((const __m128i *)(const void *)p)
                                          : _mm_maskz_loadu_epi8(i_first(n), p));
}
TARGET static INLINE P d_pair(const int8_t *p, const int8_t *q, int n)
{
    return _mm512_mask_mov_epi16(d_single(p, n), 0xaaaaaaaa, _mm512_slli_epi32(d_single(q, n), 16));
}
TARGET static INLINE D d_dot(D sum, P x, P w) { return _mm512_dpwssd_epi32(sum, x, w); }
TARGET static INLINE D d_add(D sum, P x, P w)
{
    return _mm512_dpwssd_epi32(sum, x, _mm512_and_si512(w, _mm512_set1_epi32(0xffff))); /* signs are no second product */
}

#define INTEGER_TILES \
    INTEGER_TILE(8, 2) INTEGER_TILE(8, 1) INTEGER_TILE(4, 2) INTEGER_TILE(4, 1) INTEGER_TILE(1, 2) INTEGER_TILE(1, 1)
#define INTEGER_CHOOSE(count, units, arguments) \
    if (units == 2) \
        (count > 4 ? NAME(integer_tile_8_2) : count > 1 ? NAME(integer_tile_4_2) : NAME(integer_tile_1_2)) arguments; \
    else \
        (count > 4 ? NAME(integer_tile_8_1) : count > 1 ? NAME(integer_tile_4_1) : NAME(integer_tile_1_1)) arguments;
#include "conv_s8.h"
#include "rows.h"
#endif
