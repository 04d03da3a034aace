// ema_scale_update on the CPU: kernel, launch and operator.
#include "ema_scale_update.h"

#include <algorithm>

#include "../ema_scale_update.h"
#include "../table.h"
#include "blocks.h"
#include "loops.h"
#include "memory.h"

namespace manpp::cpu {

namespace {

// Small enough that 96 tensors of 4,800 elements spread over the threads, large enough that finding a chunk's tensor
// costs nothing beside it.
constexpr int64_t kChunk = 4096;

// How many elements further on operands are fetched, see fetch().
constexpr int64_t kAhead = 256;

// In one pass, for EMAs stored as E and parameters (with bias and effective weights) as P. What the weights are mixed of
// is the EMA as it is stored, rounded.
template <class E, class P, class A>
struct EmaLoop {
  static constexpr bool computes = false;
  static MANPP_INLINE void run(E* e, const P* p, int64_t n, A keep, A take) {
    for (int64_t i = 0; i < n; ++i) {
      e[i] = nearest<E>(ema_step(static_cast<A>(e[i]), static_cast<A>(p[i]), keep, take));
    }
  }
};

template <class E, class P>
struct EmaStochasticLoop {
  static constexpr bool computes = true;
  static MANPP_INLINE void run(E* e, const P* p, int64_t n, float keep, float take, uint32_t key, uint32_t first) {
    for (int64_t i = 0; i < n; ++i) {
      float updated = ema_step(static_cast<float>(e[i]), static_cast<float>(p[i]), keep, take);
      e[i] = nearest<E>(round_stochastic<E>(updated, random_bits(key, first + static_cast<uint32_t>(i))));
    }
  }
};

template <class E, class P, class A>
struct EmaMixLoop {
  static constexpr bool computes = false;
  static MANPP_INLINE void run(
      E* __restrict__ e, const P* p, const P* b, P* __restrict__ w, int64_t n, A keep, A take, A scale, A rest) {
    for (int64_t i = 0; i < n; ++i) {
      E updated = nearest<E>(ema_step(static_cast<A>(e[i]), static_cast<A>(p[i]), keep, take));
      e[i] = updated;
      w[i] = nearest<P>(scale_mix(static_cast<A>(b[i]), static_cast<A>(updated), scale, rest));
    }
  }
};

// What is read of the n elements from `begin` on, as far as they go: the block after the one that is worked on.
// Where a line takes many instructions, as of 16-bit numbers, the processor does not look far enough ahead by itself.
MANPP_INLINE void fetch(const Entry& t, int64_t begin, int64_t n, int64_t end) {
  n = std::min(n, end - begin);
  prefetch(at(t.param, t.param_type, begin), n * element_size(t.param_type));
  if (t.ema != nullptr) { // which it is in a backward pass without the gradient of scale
    prefetch(at(t.ema, t.ema_type, begin), n * element_size(t.ema_type));
  }
  if (t.bias != nullptr) {
    prefetch(at(t.bias, t.bias_type, begin), n * element_size(t.bias_type));
  }
}

// Writes up to kAhead elements of a result by write(where to), past the caches if `stream`.
template <class Write>
void write_block(DType type, void* out, int64_t n, bool stream, const Write& write) {
  if (!stream) {
    write(out);
    return;
  }
  alignas(64) char lines[kAhead * sizeof(double)];
  write(lines);
  stream_bytes(lines, n * element_size(type), out);
}

template <class E, class P, class A>
void update_in_one_pass(
    const Entry& t, int32_t, int64_t begin, int64_t end, const Factors<A>& f, const int64_t*, bool stream) {
  E* e = static_cast<E*>(t.ema);
  const P* p = static_cast<const P*>(t.param);
  const P* b = static_cast<const P*>(t.bias);
  P* w = static_cast<P*>(t.out);
  constexpr bool narrow = sizeof(E) == 2 || sizeof(P) == 2;
  auto mix = [&](int64_t i, int64_t n, P* to) {
    if constexpr (narrow) {
      fetch(t, i + n, n, end);
    }
    simd<EmaMixLoop<E, P, A>>(e + i, p + i, b + i, to, n, f.keep, f.take, f.scale, f.rest);
  };
  if (b != nullptr && stream) {
    stream_blocks(w + begin, end - begin, [&](int64_t i, int64_t n, P* mixed) { mix(begin + i, n, mixed); });
    return;
  }
  constexpr int64_t block = narrow ? kAhead : kChunk;
  for (int64_t i = begin; i < end; i += block) {
    int64_t n = std::min(block, end - i);
    if (b != nullptr) {
      mix(i, n, w + i);
    } else {
      if constexpr (narrow) {
        fetch(t, i + n, n, end);
      }
      simd<EmaLoop<E, P, A>>(e + i, p + i, n, f.keep, f.take);
    }
  }
}

// Without effective weights.
template <class E, class P>
void update_stochastically(
    const Entry& t, int32_t index, int64_t begin, int64_t end, const Factors<float>& f, const int64_t* seed, bool) {
  for (int64_t i = begin; i < end; i += kAhead) {
    int64_t n = std::min(kAhead, end - i);
    fetch(t, i + n, n, end);
    simd<EmaStochasticLoop<E, P>>(
        static_cast<E*>(t.ema) + i,
        static_cast<const P*>(t.param) + i,
        n,
        f.keep,
        f.take,
        random_key_at(*seed, index, i),
        static_cast<uint32_t>(i));
  }
}

template <class A>
using Pass = void (*)(
    const Entry&, int32_t index, int64_t begin, int64_t end, const Factors<A>&, const int64_t* seed, bool stream);

// Null for what goes block by block: stochastic rounding with effective weights, float16 (loops over which are not
// vectorised, see blocks.cpp) and rare mixtures.
template <class A>
Pass<A> one_pass(const Entry& t, bool stochastic) {
  auto is = [&](DType ema, DType param) {
    return t.ema_type == ema && t.param_type == param && (t.bias == nullptr || t.bias_type == param);
  };
  if constexpr (sizeof(A) == 8) {
    return is(DType::f64, DType::f64) ? update_in_one_pass<double, double, double> : nullptr;
  } else {
    return is(DType::f32, DType::f32) ? update_in_one_pass<float, float, float>
        : is(DType::f32, DType::bf16) ? update_in_one_pass<float, BFloat16, float>
        : !stochastic && is(DType::bf16, DType::f32) ? update_in_one_pass<BFloat16, float, float>
        : !stochastic && is(DType::bf16, DType::bf16) ? update_in_one_pass<BFloat16, BFloat16, float>
        : t.bias == nullptr && is(DType::bf16, DType::f32) ? update_stochastically<BFloat16, float>
        : t.bias == nullptr && is(DType::bf16, DType::bf16) ? update_stochastically<BFloat16, BFloat16>
        : nullptr;
  }
}

template <class A>
void update_range(
    const Entry& t, int32_t index, int64_t begin, int64_t end, const Factors<A>& f, const int64_t* seed, bool stream) {
  if (Pass<A> pass = one_pass<A>(t, seed != nullptr)) {
    pass(t, index, begin, end, f, seed, stream);
    return;
  }
  alignas(64) A ema_buffer[2 * kAhead];
  alignas(64) A buffer[2 * kAhead];
  alignas(64) A mixed[kAhead];
  // The more there is to do for an element, the fewer of them take as long as memory does.
  const int64_t block = t.bias != nullptr || seed != nullptr ? kAhead : 2 * kAhead;
  for (int64_t i = begin; i < end; i += block) {
    int64_t n = std::min(block, end - i);
    void* ema = at(t.ema, t.ema_type, i);
    fetch(t, i + n, n, end);
    load_block(t.ema_type, ema, n, ema_buffer);
    const A* p = readable(t.param_type, at(t.param, t.param_type, i), n, buffer);
    simd<EmaLoop<A, A, A>>(ema_buffer, p, n, f.keep, f.take);
    if constexpr (sizeof(A) == 4) {
      if (seed != nullptr && element_size(t.ema_type) == 2) {
        round_block(t.ema_type, ema_buffer, n, *seed, static_cast<uint32_t>(index), i);
      }
    } else if (seed != nullptr && element_size(t.ema_type) == 2) {
      // A float16 or bfloat16 EMA of float64 parameters: rounded by way of float, as everywhere.
      alignas(64) float narrow[2 * kAhead];
      store_block(DType::f32, ema_buffer, n, narrow);
      round_block(t.ema_type, narrow, n, *seed, static_cast<uint32_t>(index), i);
      load_block(DType::f32, narrow, n, ema_buffer);
    }
    store_block(t.ema_type, ema_buffer, n, ema);
    if (t.bias != nullptr) {
      const A* stored = readable(t.ema_type, ema, n, ema_buffer); // the EMA as stored, rounded
      const A* b = readable(t.bias_type, at(t.bias, t.bias_type, i), n, buffer);
      simd<MixLoop<A, A>>(b, stored, n, f.scale, f.rest, mixed);
      write_block(t.bias_type, at(t.out, t.bias_type, i), n, stream, [&](void* to) {
        store_block(t.bias_type, mixed, n, to);
      });
    }
  }
}

// How many chunks are worth a thread: of small tensors more, though to find a chunk's tensor counts for some elements, too.
int64_t grain_of(const std::vector<Entry>& entries, int64_t chunks) {
  constexpr int64_t finding = 16;
  int64_t elements = 0;
  for (const Entry& t : entries) {
    elements += t.numel;
  }
  return kGrain / std::max<int64_t>(1, std::min(kChunk, elements / std::max<int64_t>(1, chunks) + finding));
}

// Calls body(tensor, begin, end) for every stretch of elements, spread over libtorch's threads.
template <class Body>
void for_each_range(const std::vector<Entry>& entries, const std::vector<int64_t>& ends, const Body& body) {
  int64_t chunks = ends.empty() ? 0 : ends.back();
  torch::stable::parallel_for(0, chunks, grain_of(entries, chunks), [&](int64_t first, int64_t last) {
    int tensor = locate(ends.data(), static_cast<int>(ends.size()), first);
    for (int64_t chunk = first; chunk < last; ++tensor) {
      int64_t start = tensor == 0 ? 0 : ends[tensor - 1];
      int64_t stop = std::min(last, ends[tensor]);
      if (stop > chunk) {
        const Entry& t = entries[tensor];
        body(tensor, (chunk - start) * kChunk, std::min(t.numel, (stop - start) * kChunk));
        chunk = stop;
      }
    }
  });
}

int64_t result_bytes(const std::vector<Entry>& entries) {
  int64_t bytes = 0;
  for (const Entry& t : entries) {
    bytes += t.out == nullptr ? 0 : t.numel * element_size(t.bias_type);
  }
  return bytes;
}

// The results of an operator may stand in memory that is new. Each may be smaller than a large page, but allocators put
// them side by side. (Where an allocator's own notes between them were written before, small pages are there already; then
// it is the next results in that place that get large ones.)
void expect_results(const std::vector<Entry>& entries) {
  if (result_bytes(entries) < kLargePage) {
    return;
  }
  std::vector<Span> results;
  for (const Entry& t : entries) {
    if (t.out != nullptr) {
      results.push_back(span_of(t.out, t.bias_type, t.numel));
    }
  }
  std::sort(results.begin(), results.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  constexpr uintptr_t most_between = 4096; // more than an allocator's own notes and alignment take
  for (size_t i = 0; i < results.size();) {
    Span joined = results[i++];
    while (i < results.size() && results[i].begin - joined.end <= most_between) {
      joined.end = results[i++].end;
    }
    expect_writes(reinterpret_cast<void*>(joined.begin), static_cast<int64_t>(joined.end - joined.begin));
  }
}

} // namespace

EmaLaunch::EmaLaunch(std::vector<Entry> e)
    : entries(std::move(e)), ends(chunk_ends(entries, kChunk)), stream(result_bytes(entries) > kStreamBytes) {
  expect_results(entries);
}

void EmaLaunch::run(const Scalars& scalars) const {
  for_each_range(entries, ends, [&](int tensor, int64_t begin, int64_t end) {
    const Entry& t = entries[tensor];
    if (wants_double(t)) {
      update_range(t, tensor, begin, end, read_factors<double>(scalars, t.group), scalars.seed, stream);
    } else {
      update_range(t, tensor, begin, end, read_factors<float>(scalars, t.group), scalars.seed, stream);
    }
    if (stream) {
      stream_fence();
    }
  });
}

namespace {

template <class A>
double backward_range(const Entry& t, int64_t begin, int64_t end, A scale, bool stream) {
  alignas(64) A grad_buffer[kAhead];
  alignas(64) A buffer[kAhead];
  alignas(64) A ema_buffer[kAhead];
  static_assert(kStreamBlock / static_cast<int64_t>(sizeof(BFloat16)) <= kAhead);
  const int64_t block = kStreamBlock / element_size(t.param_type);
  double share = 0;
  for (int64_t i = begin; i < end; i += block) {
    int64_t n = std::min(block, end - i);
    fetch(t, i + n, n, t.numel);
    const A* g = readable(t.param_type, at(t.param, t.param_type, i), n, grad_buffer);
    if (t.bias != nullptr) {
      const A* b = readable(t.bias_type, at(t.bias, t.bias_type, i), n, buffer);
      const A* e = readable(t.ema_type, at(t.ema, t.ema_type, i), n, ema_buffer);
      share += static_cast<double>(simd<ShareLoop<A, A>>(g, b, e, n));
    }
    if (t.out != nullptr) {
      write_block(t.bias_type, at(t.out, t.bias_type, i), n, stream, [&](void* to) {
        if (t.bias_type == dtype_for<A>()) {
          simd<ScaledLoop<A, A>>(g, n, scale, static_cast<A*>(to));
        } else {
          simd<ScaledLoop<A, A>>(g, n, scale, buffer);
          store_block(t.bias_type, buffer, n, to);
        }
      });
    }
  }
  return share;
}

} // namespace

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
  if (scale) {
    check_groups(groups, *scale);
  }
  Table table = build_table(ema, params, bias, groups, out);
  EmaLaunch launch(std::move(table.entries));
  launch.run(make_scalars(momentum, momentum_tensor, scale, total, seed));
  table.finish();
}

void backward_of_entries(
    const std::vector<Entry>& entries, const Tensor& scale, const std::optional<Tensor>& grad_scale) {
  expect_results(entries);
  bool stream = result_bytes(entries) > kStreamBytes;
  std::vector<int64_t> ends = chunk_ends(entries, kChunk);
  DType scale_type = dtype_of(scale);
  const void* scales = scale_entries(scale);
  // A sum per chunk, added up in order afterwards: the same bits whatever the number of threads.
  std::vector<double> shares(ends.empty() ? 0 : static_cast<size_t>(ends.back()));
  for_each_range(entries, ends, [&](int tensor, int64_t begin, int64_t end) {
    const Entry& t = entries[tensor];
    int64_t start = tensor == 0 ? 0 : ends[tensor - 1];
    for (int64_t i = begin; i < end; i += kChunk) {
      int64_t stop = std::min(end, i + kChunk);
      shares[start + i / kChunk] = wants_double(t)
          ? backward_range(t, i, stop, read_scalar<double>(scales, scale_type, t.group), stream)
          : backward_range(t, i, stop, read_scalar<float>(scales, scale_type, t.group), stream);
    }
    if (stream) {
      stream_fence();
    }
  });
  if (!grad_scale) {
    return;
  }
  STD_TORCH_CHECK(
      grad_scale->numel() == scale.numel(), "manpp_kernels: grad_scale has to have as many entries as scale");
  std::vector<double> sums(static_cast<size_t>(scale.numel()));
  for (size_t i = 0; i < ends.size(); ++i) {
    for (int64_t chunk = i == 0 ? 0 : ends[i - 1]; chunk < ends[i]; ++chunk) {
      sums[entries[i].group] += shares[chunk];
    }
  }
  DType type = dtype_of(*grad_scale);
  store_block(type, sums.data(), static_cast<int64_t>(sums.size()), grad_scale->data_ptr());
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
  check_groups(groups, scale);
  Table table = build_backward_table(grad, bias, ema, groups, grad_bias);
  backward_of_entries(table.entries, scale, grad_scale);
  table.finish();
}

STABLE_TORCH_LIBRARY_IMPL(manpp_kernels, CPU, m) {
  m.impl("ema_scale_update", TORCH_BOX(&ema_scale_update));
  m.impl("ema_scale_update_backward", TORCH_BOX(&ema_scale_update_backward));
}

} // namespace manpp::cpu
