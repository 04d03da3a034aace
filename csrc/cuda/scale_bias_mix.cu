// scale_bias_mix on the GPU, forward and backward: kernels, launch and operator.
#include <algorithm>
#include <tuple>

#include "../mix_tensors.h"
#include "common.cuh"

namespace manpp::cuda {

namespace {

// How the scale of an element is found. A vector of consecutive elements is handled at once where it lies in one
// channel (Row) or starts a run of channels (Pixel); Any asks for every element.
enum class Mode { Scalar, Row, Pixel, Any };

constexpr const char* kBackward = "scale_bias_mix_backward";
constexpr int kPasses = 4; // vectors of each operand that a thread keeps in flight
constexpr int kWarps = kThreads / 32;
constexpr int kSegment = 1024; // elements of a row that a warp sums up in the backward pass
constexpr int kPixels = 64; // pixels a block of the channels_last backward pass works on

template <class T>
using Arithmetic = std::conditional_t<sizeof(T) == 8, double, float>;

template <class A>
struct ScaleSource {
  const void* p;
  DType type;
  double total;

  __device__ __forceinline__ A scale(int64_t channel) const {
    return read_scalar<A>(p, type, channel);
  }
};

template <class T, Mode mode>
__global__ void __launch_bounds__(kThreads) mix_kernel(
    const T* __restrict__ a,
    const T* __restrict__ b,
    T* __restrict__ out,
    int64_t n,
    ChannelLayout layout,
    ScaleSource<Arithmetic<T>> source) {
  using A = Arithmetic<T>;
  constexpr int V = mode == Mode::Any ? 1 : vector_length(sizeof(T));
  const A total = static_cast<A>(source.total);
  int64_t base = static_cast<int64_t>(blockIdx.x) * kThreads * V * kPasses;
  if constexpr (mode == Mode::Any) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      int64_t at = base + i * kThreads + threadIdx.x;
      if (at < n) {
        A s = source.scale(at / layout.inner % layout.channels);
        out[at] = static_cast<T>(scale_mix(static_cast<A>(a[at]), static_cast<A>(b[at]), s, total - s));
      }
    }
  } else {
    T x[kPasses][V];
    T y[kPasses][V];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      int64_t at = base + (i * kThreads + threadIdx.x) * V;
      if (at < n) { // n is a multiple of V in these modes
        load_vector(a + at, x[i]);
        load_vector(b + at, y[i]);
      }
    }
    A s = mode == Mode::Scalar ? source.scale(0) : A(0);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      int64_t at = base + (i * kThreads + threadIdx.x) * V;
      if (at < n) {
        if constexpr (mode == Mode::Row) {
          s = source.scale(at / layout.inner % layout.channels);
        }
        int64_t channel = mode == Mode::Pixel ? at % layout.channels : 0;
#pragma unroll
        for (int k = 0; k < V; ++k) {
          if constexpr (mode == Mode::Pixel) {
            s = source.scale(channel + k);
          }
          x[i][k] = static_cast<T>(scale_mix(static_cast<A>(x[i][k]), static_cast<A>(y[i][k]), s, total - s));
        }
        store_vector(out + at, x[i]);
      }
    }
  }
}

template <class T>
struct Operands {
  const T* grad;
  const T* a; // null where the gradient of scale is not wanted, and b with it
  const T* b;
  T* grad_a; // null where not wanted
  T* grad_b;
};

// V elements that share one scale: both gradients, and their share of that of scale.
template <class T, int V>
__device__ __forceinline__ Arithmetic<T> backward_vector(const Operands<T>& o, int64_t at, Arithmetic<T> s, Arithmetic<T> r) {
  using A = Arithmetic<T>;
  T g[V];
  T x[V];
  T y[V];
  A sum = 0;
  if constexpr (V == 1) {
    g[0] = o.grad[at];
  } else {
    load_vector(o.grad + at, g);
  }
  if (o.a != nullptr) {
    if constexpr (V == 1) {
      x[0] = o.a[at];
      y[0] = o.b[at];
    } else {
      load_vector(o.a + at, x);
      load_vector(o.b + at, y);
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      sum += scale_grad(static_cast<A>(g[k]), static_cast<A>(x[k]), static_cast<A>(y[k]));
    }
  }
#pragma unroll
  for (int k = 0; k < V; ++k) {
    A value = static_cast<A>(g[k]);
    x[k] = static_cast<T>(s * value);
    y[k] = static_cast<T>(r * value);
  }
  if constexpr (V == 1) {
    if (o.grad_a != nullptr) {
      o.grad_a[at] = x[0];
    }
    if (o.grad_b != nullptr) {
      o.grad_b[at] = y[0];
    }
  } else {
    if (o.grad_a != nullptr) {
      store_vector(o.grad_a + at, x);
    }
    if (o.grad_b != nullptr) {
      store_vector(o.grad_b + at, y);
    }
  }
  return sum;
}

