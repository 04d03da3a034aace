// ema_scale_update on the GPU: kernel, launch and operator. (Its backward pass: ema_scale_update_backward.cu.)
#include "ema_scale_update.h"

#include <algorithm>
#include <mutex>

#include "../ema_scale_update.h"
#include "chunks.cuh"

namespace manpp::cuda {

namespace {

constexpr const char* kName = "ema_scale_update";

// One operand's dtypes known when compiling: every access is of 16 bytes, all loads are issued before the first use.
template <class E, class P, class B>
struct Typed {
  static constexpr bool kWeights = !std::is_void_v<B>;
  using Bias = std::conditional_t<kWeights, B, P>;
  static constexpr int kVector = vector_length(std::max({sizeof(E), sizeof(P), sizeof(Bias)}));
  static constexpr int kPasses = kChunk / (kThreads * kVector);

  template <bool Stochastic>
  static __device__ __forceinline__ E rounded(float x, uint32_t key, uint32_t element) {
    if constexpr (Stochastic && sizeof(E) == 2) {
      x = round_stochastic<E>(x, random_bits(key, element));
    }
    return static_cast<E>(x);
  }

  template <bool Stochastic>
  static __device__ __forceinline__ void
  element(E& e, P p, Bias b, Bias& w, const Factors<float>& f, uint32_t key, uint32_t number) {
    e = rounded<Stochastic>(ema_step(static_cast<float>(e), static_cast<float>(p), f.keep, f.take), key, number);
    if constexpr (kWeights) {
      w = static_cast<Bias>(scale_mix(static_cast<float>(b), static_cast<float>(e), f.scale, f.rest));
    }
  }

