// What the model takes, gives and must answer: the content of contract.json.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace edgepack {

enum class DType { boolean, int8, int16, int32, int64, uint8, uint16, uint32, uint64, float16, bfloat16, float32, float64 };

std::size_t size_bytes(DType dtype);

// Values in C order, little-endian, as in the .bin files.
struct Tensor {
    DType dtype = DType::float32;
    std::vector<std::int64_t> shape;
    std::vector<std::uint8_t> bytes;

    std::size_t count() const { return bytes.size() / size_bytes(dtype); }
    double value(std::size_t index) const;
};

// (raw / scale - mean) / std per channel; mean and std are empty, of one value, or of one per channel.
struct Preprocessing {
    float scale = 1;
    std::vector<float> mean;
    std::vector<float> std;
    int resize = 0;    // short side in pixels before the crop, 0: just cover height and width
    bool crop = true;  // centre crop to the input's height and width
};

struct Input {
    std::string name;
    DType dtype;
    std::vector<std::int64_t> shape;  // -1: any size
    std::string layout;               // one letter per axis, empty where it has no meaning
    bool image;                       // made from an image file by this code
    Preprocessing preprocessing;
};

struct Output {
    std::string name;
    DType dtype;
    std::vector<std::int64_t> shape;
};

struct Stored {
    std::string file;
    std::vector<std::int64_t> shape;
};

// One sample with its answers, in the order of inputs and outputs.
struct Golden {
    std::vector<Stored> inputs;
    std::vector<Stored> outputs;
};

// A picture as read from a file, the pixels that resize and crop leave of it, and the model's input made of those.
struct PixelGolden {
    std::size_t input;
    Stored picture;  // height, width, channels
    Stored fitted;
    Stored tensor;
};

struct HashedFile {
    std::string file;
    std::string sha256;
};

struct Contract {
    std::string name;
    std::string model;
    std::vector<Input> inputs;
    std::vector<Output> outputs;
    std::vector<std::string> labels;
    double limit;  // of max|a-b| / max|b| per output, over all golden samples
    std::vector<Golden> golden;
    std::vector<PixelGolden> pixels;
    std::vector<HashedFile> files;
};

const Contract& contract();

}  // namespace edgepack
