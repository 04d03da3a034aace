// The backward pass of scale_bias_mix on the GPU: both input gradients and, in the same pass over the data, the gradient
// of scale, summed in a fixed order.
#include <algorithm>
#include <tuple>

#include "reduce.cuh"
#include "scale_bias_mix.cuh"

namespace manpp::cuda {

namespace {

constexpr const char* kName = "scale_bias_mix_backward";
// Vectors of each operand that a thread keeps in flight: of a row, which may be short, and of pixels.
constexpr int kRowFlight = 2;
constexpr int kPixelFlight = 4;
constexpr int64_t kSegment = 512; // elements of a row that up to a warp takes at a time
// Blocks of a launch that sums, at most: many times what the largest GPUs run at once, so that they end together. Each
// leaves a share for every sum it has a part in, of pixels many: at most 2.5 % of the bytes of the five maps.
constexpr int64_t kRowBlocks = 65536;
constexpr int64_t kPixelBlocks = 32768;

template <class T>
struct Operands {
  const T* grad;
  const T* a; // null where the gradient of scale is not wanted, and b with it
  const T* b;
  T* grad_a; // null where not wanted
  T* grad_b;
};

// A vector in accesses of 16 bytes, each an instruction: left to itself, the compiler takes these stores apart where it
// has unrolled the loop around them.
template <class T, int V>
__device__ __forceinline__ void store_whole(T* p, const T (&x)[V]) {
#ifdef __CUDA_ARCH__
  if constexpr (V > 1) {
    Packed<T, V> packed;
    packed.pack(x);
#pragma unroll
    for (int i = 0; i < Packed<T, V>::kWords; ++i) {
      uint4 w = packed.words[i];
      size_t at = __cvta_generic_to_global(reinterpret_cast<uint4*>(p) + i);
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                   :
                   : "l"(at), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w)
                   : "memory");
    }
    return;
  }
#endif
  store_vector(p, x);
}

// Both gradients of Flight vectors, `stride` elements apart; add(k, x) takes the share of element k of a vector in the
// gradient of scale. scale(k) and rest(k) are its factors.
template <int Flight, class T, int V, class Scale, class Add>
__device__ __forceinline__ void backward_vectors(
    const Operands<T>& o, int64_t first, int64_t end, int64_t stride, Arithmetic<T> total, const Scale& scale,
    const Add& add) {
  using A = Arithmetic<T>;
  Packed<T, V> packed_g[Flight];
  Packed<T, V> packed_x[Flight];
  Packed<T, V> packed_y[Flight];
#pragma unroll
  for (int i = 0; i < Flight; ++i) {
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
  for (int i = 0; i < Flight; ++i) {
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
      store_whole(o.grad_a + at, x);
    }
    if (o.grad_b != nullptr) {
      store_whole(o.grad_b + at, y);
    }
  }
}

// Sums of a launch, and how their blocks leave them. A unit is a sum, or a few side by side; unit b % units is that of
// block b, so that blocks side by side in time read what is side by side in memory.
struct Sums {
  uint32_t units = 1;
  uint32_t slices = 1; // blocks of a unit
  double* shares = nullptr; // [unit][place][column]
  uint32_t* counters = nullptr; // [unit][step of the sum]
  void* grad_scale = nullptr; // null where it is not wanted
  DType type = DType::f32;

  // Ends a block's part, `value`, in the sums of its unit; true in the unit's last block, which has the sums then.
  __device__ __forceinline__ bool add(uint32_t unit, uint32_t slice, uint32_t columns, double& value) const {
    double* places = shares + static_cast<int64_t>(unit) * places_of(slices) * columns;
    return add_shares_of_teams(places, counters + unit * counters_of(slices), slices, slice, columns, value);
  }
};

// Rows of one channel each, in pieces of up to kSegment elements; `lanes` threads (a power of two, up to a warp) take a
// piece at a time.
struct Rows {
  int64_t length;
  int64_t channels;
  uint32_t per_row; // pieces
  uint32_t pieces; // of a channel
  uint32_t lanes;
};

