/* Pools, resizes, softmax and sums along axes. */
#include "nn.h"
#include "rounding.h"
#include <float.h>
#include <math.h>
#include <string.h>

#ifdef __GNUC__
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif
#define TOGETHER 16 /* channels of a pool that are held in registers */

typedef struct {
    int begin, end; /* places of a window that lie inside the image */
} span;

static span inside(int first, int step, int count, int size)
{
    span found = {0, count};
    while (found.begin < count && first + found.begin * step < 0)
        found.begin++;
    while (found.end > found.begin && first + (found.end - 1) * step >= size)
        found.end--;
    return found;
}

static int clamp_int(int value, int low, int high)
{
    return value < low ? low : value > high ? high : value;
}

#define POOL_LOOPS(type) \
    int n, y, x, c; \
    for (n = 0; n < p->batch; n++) \
        for (y = 0; y < p->height; y++) { \
            const int top = y * p->stride_row - p->top; \
            const span down = inside(top, p->dilation_row, p->rows, p->in_height); \
            for (x = 0; x < p->width; x++) { \
                const int left = x * p->stride_column - p->left; \
                const span right = inside(left, p->dilation_column, p->columns, p->in_width); \
                const type *at = in + (ptrdiff_t)n * p->in_batch + POOL_AT(down.begin, right.begin); \
                type *to = out + (ptrdiff_t)n * p->out_batch + (ptrdiff_t)y * p->out_row + (ptrdiff_t)x * p->out_pixel;
#define POOL_AT(row, column) \
    ((ptrdiff_t)(top + (row) * p->dilation_row) * p->in_row + \
     (ptrdiff_t)(left + (column) * p->dilation_column) * p->in_pixel)
/* A few channels of a window: `found` begins as `start` and becomes `expression` with each value v. */
#define POOL_WINDOW(type, result, start, expression) \
    result found[TOGETHER]; \
    int row, column, i; \
    for (i = 0; i < n; i++) \
        found[i] = start; \
    for (row = down.begin; row < down.end; row++, at += (ptrdiff_t)p->dilation_row * p->in_row) \
        for (column = right.begin; column < right.end; column++) { \
            const type *v = at + (ptrdiff_t)(column - right.begin) * p->dilation_column * p->in_pixel; \
            for (i = 0; i < n; i++) \
                found[i] = expression; \
        }

#define MAX_POOL(name, type, lowest) \
    static INLINE void name##_some(const nn_pool *p, span down, span right, const type *at, type *to, const int n) \
    { \
        POOL_WINDOW(type, type, lowest, v[i] > found[i] ? v[i] : found[i]) \
        for (i = 0; i < n; i++) \
            to[i] = found[i]; \
    } \
    void name(const nn_pool *p, const type *in, type *out) \
    { \
        POOL_LOOPS(type) \
            for (c = 0; c + TOGETHER <= p->channels; c += TOGETHER) \
                name##_some(p, down, right, at + c, to + c, TOGETHER); \
            if (c < p->channels) \
                name##_some(p, down, right, at + c, to + c, p->channels - c); \
        }} \
    }
MAX_POOL(nn_max_pool_f32, float, -INFINITY)
MAX_POOL(nn_max_pool_s8, int8_t, -128)

/* What a sum is divided by. */
static int divisor(const nn_pool *p, int top, int left, span down, span right)
{
    if (p->divisor > 0)
        return p->divisor;
    if (p->divisor == 0)
        return (down.end - down.begin) * (right.end - right.begin);
    return (clamp_int(top + p->rows, 0, p->in_height + p->top) - top) *
           (clamp_int(left + p->columns, 0, p->in_width + p->left) - left);
}

static INLINE void mean_f32(const nn_pool *p, span down, span right, const float *at, float factor, float *to,
                            const int n)
{
    POOL_WINDOW(float, float, 0.0f, found[i] + v[i])
    for (i = 0; i < n; i++)
        to[i] = found[i] * factor;
}

