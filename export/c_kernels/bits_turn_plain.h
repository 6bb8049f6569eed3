/* Transposition of 32 × 32 bits in plain C (Hacker's Delight, 7-3): as bits_turn.h has it. */
static INLINE void NAME(turn32)(const void *in, int step, int count, unsigned char *to, ptrdiff_t pitch, int kept)
{
    uint32_t m[32], mask = 0x0000ffffu;
    int i, j;
    for (i = 0; i < 32; i++)
        if (i < count)
            memcpy(m + i, (const char *)in + i * (ptrdiff_t)step, 4);
        else
            m[i] = 0;
    for (j = 16; j; j >>= 1, mask ^= mask << j)
        for (i = 0; i < 32; i = ((i | j) + 1) & ~j) {
            const uint32_t apart = ((m[i] >> j) ^ m[i | j]) & mask;
            m[i] ^= apart << j;
            m[i | j] ^= apart;
        }
    for (i = 0; i < kept; i++)
        memcpy(to + i * pitch, m + i, 4);
}
