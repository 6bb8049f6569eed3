/* Sums of 32 bits to 8 bits. Every instruction set computes exactly this. */
#ifndef NN_ROUNDING_H
#define NN_ROUNDING_H

#include "nn.h"

static inline int8_t nn_rounded(const nn_requantize *q, int channel, int32_t sum)
{
    const int32_t *factors = q->negative && sum < 0 ? q->negative : q->multiplier;
    const int shift = q->shift[channel];
    const int64_t product = (int64_t)sum * factors[channel] + ((int64_t)1 << (shift - 1));
    const int64_t value = (product >> shift) + q->zero; /* an arithmetic shift, as on every compiler of interest */
    return (int8_t)(value < q->low ? q->low : value > q->high ? q->high : value);
}

#endif
