// The arithmetic of one element, once, for the host and for the device.
//
// The CPU kernels and the CUDA kernels call these functions and nothing else, so that the tests that run on a CPU
// exercise what the GPU runs. A is the arithmetic type: float, or double where an operand is float64.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__CUDACC__)
#define MANPP_HD __host__ __device__ __forceinline__
#else
#define MANPP_HD inline __attribute__((always_inline))
#endif

namespace manpp {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

// ema <- momentum ema + (1 - momentum) param. `take` is 1 - momentum, formed in double: in float the difference
// from 1 of a momentum like 0.9999 would keep only three digits.
template <class A>
MANPP_HD A ema_step(A ema, A param, A keep, A take) {
  return keep * ema + take * param;
}

// The learnable scaling bias: scale a + (total - scale) b, with rest = total - scale. Of weights in the parameter form
// of MAN++, of feature maps in the published one.
template <class A>
MANPP_HD A scale_mix(A a, A b, A scale, A rest) {
  return scale * a + rest * b;
}

// One element's share of d loss / d scale.
template <class A>
MANPP_HD A scale_grad(A grad, A a, A b) {
  return grad * (a - b);
}

// The finaliser of MurmurHash3: every input bit reaches every output bit.
MANPP_HD uint32_t mix32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}

// What is the same for all elements of a tensor (and for 2^32 of them at a time, `block` counting those).
MANPP_HD uint32_t random_key(int64_t seed, uint32_t tensor, uint32_t block) {
  uint32_t low = static_cast<uint32_t>(static_cast<uint64_t>(seed));
  uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  return mix32(mix32(low ^ (tensor * 0x9E3779B9u)) ^ high ^ block);
}

// The key is random itself, so that one round of mixing is enough.
MANPP_HD uint32_t random_bits(uint32_t key, uint32_t element) {
  return mix32(element ^ key);
}

MANPP_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

MANPP_HD float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// Stochastic rounding: add random bits below the last kept bit and cut there, so that the carry comes with just the
// odds that make the mean exact. The result is a float that T represents exactly. Values past the largest finite T,
// infinities and NaN are left for the conversion to round to nearest.
template <class T>
MANPP_HD float round_stochastic(float x, uint32_t bits);

template <>
MANPP_HD float round_stochastic<BFloat16>(float x, uint32_t bits) {
  constexpr float largest = 3.3895313892515355e38f;
  float cut = bits_float((float_bits(x) + (bits >> 16)) & 0xFFFF0000u);
  return fabsf(x) <= largest ? cut : x;
}

template <>
MANPP_HD float round_stochastic<Half>(float x, uint32_t bits) {
  constexpr float largest = 65504.0f;
  constexpr float smallest_normal = 6.103515625e-05f; // 2^-14
  float cut = bits_float((float_bits(x) + (bits >> 19)) & 0xFFFFE000u);
  // Below 2^-14 float16 has a fixed step of 2^-24, which float's exponent does not follow. Clamped, so that the
  // unused result stays small elsewhere. (By a comparison, as fminf keeps compilers from vectorising the loop.)
  float magnitude = fabsf(x);
  float steps = (magnitude < smallest_normal ? magnitude : smallest_normal) * 16777216.0f;
  float whole = floorf(steps);
  whole += static_cast<float>(bits >> 8) * 5.9604644775390625e-08f < steps - whole ? 1.0f : 0.0f;
  float tiny = copysignf(whole * 5.9604644775390625e-08f, x);
  float rounded = magnitude < smallest_normal ? tiny : cut;
  return magnitude <= largest ? rounded : x;
}

} // namespace manpp
