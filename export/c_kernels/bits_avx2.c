/* Layers of ±1 with AVX2: bits are counted by tables of four bits, in bytes. */
#include "bits.h"
#include "bits_levels.h"

#ifdef NN_X86
#include <immintrin.h>
#include <string.h>

#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma,bmi2")))
#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define LANES 8
#define PIXELS 2
#define VECTORS 4
#define FLUSH 31 /* words of eight bits each in a byte */

typedef __m256i S;
typedef __m256i W;
typedef __m256i X;
typedef __m256i D;
typedef __m256 F;

TARGET static INLINE __m256i load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
TARGET static INLINE S s_from(D d)
{
    (void)d;
    return _mm256_setzero_si256();
}
TARGET static INLINE W w_load(const uint32_t *p) { return load(p); }
TARGET static INLINE X x_all(uint32_t x) { return _mm256_set1_epi32((int)x); }
TARGET static INLINE S s_count(S s, X x, W w)
{
    const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m256i four = _mm256_set1_epi8(15), apart = _mm256_xor_si256(x, w);
    const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(apart, four));
    const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi32(apart, 4), four));
    return _mm256_add_epi8(s, _mm256_add_epi8(low, high));
}
TARGET static INLINE D d_none(void) { return _mm256_setzero_si256(); }
TARGET static INLINE D d_all(int n) { return _mm256_set1_epi32(n); }
TARGET static INLINE D d_add(D d, S s)
{
    const __m256i pairs = _mm256_maddubs_epi16(s, _mm256_set1_epi8(1));
    return _mm256_add_epi32(d, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
TARGET static INLINE D d_load(const int32_t *p) { return load(p); }
TARGET static INLINE D d_twice(D d) { return _mm256_add_epi32(d, d); }
TARGET static INLINE D d_sub(D a, D b) { return _mm256_sub_epi32(a, b); }
TARGET static INLINE uint32_t d_bits(D d, D limit)
{
    return 255u ^ (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(d, limit)));
}
TARGET static INLINE F f_of(D d) { return _mm256_cvtepi32_ps(d); }
TARGET static INLINE __m256i first(int n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
TARGET static INLINE F f_load(const float *p) { return _mm256_loadu_ps(p); }
TARGET static INLINE F f_some(const float *p, int n) { return _mm256_maskload_ps(p, first(n)); }
TARGET static INLINE void f_store(float *p, F v) { _mm256_storeu_ps(p, v); }
TARGET static INLINE void f_keep(float *p, F v, int n) { _mm256_maskstore_ps(p, first(n), v); }
TARGET static INLINE F f_fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
TARGET static INLINE F f_add(F a, F b) { return _mm256_add_ps(a, b); }
TARGET static INLINE F f_finish(const nn_conv *p, F v)
{
    v = _mm256_max_ps(v, _mm256_mul_ps(v, _mm256_set1_ps(p->slope)));
    return _mm256_min_ps(_mm256_max_ps(v, _mm256_set1_ps(p->low)), _mm256_set1_ps(p->high));
}

#define BIT_TILES BIT_TILE(2, 4) BIT_TILE(2, 2) BIT_TILE(1, 4) BIT_TILE(1, 2)
#define BIT_CHOOSE(count, vectors, arguments) \
    if (count > 1) \
        (vectors > 2 ? NAME(bit_tile_2_4) : NAME(bit_tile_2_2)) arguments; \
    else \
        (vectors > 2 ? NAME(bit_tile_1_4) : NAME(bit_tile_1_2)) arguments;
#include "bits_conv.h"

/* One word of up to 32 channels. */
TARGET static INLINE uint32_t pack(const float *in, const float *threshold, int n)
{
    uint32_t bits = 0;
    int i;
    for (i = 0; i < 32 && i < n; i += 8) {
        const int left = n - i;
        const __m256 x = left < 8 ? f_some(in + i, left) : f_load(in + i);
        const uint32_t found = (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(x, f_load(threshold + i), _CMP_GE_OQ));
        bits |= (left < 8 ? found & ((1u << left) - 1u) : found) << i;
    }
    return bits;
}
#include "bits_pack.h"

#define UNIT 32
typedef __m256i B;
TARGET static INLINE B b_load(const void *p) { return load(p); }
TARGET static INLINE void b_store(void *p, B v) { _mm256_storeu_si256((__m256i *)p, v); }
TARGET static INLINE B b_none(void) { return _mm256_setzero_si256(); }
TARGET static INLINE B b_all(uint32_t x) { return _mm256_set1_epi32((int)x); }
TARGET static INLINE B b_xor(B a, B b) { return _mm256_xor_si256(a, b); }
TARGET static INLINE B b_and(B a, B b) { return _mm256_and_si256(a, b); }
TARGET static INLINE B b_odd(B a, B b, B c) { return b_xor(b_xor(b, c), a); }
/* b where b and c agree, else a. */
TARGET static INLINE B b_most(B a, B b, B c) { return b_xor(b, b_and(b_xor(b, c), b_xor(a, b))); }
TARGET static INLINE B b_some(B a, B b, B c)
{
    return b_xor(b_xor(b, b_all(0xffffffffu)), b_and(b_xor(b, c), b_xor(b_xor(a, b), b_all(0xffffffffu))));
}
#define AGAIN(p) (p)
#include "bits_turn.h"
#include "bits_turn_rows.h"
#include "bits_tree.h"
#endif