// V is 1 where rows are not whole vectors.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    backward_rows_kernel(Operands<T> o, const Rows rows, ScaleSource<Arithmetic<T>> source, const Sums sums) {
  using A = Arithmetic<T>;
  uint32_t channel = blockIdx.x % sums.units;
  uint32_t slice = blockIdx.x / sums.units;
  uint32_t lane = threadIdx.x & (rows.lanes - 1);
  uint32_t teams = kThreads / rows.lanes;
  A s = source.scale(channel);
  double total = 0;
  for (uint32_t piece = slice * teams + threadIdx.x / rows.lanes; piece < rows.pieces; piece += sums.slices * teams) {
    uint32_t outer = piece / rows.per_row;
    int64_t row = (outer * rows.channels + channel) * rows.length;
    int64_t begin = row + (piece - outer * rows.per_row) * kSegment;
    int64_t end = min(begin + kSegment, row + rows.length);
    int64_t stride = rows.lanes * V;
    A sum = 0;
    for (int64_t at = begin + lane * V; at < end; at += stride * kRowFlight) {
      backward_vectors<kRowFlight, T, V>(
          o, at, end, stride, static_cast<A>(source.total), [&](int) { return s; }, [&](int, A x) { sum += x; });
    }
    total += static_cast<double>(sum);
  }
  if (sums.grad_scale == nullptr) {
    return;
  }
  total = block_sum(total);
  if (sums.add(channel, slice, 1, total) && threadIdx.x == 0) {
    write_scalar(sums.grad_scale, sums.type, channel, total);
  }
}

// Threads side by side along the channels: of a block, 256 bytes of them, which of up to 64 float32 channels is all, so
// that it reads without gaps.
template <class T, int V>
constexpr int kWidth = V == 1 ? 32 : 256 / (V * static_cast<int>(sizeof(T)));

