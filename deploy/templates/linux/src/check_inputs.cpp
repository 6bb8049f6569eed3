#include <stdexcept>

#include "model.hpp"

namespace edgepack {

void check_inputs(const std::vector<Tensor>& inputs) {
    const auto& wanted = contract().inputs;
    if (inputs.size() != wanted.size())
        throw std::runtime_error("the model takes " + std::to_string(wanted.size()) + " inputs, not " +
                                 std::to_string(inputs.size()));
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        const auto& shape = inputs[i].shape;
        bool fits = inputs[i].dtype == wanted[i].dtype && shape.size() == wanted[i].shape.size();
        std::size_t count = 1;
        for (std::size_t axis = 0; fits && axis < shape.size(); ++axis) {
            fits = shape[axis] > 0 && (wanted[i].shape[axis] < 0 || wanted[i].shape[axis] == shape[axis]);
            count *= static_cast<std::size_t>(shape[axis]);
        }
        if (!fits || count != inputs[i].count())
            throw std::runtime_error("input '" + wanted[i].name + "' has another shape or dtype than the model takes");
    }
}

}  // namespace edgepack
