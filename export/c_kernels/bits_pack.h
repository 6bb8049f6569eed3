/* Floats as bits, 1 where they reach their channel's threshold; turned where `turn` has a bit. */
TARGET void NAME(nn_pack_bits)(const nn_conv *p, const float *threshold, const uint32_t *turn, const float *in,
                               uint32_t *out)
{
    int n, y, x, g, w;
    for (n = 0; n < p->batch; n++)
        for (y = 0; y < p->height; y++) {
            const float *from = in + (ptrdiff_t)n * p->in_batch + (ptrdiff_t)y * p->in_row;
            uint32_t *to = out + (ptrdiff_t)n * p->out_batch + (ptrdiff_t)y * p->out_row;
            for (x = 0; x < p->width; x++, from += p->in_pixel, to += p->out_pixel)
                for (g = 0; g < p->groups; g++)
                    for (w = 0; w < p->outputs; w++) {
                        const int word = g * p->outputs + w;
                        to[word] = pack(from + g * p->inputs + 32 * w, threshold + 32 * word, p->inputs - 32 * w) ^ turn[word];
                    }
        }
}
