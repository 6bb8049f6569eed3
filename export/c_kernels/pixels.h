/* Outputs of a convolution one after the other, whatever they hold. */
#ifndef NN_PIXELS_H
#define NN_PIXELS_H

#include "nn.h"

typedef struct {
    int x, y;
    ptrdiff_t in, add, out;
} nn_place;

/* Where the next pixels of an image lie, counted through rows so that narrow images fill tiles too. Returns how many there
 * are; behind the last one it stands again, so that a tile always has `count`. */
static inline int nn_pixels(const nn_conv *p, nn_place *place, int count, ptrdiff_t *in, ptrdiff_t *add, ptrdiff_t *out)
{
    int filled = 0, i;
    while (filled < count && place->y < p->height) {
        in[filled] = place->in;
        add[filled] = place->add;
        out[filled] = place->out;
        filled++;
        place->in += p->in_pixel;
        place->add += p->add_pixel;
        place->out += p->out_pixel;
        if (++place->x == p->width) {
            place->x = 0;
            place->y++;
            place->in = (ptrdiff_t)place->y * p->in_row;
            place->add = (ptrdiff_t)place->y * p->add_row;
            place->out = (ptrdiff_t)place->y * p->out_row;
        }
    }
    for (i = filled; filled && i < count; i++) {
        in[i] = in[filled - 1];
        add[i] = add[filled - 1];
        out[i] = out[filled - 1];
    }
    return filled;
}

#endif
