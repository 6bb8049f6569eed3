/* Layers of ±1 in plain C. Right everywhere; for Cortex-M and the like. */
#include "bits.h"
#include "bits_levels.h"
#include <string.h>

#define NAME(x) x##_plain
#define TARGET
#ifdef __GNUC__
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif
#define NOINLINE
#define LANES 1
#define PIXELS 1
#define VECTORS 32
#define FLUSH 0x7fffffff

typedef int32_t S;
typedef uint32_t W;
typedef uint32_t X;
typedef int32_t D;
typedef float F;

static INLINE S s_from(D d) { return d; }
static INLINE W w_load(const uint32_t *p) { return *p; }
static INLINE X x_all(uint32_t x) { return x; }
static INLINE S s_count(S s, X x, W w)
{
    uint32_t v = x ^ w;
    v -= v >> 1 & 0x55555555u;
    v = (v & 0x33333333u) + (v >> 2 & 0x33333333u);
    return s + (int32_t)(((v + (v >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24);
}
static INLINE D d_none(void) { return 0; }
static INLINE D d_all(int n) { return n; }
static INLINE D d_add(D d, S s)
{
    (void)d;
    return s;
}
static INLINE D d_load(const int32_t *p) { return *p; }
static INLINE D d_twice(D d) { return 2 * d; }
static INLINE D d_sub(D a, D b) { return a - b; }
static INLINE uint32_t d_bits(D d, D limit) { return d <= limit; }
static INLINE F f_of(D d) { return (float)d; }
static INLINE F f_load(const float *p) { return *p; }
static INLINE F f_some(const float *p, int n) { return n > 0 ? *p : 0.0f; }
static INLINE void f_store(float *p, F v) { *p = v; }
static INLINE void f_keep(float *p, F v, int n)
{
    if (n > 0)
        *p = v;
}
static INLINE F f_fma(F a, F b, F c) { return a * b + c; }
static INLINE F f_add(F a, F b) { return a + b; }
static INLINE F f_finish(const nn_conv *p, F v)
{
    v = v < v * p->slope ? v * p->slope : v;
    v = v < p->low ? p->low : v;
    return v > p->high ? p->high : v;
}

#define BIT_TILES BIT_TILE(1, 32) BIT_TILE(1, 16)
#define BIT_CHOOSE(count, vectors, arguments) \
    (void)count; \
    (vectors > 16 ? NAME(bit_tile_1_32) : NAME(bit_tile_1_16)) arguments;
#include "bits_conv.h"

/* One word of up to 32 channels. */
static INLINE uint32_t pack(const float *in, const float *threshold, int n)
{
    uint32_t bits = 0;
    int i;
    for (i = 0; i < 32 && i < n; i++)
        bits |= (uint32_t)(in[i] >= threshold[i]) << i;
    return bits;
}
#include "bits_pack.h"

#define UNIT 8
typedef uint64_t B;
static INLINE B b_load(const void *p)
{
    B v;
    memcpy(&v, p, UNIT);
    return v;
}
static INLINE void b_store(void *p, B v) { memcpy(p, &v, UNIT); }
static INLINE B b_none(void) { return 0; }
static INLINE B b_all(uint32_t x) { return (B)x << 32 | x; }
static INLINE B b_xor(B a, B b) { return a ^ b; }
static INLINE B b_and(B a, B b) { return a & b; }
static INLINE B b_odd(B a, B b, B c) { return b ^ c ^ a; }
static INLINE B b_most(B a, B b, B c) { return b ^ ((b ^ c) & (a ^ b)); } /* b where b and c agree, else a */
static INLINE B b_some(B a, B b, B c) { return ~b ^ ((b ^ c) & ~(a ^ b)); }
#define AGAIN(p) (p)
#include "bits_turn_plain.h"
#include "bits_turn_rows.h"
#include "bits_tree.h"
