/* A layer along a tree, in the words of one instruction set. Counts of many pixels stand in bits of vectors: bit b of all
 * their counts is one vector. B is a vector of UNIT bytes: b_load, b_store, b_none, b_all (a word repeated), b_xor, b_and,
 * b_odd (a ^ b ^ c), b_most (two of three), b_some (two of a, ~b, ~c).
 *
 * An output's count is its parent's, and twice its own matches at the places where they differ; how many these are is
 * in its limit. Turned bits: bits_turn32 is the transposition of 32 × 32 bits. */

#define DEEPEST 24
#define UNITS(n) ((ptrdiff_t)(n) << 6)

/* One more bit of a counter: the sum stays, what carries over is returned. Planes may count where they are 0. */
TARGET static INLINE B NAME(tree_pair)(B *sum, B x, B y, const int zeros)
{
    const B carry = zeros ? b_some(*sum, x, y) : b_most(*sum, x, y);
    *sum = b_odd(*sum, x, y);
    return carry;
}

TARGET static INLINE B NAME(tree_eight)(B *sum, const unsigned char *planes, const uint16_t *at,
                                        const int zeros)
{
    B two[4];
    int i;
    for (i = 0; i < 4; i++)
        two[i] = NAME(tree_pair)(sum, b_load(planes + UNITS(at[2 * i])), b_load(planes + UNITS(at[2 * i + 1])), zeros);
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
TARGET static INLINE void NAME(tree_sixteen)(B *low, B *high, const unsigned char *planes,
                                             const uint16_t *at, int top, const int first, const int second)
{
    const B one = NAME(tree_eight)(low, planes, at, first);
    const B two = NAME(tree_eight)(low, planes, at + 8, second);
    NAME(tree_carry)(high, NAME(tree_pair)(low + 3, one, two, 0), top);
}

TARGET static INLINE void NAME(tree_half)(B *low, B *high, const unsigned char *planes, const uint16_t *at,
                                          int top, const int zeros)
{
    const B carry = NAME(tree_eight)(low, planes, at, zeros), next = b_and(low[3], carry);
    low[3] = b_xor(low[3], carry);
    NAME(tree_carry)(high, next, top);
}

/* The counter of one vector of pixels: four bits in registers, the rest in memory. */
typedef struct {
    B low[4];
    B high[DEEPEST];
} NAME(tree_sum);

#define SIXTEEN(first, second) \
    NAME(tree_sixteen)(low, one->high, planes, at, top, first, second); \
    if (vectors > 1) \
        NAME(tree_sixteen)(more, two->high, planes + UNIT, AGAIN(at), top, first, second); \
    at += 16;
#define HALF(zeros) \
    NAME(tree_half)(low, one->high, planes, at, top, zeros); \
    if (vectors > 1) \
        NAME(tree_half)(more, two->high, planes + UNIT, AGAIN(at), top, zeros); \
    at += 8;

/* Count planes: `ones` and `zeros` are how many there are, in eights. Returns where the next ones stand. */
TARGET static INLINE const uint16_t *NAME(tree_count)(NAME(tree_sum) *one, NAME(tree_sum) *two,
                                                      const unsigned char *planes, const uint16_t *at,
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
        unsigned char *to = found + UNITS(step[0] * t->band);
        NAME(tree_start)(&one, top);
        if (vectors > 1)
            NAME(tree_start)(&two, top);
        at = NAME(tree_count)(&one, &two, planes, at, step[3], step[4], top, vectors);
        NAME(tree_finish)(t, &one, top, parent, own, limit, t->turn[i], to);
        if (vectors > 1)
            NAME(tree_finish)(t, &two, top, parent ? parent + size : NULL, own ? own + size : NULL, limit, t->turn[i],
                              to + UNIT);
    }
}

/* Every output for all pixels of some units. Vectors that are narrower than a unit go through its first `bytes`. */
TARGET static void NAME(tree_units)(const nn_tree *t, const unsigned char *planes, unsigned char *slots,
                                    unsigned char *found, int units, int bytes)
{
    int v, at;
    for (v = 0; v < units; v += UNIT == 64 ? 2 : 1)
        for (at = 0; at < bytes; at += 2 * UNIT)
            if (UNIT == 64 ? v + 1 < units : at + UNIT < bytes)
                NAME(tree_walk)(t, planes + UNITS(v) + at, slots, found + UNITS(v) + at, 2);
            else
                NAME(tree_walk)(t, planes + UNITS(v) + at, slots, found + UNITS(v) + at, 1);
}

