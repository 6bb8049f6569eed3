/* XNOR and popcount in the words of one instruction set. LANES outputs stand side by side:
 * S counts while at most FLUSH words are added: s_none, s_count (counts of x ^ w added), W weights, w_load, X a word for
 * all outputs, x_all. D holds whole counts, 32 bits each: d_none, d_add (S into D), d_load; d_twice (2 · d),
 * d_sub, d_bits (one bit per lane: d <= limit). F holds results: f_of (integers), f_load, f_some (n values), f_store,
 * f_keep (n values), f_fma, f_add, f_finish. BLOCK / LANES vectors hold the weights that stand together. */

#define BLOCK 16
#define PARTS (BLOCK / LANES)

typedef struct {
    const uint32_t *in[PIXELS];
    const int32_t *around[PIXELS];
    const float *add[PIXELS];
    float *out[PIXELS];
    uint32_t *bits[PIXELS];
} NAME(bit_ends);

TARGET static INLINE void NAME(bit_results)(const nn_conv *p, const nn_counts *q, const NAME(bit_ends) *e, int i, D *d,
                                            int base, int channel, const int vectors)
{
    int j;
    for (j = 0; j < vectors; j++) {
        const int lane = j * LANES, left = p->outputs - channel - lane, n = left < LANES ? left : LANES;
        D sum;
        F f;
        if (left <= 0)
            break;
        sum = d_sub(d_all(q->places), d_twice(d[j]));
        if (e->around[i])
            sum = d_sub(sum, d_sub(d_none(), d_load(e->around[i] + base + lane)));
        f = f_fma(f_of(sum), f_load(q->scale + base + lane), f_load(q->shift + base + lane));
        if (e->add[i])
            f = f_add(f, n < LANES ? f_some(e->add[i] + channel + lane, n) : f_load(e->add[i] + channel + lane));
        f = f_finish(p, f);
        if (n < LANES)
            f_keep(e->out[i] + channel + lane, f, n);
        else
            f_store(e->out[i] + channel + lane, f);
    }
}

TARGET static INLINE void NAME(bit_signs)(const nn_conv *p, const nn_counts *q, const NAME(bit_ends) *e, int i, D *d,
                                          int base, int channel, const int vectors)
{
    const int words = (p->outputs - channel + 31) / 32;
    uint32_t found[2] = {0, 0};
    int j;
    for (j = 0; j < vectors; j++) {
        const int lane = j * LANES;
        D twice = d_twice(d[j]);
        if (e->around[i])
            twice = d_sub(twice, d_load(e->around[i] + base + lane));
        found[lane / 32] |= d_bits(twice, d_load(q->limit + base + lane)) << lane % 32;
    }
    for (j = 0; j < 2 && j < words; j++)
        e->bits[i][channel / 32 + j] = found[j] ^ q->turn[base / 32 + j];
}

/* Some pixels times some vectors of outputs, counted in registers over the whole kernel. */
TARGET static INLINE void NAME(bit_tile)(const nn_conv *p, const nn_counts *q, const NAME(bit_ends) *e,
                                         const uint32_t *weights, int base, int channel, const int pixels,
                                         const int vectors)
{
    const ptrdiff_t next = (ptrdiff_t)p->rows * p->columns * p->length * BLOCK; /* from block to block */
    D sum[PIXELS][VECTORS];
    int row, column, k, i, j;
    for (i = 0; i < pixels; i++)
        for (j = 0; j < vectors; j++)
            sum[i][j] = d_none();
    for (row = 0; row < p->rows; row++)
        for (column = 0; column < p->columns; column++) {
            const ptrdiff_t tap = (ptrdiff_t)row * p->tap_row + (ptrdiff_t)column * p->tap_column;
            for (k = 0; k < p->length;) {
                const int stop = p->length - k > FLUSH ? k + FLUSH : p->length;
                S part[PIXELS][VECTORS];
                for (i = 0; i < pixels; i++)
                    for (j = 0; j < vectors; j++)
                        part[i][j] = s_from(sum[i][j]);
                for (; k < stop; k++) {
                    W w[VECTORS];
                    for (j = 0; j < vectors; j++)
                        w[j] = w_load(weights + (j / PARTS) * next + (j % PARTS) * LANES);
                    weights += BLOCK;
                    for (i = 0; i < pixels; i++) {
                        const X x = x_all(e->in[i][tap + k]);
                        for (j = 0; j < vectors; j++)
                            part[i][j] = s_count(part[i][j], x, w[j]);
                    }
                }
                for (i = 0; i < pixels; i++)
                    for (j = 0; j < vectors; j++)
                        sum[i][j] = d_add(sum[i][j], part[i][j]);
            }
        }
    for (i = 0; i < pixels; i++)
        if (q->limit)
            NAME(bit_signs)(p, q, e, i, sum[i], base, channel, vectors);
        else
            NAME(bit_results)(p, q, e, i, sum[i], base, channel, vectors);
}

