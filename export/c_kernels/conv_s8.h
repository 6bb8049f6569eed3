/* Integer convolutions in the words of one instruction set:
 * A holds the sums of UNIT outputs, i_start, i_dot (four inputs times four weights of each output, added), i_store
 * (rounding and n values to memory), B holds four inputs for all outputs, i_four. */

TARGET static INLINE void NAME(integer_tile)(const nn_conv *p, const nn_requantize *q, const int8_t *const *in,
                                             const int8_t *weights, int group, int channel, int8_t *const *out,
                                             const int pixels, const int units)
{
    const int fours = (p->length + 3) / 4;
    const ptrdiff_t next = (ptrdiff_t)p->rows * p->columns * fours * 4 * p->block;
    const int8_t *from[INTEGER_PIXELS];
    const int8_t *at[UNITS];
    A sum[INTEGER_PIXELS][UNITS];
    int row, column, k, i, j;
    for (j = 0; j < units; j++) {
        const int lane = j * UNIT;
        const A start = i_start(q, group + channel + lane);
        at[j] = weights + (lane / p->block) * next + (ptrdiff_t)(lane % p->block) * 4;
        for (i = 0; i < pixels; i++)
            sum[i][j] = start;
    }
    for (row = 0; row < p->rows; row++)
        for (column = 0; column < p->columns; column++) {
            const ptrdiff_t tap = (ptrdiff_t)row * p->tap_row + (ptrdiff_t)column * p->tap_column;
            for (i = 0; i < pixels; i++)
                from[i] = in[i] + tap;
            for (k = 0; k < fours; k++) {
                W w[UNITS];
                for (j = 0; j < units; j++) {
                    w[j] = i_weights(at[j]);
                    at[j] += (ptrdiff_t)p->block * 4;
                }
                for (i = 0; i < pixels; i++) {
                    const B x = i_four(from[i] + k * 4);
                    for (j = 0; j < units; j++)
                        sum[i][j] = i_dot(sum[i][j], x, w[j]);
                }
            }
        }
    for (j = 0; j < units; j++)
        for (i = 0; i < pixels; i++) {
            const int lane = channel + j * UNIT, n = p->outputs - lane;
            if (n > 0)
                i_store(q, group + lane, sum[i][j], out[i] + lane, n < UNIT ? n : UNIT);
        }
}

#define INTEGER_TILE(pixels, units) \
    TARGET static NOINLINE void NAME(integer_tile_##pixels##_##units)( \
        const nn_conv *p, const nn_requantize *q, const int8_t *const *in, const int8_t *weights, int group, \
        int channel, int8_t *const *out) \
    { \
        NAME(integer_tile)(p, q, in, weights, group, channel, out, pixels, units); \
    }
INTEGER_TILES
#undef INTEGER_TILE

TARGET static void NAME(integer_pixels)(const nn_conv *p, const nn_requantize *q, const int8_t *const *in,
                                        const int8_t *weights, int group, int8_t *const *out, int count)
{
    const ptrdiff_t next = (ptrdiff_t)p->rows * p->columns * ((p->length + 3) / 4) * 4 * p->block;
    int c, units;
    for (c = 0; c < p->outputs; c += units * UNIT) {
        const int left = p->outputs - c;
        const int8_t *w = weights + (c / p->block) * next + (ptrdiff_t)(c % p->block) * 4;
        units = left > (UNITS - 1) * UNIT ? UNITS : 1;
        INTEGER_CHOOSE(count, units, (p, q, in, w, group, c, out))
    }
}

