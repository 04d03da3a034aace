#include "blocks.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define MANPP_F16C
#endif

namespace manpp {

namespace {

// From a cache to a cache: longer vectors are a gain.
template <class From, class To>
struct ConvertLoop {
  static constexpr bool computes = true;
  // From double to 16 bits by way of float, as everywhere.
  using Via = std::conditional_t<std::is_same_v<From, double> && sizeof(To) >= sizeof(float), double, float>;
  static MANPP_INLINE void run(const From* x, int64_t n, To* y) {
    for (int64_t i = 0; i < n; ++i) {
      y[i] = nearest<To>(static_cast<Via>(x[i]));
    }
  }
};

template <class T>
struct RoundLoop {
  static constexpr bool computes = true;
  static MANPP_INLINE void run(float* x, int64_t n, uint32_t key, uint32_t first) {
    for (int64_t i = 0; i < n; ++i) {
      x[i] = round_stochastic<T>(x[i], random_bits(key, first + static_cast<uint32_t>(i)));
    }
  }
};

// How many elements, from the first on, the processor's own instructions have converted.
template <class From, class To>
int64_t convert_f16c(const From*, int64_t, To*) {
  return 0;
}

#if defined(MANPP_F16C)
// Loops over Half do not come to them: compilers see integers in it.
const bool kHasF16c = __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");

__attribute__((target("avx,f16c"))) int64_t f16c(const Half* x, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  }
  return i;
}

__attribute__((target("avx,f16c"))) int64_t f16c(const float* x, int64_t n, Half* y) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), half);
  }
  return i;
}

int64_t convert_f16c(const Half* x, int64_t n, float* y) {
  return kHasF16c ? f16c(x, n, y) : 0;
}
int64_t convert_f16c(const float* x, int64_t n, Half* y) {
  return kHasF16c ? f16c(x, n, y) : 0;
}
#endif

template <class From, class To>
void convert(const From* x, int64_t n, To* y) {
  int64_t done = convert_f16c(x, n, y);
  simd<ConvertLoop<From, To>>(x + done, n - done, y + done);
}

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
  uint32_t key = random_key_at(seed, tensor, first);
  auto from = static_cast<uint32_t>(first);
  type == DType::bf16 ? simd<RoundLoop<BFloat16>>(x, n, key, from) : simd<RoundLoop<Half>>(x, n, key, from);
}

} // namespace manpp
