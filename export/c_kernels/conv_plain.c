/* Convolutions in plain C: four outputs side by side stand for a vector. Right everywhere; for Cortex-M and the like. */
#include "nn.h"
#include "levels.h"
#include "pixels.h"
#include <math.h>
#include <string.h>

#define NAME(x) x##_plain
#define TARGET
#ifdef __GNUC__
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif
#define NOINLINE
#define LANES 4
#ifdef __aarch64__
#define PIXELS 4 /* enough registers */
#else
#define PIXELS 2
#endif
#define VECTORS 1

typedef struct {
    float a, b, c, d;
} V;

static INLINE float multiply_add(float a, float b, float c)
{
#ifdef FP_FAST_FMAF
    return fmaf(a, b, c); /* what vectors do on the same processor */
#else
    return a * b + c;
#endif
}

static INLINE V v_load(const float *p)
{
    const V v = {p[0], p[1], p[2], p[3]};
    return v;
}

static INLINE V v_fetch(const float *p) { return v_load(p); }

static INLINE V v_some(const float *p, int n)
{
    const V v = {p[0], n > 1 ? p[1] : 0.0f, n > 2 ? p[2] : 0.0f, 0.0f};
    return v;
}

static INLINE void v_store(float *p, V v)
{
    p[0] = v.a;
    p[1] = v.b;
    p[2] = v.c;
    p[3] = v.d;
}

static INLINE void v_keep(float *p, V v, int n)
{
    p[0] = v.a;
    if (n > 1)
        p[1] = v.b;
    if (n > 2)
        p[2] = v.c;
}

static INLINE V v_set(float x)
{
    const V v = {x, x, x, x};
    return v;
}

#define EACH(name, expression) \
    static INLINE float name##_one(float x, float y) { return expression; } \
    static INLINE V name(V v, V w) \
    { \
        const V r = {name##_one(v.a, w.a), name##_one(v.b, w.b), name##_one(v.c, w.c), name##_one(v.d, w.d)}; \
        return r; \
    }
EACH(v_add, x + y)
EACH(v_mul, x * y)
EACH(v_max, x > y ? x : y)
EACH(v_min, x < y ? x : y)

static INLINE V v_fma(V x, V y, V z)
{
    const V r = {multiply_add(x.a, y.a, z.a), multiply_add(x.b, y.b, z.b), multiply_add(x.c, y.c, z.c),
                 multiply_add(x.d, y.d, z.d)};
    return r;
}

static INLINE V v_even(V v, V w)
{
    const V r = {v.a, v.c, w.a, w.c};
    return r;
}

static INLINE V v_odd(V v, V w)
{
    const V r = {v.b, v.d, w.b, w.d};
    return r;
}

#if PIXELS == 4
#define TILES TILE(4, 1) TILE(2, 1) TILE(1, 1)
#define CHOOSE(count, vectors, arguments) \
    (count > 2 ? NAME(tile_4_1) : count > 1 ? NAME(tile_2_1) : NAME(tile_1_1)) arguments;
#else
#define TILES TILE(2, 1) TILE(1, 1)
#define CHOOSE(count, vectors, arguments) (count > 1 ? NAME(tile_2_1) : NAME(tile_1_1)) arguments;
#endif
#include "conv_f32.h"

#define SPARSE_MOST(block) ((block) == 1 ? 2 : 1)
#define SPARSES SPARSE(1, 2) SPARSE(1, 1) SPARSE(2, 1) SPARSE(4, 1)
#include "planes_f32.h"

#include "rounding.h"

#define UNIT 4
#define UNITS 1
#define INTEGER_PIXELS 2

typedef struct {
    int32_t a, b, c, d;
} A;
typedef A B;
typedef const int8_t *W;
typedef A D;
typedef struct {
    A one, two;
} P;
typedef struct {
    const nn_requantize *q;
    int channel;
} R;

static INLINE A i_some(int32_t a, int32_t b, int32_t c, int32_t d)
{
    const A v = {a, b, c, d};
    return v;
}

static INLINE A i_wide(const int8_t *p, int n)
{
    return i_some(p[0], n > 1 ? p[1] : 0, n > 2 ? p[2] : 0, n > 3 ? p[3] : 0);
}

static INLINE R r_load(const nn_requantize *q, int channel, int n)
{
    const R r = {q, channel};
    (void)n;
    return r;
}

static INLINE void r_store(const R *r, D v, int8_t *out, int n)
{
    out[0] = nn_rounded(r->q, r->channel, v.a);
    if (n > 1)
        out[1] = nn_rounded(r->q, r->channel + 1, v.b);
    if (n > 2)
        out[2] = nn_rounded(r->q, r->channel + 2, v.c);
    if (n > 3)
        out[3] = nn_rounded(r->q, r->channel + 3, v.d);
}

static INLINE D d_start(const nn_requantize *q, int channel, int n)
{
    const int32_t *p = q->bias + channel;
    return i_some(p[0], n > 1 ? p[1] : 0, n > 2 ? p[2] : 0, n > 3 ? p[3] : 0);
}

static INLINE A i_start(const nn_requantize *q, int channel) { return d_start(q, channel, UNIT); }

static INLINE W i_weights(const int8_t *p) { return p; }

static INLINE B i_four(const int8_t *p) { return i_wide(p, UNIT); }

static INLINE int32_t four(int32_t sum, B x, const int8_t *w)
{
    return sum + x.a * w[0] + x.b * w[1] + x.c * w[2] + x.d * w[3];
}

static INLINE A i_dot(A sum, B x, W w)
{
    return i_some(four(sum.a, x, w), four(sum.b, x, w + 4), four(sum.c, x, w + 8), four(sum.d, x, w + 12));
}

static INLINE D i_sums(A sum) { return sum; }

static INLINE P d_pair(const int8_t *p, const int8_t *q, int n)
{
    const P v = {i_wide(p, n), i_wide(q, n)};
    return v;
}

static INLINE P d_single(const int8_t *p, int n)
{
    const P v = {i_wide(p, n), {0, 0, 0, 0}};
    return v;
}

static INLINE D i_add(D sum, A x, A w)
{
    return i_some(sum.a + x.a * w.a, sum.b + x.b * w.b, sum.c + x.c * w.c, sum.d + x.d * w.d);
}

static INLINE D d_add(D sum, P x, P w) { return i_add(sum, x.one, w.one); }

static INLINE D d_dot(D sum, P x, P w) { return i_add(i_add(sum, x.one, w.one), x.two, w.two); }

#define INTEGER_TILES INTEGER_TILE(2, 1) INTEGER_TILE(1, 1)
#define INTEGER_CHOOSE(count, units, arguments) \
    (count > 1 ? NAME(integer_tile_2_1) : NAME(integer_tile_1_1)) arguments;
#include "conv_s8.h"
#include "rows.h"
