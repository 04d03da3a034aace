// The signature of the operators, which their schemas in Python dictate, once for every backend.
#pragma once

#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace manpp {

using EmaScaleUpdate = void(
    std::vector<torch::stable::Tensor> ema,
    std::vector<torch::stable::Tensor> params,
    double momentum,
    std::optional<torch::stable::Tensor> momentum_tensor,
    std::optional<torch::stable::Tensor> scale,
    std::vector<torch::stable::Tensor> bias,
    std::vector<int64_t> groups,
    double total,
    std::optional<torch::stable::Tensor> seed,
    std::vector<torch::stable::Tensor> out);

namespace cpu {
EmaScaleUpdate ema_scale_update;
}
namespace cuda {
EmaScaleUpdate ema_scale_update;
}

} // namespace manpp
