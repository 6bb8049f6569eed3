/* The same kernels once per instruction set. */
#ifndef NN_LEVELS_H
#define NN_LEVELS_H

#include "nn.h"

#define NN_DECLARE(level) \
    void nn_conv_##level(const nn_conv *p, const float *in, const float *weights, const float *bias, const float *add, \
                         float *out); \
    void nn_depthwise_##level(const nn_conv *p, const float *in, const float *weights, const float *bias, \
                              const float *add, float *out); \
    void nn_integer_conv_##level(const nn_conv *p, const nn_requantize *q, const int8_t *in, const int8_t *weights, \
                                 int8_t *out); \
    void nn_integer_depthwise_##level(const nn_conv *p, const nn_requantize *q, const int8_t *in, \
                                      const int8_t *weights, int8_t *out); \
    void nn_sum_row_##level(const nn_sum *s, int n, const int8_t *one, const int8_t *two, int8_t *out); \
    void nn_quantize_row_##level(const nn_grid *g, int n, const float *in, int8_t *out);
NN_DECLARE(plain)
NN_DECLARE(avx2)
NN_DECLARE(avx512)
NN_DECLARE(neon)

#endif
