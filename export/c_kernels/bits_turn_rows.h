/* Rows of pixels as rows of bits and back, 32 × 32 at a time.
 * turn_in: bit c of the word of pixel x in row i becomes bit x of row i in plane c; rows are `row`, pixels `step` words apart,
 * planes `plane` bytes. turn_out is the way back, of `planes` planes. */
TARGET static void NAME(turn_in)(const uint32_t *in, ptrdiff_t row, int step, int rows, int width, int row_bytes,
                                 unsigned char *to, ptrdiff_t plane)
{
    int i, x;
    for (i = 0; i < rows; i++)
        for (x = 0; x < width; x += 32)
            NAME(turn32)(in + i * row + (ptrdiff_t)x * step, 4 * step, width - x < 32 ? width - x : 32,
                         to + i * row_bytes + x / 8, plane, 32);
}

TARGET static void NAME(turn_out)(const unsigned char *from, ptrdiff_t plane, int planes, uint32_t *out, ptrdiff_t row,
                                  int step, int rows, int width, int row_bytes)
{
    int i, x;
    for (i = 0; i < rows; i++)
        for (x = 0; x < width; x += 32)
            NAME(turn32)(from + i * row_bytes + x / 8, (int)plane, planes,
                         (unsigned char *)(out + i * row + (ptrdiff_t)x * step), 4 * (ptrdiff_t)step,
                         width - x < 32 ? width - x : 32);
}