// Rows of one channel each, a warp to a segment of a row; shares[segment number] is its sum. V is 1 where rows are not
// multiples of a vector.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) backward_rows_kernel(
    Operands<T> o,
    int64_t n,
    int64_t row_length,
    int64_t segments_per_row,
    int64_t channels,
    ScaleSource<Arithmetic<T>> source,
    double* __restrict__ shares) {
  using A = Arithmetic<T>;
  int64_t segment = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  int64_t row = segment / segments_per_row;
  int64_t begin = row * row_length + segment % segments_per_row * kSegment;
  int64_t end = min(begin + kSegment, min((row + 1) * row_length, n));
  if (begin >= n) {
    return; // a whole warp: the shuffles below have all their lanes
  }
  A s = source.scale(row % channels);
  A r = static_cast<A>(source.total) - s;
  A sum = 0;
#pragma unroll 4
  for (int64_t at = begin + threadIdx.x % 32 * V; at < end; at += 32 * V) {
    sum += backward_vector<T, V>(o, at, s, r);
  }
  if (shares == nullptr) {
    return;
  }
  double total = static_cast<double>(sum);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    total += __shfl_down_sync(0xFFFFFFFFu, total, offset);
  }
  if (threadIdx.x % 32 == 0) {
    shares[segment] = total;
  }
}

// channels_last: threads side by side take neighbouring channels (blockIdx.y counts groups of 32), the eight warps of a
// block take pixels in turn. shares[block][channel].
template <class T>
__global__ void __launch_bounds__(kThreads) backward_pixels_kernel(
    Operands<T> o, int64_t pixels, int64_t channels, ScaleSource<Arithmetic<T>> source, double* __restrict__ shares) {
  using A = Arithmetic<T>;
  __shared__ double sums[kWarps][32];
  int64_t channel = static_cast<int64_t>(blockIdx.y) * 32 + threadIdx.x % 32;
  int warp = threadIdx.x / 32;
  A sum = 0;
  if (channel < channels) {
    A s = source.scale(channel);
    A r = static_cast<A>(source.total) - s;
    int64_t first = static_cast<int64_t>(blockIdx.x) * kPixels;
    int64_t last = min(first + kPixels, pixels);
#pragma unroll 4
    for (int64_t pixel = first + warp; pixel < last; pixel += kWarps) {
      sum += backward_vector<T, 1>(o, pixel * channels + channel, s, r);
    }
  }
  if (shares == nullptr) {
    return;
  }
  sums[warp][threadIdx.x % 32] = static_cast<double>(sum);
  __syncthreads();
  if (warp == 0 && channel < channels) {
    double total = 0;
    for (int i = 0; i < kWarps; ++i) {
      total += sums[i][threadIdx.x];
    }
    shares[static_cast<int64_t>(blockIdx.x) * channels + channel] = total;
  }
}

// A block a channel: out[c] = the sum of shares[(o channels + c) segments + s] over o and s, always in the same order.
__global__ void __launch_bounds__(kThreads) sum_shares_kernel(
    const double* __restrict__ shares, int64_t outer, int64_t segments, void* out, DType type) {
  int64_t channels = gridDim.x;
  int64_t channel = blockIdx.x;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < outer * segments; i += kThreads) {
    sum += shares[(i / segments * channels + channel) * segments + i % segments];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    write_scalar(out, type, channel, sum);
  }
}

uint32_t blocks_for(int64_t items, int64_t per_block) {
  int64_t blocks = (items + per_block - 1) / per_block;
  STD_TORCH_CHECK(blocks <= 0x7FFFFFFF, "manpp_kernels: the tensor is too large for one launch");
  return static_cast<uint32_t>(blocks);
}

// Calls f with a null pointer of the type that t names.
template <class F>
void dispatch(DType t, const F& f) {
  switch (t) {
    case DType::f64:
      return f(static_cast<double*>(nullptr));
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::bf16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::f16:
      return f(static_cast<Half*>(nullptr));
  }
}

template <class T>
void launch_forward(
    const Tensor& a, const Tensor& b, Tensor& out, const ChannelLayout& layout, const Tensor& scale, double total,
    cudaStream_t stream) {
  constexpr int V = vector_length(sizeof(T));
  int64_t n = a.numel();
  const T* x = static_cast<const T*>(a.data_ptr());
  const T* y = static_cast<const T*>(b.data_ptr());
  T* z = static_cast<T*>(out.data_ptr());
  ScaleSource<Arithmetic<T>> source{scale.data_ptr(), dtype_of(scale), total};
  bool vectors = aligned16(x) && aligned16(y) && aligned16(z) && n % V == 0;
  auto run = [&](auto kernel, int length) {
    uint32_t blocks = blocks_for(n, static_cast<int64_t>(kThreads) * kPasses * length);
    launch_kernel("scale_bias_mix", kernel, blocks, stream, x, y, z, n, layout, source);
  };
  if (vectors && layout.channels == 1) {
    run(mix_kernel<T, Mode::Scalar>, V);
  } else if (vectors && layout.inner % V == 0) {
    run(mix_kernel<T, Mode::Row>, V);
  } else if (vectors && layout.inner == 1 && layout.channels % V == 0) {
    run(mix_kernel<T, Mode::Pixel>, V);
  } else {
    run(mix_kernel<T, Mode::Any>, 1);
  }
}

