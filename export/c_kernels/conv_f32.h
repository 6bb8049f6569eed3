/* Float convolutions in the words of one instruction set:
 * V, LANES, PIXELS, VECTORS, zero-cost functions v_load, v_some (n values, 0 beyond), v_store, v_keep (n values), v_set,
 * v_add, v_mul, v_fma (a·b + c), v_max, v_min; NAME(x) makes a name of this file's own, TARGET goes before each function.
 *
 * A tile is some pixels times some vectors of output channels, held in registers over the whole kernel. */

TARGET static INLINE V NAME(limited)(float slope, float low, float high, V v)
{
    if (slope != 1.0f)
        v = v_max(v, v_mul(v, v_set(slope)));
    return v_min(v_max(v, v_set(low)), v_set(high));
}

TARGET static INLINE V NAME(finish)(const nn_conv *p, V v) { return NAME(limited)(p->slope, p->low, p->high, v); }

typedef struct {
    const float *in, *add;
    float *out;
    ptrdiff_t in_at[PIXELS], add_at[PIXELS], out_at[PIXELS];
} NAME(tile_ends);

TARGET static INLINE void NAME(tile)(const nn_conv *p, const NAME(tile_ends) *e, const float *weights, const float *bias,
                                     int channel, const int pixels, const int vectors)
{
    const ptrdiff_t next = (ptrdiff_t)p->rows * p->columns * p->length * p->block; /* weights of the next block */
    const float *from[PIXELS];
    const float *at[VECTORS];
    V sum[PIXELS][VECTORS];
    int row, column, k, i, j;
    for (j = 0; j < vectors; j++) {
        const int lane = j * LANES;
        V start = v_load(bias + lane);
        at[j] = weights + (lane / p->block) * next + lane % p->block;
        for (i = 0; i < pixels; i++)
            sum[i][j] = start;
    }
    for (row = 0; row < p->rows; row++)
        for (column = 0; column < p->columns; column++) {
            const ptrdiff_t tap = (ptrdiff_t)row * p->tap_row + (ptrdiff_t)column * p->tap_column;
            for (i = 0; i < pixels; i++)
                from[i] = e->in + e->in_at[i] + tap;
            for (k = 0; k < p->length; k++) {
                V w[VECTORS];
                for (j = 0; j < vectors; j++) {
                    w[j] = v_load(at[j]);
                    at[j] += p->block;
                }
                for (i = 0; i < pixels; i++) {
                    const V x = v_set(from[i][k]);
                    for (j = 0; j < vectors; j++)
                        sum[i][j] = v_fma(x, w[j], sum[i][j]);
                }
            }
        }
    for (i = 0; i < pixels; i++)
        for (j = 0; j < vectors; j++) {
            const int lane = channel + j * LANES, n = p->outputs - lane;
            const float *add = e->add ? e->add + e->add_at[i] + lane : NULL;
            float *out = e->out + e->out_at[i] + lane;
            V v = sum[i][j];
            if (n >= LANES) {
                if (add)
                    v = v_add(v, v_load(add));
                v_store(out, NAME(finish)(p, v));
            } else if (n > 0) {
                if (add)
                    v = v_add(v, v_some(add, n));
                v_keep(out, NAME(finish)(p, v), n);
            }
        }
}

#define TILE(pixels, vectors) \
    TARGET static NOINLINE void NAME(tile_##pixels##_##vectors)( \
        const nn_conv *p, const NAME(tile_ends) *e, const float *weights, const float *bias, int channel) \
    { \
        NAME(tile)(p, e, weights, bias, channel, pixels, vectors); \
    }
TILES
#undef TILE

TARGET void NAME(nn_conv)(const nn_conv *p, const float *in, const float *weights, const float *bias, const float *add,
                          float *out)
{
    const int padded = (p->outputs + p->block - 1) / p->block * p->block;
    const ptrdiff_t size = (ptrdiff_t)p->rows * p->columns * p->length; /* weights of one output */
    NAME(tile_ends) e;
    int n, g, c, count, vectors;
    for (n = 0; n < p->batch; n++)
        for (g = 0; g < p->groups; g++) {
            nn_place place = {0, 0, 0, 0, 0};
            e.in = in + (ptrdiff_t)n * p->in_batch + g * p->inputs;
            e.add = add ? add + (ptrdiff_t)n * p->add_batch + g * p->outputs : NULL;
            e.out = out + (ptrdiff_t)n * p->out_batch + g * p->outputs;
            while ((count = nn_pixels(p, &place, PIXELS, e.in_at, e.add_at, e.out_at)) > 0)
                for (c = 0; c < p->outputs; c += vectors * LANES) {
                    const float *w = weights + (g * padded + c / p->block * p->block) * size + c % p->block;
                    vectors = p->outputs - c > (VECTORS - 1) * LANES ? VECTORS : 1;
                    CHOOSE(count, vectors, (p, &e, w, bias + g * padded + c, c))
                }
        }
}

