/* Convolutions with NEON. */
#include "nn.h"
#include "levels.h"

#ifdef NN_NEON
#include <arm_neon.h>
#include <string.h>

#define NAME(x) x##_neon
#define TARGET
#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define LANES 4
#define PIXELS 6
#define VECTORS 4

typedef float32x4_t V;

static INLINE V v_load(const float *p) { return vld1q_f32(p); }
static INLINE V v_some(const float *p, int n)
{
    float some[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    memcpy(some, p, 4 * (unsigned)n);
    return vld1q_f32(some);
}
static INLINE void v_store(float *p, V v) { vst1q_f32(p, v); }
static INLINE void v_keep(float *p, V v, int n)
{
    float some[4];
    vst1q_f32(some, v);
    memcpy(p, some, 4 * (unsigned)n);
}
static INLINE V v_set(float x) { return vdupq_n_f32(x); }
static INLINE V v_add(V a, V b) { return vaddq_f32(a, b); }
static INLINE V v_mul(V a, V b) { return vmulq_f32(a, b); }
static INLINE V v_fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
static INLINE V v_max(V a, V b) { return vmaxq_f32(a, b); }
static INLINE V v_min(V a, V b) { return vminq_f32(a, b); }

#define TILES TILE(6, 4) TILE(6, 1) TILE(1, 4) TILE(1, 1)
#define CHOOSE(count, vectors, arguments) \
    if (vectors == 4) \
        (count > 1 ? NAME(tile_6_4) : NAME(tile_1_4)) arguments; \
    else \
        (count > 1 ? NAME(tile_6_1) : NAME(tile_1_1)) arguments;
#include "conv_f32.h"

#define UNIT 4
#define UNITS 4
#define INTEGER_PIXELS 4
#define D_LANES 4

typedef int8x16_t B;
typedef int8x16_t W;
typedef int32x4_t D;

static INLINE W i_weights(const int8_t *p) { return vld1q_s8(p); }
static INLINE B i_four(const int8_t *p)
{
    int32_t four;
    memcpy(&four, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}
static INLINE int32x4_t i_some(const int32_t *p, int n)
{
    int32_t some[4] = {1, 1, 1, 1};
    memcpy(some, p, 4 * (unsigned)n);
    return vld1q_s32(some);
}
static INLINE int64x2_t i_half(int32x2_t sum, int32x2_t factor, int32x2_t shift)
{
    return vrshlq_s64(vmull_s32(sum, factor), vnegq_s64(vmovl_s32(shift))); /* halves go up */
}
static INLINE void d_store(const nn_requantize *q, int channel, D v, int8_t *out, int n)
{
    const int32x4_t shift = i_some(q->shift + channel, n);
    int32x4_t factor = i_some(q->multiplier + channel, n), whole;
    int8_t bytes[8];
    if (q->negative)
        factor = vbslq_s32(vcltzq_s32(v), i_some(q->negative + channel, n), factor);
    whole = vcombine_s32(vmovn_s64(i_half(vget_low_s32(v), vget_low_s32(factor), vget_low_s32(shift))),
                         vmovn_s64(i_half(vget_high_s32(v), vget_high_s32(factor), vget_high_s32(shift))));
    whole = vaddq_s32(whole, vdupq_n_s32(q->zero));
    whole = vmaxq_s32(vminq_s32(whole, vdupq_n_s32(q->high)), vdupq_n_s32(q->low));
    vst1_s8(bytes, vmovn_s16(vcombine_s16(vmovn_s32(whole), vmovn_s32(whole))));
    if (n == 4)
        memcpy(out, bytes, 4);
    else
        memcpy(out, bytes, (size_t)n);
}

#ifdef __ARM_FEATURE_DOTPROD
typedef int32x4_t A;
static INLINE A i_start(const nn_requantize *q, int channel) { return vld1q_s32(q->bias + channel); }
static INLINE A i_dot(A sum, B x, W w) { return vdotq_s32(sum, w, x); }
static INLINE void i_store(const nn_requantize *q, int channel, A v, int8_t *out, int n)
{
    d_store(q, channel, v, out, n);
}
#else
/* Two sums for each output, of two outputs in each. */
typedef struct {
    int32x4_t first, second;
} A;
static INLINE A i_start(const nn_requantize *q, int channel)
{
    const int32x4_t bias = vld1q_s32(q->bias + channel), zero = vdupq_n_s32(0);
    const A v = {vzip1q_s32(bias, zero), vzip2q_s32(bias, zero)};
    return v;
}
static INLINE A i_dot(A sum, B x, W w)
{
    sum.first = vpadalq_s16(sum.first, vmull_s8(vget_low_s8(w), vget_low_s8(x)));
    sum.second = vpadalq_s16(sum.second, vmull_high_s8(w, x));
    return sum;
}
static INLINE void i_store(const nn_requantize *q, int channel, A v, int8_t *out, int n)
{
    d_store(q, channel, vpaddq_s32(v.first, v.second), out, n);
}
#endif

static INLINE D d_start(const nn_requantize *q, int channel, int n) { return i_some(q->bias + channel, n); }
static INLINE D d_load(const int8_t *p, int n)
{
    int8_t bytes[8] = {0};
    if (n == 4)
        memcpy(bytes, p, 4);
    else
        memcpy(bytes, p, (size_t)n);
    return vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8(bytes))));
}
static INLINE D d_add(D sum, D x, D w) { return vmlaq_s32(sum, x, w); }

#define INTEGER_TILES INTEGER_TILE(4, 4) INTEGER_TILE(4, 1) INTEGER_TILE(1, 4) INTEGER_TILE(1, 1)
#define INTEGER_CHOOSE(count, units, arguments) \
    if (units == 4) \
        (count > 1 ? NAME(integer_tile_4_4) : NAME(integer_tile_1_4)) arguments; \
    else \
        (count > 1 ? NAME(integer_tile_4_1) : NAME(integer_tile_1_1)) arguments;
#include "conv_s8.h"
#include "sums.h"
#endif