  template <bool Stochastic>
  static __device__ __forceinline__ void run(const Chunk& c, const Factors<float>& f, uint32_t key) {
    E* ema = static_cast<E*>(c.ema);
    const P* param = static_cast<const P*>(c.param);
    const Bias* bias = static_cast<const Bias*>(c.bias);
    Bias* out = static_cast<Bias*>(c.out);
    uint32_t number = static_cast<uint32_t>(c.first);
    bool whole = c.n == kChunk && aligned16(ema) && aligned16(param) &&
        (!kWeights || (aligned16(bias) && aligned16(out)));
    if (whole) {
      E e[kPasses][kVector];
      P p[kPasses][kVector];
      Bias b[kPasses][kVector];
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        int at = (i * kThreads + threadIdx.x) * kVector;
        load_vector(ema + at, e[i]);
        load_vector(param + at, p[i]);
        if constexpr (kWeights) {
          load_vector(bias + at, b[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        int at = (i * kThreads + threadIdx.x) * kVector;
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          element<Stochastic>(e[i][k], p[i][k], b[i][k], b[i][k], f, key, number + at + k);
        }
        store_vector(ema + at, e[i]);
        if constexpr (kWeights) {
          store_vector(out + at, b[i]);
        }
      }
      return;
    }
    // The last chunk of a tensor, and tensors that start off a 16-byte boundary. In batches: see kBatch.
    assume_global(ema);
    assume_global(param);
    if constexpr (kWeights) {
      assume_global(bias);
      assume_global(out);
    }
    for (int first = threadIdx.x; first < c.n; first += kBatch * kThreads) {
      E e[kBatch]{};
      P p[kBatch]{};
      Bias b[kBatch]{};
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        int at = first + i * kThreads;
        if (at < c.n) {
          e[i] = ema[at];
          p[i] = param[at];
          if constexpr (kWeights) {
            b[i] = bias[at];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        int at = first + i * kThreads;
        if (at < c.n) {
          element<Stochastic>(e[i], p[i], b[i], b[i], f, key, number + at);
          ema[at] = e[i];
          if constexpr (kWeights) {
            out[at] = b[i];
          }
        }
      }
    }
  }
};

// Four blocks a multiprocessor: told no number, the compiler aims at so many that some of these kernels spill.
template <class Source, class Operands, bool Stochastic>
__global__ void __launch_bounds__(kThreads, 4) typed_kernel(const Source __grid_constant__ source, const Scalars scalars) {
  Chunk c = source.get(blockIdx.x);
  Factors<float> f = read_factors<float>(scalars, c.group);
  uint32_t key = Stochastic ? random_key(*scalars.seed, c.tensor, static_cast<uint32_t>(c.first >> 32)) : 0;
  Operands::template run<Stochastic>(c, f, key);
}

// Any mix of dtypes, a tensor its own: the dtypes are looked up for each element, the branches are the same for a
// whole block.
template <class A>
__device__ void run_any(const Chunk& c, const Scalars& scalars) {
  Factors<A> f = read_factors<A>(scalars, c.group);
  bool stochastic = scalars.seed != nullptr && element_size(c.ema_type) == 2;
  uint32_t key = stochastic ? random_key(*scalars.seed, c.tensor, static_cast<uint32_t>(c.first >> 32)) : 0;
  uint32_t number = static_cast<uint32_t>(c.first);
  for (int at = threadIdx.x; at < c.n; at += kThreads) {
    A e = read_scalar<A>(c.ema, c.ema_type, at);
    A p = read_scalar<A>(c.param, c.param_type, at);
    e = ema_step(e, p, f.keep, f.take);
    if (stochastic) {
      uint32_t bits = random_bits(key, number + at);
      float x = static_cast<float>(e);
      e = c.ema_type == DType::bf16 ? round_stochastic<BFloat16>(x, bits) : round_stochastic<Half>(x, bits);
    }
    write_scalar(c.ema, c.ema_type, at, e);
    if (c.bias != nullptr) {
      A stored = read_scalar<A>(c.ema, c.ema_type, at); // this thread's own store, rounded
      A b = read_scalar<A>(c.bias, c.bias_type, at);
      write_scalar(c.out, c.bias_type, at, scale_mix(b, stored, f.scale, f.rest));
    }
  }
}

template <class Source>
__global__ void __launch_bounds__(kThreads) mixed_kernel(const Source __grid_constant__ source, const Scalars scalars) {
  Chunk c = source.get(blockIdx.x);
  bool wide = c.ema_type == DType::f64 || c.param_type == DType::f64 || (c.bias != nullptr && c.bias_type == DType::f64);
  if (wide) {
    run_any<double>(c, scalars);
  } else {
    run_any<float>(c, scalars);
  }
}

// The dtypes that a list shares and there is a kernel for; anything else goes to mixed_kernel.
struct Specialisation {
  DType ema;
  DType param;
  DType bias; // ignored without effective weights
};

constexpr Specialisation kSpecialisations[] = {
    {DType::f32, DType::f32, DType::f32},
    {DType::bf16, DType::f32, DType::f32},
    {DType::f32, DType::bf16, DType::bf16},
    {DType::bf16, DType::bf16, DType::bf16},
    {DType::f16, DType::f16, DType::f16},
    {DType::f32, DType::f16, DType::f16},
};
constexpr int kMixed = sizeof(kSpecialisations) / sizeof(Specialisation);

int choose_kernel(const std::vector<Entry>& entries) {
  int chosen = -1;
  for (const Entry& e : entries) {
    if (e.numel == 0) {
      continue;
    }
    int found = kMixed;
    for (int i = 0; i < kMixed; ++i) {
      const Specialisation& s = kSpecialisations[i];
      if (e.ema_type == s.ema && e.param_type == s.param && (e.bias == nullptr || e.bias_type == s.bias)) {
        found = i;
      }
    }
    if (chosen == -1) {
      chosen = found;
    } else if (chosen != found) {
      return kMixed;
    }
  }
  return chosen == -1 ? kMixed : chosen;
}

template <class Source, class E, class P, class B>
void launch_typed(const Source& source, uint32_t chunks, const Scalars& scalars, cudaStream_t stream) {
  using Operands = Typed<E, P, B>;
  if (sizeof(E) == 2 && scalars.seed != nullptr) {
    launch_kernel(kName, typed_kernel<Source, Operands, sizeof(E) == 2>, chunks, stream, source, scalars);
  } else {
    launch_kernel(kName, typed_kernel<Source, Operands, false>, chunks, stream, source, scalars);
  }
}

template <bool Weights, class Source>
void launch(int kernel, const Source& source, uint32_t chunks, const Scalars& scalars, cudaStream_t stream) {
  if (chunks == 0) {
    return;
  }
  // In the order of kSpecialisations.
  switch (kernel) {
    case 0:
      launch_typed<Source, float, float, std::conditional_t<Weights, float, void>>(source, chunks, scalars, stream);
      break;
    case 1:
      launch_typed<Source, BFloat16, float, std::conditional_t<Weights, float, void>>(source, chunks, scalars, stream);
      break;
    case 2:
      launch_typed<Source, float, BFloat16, std::conditional_t<Weights, BFloat16, void>>(
          source, chunks, scalars, stream);
      break;
    case 3:
      launch_typed<Source, BFloat16, BFloat16, std::conditional_t<Weights, BFloat16, void>>(
          source, chunks, scalars, stream);
      break;
    case 4:
      launch_typed<Source, Half, Half, std::conditional_t<Weights, Half, void>>(source, chunks, scalars, stream);
      break;
    case 5:
      launch_typed<Source, float, Half, std::conditional_t<Weights, Half, void>>(source, chunks, scalars, stream);
      break;
    default:
      launch_kernel(kName, mixed_kernel<Source>, chunks, stream, source, scalars);
  }
}

template <bool Weights>
void run_once(const std::vector<Entry>& entries, const Tensor& like, const Scalars& scalars, cudaStream_t stream) {
  int kernel = choose_kernel(entries);
  launch_over<Weights>(entries, like, stream, [&](const auto& table, uint32_t chunks) {
    launch<Weights>(kernel, table, chunks, scalars, stream);
  });
}

} // namespace

EmaLaunch::EmaLaunch(const std::vector<Entry>& entries, const Tensor& like)
    : device_(like.get_device_index()), kernel_(choose_kernel(entries)), chunks_(count_chunks(entries)) {
  for (const Entry& e : entries) {
    weights_ = weights_ || e.bias != nullptr; // an empty tensor's entry has no addresses
  }
  DeviceGuard guard(device_);
  cudaStream_t stream = current_stream(device_);
  table_ = scratch(like, static_cast<int64_t>(chunks_) * sizeof(Chunk));
  stream_ = stream;
  if (is_capturing(stream)) {
    unwritten_ = entries;
    return;
  }
  write_chunks(entries, weights_, static_cast<Chunk*>(table_.data_ptr()), stream);
  wait_for(stream); // updates may come on other streams; waiting once here spares every one of them an event
}

// A graph reads its table at every replay, and nothing says when the graph ends; the launch may go before it, as when a
// tensor has moved. On a stream other than that of the table's memory, an update may still be reading when the memory is
// given back. So a table that was used in either way is never freed: 64 bytes a chunk.
void EmaLaunch::keep_for_good() {
  static std::mutex mutex;
  static std::vector<Tensor>& tables = *new std::vector<Tensor>; // not freed at exit, when CUDA may be gone
  std::lock_guard<std::mutex> lock(mutex);
  tables.push_back(table_);
  kept_ = true;
}

void EmaLaunch::run(const Scalars& scalars) {
  DeviceGuard guard(device_);
  cudaStream_t stream = current_stream(device_);
  bool capturing = is_capturing(stream);
  if (!unwritten_.empty()) {
    if (!capturing) { // in memory that no graph writes: what was allocated in a capture is in its graphs' pool
      table_ = scratch(table_, table_.numel() * static_cast<int64_t>(sizeof(int64_t)));
      stream_ = stream;
      kept_ = false;
    }
    write_chunks(unwritten_, weights_, static_cast<Chunk*>(table_.data_ptr()), stream);
    if (!capturing) {
      wait_for(stream);
      unwritten_.clear();
    }
  }
  if (!kept_ && (capturing || stream != stream_)) {
    keep_for_good();
  }
  DeviceTable table{static_cast<const Chunk*>(table_.data_ptr())};
  if (weights_) {
    launch<true>(kernel_, table, chunks_, scalars, stream);
  } else {
    launch<false>(kernel_, table, chunks_, scalars, stream);
  }
}

void update_entries(const std::vector<Entry>& entries, bool weights, const Tensor& like, const Scalars& scalars) {
  DeviceGuard guard(like.get_device_index());
  cudaStream_t stream = current_stream(like.get_device_index());
  if (weights) {
    run_once<true>(entries, like, scalars, stream);
  } else {
    run_once<false>(entries, like, scalars, stream);
  }
}

void ema_scale_update(
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
  if (ema.empty()) {
    return;
  }
  if (scale) {
    check_groups(groups, *scale);
  }
  DeviceGuard guard(ema[0].get_device_index());
  Table table = build_table(ema, params, bias, groups, out);
  update_entries(table.entries, !bias.empty(), ema[0], make_scalars(momentum, momentum_tensor, scale, total, seed));
  table.finish();
}

MANPP_CUDA_OPERATORS(m) {
  m.impl("ema_scale_update", TORCH_BOX(&ema_scale_update));
}

} // namespace manpp::cuda
