// The backward pass of scale_bias_mix on the GPU: both input gradients and, in the same pass over the data, the gradient
// of scale, summed in a fixed order.
#include <algorithm>
#include <tuple>

#include "scale_bias_mix.cuh"

namespace manpp::cuda {

namespace {

constexpr const char* kName = "scale_bias_mix_backward";
constexpr int kFlight = 2; // vectors of each operand that a thread keeps in flight
constexpr int64_t kSegment = 1024; // elements of a row that up to a warp sums up, at least
constexpr int64_t kMostShares = 16384; // of one row: more work a warp beyond, for one block adds them up
constexpr int64_t kPixels = 64; // of channels_last that a block sums up, at least
constexpr int64_t kMostBlocks = 2048; // of pixels, for the same reason

template <class T>
struct Operands {
  const T* grad;
  const T* a; // null where the gradient of scale is not wanted, and b with it
  const T* b;
  T* grad_a; // null where not wanted
  T* grad_b;
};

// Both gradients of kFlight vectors, `stride` elements apart; add(k, x) takes the share of element k of a vector in the
// gradient of scale. scale(k) and rest(k) are its factors.
template <class T, int V, class Scale, class Add>
__device__ __forceinline__ void backward_vectors(
    const Operands<T>& o, int64_t first, int64_t end, int64_t stride, Arithmetic<T> total, const Scale& scale,
    const Add& add) {
  using A = Arithmetic<T>;
  Packed<T, V> packed_g[kFlight];
  Packed<T, V> packed_x[kFlight];
  Packed<T, V> packed_y[kFlight];
#pragma unroll
  for (int i = 0; i < kFlight; ++i) {
    int64_t at = first + i * stride;
    if (at < end) {
      packed_g[i].load(o.grad + at);
      if (o.a != nullptr) {
        packed_x[i].load(o.a + at);
        packed_y[i].load(o.b + at);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kFlight; ++i) {
    int64_t at = first + i * stride;
    if (at >= end) {
      continue;
    }
    T g[V];
    T x[V];
    T y[V];
    packed_g[i].unpack(g);
    if (o.a != nullptr) {
      packed_x[i].unpack(x);
      packed_y[i].unpack(y);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        add(k, scale_grad(static_cast<A>(g[k]), static_cast<A>(x[k]), static_cast<A>(y[k])));
      }
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      A value = static_cast<A>(g[k]);
      x[k] = static_cast<T>(scale(k) * value);
      y[k] = static_cast<T>((total - scale(k)) * value);
    }
    if (o.grad_a != nullptr) {
      store_vector(o.grad_a + at, x);
    }
    if (o.grad_b != nullptr) {
      store_vector(o.grad_b + at, y);
    }
  }
}

// How rows of one channel each are cut: `lanes` threads (a power of two, up to a warp) sum up a segment.
struct Rows {
  int64_t count; // of segments
  int64_t length; // of a row
  int64_t segment;
  int64_t per_row;
  int64_t channels;
  int lanes;
};

// shares[segment number] is a segment's sum. V is 1 where rows are not whole vectors.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    backward_rows_kernel(Operands<T> o, const Rows rows, ScaleSource<Arithmetic<T>> source, double* __restrict__ shares) {
  using A = Arithmetic<T>;
  int lane = threadIdx.x & (rows.lanes - 1);
  int64_t segment = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / rows.lanes;
  A sum = 0;
  if (segment < rows.count) { // and not: return otherwise, for the shuffles below take all lanes of a warp
    int64_t row = segment / rows.per_row;
    int64_t begin = row * rows.length + (segment - row * rows.per_row) * rows.segment;
    int64_t end = min(begin + rows.segment, (row + 1) * rows.length);
    A s = source.scale(row % rows.channels);
    int64_t stride = rows.lanes * V;
    for (int64_t at = begin + lane * V; at < end; at += stride * kFlight) {
      backward_vectors<T, V>(
          o, at, end, stride, static_cast<A>(source.total), [&](int) { return s; }, [&](int, A x) { sum += x; });
    }
  }
  if (shares == nullptr) {
    return;
  }
  double total = static_cast<double>(sum);
  for (int offset = rows.lanes / 2; offset > 0; offset /= 2) {
    total += __shfl_down_sync(0xFFFFFFFFu, total, offset); // right in a segment's first lane, which alone counts
  }
  if (lane == 0 && segment < rows.count) {
    shares[segment] = total;
  }
}

// channels_last: `width` threads side by side (a power of two) take V neighbouring channels each, blockIdx.y counting
// such groups, and those after them the next pixels. shares[block][channel].
template <class T, int V>
__global__ void __launch_bounds__(kThreads) backward_pixels_kernel(
    Operands<T> o, int64_t pixels, int64_t per_block, int64_t channels, int width, ScaleSource<Arithmetic<T>> source,
    double* __restrict__ shares) {
  using A = Arithmetic<T>;
  __shared__ double sums[kThreads * V];
  int column = threadIdx.x & (width - 1);
  int line = threadIdx.x / width;
  int lines = kThreads / width;
  int64_t channel = (static_cast<int64_t>(blockIdx.y) * width + column) * V;
  A sum[V] = {};
  if (channel < channels) {
    A s[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      s[k] = source.scale(channel + k);
    }
    int64_t first = static_cast<int64_t>(blockIdx.x) * per_block;
    int64_t end = min(first + per_block, pixels) * channels;
    int64_t stride = lines * channels;
    for (int64_t at = (first + line) * channels + channel; at < end; at += stride * kFlight) {
      backward_vectors<T, V>(
          o, at, end, stride, static_cast<A>(source.total), [&](int k) { return s[k]; },
          [&](int k, A x) { sum[k] += x; });
    }
  }
  if (shares == nullptr) {
    return;
  }
#pragma unroll
  for (int k = 0; k < V; ++k) {
    sums[k * kThreads + threadIdx.x] = static_cast<double>(sum[k]);
  }
  __syncthreads();
  if (line == 0 && channel < channels) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      double total = 0;
      for (int i = 0; i < lines; ++i) {
        total += sums[k * kThreads + i * width + column];
      }
      shares[static_cast<int64_t>(blockIdx.x) * channels + channel + k] = total;
    }
  }
}

