/* A layer along a tree, in the words of one instruction set. Counts of many pixels stand in bits of vectors: bit b of all
 * their counts is one vector. B is a vector of UNIT bytes: b_load, b_store, b_none, b_all (a word repeated), b_xor, b_and,
 * b_odd (a ^ b ^ c), b_most (two of three), b_some (two of a, ~b, ~c).
 *
 * An output's count is its parent's, and twice its own matches at the places where they differ; how many these are is
 * in its limit. Turned bits: bits_turn32 is the transposition of 32 × 32 bits. */

#define DEEPEST 24

/* One more bit of a counter: the sum stays, what carries over is returned. Planes may count where they are 0. */
TARGET static INLINE B NAME(tree_pair)(B *sum, B x, B y, const int zeros)
{
    const B carry = zeros ? b_some(*sum, x, y) : b_most(*sum, x, y);
    *sum = b_odd(*sum, x, y);
    return carry;
}

TARGET static INLINE B NAME(tree_eight)(B *sum, const unsigned char *planes, ptrdiff_t row, const uint16_t *at,
                                        const int zeros)
{
    B two[4];
    int i;
    for (i = 0; i < 4; i++)
        two[i] = NAME(tree_pair)(sum, b_load(planes + row * at[2 * i]), b_load(planes + row * at[2 * i + 1]), zeros);
    two[0] = NAME(tree_pair)(sum + 1, two[0], two[1], 0);
    two[2] = NAME(tree_pair)(sum + 1, two[2], two[3], 0);
    return NAME(tree_pair)(sum + 2, two[0], two[2], 0);
}

/* A carry into the counter's bits from 16 on. */
TARGET static INLINE void NAME(tree_carry)(B *high, B carry, int top)
{
    int bit;
    for (bit = 0; bit < top; bit++) {
        const B next = b_and(high[bit], carry);
        high[bit] = b_xor(high[bit], carry);
        carry = next;
    }
}

/* Sixteen planes: `first` eight, then `second` eight, each where 1 or 0. */
TARGET static INLINE void NAME(tree_sixteen)(B *low, B *high, const unsigned char *planes, ptrdiff_t row,
                                             const uint16_t *at, int top, const int first, const int second)
{
    const B one = NAME(tree_eight)(low, planes, row, at, first);
    const B two = NAME(tree_eight)(low, planes, row, at + 8, second);
    NAME(tree_carry)(high, NAME(tree_pair)(low + 3, one, two, 0), top);
}

TARGET static INLINE void NAME(tree_half)(B *low, B *high, const unsigned char *planes, ptrdiff_t row, const uint16_t *at,
                                          int top, const int zeros)
{
    const B carry = NAME(tree_eight)(low, planes, row, at, zeros), next = b_and(low[3], carry);
    low[3] = b_xor(low[3], carry);
    NAME(tree_carry)(high, next, top);
}

/* The counter of one vector of pixels: four bits in registers, the rest in memory. */
typedef struct {
    B low[4];
    B high[DEEPEST];
} NAME(tree_sum);

#define SIXTEEN(first, second) \
    NAME(tree_sixteen)(low, one->high, planes, row, at, top, first, second); \
    if (vectors > 1) \
        NAME(tree_sixteen)(more, two->high, planes + UNIT, row, AGAIN(at), top, first, second); \
    at += 16;
#define HALF(zeros) \
    NAME(tree_half)(low, one->high, planes, row, at, top, zeros); \
    if (vectors > 1) \
        NAME(tree_half)(more, two->high, planes + UNIT, row, AGAIN(at), top, zeros); \
    at += 8;

/* Count planes: `ones` and `zeros` are how many there are, in eights. Returns where the next ones stand. */
TARGET static INLINE const uint16_t *NAME(tree_count)(NAME(tree_sum) *one, NAME(tree_sum) *two,
                                                      const unsigned char *planes, ptrdiff_t row, const uint16_t *at,
                                                      int ones, int zeros, int top, const int vectors)
{
    B low[4] = {b_none(), b_none(), b_none(), b_none()}, more[4] = {b_none(), b_none(), b_none(), b_none()};
    int b;
    for (; ones > 1; ones -= 2) {
        SIXTEEN(0, 0)
    }
    if (ones && zeros) {
        SIXTEEN(0, 1)
        ones--;
        zeros--;
    }
    for (; zeros > 1; zeros -= 2) {
        SIXTEEN(1, 1)
    }
    if (ones) {
        HALF(0)
    }
    if (zeros) {
        HALF(1)
    }
    for (b = 0; b < 4; b++) {
        one->low[b] = low[b];
        two->low[b] = more[b];
    }
    return at;
}
#undef SIXTEEN
#undef HALF

TARGET static INLINE void NAME(tree_start)(NAME(tree_sum) *sum, int top)
{
    int b;
    for (b = 0; b < top; b++)
        sum->high[b] = b_none();
}

