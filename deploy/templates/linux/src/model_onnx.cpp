// ONNX Runtime through its C API, which stays the same from version to version.
#include <onnxruntime_c_api.h>

#include <stdexcept>

#include "model.hpp"

namespace edgepack {
namespace {

const OrtApi& api() {
    static const OrtApi* found = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    if (found == nullptr)
        throw std::runtime_error(std::string("ONNX Runtime ") + OrtGetApiBase()->GetVersionString() +
                                 " is older than the headers this was built with (API " +
                                 std::to_string(ORT_API_VERSION) + ")");
    return *found;
}

void check(OrtStatus* status) {
    if (status == nullptr) return;
    const std::string message = api().GetErrorMessage(status);
    api().ReleaseStatus(status);
    throw std::runtime_error("ONNX Runtime: " + message);
}

struct Release {
    void operator()(OrtEnv* it) const { api().ReleaseEnv(it); }
    void operator()(OrtSession* it) const { api().ReleaseSession(it); }
    void operator()(OrtSessionOptions* it) const { api().ReleaseSessionOptions(it); }
    void operator()(OrtMemoryInfo* it) const { api().ReleaseMemoryInfo(it); }
    void operator()(OrtValue* it) const { api().ReleaseValue(it); }
    void operator()(OrtTensorTypeAndShapeInfo* it) const { api().ReleaseTensorTypeAndShapeInfo(it); }
};

template <typename T>
using Owned = std::unique_ptr<T, Release>;

// Calls a function whose last argument receives a new object.
template <typename T, typename F>
Owned<T> made(F&& create) {
    T* it = nullptr;
    check(create(&it));
    return Owned<T>(it);
}

ONNXTensorElementDataType element(DType dtype) {
    switch (dtype) {
        case DType::boolean: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
        case DType::int8: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
        case DType::int16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16;
        case DType::int32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
        case DType::int64: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
        case DType::uint8: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
        case DType::uint16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16;
        case DType::uint32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32;
        case DType::uint64: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64;
        case DType::float16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
        case DType::bfloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
        case DType::float32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        case DType::float64: return ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE;
    }
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

Tensor copied(OrtValue* value, const Output& output) {
    auto info = made<OrtTensorTypeAndShapeInfo>([&](auto** it) { return api().GetTensorTypeAndShape(value, it); });
    ONNXTensorElementDataType type;
    check(api().GetTensorElementType(info.get(), &type));
    if (type != element(output.dtype)) throw std::runtime_error("output '" + output.name + "' has another dtype");
    std::size_t rank = 0;
    check(api().GetDimensionsCount(info.get(), &rank));
    Tensor found{output.dtype, std::vector<std::int64_t>(rank), {}};
    check(api().GetDimensions(info.get(), found.shape.data(), rank));
    std::size_t count = 0;
    check(api().GetTensorShapeElementCount(info.get(), &count));
    void* data = nullptr;
    check(api().GetTensorMutableData(value, &data));
    const auto* bytes = static_cast<const std::uint8_t*>(data);
    found.bytes.assign(bytes, bytes + count * size_bytes(output.dtype));
    return found;
}

}  // namespace

struct Model::Engine {
    Owned<OrtEnv> env;
    Owned<OrtSession> session;
    Owned<OrtMemoryInfo> memory;
};

Model::Model(const std::string& package, int threads) : engine_(std::make_unique<Engine>()) {
    const std::string path = package + "/" + contract().model;
    engine_->env = made<OrtEnv>([](auto** it) { return api().CreateEnv(ORT_LOGGING_LEVEL_ERROR, "edgepack", it); });
    auto options = made<OrtSessionOptions>([](auto** it) { return api().CreateSessionOptions(it); });
    check(api().SetIntraOpNumThreads(options.get(), threads));
    // Idle threads that wait actively slow down everything else on a small device.
    check(api().AddSessionConfigEntry(options.get(), "session.intra_op.allow_spinning", "0"));
    engine_->session = made<OrtSession>(
        [&](auto** it) { return api().CreateSession(engine_->env.get(), path.c_str(), options.get(), it); });
    engine_->memory = made<OrtMemoryInfo>(
        [](auto** it) { return api().CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, it); });
}

Model::~Model() = default;

std::vector<Tensor> Model::run(const std::vector<Tensor>& inputs) {
    check_inputs(inputs);
    std::vector<const char*> input_names, output_names;
    std::vector<Owned<OrtValue>> given, got;
    std::vector<const OrtValue*> values;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        const Tensor& tensor = inputs[i];
        // The engine only reads inputs, though its interface does not say so.
        void* data = const_cast<std::uint8_t*>(tensor.bytes.data());
        given.push_back(made<OrtValue>([&](auto** it) {
            return api().CreateTensorWithDataAsOrtValue(engine_->memory.get(), data, tensor.bytes.size(),
                                                        tensor.shape.data(), tensor.shape.size(),
                                                        element(tensor.dtype), it);
        }));
        values.push_back(given.back().get());
        input_names.push_back(contract().inputs[i].name.c_str());
    }
    for (const Output& output : contract().outputs) output_names.push_back(output.name.c_str());
    std::vector<OrtValue*> raw(output_names.size(), nullptr);
    OrtStatus* status = api().Run(engine_->session.get(), nullptr, input_names.data(), values.data(), values.size(),
                                  output_names.data(), output_names.size(), raw.data());
    for (OrtValue* value : raw) got.emplace_back(value);
    check(status);
    std::vector<Tensor> outputs;
    for (std::size_t i = 0; i < got.size(); ++i) outputs.push_back(copied(got[i].get(), contract().outputs[i]));
    return outputs;
}

}  // namespace edgepack
