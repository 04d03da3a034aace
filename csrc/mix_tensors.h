// What scale_bias_mix does with its tensors before a kernel runs, on any device.
#pragma once

#include <tuple>

#include "table.h"

namespace manpp {

// The two maps laid out alike, and where their channels lie.
struct MixInputs {
  Tensor a;
  Tensor b;
  ChannelLayout layout;
};

MixInputs mix_inputs(const Tensor& lb_out, const Tensor& ema_out, const Tensor& scale);

// The same for the backward pass, with the results allocated; what is not wanted is an empty tensor. Kernels write grad_a
// and grad_b, which are laid out like grad; results() has them laid out like the gradient that came in.
struct MixGradients {
  Tensor grad;
  Tensor a;
  Tensor b;
  Tensor grad_a;
  Tensor grad_b;
  Tensor grad_scale;
  Tensor result_a;
  Tensor result_b;
  ChannelLayout layout;
  bool need_scale;

  std::tuple<Tensor, Tensor, Tensor> results();
};

MixGradients mix_gradients(
    const Tensor& grad,
    const std::optional<Tensor>& lb_out,
    const std::optional<Tensor>& ema_out,
    const Tensor& scale,
    bool need_lb,
    bool need_ema);

} // namespace manpp
