// A sum over many blocks in one launch: each block leaves its share in memory, the last one to arrive adds them up.
#pragma once

#include "common.cuh"

namespace manpp::cuda {

// Counters of arrivals, all at zero, for a kernel that leaves them at zero.
struct Arrivals {
  uint32_t* counters = nullptr;
  Tensor own; // where the counters are of this launch alone
};

// As many counters as one launch gets.
constexpr uint32_t kMostArrivals = 1024;

// Counters for the next launch on `stream` of the device of `like`. See arrivals.cu for whose they are.
Arrivals arrivals(const Tensor& like, cudaStream_t stream, uint32_t count);

// Releases what this thread wrote or has seen before it, and acquires for what comes after it. __threadfence() would also
// put all fences of the device into one order, which takes longer and which nothing here asks for.
__device__ __forceinline__ void release_and_acquire() {
#ifdef __CUDA_ARCH__
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#else
  __threadfence();
#endif
}

// Whether this block is the last of `count` to come here, all of its threads at once; what the blocks before it wrote
// is then visible to it, through loads that pass the L1 cache by (__ldcg), which is not kept in step with other
// processors.
//
// Why there is no race: the barrier orders what every thread of a block wrote before the one thread that counts. Its
// fence releases that, and the fence after the count of the last block acquires it (counts are read-modify-writes, each
// of which reads the one before); the second barrier passes it on. Exactly one block finds count - 1, whereupon
// atomicInc wraps to 0: the counter is ready for the next launch without being cleared. Nobody waits for anybody, so it
// does not matter which blocks run at the same time.
__device__ __forceinline__ bool arrives_last(uint32_t* counter, uint32_t count) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    release_and_acquire();
    last = atomicInc(counter, count - 1) == count - 1;
    if (last) {
      release_and_acquire();
    }
  }
  __syncthreads();
  return last;
}

// Ends a block's part in `columns` sums (a power of two up to kThreads; a thread each, the first ones) of `count`
// shares: leaves this block's, in `value`, among `shares` as number `number`. True in the block that comes last, whose
// first threads then have the sums in `value`. The order in which shares are added depends on their numbers alone.
__device__ __forceinline__ bool add_shares(
    double* shares, uint32_t* counter, uint32_t count, uint32_t number, uint32_t columns, double& value) {
  __shared__ double sums[kThreads];
  if (count == 1) {
    return true;
  }
  if (threadIdx.x < columns) {
    shares[static_cast<int64_t>(number) * columns + threadIdx.x] = value;
  }
  if (!arrives_last(counter, count)) {
    return false;
  }
  double sum = 0;
#pragma unroll 16
  for (int64_t i = threadIdx.x; i < static_cast<int64_t>(count) * columns; i += kThreads) { // always the same column
    sum += __ldcg(shares + i);
  }
  sums[threadIdx.x] = sum;
  for (uint32_t half = kThreads / 2; half >= columns; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      sums[threadIdx.x] = sum += sums[threadIdx.x + half];
    }
  }
  value = sum;
  return true;
}

// Blocks that add up their shares among themselves first, where a sum has many (see add_shares_of_teams).
constexpr uint32_t kTeam = 256;

__host__ __device__ constexpr uint32_t teams_of(uint32_t count) {
  return (count + kTeam - 1) / kTeam;
}

// What add_shares_of_teams needs for a sum of `count` shares: places for shares, of `columns` numbers each, and counters.
__host__ __device__ constexpr uint32_t places_of(uint32_t count) {
  return count + teams_of(count);
}
__host__ __device__ constexpr uint32_t counters_of(uint32_t count) {
  return 1 + teams_of(count);
}

// add_shares in two steps: the last block of each team adds up the team's shares, the last of those the teams'. So there may
// be many blocks; one alone would be at their shares for longer than it takes to wait for blocks of uneven speed.
__device__ __forceinline__ bool add_shares_of_teams(
    double* shares, uint32_t* counters, uint32_t count, uint32_t number, uint32_t columns, double& value) {
  uint32_t team = number / kTeam;
  uint32_t first = team * kTeam;
  double* own = shares + static_cast<int64_t>(first) * columns;
  double* of_teams = shares + static_cast<int64_t>(count) * columns;
  return add_shares(own, counters + 1 + team, min(kTeam, count - first), number - first, columns, value) &&
      add_shares(of_teams, counters, teams_of(count), team, columns, value);
}

} // namespace manpp::cuda
