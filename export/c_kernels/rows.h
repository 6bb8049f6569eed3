/* Rows of single values; compilers use the vectors of the instruction set. */

TARGET void NAME(nn_sum_row)(const nn_sum *s, int n, const int8_t *one, const int8_t *two, int8_t *out)
{
    const int a = s->multiplier_one, b = s->multiplier_two, shift = s->shift, zero = s->zero;
    const int start = (1 << (shift - 1)) - s->zero_one * a - s->zero_two * b;
    const int low = s->low - zero, high = s->high - zero;
    int i;
    for (i = 0; i < n; i++) {
        int v = (one[i] * a + two[i] * b + start) >> shift;
        v = v < low ? low : v;
        v = v > high ? high : v;
        out[i] = (int8_t)(v + zero);
    }
}

/* To the nearest integer, halves to the even one: the last place of 1.5 · 2^23 is 1, and limits are below 2^22. */
TARGET void NAME(nn_quantize_row)(const nn_grid *g, int n, const float *in, int8_t *out)
{
    const float inverse = g->inverse, least = (float)(g->low - g->zero), most = (float)(g->high - g->zero);
    const float big = 12582912.0f;
    const int zero = g->zero;
    int i;
    for (i = 0; i < n; i++) {
        float v = in[i] * inverse, moved;
        v = v < least ? least : v;
        v = v > most ? most : v;
        moved = v + big;
        out[i] = (int8_t)((int)(moved - big) + zero);
    }
}
