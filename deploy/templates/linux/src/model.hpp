// The model on its engine: all that an app needs besides contract.hpp (and image.hpp for pictures).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "contract.hpp"

namespace edgepack {

class Model {
public:
    // Loads the model of the package that lies in this folder. threads 0: the engine's own choice.
    // Throws std::runtime_error with one sentence.
    explicit Model(const std::string& package, int threads = 0);
    ~Model();
    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;

    // Inputs and outputs in the order of the contract. One call at a time.
    std::vector<Tensor> run(const std::vector<Tensor>& inputs);

private:
    struct Engine;
    std::unique_ptr<Engine> engine_;
};

// Throws std::runtime_error unless the tensors fit the contract's inputs.
void check_inputs(const std::vector<Tensor>& inputs);

}  // namespace edgepack
