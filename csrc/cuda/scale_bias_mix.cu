// scale_bias_mix on the GPU, forward: kernel, launch and operator. (Its backward pass: scale_bias_mix_backward.cu.)
#include "../scale_bias_mix.h"
#include "scale_bias_mix.cuh"

namespace manpp::cuda {

namespace {

// How the scale of an element is found. A vector of consecutive elements lies in one channel (Row), in as many channels
// as it has elements (Pixel), or anywhere (Each); Any is for single elements, where addresses or sizes are odd.
enum class Mode { Scalar, Row, Pixel, Each, Any };

constexpr int kPasses = 4; // vectors of each operand that a thread keeps in flight

// The channel of an element: (i / inner) % channels. Only where its block starts is divided in 64 bits.
struct Channels {
  ChannelLayout layout;
  int64_t period; // channels * inner
  Divider by_inner;
  Divider by_channels;
  bool narrow; // numbers within a period, and a block past it, fit the dividers

  explicit Channels(const ChannelLayout& l, int64_t block)
      : layout(l), period(l.channels * l.inner), by_inner(narrowed(l.inner)), by_channels(narrowed(l.channels)),
        narrow(period + block <= kDividerLimit) {}

  // `within` is the number of the block's first element, modulo the period.
  __device__ __forceinline__ int64_t of(int64_t within, int offset) const {
    if (narrow) {
      return by_channels.remainder(by_inner.quotient(static_cast<uint32_t>(within) + offset));
    }
    return (within + offset) / layout.inner % layout.channels;
  }

 private:
  static int64_t narrowed(int64_t n) {
    return n <= kDividerLimit ? n : 1;
  }
};

template <class T, Mode mode>
__global__ void __launch_bounds__(kThreads) mix_kernel(
    const T* __restrict__ a,
    const T* __restrict__ b,
    T* __restrict__ out,
    int64_t n,
    const Channels channels,
    ScaleSource<Arithmetic<T>> source) {
  using A = Arithmetic<T>;
  constexpr int V = mode == Mode::Any ? 1 : vector_length(sizeof(T));
  const A total = static_cast<A>(source.total);
  const int64_t base = static_cast<int64_t>(blockIdx.x) * kThreads * V * kPasses;
  const int64_t within = mode == Mode::Scalar ? 0 : base % channels.period;
  if constexpr (mode == Mode::Any) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      int offset = i * kThreads + threadIdx.x;
      int64_t at = base + offset;
      if (at < n) {
        A s = source.scale(channels.of(within, offset));
        out[at] = static_cast<T>(scale_mix(static_cast<A>(a[at]), static_cast<A>(b[at]), s, total - s));
      }
    }
  } else {
    Packed<T, V> packed_x[kPasses];
    Packed<T, V> packed_y[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      int64_t at = base + (i * kThreads + threadIdx.x) * V;
      if (at < n) { // n is a multiple of V in these modes
        packed_x[i].load(a + at);
        packed_y[i].load(b + at);
      }
    }
    A s = mode == Mode::Scalar ? source.scale(0) : A(0);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      int offset = (i * kThreads + threadIdx.x) * V;
      if (base + offset < n) {
        T x[V];
        T y[V];
        packed_x[i].unpack(x);
        packed_y[i].unpack(y);
        int64_t channel = mode == Mode::Scalar ? 0 : channels.of(within, offset);
        if constexpr (mode == Mode::Row) {
          s = source.scale(channel);
        }
#pragma unroll
        for (int k = 0; k < V; ++k) {
          if constexpr (mode == Mode::Pixel) {
            s = source.scale(channel + k);
          } else if constexpr (mode == Mode::Each) {
            s = source.scale(channels.of(within, offset + k));
          }
          x[k] = static_cast<T>(scale_mix(static_cast<A>(x[k]), static_cast<A>(y[k]), s, total - s));
        }
        store_vector(out + base + offset, x);
      }
    }
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
  ScaleSource<Arithmetic<T>> source{scale_entries(scale), dtype_of(scale), total};
  auto run = [&](auto kernel, int length) {
    int64_t block = static_cast<int64_t>(kThreads) * kPasses * length;
    launch_kernel("scale_bias_mix", kernel, blocks_for(n, block), stream, x, y, z, n, Channels(layout, block), source);
  };
  if (!aligned16(x) || !aligned16(y) || !aligned16(z) || n % V != 0) {
    run(mix_kernel<T, Mode::Any>, 1);
  } else if (layout.channels == 1) {
    run(mix_kernel<T, Mode::Scalar>, V);
  } else if (layout.inner % V == 0) {
    run(mix_kernel<T, Mode::Row>, V);
  } else if (layout.inner == 1 && layout.channels % V == 0) {
    run(mix_kernel<T, Mode::Pixel>, V);
  } else {
    run(mix_kernel<T, Mode::Each>, V);
  }
}

} // namespace

Tensor scale_bias_mix(Tensor lb_out, Tensor ema_out, Tensor scale, double total) {
  DeviceGuard guard(lb_out.get_device_index());
  MixInputs in = mix_inputs(lb_out, ema_out, scale);
  Tensor out = new_like(lb_out);
  Tensor result = same_layout(out, in.a) ? out : empty_with_layout(out, in.a);
  if (in.a.numel() > 0) {
    cudaStream_t stream = current_stream(lb_out.get_device_index());
    dispatch(dtype_of(in.a), [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      launch_forward<T>(in.a, in.b, result, in.layout, scale, total, stream);
    });
  }
  if (result.get() != out.get()) {
    copy(out, result);
  }
  return out;
}

MANPP_CUDA_OPERATORS(m) {
  m.impl("scale_bias_mix", TORCH_BOX(&scale_bias_mix));
}

} // namespace manpp::cuda
