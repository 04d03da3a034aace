// scale_bias_mix on the CPU, forward and backward: kernels, launch and operator.
#include <algorithm>
#include <tuple>
#include <type_traits>

#include "../mix_tensors.h"
#include "../scale_bias_mix.h"
#include "blocks.h"
#include "loops.h"
#include "memory.h"

namespace manpp::cpu {

namespace {

// Length of the rows that a tensor with one scale for all of it is cut into.
constexpr int64_t kRow = 4096;

// Of pixels of a channels_last tensor, whose elements are of one channel after the other, each with a sum of its own.
template <class T, class A>
struct SharePixelsLoop {
  static constexpr bool computes = std::is_same_v<T, BFloat16>;
  static MANPP_INLINE void run(const T* g, const T* a, const T* b, int64_t n, A* __restrict__ sums) {
    for (int64_t i = 0; i < n; ++i) {
      sums[i] += scale_grad(static_cast<A>(g[i]), static_cast<A>(a[i]), static_cast<A>(b[i]));
    }
  }
};

template <class T>
using Arithmetic = std::conditional_t<sizeof(T) == 8, double, float>;

// A tensor as rows of consecutive elements: of one channel each, or, with `pixels`, of several whole pixels.
struct Rows {
  int64_t length;
  int64_t count;
  int64_t channels;
  int64_t numel;
  bool pixels;

  Rows(const ChannelLayout& layout, int64_t n) : channels(layout.channels), numel(n) {
    pixels = layout.inner == 1 && channels > 1;
    int64_t whole_pixels = channels * std::max<int64_t>(1, kBlock / std::max<int64_t>(1, channels));
    length = std::max<int64_t>(1, pixels ? whole_pixels : channels == 1 ? kRow : layout.inner);
    count = (numel + length - 1) / length;
  }
  int64_t grain() const {
    return std::max<int64_t>(1, kGrain / length);
  }
  // Calls body(first element, elements, which factor) for pieces of the row that fit a block.
  template <class Body>
  void pieces(int64_t row, const Body& body) const {
    int64_t stop = std::min(numel, (row + 1) * length);
    for (int64_t i = row * length; i < stop; i += kBlock) {
      body(i, std::min(kBlock, stop - i), pixels ? i - row * length : row % channels);
    }
  }
};

// The two factors of every channel; with pixels, of every element of a row.
template <class A>
struct Scales {
  std::vector<A> scale;
  std::vector<A> rest;

  Scales(const Tensor& tensor, double total, const Rows& rows)
      : scale(rows.pixels ? rows.length : tensor.numel()), rest(scale.size()) {
    const void* entries = scale_entries(tensor);
    for (size_t i = 0; i < scale.size(); ++i) {
      scale[i] = read_scalar<A>(entries, dtype_of(tensor), static_cast<int64_t>(i) % tensor.numel());
      rest[i] = static_cast<A>(total) - scale[i];
    }
  }
};

// A result: written where it belongs or, where it is too large for the caches, past them by way of a buffer.
template <class T>
struct Output {
  T* data;
  bool stream;

  // For n elements, one of `results` such outputs of the launch.
  Output(void* p, int64_t n, int results)
      : data(static_cast<T*>(p)), stream(results * n * int64_t{sizeof(T)} > kStreamBytes) {
    if (data != nullptr) {
      expect_writes(data, n * sizeof(T));
    }
  }
  // Calls write(where to) for n elements from i on.
  template <class Write>
  void put(int64_t i, int64_t n, const Write& write) const {
    if (!stream) {
      write(data + i);
      return;
    }
    alignas(64) T buffer[kBlock];
    write(buffer);
    stream_bytes(buffer, n * sizeof(T), data + i);
  }
};

template <class T>
void mix_rows(const Rows& rows, const void* lb, const void* ema, void* result, const Scales<Arithmetic<T>>& f) {
  using A = Arithmetic<T>;
  const T* a = static_cast<const T*>(lb);
  const T* b = static_cast<const T*>(ema);
  Output<T> out(result, rows.numel, 1);
  torch::stable::parallel_for(0, rows.count, rows.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      rows.pieces(row, [&](int64_t i, int64_t n, int64_t c) {
        out.put(i, n, [&](T* y) {
          if (rows.pixels) {
            simd<MixLoop<T, A>>(a + i, b + i, n, f.scale.data() + c, f.rest.data() + c, y);
          } else {
            simd<MixLoop<T, A>>(a + i, b + i, n, f.scale[c], f.rest[c], y);
          }
        });
      });
    }
    stream_fence();
  });
}

struct Gradients {
  const void* grad;
  const void* a; // null where the gradient of scale is not wanted, and b with it
  const void* b;
  void* grad_a; // null where not wanted
  void* grad_b;
};

