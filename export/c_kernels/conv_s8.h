/* Integer convolutions in the words of one instruction set:
 * D holds the sums of UNIT outputs. R is how they are rounded: r_load, r_store (n values to memory).
 * A holds sums while four inputs are multiplied with four weights of each output: i_start, i_dot, i_sums (→ D); B holds
 * four inputs for all outputs, i_four, W weights, i_weights.
 * P holds two inputs, or weights, of each output, 0 beyond n: d_start, d_pair, d_single (one alone), d_dot, d_add (one). */

typedef struct {
    const int8_t *in;
    int8_t *out;
    ptrdiff_t in_at[INTEGER_PIXELS], add_at[INTEGER_PIXELS], out_at[INTEGER_PIXELS];
} NAME(integer_ends);

TARGET static INLINE void NAME(integer_tile)(const nn_conv *p, const nn_requantize *q, const NAME(integer_ends) *e,
                                             const int8_t *weights, int group, int channel, const int pixels,
                                             const int units)
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
                from[i] = e->in + e->in_at[i] + tap;
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
    for (j = 0; j < units; j++) {
        const int lane = channel + j * UNIT, left = p->outputs - lane, n = left < UNIT ? left : UNIT;
        if (n > 0) {
            const R r = r_load(q, group + lane, n); /* before anything is stored: bytes may be anything */
            for (i = 0; i < pixels; i++)
                r_store(&r, i_sums(sum[i][j]), e->out + e->out_at[i] + lane, n);
        }
    }
}

#define INTEGER_TILE(pixels, units) \
    TARGET static NOINLINE void NAME(integer_tile_##pixels##_##units)( \
        const nn_conv *p, const nn_requantize *q, const NAME(integer_ends) *e, const int8_t *weights, int group, \
        int channel) \
    { \
        NAME(integer_tile)(p, q, e, weights, group, channel, pixels, units); \
    }
INTEGER_TILES
#undef INTEGER_TILE

TARGET void NAME(nn_integer_conv)(const nn_conv *p, const nn_requantize *q, const int8_t *in, const int8_t *weights,
                                  int8_t *out)
{
    const int padded = (p->outputs + p->block - 1) / p->block * p->block;
    const ptrdiff_t size = (ptrdiff_t)p->rows * p->columns * ((p->length + 3) / 4 * 4); /* weights of one output */
    NAME(integer_ends) e;
    int n, g, c, count, units;
    for (n = 0; n < p->batch; n++)
        for (g = 0; g < p->groups; g++) {
            nn_place place = {0, 0, 0, 0, 0};
            e.in = in + (ptrdiff_t)n * p->in_batch + g * p->inputs;
            e.out = out + (ptrdiff_t)n * p->out_batch + g * p->outputs;
            while ((count = nn_pixels(p, &place, INTEGER_PIXELS, e.in_at, e.add_at, e.out_at)) > 0)
                for (c = 0; c < p->outputs; c += units * UNIT) {
                    const int8_t *w = weights + (g * padded + c / p->block * p->block) * size + c % p->block * 4;
                    units = p->outputs - c > (UNITS - 1) * UNIT ? UNITS : 1;
                    INTEGER_CHOOSE(count, units, (p, q, &e, w, g * padded, c))
                }
        }
}

/* One kernel per channel, a few pixels of one row at a time, two rows of the kernel at once: products of 16 bits.
 * Where neighbours are `step` places of the kernel apart (0: any), what they share is read once. */
TARGET static INLINE void NAME(integer_strip)(const nn_conv *p, const nn_requantize *q, const int8_t *in,
                                              const int8_t *weights, int channel, int8_t *out, int n, const int pixels,
                                              const int rows, const int columns, const int step)
{
    const ptrdiff_t next = (ptrdiff_t)columns * p->groups; /* weights of the next row */
    const R r = r_load(q, channel, n);
    D sum[4];
    int row, column, i;
    for (i = 0; i < pixels; i++)
        sum[i] = d_start(q, channel, n);
    for (row = 0; row < rows; row += 2)
        for (column = 0; column < columns; column++) {
            const int8_t *from = in + (ptrdiff_t)row * p->tap_row;
            const int8_t *at = weights + (ptrdiff_t)(row * columns + column) * p->groups;
            const int two = row + 1 < rows;
            const P w = two ? d_pair(at, at + next, n) : d_single(at, n);
            for (i = 0; i < pixels; i++) {
                const int8_t *pixel = step ? from + (ptrdiff_t)(column + i * step) * p->tap_column
                                           : from + (ptrdiff_t)column * p->tap_column + (ptrdiff_t)i * p->in_pixel;
                sum[i] = two ? d_dot(sum[i], d_pair(pixel, pixel + p->tap_row, n), w)
                             : d_add(sum[i], d_single(pixel, n), w);
            }
        }
    for (i = 0; i < pixels; i++)
        r_store(&r, sum[i], out + (ptrdiff_t)i * p->out_pixel, n);
}

#define INTEGER_STRIP(name, whole, pixels, rows, columns, step) \
    TARGET static NOINLINE void NAME(name)(const nn_conv *p, const nn_requantize *q, const int8_t *in, \
                                           const int8_t *weights, int channel, int8_t *out, int n) \
    { \
        NAME(integer_strip)(p, q, in, weights, channel, out, whole, pixels, rows, columns, step); \
        (void)n; \
    }
INTEGER_STRIP(integer_strip_4_3x3_1, UNIT, 4, 3, 3, 1)
INTEGER_STRIP(integer_strip_4_3x3_2, UNIT, 4, 3, 3, 2)
INTEGER_STRIP(integer_strip_1_3x3, UNIT, 1, 3, 3, 1)
INTEGER_STRIP(integer_strip_4, n, 4, p->rows, p->columns, 0)
INTEGER_STRIP(integer_strip_1, n, 1, p->rows, p->columns, 0)
#undef INTEGER_STRIP

TARGET void NAME(nn_integer_depthwise)(const nn_conv *p, const nn_requantize *q, const int8_t *in,
                                       const int8_t *weights, int8_t *out)
{
    const int three = p->rows == 3 && p->columns == 3;
    int b, y, x, c;
    for (b = 0; b < p->batch; b++)
        for (y = 0; y < p->height; y++)
            for (c = 0; c < p->groups; c += UNIT) {
                const int n = p->groups - c < UNIT ? p->groups - c : UNIT;
                const int8_t *from = in + (ptrdiff_t)b * p->in_batch + (ptrdiff_t)y * p->in_row + c;
                int8_t *to = out + (ptrdiff_t)b * p->out_batch + (ptrdiff_t)y * p->out_row + c;
                for (x = 0; x < p->width;) {
                    const int some = p->width - x >= 4 ? 4 : 1;
                    if (some == 1)
                        (three && n == UNIT ? NAME(integer_strip_1_3x3) : NAME(integer_strip_1))(p, q, from, weights + c, c, to, n);
                    else if (three && n == UNIT && p->in_pixel == p->tap_column)
                        NAME(integer_strip_4_3x3_1)(p, q, from, weights + c, c, to, n);
                    else if (three && n == UNIT && p->in_pixel == 2 * p->tap_column)
                        NAME(integer_strip_4_3x3_2)(p, q, from, weights + c, c, to, n);
                    else
                        NAME(integer_strip_4)(p, q, from, weights + c, c, to, n);
                    from += (ptrdiff_t)some * p->in_pixel;
                    to += (ptrdiff_t)some * p->out_pixel;
                    x += some;
                }
            }
}