// channels_last: `width` threads (a power of two) take V neighbouring channels each, and those after them the next
// pixels. Such a stretch of channels is a unit.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) backward_pixels_kernel(
    Operands<T> o, int64_t pixels, int64_t per_slice, int64_t channels, int width, ScaleSource<Arithmetic<T>> source,
    const Sums sums) {
  using A = Arithmetic<T>;
  __shared__ double parts[kThreads / 32][kWidth<T, V> * V];
  uint32_t unit = blockIdx.x % sums.units;
  uint32_t slice = blockIdx.x / sums.units;
  int column = threadIdx.x & (width - 1);
  int line = threadIdx.x / width;
  int lines = kThreads / width;
  int64_t channel = (static_cast<int64_t>(unit) * width + column) * V;
  A sum[V] = {};
  if (channel < channels) {
    A s[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      s[k] = source.scale(channel + k);
    }
    int64_t first = slice * per_slice;
    int64_t end = min(first + per_slice, pixels) * channels;
    int64_t stride = lines * channels;
    for (int64_t at = (first + line) * channels + channel; at < end; at += stride * kPixelFlight) {
      backward_vectors<kPixelFlight, T, V>(
          o, at, end, stride, static_cast<A>(source.total), [&](int k) { return s[k]; },
          [&](int k, A x) { sum[k] += x; });
    }
  }
  if (sums.grad_scale == nullptr) {
    return;
  }
#pragma unroll
  for (int k = 0; k < V; ++k) {
    double total = static_cast<double>(sum[k]);
    for (int offset = 16; offset >= width; offset /= 2) { // the lines of a warp
      total += __shfl_down_sync(0xFFFFFFFFu, total, offset);
    }
    if (static_cast<int>(threadIdx.x) % 32 < width) {
      parts[threadIdx.x / 32][column * V + k] = total;
    }
  }
  __syncthreads();
  uint32_t columns = width * V;
  double total = 0;
  if (threadIdx.x < columns) {
    for (int i = 0; i < kThreads / 32; ++i) {
      total += parts[i][threadIdx.x];
    }
  }
  int64_t own = static_cast<int64_t>(unit) * columns + threadIdx.x;
  if (sums.add(unit, slice, columns, total) && threadIdx.x < columns && own < channels) {
    write_scalar(sums.grad_scale, sums.type, own, total);
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
    const Operands<T>& o, const ChannelLayout& layout, const Tensor& scale, double total, Tensor* grad_scale,
    cudaStream_t stream) {
  constexpr int V = vector_length(sizeof(T));
  ScaleSource<Arithmetic<T>> source{scale_entries(scale), dtype_of(scale), total};
  bool aligned = aligned16(o.grad) && aligned16(o.a) && aligned16(o.b) && aligned16(o.grad_a) && aligned16(o.grad_b);
  int64_t channels = layout.channels;
  Sums sums;
  Tensor shares;
  Arrivals counters;
  // `most` slices have work to do; `columns` numbers are a unit's share.
  auto divide = [&](int64_t units, int64_t most, int64_t columns, int64_t blocks) {
    if (grad_scale != nullptr) {
      most = std::min(most, units > kMostArrivals / 2 ? 1 : std::max<int64_t>(1, blocks / units));
      sums.grad_scale = grad_scale->data_ptr();
      sums.type = dtype_of(*grad_scale);
    }
    if (grad_scale != nullptr && most > 1) {
      uint32_t slices = static_cast<uint32_t>(most);
      shares = scratch(scale, units * places_of(slices) * columns * static_cast<int64_t>(sizeof(double)));
      counters = arrivals(scale, stream, static_cast<uint32_t>(units) * counters_of(slices));
      sums.shares = static_cast<double*>(shares.data_ptr());
      sums.counters = counters.counters;
    }
    uint32_t grid = blocks_for(units * most, 1);
    sums.units = static_cast<uint32_t>(units);
    sums.slices = static_cast<uint32_t>(most);
    return grid;
  };
  auto blocks_of = [](int64_t items, int64_t per_block) { return (items + per_block - 1) / per_block; };
  if (channels > 1 && layout.inner == 1) {
    bool vectors = aligned && channels % V == 0;
    int64_t groups = channels / (vectors ? V : 1);
    int width = power_of_two(groups, vectors ? kWidth<T, V> : kWidth<T, 1>);
    int64_t at_once = static_cast<int64_t>(kPixelFlight) * kThreads / width; // pixels
    uint32_t blocks =
        divide(blocks_of(groups, width), blocks_of(layout.outer, at_once), width * (vectors ? V : 1), kPixelBlocks);
    int64_t per_slice = blocks_of(layout.outer, sums.slices);
    auto kernel = vectors ? backward_pixels_kernel<T, V> : backward_pixels_kernel<T, 1>;
    launch_kernel(kName, kernel, blocks, stream, o, layout.outer, per_slice, channels, width, source, sums);
  } else {
    bool vectors = aligned && layout.inner % V == 0;
    int64_t per_row = blocks_of(layout.inner, kSegment);
    int lanes = power_of_two(std::min(layout.inner, kSegment) / (vectors ? V : 1), 32);
    uint32_t pieces = blocks_for(layout.outer * per_row, 1); // below 2^31: a piece's number and its step fit 32 bits
    Rows rows{layout.inner, channels, static_cast<uint32_t>(per_row), pieces, static_cast<uint32_t>(lanes)};
    uint32_t blocks = divide(channels, blocks_of(pieces, kThreads / lanes), 1, kRowBlocks);
    auto kernel = vectors ? backward_rows_kernel<T, V> : backward_rows_kernel<T, 1>;
    launch_kernel(kName, kernel, blocks, stream, o, rows, source, sums);
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
      launch_backward<T>(o, t.layout, scale, total, t.need_scale ? &t.grad_scale : nullptr, stream);
    });
  } else if (t.need_scale) {
    torch::stable::zero_(t.grad_scale);
  }
  return t.results();
}

MANPP_CUDA_OPERATORS(m) {
  m.impl("scale_bias_mix_backward", TORCH_BOX(&scale_bias_mix_backward));
}

} // namespace manpp::cuda
