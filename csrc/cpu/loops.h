// The loops that the EMA's effective weights and the mix of feature maps share.
#pragma once

#include <type_traits>

#include "blocks.h"
#include "simd.h"

namespace manpp {

// A factor is one number for all elements, or an array of one for each.
template <class A>
MANPP_INLINE A factor_at(A factor, int64_t) {
  return factor;
}
template <class A>
MANPP_INLINE A factor_at(const A* factors, int64_t i) {
  return factors[i];
}

// T is what is stored, A what is computed in; conversions of bfloat16 compute for longer than they wait.
template <class T, class A>
struct MixLoop {
  static constexpr bool computes = std::is_same_v<T, BFloat16>;
  template <class Factor>
  static MANPP_INLINE void run(const T* a, const T* b, int64_t n, Factor s, Factor r, T* __restrict__ y) {
    for (int64_t i = 0; i < n; ++i) {
      y[i] = nearest<T>(scale_mix(static_cast<A>(a[i]), static_cast<A>(b[i]), factor_at(s, i), factor_at(r, i)));
    }
  }
};

template <class T, class A>
struct ScaledLoop {
  static constexpr bool computes = std::is_same_v<T, BFloat16>;
  template <class Factor>
  static MANPP_INLINE void run(const T* g, int64_t n, Factor s, T* __restrict__ y) {
    for (int64_t i = 0; i < n; ++i) {
      y[i] = nearest<T>(factor_at(s, i) * static_cast<A>(g[i]));
    }
  }
};

// The shares of scale's gradient, added up. Sixteen running sums: a fixed order of addition that still fills vector registers.
template <class T, class A>
struct ShareLoop {
  static constexpr bool computes = std::is_same_v<T, BFloat16>;
  static MANPP_INLINE A run(const T* g, const T* a, const T* b, int64_t n) {
    A sums[16] = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      for (int k = 0; k < 16; ++k) {
        sums[k] += scale_grad(static_cast<A>(g[i + k]), static_cast<A>(a[i + k]), static_cast<A>(b[i + k]));
      }
    }
    A sum = 0;
    for (; i < n; ++i) {
      sum += scale_grad(static_cast<A>(g[i]), static_cast<A>(a[i]), static_cast<A>(b[i]));
    }
    for (int k = 0; k < 16; ++k) {
      sum += sums[k];
    }
    return sum;
  }
};

} // namespace manpp