/* The parent's count and twice the sum: kept where `own` is, and compared with the limit. */
TARGET static INLINE void NAME(tree_finish)(const nn_tree *t, const NAME(tree_sum) *sum, int top,
                                            const unsigned char *parent, unsigned char *own, const uint32_t *limit,
                                            uint32_t turn, unsigned char *found)
{
    B carry = b_none(), reached = b_all(0xffffffffu);
    int b;
    for (b = 0; b < t->counters; b++) {
        const int at = parent ? b - 1 : b;
        B bit = at < 0 ? b_none() : at < 4 ? sum->low[at] : at < 4 + top ? sum->high[at - 4] : b_none();
        if (parent) {
            const B old = b_load(parent + b * UNIT), more = bit;
            bit = b_odd(old, more, carry);
            carry = b_most(old, more, carry);
        }
        if (own)
            b_store(own + b * UNIT, bit);
        reached = b_most(reached, bit, b_all(limit[b]));
    }
    b_store(found, b_xor(reached, b_all(turn)));
}

/* Every output for one or two vectors of pixels. */
TARGET static INLINE void NAME(tree_walk)(const nn_tree *t, const unsigned char *planes, unsigned char *slots,
                                          unsigned char *found, const int vectors)
{
    const ptrdiff_t size = (ptrdiff_t)t->counters * UNIT;
    const int32_t *step = t->order;
    const uint16_t *at = t->places;
    const uint32_t *limit = t->limits;
    NAME(tree_sum) one, two;
    int i;
    for (i = 0; i < t->outputs; i++, step += 6, limit += t->counters) {
        const int top = step[5] < 4 ? 0 : step[5] - 4;
        const unsigned char *parent = step[1] < 0 ? NULL : slots + 2 * size * step[1];
        unsigned char *own = step[2] < 0 ? NULL : slots + 2 * size * step[2];
        unsigned char *to = found + (ptrdiff_t)step[0] * t->plane_bytes;
        NAME(tree_start)(&one, top);
        if (vectors > 1)
            NAME(tree_start)(&two, top);
        at = NAME(tree_count)(&one, &two, planes, t->row_bytes, at, step[3], step[4], top, vectors);
        NAME(tree_finish)(t, &one, top, parent, own, limit, t->turn[i], to);
        if (vectors > 1)
            NAME(tree_finish)(t, &two, top, parent ? parent + size : NULL, own ? own + size : NULL, limit, t->turn[i],
                              to + UNIT);
    }
}

/* Planes of every variant and channel, then one of zeros and one of ones. */
TARGET static void NAME(tree_planes)(const nn_conv *p, const nn_tree *t, const uint32_t *in, int height,
                                     unsigned char *planes)
{
    int v, w, r, x;
    for (v = 0; v < t->variants; v++)
        for (w = 0; w < t->words; w++, planes += 32 * (ptrdiff_t)t->plane_bytes)
            for (r = 0; r < height + t->beyond[v]; r++) {
                const uint32_t *from = in + t->starts[v] + w + (ptrdiff_t)r * t->step_row;
                for (x = 0; x < p->width; x += 32)
                    NAME(turn32)(from + (ptrdiff_t)x * t->step_pixel, 4 * t->step_pixel, p->width - x < 32 ? p->width - x : 32,
                                 planes + r * (ptrdiff_t)t->row_bytes + x / 8, t->plane_bytes, 32);
            }
    memset(planes, 0, (size_t)t->plane_bytes);
    memset(planes + t->plane_bytes, 255, (size_t)t->plane_bytes);
}

/* Bits of one output over pixels as bits of one pixel over outputs. */
TARGET static void NAME(tree_results)(const nn_conv *p, const nn_tree *t, const unsigned char *found, int height,
                                      uint32_t *out)
{
    int w, y, x;
    for (w = 0; w * 32 < t->outputs; w++, found += 32 * (ptrdiff_t)t->plane_bytes)
        for (y = 0; y < height; y++)
            for (x = 0; x < p->width; x += 32) {
                const int rows = t->outputs - 32 * w < 32 ? t->outputs - 32 * w : 32;
                const unsigned char *from = found + y * (ptrdiff_t)t->row_bytes + x / 8;
                uint32_t *to = out + (ptrdiff_t)y * p->out_row + (ptrdiff_t)x * p->out_pixel + w;
                NAME(turn32)(from, t->plane_bytes, rows, (unsigned char *)to, 4 * (ptrdiff_t)p->out_pixel,
                             p->width - x < 32 ? p->width - x : 32);
            }
}

/* Scratch: planes, results, counts of those outputs that have children. */
TARGET void NAME(nn_tree_bits)(const nn_conv *p, const nn_tree *t, const uint32_t *in, unsigned char *scratch,
                               uint32_t *out)
{
    unsigned char *const found = scratch + ((ptrdiff_t)t->variants * t->words * 32 + 2) * t->plane_bytes;
    unsigned char *const slots = found + (ptrdiff_t)t->outputs * t->plane_bytes;
    int n, y, at;
    for (n = 0; n < p->batch; n++)
        for (y = 0; y < p->height; y += t->band) {
            const int height = p->height - y < t->band ? p->height - y : t->band, bytes = height * t->row_bytes;
            const uint32_t *from = in + (ptrdiff_t)n * p->in_batch + (ptrdiff_t)y * t->step_row;
            NAME(tree_planes)(p, t, from, height, scratch);
            for (at = 0; at < bytes; at += 2 * UNIT)
                if (bytes - at > UNIT)
                    NAME(tree_walk)(t, scratch + at, slots, found + at, 2);
                else
                    NAME(tree_walk)(t, scratch + at, slots, found + at, 1);
            NAME(tree_results)(p, t, found, height, out + (ptrdiff_t)n * p->out_batch + (ptrdiff_t)y * p->out_row);
        }
}