// A block a channel: out[c] = the sum of shares[(o channels + c) segments + s] over o and s, always in the same order.
__global__ void __launch_bounds__(kThreads) sum_shares_kernel(
    const double* __restrict__ shares, uint32_t count, int64_t segments, const Divider by_segments, void* out,
    DType type) {
  int64_t channels = gridDim.x;
  int64_t channel = blockIdx.x;
  double sum = 0;
#pragma unroll 8
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
    int64_t outer = by_segments.quotient(i);
    sum += shares[(outer * channels + channel) * segments + (i - outer * segments)];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    write_scalar(out, type, channel, sum);
  }
}

// The smallest power of two from `n` up, or `most`.
int power_of_two(int64_t n, int most) {
  int power = 1;
  while (power < most && power < n) {
    power *= 2;
  }
  return power;
}

template <class T>
void launch_backward(
    const Operands<T>& o, const ChannelLayout& layout, const Tensor& scale, double total,
    Tensor& grad_scale, const Tensor& like, cudaStream_t stream) {
  constexpr int V = vector_length(sizeof(T));
  ScaleSource<Arithmetic<T>> source{scale.data_ptr(), dtype_of(scale), total};
  bool need_share = o.a != nullptr;
  bool aligned = aligned16(o.grad) && aligned16(o.a) && aligned16(o.b) && aligned16(o.grad_a) && aligned16(o.grad_b);
  int64_t channels = layout.channels;
  int64_t outer = layout.outer; // shares are [outer][channels][segments]
  int64_t segments = 1;
  Tensor buffer;
  double* shares = nullptr;
  auto make_shares = [&] {
    if (need_share) {
      STD_TORCH_CHECK(outer * segments <= kDividerLimit, "manpp_kernels: the tensor is too large for one launch");
      buffer = scratch(like, outer * channels * segments * static_cast<int64_t>(sizeof(double)));
      shares = static_cast<double*>(buffer.data_ptr());
    }
  };
  if (channels > 1 && layout.inner == 1) {
    bool vectors = aligned && channels % V == 0;
    int64_t groups = channels / (vectors ? V : 1);
    int width = power_of_two(groups, kThreads);
    int64_t per_block = std::max(kPixels, (layout.outer + kMostBlocks - 1) / kMostBlocks);
    outer = blocks_for(layout.outer, per_block);
    make_shares();
    dim3 grid(static_cast<uint32_t>(outer), blocks_for(groups, width));
    STD_TORCH_CHECK(grid.y <= 65535, "manpp_kernels: more than 16 million channels");
    auto kernel = vectors ? backward_pixels_kernel<T, V> : backward_pixels_kernel<T, 1>;
    launch_kernel(kName, kernel, grid, stream, o, layout.outer, per_block, channels, width, source, shares);
  } else {
    Rows rows;
    bool vectors = aligned && layout.inner % V == 0;
    int64_t share_of_row = (layout.inner + kMostShares - 1) / kMostShares;
    rows.length = layout.inner;
    rows.segment = std::max(kSegment, (share_of_row + kSegment - 1) / kSegment * kSegment); // whole vectors
    rows.per_row = segments = (rows.length + rows.segment - 1) / rows.segment;
    rows.channels = channels;
    rows.count = outer * channels * segments;
    rows.lanes = power_of_two(rows.length / (vectors ? V : 1), 32);
    make_shares();
    auto kernel = vectors ? backward_rows_kernel<T, V> : backward_rows_kernel<T, 1>;
    launch_kernel(kName, kernel, blocks_for(rows.count, kThreads / rows.lanes), stream, o, rows, source, shares);
  }
  if (need_share) {
    launch_kernel(
        "sum_shares",
        sum_shares_kernel,
        static_cast<uint32_t>(channels),
        stream,
        shares,
        static_cast<uint32_t>(outer * segments),
        segments,
        Divider(segments),
        grad_scale.data_ptr(),
        dtype_of(grad_scale));
  }
}

} // namespace

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
      launch_backward<T>(o, t.layout, scale, total, t.grad_scale, grad, stream);
    });
  } else if (t.need_scale) {
    torch::stable::zero_(t.grad_scale);
  }
  return {t.grad_a, t.grad_b, t.grad_scale};
}

MANPP_CUDA_OPERATORS(m) {
  m.impl("scale_bias_mix_backward", TORCH_BOX(&scale_bias_mix_backward));
}

} // namespace manpp::cuda