/* One kernel per channel: vectors of channels, a few pixels of one row at a time so that a weight is read once. */
TARGET static INLINE void NAME(strip)(const nn_conv *p, const float *in, const float *weights, const float *bias,
                                      const float *add, float *out, int n, const int pixels, const int rows,
                                      const int columns)
{
    V sum[4];
    int row, column, i;
    for (i = 0; i < pixels; i++)
        sum[i] = n < LANES ? v_some(bias, n) : v_load(bias);
    for (row = 0; row < rows; row++)
        for (column = 0; column < columns; column++) {
            const float *from = in + (ptrdiff_t)row * p->tap_row + (ptrdiff_t)column * p->tap_column;
            const float *at = weights + (ptrdiff_t)(row * columns + column) * p->groups;
            const V w = n < LANES ? v_some(at, n) : v_load(at);
            for (i = 0; i < pixels; i++) {
                const float *pixel = from + (ptrdiff_t)i * p->in_pixel;
                sum[i] = v_fma(n < LANES ? v_some(pixel, n) : v_load(pixel), w, sum[i]);
            }
        }
    for (i = 0; i < pixels; i++) {
        V v = sum[i];
        if (add) {
            const float *pixel = add + (ptrdiff_t)i * p->add_pixel;
            v = v_add(v, n < LANES ? v_some(pixel, n) : v_load(pixel));
        }
        v = NAME(finish)(p, v);
        if (n < LANES)
            v_keep(out + (ptrdiff_t)i * p->out_pixel, v, n);
        else
            v_store(out + (ptrdiff_t)i * p->out_pixel, v);
    }
}

#define STRIP(name, whole, pixels, rows, columns) \
    TARGET static NOINLINE void NAME(name)(const nn_conv *p, const float *in, const float *weights, const float *bias, \
                                           const float *add, float *out, int n) \
    { \
        NAME(strip)(p, in, weights, bias, add, out, whole, pixels, rows, columns); \
        (void)n; \
    }
STRIP(strip_4_3x3, LANES, 4, 3, 3)
STRIP(strip_1_3x3, LANES, 1, 3, 3)
STRIP(strip_4, LANES, 4, p->rows, p->columns)
STRIP(strip_1, LANES, 1, p->rows, p->columns)
STRIP(strip_4_some, n, 4, p->rows, p->columns)
STRIP(strip_1_some, n, 1, p->rows, p->columns)
#undef STRIP

TARGET void NAME(nn_depthwise)(const nn_conv *p, const float *in, const float *weights, const float *bias,
                               const float *add, float *out)
{
    const int three = p->rows == 3 && p->columns == 3;
    int b, y, x, c;
    for (b = 0; b < p->batch; b++)
        for (y = 0; y < p->height; y++)
            for (c = 0; c < p->groups; c += LANES) {
                const int n = p->groups - c;
                const float *from = in + (ptrdiff_t)b * p->in_batch + (ptrdiff_t)y * p->in_row + c;
                const float *plus = add ? add + (ptrdiff_t)b * p->add_batch + (ptrdiff_t)y * p->add_row + c : NULL;
                float *to = out + (ptrdiff_t)b * p->out_batch + (ptrdiff_t)y * p->out_row + c;
                for (x = 0; x < p->width;) {
                    const int some = p->width - x >= 4 ? 4 : 1;
                    if (n < LANES)
                        (some == 4 ? NAME(strip_4_some) : NAME(strip_1_some))(p, from, weights + c, bias + c, plus, to, n);
                    else if (three)
                        (some == 4 ? NAME(strip_4_3x3) : NAME(strip_1_3x3))(p, from, weights + c, bias + c, plus, to, n);
                    else
                        (some == 4 ? NAME(strip_4) : NAME(strip_1))(p, from, weights + c, bias + c, plus, to, n);
                    from += (ptrdiff_t)some * p->in_pixel;
                    to += (ptrdiff_t)some * p->out_pixel;
                    if (plus)
                        plus += (ptrdiff_t)some * p->add_pixel;
                    x += some;
                }
            }
}
