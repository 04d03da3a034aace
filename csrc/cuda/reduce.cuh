// A sum over many blocks in one launch: each block leaves its share in memory, the last one to arrive adds them up.
#pragma once

#include "common.cuh"

namespace manpp::cuda {

// Shares of one sum, at most: a single block adds them up, 256 a thread, 16 of which are on their way at a time.
constexpr int64_t kMostShares = 256 * kThreads;

// Counters of arrivals, all at zero, for a kernel that leaves them at zero.
struct Arrivals {
  uint32_t* counters = nullptr;
  Tensor own; // where the counters are of this launch alone
};

// As many counters as one launch gets.
constexpr uint32_t kMostArrivals = 512;

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

} // namespace manpp::cuda
