// scale_bias_mix on the CPU, forward and backward: kernels, launch and operator.
#include <algorithm>
#include <tuple>

#include "../mix_tensors.h"
#include "blocks.h"

namespace manpp::cpu {

namespace {

// Elements of work below which a second thread costs more to wake than it saves.
constexpr int64_t kGrain = 32768;
// Length of the rows that a tensor with one scale for all of it is cut into.
constexpr int64_t kRow = 4096;

// `Factor` is a scalar for elements of one channel, an array for a channels_last pixel, whose elements are one of each.
#define MANPP_MIX_KERNELS(A, name, Factor, S, R)                                                         \
  MANPP_SIMD void mix_##name(const A* a, const A* b, int64_t n, Factor s, Factor r, A* __restrict__ y) { \
    for (int64_t i = 0; i < n; ++i) {                                                                    \
      y[i] = scale_mix(a[i], b[i], S, R);                                                                \
    }                                                                                                    \
  }                                                                                                      \
  MANPP_SIMD void scaled_##name(const A* g, int64_t n, Factor s, A* __restrict__ y) {                    \
    for (int64_t i = 0; i < n; ++i) {                                                                    \
      y[i] = S * g[i];                                                                                   \
    }                                                                                                    \
  }

MANPP_MIX_KERNELS(float, row, float, s, r)
MANPP_MIX_KERNELS(double, row, double, s, r)
MANPP_MIX_KERNELS(float, pixel, const float*, s[i], r[i])
MANPP_MIX_KERNELS(double, pixel, const double*, s[i], r[i])
#undef MANPP_MIX_KERNELS

// Sixteen running sums: a fixed order of addition that still fills vector registers.
#define MANPP_SHARE_KERNELS(A)                                                                                \
  MANPP_SIMD void share_row(const A* g, const A* a, const A* b, int64_t n, double* total) {                   \
    A sums[16] = {};                                                                                          \
    int64_t i = 0;                                                                                            \
    for (; i + 16 <= n; i += 16) {                                                                            \
      for (int k = 0; k < 16; ++k) {                                                                          \
        sums[k] += scale_grad(g[i + k], a[i + k], b[i + k]);                                                  \
      }                                                                                                       \
    }                                                                                                         \
    A sum = 0;                                                                                                \
    for (; i < n; ++i) {                                                                                      \
      sum += scale_grad(g[i], a[i], b[i]);                                                                    \
    }                                                                                                         \
    for (int k = 0; k < 16; ++k) {                                                                            \
      sum += sums[k];                                                                                         \
    }                                                                                                         \
    *total += sum;                                                                                            \
  }                                                                                                           \
  MANPP_SIMD void share_pixel(const A* g, const A* a, const A* b, int64_t n, double* __restrict__ totals) {   \
    for (int64_t i = 0; i < n; ++i) {                                                                         \
      totals[i] += scale_grad(g[i], a[i], b[i]);                                                              \
    }                                                                                                         \
  }

MANPP_SHARE_KERNELS(float)
MANPP_SHARE_KERNELS(double)
#undef MANPP_SHARE_KERNELS

// A tensor as rows of consecutive elements: of one channel each, or, with `pixels`, of one element of every channel.
struct Rows {
  int64_t length;
  int64_t count;
  int64_t channels;
  int64_t numel;
  bool pixels;

  Rows(const ChannelLayout& layout, int64_t n) : channels(layout.channels), numel(n) {
    pixels = layout.inner == 1 && channels > 1;
    length = std::max<int64_t>(1, pixels ? channels : channels == 1 ? kRow : layout.inner);
    count = (numel + length - 1) / length;
  }
  int64_t grain() const {
    return std::max<int64_t>(1, kGrain / length);
  }
  // Calls body(first element, elements, first channel) for pieces of the row that fit a block.
  template <class Body>
  void pieces(int64_t row, const Body& body) const {
    int64_t stop = std::min(numel, (row + 1) * length);
    for (int64_t i = row * length; i < stop; i += kBlock) {
      body(i, std::min(kBlock, stop - i), pixels ? i - row * length : row % channels);
    }
  }
};

// The two factors of every channel.
template <class A>
struct Scales {
  std::vector<A> scale;
  std::vector<A> rest;

  Scales(const Tensor& tensor, double total) : scale(tensor.numel()), rest(tensor.numel()) {
    for (size_t c = 0; c < scale.size(); ++c) {
      scale[c] = read_scalar<A>(tensor.data_ptr(), dtype_of(tensor), static_cast<int64_t>(c));
      rest[c] = static_cast<A>(total) - scale[c];
    }
  }
};

template <class A>
void mix_rows(const Rows& rows, DType type, const void* a, const void* b, void* out, const Scales<A>& f) {
  torch::stable::parallel_for(0, rows.count, rows.grain(), [&](int64_t begin, int64_t end) {
    alignas(64) A a_buffer[kBlock];
    alignas(64) A b_buffer[kBlock];
    alignas(64) A mixed[kBlock];
    for (int64_t row = begin; row < end; ++row) {
      rows.pieces(row, [&](int64_t i, int64_t n, int64_t c) {
        const A* x = readable(type, at(a, type, i), n, a_buffer);
        const A* y = readable(type, at(b, type, i), n, b_buffer);
        A* z = type == dtype_for<A>() ? static_cast<A*>(out) + i : mixed;
        if (rows.pixels) {
          mix_pixel(x, y, n, f.scale.data() + c, f.rest.data() + c, z);
        } else {
          mix_row(x, y, n, f.scale[c], f.rest[c], z);
        }
        if (z == mixed) {
          store_block(type, mixed, n, at(out, type, i));
        }
      });
    }
  });
}

