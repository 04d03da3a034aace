// The backward pass of the effective weights on the GPU: the gradient of every bias and, in the same pass over the
// data, that of scale, summed per group in a fixed order.
#include <algorithm>
#include <memory>
#include <numeric>

#include "chunks.cuh"
#include "ema_scale_update.h"
#include "reduce.cuh"

namespace manpp::cuda {

namespace {

// Groups of one launch, at most: where they end is a kernel parameter, beside the table of the tensors.
constexpr int32_t kMostGroups = 256;
static_assert(kMostGroups <= kMostArrivals);

// The sums of a launch's groups. Its chunks come group by group, those of group `first` + i ending before ends[i], so
// that the shares of a group lie side by side, and its last chunk to arrive adds up only those.
struct Sums {
  double* shares = nullptr; // a chunk each; null where the gradient of scale is not wanted
  uint32_t* counters = nullptr; // a group each
  void* grad_scale = nullptr;
  DType type = DType::f32;
  int32_t first = 0;
  int32_t count = 0;
  uint32_t ends[kMostGroups];

  __device__ __forceinline__ uint32_t begin(int32_t group) const {
    return group == 0 ? 0 : ends[group - 1];
  }
};

static_assert(sizeof(ParameterTable<true, kMostTensors<true>>) + sizeof(Sums) + 64 <= 32764);

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
  for (int first = threadIdx.x; first < c.n; first += kBatch * kThreads) {
    T g[kBatch]{};
    T b[kBatch]{};
    T e[kBatch]{};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      int at = first + i * kThreads;
      if (at < c.n) {
        g[i] = grad[at];
        if (need_share) {
          b[i] = bias[at];
          e[i] = ema[at];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      int at = first + i * kThreads;
      if (at < c.n) {
        sum += scale_grad(static_cast<float>(g[i]), static_cast<float>(b[i]), static_cast<float>(e[i]));
        if (out != nullptr) {
          out[at] = static_cast<T>(scale * static_cast<float>(g[i]));
        }
      }
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

// A chunk's part in the sums, in thread 0's `share`; the last chunk of a group writes its sum.
__device__ __forceinline__ void add_to_group(const Sums& sums, int32_t group, double share) {
  int32_t i = group - sums.first;
  uint32_t begin = sums.begin(i);
  uint32_t count = sums.ends[i] - begin;
  bool last = add_shares(sums.shares + begin, sums.counters + i, count, blockIdx.x - begin, 1, share);
  if (last && threadIdx.x == 0) {
    write_scalar(sums.grad_scale, sums.type, group, share);
  }
  if (blockIdx.x == 0) { // no chunk would write the sums of groups without elements
#pragma unroll 1
    for (int32_t other = threadIdx.x; other < sums.count; other += kThreads) {
      if (sums.begin(other) == sums.ends[other]) {
        write_scalar(sums.grad_scale, sums.type, sums.first + other, 0.0);
      }
    }
  }
}

// T is the dtype all operands share, or void for any mix of dtypes. Four blocks a multiprocessor: see typed_kernel in
// the forward pass.
template <class Source, class T>
__global__ void __launch_bounds__(kThreads, 4) backward_kernel(
    const Source __grid_constant__ source, const void* scales, DType scale_type, const Sums __grid_constant__ sums) {
  Chunk c = source.get(blockIdx.x);
  bool need_share = sums.shares != nullptr;
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
    add_to_group(sums, c.group, block_sum(sum));
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
    const Source& source, uint32_t chunks, DType common, const Tensor& scale, const Sums& sums, cudaStream_t stream) {
  const void* scales = scale_entries(scale);
  DType type = dtype_of(scale);
  auto run = [&](auto kernel) {
    launch_kernel("ema_scale_update_backward", kernel, chunks, stream, source, scales, type, sums);
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

// One launch, where there is anything to do. Where sums has a place for them, it names the groups, and the entries come
// group by group.
void run_once(const std::vector<Entry>& entries, const Tensor& scale, Sums& sums, cudaStream_t stream) {
  uint32_t chunks = count_chunks(entries);
  if (chunks == 0) {
    return;
  }
  Tensor shares;
  Arrivals counters;
  if (sums.grad_scale != nullptr) {
    std::fill_n(sums.ends, sums.count, 0);
    for (const Entry& e : entries) {
      sums.ends[e.group - sums.first] += static_cast<uint32_t>((e.numel + kChunk - 1) / kChunk);
    }
    std::partial_sum(sums.ends, sums.ends + sums.count, sums.ends);
    shares = scratch(scale, static_cast<int64_t>(chunks) * sizeof(double));
    counters = arrivals(scale, stream, static_cast<uint32_t>(sums.count));
    sums.shares = static_cast<double*>(shares.data_ptr());
    sums.counters = counters.counters;
  }
  DType common = common_type(entries);
  launch_over<true>(entries, scale, stream, [&](const auto& table, uint32_t count) {
    launch(table, count, common, scale, sums, stream);
  });
}

// With the gradient of scale: one launch, unless there are more groups than it takes.
void run_with_sums(std::vector<Entry>& entries, const Tensor& scale, Tensor grad_scale, cudaStream_t stream) {
  int64_t groups = grad_scale.numel();
  STD_TORCH_CHECK(groups == scale.numel(), "manpp_kernels: grad_scale has to have as many entries as scale");
  auto earlier = [](const Entry& a, const Entry& b) { return a.group < b.group; };
  if (!std::is_sorted(entries.begin(), entries.end(), earlier)) {
    std::stable_sort(entries.begin(), entries.end(), earlier);
  }
  if (groups > kMostGroups || count_chunks(entries) == 0) {
    torch::stable::zero_(grad_scale); // no launch below knows of all the groups without elements
  }
  auto sums = std::make_unique<Sums>();
  sums->grad_scale = grad_scale.data_ptr();
  sums->type = dtype_of(grad_scale);
  if (groups <= kMostGroups) {
    sums->count = static_cast<int32_t>(groups);
    run_once(entries, scale, *sums, stream);
    return;
  }
  for (auto begin = entries.begin(); begin != entries.end();) {
    sums->first = begin->group;
    sums->count = static_cast<int32_t>(std::min<int64_t>(kMostGroups, groups - sums->first));
    auto end = std::find_if(begin, entries.end(), [&](const Entry& e) { return e.group - sums->first >= kMostGroups; });
    run_once({begin, end}, scale, *sums, stream);
    begin = end;
  }
}

} // namespace

void backward_of_entries(std::vector<Entry>& entries, const Tensor& scale, const std::optional<Tensor>& grad_scale) {
  DeviceGuard guard(scale.get_device_index());
  cudaStream_t stream = current_stream(scale.get_device_index());
  if (grad_scale) {
    run_with_sums(entries, scale, *grad_scale, stream);
  } else {
    Sums none;
    run_once(entries, scale, none, stream);
  }
}

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
  check_groups(groups, scale);
  Table table = build_backward_table(grad, bias, ema, groups, grad_bias);
  backward_of_entries(table.entries, scale, bias.empty() ? std::nullopt : grad_scale);
  table.finish();
}

MANPP_CUDA_OPERATORS(m) {
  m.impl("ema_scale_update_backward", TORCH_BOX(&ema_scale_update_backward));
}

} // namespace manpp::cuda
