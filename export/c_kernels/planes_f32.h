/* Convolutions of planes in the words of one instruction set (see conv_f32.h). Vectors hold neighbouring pixels.
 * SPARSES lists the sparse kernels, SPARSE(block, vectors): outputs and vectors of pixels that are held in registers
 * together; SPARSE_MOST(block) is the most vectors there are for a block. */
#include <math.h>

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

/* What one part adds to all outputs of some vectors of pixels, of which the last one holds `n`. Leaves `c` at the next. */
TARGET static INLINE void NAME(sparse)(const nn_planes *e, nn_columns *c, const float *in, const float *add, float *out,
                                       int n, const int block, const int vectors)
{
    V sum[4][8];
    int o, k, i, j;
    for (o = 0; o < e->outputs; o += block) {
        const float *from = in;
        for (j = 0; j < block; j++) {
            const V start = v_set(*c->bias++);
            for (i = 0; i < vectors; i++)
                sum[j][i] = start;
        }
        for (k = *c->counts++; k > 0; k--) {
            V w[4];
            from += (ptrdiff_t)*c->behind++ * e->in_plane;
            for (j = 0; j < block; j++)
                w[j] = v_set(*c->weights++);
            for (i = 0; i < vectors; i++) {
                const V x = block == 1 ? v_load(from + i * LANES) : v_fetch(from + i * LANES);
                for (j = 0; j < block; j++)
                    sum[j][i] = v_fma(x, w[j], sum[j][i]);
            }
        }
        for (j = 0; j < block; j++) {
            if (o + j == e->outputs)
                break;
            for (i = 0; i < vectors; i++) {
                const float *plus = add ? add + (ptrdiff_t)(o + j) * e->add_plane + i * LANES : NULL;
                float *to = out + (ptrdiff_t)(o + j) * e->out_plane + i * LANES;
                NAME(end)(e, sum[j][i], plus, to, i + 1 < vectors ? LANES : n);
            }
        }
    }
}

#define SPARSE(block, vectors) \
    TARGET static NOINLINE void NAME(sparse_##block##_##vectors)(const nn_planes *e, nn_columns *c, const float *in, \
                                                                 const float *add, float *out, int n) \
    { \
        nn_columns here = *c; \
        NAME(sparse)(e, &here, in, add, out, n, block, vectors); \
        *c = here; \
    }
SPARSES
#undef SPARSE