/* One unit of 32 planes: the rows of the image from `first` on. From the unit that is `units` before it, it differs by a row:
 * where whole units are not turned at once, the other rows are copied. */
TARGET static INLINE void NAME(tree_unit)(const nn_tree *t, const uint32_t *in, int first, int height, int width, int units,
                                          unsigned char *planes)
{
    const ptrdiff_t plane = UNITS(t->units), row = (ptrdiff_t)units * t->step_row;
    const int there = first < height ? (height - first + units - 1) / units : 0, rows = there < t->rows ? there : t->rows;
    int start = 0, i;
    unsigned char kept[64];
    if (UNIT < 64 && first >= units)
        for (start = t->rows - 1, i = 0; i < 32; i++) {
            memcpy(kept, planes + i * plane + UNITS(first - units) + t->row_bytes, 64);
            memcpy(planes + i * plane + UNITS(first), kept, 64);
        }
    NAME(turn_in)(in + (ptrdiff_t)first * t->step_row + start * row, row, t->step_pixel, rows - start, width, t->row_bytes,
                  planes + UNITS(first) + start * t->row_bytes, plane);
}

/* Planes of every variant and channel, then one of zeros and one of ones. */
TARGET static void NAME(tree_planes)(const nn_tree *t, const uint32_t *in, int width, int height, int units,
                                     unsigned char *planes)
{
    const ptrdiff_t plane = UNITS(t->units);
    int v, w, first;
    for (v = 0; v < t->variants; v++)
        for (w = 0; w < t->words; w++, planes += 32 * plane)
            for (first = 0; first < units + t->beyond[v]; first++)
                NAME(tree_unit)(t, in + t->starts[v] + w, first, height + t->beyond[v], width, units, planes);
    memset(planes, 0, (size_t)plane);
    memset(planes + plane, 255, (size_t)plane);
}

/* Bits of one output over pixels as bits of one pixel over outputs. */
TARGET static void NAME(tree_results)(const nn_conv *p, const nn_tree *t, const unsigned char *found, int width, int height,
                                      int units, uint32_t *out)
{
    int w, v;
    for (w = 0; w * 32 < t->outputs; w++, found += 32 * UNITS(t->band))
        for (v = 0; v < units && v < height; v++)
            NAME(turn_out)(found + UNITS(v), UNITS(t->band), t->outputs - 32 * w < 32 ? t->outputs - 32 * w : 32,
                           out + w + (ptrdiff_t)v * p->out_row, (ptrdiff_t)units * p->out_row, p->out_pixel,
                           (height - v + units - 1) / units, width, t->row_bytes);
}

/* Scratch: planes, results, counts of those outputs that have children. */
TARGET void NAME(nn_tree_bits)(const nn_conv *p, const nn_tree *t, const uint32_t *in, unsigned char *scratch,
                               uint32_t *out)
{
    unsigned char *const found = scratch + UNITS(((ptrdiff_t)t->variants * t->words * 32 + 2) * t->units);
    unsigned char *const slots = found + UNITS((ptrdiff_t)t->outputs * t->band);
    const int deep = t->band * t->rows;
    int n, y, x;
    for (n = 0; n < p->batch; n++)
        for (y = 0; y < p->height; y += deep)
            for (x = 0; x < p->width; x += t->tile) {
                const int height = p->height - y < deep ? p->height - y : deep, units = (height + t->rows - 1) / t->rows;
                const int width = p->width - x < t->tile ? p->width - x : t->tile;
                const ptrdiff_t from = (ptrdiff_t)y * t->step_row + (ptrdiff_t)x * t->step_pixel;
                const ptrdiff_t to = (ptrdiff_t)y * p->out_row + (ptrdiff_t)x * p->out_pixel;
                NAME(tree_planes)(t, in + (ptrdiff_t)n * p->in_batch + from, width, height, units, scratch);
                NAME(tree_units)(t, scratch, slots, found, units, (height + units - 1) / units * t->row_bytes);
                NAME(tree_results)(p, t, found, width, height, units, out + (ptrdiff_t)n * p->out_batch + to);
            }
}