void nn_avg_pool_f32(const nn_pool *p, const float *in, float *out)
{
    POOL_LOOPS(float)
        const float factor = 1.0f / (float)divisor(p, top, left, down, right);
        for (c = 0; c + TOGETHER <= p->channels; c += TOGETHER)
            mean_f32(p, down, right, at + c, factor, to + c, TOGETHER);
        if (c < p->channels)
            mean_f32(p, down, right, at + c, factor, to + c, p->channels - c);
    }}
}

static INLINE void mean_s8(const nn_pool *p, const nn_requantize *q, span down, span right, const int8_t *at, int8_t *to,
                           const int n)
{
    const int32_t zero = q->bias[0] * ((down.end - down.begin) * (right.end - right.begin));
    POOL_WINDOW(int8_t, int32_t, -zero, found[i] + v[i])
    for (i = 0; i < n; i++)
        to[i] = nn_rounded(q, 0, found[i]);
}

void nn_avg_pool_s8(const nn_pool *p, const nn_requantize *q, const int8_t *in, int8_t *out)
{
    POOL_LOOPS(int8_t)
        for (c = 0; c + TOGETHER <= p->channels; c += TOGETHER)
            mean_s8(p, q, down, right, at + c, to + c, TOGETHER);
        if (c < p->channels)
            mean_s8(p, q, down, right, at + c, to + c, p->channels - c);
    }}
}

/* Windows that begin and end where PyTorch's do when sizes do not divide. */
void nn_adaptive_pool_f32(const nn_pool *p, const float *in, float *out)
{
    int n, y, x, c, row, column;
    for (n = 0; n < p->batch; n++)
        for (y = 0; y < p->height; y++)
            for (x = 0; x < p->width; x++) {
                const int top = y * p->in_height / p->height, left = x * p->in_width / p->width;
                const int bottom = ((y + 1) * p->in_height + p->height - 1) / p->height;
                const int right = ((x + 1) * p->in_width + p->width - 1) / p->width;
                float *to = out + (ptrdiff_t)n * p->out_batch + (ptrdiff_t)y * p->out_row + (ptrdiff_t)x * p->out_pixel;
                for (c = 0; c < p->channels; c++)
                    to[c] = 0.0f;
                for (row = top; row < bottom; row++)
                    for (column = left; column < right; column++) {
                        const float *at = in + (ptrdiff_t)n * p->in_batch + (ptrdiff_t)row * p->in_row +
                                          (ptrdiff_t)column * p->in_pixel;
                        for (c = 0; c < p->channels; c++)
                            to[c] += at[c];
                    }
                for (c = 0; c < p->channels; c++)
                    to[c] /= (float)((bottom - top) * (right - left));
            }
}

#define NEAREST(name, type) \
    void name(const nn_pool *p, const int32_t *rows, const int32_t *columns, const type *in, type *out) \
    { \
        int n, y, x, c; \
        for (n = 0; n < p->batch; n++) \
            for (y = 0; y < p->height; y++) \
                for (x = 0; x < p->width; x++) { \
                    const type *at = in + (ptrdiff_t)n * p->in_batch + (ptrdiff_t)rows[y] * p->in_row + \
                                     (ptrdiff_t)columns[x] * p->in_pixel; \
                    type *to = out + (ptrdiff_t)n * p->out_batch + (ptrdiff_t)y * p->out_row + \
                               (ptrdiff_t)x * p->out_pixel; \
                    for (c = 0; c < p->channels; c++) \
                        to[c] = at[c]; \
                } \
    }
NEAREST(nn_nearest_f32, float)
NEAREST(nn_nearest_s8, int8_t)

