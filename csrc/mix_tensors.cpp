#include "mix_tensors.h"

namespace manpp {

namespace {

// x in a layout the kernels know, which is its own where possible.
std::pair<Tensor, ChannelLayout> with_channel_layout(const Tensor& x, const Tensor& scale) {
  STD_TORCH_CHECK(
      scale.numel() == 1 || (scale.dim() == 1 && x.dim() > 1 && scale.numel() == x.size(1)),
      "manpp_kernels: scale has to have one entry, or one for each channel");
  Tensor y = is_dense(x) ? x : torch::stable::contiguous(x);
  std::optional<ChannelLayout> layout = channel_layout(y, scale);
  if (!layout) {
    y = torch::stable::contiguous(y);
    layout = channel_layout(y, scale);
  }
  return {y, *layout};
}

} // namespace

MixInputs mix_inputs(const Tensor& lb_out, const Tensor& ema_out, const Tensor& scale) {
  STD_TORCH_CHECK(
      same_sizes(lb_out, ema_out) && dtype_of(lb_out) == dtype_of(ema_out),
      "manpp_kernels: lb_out and ema_out have to be of one shape and dtype");
  auto [a, layout] = with_channel_layout(lb_out, scale);
  return {a, matching(ema_out, a), layout};
}

MixGradients mix_gradients(
    const Tensor& grad,
    const std::optional<Tensor>& lb_out,
    const std::optional<Tensor>& ema_out,
    const Tensor& scale,
    bool need_lb,
    bool need_ema) {
  auto [g, layout] = with_channel_layout(grad, scale);
  // Where one is not wanted, a new tensor each time: no two results of an operator may be the same.
  bool need_scale = lb_out && ema_out;
  Tensor result_a = need_lb ? new_like(grad) : nothing_like(grad);
  Tensor result_b = need_ema ? new_like(grad) : nothing_like(grad);
  MixGradients t{
      g,
      need_scale ? matching(*lb_out, g) : nothing_like(grad),
      need_scale ? matching(*ema_out, g) : nothing_like(grad),
      !need_lb || same_layout(result_a, g) ? result_a : empty_with_layout(g, g),
      !need_ema || same_layout(result_b, g) ? result_b : empty_with_layout(g, g),
      need_scale ? new_like(scale) : nothing_like(scale),
      result_a,
      result_b,
      layout,
      need_scale};
  STD_TORCH_CHECK(
      !need_scale || (dtype_of(t.a) == dtype_of(g) && dtype_of(t.b) == dtype_of(g)),
      "manpp_kernels: grad, lb_out and ema_out have to be of one dtype");
  return t;
}

std::tuple<Tensor, Tensor, Tensor> MixGradients::results() {
  if (grad_a.get() != result_a.get()) {
    copy(result_a, grad_a);
  }
  if (grad_b.get() != result_b.get()) {
    copy(result_b, grad_b);
  }
  return {result_a, result_b, grad_scale};
}

} // namespace manpp
