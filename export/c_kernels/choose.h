/* Which instruction set computes: chosen when compiled, on x86 among what the processor has. */
#ifndef NN_CHOOSE_H
#define NN_CHOOSE_H

#include "nn.h"

#ifdef NN_X86
/* What kernels need beside the vectors; those of integers unless a file says otherwise. */
#ifndef NN_AVX2_NEEDS
#define NN_AVX2_NEEDS __builtin_cpu_supports("fma")
#define NN_AVX512_NEEDS __builtin_cpu_supports("avx512vnni")
#endif
static int level(void)
{
    static int found = -1;
    if (found < 0) {
        int best = 0;
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx2") && NN_AVX2_NEEDS)
            best = 1;
        if (best && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && NN_AVX512_NEEDS)
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

#endif