void nn_bilinear_f32(const nn_pool *p, const int32_t *rows, const float *down, const int32_t *columns,
                     const float *right, const float *in, float *out)
{
    const ptrdiff_t below = p->in_height > 1 ? p->in_row : 0, beside = p->in_width > 1 ? p->in_pixel : 0;
    int n, y, x, c;
    for (n = 0; n < p->batch; n++)
        for (y = 0; y < p->height; y++)
            for (x = 0; x < p->width; x++) {
                const float *at = in + (ptrdiff_t)n * p->in_batch + (ptrdiff_t)rows[y] * p->in_row +
                                  (ptrdiff_t)columns[x] * p->in_pixel;
                float *to = out + (ptrdiff_t)n * p->out_batch + (ptrdiff_t)y * p->out_row + (ptrdiff_t)x * p->out_pixel;
                const float d = down[y], r = right[x];
                for (c = 0; c < p->channels; c++) {
                    const float upper = at[c] * (1.0f - r) + at[c + beside] * r;
                    const float lower = at[c + below] * (1.0f - r) + at[c + below + beside] * r;
                    to[c] = upper * (1.0f - d) + lower * d;
                }
            }
}

#define WALK(w) \
    int i0, i1, i2, i3, i4, i5; \
    for (i0 = 0; i0 < (w)->size[0]; i0++) \
        for (i1 = 0; i1 < (w)->size[1]; i1++) \
            for (i2 = 0; i2 < (w)->size[2]; i2++) \
                for (i3 = 0; i3 < (w)->size[3]; i3++) \
                    for (i4 = 0; i4 < (w)->size[4]; i4++) \
                        for (i5 = 0; i5 < (w)->size[5]; i5++)
#define WALK_AT(w, side) \
    ((ptrdiff_t)i0 * (w)->side[0] + (ptrdiff_t)i1 * (w)->side[1] + (ptrdiff_t)i2 * (w)->side[2] + \
     (ptrdiff_t)i3 * (w)->side[3] + (ptrdiff_t)i4 * (w)->side[4] + (ptrdiff_t)i5 * (w)->side[5])

/* Four sums side by side: one alone would wait for itself. */
static float sum_of(const float *x, int n)
{
    float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
    int i;
    for (i = 0; i + 4 <= n; i += 4) {
        a += x[i];
        b += x[i + 1];
        c += x[i + 2];
        d += x[i + 3];
    }
    for (; i < n; i++)
        a += x[i];
    return (a + b) + (c + d);
}

void nn_reduce_f32(const nn_walk *w, enum nn_reduction r, int count, const float *in, float *out)
{
    const float start = r == NN_AMAX ? -INFINITY : r == NN_AMIN ? INFINITY : 0.0f;
    {
        WALK(w) out[WALK_AT(w, out)] = start;
    }
    if (!w->out[5] && w->one[5] == 1 && (r == NN_MEAN || r == NN_SUM)) {
        nn_walk rows = *w;
        rows.size[5] = 1;
        WALK(&rows) out[WALK_AT(w, out)] += sum_of(in + WALK_AT(w, one), w->size[5]);
    } else {
        WALK(w)
        {
            float *to = out + WALK_AT(w, out);
            const float x = in[WALK_AT(w, one)];
            if (r == NN_AMAX)
                *to = x > *to ? x : *to;
            else if (r == NN_AMIN)
                *to = x < *to ? x : *to;
            else
                *to += x;
        }
    }
    if (r == NN_MEAN) {
        nn_walk once = *w;
        int axis;
        for (axis = 0; axis < NN_AXES; axis++)
            once.size[axis] = w->out[axis] ? w->size[axis] : 1;
        {
            WALK(&once) out[WALK_AT(w, out)] /= (float)count;
        }
    }
}

void nn_softmax_f32(const nn_walk *w, int size, int stride, int to, int logarithm, const float *in, float *out)
{
    WALK(w)
    {
        const float *x = in + WALK_AT(w, one);
        float *y = out + WALK_AT(w, out);
        float most = x[0], sum = 0.0f;
        int i;
        for (i = 1; i < size; i++)
            most = x[(ptrdiff_t)i * stride] > most ? x[(ptrdiff_t)i * stride] : most;
        for (i = 0; i < size; i++) {
            const float e = expf(x[(ptrdiff_t)i * stride] - most);
            y[(ptrdiff_t)i * to] = e;
            sum += e;
        }
        for (i = 0; i < size; i++)
            y[(ptrdiff_t)i * to] = logarithm ? x[(ptrdiff_t)i * stride] - most - logf(sum) : y[(ptrdiff_t)i * to] / sum;
    }
}
