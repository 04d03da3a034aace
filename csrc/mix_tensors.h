// What scale_bias_mix does with its tensors before a kernel runs, on any device.
#pragma once

#include "table.h"

namespace manpp {

// The two maps laid out alike, and where their channels lie.
struct MixInputs {
  Tensor a;
  Tensor b;
  ChannelLayout layout;
};

MixInputs mix_inputs(const Tensor& lb_out, const Tensor& ema_out, const Tensor& scale);

// The same for the backward pass, with the results allocated; what is not wanted is an empty tensor.
struct MixGradients {
  Tensor grad;
  Tensor a;
  Tensor b;
  Tensor grad_a;
  Tensor grad_b;
  Tensor grad_scale;
  ChannelLayout layout;
  bool need_scale;
};

MixGradients mix_gradients(
    const Tensor& grad,
    const std::optional<Tensor>& lb_out,
    const std::optional<Tensor>& ema_out,
    const Tensor& scale,
    bool need_lb,
    bool need_ema);

} // namespace manpp
