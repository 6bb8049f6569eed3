/* Images as planes: the values of one channel next to each other, row after row without gaps. */
#ifndef NN_PLANES_H
#define NN_PLANES_H

#include <stddef.h>
#include <stdint.h>

/* What is done to sums before they are stored: slope for negative ones, then between low and high. */
typedef struct {
    int batch, outputs;
    int in_batch, in_plane, out_batch, out_plane;
    int add_batch, add_plane; /* of a value that is added to the result */
    float slope, low, high;
} nn_planes;

/* A convolution of single pixels whose zero weights are left out. Inputs and `add` are read in whole vectors.
 *
 * `block` outputs share their zeros; each row of blocks is a count of columns, and for each of them how many planes it
 * lies behind the one before (the first: behind plane 0), and `block` weights. Many inputs come in parts, so that the
 * pixels of one part stay in the nearest cache: all outputs of the first `span` planes, then those of the next. */
typedef struct {
    nn_planes ends;
    int pixels, block, parts, span;
} nn_sparse;

typedef struct {
    const uint16_t *counts;
    const uint8_t *behind;
    const float *weights, *bias; /* biases are 0 after the first part */
} nn_columns;

/* A convolution of planes, a few inputs for each output. Scratch holds rows of a group's inputs between zeros, taken
 * apart into every stride-th column. */
typedef struct {
    nn_planes ends;
    int in_height, in_width, height, width;
    int groups, inputs; /* of each group */
    int rows, columns, stride_row, stride_column, dilation_row, dilation_column, top, left;
    int band;                  /* rows of the result that are computed at once */
    int pitch, plane, scratch; /* floats of a row of scratch, of every stride-th column of one input, of all */
} nn_window;

void nn_sparse_f32(const nn_sparse *p, const nn_columns *c, const float *in, const float *add, float *out);
void nn_window_f32(const nn_window *p, const float *in, const float *weights, const float *bias, const float *add,
                   float *scratch, float *out);

#define NN_DECLARE_PLANES(level) \
    void nn_sparse_##level(const nn_sparse *p, const nn_columns *c, const float *in, const float *add, float *out); \
    void nn_window_##level(const nn_window *p, const float *in, const float *weights, const float *bias, \
                           const float *add, float *scratch, float *out);
NN_DECLARE_PLANES(plain)
NN_DECLARE_PLANES(avx2)
NN_DECLARE_PLANES(avx512)
NN_DECLARE_PLANES(neon)

#endif
