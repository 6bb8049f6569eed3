/* A row of sums of two integers; compilers use the vectors of the instruction set. */

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
