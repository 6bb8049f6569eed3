/* Element by element. */
#include "nn.h"
#include <math.h>
#include <string.h>

#define OUTER(w) \
    int i0, i1, i2, i3, i4, i; \
    const int n = (w)->size[5]; \
    for (i0 = 0; i0 < (w)->size[0]; i0++) \
        for (i1 = 0; i1 < (w)->size[1]; i1++) \
            for (i2 = 0; i2 < (w)->size[2]; i2++) \
                for (i3 = 0; i3 < (w)->size[3]; i3++) \
                    for (i4 = 0; i4 < (w)->size[4]; i4++)
#define AT(w, side) \
    ((ptrdiff_t)i0 * (w)->side[0] + (ptrdiff_t)i1 * (w)->side[1] + (ptrdiff_t)i2 * (w)->side[2] + \
     (ptrdiff_t)i3 * (w)->side[3] + (ptrdiff_t)i4 * (w)->side[4])

static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

static float softplus(float x, float beta, float threshold)
{
    return x * beta > threshold ? x : log1pf(expf(x * beta)) / beta;
}

static float gelu_tanh(float x) { return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x))); }

static float between(float x, float low, float high)
{
    x = x < low ? low : x; /* NaN stays NaN */
    return x > high ? high : x;
}

#define ROWS(w, type, result, expression) \
    OUTER(w) \
    { \
        const type *x = in + AT(w, one); \
        result *y = out + AT(w, out); \
        const ptrdiff_t s = (w)->one[5], t = (w)->out[5]; \
        if (s == 1 && t == 1) \
            for (i = 0; i < n; i++) { \
                const type v = x[i]; \
                y[i] = expression; \
            } \
        else \
            for (i = 0; i < n; i++) { \
                const type v = x[(ptrdiff_t)i * s]; \
                y[(ptrdiff_t)i * t] = expression; \
            } \
    }

#define CASE(name, expression) \
    case name: { \
        ROWS(w, float, float, expression) \
        break; \
    }

static void more(const nn_walk *w, enum nn_function f, float a, float b, const float *in, float *out)
{
    switch (f) {
        CASE(NN_EXP, expf(v))
        CASE(NN_LOG, logf(v))
        CASE(NN_SIN, sinf(v))
        CASE(NN_COS, cosf(v))
        CASE(NN_MISH, v * tanhf(softplus(v, 1.0f, 20.0f)))
        CASE(NN_ERF, erff(v))
        CASE(NN_SOFTSIGN, v / (1.0f + fabsf(v)))
        CASE(NN_ELU, v > 0.0f ? v : a * expm1f(v))
        CASE(NN_SOFTPLUS, softplus(v, a, b))
        CASE(NN_GELU, 0.5f * v * (1.0f + erff(v * 0.70710678f)))
        CASE(NN_GELU_TANH, gelu_tanh(v))
        CASE(NN_POWER, powf(v, a))
    default:
        break;
    }
}

void nn_unary_f32(const nn_walk *w, enum nn_function f, float a, float b, const float *in, float *out)
{
    switch (f) {
        CASE(NN_CLIP, between(v, a, b))
        CASE(NN_LEAKY, v > 0.0f ? v : v * a)
        CASE(NN_SIGMOID, sigmoid(v))
        CASE(NN_TANH, tanhf(v))
        CASE(NN_SILU, v * sigmoid(v))
        CASE(NN_HARDSWISH, v * between(v + 3.0f, 0.0f, 6.0f) / 6.0f)
        CASE(NN_HARDSIGMOID, between(v + 3.0f, 0.0f, 6.0f) / 6.0f)
        CASE(NN_SQRT, sqrtf(v))
        CASE(NN_RSQRT, 1.0f / sqrtf(v))
        CASE(NN_ABS, fabsf(v))
        CASE(NN_NEG, -v)
        CASE(NN_SQUARE, v * v)
        CASE(NN_RECIPROCAL, 1.0f / v)
        CASE(NN_SCALE, v * a)
    default:
        more(w, f, a, b, in, out);
        break;
    }
}

#define PAIRS(type, expression) \
    OUTER(w) \
    { \
        const type *x = one + AT(w, one), *z = two + AT(w, two); \
        type *to = out + AT(w, out); \
        const ptrdiff_t s = w->one[5], r = w->two[5], t = w->out[5]; \
        if (s == 1 && r == 1 && t == 1) \
            for (i = 0; i < n; i++) { \
                const type u = x[i], v = z[i]; \
                to[i] = expression; \
            } \
        else \
            for (i = 0; i < n; i++) { \
                const type u = x[(ptrdiff_t)i * s], v = z[(ptrdiff_t)i * r]; \
                to[(ptrdiff_t)i * t] = expression; \
            } \
    }
#define PAIR(name, expression) \
    case name: { \
        PAIRS(float, expression) \
        break; \
    }

