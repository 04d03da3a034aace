// ema_scale_update for the common case, with its arguments checked on the way: what Python would take a microsecond a
// tensor for. Anything out of the ordinary is left, untouched, to the public function in Python, which either names what
// is wrong or takes the long way.
#include <algorithm>
#include <exception>
#include <utility>

#include "table.h"

namespace manpp {

namespace cpu {
void ema_scale_update(
    std::vector<Tensor>, std::vector<Tensor>, double, std::optional<Tensor>, std::optional<Tensor>,
    std::vector<Tensor>, std::vector<int64_t>, double, std::optional<Tensor>, std::vector<Tensor>);
}
#ifdef MANPP_WITH_CUDA
namespace cuda {
void ema_scale_update(
    std::vector<Tensor>, std::vector<Tensor>, double, std::optional<Tensor>, std::optional<Tensor>,
    std::vector<Tensor>, std::vector<int64_t>, double, std::optional<Tensor>, std::vector<Tensor>);
}
#endif

namespace {

struct Span {
  uintptr_t begin;
  uintptr_t end;
};

bool is_known(const Tensor& t) {
  using torch::headeronly::ScalarType;
  ScalarType type = t.scalar_type();
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
      type == ScalarType::Double;
}

Span span_of(const Tensor& t) {
  uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  return {begin, begin + static_cast<uintptr_t>(t.numel()) * t.element_size()};
}

bool fits(const Tensor& t, const Tensor& like, const Tensor& first) {
  auto a = t.sizes();
  auto b = like.sizes();
  // No address: a storage that was freed, as sharded training does between uses.
  return is_known(t) && (t.data_ptr() != nullptr || t.numel() == 0) && t.is_cuda() == first.is_cuda() && t.get_device_index() == first.get_device_index() &&
      a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()) && same_layout(t, like);
}

// Whether the spans that are written are disjoint from one another and from those that are read.
bool disjoint(std::vector<Span> written, const std::vector<Span>& read) {
  auto starts_before = [](const Span& a, const Span& b) { return a.begin < b.begin; };
  if (!std::is_sorted(written.begin(), written.end(), starts_before)) {
    std::sort(written.begin(), written.end(), starts_before);
  }
  for (size_t i = 1; i < written.size(); ++i) {
    if (written[i].begin < written[i - 1].end) {
      return false;
    }
  }
  for (const Span& r : read) {
    // The last written span that starts before r ends is the only one that can reach into it: they are disjoint.
    auto after = std::lower_bound(
        written.begin(), written.end(), Span{r.end, r.end}, [](const Span& a, const Span& b) { return a.begin < b.begin; });
    if (after != written.begin() && (after - 1)->end > r.begin) {
      return false;
    }
  }
  return true;
}

bool ordinary(
    const std::vector<Tensor>& ema,
    const std::vector<Tensor>& params,
    const std::vector<Tensor>& bias,
    const std::optional<Tensor>& scale,
    const std::vector<int64_t>& groups) {
  if (ema.empty() || params.size() != ema.size() || (!bias.empty() && bias.size() != ema.size()) ||
      (!groups.empty() && groups.size() != ema.size()) || bias.empty() == scale.has_value()) {
    return false;
  }
  const Tensor& first = ema[0];
  std::vector<Span> written;
  std::vector<Span> read;
  written.reserve(ema.size());
  read.reserve(2 * ema.size());
  for (size_t i = 0; i < ema.size(); ++i) {
    bool ok = fits(ema[i], ema[i], first) && is_dense(ema[i]) && fits(params[i], ema[i], first) &&
        (bias.empty() || fits(bias[i], ema[i], first));
    if (!ok) {
      return false;
    }
    if (ema[i].numel() > 0) {
      written.push_back(span_of(ema[i]));
      read.push_back(span_of(params[i]));
      if (!bias.empty()) {
        read.push_back(span_of(bias[i]));
      }
    }
  }
  if (scale) {
    int64_t entries = scale->numel();
    if (!is_known(*scale) || scale->dim() > 1 || scale->is_cuda() != first.is_cuda() ||
        scale->get_device_index() != first.get_device_index() || (groups.empty() && entries != 1) ||
        std::any_of(groups.begin(), groups.end(), [&](int64_t g) { return g < 0 || g >= entries; })) {
      return false;
    }
  } else if (!groups.empty()) {
    return false;
  }
  return disjoint(std::move(written), read);
}

} // namespace

// Whether the update was done; false with nothing written where the arguments are out of the ordinary.
bool ema_scale_update_checked(
    std::vector<Tensor> ema,
    std::vector<Tensor> params,
    double momentum,
    std::optional<Tensor> momentum_tensor,
    std::optional<Tensor> scale,
    std::vector<Tensor> bias,
    std::vector<int64_t> groups,
    double total,
    std::optional<Tensor> seed,
    std::vector<Tensor> out) {
  try {
    if (!ordinary(ema, params, bias, scale, groups)) {
      return false;
    }
  } catch (const std::exception&) { // a tensor without strides or storage
    return false;
  }
#ifdef MANPP_WITH_CUDA
  if (ema[0].is_cuda()) {
    cuda::ema_scale_update(
        std::move(ema), std::move(params), momentum, momentum_tensor, scale, std::move(bias), std::move(groups), total,
        seed, std::move(out));
    return true;
  }
#endif
  cpu::ema_scale_update(
      std::move(ema), std::move(params), momentum, momentum_tensor, scale, std::move(bias), std::move(groups), total, seed,
      std::move(out));
  return true;
}

STABLE_TORCH_LIBRARY_IMPL(manpp_kernels, CPU, m) {
  m.impl("_ema_scale_update_checked", TORCH_BOX(&ema_scale_update_checked));
}
#ifdef MANPP_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(manpp_kernels, CUDA, m) {
  m.impl("_ema_scale_update_checked", TORCH_BOX(&ema_scale_update_checked));
}
#endif

} // namespace manpp
