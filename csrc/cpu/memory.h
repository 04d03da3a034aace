// How memory is fetched ahead, and how results too large for the caches, or in memory that is new, get written.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace manpp {

// Into the second-level cache, as what is worked on meanwhile may fill the first. Inlined by force, and so has to be what
// calls it: GCC drops calls of a function that does nothing but prefetch.
MANPP_INLINE void prefetch_line(const void* p) {
  __builtin_prefetch(p, 0, 2);
}

MANPP_INLINE void prefetch(const void* x, int64_t bytes) {
  for (int64_t offset = 0; offset < bytes; offset += 64) {
    prefetch_line(static_cast<const char*>(x) + offset);
  }
}

// Copies with stores that go past the caches, whatever the alignment: for results too large to be found there later,
// whose lines would otherwise be fetched to be overwritten. Follow the last with stream_fence().
void stream_bytes(const void* x, int64_t bytes, void* y);
void stream_fence();

// Bytes that are streamed in one go, a few whole lines: many stores past the caches in a row hold up the loads between.
constexpr int64_t kStreamBlock = 8 * 64;

// Writes n elements so, a block at a time: calls write(first element, elements, where to) for each.
template <class T, class Write>
void stream_blocks(T* y, int64_t n, const Write& write) {
  constexpr int64_t line = 64 / sizeof(T);
  constexpr int64_t block = kStreamBlock / sizeof(T);
  alignas(64) T buffer[block];
  int64_t to_line = -static_cast<int64_t>(reinterpret_cast<uintptr_t>(y) / sizeof(T)) & (line - 1);
  for (int64_t i = 0, m = std::min(n, to_line == 0 ? block : to_line); i < n; i += m, m = std::min(block, n - i)) {
    write(i, m, buffer);
    stream_bytes(buffer, m * sizeof(T), y + i);
  }
}

// Results of more bytes than this are streamed: with the operands of the same launch they exceed the last-level cache of
// today's processors several times over. (What the system says of that cache is often another machine's.)
constexpr int64_t kStreamBytes = int64_t{32} << 20;

constexpr int64_t kLargePage = int64_t{2} << 20;

// To be called for a result that is about to be written whole. Memory fresh from the system is mapped at the first touch,
// a page of 4 KB at a time, which takes several times as long as writing it; so where it is fresh and large, the system
// is asked for its large pages, as NumPy does for its arrays. Only pages that lie within the result are asked for,
// so it takes no more memory. Nothing is done where that is not to be had.
void expect_writes(void* p, int64_t bytes);

} // namespace manpp
