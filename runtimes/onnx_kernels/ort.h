/* What is used of ONNX Runtime's C interface, declared here because its packages carry no headers.
 *
 * The interface is a table of functions that only grows at its end, and OrtCustomOp a structure of functions with a version,
 * of which it reads no more than the version has. Places and signatures are those of
 * include/onnxruntime/core/session/onnxruntime_c_api.h: of its version 1 for the table, of 16 for the structure. */
#ifndef NN_ORT_H
#define NN_ORT_H

#include <stddef.h>
#include <stdint.h>

#define VERSION 16

typedef struct status status;
typedef struct value value;
typedef struct shape shape;
typedef void (*function)(void);
typedef struct {
    function functions[102];
} table;
typedef struct {
    const table *(*get)(uint32_t version);
    const char *(*version)(void);
} base;

#define CREATE_STATUS(t) ((status * (*)(int, const char *))(t)->functions[0])
#define CREATE_DOMAIN(t) ((status * (*)(const char *, void **))(t)->functions[26])
#define DOMAIN_ADD(t) ((status * (*)(void *, const void *))(t)->functions[27])
#define ADD_DOMAIN(t) ((status * (*)(void *, void *))(t)->functions[28])
#define DATA(t) ((status * (*)(const value *, void **))(t)->functions[51])
#define RANK(t) ((status * (*)(const shape *, size_t *))(t)->functions[61])
#define DIMENSIONS(t) ((status * (*)(const shape *, int64_t *, size_t))(t)->functions[62])
#define ELEMENTS(t) ((status * (*)(const shape *, size_t *))(t)->functions[64])
#define SHAPE(t) ((status * (*)(const value *, shape **))(t)->functions[65])
#define ATTRIBUTE(t) ((status * (*)(const void *, const char *, int64_t *))(t)->functions[86])
#define INPUT(t) ((status * (*)(const void *, size_t, const value **))(t)->functions[90])
#define OUTPUT(t) ((status * (*)(void *, size_t, const int64_t *, size_t, value **))(t)->functions[91])
#define RELEASE_SHAPE(t) ((void (*)(shape *))(t)->functions[99])

enum { FAIL = 1, INVALID_ARGUMENT = 2, FLOAT = 1, UINT32 = 12 };

#define TRY(call) \
    do { \
        status *failed = (call); \
        if (failed) \
            return failed; \
    } while (0)

typedef struct {
    uint32_t version;
    void *(*create_1)(const void *, const table *, const void *);
    const char *(*name)(const void *);
    const char *(*provider)(const void *);
    int (*input_type)(const void *, size_t);
    size_t (*inputs)(const void *);
    int (*output_type)(const void *, size_t);
    size_t (*outputs)(const void *);
    void (*compute_1)(void *, void *);
    void (*destroy)(void *);
    int (*input_kind)(const void *, size_t);
    int (*output_kind)(const void *, size_t);
    int (*input_memory)(const void *, size_t);
    int (*least_inputs)(const void *);
    int (*alike_inputs)(const void *);
    int (*least_outputs)(const void *);
    int (*alike_outputs)(const void *);
    status *(*create)(const void *, const table *, const void *, void **);
    status *(*compute)(void *, void *);
    function later[8];
} custom_op;

#endif
