/* Convolutions of planes in the words of one instruction set (see conv_f32.h). Vectors hold neighbouring pixels.
 * SPARSES lists the sparse kernels, SPARSE(block, vectors): outputs and vectors of pixels that are held in registers
 * together; SPARSE_MOST(block) is the most vectors there are for a block. */

TARGET static INLINE void NAME(end)(const nn_planes *p, V v, const float *add, float *out, int n)
{
    if (add)
        v = v_add(v, n < LANES ? v_some(add, n) : v_load(add));
    v = NAME(limited)(p->slope, p->low, p->high, v);
    if (n < LANES)
        v_keep(out, v, n);
    else
        v_store(out, v);
}

/* All outputs of some vectors of pixels, of which the last one holds `n`. */
TARGET static INLINE void NAME(sparse)(const nn_sparse *p, const float *in, const uint8_t *behind,
                                       const uint16_t *counts, const float *weights, const float *bias,
                                       const float *add, float *out, int n, const int block, const int vectors)
{
    const nn_planes *e = &p->ends;
    V sum[4][8];
    int o, k, i, j;
    for (o = 0; o < e->outputs; o += block) {
        const float *from = in;
        for (j = 0; j < block; j++) {
            const V start = v_set(bias[o + j]);
            for (i = 0; i < vectors; i++)
                sum[j][i] = start;
        }
        for (k = *counts++; k > 0; k--) {
            V w[4];
            from += (ptrdiff_t)*behind++ * e->in_plane;
            for (j = 0; j < block; j++)
                w[j] = v_set(*weights++);
            for (i = 0; i < vectors; i++) {
                const V x = v_load(from + i * LANES);
                for (j = 0; j < block; j++)
                    sum[j][i] = v_fma(x, w[j], sum[j][i]);
            }
        }
        for (j = 0; j < block; j++)
            for (i = 0; i < vectors && o + j < e->outputs; i++) {
                const float *plus = add ? add + (ptrdiff_t)(o + j) * e->add_plane + i * LANES : NULL;
                float *to = out + (ptrdiff_t)(o + j) * e->out_plane + i * LANES;
                NAME(end)(e, sum[j][i], plus, to, i + 1 < vectors ? LANES : n);
            }
    }
}

#define SPARSE(block, vectors) \
    TARGET static NOINLINE void NAME(sparse_##block##_##vectors)( \
        const nn_sparse *p, const float *in, const uint8_t *behind, const uint16_t *counts, const float *weights, \
        const float *bias, const float *add, float *out, int n) \
    { \
        NAME(sparse)(p, in, behind, counts, weights, bias, add, out, n, block, vectors); \
    }
SPARSES
#undef SPARSE

