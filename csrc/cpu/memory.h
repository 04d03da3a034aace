// How results too large for the caches, or in memory that is new, get written.
#pragma once

#include <cstdint>

namespace manpp {

// Copies with 16-byte stores that go past the caches, whatever the alignment: for results too large to be found there
// later, whose lines would otherwise be fetched to be overwritten. Follow the last with stream_fence().
void stream_bytes(const void* x, int64_t bytes, void* y);
void stream_fence();

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