#define BIT_TILE(pixels, vectors) \
    TARGET static NOINLINE void NAME(bit_tile_##pixels##_##vectors)(const nn_conv *p, const nn_counts *q, \
                                                                    const NAME(bit_ends) *e, const uint32_t *weights, \
                                                                    int base, int channel) \
    { \
        NAME(bit_tile)(p, q, e, weights, base, channel, pixels, vectors); \
    }
BIT_TILES
#undef BIT_TILE

/* The next pixels of an image, counted through rows. Behind the last one it stands again. */
TARGET static INLINE int NAME(bit_pixels)(const nn_conv *p, const nn_counts *q, NAME(bit_ends) *e, int *x, int *y,
                                          const uint32_t *in, const float *add, float *out, uint32_t *bits)
{
    int filled, i;
    for (filled = 0; filled < PIXELS && *y < p->height; filled++) {
        const ptrdiff_t row = *y, column = *x;
        e->in[filled] = in + row * p->in_row + column * p->in_pixel;
        e->add[filled] = add ? add + row * p->add_row + column * p->add_pixel : NULL;
        e->out[filled] = out ? out + row * p->out_row + column * p->out_pixel : NULL;
        e->bits[filled] = bits ? bits + row * p->out_row + column * p->out_pixel : NULL;
        e->around[filled] = NULL;
        if (q->around) {
            const int class = q->row_class[row] * q->column_classes + q->column_class[column];
            const int outputs = p->groups * ((p->outputs + BLOCK - 1) / BLOCK * BLOCK);
            e->around[filled] = class ? q->around + (ptrdiff_t)class * outputs : NULL;
        }
        if (++*x == p->width) {
            *x = 0;
            ++*y;
        }
    }
    for (i = filled; filled && i < PIXELS; i++) {
        e->in[i] = e->in[filled - 1];
        e->add[i] = e->add[filled - 1];
        e->out[i] = e->out[filled - 1];
        e->bits[i] = e->bits[filled - 1];
        e->around[i] = e->around[filled - 1];
    }
    return filled;
}

TARGET void NAME(nn_xnor)(const nn_conv *p, const nn_counts *q, const uint32_t *in, const uint32_t *weights,
                          const float *add, float *out, uint32_t *bits)
{
    const int padded = (p->outputs + BLOCK - 1) / BLOCK * BLOCK, words = (p->outputs + 31) / 32;
    const ptrdiff_t size = (ptrdiff_t)p->rows * p->columns * p->length;
    NAME(bit_ends) e;
    int n, g, c, x, y, count;
    for (n = 0; n < p->batch; n++)
        for (g = 0; g < p->groups; g++) {
            const uint32_t *from = in + (ptrdiff_t)n * p->in_batch + (ptrdiff_t)g * p->inputs;
            const float *plus = add ? add + (ptrdiff_t)n * p->add_batch + (ptrdiff_t)g * p->outputs : NULL;
            float *to = out ? out + (ptrdiff_t)n * p->out_batch + (ptrdiff_t)g * p->outputs : NULL;
            uint32_t *signs = bits ? bits + (ptrdiff_t)n * p->out_batch + (ptrdiff_t)g * words : NULL;
            x = y = 0;
            while ((count = NAME(bit_pixels)(p, q, &e, &x, &y, from, plus, to, signs)) > 0)
                for (c = 0; c < p->outputs; c += VECTORS * LANES) {
                    const int base = g * padded + c, vectors = (padded - c + LANES - 1) / LANES;
                    const uint32_t *w = weights + (ptrdiff_t)base * size;
                    BIT_CHOOSE(count, vectors, (p, q, &e, w, base, c))
                }
        }
}
