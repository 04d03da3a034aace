// What scale_bias_mix's forward and backward pass on the GPU share.
#pragma once

#include "../mix_tensors.h"
#include "common.cuh"

namespace manpp::cuda {

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

// Division of numbers below 2^31 by one that is the same for all, with a multiplication: the hardware has no division.
class Divider {
 public:
  explicit Divider(int64_t divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    while (shift_ < 32 && (uint64_t{1} << shift_) < divisor_) {
      ++shift_;
    }
    magic_ = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift_) - divisor_) / divisor_ + 1);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return ((static_cast<uint64_t>(n) * magic_ >> 32) + n) >> shift_;
  }
  __device__ __forceinline__ uint32_t remainder(uint32_t n) const {
    return n - quotient(n) * divisor_;
  }

 private:
  uint32_t divisor_;
  uint32_t magic_;
  uint32_t shift_ = 0;
};

constexpr int64_t kDividerLimit = 0x7FFFFFFF;

inline uint32_t blocks_for(int64_t items, int64_t per_block) {
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

} // namespace manpp::cuda
