#include "memory.h"

#include <algorithm>
#include <cstring>

#include "simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace manpp {

namespace {

constexpr int64_t kLine = 64;

#if defined(MANPP_X86)
MANPP_AVX512 void stream_lines_avx512(const char* from, int64_t bytes, char* to) {
  for (int64_t i = 0; i < bytes; i += 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
  }
}

MANPP_AVX2 void stream_lines_avx2(const char* from, int64_t bytes, char* to) {
  for (int64_t i = 0; i < bytes; i += 32) {
    _mm256_stream_si256(
        reinterpret_cast<__m256i*>(to + i), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
  }
}
#endif

void stream_lines(const char* from, int64_t bytes, char* to) {
#if defined(MANPP_X86)
  if (kVectors.waiting != Vectors::plain) {
    (kVectors.waiting == Vectors::avx512 ? stream_lines_avx512 : stream_lines_avx2)(from, bytes, to);
    return;
  }
#endif
#if defined(__SSE2__)
  for (int64_t i = 0; i < bytes; i += 16) {
    _mm_stream_si128(
        reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
#else
  std::memcpy(to, from, bytes);
#endif
}

} // namespace

void stream_bytes(const void* x, int64_t bytes, void* y) {
  const char* from = static_cast<const char*>(x);
  char* to = static_cast<char*>(y);
  int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(to) & (kLine - 1));
  int64_t lines = (bytes - head) / kLine * kLine;
  std::memcpy(to, from, head);
  stream_lines(from + head, lines, to + head);
  std::memcpy(to + head + lines, from + head + lines, bytes - head - lines);
}

void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

void expect_writes(void* p, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = kLargePage;
  uintptr_t start = reinterpret_cast<uintptr_t>(p);
  uintptr_t begin = (start + page - 1) / page * page;
  uintptr_t end = (start + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin >= end) {
    return;
  }
  // Memory that was written before is left as it is. Every few pages tell, as an allocator may hand out old and new memory
  // in one piece.
  bool fresh = false;
  for (uintptr_t at = begin; at < end && !fresh; at += 4 * page) {
    unsigned char mapped = 1;
    fresh = mincore(reinterpret_cast<void*>(at), 1, &mapped) == 0 && (mapped & 1) == 0;
  }
  if (!fresh) {
    return;
  }
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE); // advice: where it is refused, nothing is lost
#else
  (void)p;
  (void)bytes;
#endif
}

} // namespace manpp
