// The table of a launch over many tensors: what each operand is, and which part of the work belongs to which tensor.
#pragma once

#include <cstdint>
#include <vector>

#include "elementwise.h"

namespace manpp {

enum class DType : uint8_t { f64, f32, bf16, f16 };

MANPP_HD int64_t element_size(DType t) {
  return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2;
}

// One tensor of a launch; every operand fills one stretch of memory, all of them in the same order.
struct Entry {
  void* ema = nullptr;
  const void* param = nullptr; // in the backward pass: the gradient of the effective weights
  const void* bias = nullptr; // null without effective weights
  void* out = nullptr; // the effective weights; in the backward pass: the gradient of bias. Of bias's dtype.
  int64_t numel = 0;
  int32_t group = 0;
  DType ema_type = DType::f32;
  DType param_type = DType::f32;
  DType bias_type = DType::f32;
};

// The memory that a dense tensor fills.
struct Span {
  uintptr_t begin;
  uintptr_t end;
};

inline Span span_of(const void* address, DType type, int64_t numel) {
  uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  return {begin, begin + static_cast<uintptr_t>(numel * element_size(type))};
}

// The scalars of one update. A tensor's value is read where the work is done, never by the host.
struct Scalars {
  double keep = 0; // momentum
  double take = 0; // 1 - momentum
  const void* momentum = nullptr; // where given, instead of the two above
  const void* scale = nullptr;
  const int64_t* seed = nullptr; // where given, bfloat16 and float16 are rounded stochastically
  double total = 0;
  DType momentum_type = DType::f32;
  DType scale_type = DType::f32;
};

template <class A>
MANPP_HD A read_scalar(const void* p, DType t, int64_t i) {
  switch (t) {
    case DType::f64:
      return static_cast<A>(static_cast<const double*>(p)[i]);
    case DType::f32:
      return static_cast<A>(static_cast<const float*>(p)[i]);
    case DType::bf16:
      return static_cast<A>(static_cast<float>(static_cast<const BFloat16*>(p)[i]));
    default:
      return static_cast<A>(static_cast<float>(static_cast<const Half*>(p)[i]));
  }
}

// The four factors of an element, for tensors of one group.
template <class A>
struct Factors {
  A keep = 0;
  A take = 0;
  A scale = 0;
  A rest = 0;
};

template <class A>
MANPP_HD Factors<A> read_factors(const Scalars& s, int32_t group) {
  Factors<A> f;
  double keep = s.keep;
  double take = s.take;
  if (s.momentum != nullptr) {
    keep = read_scalar<double>(s.momentum, s.momentum_type, 0);
    take = 1.0 - keep;
  }
  f.keep = static_cast<A>(keep);
  f.take = static_cast<A>(take);
  if (s.scale != nullptr) {
    f.scale = read_scalar<A>(s.scale, s.scale_type, group);
    f.rest = static_cast<A>(s.total) - f.scale;
  }
  return f;
}

// Float64 where any operand is float64.
MANPP_HD bool wants_double(const Entry& e) {
  return e.ema_type == DType::f64 || e.param_type == DType::f64 || (e.bias != nullptr && e.bias_type == DType::f64);
}

// Which of the tensors a chunk belongs to: the first whose chunks end past it. `ends` holds, for each tensor, the
// number of chunks up to and with it.
template <class Int>
MANPP_HD int locate(const Int* ends, int count, Int chunk) {
  int low = 0;
  int high = count - 1;
  while (low < high) {
    int middle = (low + high) / 2;
    if (ends[middle] > chunk) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

inline std::vector<int64_t> chunk_ends(const std::vector<Entry>& entries, int64_t chunk) {
  std::vector<int64_t> ends;
  ends.reserve(entries.size());
  int64_t end = 0;
  for (const Entry& e : entries) {
    end += (e.numel + chunk - 1) / chunk;
    ends.push_back(end);
  }
  return ends;
}

} // namespace manpp
