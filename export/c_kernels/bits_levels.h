/* The kernels of bits.h once per instruction set. */
#ifndef NN_BITS_LEVELS_H
#define NN_BITS_LEVELS_H

#include "bits.h"

#define NN_DECLARE_BITS(level) \
    void nn_pack_bits_##level(const nn_conv *p, const float *threshold, const uint32_t *turn, const float *in, \
                              uint32_t *out); \
    void nn_xnor_##level(const nn_conv *p, const nn_counts *q, const uint32_t *in, const uint32_t *weights, \
                         const float *add, float *out, uint32_t *bits); \
    void nn_tree_bits_##level(const nn_conv *p, const nn_tree *t, const uint32_t *in, unsigned char *scratch, \
                              uint32_t *out);
NN_DECLARE_BITS(plain)
NN_DECLARE_BITS(avx2)
NN_DECLARE_BITS(avx512)
NN_DECLARE_BITS(neon)

#endif
