// The backward pass of the effective weights on the GPU: the gradient of every bias and, in the same pass over the
// data, that of scale, summed per group in a fixed order.
#include <memory>

#include "chunks.cuh"

namespace manpp::cuda {

namespace {

// A chunk's share of the gradient of one entry of scale.
struct alignas(16) Share {
  double sum;
  int32_t group;
};

template <class T>
__device__ __forceinline__ float typed_share(const Chunk& c, float scale, bool need_share) {
  constexpr int kVector = vector_length(sizeof(T));
  constexpr int kPasses = kChunk / (kThreads * kVector);
  const T* grad = static_cast<const T*>(c.param);
  const T* bias = static_cast<const T*>(c.bias);
  const T* ema = static_cast<const T*>(c.ema);
  T* out = static_cast<T*>(c.out);
  float sum = 0;
  bool whole = c.n == kChunk && aligned16(grad) && aligned16(out) && aligned16(bias) && aligned16(ema);
  if (whole) {
    T g[kPasses][kVector];
    T b[kPasses][kVector];
    T e[kPasses][kVector];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      int at = (i * kThreads + threadIdx.x) * kVector;
      load_vector(grad + at, g[i]);
      if (need_share) {
        load_vector(bias + at, b[i]);
        load_vector(ema + at, e[i]);
      }
    }
    if (need_share) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          sum += scale_grad(static_cast<float>(g[i][k]), static_cast<float>(b[i][k]), static_cast<float>(e[i][k]));
        }
      }
    }
    if (out != nullptr) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          g[i][k] = static_cast<T>(scale * static_cast<float>(g[i][k]));
        }
        store_vector(out + (i * kThreads + threadIdx.x) * kVector, g[i]);
      }
    }
    return sum;
  }
  for (int at = threadIdx.x; at < c.n; at += kThreads) {
    float g = static_cast<float>(grad[at]);
    if (need_share) {
      sum += scale_grad(g, static_cast<float>(bias[at]), static_cast<float>(ema[at]));
    }
    if (out != nullptr) {
      out[at] = static_cast<T>(scale * g);
    }
  }
  return sum;
}

template <class A>
__device__ double any_share(const Chunk& c, const void* scales, DType scale_type, bool need_share) {
  A scale = read_scalar<A>(scales, scale_type, c.group);
  A sum = 0;
  for (int at = threadIdx.x; at < c.n; at += kThreads) {
    A g = read_scalar<A>(c.param, c.param_type, at);
    if (need_share) {
      sum += scale_grad(g, read_scalar<A>(c.bias, c.bias_type, at), read_scalar<A>(c.ema, c.ema_type, at));
    }
    if (c.out != nullptr) {
      write_scalar(c.out, c.bias_type, at, scale * g);
    }
  }
  return static_cast<double>(sum);
}

// T is the dtype all operands share, or void for any mix of dtypes.
template <class Source, class T>
__global__ void __launch_bounds__(kThreads) backward_kernel(
    const Source __grid_constant__ source, const void* scales, DType scale_type, Share* __restrict__ shares) {
  Chunk c = source.get(blockIdx.x);
  bool need_share = shares != nullptr;
  double sum;
  if constexpr (std::is_void_v<T>) {
    bool wide =
        c.ema_type == DType::f64 || c.param_type == DType::f64 || (c.bias != nullptr && c.bias_type == DType::f64);
    sum = wide ? any_share<double>(c, scales, scale_type, need_share)
               : any_share<float>(c, scales, scale_type, need_share);
  } else {
    sum = typed_share<T>(c, read_scalar<float>(scales, scale_type, c.group), need_share);
  }
  if (need_share) {
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
      shares[blockIdx.x] = Share{sum, c.group};
    }
  }
}

// A block a group: adds up the shares of its chunks, always in the same order.
__global__ void __launch_bounds__(kThreads)
    sum_shares_kernel(const Share* __restrict__ shares, uint32_t chunks, void* grad_scale, DType type) {
  double sum = 0;
  for (uint32_t i = threadIdx.x; i < chunks; i += kThreads) {
    Share share = shares[i];
    sum += share.group == static_cast<int32_t>(blockIdx.x) ? share.sum : 0.0;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    write_scalar(grad_scale, type, blockIdx.x, sum);
  }
}

// The dtype that every operand of every tensor has; f64 stands for "mixed", whose kernel takes float64 too.
DType common_type(const std::vector<Entry>& entries) {
  DType type = DType::f64;
  bool first = true;
  for (const Entry& e : entries) {
    if (e.numel == 0) {
      continue;
    }
    if (first) {
      type = e.param_type;
      first = false;
    }
    bool same = e.param_type == type && e.bias_type == type && (e.bias == nullptr || e.ema_type == type);
    if (!same) {
      return DType::f64;
    }
  }
  return type;
}

template <class Source>
void launch(
    const Source& source, uint32_t chunks, DType common, const Tensor& scale, Share* shares, cudaStream_t stream) {
  const void* scales = scale.data_ptr();
  DType type = dtype_of(scale);
  auto run = [&](auto kernel) {
    launch_kernel("ema_scale_update_backward", kernel, chunks, stream, source, scales, type, shares);
  };
  switch (common) {
    case DType::f32:
      run(backward_kernel<Source, float>);
      break;
    case DType::bf16:
      run(backward_kernel<Source, BFloat16>);
      break;
    case DType::f16:
      run(backward_kernel<Source, Half>);
      break;
    default:
      run(backward_kernel<Source, void>);
  }
}

} // namespace

void ema_scale_update_backward(
    std::vector<Tensor> grad,
    std::vector<Tensor> bias,
    std::vector<Tensor> ema,
    Tensor scale,
    std::vector<int64_t> groups,
    double total,
    std::vector<Tensor> grad_bias,
    std::optional<Tensor> grad_scale) {
  DeviceGuard guard(scale.get_device_index());
  cudaStream_t stream = current_stream(scale.get_device_index());
  Table table = build_backward_table(grad, bias, ema, groups, grad_bias);
  uint32_t chunks = count_chunks(table.entries);
  bool need_share = grad_scale && !bias.empty();
  Tensor buffer = scratch(scale, need_share ? static_cast<int64_t>(chunks) * sizeof(Share) : 0);
  Share* shares = need_share ? static_cast<Share*>(buffer.data_ptr()) : nullptr;
  if (chunks > 0) {
    DType common = common_type(table.entries);
    if (table.entries.size() <= static_cast<size_t>(ParameterTable<true>::kCapacity)) {
      auto parameters = std::make_unique<ParameterTable<true>>();
      fill_table(table.entries, 0, table.entries.size(), *parameters);
      launch(*parameters, chunks, common, scale, shares, stream);
    } else {
      Tensor chunk_buffer = scratch(scale, static_cast<int64_t>(chunks) * sizeof(Chunk));
      Chunk* target = static_cast<Chunk*>(chunk_buffer.data_ptr());
      write_chunks(table.entries, true, target, stream);
      launch(DeviceTable{target}, chunks, common, scale, shares, stream);
    }
  }
  if (need_share) {
    uint32_t count = static_cast<uint32_t>(grad_scale->numel());
    if (count > 0) {
      launch_kernel(
          "sum_shares",
          sum_shares_kernel,
          count,
          stream,
          shares,
          chunks,
          grad_scale->data_ptr(),
          dtype_of(*grad_scale));
    }
  }
  table.finish();
}

MANPP_CUDA_OPERATORS(m) {
  m.impl("ema_scale_update_backward", TORCH_BOX(&ema_scale_update_backward));
}

} // namespace manpp::cuda
