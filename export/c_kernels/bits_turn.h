/* Transposition of 32 × 32 bits with AVX2: bit c of word p becomes bit p of word c. Words are `step` bytes apart in what is
 * read, `pitch` in what is written; of the former only `count` are there, zeros are behind them, of the latter `kept` are
 * written. */
TARGET static INLINE void NAME(turn32)(const void *in, int step, int count, unsigned char *to, ptrdiff_t pitch, int kept)
{
    const __m256i together = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9,
                                              13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), eight = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const char *from = in;
    __m256i v[4], w[4];
    int i, b;
    for (i = 0; i < 4; i++, from += 8 * (ptrdiff_t)step)
        if (count <= 8 * i)
            v[i] = _mm256_setzero_si256();
        else if (step == 4 && count >= 8 * i + 8)
            v[i] = _mm256_loadu_si256((const __m256i *)(const void *)from);
        else if (step == 8 && count >= 8 * i + 8) {
            const __m256 one = _mm256_loadu_ps((const float *)(const void *)from);
            const __m256 two = _mm256_loadu_ps((const float *)(const void *)(from + 28)); /* not beyond the last */
            v[i] = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(one, two, 0xd8)), 0xd8);
        } else {
            const __m256i places = _mm256_mullo_epi32(eight, _mm256_set1_epi32(step));
            const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(count - 8 * i), eight);
            v[i] = _mm256_mask_i32gather_epi32(_mm256_setzero_si256(), (const int *)(const void *)from, places, there, 1);
        }
    for (i = 0; i < 4; i++)
        v[i] = _mm256_shuffle_epi8(v[i], together);
    w[0] = _mm256_unpacklo_epi32(v[0], v[1]);
    w[1] = _mm256_unpacklo_epi32(v[2], v[3]);
    w[2] = _mm256_unpackhi_epi32(v[0], v[1]);
    w[3] = _mm256_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm256_unpacklo_epi64(w[0], w[1]);
    v[1] = _mm256_unpackhi_epi64(w[0], w[1]);
    v[2] = _mm256_unpacklo_epi64(w[2], w[3]);
    v[3] = _mm256_unpackhi_epi64(w[2], w[3]);
    for (i = 0; i < 4; i++) {
        __m256i bits = _mm256_permutevar8x32_epi32(v[i], order);
        for (b = 7; b >= 0; b--) {
            const uint32_t found = (uint32_t)_mm256_movemask_epi8(bits);
            if (8 * i + b < kept)
                memcpy(to + (8 * i + b) * pitch, &found, 4);
            bits = _mm256_add_epi8(bits, bits);
        }
    }
}
