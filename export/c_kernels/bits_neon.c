/* Layers of ±1 with NEON: bits are counted in bytes. */
#include "bits.h"
#include "bits_levels.h"

#ifdef NN_NEON
#include <arm_neon.h>
#include <string.h>

#define NAME(x) x##_neon
#define TARGET
#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define LANES 4
#define PIXELS 2
#define VECTORS 8
#define FLUSH 31 /* words of eight bits each in a byte */

typedef uint8x16_t S;
typedef uint32x4_t W;
typedef uint32x4_t X;
typedef int32x4_t D;
typedef float32x4_t F;

static INLINE S s_from(D d)
{
    (void)d;
    return vdupq_n_u8(0);
}
static INLINE W w_load(const uint32_t *p) { return vld1q_u32(p); }
static INLINE X x_all(uint32_t x) { return vdupq_n_u32(x); }
static INLINE S s_count(S s, X x, W w) { return vaddq_u8(s, vcntq_u8(vreinterpretq_u8_u32(veorq_u32(x, w)))); }
static INLINE D d_none(void) { return vdupq_n_s32(0); }
static INLINE D d_all(int n) { return vdupq_n_s32(n); }
static INLINE D d_add(D d, S s) { return vaddq_s32(d, vreinterpretq_s32_u32(vpaddlq_u16(vpaddlq_u8(s)))); }
static INLINE D d_load(const int32_t *p) { return vld1q_s32(p); }
static INLINE D d_twice(D d) { return vaddq_s32(d, d); }
static INLINE D d_sub(D a, D b) { return vsubq_s32(a, b); }
static INLINE uint32_t d_bits(D d, D limit)
{
    static const uint32_t places[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcleq_s32(d, limit), vld1q_u32(places)));
}
static INLINE F f_of(D d) { return vcvtq_f32_s32(d); }
static INLINE F f_load(const float *p) { return vld1q_f32(p); }
static INLINE F f_some(const float *p, int n)
{
    float some[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    int i;
    for (i = 0; i < n; i++)
        some[i] = p[i];
    return vld1q_f32(some);
}
static INLINE void f_store(float *p, F v) { vst1q_f32(p, v); }
static INLINE void f_keep(float *p, F v, int n)
{
    float all[4];
    int i;
    vst1q_f32(all, v);
    for (i = 0; i < n; i++)
        p[i] = all[i];
}
static INLINE F f_fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
static INLINE F f_add(F a, F b) { return vaddq_f32(a, b); }
static INLINE F f_finish(const nn_conv *p, F v)
{
    v = vmaxq_f32(v, vmulq_n_f32(v, p->slope));
    return vminq_f32(vmaxq_f32(v, vdupq_n_f32(p->low)), vdupq_n_f32(p->high));
}

#define BIT_TILES BIT_TILE(2, 8) BIT_TILE(2, 4) BIT_TILE(1, 8) BIT_TILE(1, 4)
#define BIT_CHOOSE(count, vectors, arguments) \
    if (count > 1) \
        (vectors > 4 ? NAME(bit_tile_2_8) : NAME(bit_tile_2_4)) arguments; \
    else \
        (vectors > 4 ? NAME(bit_tile_1_8) : NAME(bit_tile_1_4)) arguments;
#include "bits_conv.h"

/* One word of up to 32 channels. */
static INLINE uint32_t pack(const float *in, const float *threshold, int n)
{
    static const uint32_t places[4] = {1, 2, 4, 8};
    uint32_t bits = 0;
    int i;
    for (i = 0; i + 4 <= n && i < 32; i += 4)
        bits |= vaddvq_u32(vandq_u32(vcgeq_f32(f_load(in + i), f_load(threshold + i)), vld1q_u32(places))) << i;
    for (; i < n && i < 32; i++)
        bits |= (uint32_t)(in[i] >= threshold[i]) << i;
    return bits;
}
#include "bits_pack.h"

#define UNIT 16
typedef uint8x16_t B;
static INLINE B b_load(const void *p) { return vld1q_u8(p); }
static INLINE void b_store(void *p, B v) { vst1q_u8(p, v); }
static INLINE B b_none(void) { return vdupq_n_u8(0); }
static INLINE B b_all(uint32_t x) { return vreinterpretq_u8_u32(vdupq_n_u32(x)); }
static INLINE B b_xor(B a, B b) { return veorq_u8(a, b); }
static INLINE B b_and(B a, B b) { return vandq_u8(a, b); }
static INLINE B b_odd(B a, B b, B c) { return veorq_u8(veorq_u8(b, c), a); }
static INLINE B b_most(B a, B b, B c) { return vbslq_u8(veorq_u8(b, c), a, b); }
static INLINE B b_some(B a, B b, B c) { return vbslq_u8(veorq_u8(b, c), a, vmvnq_u8(b)); }
#define AGAIN(p) (p)
#include "bits_turn_plain.h"
#include "bits_turn_rows.h"
#include "bits_tree.h"
#endif