template <class T>
void launch_backward(
    const Operands<T>& o, int64_t n, const ChannelLayout& layout, const Tensor& scale, double total,
    Tensor& grad_scale, const Tensor& like, cudaStream_t stream) {
  constexpr int V = vector_length(sizeof(T));
  ScaleSource<Arithmetic<T>> source{scale.data_ptr(), dtype_of(scale), total};
  bool need_share = o.a != nullptr;
  int64_t outer;
  int64_t segments;
  Tensor buffer;
  double* shares = nullptr;
  auto make_shares = [&](int64_t count) {
    if (need_share) {
      buffer = scratch(like, count * static_cast<int64_t>(sizeof(double)));
      shares = static_cast<double*>(buffer.data_ptr());
    }
  };
  if (layout.channels > 1 && layout.inner == 1) {
    segments = 1;
    outer = blocks_for(layout.outer, kPixels);
    make_shares(outer * layout.channels);
    dim3 grid(static_cast<uint32_t>(outer), blocks_for(layout.channels, 32));
    STD_TORCH_CHECK(grid.y <= 65535, "manpp_kernels: more than two million channels");
    launch_kernel(kBackward, backward_pixels_kernel<T>, grid, stream, o, layout.outer, layout.channels, source, shares);
  } else {
    int64_t row = layout.inner;
    segments = (row + kSegment - 1) / kSegment;
    outer = layout.outer;
    int64_t count = outer * layout.channels * segments;
    make_shares(count);
    uint32_t blocks = blocks_for(count, kWarps);
    bool vectors = row % V == 0 && aligned16(o.grad) && aligned16(o.a) && aligned16(o.b) && aligned16(o.grad_a) &&
        aligned16(o.grad_b);
    auto kernel = vectors ? backward_rows_kernel<T, V> : backward_rows_kernel<T, 1>;
    launch_kernel(kBackward, kernel, blocks, stream, o, n, row, segments, layout.channels, source, shares);
  }
  if (need_share) {
    launch_kernel(
        "sum_shares",
        sum_shares_kernel,
        static_cast<uint32_t>(layout.channels),
        stream,
        shares,
        outer,
        segments,
        grad_scale.data_ptr(),
        dtype_of(grad_scale));
  }
}

} // namespace

Tensor scale_bias_mix(Tensor lb_out, Tensor ema_out, Tensor scale, double total) {
  DeviceGuard guard(lb_out.get_device_index());
  MixInputs in = mix_inputs(lb_out, ema_out, scale);
  Tensor out = torch::stable::empty_like(lb_out);
  Tensor result = same_layout(out, in.a) ? out : empty_with_layout(out, in.a);
  if (in.a.numel() > 0) {
    cudaStream_t stream = current_stream(lb_out.get_device_index());
    dispatch(dtype_of(in.a), [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      launch_forward<T>(in.a, in.b, result, in.layout, scale, total, stream);
    });
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
  DeviceGuard guard(grad.get_device_index());
  MixGradients t = mix_gradients(grad, lb_out, ema_out, scale, need_lb, need_ema);
  if (t.grad.numel() > 0) {
    cudaStream_t stream = current_stream(grad.get_device_index());
    dispatch(dtype_of(t.grad), [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      Operands<T> o{
          static_cast<const T*>(t.grad.data_ptr()),
          t.need_scale ? static_cast<const T*>(t.a.data_ptr()) : nullptr,
          t.need_scale ? static_cast<const T*>(t.b.data_ptr()) : nullptr,
          need_lb ? static_cast<T*>(t.grad_a.data_ptr()) : nullptr,
          need_ema ? static_cast<T*>(t.grad_b.data_ptr()) : nullptr};
      launch_backward<T>(o, t.grad.numel(), t.layout, scale, total, t.grad_scale, grad, stream);
    });
  } else if (t.need_scale) {
    torch::stable::zero_(t.grad_scale);
  }
  return {t.grad_a, t.grad_b, t.grad_scale};
}

MANPP_CUDA_OPERATORS(m) {
  m.impl("scale_bias_mix", TORCH_BOX(&scale_bias_mix));
  m.impl("scale_bias_mix_backward", TORCH_BOX(&scale_bias_mix_backward));
}

} // namespace manpp::cuda
