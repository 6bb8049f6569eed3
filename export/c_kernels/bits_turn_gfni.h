/* Rows of pixels as rows of bits and back, as bits_turn_rows.h has it, 512 × 32 at a time with GFNI.
 * Pixels need not stay in their order within a unit, for turn_out undoes what turn_in did. */

/* What 8 × 8 bits are multiplied with to be transposed: the order of bits is reversed, and once more. */
#define INTO (long long)0x8040201008040201ull
#define BACK 0x0102040810204080ll

/* Eight pixels, of which n are there; the others are 0. */
TARGET static INLINE __m256i eight_load(const uint32_t *in, int step, int n)
{
    const uint32_t words = (uint32_t)(step * (n - 1) + 1), all = 0xffffffffu >> (32 - words % 32) % 32;
    if (step == 1)
        return _mm256_maskz_loadu_epi32((__mmask8)all, in);
    if (step == 2)
        return _mm512_cvtepi64_epi32(_mm512_maskz_loadu_epi32((__mmask16)all, in));
    if (step == 4) {
        const __m512i fours = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 0, 0, 0, 0, 0, 0, 0);
        const __m512i low = _mm512_maskz_loadu_epi32((__mmask16)all, in);
        const __m512i high = _mm512_maskz_loadu_epi32((__mmask16)(all >> 16), in + 16);
        return _mm512_castsi512_si256(_mm512_permutex2var_epi32(low, fours, high));
    } else {
        uint32_t found[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        int i;
        for (i = 0; i < n; i++)
            found[i] = in[i * (ptrdiff_t)step];
        return _mm256_loadu_si256((const __m256i *)(const void *)found);
    }
}

TARGET static INLINE void eight_store(uint32_t *out, int step, int n, const uint32_t *from)
{
    const __m256i found = _mm256_loadu_si256((const __m256i *)(const void *)from);
    int i;
    if (step == 1)
        _mm256_mask_storeu_epi32(out, (__mmask8)(0xff >> (8 - n)), found);
    else if (step == 2)
        _mm512_mask_storeu_epi32(out, (__mmask16)(0x5555 >> (16 - 2 * n)), _mm512_cvtepu32_epi64(found));
    else
        for (i = 0; i < n; i++)
            out[i * (ptrdiff_t)step] = from[i];
}

/* Bytes of words: four vectors of sixteen words become the first, second, third and last bytes of all; and back. */
TARGET static INLINE void fours_turn(__m512i *v)
{
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm512_unpacklo_epi64(a, c);
    v[1] = _mm512_unpackhi_epi64(a, c);
    v[2] = _mm512_unpacklo_epi64(b, d);
    v[3] = _mm512_unpackhi_epi64(b, d);
}

TARGET static INLINE __m512i four_bytes(__m512i v)
{
    return _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
}

/* Two bytes of eight: those of x whose number has `apart`, and those of y that have not, change places. */
TARGET static INLINE void bytes_swap(__m512i *x, __m512i *y, const int apart, __mmask64 odd)
{
    const __m512i zeros = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    const __m512i other = _mm512_xor_si512(zeros, _mm512_set1_epi8((char)apart)), one = *x;
    *x = _mm512_mask_shuffle_epi8(one, odd, *y, other);
    *y = _mm512_mask_shuffle_epi8(*y, ~odd, one, other);
}

/* Byte i of every eight in vector j becomes byte j in vector i. */
TARGET static INLINE void bytes_turn(__m512i *v)
{
    int i;
    for (i = 0; i < 8; i += 2)
        bytes_swap(v + i, v + i + 1, 1, 0xaaaaaaaaaaaaaaaaull);
    for (i = 0; i < 8; i++)
        if (!(i & 2))
            bytes_swap(v + i, v + i + 2, 2, 0xccccccccccccccccull);
    for (i = 0; i < 4; i++)
        bytes_swap(v + i, v + i + 4, 4, 0xf0f0f0f0f0f0f0f0ull);
}

TARGET static NOINLINE void NAME(turn_in)(const uint32_t *in, ptrdiff_t row, int step, int rows, int width,
                                          int row_bytes, unsigned char *to, ptrdiff_t plane)
{
    const __m512i into = _mm512_set1_epi64(INTO);
    uint32_t block[64 * 8];
    __m512i bytes[4][8], v[8];
    int i, j, x, at = 0;
    for (i = 0; i < rows; i++)
        for (x = 0; x < width; x += 8, at += 8)
            _mm256_storeu_si256((__m256i *)(void *)(block + at),
                                eight_load(in + i * row + (ptrdiff_t)x * step, step, width - x < 8 ? width - x : 8));
    (void)row_bytes;
    for (; at < 64 * 8; at += 8)
        _mm256_storeu_si256((__m256i *)(void *)(block + at), _mm256_setzero_si256());
    for (i = 0; i < 8; i++) {
        for (j = 0; j < 4; j++)
            v[j] = four_bytes(_mm512_loadu_si512(block + 64 * i + 16 * j));
        fours_turn(v);
        for (j = 0; j < 4; j++)
            bytes[j][i] = _mm512_gf2p8affine_epi64_epi8(into, v[j], 0);
    }
    for (i = 0; i < 4; i++) {
        for (j = 0; j < 8; j++)
            v[j] = bytes[i][j];
        bytes_turn(v);
        for (j = 0; j < 8; j++)
            _mm512_storeu_si512(to + (8 * i + j) * plane, v[j]);
    }
}

TARGET static NOINLINE void NAME(turn_out)(const unsigned char *from, ptrdiff_t plane, int planes, uint32_t *out,
                                           ptrdiff_t row, int step, int rows, int width, int row_bytes)
{
    const __m512i back = _mm512_set1_epi64(BACK);
    uint32_t block[64 * 8];
    __m512i bytes[4][8], v[8];
    int i, j, x, at = 0;
    for (i = 0; i < 4; i++) {
        for (j = 0; j < 8; j++) {
            const int channel = 8 * i + 7 - j;
            v[j] = channel < planes ? _mm512_loadu_si512(from + channel * plane) : _mm512_setzero_si512();
        }
        bytes_turn(v);
        for (j = 0; j < 8; j++)
            bytes[i][j] = _mm512_gf2p8affine_epi64_epi8(back, v[j], 0);
    }
    for (i = 0; i < 8; i++) {
        for (j = 0; j < 4; j++)
            v[j] = bytes[j][i];
        fours_turn(v);
        for (j = 0; j < 4; j++)
            _mm512_storeu_si512(block + 64 * i + 16 * j, four_bytes(v[j]));
    }
    (void)row_bytes;
    for (i = 0; i < rows; i++)
        for (x = 0; x < width; x += 8, at += 8)
            eight_store(out + i * row + (ptrdiff_t)x * step, step, width - x < 8 ? width - x : 8, block + at);
}
#undef INTO
#undef BACK
