/* edgepack::BinaryConv (core/operators.py) for ONNX Runtime: floats to bits, XNOR and popcount, whole numbers as floats. */
#include "bits.h"
#include "ort.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 16

static const char *const NAMES[] = {"inputs", "outputs", "groups", "rows", "columns", "stride_row", "stride_column",
    "dilation_row", "dilation_column", "top", "left", "bottom", "right", "zeros"};
enum { ATTRIBUTES = sizeof NAMES / sizeof *NAMES, COUNTS = 9, MOST = 1 << 16 }; /* the first are at least 1 */

typedef struct {
    const table *api;
    union {
        int64_t all[ATTRIBUTES];
        struct {
            int64_t inputs, outputs, groups, rows, columns, stride_row, stride_column, dilation_row, dilation_column, top, left,
                bottom, right, zeros;
        } is;
    } of;
} layer;

/* One call: sizes, and memory for bits between their padding, a row of results, weights' sums and scales. */
typedef struct {
    int64_t batch, height, width, out_height, out_width;
    int words, padded;       /* of a group: words of a pixel; outputs in whole blocks */
    ptrdiff_t pixel, row;    /* words */
    uint32_t *bits;
    float *results, *sums, *ones, *none;
} work;

/* Bits of one word of channels of one row of pixels. */
#define PACK_BODY \
    int64_t x; \
    int i; \
    for (i = 0; i < channels; i++) { \
        const float *from = in + i * plane, limit = threshold[i]; \
        for (x = 0; x < width; x++) \
            out[x] |= (uint32_t)(from[x] >= limit) << i; \
    }
static void pack_any(const float *in, int64_t plane, const float *threshold, int channels, int64_t width, uint32_t *restrict out)
{
    PACK_BODY
}
#if defined __GNUC__ && defined __x86_64__
__attribute__((target("avx2"))) static void pack_avx2(const float *in, int64_t plane, const float *threshold, int channels,
                                                      int64_t width, uint32_t *restrict out)
{
    PACK_BODY
}
#define PACK (__builtin_cpu_supports("avx2") ? pack_avx2 : pack_any)
#else
#define PACK pack_any
#endif

static int least(int64_t a, int64_t b) { return (int)(a < b ? a : b); }

static void pack_image(const layer *l, const work *w, const float *in, const float *threshold, uint32_t *line)
{
    const int64_t each = l->of.is.inputs / l->of.is.groups, plane = w->height * w->width;
    int64_t y, x, g;
    int k;
    memset(w->bits, 0, sizeof *w->bits * (size_t)(w->row * (w->height + l->of.is.top + l->of.is.bottom)));
    for (y = 0; y < w->height; y++)
        for (g = 0; g < l->of.is.groups; g++)
            for (k = 0; k < w->words; k++) {
                const int64_t channel = g * each + 32 * k;
                uint32_t *to = w->bits + (y + l->of.is.top) * w->row + l->of.is.left * w->pixel + g * w->words + k;
                memset(line, 0, sizeof *line * (size_t)w->width);
                PACK(in + channel * plane + y * w->width, plane, threshold + channel, least(32, each - 32 * k), w->width, line);
                for (x = 0; x < w->width; x++)
                    to[x * w->pixel] = line[x];
            }
}

