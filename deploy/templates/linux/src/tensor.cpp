#include <cmath>
#include <cstring>
#include <stdexcept>

#include "contract.hpp"

namespace edgepack {
namespace {

template <typename T>
double read(const std::uint8_t* bytes) {
    T value;
    std::memcpy(&value, bytes, sizeof value);
    return static_cast<double>(value);
}

double read_float16(const std::uint8_t* bytes) {
    std::uint16_t bits;
    std::memcpy(&bits, bytes, sizeof bits);
    const int exponent = (bits >> 10) & 31;
    const int fraction = bits & 1023;
    const double sign = (bits & 0x8000) != 0 ? -1 : 1;
    if (exponent == 31) return fraction != 0 ? std::nan("") : sign * HUGE_VAL;
    if (exponent == 0) return sign * std::ldexp(fraction, -24);
    return sign * std::ldexp(fraction + 1024, exponent - 25);
}

double read_bfloat16(const std::uint8_t* bytes) {
    const std::uint8_t widened[4] = {0, 0, bytes[0], bytes[1]};
    return read<float>(widened);
}

}  // namespace

std::size_t size_bytes(DType dtype) {
    switch (dtype) {
        case DType::boolean:
        case DType::int8:
        case DType::uint8: return 1;
        case DType::int16:
        case DType::uint16:
        case DType::float16:
        case DType::bfloat16: return 2;
        case DType::int32:
        case DType::uint32:
        case DType::float32: return 4;
        case DType::int64:
        case DType::uint64:
        case DType::float64: return 8;
    }
    throw std::logic_error("unknown dtype");
}

double Tensor::value(std::size_t index) const {
    const std::uint8_t* place = bytes.data() + index * size_bytes(dtype);
    switch (dtype) {
        case DType::boolean:
        case DType::uint8: return read<std::uint8_t>(place);
        case DType::int8: return read<std::int8_t>(place);
        case DType::int16: return read<std::int16_t>(place);
        case DType::int32: return read<std::int32_t>(place);
        case DType::int64: return read<std::int64_t>(place);
        case DType::uint16: return read<std::uint16_t>(place);
        case DType::uint32: return read<std::uint32_t>(place);
        case DType::uint64: return read<std::uint64_t>(place);
        case DType::float16: return read_float16(place);
        case DType::bfloat16: return read_bfloat16(place);
        case DType::float32: return read<float>(place);
        case DType::float64: return read<double>(place);
    }
    throw std::logic_error("unknown dtype");
}

}  // namespace edgepack