/* All parts of some vectors of pixels: sums wait in the output. */
TARGET static INLINE void NAME(sparse_strip)(const nn_sparse *p, const nn_columns *columns, const float *in,
                                             const float *add, float *out, int n, int vectors)
{
    nn_columns c = *columns;
    nn_planes open = p->ends, over = p->ends;
    int part;
    open.slope = 1.0f;
    open.low = -HUGE_VALF;
    open.high = HUGE_VALF;
    for (part = 0; part < p->parts; part++, in += (ptrdiff_t)p->span * p->ends.in_plane) {
        nn_planes *e = part + 1 < p->parts ? &open : &over;
        const float *plus = part ? out : add;
        e->add_plane = part ? e->out_plane : p->ends.add_plane;
        switch (p->block * 16 + vectors) {
#define SPARSE(block, vectors) \
    case block * 16 + vectors: \
        NAME(sparse_##block##_##vectors)(e, &c, in, plus, out, n); \
        break;
            SPARSES
#undef SPARSE
        }
    }
}

/* Pixels in strips of nearly the same number of vectors. */
TARGET void NAME(nn_sparse)(const nn_sparse *p, const nn_columns *c, const float *in, const float *add, float *out)
{
    const int most = SPARSE_MOST(p->block);
    int b, at, vectors;
    for (b = 0; b < p->ends.batch; b++)
        for (at = 0; at < p->pixels; at += vectors * LANES) {
            const int left = (p->pixels - at + LANES - 1) / LANES, strips = (left + most - 1) / most;
            const float *plus = add ? add + (ptrdiff_t)b * p->ends.add_batch + at : NULL;
            int last;
            vectors = (left + strips - 1) / strips;
            last = p->pixels - at - (vectors - 1) * LANES;
            NAME(sparse_strip)(p, c, in + (ptrdiff_t)b * p->ends.in_batch + at, plus,
                               out + (ptrdiff_t)b * p->ends.out_batch + at, last < LANES ? last : LANES, vectors);
        }
}

/* One row of an image into scratch, taken apart into every stride-th column. What is around it is zeros already: behind
 * a row stand zeros up to a whole vector. */
TARGET static INLINE void NAME(spread)(const nn_window *p, const float *from, float *to)
{
    const ptrdiff_t plane = p->plane;
    const int left = p->left, stride = p->stride_column;
    int x;
    if (stride == 1)
        for (x = 0; x < p->in_width; x += LANES) {
            const int n = p->in_width - x;
            v_store(to + left + x, n < LANES ? v_some(from + x, n) : v_load(from + x));
        }
    else if (stride == 2) {
        float *even = to + left % 2 * plane + left / 2, *odd = to + (left + 1) % 2 * plane + (left + 1) / 2;
        for (x = 0; x < p->in_width; x += 2 * LANES) {
            const int n = p->in_width - x, m = n - LANES;
            const V a = n < LANES ? v_some(from + x, n) : v_load(from + x);
            const V b = m <= 0 ? v_set(0.0f) : m < LANES ? v_some(from + x + LANES, m) : v_load(from + x + LANES);
            v_store(even + x / 2, v_even(a, b));
            v_store(odd + x / 2, v_odd(a, b));
        }
    } else
        for (x = 0; x < p->in_width; x++)
            to[(x + left) % stride * plane + (x + left) / stride] = from[x];
}

/* The rows of a group's inputs that a band of the result is made of. */
TARGET static NOINLINE void NAME(window_rows)(const nn_window *p, const float *in, float *scratch, int top, int height)
{
    int i, phase, row, x;
    for (i = 0; i < p->inputs; i++, scratch += (ptrdiff_t)p->stride_column * p->plane)
        for (row = 0; row < height; row++) {
            const int at = top + row;
            float *to = scratch + (ptrdiff_t)row * p->pitch;
            if (at >= 0 && at < p->in_height)
                NAME(spread)(p, in + (ptrdiff_t)i * p->ends.in_plane + (ptrdiff_t)at * p->in_width, to);
            else
                for (phase = 0; phase < p->stride_column; phase++)
                    for (x = 0; x < p->pitch; x += LANES)
                        v_store(to + (ptrdiff_t)phase * p->plane + x, v_set(0.0f));
        }
}

/* Where a tile of the result comes from and goes to. */
typedef struct {
    const float *scratch, *weights, *bias, *add;
    float *out;
    int behind; /* pixels of the result that are written after it */
} NAME(window_ends);

/* `tall` rows of `wide` outputs, from right to left: a vector that reaches beyond its row is stored before what it
 * covers. */
TARGET static INLINE void NAME(window)(const nn_window *p, const NAME(window_ends) *e, const int tall, const int wide,
                                       const int inputs, const int rows, const int columns, const int stride_row,
                                       const int stride, const int dilation_row, const int dilation)
{
    const ptrdiff_t pitch = p->pitch, size = (ptrdiff_t)inputs * rows * columns;
    int x, i, row, column, t, o;
    for (x = (p->width - 1) / LANES * LANES; x >= 0; x -= LANES) {
        const int n = p->width - x < LANES ? p->width - x : LANES;
        V sum[2][4];
        for (o = 0; o < wide; o++)
            for (t = 0; t < tall; t++)
                sum[o][t] = v_set(e->bias[o]);
        for (i = 0; i < inputs; i++)
            for (row = 0; row < rows; row++)
                for (column = 0; column < columns; column++) {
                    const int across = column * dilation;
                    const float *from = e->scratch + (ptrdiff_t)(i * stride + across % stride) * p->plane + x + across / stride;
                    const float *at = e->weights + (i * rows + row) * columns + column;
                    V w[2];
                    for (o = 0; o < wide; o++)
                        w[o] = v_set(at[o * size]);
                    for (t = 0; t < tall; t++) {
                        const V v = v_load(from + (t * stride_row + row * dilation_row) * pitch);
                        for (o = 0; o < wide; o++)
                            sum[o][t] = v_fma(v, w[o], sum[o][t]);
                    }
                }
        for (o = 0; o < wide; o++)
            for (t = 0; t < tall; t++) {
                const ptrdiff_t down = (ptrdiff_t)t * p->width + x;
                const int later = e->behind + (tall - 1 - t) * p->width;
                const float *add = e->add ? e->add + (ptrdiff_t)o * p->ends.add_plane + down : NULL;
                float *out = e->out + (ptrdiff_t)o * p->ends.out_plane + down;
                if (!add && later >= LANES - n)
                    v_store(out, NAME(limited)(p->ends.slope, p->ends.low, p->ends.high, sum[o][t]));
                else
                    NAME(end)(&p->ends, sum[o][t], add, out, n);
            }
    }
}

#define WINDOW(name, tall, wide, inputs, rows, columns, stride_row, stride, dilation_row, dilation) \
    TARGET static NOINLINE void NAME(name)(const nn_window *p, const NAME(window_ends) *e) \
    { \
        NAME(window)(p, e, tall, wide, inputs, rows, columns, stride_row, stride, dilation_row, dilation); \
    }
WINDOW(depthwise_3x3_1, 4, 1, 1, 3, 3, 1, 1, 1, 1)
WINDOW(depthwise_3x3_2, 4, 1, 1, 3, 3, 2, 2, 1, 1)
WINDOW(window_3x3_1, 4, 2, p->inputs, 3, 3, 1, 1, 1, 1)
WINDOW(window_3x3_2, 4, 2, p->inputs, 3, 3, 2, 2, 1, 1)
WINDOW(window_4, 4, 1, p->inputs, p->rows, p->columns, p->stride_row, p->stride_column, p->dilation_row,
       p->dilation_column)
WINDOW(window_1, 1, 1, p->inputs, p->rows, p->columns, p->stride_row, p->stride_column, p->dilation_row,
       p->dilation_column)
#undef WINDOW

/* All outputs of a group in one band of rows, of which some are behind. The last four rows may be computed twice. */
TARGET static INLINE void NAME(window_band)(const nn_window *p, const NAME(window_ends) *whole, int height, int rest)
{
    const int three = p->rows == 3 && p->columns == 3 && p->dilation_row == 1 && p->dilation_column == 1 &&
                      p->stride_row == p->stride_column && p->stride_row <= 2 && height >= 4;
    const int two = p->stride_column == 2, tall = height >= 4 ? 4 : 1;
    int o, y, wide;
    for (o = 0; o < p->ends.outputs; o += wide) {
        NAME(window_ends) e = *whole;
        wide = three && p->ends.outputs - o > 1 ? 2 : 1;
        e.weights += (ptrdiff_t)o * p->inputs * p->rows * p->columns;
        e.bias += o;
        for (y = 0; y < height; y += tall) {
            const int from = y + tall <= height ? y : height - tall;
            const ptrdiff_t down = (ptrdiff_t)from * p->width;
            e.scratch = whole->scratch + (ptrdiff_t)from * p->stride_row * p->pitch;
            e.add = whole->add ? whole->add + (ptrdiff_t)o * p->ends.add_plane + down : NULL;
            e.out = whole->out + (ptrdiff_t)o * p->ends.out_plane + down;
            e.behind = (rest + height - from - tall) * p->width;
            if (wide == 2)
                (two ? NAME(window_3x3_2) : NAME(window_3x3_1))(p, &e);
            else if (three && p->inputs == 1)
                (two ? NAME(depthwise_3x3_2) : NAME(depthwise_3x3_1))(p, &e);
            else
                (tall == 4 ? NAME(window_4) : NAME(window_1))(p, &e);
        }
    }
}

TARGET void NAME(nn_window)(const nn_window *p, const float *in, const float *weights, const float *bias,
                            const float *add, float *scratch, float *out)
{
    const nn_planes *e = &p->ends;
    const int size = p->inputs * p->rows * p->columns, span = (p->rows - 1) * p->dilation_row + 1;
    int b, g, y, i;
    for (i = 0; i < p->scratch; i++)
        scratch[i] = 0.0f;
    for (b = 0; b < e->batch; b++)
        for (g = 0; g < p->groups; g++) {
            const float *image = in + (ptrdiff_t)b * e->in_batch + (ptrdiff_t)g * p->inputs * e->in_plane;
            const ptrdiff_t first = (ptrdiff_t)g * e->outputs;
            NAME(window_ends) w = {scratch, weights + first * size, bias + first, NULL, NULL, 0};
            for (y = 0; y < p->height; y += p->band) {
                const int height = p->height - y < p->band ? p->height - y : p->band;
                const int tall = (height - 1) * p->stride_row + span;
                const ptrdiff_t down = (ptrdiff_t)y * p->width;
                w.add = add ? add + (ptrdiff_t)b * e->add_batch + first * e->add_plane + down : NULL;
                w.out = out + (ptrdiff_t)b * e->out_batch + first * e->out_plane + down;
                NAME(window_rows)(p, image, scratch, y * p->stride_row - p->top, tall);
                NAME(window_band)(p, &w, height, p->height - y - height);
            }
        }
}