static int ones_of(uint32_t v)
{
    v -= v >> 1 & 0x55555555u;
    v = (v & 0x33333333u) + (v >> 2 & 0x33333333u);
    return (int)(((v + (v >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24);
}

/* Sums of the weights of each place of the kernel: what is subtracted where the padding counts as −1. */
static void sum_weights(const layer *l, const work *w, const uint32_t *weights)
{
    const int64_t taps = l->of.is.rows * l->of.is.columns, each = l->of.is.outputs / l->of.is.groups;
    int64_t g, o, t;
    int k;
    for (g = 0; g < l->of.is.groups; g++)
        for (o = 0; o < each; o++)
            for (t = 0; t < taps; t++) {
                const uint32_t *from = weights + ((g * w->padded + o / BLOCK * BLOCK) * taps + t * BLOCK) * w->words + o % BLOCK;
                int found = 0;
                for (k = 0; k < w->words; k++)
                    found += ones_of(from[k * BLOCK]);
                w->sums[t * l->of.is.outputs + g * each + o] = (float)(2 * found - (int)(l->of.is.inputs / l->of.is.groups));
            }
}

static int outside(int64_t at, int64_t size) { return at < 0 || at >= size; }

/* Padding with 0 in one row of results. */
static void add_around(const layer *l, const work *w, int64_t y)
{
    int64_t x, r, c, o;
    for (x = 0; x < w->out_width; x++)
        for (r = 0; r < l->of.is.rows; r++)
            for (c = 0; c < l->of.is.columns; c++) {
                const float *sums = w->sums + (r * l->of.is.columns + c) * l->of.is.outputs;
                if (!outside(y * l->of.is.stride_row + r * l->of.is.dilation_row - l->of.is.top, w->height) &&
                    !outside(x * l->of.is.stride_column + c * l->of.is.dilation_column - l->of.is.left, w->width))
                    continue;
                for (o = 0; o < l->of.is.outputs; o++)
                    w->results[x * l->of.is.outputs + o] += sums[o];
            }
}

static void convolve(const layer *l, const work *w, const uint32_t *weights, float *out)
{
    const int64_t each = l->of.is.outputs / l->of.is.groups, outputs = l->of.is.outputs;
    const int together = l->of.is.groups == 1 && l->of.is.dilation_column == 1;
    nn_conv p;
    nn_counts q;
    int64_t y, x, o;
    memset(&p, 0, sizeof p);
    memset(&q, 0, sizeof q);
    p.batch = p.height = 1;
    p.width = (int)w->out_width;
    p.groups = (int)l->of.is.groups;
    p.inputs = w->words;
    p.outputs = (int)each;
    p.rows = (int)l->of.is.rows;
    p.columns = together ? 1 : (int)l->of.is.columns;
    p.length = together ? (int)l->of.is.columns * w->words : w->words;
    p.in_pixel = (int)(l->of.is.stride_column * w->pixel);
    p.tap_row = (int)(l->of.is.dilation_row * w->row);
    p.tap_column = (int)(l->of.is.dilation_column * w->pixel);
    p.out_pixel = (int)outputs;
    p.block = BLOCK;
    p.slope = 1.0f;
    p.low = -INFINITY;
    p.high = INFINITY;
    q.scale = w->ones;
    q.shift = w->none;
    q.places = (int)(l->of.is.inputs / l->of.is.groups * l->of.is.rows * l->of.is.columns);
    for (y = 0; y < w->out_height; y++) {
        nn_conv_bits(&p, &q, w->bits + y * l->of.is.stride_row * w->row, weights, NULL, w->results);
        if (l->of.is.zeros)
            add_around(l, w, y);
        for (o = 0; o < outputs; o++)
            for (x = 0; x < w->out_width; x++)
                out[(o * w->out_height + y) * w->out_width + x] = w->results[x * outputs + o];
    }
}

/* Sizes of the result, and how much memory is needed. */
static status *plan(const layer *l, work *w, const int64_t *dims, size_t rank, size_t *bytes)
{
    const int64_t deep = l->of.is.dilation_row * (l->of.is.rows - 1), wide = l->of.is.dilation_column * (l->of.is.columns - 1);
    const int64_t rows = dims[2] + l->of.is.top + l->of.is.bottom, columns = dims[3] + l->of.is.left + l->of.is.right;
    const int64_t groups = l->of.is.groups;
    char text[160];
    if (rank < 2 || rank > 4 || dims[1] != l->of.is.inputs || rows <= deep || columns <= wide) {
        snprintf(text, sizeof text, "BinaryConv reads %d channels and at least %d x %d pixels, not %d and %d x %d",
                 (int)l->of.is.inputs, (int)(deep + 1 - l->of.is.top - l->of.is.bottom),
                 (int)(wide + 1 - l->of.is.left - l->of.is.right), (int)dims[1], (int)dims[2], (int)dims[3]);
        return CREATE_STATUS(l->api)(INVALID_ARGUMENT, text);
    }
    w->batch = dims[0];
    w->height = dims[2];
    w->width = dims[3];
    w->out_height = (rows - deep - 1) / l->of.is.stride_row + 1;
    w->out_width = (columns - wide - 1) / l->of.is.stride_column + 1;
    w->words = (int)((l->of.is.inputs / groups + 31) / 32);
    w->padded = (int)((l->of.is.outputs / groups + BLOCK - 1) / BLOCK * BLOCK);
    w->pixel = groups * w->words;
    w->row = columns * w->pixel;
    *bytes = 4 * (size_t)(rows * w->row + w->width + w->out_width * l->of.is.outputs + 2 * groups * w->padded +
                          l->of.is.rows * l->of.is.columns * l->of.is.outputs + 64);
    return NULL;
}

static status *compute_images(const layer *l, work *w, const float *in, const float *threshold, const uint32_t *weights,
                              float *out, size_t bytes)
{
    uint32_t *const memory = malloc(bytes), *line;
    int64_t n, i;
    if (!memory)
        return CREATE_STATUS(l->api)(FAIL, "BinaryConv has too little memory");
    w->bits = memory;
    line = memory + w->row * (w->height + l->of.is.top + l->of.is.bottom) + 16; /* kernels read whole vectors */
    w->results = (float *)line + w->width;
    w->sums = w->results + w->out_width * l->of.is.outputs;
    w->ones = w->sums + l->of.is.rows * l->of.is.columns * l->of.is.outputs;
    w->none = w->ones + l->of.is.groups * w->padded;
    for (i = 0; i < l->of.is.groups * w->padded; i++) {
        w->ones[i] = 1.0f;
        w->none[i] = 0.0f;
    }
    if (l->of.is.zeros)
        sum_weights(l, w, weights);
    for (n = 0; n < w->batch; n++) {
        pack_image(l, w, in + n * l->of.is.inputs * w->height * w->width, threshold, line);
        convolve(l, w, weights, out + n * l->of.is.outputs * w->out_height * w->out_width);
    }
    free(memory);
    return NULL;
}

/* A constant must have the size that the attributes speak of. */
static status *holds(const layer *l, const value *v, int64_t wanted)
{
    size_t found = 0;
    shape *sizes;
    status *failed;
    TRY(SHAPE(l->api)(v, &sizes));
    failed = ELEMENTS(l->api)(sizes, &found);
    RELEASE_SHAPE(l->api)(sizes);
    if (!failed && found != (size_t)wanted)
        failed = CREATE_STATUS(l->api)(INVALID_ARGUMENT, "BinaryConv has a threshold or weights of another size");
    return failed;
}

static status *compute(void *kernel, void *context)
{
    const layer *l = kernel;
    const value *values[3];
    void *data[3], *made;
    int64_t dims[4] = {1, 1, 1, 1};
    size_t rank = 0, bytes = 0;
    shape *sizes;
    value *result;
    status *failed;
    work w;
    int i;
    memset(&w, 0, sizeof w);
    for (i = 0; i < 3; i++) {
        TRY(INPUT(l->api)(context, (size_t)i, values + i));
        TRY(DATA(l->api)(values[i], data + i));
    }
    TRY(SHAPE(l->api)(values[0], &sizes));
    failed = RANK(l->api)(sizes, &rank);
    if (!failed && rank <= 4)
        failed = DIMENSIONS(l->api)(sizes, dims, rank);
    RELEASE_SHAPE(l->api)(sizes);
    TRY(failed);
    if (rank == 3) { /* a row of pixels */
        dims[3] = dims[2];
        dims[2] = 1;
    }
    TRY(plan(l, &w, dims, rank, &bytes));
    TRY(holds(l, values[1], l->of.is.inputs));
    TRY(holds(l, values[2], l->of.is.groups * w.padded * l->of.is.rows * l->of.is.columns * w.words));
    dims[1] = l->of.is.outputs;
    dims[2] = rank == 3 ? w.out_width : w.out_height;
    dims[3] = w.out_width;
    TRY(OUTPUT(l->api)(context, 0, dims, rank, &result));
    TRY(DATA(l->api)(result, &made));
    return compute_images(l, &w, data[0], data[1], data[2], made, bytes);
}

static status *create(const void *op, const table *api, const void *info, void **kernel)
{
    layer *l = malloc(sizeof *l);
    int i;
    (void)op;
    if (!l)
        return CREATE_STATUS(api)(FAIL, "BinaryConv has too little memory");
    l->api = api;
    for (i = 0; i < ATTRIBUTES; i++) {
        status *failed = ATTRIBUTE(api)(info, NAMES[i], l->of.all + i);
        const int64_t found = failed ? 0 : l->of.all[i];
        if (!failed && (found < (i < COUNTS ? 1 : 0) || found > MOST))
            failed = CREATE_STATUS(api)(INVALID_ARGUMENT, "BinaryConv has an attribute out of range");
        if (failed) {
            free(l);
            return failed;
        }
    }
    if (l->of.is.inputs % l->of.is.groups || l->of.is.outputs % l->of.is.groups) {
        free(l);
        return CREATE_STATUS(api)(INVALID_ARGUMENT, "BinaryConv has groups of different sizes");
    }
    *kernel = l;
    return NULL;
}

static const char *name(const void *op)
{
    (void)op;
    return "BinaryConv";
}
static const char *provider(const void *op)
{
    (void)op;
    return NULL; /* the CPU's */
}
static int input_type(const void *op, size_t index)
{
    (void)op;
    return index == 2 ? UINT32 : FLOAT;
}
static int output_type(const void *op, size_t index)
{
    (void)op;
    (void)index;
    return FLOAT;
}
static size_t three(const void *op)
{
    (void)op;
    return 3;
}
static size_t one(const void *op)
{
    (void)op;
    return 1;
}
static int zero(const void *op, size_t index)
{
    (void)op;
    (void)index;
    return 0; /* required; in the provider's memory */
}
static int none(const void *op)
{
    (void)op;
    return 0;
}

static const custom_op BINARY_CONV = {VERSION, NULL, name, provider, input_type, three, output_type, one, NULL, free, zero,
    zero, zero, none, none, none, none, create, compute, {NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL}};

/* What ONNX Runtime calls when it loads the library. */
status *RegisterCustomOps(void *options, const base *from);
status *RegisterCustomOps(void *options, const base *from)
{
    static void *domain;
    const table *api = from->get(VERSION);
    if (!api) /* an engine before 1.16, which then does not know the operator */
        return NULL;
    if (!domain) {
        TRY(CREATE_DOMAIN(api)("edgepack", &domain));
        TRY(DOMAIN_ADD(api)(domain, &BINARY_CONV));
    }
    return ADD_DOMAIN(api)(options, domain);
}
