// Pictures to model inputs, with the numbers of the Python reference (Pillow's bilinear filter, float32 arithmetic).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "contract.hpp"

namespace edgepack {

struct Image {
    int height = 0;
    int width = 0;
    int channels = 0;
    std::vector<std::uint8_t> pixels;  // height, width, channels; red first
};

// Reads a binary .ppm (3 channels) or .pgm (1). Throws std::runtime_error.
Image read_image(const std::string& path);

// Bilinear with anti-aliasing, in two passes of 8-bit results, widths first. Pillow 13 and later starts with the height
// of tall images, and some of its pixels then differ by 1.
Image resized(const Image& image, int height, int width);

// Resize of the short side and centre crop, as the input asks.
Image fitted(const Image& image, const Input& input);

// (raw / scale - mean) / std in the input's layout, as a batch of one. The image must have the input's size.
Tensor to_tensor(const Image& image, const Input& input);

}  // namespace edgepack