struct Gradients {
  const void* grad;
  const void* a; // null where the gradient of scale is not wanted, and b with it
  const void* b;
  void* grad_a; // null where not wanted
  void* grad_b;
};

template <class A>
void scaled_out(const Rows& rows, DType type, const A* g, int64_t i, int64_t n, const A* s, A* buffer, void* out) {
  A* y = type == dtype_for<A>() ? static_cast<A*>(out) + i : buffer;
  if (rows.pixels) {
    scaled_pixel(g, n, s, y);
  } else {
    scaled_row(g, n, *s, y);
  }
  if (y == buffer) {
    store_block(type, buffer, n, at(out, type, i));
  }
}

// Sums per channel: a slot per stretch of rows, added up in order afterwards, so that the bits do not depend on the
// number of threads.
template <class A>
std::vector<double> backward_rows(const Rows& rows, DType type, const Gradients& t, const Scales<A>& f) {
  // A row of one channel has a slot of its own; pixels share one, a vector of all channels, per `stretch` of them.
  int64_t stretch = rows.pixels ? rows.grain() : 1;
  int64_t slots = (rows.count + stretch - 1) / stretch;
  int64_t width = rows.pixels ? rows.channels : 1;
  std::vector<double> shares(t.a == nullptr ? 0 : static_cast<size_t>(slots * width));
  torch::stable::parallel_for(0, slots, std::max<int64_t>(1, rows.grain() / stretch), [&](int64_t begin, int64_t end) {
    alignas(64) A g_buffer[kBlock];
    alignas(64) A a_buffer[kBlock];
    alignas(64) A b_buffer[kBlock];
    for (int64_t row = begin * stretch; row < std::min(rows.count, end * stretch); ++row) {
      rows.pieces(row, [&](int64_t i, int64_t n, int64_t c) {
        const A* g = readable(type, at(t.grad, type, i), n, g_buffer);
        if (t.a != nullptr) {
          const A* a = readable(type, at(t.a, type, i), n, a_buffer);
          const A* b = readable(type, at(t.b, type, i), n, b_buffer);
          double* slot = shares.data() + (row / stretch) * width;
          if (rows.pixels) {
            share_pixel(g, a, b, n, slot + c);
          } else {
            share_row(g, a, b, n, slot);
          }
        }
        if (t.grad_a != nullptr) {
          scaled_out(rows, type, g, i, n, f.scale.data() + c, a_buffer, t.grad_a);
        }
        if (t.grad_b != nullptr) {
          scaled_out(rows, type, g, i, n, f.rest.data() + c, b_buffer, t.grad_b);
        }
      });
    }
  });
  std::vector<double> sums(t.a == nullptr ? 0 : static_cast<size_t>(rows.channels));
  for (size_t i = 0; i < shares.size(); ++i) {
    sums[i % sums.size()] += shares[i];
  }
  return sums;
}

} // namespace

Tensor scale_bias_mix(Tensor lb_out, Tensor ema_out, Tensor scale, double total) {
  MixInputs in = mix_inputs(lb_out, ema_out, scale);
  Tensor out = torch::stable::empty_like(lb_out);
  Tensor result = same_layout(out, in.a) ? out : empty_with_layout(out, in.a);
  Rows rows(in.layout, in.a.numel());
  DType type = dtype_of(in.a);
  if (type == DType::f64) {
    mix_rows(rows, type, in.a.data_ptr(), in.b.data_ptr(), result.data_ptr(), Scales<double>(scale, total));
  } else {
    mix_rows(rows, type, in.a.data_ptr(), in.b.data_ptr(), result.data_ptr(), Scales<float>(scale, total));
  }
  if (result.get() != out.get()) {
    torch::stable::copy_(out, result);
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor> scale_bias_mix_backward(
    Tensor grad,
    std::optional<Tensor> lb_out,
    std::optional<Tensor> ema_out,
    Tensor scale,
    double total,
    bool need_lb,
    bool need_ema) {
  MixGradients t = mix_gradients(grad, lb_out, ema_out, scale, need_lb, need_ema);
  if (t.grad.numel() == 0) {
    if (t.need_scale) {
      torch::stable::zero_(t.grad_scale);
    }
    return {t.grad_a, t.grad_b, t.grad_scale};
  }
  Gradients pointers{
      t.grad.data_ptr(),
      t.need_scale ? t.a.data_ptr() : nullptr,
      t.need_scale ? t.b.data_ptr() : nullptr,
      need_lb ? t.grad_a.data_ptr() : nullptr,
      need_ema ? t.grad_b.data_ptr() : nullptr};
  Rows rows(t.layout, t.grad.numel());
  DType type = dtype_of(t.grad);
  std::vector<double> sums = type == DType::f64
      ? backward_rows(rows, type, pointers, Scales<double>(scale, total))
      : backward_rows(rows, type, pointers, Scales<float>(scale, total));
  if (t.need_scale) {
    store_block(dtype_of(scale), sums.data(), static_cast<int64_t>(sums.size()), t.grad_scale.data_ptr());
  }
  return {t.grad_a, t.grad_b, t.grad_scale};
}

STABLE_TORCH_LIBRARY_IMPL(manpp_kernels, CPU, m) {
  m.impl("scale_bias_mix", TORCH_BOX(&scale_bias_mix));
  m.impl("scale_bias_mix_backward", TORCH_BOX(&scale_bias_mix_backward));
}

} // namespace manpp::cpu
