/* Layers of ±1 with AVX-512. */
#include "bits.h"
#include "bits_levels.h"

#ifdef NN_X86
#include <immintrin.h>
#include <string.h>

#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,gfni,avx2,fma,bmi2")))
#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define LANES 16
#define PIXELS 6
#define VECTORS 4
#define FLUSH 0x7fffffff

typedef __m512i S;
typedef __m512i W;
typedef __m512i X;
typedef __m512i D;
typedef __m512 F;

TARGET static INLINE S s_from(D d) { return d; }
TARGET static INLINE W w_load(const uint32_t *p) { return _mm512_loadu_si512(p); }
TARGET static INLINE X x_all(uint32_t x) { return _mm512_set1_epi32((int)x); }
TARGET static INLINE S s_count(S s, X x, W w) { return _mm512_add_epi32(s, _mm512_popcnt_epi32(_mm512_xor_si512(x, w))); }
TARGET static INLINE D d_none(void) { return _mm512_setzero_si512(); }
TARGET static INLINE D d_all(int n) { return _mm512_set1_epi32(n); }
TARGET static INLINE D d_add(D d, S s)
{
    (void)d;
    return s;
}
TARGET static INLINE D d_load(const int32_t *p) { return _mm512_loadu_si512(p); }
TARGET static INLINE D d_twice(D d) { return _mm512_add_epi32(d, d); }
TARGET static INLINE D d_sub(D a, D b) { return _mm512_sub_epi32(a, b); }
TARGET static INLINE uint32_t d_bits(D d, D limit) { return (uint32_t)_mm512_cmple_epi32_mask(d, limit); }
TARGET static INLINE F f_of(D d) { return _mm512_cvtepi32_ps(d); }
TARGET static INLINE F f_load(const float *p) { return _mm512_loadu_ps(p); }
TARGET static INLINE F f_some(const float *p, int n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1u), p); }
TARGET static INLINE void f_store(float *p, F v) { _mm512_storeu_ps(p, v); }
TARGET static INLINE void f_keep(float *p, F v, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1u), v); }
TARGET static INLINE F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
TARGET static INLINE F f_add(F a, F b) { return _mm512_add_ps(a, b); }
TARGET static INLINE F f_finish(const nn_conv *p, F v)
{
    v = _mm512_max_ps(v, _mm512_mul_ps(v, _mm512_set1_ps(p->slope)));
    return _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(p->low)), _mm512_set1_ps(p->high));
}

#define BIT_TILES \
    BIT_TILE(6, 4) BIT_TILE(6, 3) BIT_TILE(6, 2) BIT_TILE(6, 1) BIT_TILE(1, 4) BIT_TILE(1, 3) BIT_TILE(1, 2) BIT_TILE(1, 1)
#define BIT_CHOOSE(count, vectors, arguments) \
    if (count > 1) \
        (vectors > 3 ? NAME(bit_tile_6_4) : vectors > 2 ? NAME(bit_tile_6_3) : vectors > 1 ? NAME(bit_tile_6_2) \
                                                                                          : NAME(bit_tile_6_1)) arguments; \
    else \
        (vectors > 3 ? NAME(bit_tile_1_4) : vectors > 2 ? NAME(bit_tile_1_3) : vectors > 1 ? NAME(bit_tile_1_2) \
                                                                                          : NAME(bit_tile_1_1)) arguments;
#include "bits_conv.h"


/* One word of up to 32 channels. */
TARGET static INLINE uint32_t pack(const float *in, const float *threshold, int n)
{
    if (n >= 32) {
        const __mmask16 low = _mm512_cmp_ps_mask(_mm512_loadu_ps(in), _mm512_loadu_ps(threshold), _CMP_GE_OQ);
        const __mmask16 high = _mm512_cmp_ps_mask(_mm512_loadu_ps(in + 16), _mm512_loadu_ps(threshold + 16), _CMP_GE_OQ);
        return (uint32_t)_mm512_kunpackw(high, low);
    } else {
        const __mmask16 low = n < 16 ? (__mmask16)((1u << n) - 1u) : 0xffff;
        const __mmask16 high = n < 16 ? 0 : (__mmask16)((1u << (n - 16)) - 1u);
        const uint32_t one = _mm512_mask_cmp_ps_mask(low, _mm512_maskz_loadu_ps(low, in), _mm512_loadu_ps(threshold),
                                                     _CMP_GE_OQ);
        return one | (uint32_t)_mm512_mask_cmp_ps_mask(high, _mm512_maskz_loadu_ps(high, in + 16),
                                                       _mm512_loadu_ps(threshold + 16), _CMP_GE_OQ)
                         << 16;
    }
}
#include "bits_pack.h"

#define UNIT 64
typedef __m512i B;
TARGET static INLINE B b_load(const void *p)
{
    B v = _mm512_loadu_si512(p);
    __asm__("" : "+v"(v)); /* read once, used twice: loads are what takes time */
    return v;
}
TARGET static INLINE void b_store(void *p, B v) { _mm512_storeu_si512(p, v); }
TARGET static INLINE B b_none(void) { return _mm512_setzero_si512(); }
TARGET static INLINE B b_all(uint32_t x) { return _mm512_set1_epi32((int)x); }
TARGET static INLINE B b_xor(B a, B b) { return _mm512_xor_si512(a, b); }
TARGET static INLINE B b_and(B a, B b) { return _mm512_and_si512(a, b); }
TARGET static INLINE B b_odd(B a, B b, B c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
TARGET static INLINE B b_most(B a, B b, B c) { return _mm512_ternarylogic_epi32(a, b, c, 0xe8); }
TARGET static INLINE B b_some(B a, B b, B c) { return _mm512_ternarylogic_epi32(a, b, c, 0x71); }
TARGET static INLINE const uint16_t *again(const uint16_t *p)
{
    __asm__("" : "+r"(p)); /* sixteen places are no longer in registers: read them once more */
    return p;
}
#define AGAIN(p) again(p)
#include "bits_turn_gfni.h"
#include "bits_tree.h"
#endif
