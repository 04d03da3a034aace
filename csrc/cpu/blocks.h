// Conversions of short runs of elements, vectorised: a kernel works on blocks that fit the first-level cache, in float
// or double, and converts at their edges.
#pragma once

#include <type_traits>

#include "../multi_tensor.h"
#include "simd.h"

namespace manpp {

constexpr int64_t kBlock = 1024; // elements; four float blocks are 16 KB, half of a first-level cache

// Below this many elements a second thread costs more to wake than it saves (about 10 microseconds).
constexpr int64_t kGrain = 32768;

// n elements of any dtype as A (float or double), written to y.
void load_block(DType type, const void* x, int64_t n, float* y);
void load_block(DType type, const void* x, int64_t n, double* y);
// The reverse, rounding to nearest.
void store_block(DType type, const float* x, int64_t n, void* y);
void store_block(DType type, const double* x, int64_t n, void* y);
// The key of what is drawn for the elements from the given one on. For blocks that start at multiples of their length and
// do not exceed kBlock, which divides 2^32: none straddles two keys.
inline uint32_t random_key_at(int64_t seed, uint32_t tensor, int64_t element) {
  return random_key(seed, tensor, static_cast<uint32_t>(element >> 32));
}
// Rounds float values in place to ones that bfloat16 or float16 represents, stochastically. `first` is the number of
// the first element within its tensor.
void round_block(DType type, float* x, int64_t n, int64_t seed, uint32_t tensor, int64_t first);

// To nearest, even in a tie. The same bits as BFloat16's constructor, in fewer instructions: its branch for NaN (here a
// mask, so that compilers do not see it) makes them convert the comparison to 16 bits as well.
template <class T, class A>
MANPP_INLINE T nearest(A x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    constexpr uint32_t nan = 0x7FC00000u;
    uint32_t u = float_bits(static_cast<float>(x));
    uint32_t rounded = u + 0x7FFFu + ((u >> 16) & 1u);
    uint32_t is_number = 0u - static_cast<uint32_t>(x == x);
    return BFloat16(static_cast<uint16_t>((((rounded ^ nan) & is_number) ^ nan) >> 16), BFloat16::from_bits());
  } else {
    return static_cast<T>(x);
  }
}

template <class A>
constexpr DType dtype_for() {
  return sizeof(A) == 8 ? DType::f64 : DType::f32;
}

inline void* at(void* p, DType t, int64_t i) {
  return static_cast<char*>(p) + i * element_size(t);
}
inline const void* at(const void* p, DType t, int64_t i) {
  return static_cast<const char*>(p) + i * element_size(t);
}

// A block to read: the memory itself where it is of type A already, else converted into `buffer`.
template <class A>
inline const A* readable(DType type, const void* x, int64_t n, A* buffer) {
  if (type == dtype_for<A>()) {
    return static_cast<const A*>(x);
  }
  load_block(type, x, n, buffer);
  return buffer;
}

} // namespace manpp