// Sums per channel: a slot per stretch of rows, added up in order afterwards, so that the bits do not depend on the
// number of threads.
template <class T>
std::vector<double> backward_rows(const Rows& rows, const Gradients& t, const Scales<Arithmetic<T>>& f) {
  using A = Arithmetic<T>;
  const T* g = static_cast<const T*>(t.grad);
  const T* a = static_cast<const T*>(t.a);
  const T* b = static_cast<const T*>(t.b);
  int results = (t.grad_a != nullptr) + (t.grad_b != nullptr);
  const std::pair<Output<T>, const std::vector<A>*> outs[] = {
      {Output<T>(t.grad_a, rows.numel, results), &f.scale}, {Output<T>(t.grad_b, rows.numel, results), &f.rest}};
  // A row of one channel has a slot of its own; pixels share one, a vector of all channels, per `stretch` of rows.
  int64_t stretch = rows.pixels ? rows.grain() : 1;
  int64_t slots = (rows.count + stretch - 1) / stretch;
  int64_t width = rows.pixels ? rows.channels : 1;
  std::vector<double> shares(a == nullptr ? 0 : static_cast<size_t>(slots * width));
  torch::stable::parallel_for(0, slots, std::max<int64_t>(1, rows.grain() / stretch), [&](int64_t begin, int64_t end) {
    std::vector<A> sums(a != nullptr && rows.pixels ? static_cast<size_t>(rows.length) : 0);
    for (int64_t slot = begin; slot < end; ++slot) {
      double* share = shares.data() + slot * width;
      for (int64_t row = slot * stretch; row < std::min(rows.count, (slot + 1) * stretch); ++row) {
        rows.pieces(row, [&](int64_t i, int64_t n, int64_t c) {
          if (a != nullptr && rows.pixels) {
            simd<SharePixelsLoop<T, A>>(g + i, a + i, b + i, n, sums.data() + c);
          } else if (a != nullptr) {
            *share += simd<ShareLoop<T, A>>(g + i, a + i, b + i, n);
          }
          for (const auto& [out, factors] : outs) {
            if (out.data != nullptr) {
              out.put(i, n, [&, from = factors->data() + c](T* y) {
                rows.pixels ? simd<ScaledLoop<T, A>>(g + i, n, from, y) : simd<ScaledLoop<T, A>>(g + i, n, *from, y);
              });
            }
          }
        });
      }
      for (size_t i = 0; i < sums.size(); ++i) {
        share[static_cast<int64_t>(i) % width] += sums[i];
        sums[i] = 0;
      }
    }
    stream_fence();
  });
  std::vector<double> sums(a == nullptr ? 0 : static_cast<size_t>(rows.channels));
  for (size_t i = 0; i < shares.size(); ++i) {
    sums[i % sums.size()] += shares[i];
  }
  return sums;
}

// Calls body with a value of the type that a tensor's elements are of.
template <class Body>
auto with_type(DType type, const Body& body) {
  switch (type) {
    case DType::f64:
      return body(double{});
    case DType::f32:
      return body(float{});
    case DType::bf16:
      return body(BFloat16{});
    default:
      return body(Half{});
  }
}

} // namespace

Tensor scale_bias_mix(Tensor lb_out, Tensor ema_out, Tensor scale, double total) {
  MixInputs in = mix_inputs(lb_out, ema_out, scale);
  Tensor out = new_like(lb_out);
  Tensor result = same_layout(out, in.a) ? out : empty_with_layout(out, in.a);
  Rows rows(in.layout, in.a.numel());
  with_type(dtype_of(in.a), [&](auto element) {
    using T = decltype(element);
    Scales<Arithmetic<T>> scales(scale, total, rows);
    mix_rows<T>(rows, in.a.data_ptr(), in.b.data_ptr(), result.data_ptr(), scales);
  });
  if (result.get() != out.get()) {
    copy(out, result);
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
    return t.results();
  }
  Gradients pointers{
      t.grad.data_ptr(),
      t.need_scale ? t.a.data_ptr() : nullptr,
      t.need_scale ? t.b.data_ptr() : nullptr,
      need_lb ? t.grad_a.data_ptr() : nullptr,
      need_ema ? t.grad_b.data_ptr() : nullptr};
  Rows rows(t.layout, t.grad.numel());
  std::vector<double> sums = with_type(dtype_of(t.grad), [&](auto element) {
    using T = decltype(element);
    return backward_rows<T>(rows, pointers, Scales<Arithmetic<T>>(scale, total, rows));
  });
  if (t.need_scale) {
    store_block(dtype_of(scale), sums.data(), static_cast<int64_t>(sums.size()), t.grad_scale.data_ptr());
  }
  return t.results();
}

STABLE_TORCH_LIBRARY_IMPL(manpp_kernels, CPU, m) {
  m.impl("scale_bias_mix", TORCH_BOX(&scale_bias_mix));
  m.impl("scale_bias_mix_backward", TORCH_BOX(&scale_bias_mix_backward));
}

} // namespace manpp::cpu
