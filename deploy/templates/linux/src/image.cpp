#include "image.hpp"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstring>
#include <fstream>
#include <stdexcept>

namespace edgepack {
namespace {

constexpr int FRACTION_BITS = 22;  // of a filter weight; 8 of 32 bits are for the pixel, 2 for the sum

// The source pixels that one result pixel reads, and their weights.
struct Window {
    int first;
    std::vector<int> weights;
};

std::vector<Window> windows(int from, int to) {
    const double scale = static_cast<double>(from) / to;
    const double reach = std::max(scale, 1.0);
    std::vector<Window> found;
    for (int place = 0; place < to; ++place) {
        const double centre = (place + 0.5) * scale;
        const int first = std::max(static_cast<int>(centre - reach + 0.5), 0);
        const int last = std::min(static_cast<int>(centre + reach + 0.5), from);
        std::vector<double> exact;
        double sum = 0;
        for (int source = first; source < last; ++source) {
            const double distance = std::abs((source - centre + 0.5) * (1.0 / reach));
            exact.push_back(distance < 1.0 ? 1.0 - distance : 0.0);
            sum += exact.back();
        }
        Window window{first, {}};
        for (const double weight : exact)
            window.weights.push_back(static_cast<int>(0.5 + weight / sum * (1 << FRACTION_BITS)));
        found.push_back(window);
    }
    return found;
}

// `step` lies between the pixels of a line.
std::uint8_t weighted(const std::uint8_t* line, std::size_t step, const Window& window) {
    int sum = 1 << (FRACTION_BITS - 1);
    for (std::size_t i = 0; i < window.weights.size(); ++i)
        sum += line[(static_cast<std::size_t>(window.first) + i) * step] * window.weights[i];
    return static_cast<std::uint8_t>(std::clamp(sum >> FRACTION_BITS, 0, 255));
}

Image widened(const Image& image, int width) {
    Image result{image.height, width, image.channels, {}};
    const auto channels = static_cast<std::size_t>(image.channels);
    const auto across = windows(image.width, width);
    for (int row = 0; row < image.height; ++row)
        for (const Window& window : across)
            for (std::size_t channel = 0; channel < channels; ++channel) {
                const auto start = static_cast<std::size_t>(row) * static_cast<std::size_t>(image.width) * channels;
                result.pixels.push_back(weighted(image.pixels.data() + start + channel, channels, window));
            }
    return result;
}

Image heightened(const Image& image, int height) {
    Image result{height, image.width, image.channels, {}};
    const auto stride = static_cast<std::size_t>(image.width) * static_cast<std::size_t>(image.channels);
    for (const Window& window : windows(image.height, height))
        for (std::size_t column = 0; column < stride; ++column)
            result.pixels.push_back(weighted(image.pixels.data() + column, stride, window));
    return result;
}

Image cropped(const Image& image, int height, int width) {
    const auto top = static_cast<int>(std::nearbyint((image.height - height) / 2.0));
    const auto left = static_cast<int>(std::nearbyint((image.width - width) / 2.0));
    Image result{height, width, image.channels, {}};
    for (int row = top; row < top + height; ++row) {
        const auto start = image.pixels.begin() + (row * image.width + left) * image.channels;
        result.pixels.insert(result.pixels.end(), start, start + width * image.channels);
    }
    return result;
}

std::int64_t size_of(const Input& input, char letter) {
    const auto axis = input.layout.find(letter);
    if (axis == std::string::npos) throw std::runtime_error("input '" + input.name + "' is not an image");
    return input.shape[axis];
}

float of_channel(const std::vector<float>& values, std::size_t channel, float otherwise) {
    if (values.empty()) return otherwise;
    return values[values.size() == 1 ? 0 : channel];
}

int next_number(std::istream& file) {
    while (file >> std::ws && file.peek() == '#') file.ignore(4096, '\n');
    int number = 0;
    file >> number;
    return number;
}

}  // namespace

Image read_image(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(path + " cannot be read");
    char magic[2] = {};
    file.read(magic, 2);
    const int channels = magic[0] == 'P' && magic[1] == '6' ? 3 : magic[0] == 'P' && magic[1] == '5' ? 1 : 0;
    const int width = channels > 0 ? next_number(file) : 0;
    const int height = channels > 0 ? next_number(file) : 0;
    const int top = channels > 0 ? next_number(file) : 0;
    if (width < 1 || height < 1 || width > 65535 || height > 65535 || top != 255 || !std::isspace(file.get()))
        throw std::runtime_error(path + " is not a binary 8-bit .ppm or .pgm file");
    Image image{height, width, channels, {}};
    image.pixels.resize(static_cast<std::size_t>(width) * static_cast<std::size_t>(height) *
                        static_cast<std::size_t>(channels));
    file.read(reinterpret_cast<char*>(image.pixels.data()), static_cast<std::streamsize>(image.pixels.size()));
    if (!file) throw std::runtime_error(path + " ends before its last pixel");
    return image;
}

Image resized(const Image& image, int height, int width) {
    const Image wide = width == image.width ? image : widened(image, width);
    return height == image.height ? wide : heightened(wide, height);
}

Image fitted(const Image& image, const Input& input) {
    const Preprocessing& how = input.preprocessing;
    const auto height = static_cast<int>(size_of(input, 'H')), width = static_cast<int>(size_of(input, 'W'));
    int to_height = image.height, to_width = image.width;
    if (how.resize > 0) {
        const std::int64_t side = std::min(image.height, image.width);
        to_height = static_cast<int>(how.resize * std::int64_t{image.height} / side);
        to_width = static_cast<int>(how.resize * std::int64_t{image.width} / side);
    } else if (how.crop) {
        const double factor = std::max(static_cast<double>(height) / image.height,
                                       static_cast<double>(width) / image.width);
        to_height = std::max(height, static_cast<int>(std::nearbyint(image.height * factor)));
        to_width = std::max(width, static_cast<int>(std::nearbyint(image.width * factor)));
    }
    const Image whole = resized(image, to_height, to_width);
    return how.crop ? cropped(whole, height, width) : whole;
}

Tensor to_tensor(const Image& image, const Input& input) {
    const auto planes = static_cast<std::size_t>(image.channels);
    const auto area = static_cast<std::size_t>(image.height) * static_cast<std::size_t>(image.width);
    if (size_of(input, 'C') != image.channels)
        throw std::runtime_error("the image has " + std::to_string(image.channels) + " channels, the model takes " +
                                 std::to_string(size_of(input, 'C')));
    Tensor tensor{input.dtype, input.shape, std::vector<std::uint8_t>(planes * area * size_bytes(input.dtype))};
    tensor.shape[input.layout.find('N')] = 1;
    tensor.shape[input.layout.find('H')] = image.height;
    tensor.shape[input.layout.find('W')] = image.width;
    const bool planar = input.layout.find('C') < input.layout.find('H');
    for (std::size_t pixel = 0; pixel < area; ++pixel)
        for (std::size_t channel = 0; channel < planes; ++channel) {
            const std::uint8_t raw = image.pixels[pixel * planes + channel];
            const std::size_t place = planar ? channel * area + pixel : pixel * planes + channel;
            if (input.dtype == DType::uint8) {
                tensor.bytes[place] = raw;
                continue;
            }
            float value = static_cast<float>(raw) / input.preprocessing.scale;
            value -= of_channel(input.preprocessing.mean, channel, 0);
            value /= of_channel(input.preprocessing.std, channel, 1);
            std::memcpy(tensor.bytes.data() + place * sizeof value, &value, sizeof value);
        }
    return tensor;
}

}  // namespace edgepack
