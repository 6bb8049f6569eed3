/* Layers of ±1: bits packed along channels, 32 a word, 1 is +1; a sum over n places is n − 2 · (places that differ). */
#ifndef NN_BITS_H
#define NN_BITS_H

#include "nn.h"

/* What becomes of the places in which inputs and weights differ.
 * Floats: (places − 2 · differing + around) · scale + shift, then as nn_conv says.
 * Bits: 1 where 2 · differing − around <= limit, turned where `turn` has a bit. */
typedef struct {
    const float *scale, *shift;
    const int32_t *limit;
    const uint32_t *turn;
    const int32_t *around; /* what zeros around the image add: [class of row][class of column][output]; NULL: nothing */
    const int32_t *row_class, *column_class;
    int column_classes;
    int places;
} nn_counts;

/* A tree over the outputs: each has the bits of its parent but at some places. A plane holds one bit of every pixel, in units
 * of 64 bytes: unit v has rows v, v + k, v + 2k … of `row_bytes` each, k being the units that are computed together. So the
 * rows below those of a unit are another unit, and nothing is read across two of them. */
typedef struct {
    int variants, words;                    /* planes: per variant of the image and channel */
    int tile, row_bytes, rows, band, units; /* pixels of a row at once; rows in a unit; units of results and of a plane */
    const int32_t *starts, *beyond;         /* per variant: its first word, and how many more rows are read */
    int step_row, step_pixel;               /* words from one pixel of a plane to the next */
    int counters, outputs;                  /* bits of a count */
    const int32_t *order;   /* per output: itself, its parent's slot or -1, its own or -1, eights of planes that count
                               where they are 1, eights where they are 0, bits of their sum */
    const uint16_t *places; /* these planes, in units */
    const uint32_t *limits; /* per output and bit of the counter: all ones where its limit has a 0 */
    const uint32_t *turn;   /* per output: all ones where its bits are turned */
} nn_tree;

/* Whether vectors of bits are counted by one instruction, so that layers are faster without a tree. */
int nn_has_popcount(void);
void nn_pack_bits(const nn_conv *p, const float *threshold, const uint32_t *turn, const float *in, uint32_t *out);
void nn_conv_bits(const nn_conv *p, const nn_counts *q, const uint32_t *in, const uint32_t *weights, const float *add,
                  float *out);
void nn_sign_bits(const nn_conv *p, const nn_counts *q, const uint32_t *in, const uint32_t *weights, uint32_t *out);
void nn_tree_bits(const nn_conv *p, const nn_tree *t, const uint32_t *in, unsigned char *scratch, uint32_t *out);
/* `reached` where one >= two, else `below`. */
void nn_signs_f32(const nn_walk *w, float reached, float below, const float *one, const float *two, float *out);

#endif
