// sample --self-test | sample IMAGE: shows how an app uses the model, and proves that it answers right here.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <functional>
#include <iterator>
#include <numeric>
#include <stdexcept>

#include "image.hpp"
#include "model.hpp"
#include "sha256.hpp"

namespace {

using namespace edgepack;

const char* const USAGE =
    "usage: sample --self-test [--package DIR] [--threads N]\n"
    "       sample IMAGE       [--package DIR] [--threads N]   a binary .ppm or .pgm file\n";

struct Options {
    std::string package = EDGEPACK_PACKAGE;
    std::string image;
    int threads = 0;
    bool self_test = false;
};

Options options_of(int count, char** words) {
    Options found;
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        if (word == "--self-test") found.self_test = true;
        else if (word == "--package" && i + 1 < count) found.package = words[++i];
        else if (word == "--threads" && i + 1 < count) found.threads = std::max(0, std::atoi(words[++i]));
        else if (word.rfind("--", 0) != 0 && found.image.empty()) found.image = word;
        else throw std::invalid_argument(word);
    }
    if (found.self_test == !found.image.empty()) throw std::invalid_argument("give --self-test or an image");
    return found;
}

Tensor stored(const std::string& package, const Stored& what, DType dtype) {
    std::ifstream file(package + "/" + what.file, std::ios::binary);
    Tensor tensor{dtype, what.shape, {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()}};
    auto count = static_cast<std::size_t>(
        std::accumulate(what.shape.begin(), what.shape.end(), std::int64_t{1}, std::multiplies<>()));
    if (!file || tensor.bytes.size() != count * size_bytes(dtype))
        throw std::runtime_error(what.file + " is missing or has another size than the contract says");
    return tensor;
}

void check_files(const std::string& package) {
    for (const HashedFile& item : contract().files)
        if (sha256_of_file(package + "/" + item.file) != item.sha256)
            throw std::runtime_error(item.file + " was changed: its SHA-256 is not the contract's");
    std::printf("files: %zu have the contract's SHA-256\n", contract().files.size());
}

Image as_image(const Tensor& tensor) {
    return {static_cast<int>(tensor.shape[0]), static_cast<int>(tensor.shape[1]), static_cast<int>(tensor.shape[2]),
            tensor.bytes};
}

int largest_difference(const Image& a, const Image& b) {
    if (a.height != b.height || a.width != b.width || a.channels != b.channels) return 255;
    int largest = 0;
    for (std::size_t i = 0; i < a.pixels.size(); ++i) largest = std::max(largest, std::abs(a.pixels[i] - b.pixels[i]));
    return largest;
}

void check_pixels(const std::string& package) {
    for (const PixelGolden& item : contract().pixels) {
        const Input& input = contract().inputs[item.input];
        const Image picture = as_image(stored(package, item.picture, DType::uint8));
        const Image reference = as_image(stored(package, item.fitted, DType::uint8));
        // One level of 255: versions of Pillow differ in which side they resize first.
        const int difference = largest_difference(fitted(picture, input), reference);
        if (difference > 1)
            throw std::runtime_error("input '" + input.name + "': resize and crop give other pixels than the reference");
        if (to_tensor(reference, input).bytes != stored(package, item.tensor, input.dtype).bytes)
            throw std::runtime_error("input '" + input.name + "': preprocessing gives other values than the reference");
        std::printf("preprocessing of '%s': %dx%d pixels to the tensor, %s\n", input.name.c_str(), picture.height,
                    picture.width, difference == 0 ? "equal bit for bit" : "pixels differ by at most 1 of 255");
    }
}

// The largest difference and the largest reference value so far.
struct Error {
    double difference = 0;
    double scale = 0;

    void add(const Tensor& found, const Tensor& wanted) {
        if (found.shape != wanted.shape) difference = HUGE_VAL;
        for (std::size_t i = 0; found.shape == wanted.shape && i < wanted.count(); ++i) {
            const double a = found.value(i), b = wanted.value(i);
            if (std::isfinite(b)) scale = std::max(scale, std::abs(b));
            if (a == b) continue;
            const double here = std::abs(a - b);
            difference = std::isfinite(here) ? std::max(difference, here) : HUGE_VAL;
        }
    }
    double relative() const { return difference == 0 ? 0 : scale == 0 ? HUGE_VAL : difference / scale; }
};

void check_golden(const std::string& package, int threads) {
    Model model(package, threads);
    std::vector<Error> errors(contract().outputs.size());
    for (const Golden& sample : contract().golden) {
        std::vector<Tensor> inputs;
        for (std::size_t i = 0; i < sample.inputs.size(); ++i)
            inputs.push_back(stored(package, sample.inputs[i], contract().inputs[i].dtype));
        const std::vector<Tensor> outputs = model.run(inputs);
        for (std::size_t i = 0; i < outputs.size(); ++i)
            errors[i].add(outputs[i], stored(package, sample.outputs[i], contract().outputs[i].dtype));
    }
    for (std::size_t i = 0; i < errors.size(); ++i) {
        const std::string& name = contract().outputs[i].name;
        std::printf("output '%s': largest error %.2g of its largest value (limit %g), %zu golden samples\n",
                    name.c_str(), errors[i].relative(), contract().limit, contract().golden.size());
        if (!(errors[i].relative() <= contract().limit))
            throw std::runtime_error("output '" + name + "' is not what the model must answer");
    }
}

void show(const Tensor& tensor, const Output& output) {
    std::vector<std::size_t> order(tensor.count());
    std::iota(order.begin(), order.end(), std::size_t{0});
    if (tensor.shape.size() != 2 || tensor.shape[1] < 2) {
        std::printf("output '%s': %zu values, the first is %g\n", output.name.c_str(), order.size(), tensor.value(0));
        return;
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return tensor.value(a) > tensor.value(b); });
    order.resize(std::min<std::size_t>(order.size(), 5));
    for (const std::size_t place : order) {
        const bool named = place < contract().labels.size();
        std::printf("%10.6f  %s\n", tensor.value(place),
                    (named ? contract().labels[place] : "class " + std::to_string(place)).c_str());
    }
}

void classify(const Options& options) {
    if (contract().inputs.size() != 1 || !contract().inputs[0].image)
        throw std::runtime_error("this model does not take one picture of 1 or 3 channels: call Model::run with tensors");
    Model model(options.package, options.threads);
    const Input& input = contract().inputs[0];
    const std::vector<Tensor> outputs = model.run({to_tensor(fitted(read_image(options.image), input), input)});
    show(outputs[0], contract().outputs[0]);
}

}  // namespace

int main(int count, char** words) {
    try {
        const Options options = options_of(count, words);
        if (!options.self_test) {
            classify(options);
            return 0;
        }
        check_files(options.package);
        check_pixels(options.package);
        check_golden(options.package, options.threads);
        std::printf("self-test passed: %s\n", contract().name.c_str());
        return 0;
    } catch (const std::invalid_argument& error) {
        std::fprintf(stderr, "%s: not understood\n%s", error.what(), USAGE);
        return 2;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "failed: %s\n", error.what());
        return 1;
    }
}
