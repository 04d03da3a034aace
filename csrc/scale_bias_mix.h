// The signature of the operator, which its schema in Python dictates, once for every backend.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace manpp {

using ScaleBiasMix = torch::stable::Tensor(
    torch::stable::Tensor lb_out, torch::stable::Tensor ema_out, torch::stable::Tensor scale, double total);

namespace cpu {
ScaleBiasMix scale_bias_mix;
}
namespace cuda {
ScaleBiasMix scale_bias_mix;
}

} // namespace manpp
