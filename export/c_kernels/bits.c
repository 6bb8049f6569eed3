/* Which instruction set computes layers of ±1: chosen when compiled, on x86 among what the processor has. */
#include "bits.h"
#include "bits_levels.h"

#ifdef NN_X86
static int level(void)
{
    static int found = -1;
    if (found < 0) {
        int best = 0;
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
            best = 1;
        if (best && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512vpopcntdq"))
            best = 2;
        found = best < NN_LEVEL ? best : NN_LEVEL;
    }
    return found;
}
int nn_has_popcount(void) { return level() == 2; }
#define NN_CHOOSE(kernel, arguments) \
    const int here = level(); \
    if (here == 2) \
        kernel##_avx512 arguments; \
    else if (here) \
        kernel##_avx2 arguments; \
    else \
        kernel##_plain arguments;
#elif defined NN_NEON
int nn_has_popcount(void) { return 1; }
#define NN_CHOOSE(kernel, arguments) kernel##_neon arguments;
#else
int nn_has_popcount(void) { return 0; }
#define NN_CHOOSE(kernel, arguments) kernel##_plain arguments;
#endif

void nn_pack_bits(const nn_conv *p, const float *threshold, const uint32_t *turn, const float *in, uint32_t *out)
{
    NN_CHOOSE(nn_pack_bits, (p, threshold, turn, in, out))
}

void nn_conv_bits(const nn_conv *p, const nn_counts *q, const uint32_t *in, const uint32_t *weights, const float *add,
                  float *out)
{
    NN_CHOOSE(nn_xnor, (p, q, in, weights, add, out, NULL))
}

void nn_sign_bits(const nn_conv *p, const nn_counts *q, const uint32_t *in, const uint32_t *weights, uint32_t *out)
{
    NN_CHOOSE(nn_xnor, (p, q, in, weights, NULL, NULL, out))
}

void nn_tree_bits(const nn_conv *p, const nn_tree *t, const uint32_t *in, unsigned char *scratch, uint32_t *out)
{
#ifdef NN_X86
    if (level() == 2 && t->band * t->row_bytes <= 32) { /* vectors of AVX-512 would be half empty */
        nn_tree_bits_avx2(p, t, in, scratch, out);
        return;
    }
#endif
    NN_CHOOSE(nn_tree_bits, (p, t, in, scratch, out))
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
