// Conversions of short runs of elements, vectorised: a kernel works on blocks that fit the first-level cache, in float
// or double, and converts at their edges.
#pragma once

#include <type_traits>

#include "../multi_tensor.h"

// One function body, compiled for two instruction sets; the loader picks the better one that the processor has. Not for
// AVX-512: these loops wait for memory, and 512-bit vectors made them 8 to 21 % slower out of cache (AMD EPYC, Zen 4).
#if defined(__x86_64__) && defined(__linux__) && (defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12)
#define MANPP_SIMD __attribute__((target_clones("arch=x86-64-v3", "default")))
// With AVX-512 as well: for loops that compute for longer than they wait.
#define MANPP_SIMD_WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MANPP_SIMD
#define MANPP_SIMD_WIDE
#endif

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
// Rounds float values in place to ones that bfloat16 or float16 represents, stochastically. `first` is the number of
// the first element within its tensor.
void round_block(DType type, float* x, int64_t n, int64_t seed, uint32_t tensor, int64_t first);

// To nearest, even in a tie. The same bits as BFloat16's constructor, in fewer instructions: its branch for NaN (here a
// mask, so that compilers do not see it) makes them convert the comparison to 16 bits as well.
template <class T, class A>
inline T nearest(A x) {
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
