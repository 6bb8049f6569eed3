/* Calls a TFLite file's first signature with LiteRT's C library, a given number of times, and prints the answers.
 * Of the library's headers, which its Python package does not hold, it declares what it calls. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

typedef void *handle;
typedef size_t number;
enum { CPU = 1, READ = 0, WRITE = 1 };

int LiteRtCreateEnvironment(int options, const void *values, handle *environment);
int LiteRtCreateModelFromFile(handle environment, const char *path, handle *model);
int LiteRtCreateOptions(handle *options);
int LiteRtSetOptionsHardwareAccelerators(handle options, int set);
int LiteRtCreateCompiledModel(handle environment, handle model, handle options, handle *compiled);
int LiteRtGetModelSignature(handle model, number index, handle *signature);
int LiteRtGetSignatureInputTensorByIndex(handle signature, number index, handle *tensor);
int LiteRtGetSignatureOutputTensorByIndex(handle signature, number index, handle *tensor);
int LiteRtGetRankedTensorType(handle tensor, void *type);
int LiteRtGetCompiledModelInputBufferRequirements(handle compiled, number signature, number index, handle *wanted);
int LiteRtGetCompiledModelOutputBufferRequirements(handle compiled, number signature, number index, handle *wanted);
int LiteRtCreateManagedTensorBufferFromRequirements(handle environment, const void *type, handle wanted, handle *made);
int LiteRtGetTensorBufferPackedSize(handle buffer, size_t *bytes);
int LiteRtLockTensorBuffer(handle buffer, void **address, int mode);
int LiteRtUnlockTensorBuffer(handle buffer);
int LiteRtRunCompiledModel(handle compiled, number signature, size_t in, handle *inputs, size_t out, handle *outputs);

static void check(int status, const char *what)
{
    if (status) {
        fprintf(stderr, "%s: status %d\n", what, status);
        exit(1);
    }
}

static handle buffer_of(handle environment, handle compiled, handle signature, int input)
{
    handle tensor, wanted, made;
    static double type[64];  /* larger than the structure of any version */
    if (input) {
        check(LiteRtGetSignatureInputTensorByIndex(signature, 0, &tensor), "input");
        check(LiteRtGetCompiledModelInputBufferRequirements(compiled, 0, 0, &wanted), "input buffer");
    } else {
        check(LiteRtGetSignatureOutputTensorByIndex(signature, 0, &tensor), "output");
        check(LiteRtGetCompiledModelOutputBufferRequirements(compiled, 0, 0, &wanted), "output buffer");
    }
    check(LiteRtGetRankedTensorType(tensor, type), "type");
    check(LiteRtCreateManagedTensorBufferFromRequirements(environment, type, wanted, &made), "buffer");
    return made;
}

int main(int count, char **words)
{
    handle environment, model, options, compiled, signature, input, output;
    size_t bytes;
    float *values;
    if (count != 3) {
        fprintf(stderr, "usage: litert_calls MODEL CALLS\n");
        return 2;
    }
    check(LiteRtCreateEnvironment(0, NULL, &environment), "environment");
    check(LiteRtCreateModelFromFile(environment, words[1], &model), "model");
    check(LiteRtCreateOptions(&options), "options");
    check(LiteRtSetOptionsHardwareAccelerators(options, CPU), "processor");
    check(LiteRtCreateCompiledModel(environment, model, options, &compiled), "compiled model");
    check(LiteRtGetModelSignature(model, 0, &signature), "signature");
    input = buffer_of(environment, compiled, signature, 1);
    output = buffer_of(environment, compiled, signature, 0);
    check(LiteRtGetTensorBufferPackedSize(input, &bytes), "size");
    check(LiteRtLockTensorBuffer(input, (void **)&values, WRITE), "lock");
    for (size_t i = 0; i < bytes / sizeof *values; i++)
        values[i] = (float)((i * 2654435761u >> 8) % 1000) / 500 - 1;
    check(LiteRtUnlockTensorBuffer(input), "unlock");
    for (long call = strtol(words[2], NULL, 10); call > 0; call--)
        check(LiteRtRunCompiledModel(compiled, 0, 1, &input, 1, &output), "run");
    check(LiteRtGetTensorBufferPackedSize(output, &bytes), "size");
    check(LiteRtLockTensorBuffer(output, (void **)&values, READ), "lock");
    for (size_t i = 0; i < bytes / sizeof *values; i++)
        printf("%.6g\n", (double)values[i]);
    return 0;
}
