/* Convolutions with NEON. */
#include "nn.h"
#include "levels.h"
#include "pixels.h"

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
static INLINE V v_fetch(const float *p) { return v_load(p); }
static INLINE V v_some(const float *p, int n)
{
    const float32x4_t zero = vdupq_n_f32(0.0f);
    if (n == 1)
        return vld1q_lane_f32(p, zero, 0);
    if (n == 2)
        return vcombine_f32(vld1_f32(p), vget_low_f32(zero));
    return vld1q_lane_f32(p + 2, vcombine_f32(vld1_f32(p), vget_low_f32(zero)), 2);
}
static INLINE void v_store(float *p, V v) { vst1q_f32(p, v); }
static INLINE void v_keep(float *p, V v, int n)
{
    if (n == 1)
        vst1q_lane_f32(p, v, 0);
    else
        vst1_f32(p, vget_low_f32(v));
    if (n == 3)
        vst1q_lane_f32(p + 2, v, 2);
}
static INLINE V v_set(float x) { return vdupq_n_f32(x); }
static INLINE V v_add(V a, V b) { return vaddq_f32(a, b); }
static INLINE V v_mul(V a, V b) { return vmulq_f32(a, b); }
static INLINE V v_fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
static INLINE V v_max(V a, V b) { return vmaxq_f32(a, b); }
static INLINE V v_min(V a, V b) { return vminq_f32(a, b); }
static INLINE V v_even(V a, V b) { return vuzp1q_f32(a, b); }
static INLINE V v_odd(V a, V b) { return vuzp2q_f32(a, b); }

#define TILES TILE(6, 4) TILE(6, 1) TILE(1, 4) TILE(1, 1)
#define CHOOSE(count, vectors, arguments) \
    if (vectors == 4) \
        (count > 1 ? NAME(tile_6_4) : NAME(tile_1_4)) arguments; \
    else \
        (count > 1 ? NAME(tile_6_1) : NAME(tile_1_1)) arguments;
#include "conv_f32.h"

#define SPARSE_MOST(block) ((block) == 4 ? 4 : 8)
#define SPARSES SPARSE(1, 8) SPARSE(1, 7) SPARSE(1, 6) SPARSE(1, 5) SPARSE(1, 4) SPARSE(1, 3) SPARSE(1, 2) SPARSE(1, 1) \
            SPARSE(2, 8) SPARSE(2, 7) SPARSE(2, 6) SPARSE(2, 5) SPARSE(2, 4) SPARSE(2, 3) SPARSE(2, 2) SPARSE(2, 1) \
            SPARSE(4, 4) SPARSE(4, 3) SPARSE(4, 2) SPARSE(4, 1)
#include "planes_f32.h"

#define UNIT 4
#define UNITS 4
#define INTEGER_PIXELS 4

typedef int8x16_t B;
typedef int8x16_t W;
typedef int32x4_t D;
typedef struct {
    int16x4_t one, two;
} P;
typedef struct {
    int32x4_t factor, negative, zero, low, high;
    int64x2_t first, last; /* shifts */
    int signs;
} R;

static INLINE int32x4_t i_some(const int32_t *p, int n)
{
    int32_t some[4] = {1, 1, 1, 1};
    if (n == UNIT)
        return vld1q_s32(p);
    memcpy(some, p, 4 * (unsigned)n);
    return vld1q_s32(some);
}
static INLINE R r_load(const nn_requantize *q, int channel, int n)
{
    const int32x4_t shift = i_some(q->shift + channel, n);
    R r;
    r.signs = q->negative != NULL;
    r.factor = i_some(q->multiplier + channel, n);
    r.negative = r.signs ? i_some(q->negative + channel, n) : r.factor;
    r.first = vnegq_s64(vmovl_s32(vget_low_s32(shift)));
    r.last = vnegq_s64(vmovl_s32(vget_high_s32(shift)));
    r.zero = vdupq_n_s32(q->zero);
    r.low = vdupq_n_s32(q->low);
    r.high = vdupq_n_s32(q->high);
    return r;
}
static INLINE void r_store(const R *r, D v, int8_t *out, int n)
{
    const int32x4_t factor = r->signs ? vbslq_s32(vcltzq_s32(v), r->negative, r->factor) : r->factor;
    const int64x2_t first = vmull_s32(vget_low_s32(v), vget_low_s32(factor)), last = vmull_high_s32(v, factor);
    int8x8_t bytes;
    v = vmovn_high_s64(vmovn_s64(vrshlq_s64(first, r->first)), vrshlq_s64(last, r->last)); /* halves go up */
    v = vaddq_s32(v, r->zero);
    v = vmaxq_s32(vminq_s32(v, r->high), r->low);
    bytes = vmovn_s16(vcombine_s16(vmovn_s32(v), vmovn_s32(v)));
    if (n == UNIT) {
        const int32_t four = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
        memcpy(out, &four, UNIT);
    } else {
        int8_t some[8];
        vst1_s8(some, bytes);
        memcpy(out, some, (size_t)n);
    }
}

static INLINE W i_weights(const int8_t *p) { return vld1q_s8(p); }
static INLINE B i_four(const int8_t *p)
{
    int32_t four;
    memcpy(&four, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}
#ifdef __ARM_FEATURE_DOTPROD
typedef int32x4_t A;
static INLINE A i_start(const nn_requantize *q, int channel) { return vld1q_s32(q->bias + channel); }
static INLINE A i_dot(A sum, B x, W w) { return vdotq_s32(sum, w, x); }
static INLINE D i_sums(A sum) { return sum; }
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
static INLINE D i_sums(A sum) { return vpaddq_s32(sum.first, sum.second); }
#endif

static INLINE D d_start(const nn_requantize *q, int channel, int n) { return i_some(q->bias + channel, n); }
static INLINE int16x4_t d_wide(const int8_t *p, int n)
{
    int32_t bytes = 0;
    if (n == UNIT)
        memcpy(&bytes, p, UNIT);
    else
        memcpy(&bytes, p, (size_t)n);
    return vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(bytes))));
}
static INLINE P d_pair(const int8_t *p, const int8_t *q, int n)
{
    const P v = {d_wide(p, n), d_wide(q, n)};
    return v;
}
static INLINE P d_single(const int8_t *p, int n)
{
    const P v = {d_wide(p, n), vdup_n_s16(0)};
    return v;
}
static INLINE D d_add(D sum, P x, P w) { return vmlal_s16(sum, x.one, w.one); }
static INLINE D d_dot(D sum, P x, P w) { return vmlal_s16(d_add(sum, x, w), x.two, w.two); }

#define INTEGER_TILES INTEGER_TILE(4, 4) INTEGER_TILE(4, 1) INTEGER_TILE(1, 4) INTEGER_TILE(1, 1)
#define INTEGER_CHOOSE(count, units, arguments) \
    if (units == 4) \
        (count > 1 ? NAME(integer_tile_4_4) : NAME(integer_tile_1_4)) arguments; \
    else \
        (count > 1 ? NAME(integer_tile_4_1) : NAME(integer_tile_1_1)) arguments;
#include "conv_s8.h"
#include "rows.h"
#endif
