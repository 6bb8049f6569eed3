/* Kernels of a network as C. Sizes are in elements; images have their channels last and next to each other. */
#ifndef NN_H
#define NN_H

#include "planes.h"
#include <stddef.h>
#include <stdint.h>

#if !defined NN_PLAIN && defined __GNUC__ && defined __x86_64__
#define NN_X86 1
#elif !defined NN_PLAIN && defined __GNUC__ && defined __ARM_NEON && defined __aarch64__
#define NN_NEON 1
#endif
#ifndef NN_LEVEL
#define NN_LEVEL 2 /* of x86: 0 plain C, 1 AVX2, 2 AVX-512; what the processor lacks is never used */
#endif

#define NN_AXES 6

/* A convolution. Padding is done before it. */
typedef struct {
    int batch, height, width;      /* of what is written */
    int groups, inputs, outputs;   /* channels of each group */
    int rows, columns, length;     /* of the kernel: successive values count as one column */
    int in_batch, in_row, in_pixel;    /* from one output to the next */
    int tap_row, tap_column;           /* from one place of the kernel to the next */
    int out_batch, out_row, out_pixel;
    int add_batch, add_row, add_pixel; /* of a value that is added to the result */
    int block;                         /* outputs whose weights stand together: 8 or 16 */
    float slope, low, high;            /* negative results times slope, then between low and high */
} nn_conv;

/* What integers need besides: result = ((sum · multiplier) >> shift, rounded) + zero, between low and high. */
typedef struct {
    const int32_t *bias;        /* zero points of the input are in it */
    const int32_t *offset;      /* 128 · sum of the weights, for unsigned products */
    const int32_t *multiplier;
    const int32_t *negative;    /* the same for negative sums, NULL where it is the same */
    const int32_t *shift;       /* 1 to 62 */
    int zero, low, high;
} nn_requantize;

typedef struct {
    int batch, in_height, in_width, height, width, channels;
    int rows, columns, stride_row, stride_column, dilation_row, dilation_column, top, left;
    int in_batch, in_row, in_pixel, out_batch, out_row, out_pixel;
    int divisor; /* 0: values inside the image, -1: those in the padding too */
} nn_pool;

/* Up to six axes, outermost first; axes that are not there have size 1. */
typedef struct {
    int size[NN_AXES];
    int one[NN_AXES], two[NN_AXES], out[NN_AXES]; /* strides */
} nn_walk;

void nn_conv_f32(const nn_conv *p, const float *in, const float *weights, const float *bias, const float *add,
                 float *out);
void nn_depthwise_f32(const nn_conv *p, const float *in, const float *weights, const float *bias, const float *add,
                      float *out);
void nn_conv_s8(const nn_conv *p, const nn_requantize *q, const int8_t *in, const int8_t *weights, int8_t *out);
void nn_depthwise_s8(const nn_conv *p, const nn_requantize *q, const int8_t *in, const int8_t *weights, int8_t *out);

void nn_max_pool_f32(const nn_pool *p, const float *in, float *out);
void nn_avg_pool_f32(const nn_pool *p, const float *in, float *out);
void nn_adaptive_pool_f32(const nn_pool *p, const float *in, float *out);
void nn_max_pool_s8(const nn_pool *p, const int8_t *in, int8_t *out);
void nn_avg_pool_s8(const nn_pool *p, const nn_requantize *q, const int8_t *in, int8_t *out);
void nn_nearest_f32(const nn_pool *p, const int32_t *rows, const int32_t *columns, const float *in, float *out);
void nn_nearest_s8(const nn_pool *p, const int32_t *rows, const int32_t *columns, const int8_t *in, int8_t *out);
void nn_bilinear_f32(const nn_pool *p, const int32_t *rows, const float *down, const int32_t *columns,
                     const float *right, const float *in, float *out);

enum nn_function {
    NN_CLIP, NN_LEAKY, NN_SIGMOID, NN_TANH, NN_SILU, NN_HARDSWISH, NN_HARDSIGMOID, NN_SQRT, NN_RSQRT, NN_EXP, NN_LOG,
    NN_ABS, NN_NEG, NN_SQUARE, NN_RECIPROCAL, NN_SIN, NN_COS, NN_MISH, NN_ERF, NN_SOFTSIGN, NN_ELU, NN_SOFTPLUS,
    NN_GELU, NN_GELU_TANH, NN_POWER, NN_SCALE
};
enum nn_operator { NN_ADD, NN_SUB, NN_MUL, NN_DIV, NN_MAXIMUM, NN_MINIMUM, NN_PRELU };
enum nn_reduction { NN_MEAN, NN_SUM, NN_AMAX, NN_AMIN };

void nn_unary_f32(const nn_walk *w, enum nn_function f, float a, float b, const float *in, float *out);
void nn_binary_f32(const nn_walk *w, enum nn_operator o, const float *one, const float *two, float *out);
/* Sizes of the walk are those of the input; strides of axes that are summed are 0 in `out`. */
void nn_reduce_f32(const nn_walk *w, enum nn_reduction r, int count, const float *in, float *out);
/* `size` values `stride` apart in what is read, `to` in what is written. */
void nn_softmax_f32(const nn_walk *w, int size, int stride, int to, int logarithm, const float *in, float *out);
void nn_copy_32(const nn_walk *w, const void *in, void *out);
void nn_copy_8(const nn_walk *w, const void *in, void *out);
void nn_fill_f32(int size, float value, float *out);
void nn_fill_s8(int size, int value, int8_t *out);
/* The part of padded images that is around them. */
typedef struct {
    int batch, height, width, channels, top, bottom, left, right; /* sizes with the padding */
} nn_border;
void nn_border_f32(const nn_border *b, float value, float *out);
void nn_border_s8(const nn_border *b, int8_t value, int8_t *out);
void nn_border_u32(const nn_border *b, uint32_t value, uint32_t *out);
void nn_cast(const nn_walk *w, const uint8_t *in, float *out);
/* Steps of a grid (their inverse), the integer that stands for 0, and limits of integers. */
typedef struct {
    float inverse;
    int zero, low, high;
} nn_grid;
void nn_quantize_row(const nn_grid *g, int n, const float *in, int8_t *out);
void nn_quantize(const nn_walk *w, const nn_grid *g, const float *in, int8_t *out);
void nn_dequantize(const nn_walk *w, float scale, int zero, const int8_t *in, float *out);
void nn_table_s8(const nn_walk *w, const int8_t *table, const int8_t *in, int8_t *out);
/* ((one - a.zero) · a.multiplier ± …) as nn_requantize has it, in 32 bits. */
typedef struct {
    int zero_one, zero_two, multiplier_one, multiplier_two, shift, zero, low, high;
} nn_sum;
void nn_sum_row(const nn_sum *s, int n, const int8_t *one, const int8_t *two, int8_t *out);
void nn_sum_s8(const nn_walk *w, const nn_sum *s, const int8_t *one, const int8_t *two, int8_t *out);
/* ((one - zero_one) · (two - zero_two) · multiplier_one) >> shift */
void nn_product_s8(const nn_walk *w, const nn_sum *s, const int8_t *one, const int8_t *two, int8_t *out);

#endif
