#include "memory.h"

#include <algorithm>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace manpp {

void stream_bytes(const void* x, int64_t bytes, void* y) {
  const char* from = static_cast<const char*>(x);
  char* to = static_cast<char*>(y);
#if defined(__SSE2__)
  int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(to) & 15);
  std::memcpy(to, from, head);
  int64_t i = head;
  for (; i + 16 <= bytes; i += 16) {
    _mm_stream_si128(
        reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
  std::memcpy(to + i, from + i, bytes - i);
#else
  std::memcpy(to, from, bytes);
#endif
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
