/* Float convolutions in the words of one instruction set:
 * V, LANES, PIXELS, VECTORS, zero-cost functions v_load, v_some (n values, 0 beyond), v_store, v_keep (n values), v_set,
 * v_add, v_mul, v_fma (a·b + c), v_max, v_min; NAME(x) makes a name of this file's own, TARGET goes before each function.
 *
 * A tile is some pixels times some vectors of output channels, held in registers over the whole kernel. Pixels are
 * counted through rows, so that narrow images fill tiles too; the last tile repeats its last pixel. */

TARGET static INLINE V NAME(finish)(const nn_conv *p, V v)
{
    if (p->slope != 1.0f)
        v = v_max(v, v_mul(v, v_set(p->slope)));
    return v_min(v_max(v, v_set(p->low)), v_set(p->high));
}

TARGET static INLINE void NAME(tile)(const nn_conv *p, const float *const *in, const float *weights, const float *bias,
                                     const float *const *add, float *const *out, int channel, const int pixels,
                                     const int vectors)
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
                from[i] = in[i] + tap;
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
            V v = sum[i][j];
            if (n >= LANES) {
                if (add)
                    v = v_add(v, v_load(add[i] + lane));
                v_store(out[i] + lane, NAME(finish)(p, v));
            } else if (n > 0) {
                if (add)
                    v = v_add(v, v_some(add[i] + lane, n));
                v_keep(out[i] + lane, NAME(finish)(p, v), n);
            }
        }
}

#define TILE(pixels, vectors) \
    TARGET static NOINLINE void NAME(tile_##pixels##_##vectors)( \
        const nn_conv *p, const float *const *in, const float *weights, const float *bias, const float *const *add, \
        float *const *out, int channel) \
    { \
        NAME(tile)(p, in, weights, bias, add, out, channel, pixels, vectors); \
    }
TILES
#undef TILE

TARGET static void NAME(pixels)(const nn_conv *p, const float *const *in, const float *weights, const float *bias,
                                const float *const *add, float *const *out, int count)
{
    const ptrdiff_t next = (ptrdiff_t)p->rows * p->columns * p->length * p->block;
    int c, vectors;
    for (c = 0; c < p->outputs; c += vectors * LANES) {
        const int left = p->outputs - c;
        const float *w = weights + (c / p->block) * next + c % p->block;
        vectors = left > (VECTORS - 1) * LANES ? VECTORS : 1;
        CHOOSE(count, vectors, (p, in, w, bias + c, add, out, c))
    }
}

TARGET void NAME(nn_conv)(const nn_conv *p, const float *in, const float *weights, const float *bias, const float *add,
                          float *out)
{
    const int padded = (p->outputs + p->block - 1) / p->block * p->block;
    const ptrdiff_t size = (ptrdiff_t)padded * p->rows * p->columns * p->length;
    int n, g, y, x, i, filled;
    for (n = 0; n < p->batch; n++)
        for (g = 0; g < p->groups; g++) {
            const float *from[PIXELS], *plus[PIXELS];
            float *to[PIXELS];
            const float *begin = in + (ptrdiff_t)n * p->in_batch + g * p->inputs;
            const float *added = add ? add + (ptrdiff_t)n * p->add_batch + g * p->outputs : NULL;
            float *end = out + (ptrdiff_t)n * p->out_batch + g * p->outputs;
            filled = 0;
            for (y = 0; y < p->height; y++) {
                const float *x_in = begin + (ptrdiff_t)y * p->in_row;
                const float *x_add = added ? added + (ptrdiff_t)y * p->add_row : NULL;
                float *x_out = end + (ptrdiff_t)y * p->out_row;
                for (x = 0; x < p->width; x++) {
                    const int last = y == p->height - 1 && x == p->width - 1;
                    from[filled] = x_in;
                    to[filled] = x_out;
                    x_in += p->in_pixel;
                    x_out += p->out_pixel;
                    if (added) {
                        plus[filled] = x_add;
                        x_add += p->add_pixel;
                    }
                    filled++;
                    if (filled < PIXELS && !last)
                        continue;
                    for (i = filled; i < PIXELS; i++) {
                        from[i] = from[filled - 1];
                        to[i] = to[filled - 1];
                        if (added)
                            plus[i] = plus[filled - 1];
                    }
                    NAME(pixels)(p, from, weights + g * size, bias + g * padded, added ? plus : NULL, to, filled);
                    filled = 0;
                }
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