void nn_binary_f32(const nn_walk *w, enum nn_operator o, const float *one, const float *two, float *out)
{
    switch (o) {
        PAIR(NN_ADD, u + v)
        PAIR(NN_SUB, u - v)
        PAIR(NN_MUL, u *v)
        PAIR(NN_DIV, u / v)
        PAIR(NN_MAXIMUM, u > v ? u : v)
        PAIR(NN_MINIMUM, u < v ? u : v)
        PAIR(NN_PRELU, u > 0.0f ? u : u * v)
    }
}

#define COPY(name, type) \
    void name(const nn_walk *w, const void *from, void *target) \
    { \
        const type *in = from; \
        type *out = target; \
        if (w->one[5] == 1 && w->out[5] == 1) { \
            OUTER(w) memcpy(out + AT(w, out), in + AT(w, one), sizeof *in * (size_t)n); \
            (void)i; \
        } else { \
            ROWS(w, type, type, v) \
        } \
    }
COPY(nn_copy_32, uint32_t)
COPY(nn_copy_8, uint8_t)

void nn_fill_f32(int size, float value, float *out)
{
    int i;
    for (i = 0; i < size; i++)
        out[i] = value;
}

void nn_fill_s8(int size, int value, int8_t *out) { memset(out, value, (size_t)size); }

/* Images between constants: only what is around them is written. */
#define BORDER(name, type) \
    void name(const nn_border *b, type value, type *out) \
    { \
        const ptrdiff_t row = (ptrdiff_t)b->width * b->channels; \
        const ptrdiff_t left = (ptrdiff_t)b->left * b->channels, right = (ptrdiff_t)b->right * b->channels; \
        int n, y; \
        ptrdiff_t i; \
        for (n = 0; n < b->batch; n++) \
            for (y = 0; y < b->height; y++, out += row) { \
                const int outside = y < b->top || y >= b->height - b->bottom; \
                for (i = 0; i < (outside ? row : left); i++) \
                    out[i] = value; \
                for (i = row - right; i < row && !outside; i++) \
                    out[i] = value; \
            } \
    }
BORDER(nn_border_f32, float)
BORDER(nn_border_s8, int8_t)
BORDER(nn_border_u32, uint32_t)

void nn_cast(const nn_walk *w, const uint8_t *in, float *out)
{
    ROWS(w, uint8_t, float, (float)v)
}

/* Values that lie apart are gathered, and scattered, some at a time. */
void nn_quantize(const nn_walk *w, const nn_grid *g, const float *in, int8_t *out)
{
    enum { SOME = 256 };
    float x[SOME];
    int8_t y[SOME];
    OUTER(w)
    {
        const float *from = in + AT(w, one);
        int8_t *to = out + AT(w, out);
        const ptrdiff_t s = w->one[5], t = w->out[5];
        int k, count;
        for (i = 0; i < n; i += count) {
            count = n - i < SOME ? n - i : SOME;
            for (k = 0; k < count && s != 1; k++)
                x[k] = from[(i + k) * s];
            nn_quantize_row(g, count, s == 1 ? from + i : x, t == 1 ? to + i : y);
            for (k = 0; k < count && t != 1; k++)
                to[(i + k) * t] = y[k];
        }
    }
}

void nn_dequantize(const nn_walk *w, float scale, int zero, const int8_t *in, float *out)
{
    ROWS(w, int8_t, float, (float)(v - zero) * scale)
}

void nn_table_s8(const nn_walk *w, const int8_t *table, const int8_t *in, int8_t *out)
{
    ROWS(w, int8_t, int8_t, table[v + 128])
}

static int limited(int value, int low, int high)
{
    return value < low ? low : value > high ? high : value;
}

/* Half of the last place is added before the shift, so that halves go up. Shifts of negative numbers are arithmetic. */
void nn_sum_s8(const nn_walk *w, const nn_sum *s8, const int8_t *one, const int8_t *two, int8_t *out)
{
    const int a = s8->multiplier_one, b = s8->multiplier_two, shift = s8->shift;
    const int start = (1 << (shift - 1)) - s8->zero_one * a - s8->zero_two * b;
    const int low = s8->low - s8->zero, high = s8->high - s8->zero, zero = s8->zero;
    if (w->one[5] == 1 && w->two[5] == 1 && w->out[5] == 1) {
        OUTER(w) nn_sum_row(s8, n, one + AT(w, one), two + AT(w, two), out + AT(w, out));
        (void)i;
    } else {
        PAIRS(int8_t, (int8_t)(limited((u * a + v * b + start) >> shift, low, high) + zero))
    }
}

void nn_product_s8(const nn_walk *w, const nn_sum *s8, const int8_t *one, const int8_t *two, int8_t *out)
{
    const int64_t half = (int64_t)1 << (s8->shift - 1);
    PAIRS(int8_t, (int8_t)limited((int)(((int64_t)((u - s8->zero_one) * (v - s8->zero_two)) * s8->multiplier_one + half) >>
                                        s8->shift) + s8->zero, s8->low, s8->high))
}
