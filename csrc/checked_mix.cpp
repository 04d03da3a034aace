// scale_bias_mix for the common case, with its arguments checked on the way: in Python that takes longer than to mix two
// small feature maps. Anything out of the ordinary is left to the public function.
#include <optional>

#include "facts.h"
#include "scale_bias_mix.h"

namespace manpp {

namespace {

// One entry, or one for each channel. (One entry in one dimension is a scalar to the public function, which reshapes it.)
bool scale_fits(const Facts& scale, const Facts& map) {
  return has_memory(scale) && scale.on_device_of(map) && scale.contiguous &&
      (scale.dim == 0 || (scale.dim == 1 && map.dim > 1 && scale.sizes[0] == map.sizes[1]));
}

// The mix; nothing where the arguments are out of the ordinary.
template <ScaleBiasMix* mix>
std::optional<Tensor> mix_checked(Tensor lb_out, Tensor ema_out, Tensor scale, double total) {
  std::optional<Facts> lb = facts_of(lb_out);
  std::optional<Facts> ema = facts_of(ema_out);
  std::optional<Facts> factor = facts_of(scale);
  if (!lb || !ema || !factor || !has_memory(*lb) || !has_memory(*ema) || !ema->fits(*lb) || ema->type != lb->type ||
      !scale_fits(*factor, *lb)) {
    return std::nullopt;
  }
  return mix(lb_out, ema_out, scale, total);
}

} // namespace

#ifdef MANPP_EMULATION
constexpr ScaleBiasMix* on_cpu = cuda::scale_bias_mix; // on the GPU that csrc/testing emulates
#else
constexpr ScaleBiasMix* on_cpu = cpu::scale_bias_mix;
#endif

STABLE_TORCH_LIBRARY_IMPL(manpp_kernels, CPU, m) {
  m.impl("_scale_bias_mix_checked", TORCH_BOX(&mix_checked<on_cpu>));
}
#ifdef MANPP_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(manpp_kernels, CUDA, m) {
  m.impl("_scale_bias_mix_checked", TORCH_BOX(&mix_checked<cuda::scale_bias_mix>));
}
#endif

} // namespace manpp