/* Pixels in strips of nearly the same number of vectors. */
TARGET void NAME(nn_sparse)(const nn_sparse *p, const float *in, const uint8_t *behind, const uint16_t *counts,
                            const float *weights, const float *bias, const float *add, float *out)
{
    const int most = SPARSE_MOST(p->block);
    int b, at, vectors;
    for (b = 0; b < p->ends.batch; b++) {
        const float *image = in + (ptrdiff_t)b * p->ends.in_batch;
        const float *plus = add ? add + (ptrdiff_t)b * p->ends.add_batch : NULL;
        float *made = out + (ptrdiff_t)b * p->ends.out_batch;
        for (at = 0; at < p->pixels; at += vectors * LANES) {
            const int left = (p->pixels - at + LANES - 1) / LANES, strips = (left + most - 1) / most;
            const int behind_last = p->pixels - at - ((left + strips - 1) / strips - 1) * LANES;
            const int n = behind_last < LANES ? behind_last : LANES;
            const float *x = image + at, *y = plus ? plus + at : NULL;
            vectors = (left + strips - 1) / strips;
            switch (p->block * 16 + vectors) {
#define SPARSE(block, vectors) \
    case block * 16 + vectors: \
        NAME(sparse_##block##_##vectors)(p, x, behind, counts, weights, bias, y, made + at, n); \
        break;
                SPARSES
#undef SPARSE
            }
        }
    }
}

/* Every stride-th column of a row from `phase` on, between zeros; a row outside the image is zeros. */
TARGET static INLINE void NAME(spread)(const nn_window *p, const float *from, float *to, int phase, const int stride)
{
    const int ahead = p->left - phase, last = p->in_width - 1 + ahead;
    int begin = ahead > 0 ? (ahead + stride - 1) / stride : 0;
    int end = last < 0 ? 0 : last / stride + 1;
    int i;
    begin = from && begin < p->pitch ? begin : p->pitch;
    end = end < p->pitch ? end : p->pitch;
    for (i = 0; i < begin; i++)
        to[i] = 0.0f;
    if (begin < end)
        from += begin * stride - ahead;
    for (; i < end; i++)
        to[i] = from[(ptrdiff_t)(i - begin) * stride];
    for (; i < p->pitch; i++)
        to[i] = 0.0f;
}

/* The rows of a group's inputs that a band of the result is made of. */
TARGET static NOINLINE void NAME(window_rows)(const nn_window *p, const float *in, float *scratch, int top, int height)
{
    int i, phase, row;
    for (i = 0; i < p->inputs; i++)
        for (phase = 0; phase < p->stride_column; phase++)
            for (row = top; row < top + height; row++, scratch += p->pitch) {
                const float *from = in + (ptrdiff_t)i * p->ends.in_plane + (ptrdiff_t)row * p->in_width;
                if (row < 0 || row >= p->in_height)
                    from = NULL;
                if (p->stride_column == 1)
                    NAME(spread)(p, from, scratch, phase, 1);
                else if (p->stride_column == 2)
                    NAME(spread)(p, from, scratch, phase, 2);
                else
                    NAME(spread)(p, from, scratch, phase, p->stride_column);
            }
}

/* `tall` rows of one output. `plane` is the size of one input's columns of one phase in scratch. */
TARGET static INLINE void NAME(window)(const nn_window *p, const float *scratch, ptrdiff_t plane, const float *weights,
                                       float bias, const float *add, float *out, const int tall, const int rows,
                                       const int columns, const int stride, const int dilation)
{
    const ptrdiff_t down = (ptrdiff_t)p->stride_row * p->pitch, tap = (ptrdiff_t)p->dilation_row * p->pitch;
    int x, i, row, column, t;
    for (x = 0; x < p->width; x += LANES) {
        const int n = p->width - x < LANES ? p->width - x : LANES;
        const float *w = weights;
        V sum[4];
        for (t = 0; t < tall; t++)
            sum[t] = v_set(bias);
        for (i = 0; i < p->inputs; i++)
            for (row = 0; row < rows; row++)
                for (column = 0; column < columns; column++) {
                    const int across = column * dilation;
                    const float *from = scratch + (i * stride + across % stride) * plane + row * tap + x + across / stride;
                    const V v = v_set(*w++);
                    for (t = 0; t < tall; t++)
                        sum[t] = v_fma(v_load(from + t * down), v, sum[t]);
                }
        for (t = 0; t < tall; t++) {
            const ptrdiff_t at = (ptrdiff_t)t * p->width + x;
            NAME(end)(&p->ends, sum[t], add ? add + at : NULL, out + at, n);
        }
    }
}

#define WINDOW(name, tall, rows, columns, stride, dilation) \
    TARGET static NOINLINE void NAME(name)(const nn_window *p, const float *scratch, ptrdiff_t plane, \
                                           const float *weights, float bias, const float *add, float *out) \
    { \
        NAME(window)(p, scratch, plane, weights, bias, add, out, tall, rows, columns, stride, dilation); \
    }
WINDOW(window_4_3x3_1, 4, 3, 3, 1, 1)
WINDOW(window_4_3x3_2, 4, 3, 3, 2, 1)
WINDOW(window_4, 4, p->rows, p->columns, p->stride_column, p->dilation_column)
WINDOW(window_1, 1, p->rows, p->columns, p->stride_column, p->dilation_column)
#undef WINDOW

/* All outputs of a group in one band of rows. */
TARGET static INLINE void NAME(window_band)(const nn_window *p, const float *scratch, ptrdiff_t plane,
                                            const float *weights, const float *bias, const float *add, float *out,
                                            int height)
{
    const int three = p->rows == 3 && p->columns == 3 && p->dilation_column == 1;
    const int size = p->inputs * p->rows * p->columns;
    int o, y, tall;
    for (o = 0; o < p->ends.outputs; o++)
        for (y = 0; y < height; y += tall) {
            const float *from = scratch + (ptrdiff_t)y * p->stride_row * p->pitch, *w = weights + (ptrdiff_t)o * size;
            const float *plus = add ? add + (ptrdiff_t)o * p->ends.add_plane + (ptrdiff_t)y * p->width : NULL;
            float *to = out + (ptrdiff_t)o * p->ends.out_plane + (ptrdiff_t)y * p->width;
            tall = height - y >= 4 ? 4 : 1;
            if (tall == 1)
                NAME(window_1)(p, from, plane, w, bias[o], plus, to);
            else if (three && p->stride_column == 1)
                NAME(window_4_3x3_1)(p, from, plane, w, bias[o], plus, to);
            else if (three && p->stride_column == 2)
                NAME(window_4_3x3_2)(p, from, plane, w, bias[o], plus, to);
            else
                NAME(window_4)(p, from, plane, w, bias[o], plus, to);
        }
}

TARGET void NAME(nn_window)(const nn_window *p, const float *in, const float *weights, const float *bias,
                            const float *add, float *scratch, float *out)
{
    const nn_planes *e = &p->ends;
    const int size = p->inputs * p->rows * p->columns, span = (p->rows - 1) * p->dilation_row + 1;
    int b, g, y;
    for (b = 0; b < e->batch; b++)
        for (g = 0; g < p->groups; g++) {
            const float *image = in + (ptrdiff_t)b * e->in_batch + (ptrdiff_t)g * p->inputs * e->in_plane;
            const ptrdiff_t first = (ptrdiff_t)g * e->outputs;
            for (y = 0; y < p->height; y += p->band) {
                const int height = p->height - y < p->band ? p->height - y : p->band;
                const int tall = (height - 1) * p->stride_row + span;
                const float *plus = add ? add + (ptrdiff_t)b * e->add_batch + first * e->add_plane : NULL;
                float *to = out + (ptrdiff_t)b * e->out_batch + first * e->out_plane + (ptrdiff_t)y * p->width;
                NAME(window_rows)(p, image, scratch, y * p->stride_row - p->top, tall);
                NAME(window_band)(p, scratch, (ptrdiff_t)tall * p->pitch, weights + first * size, bias + first,
                                  plus ? plus + (ptrdiff_t)y * p->width : NULL, to, height);
            }
        }
}