TARGET void NAME(nn_integer_conv)(const nn_conv *p, const nn_requantize *q, const int8_t *in, const int8_t *weights,
                                  int8_t *out)
{
    const int padded = (p->outputs + p->block - 1) / p->block * p->block;
    const ptrdiff_t size = (ptrdiff_t)padded * p->rows * p->columns * ((p->length + 3) / 4 * 4);
    int n, g, y, x, i, filled;
    for (n = 0; n < p->batch; n++)
        for (g = 0; g < p->groups; g++) {
            const int8_t *from[INTEGER_PIXELS];
            int8_t *to[INTEGER_PIXELS];
            const int8_t *begin = in + (ptrdiff_t)n * p->in_batch + g * p->inputs;
            int8_t *end = out + (ptrdiff_t)n * p->out_batch + g * p->outputs;
            filled = 0;
            for (y = 0; y < p->height; y++) {
                const int8_t *x_in = begin + (ptrdiff_t)y * p->in_row;
                int8_t *x_out = end + (ptrdiff_t)y * p->out_row;
                for (x = 0; x < p->width; x++) {
                    const int last = y == p->height - 1 && x == p->width - 1;
                    from[filled] = x_in;
                    to[filled] = x_out;
                    x_in += p->in_pixel;
                    x_out += p->out_pixel;
                    filled++;
                    if (filled < INTEGER_PIXELS && !last)
                        continue;
                    for (i = filled; i < INTEGER_PIXELS; i++) {
                        from[i] = from[filled - 1];
                        to[i] = to[filled - 1];
                    }
                    NAME(integer_pixels)(p, q, from, weights + g * size, g * padded, to, filled);
                    filled = 0;
                }
            }
        }
}

TARGET static INLINE void NAME(integer_strip)(const nn_conv *p, const nn_requantize *q, const int8_t *in,
                                              const int8_t *weights, int channel, int8_t *out, int n, const int pixels,
                                              const int rows, const int columns)
{
    D sum[4];
    int row, column, i;
    for (i = 0; i < pixels; i++)
        sum[i] = d_start(q, channel, n);
    for (row = 0; row < rows; row++)
        for (column = 0; column < columns; column++) {
            const int8_t *from = in + (ptrdiff_t)row * p->tap_row + (ptrdiff_t)column * p->tap_column;
            const D w = d_load(weights + (ptrdiff_t)(row * columns + column) * p->groups, n);
            for (i = 0; i < pixels; i++)
                sum[i] = d_add(sum[i], d_load(from + (ptrdiff_t)i * p->in_pixel, n), w);
        }
    for (i = 0; i < pixels; i++)
        d_store(q, channel, sum[i], out + (ptrdiff_t)i * p->out_pixel, n);
}

#define INTEGER_STRIP(name, whole, pixels, rows, columns) \
    TARGET static NOINLINE void NAME(name)(const nn_conv *p, const nn_requantize *q, const int8_t *in, \
                                           const int8_t *weights, int channel, int8_t *out, int n) \
    { \
        NAME(integer_strip)(p, q, in, weights, channel, out, whole, pixels, rows, columns); \
        (void)n; \
    }
INTEGER_STRIP(integer_strip_4_3x3, D_LANES, 4, 3, 3)
INTEGER_STRIP(integer_strip_1_3x3, D_LANES, 1, 3, 3)
INTEGER_STRIP(integer_strip_4, n, 4, p->rows, p->columns)
INTEGER_STRIP(integer_strip_1, n, 1, p->rows, p->columns)
#undef INTEGER_STRIP

TARGET void NAME(nn_integer_depthwise)(const nn_conv *p, const nn_requantize *q, const int8_t *in,
                                       const int8_t *weights, int8_t *out)
{
    int b, y, x, c;
    for (b = 0; b < p->batch; b++)
        for (y = 0; y < p->height; y++)
            for (c = 0; c < p->groups; c += D_LANES) {
                const int n = p->groups - c < D_LANES ? p->groups - c : D_LANES;
                const int three = p->rows == 3 && p->columns == 3 && n == D_LANES;
                const int8_t *from = in + (ptrdiff_t)b * p->in_batch + (ptrdiff_t)y * p->in_row + c;
                int8_t *to = out + (ptrdiff_t)b * p->out_batch + (ptrdiff_t)y * p->out_row + c;
                for (x = 0; x < p->width;) {
                    const int some = p->width - x >= 4 ? 4 : 1;
                    if (three)
                        (some == 4 ? NAME(integer_strip_4_3x3) : NAME(integer_strip_1_3x3))(p, q, from, weights + c, c, to, n);
                    else
                        (some == 4 ? NAME(integer_strip_4) : NAME(integer_strip_1))(p, q, from, weights + c, c, to, n);
                    from += (ptrdiff_t)some * p->in_pixel;
                    to += (ptrdiff_t)some * p->out_pixel;
                    x += some;
                }
            }
}
