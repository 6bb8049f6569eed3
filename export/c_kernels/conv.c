/* Which instruction set computes: chosen when compiled, on x86 among what the processor has. */
#include "nn.h"
#include "levels.h"

#ifdef NN_X86
static int level(void)
{
    static int found = -1;
    if (found < 0) {
        int best = 0;
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
            best = 1;
        if (best && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512vnni"))
            best = 2;
        found = best < NN_LEVEL ? best : NN_LEVEL;
    }
    return found;
}
/* Eight outputs do not fill vectors of sixteen. */
#define NN_CHOOSE(kernel, narrow, arguments) \
    const int here = level(); \
    if (here == 2 && !(narrow)) \
        kernel##_avx512 arguments; \
    else if (here) \
        kernel##_avx2 arguments; \
    else \
        kernel##_plain arguments;
#elif defined NN_NEON
#define NN_CHOOSE(kernel, narrow, arguments) \
    (void)(narrow); \
    kernel##_neon arguments;
#else
#define NN_CHOOSE(kernel, narrow, arguments) \
    (void)(narrow); \
    kernel##_plain arguments;
#endif

void nn_conv_f32(const nn_conv *p, const float *in, const float *weights, const float *bias, const float *add,
                 float *out)
{
    NN_CHOOSE(nn_conv, p->block < 16, (p, in, weights, bias, add, out))
}

void nn_depthwise_f32(const nn_conv *p, const float *in, const float *weights, const float *bias, const float *add,
                      float *out)
{
    NN_CHOOSE(nn_depthwise, p->groups % 16 == 8, (p, in, weights, bias, add, out))
}

void nn_conv_s8(const nn_conv *p, const nn_requantize *q, const int8_t *in, const int8_t *weights, int8_t *out)
{
    NN_CHOOSE(nn_integer_conv, p->block < 16, (p, q, in, weights, out))
}

void nn_depthwise_s8(const nn_conv *p, const nn_requantize *q, const int8_t *in, const int8_t *weights, int8_t *out)
{
    NN_CHOOSE(nn_integer_depthwise, p->groups % 16 == 8, (p, q, in, weights, out))
}

void nn_sum_row(const nn_sum *s, int n, const int8_t *one, const int8_t *two, int8_t *out)
{
    NN_CHOOSE(nn_sum_row, 0, (s, n, one, two, out))
}

void nn_quantize_row(const nn_grid *g, int n, const float *in, int8_t *out)
{
    NN_CHOOSE(nn_quantize_row, 0, (g, n, in, out))
}
