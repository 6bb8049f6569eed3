/* Convolutions of planes in the instruction set that is there. */
#include "choose.h"
#include "planes.h"

void nn_sparse_f32(const nn_sparse *p, const nn_columns *c, const float *in, const float *add, float *out)
{
    NN_CHOOSE(nn_sparse, p->pixels <= 8, (p, c, in, add, out))
}

void nn_window_f32(const nn_window *p, const float *in, const float *weights, const float *bias, const float *add,
                   float *scratch, float *out)
{
    NN_CHOOSE(nn_window, p->width <= 8, (p, in, weights, bias, add, scratch, out))
}
