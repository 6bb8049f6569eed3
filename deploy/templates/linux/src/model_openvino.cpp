// OpenVINO on the processor, computing in float32: the engine's default rounds more where the processor can.
#include <openvino/openvino.hpp>
#include <stdexcept>

#include "model.hpp"

namespace edgepack {
namespace {

ov::element::Type element(DType dtype) {
    switch (dtype) {
        case DType::boolean: return ov::element::boolean;
        case DType::int8: return ov::element::i8;
        case DType::int16: return ov::element::i16;
        case DType::int32: return ov::element::i32;
        case DType::int64: return ov::element::i64;
        case DType::uint8: return ov::element::u8;
        case DType::uint16: return ov::element::u16;
        case DType::uint32: return ov::element::u32;
        case DType::uint64: return ov::element::u64;
        case DType::float16: return ov::element::f16;
        case DType::bfloat16: return ov::element::bf16;
        case DType::float32: return ov::element::f32;
        case DType::float64: return ov::element::f64;
    }
    throw std::logic_error("unknown dtype");
}

Tensor copied(ov::Tensor value, const Output& output) {
    if (value.get_element_type() != element(output.dtype))
        throw std::runtime_error("output '" + output.name + "' has another dtype");
    const ov::Shape shape = value.get_shape();
    const auto* bytes = static_cast<const std::uint8_t*>(value.data());
    return {output.dtype, {shape.begin(), shape.end()}, {bytes, bytes + value.get_byte_size()}};
}

// The engine's message has several lines; the last says what is wrong.
std::runtime_error told(const ov::Exception& error) {
    std::string text = error.what();
    while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) text.pop_back();
    return std::runtime_error("OpenVINO: " + text.substr(text.rfind('\n') + 1));
}

}  // namespace

struct Model::Engine {
    ov::Core core;
    ov::CompiledModel compiled;
    ov::InferRequest request;
};

Model::Model(const std::string& package, int threads) : engine_(std::make_unique<Engine>()) {
    ov::AnyMap settings{ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY),
                        ov::hint::inference_precision(ov::element::f32), ov::num_streams(1)};
    if (threads > 0) settings.insert(ov::inference_num_threads(threads));
    try {
        engine_->compiled = engine_->core.compile_model(package + "/" + contract().model, "CPU", settings);
        engine_->request = engine_->compiled.create_infer_request();
    } catch (const ov::Exception& error) {
        throw told(error);
    }
}

Model::~Model() = default;

std::vector<Tensor> Model::run(const std::vector<Tensor>& inputs) {
    check_inputs(inputs);
    std::vector<Tensor> outputs;
    try {
        for (std::size_t i = 0; i < inputs.size(); ++i) {
            const Tensor& tensor = inputs[i];
            // The engine only reads inputs, though its interface does not say so.
            void* data = const_cast<std::uint8_t*>(tensor.bytes.data());
            const ov::Shape shape(tensor.shape.begin(), tensor.shape.end());
            engine_->request.set_tensor(contract().inputs[i].name, ov::Tensor(element(tensor.dtype), shape, data));
        }
        engine_->request.infer();
        for (const Output& output : contract().outputs)
            outputs.push_back(copied(engine_->request.get_tensor(output.name), output));
    } catch (const ov::Exception& error) {
        throw told(error);
    }
    return outputs;
}

}  // namespace edgepack
