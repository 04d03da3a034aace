// Loops over elements, compiled for several instruction sets, of which the one that suits the processor runs.
//
// A loop is a struct with a static function `run`, inlined into a copy for each set, and `computes`: whether it computes
// for longer than it waits for memory.
#pragma once

#define MANPP_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12
#define MANPP_X86
#define MANPP_AVX2 __attribute__((target("arch=x86-64-v3")))
#define MANPP_AVX512 __attribute__((target("arch=x86-64-v4")))
#endif

namespace manpp {

enum class Vectors { plain, avx2, avx512 };

// The choice for loops that wait and for those that compute, made when the library is loaded; PyTorch's own
// ATEN_CPU_CAPABILITY (default, avx2, avx512) overrules it.
struct VectorsFor {
  Vectors waiting = Vectors::plain;
  Vectors computing = Vectors::plain;
};
extern const VectorsFor kVectors;

#if defined(MANPP_X86)
template <class Loop, class... Args>
MANPP_AVX512 auto run_avx512(Args... args) {
  return Loop::run(args...);
}

template <class Loop, class... Args>
MANPP_AVX2 auto run_avx2(Args... args) {
  return Loop::run(args...);
}
#endif

template <class Loop, class... Args>
auto simd(Args... args) {
#if defined(MANPP_X86)
  switch (Loop::computes ? kVectors.computing : kVectors.waiting) {
    case Vectors::avx512:
      return run_avx512<Loop>(args...);
    case Vectors::avx2:
      return run_avx2<Loop>(args...);
    case Vectors::plain:
      break;
  }
#endif
  return Loop::run(args...);
}

} // namespace manpp
