/* Layers of ±1, each by the instruction set that computes it. */
#include "bits.h"
#include "bits_levels.h"

#define NN_AVX2_NEEDS (__builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
#define NN_AVX512_NEEDS (__builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("gfni"))
#include "choose.h"

#ifdef NN_X86
int nn_has_popcount(void) { return level() == 2; }
#elif defined NN_NEON
int nn_has_popcount(void) { return 1; }
#else
int nn_has_popcount(void) { return 0; }
#endif

void nn_pack_bits(const nn_conv *p, const float *threshold, const uint32_t *turn, const float *in, uint32_t *out)
{
    NN_CHOOSE(nn_pack_bits, 0, (p, threshold, turn, in, out))
}

void nn_conv_bits(const nn_conv *p, const nn_counts *q, const uint32_t *in, const uint32_t *weights, const float *add,
                  float *out)
{
    NN_CHOOSE(nn_xnor, 0, (p, q, in, weights, add, out, NULL))
}

void nn_sign_bits(const nn_conv *p, const nn_counts *q, const uint32_t *in, const uint32_t *weights, uint32_t *out)
{
    NN_CHOOSE(nn_xnor, 0, (p, q, in, weights, NULL, NULL, out))
}

void nn_tree_bits(const nn_conv *p, const nn_tree *t, const uint32_t *in, unsigned char *scratch, uint32_t *out)
{
    /* Vectors of AVX-512 would be half empty. */
    NN_CHOOSE(nn_tree_bits, t->band == 1 && p->height * t->row_bytes <= 32, (p, t, in, scratch, out))
}

void nn_signs_f32(const nn_walk *w, float reached, float below, const float *one, const float *two, float *out)
{
    ptrdiff_t a = 0, b = 0, c = 0;
    int at[NN_AXES] = {0}, axis;
    for (;;) {
        out[c] = one[a] >= two[b] ? reached : below;
        for (axis = NN_AXES - 1; axis >= 0; axis--) {
            a += w->one[axis];
            b += w->two[axis];
            c += w->out[axis];
            if (++at[axis] < w->size[axis])
                break;
            a -= (ptrdiff_t)w->size[axis] * w->one[axis];
            b -= (ptrdiff_t)w->size[axis] * w->two[axis];
            c -= (ptrdiff_t)w->size[axis] * w->out[axis];
            at[axis] = 0;
        }
        if (axis < 0)
            break;
    }
}
