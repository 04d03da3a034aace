#include "blocks.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define MANPP_F16C
#endif

namespace manpp {

namespace {

// Written out per pair of types because target_clones does not go with templates. From a cache to a cache, where longer
// vectors are a gain.
#define MANPP_CONVERT_AS(convert, From, To, Via)                 \
  MANPP_SIMD_WIDE void convert(const From* x, int64_t n, To* y) {     \
    for (int64_t i = 0; i < n; ++i) {                            \
      y[i] = nearest<To>(static_cast<Via>(x[i]));                \
    }                                                            \
  }

#define MANPP_CONVERT(From, To, Via) MANPP_CONVERT_AS(convert, From, To, Via)

MANPP_CONVERT(double, float, double)
MANPP_CONVERT(float, float, float)
MANPP_CONVERT(BFloat16, float, float)
MANPP_CONVERT(double, double, double)
MANPP_CONVERT(float, double, float)
MANPP_CONVERT(BFloat16, double, float)
MANPP_CONVERT(Half, double, float)
MANPP_CONVERT(float, BFloat16, float)
MANPP_CONVERT(double, BFloat16, float)
MANPP_CONVERT(double, Half, float)

#if defined(MANPP_F16C)
// By the processor's own instructions, which loops over Half do not come to: compilers see integers in it.
const bool kHasF16c = __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");

__attribute__((target("avx,f16c"))) int64_t convert_f16c(const Half* x, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  }
  return i;
}

__attribute__((target("avx,f16c"))) int64_t convert_f16c(const float* x, int64_t n, Half* y) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), half);
  }
  return i;
}

#define MANPP_CONVERT_HALF(From, To)                        \
  void convert(const From* x, int64_t n, To* y) {           \
    int64_t done = kHasF16c ? convert_f16c(x, n, y) : 0;    \
    convert_software(x + done, n - done, y + done);         \
  }
#else
#define MANPP_CONVERT_HALF(From, To)              \
  void convert(const From* x, int64_t n, To* y) { \
    convert_software(x, n, y);                    \
  }
#endif

MANPP_CONVERT_AS(convert_software, Half, float, float)
MANPP_CONVERT_AS(convert_software, float, Half, float)
MANPP_CONVERT_HALF(Half, float)
MANPP_CONVERT_HALF(float, Half)
#undef MANPP_CONVERT_HALF
#undef MANPP_CONVERT
#undef MANPP_CONVERT_AS

template <class A>
void load(DType type, const void* x, int64_t n, A* y) {
  switch (type) {
    case DType::f64:
      return convert(static_cast<const double*>(x), n, y);
    case DType::f32:
      return convert(static_cast<const float*>(x), n, y);
    case DType::bf16:
      return convert(static_cast<const BFloat16*>(x), n, y);
    case DType::f16:
      return convert(static_cast<const Half*>(x), n, y);
  }
}

template <class A>
void store(DType type, const A* x, int64_t n, void* y) {
  switch (type) {
    case DType::f64:
      return convert(x, n, static_cast<double*>(y));
    case DType::f32:
      return convert(x, n, static_cast<float*>(y));
    case DType::bf16:
      return convert(x, n, static_cast<BFloat16*>(y));
    case DType::f16:
      return convert(x, n, static_cast<Half*>(y));
  }
}

MANPP_SIMD_WIDE void round_bfloat16(float* x, int64_t n, uint32_t key, uint32_t first) {
  for (int64_t i = 0; i < n; ++i) {
    x[i] = round_stochastic<BFloat16>(x[i], random_bits(key, first + static_cast<uint32_t>(i)));
  }
}

MANPP_SIMD_WIDE void round_half(float* x, int64_t n, uint32_t key, uint32_t first) {
  for (int64_t i = 0; i < n; ++i) {
    x[i] = round_stochastic<Half>(x[i], random_bits(key, first + static_cast<uint32_t>(i)));
  }
}

} // namespace

void load_block(DType type, const void* x, int64_t n, float* y) {
  load(type, x, n, y);
}
void load_block(DType type, const void* x, int64_t n, double* y) {
  load(type, x, n, y);
}
void store_block(DType type, const float* x, int64_t n, void* y) {
  store(type, x, n, y);
}
void store_block(DType type, const double* x, int64_t n, void* y) {
  store(type, x, n, y);
}

void round_block(DType type, float* x, int64_t n, int64_t seed, uint32_t tensor, int64_t first) {
  // Blocks start at multiples of kBlock, which divides 2^32: a block never straddles two keys.
  uint32_t key = random_key(seed, tensor, static_cast<uint32_t>(first >> 32));
  (type == DType::bf16 ? round_bfloat16 : round_half)(x, n, key, static_cast<uint32_t>(first));
}

} // namespace manpp
