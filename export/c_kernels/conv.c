/* Convolutions in the instruction set that is there. */
#include "choose.h"
#include "levels.h"

void nn_conv_f32(const nn_conv *p, const float *in, const float *weights, const float *bias, const float *add,
                 float *out)
{
    NN_CHOOSE(nn_conv, p->block < 16, (p, in, weights, bias, add, out))
}

void nn_depthwise_f32(const nn_conv *p, const float *in, const float *weights, const float *bias, const float *add,
                      float *out)
{
    NN_CHOOSE(nn_depthwise, p->groups % 16 == 8, (p, in, weights, bias, add, out))
}

void nn_conv_s8(const nn_conv *p, const nn_requantize *q, const int8_t *in, const int8_t *weights, int8_t *out)
{
    NN_CHOOSE(nn_integer_conv, p->block < 16, (p, q, in, weights, out))
}

void nn_depthwise_s8(const nn_conv *p, const nn_requantize *q, const int8_t *in, const int8_t *weights, int8_t *out)
{
    NN_CHOOSE(nn_integer_depthwise, p->groups % 16 == 8, (p, q, in, weights, out))
}

void nn_sum_row(const nn_sum *s, int n, const int8_t *one, const int8_t *two, int8_t *out)
{
    NN_CHOOSE(nn_sum_row, 0, (s, n, one, two, out))
}

void nn_quantize_row(const nn_grid *g, int n, const float *in, int8_t *out)
{
    NN_CHOOSE(nn_quantize_row, 0, (g, n, in, out))
}
