// CUDA on the host: what csrc/cuda uses of CUDA, so that its kernels compile as plain C++ and run where there is no GPU.
//
// Found instead of the toolkit's header of this name. A block's threads run one at a time, each from one barrier or
// shuffle to the next, in an order drawn anew every time: what depends on the order shows. See emulation.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static // one block runs at a time
#define __grid_constant__ & // one parameter for all threads, as on the device

struct dim3 {
  uint32_t x;
  uint32_t y;
  uint32_t z;
  dim3(uint32_t x, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
  uint32_t x;
  uint32_t y;
};

struct alignas(16) uint4 {
  uint32_t x;
  uint32_t y;
  uint32_t z;
  uint32_t w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorStreamCaptureUnsupported };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

namespace manpp::emulation {

struct Index {
  uint32_t x = 0;
  uint32_t y = 0;
  uint32_t z = 0;
};

extern Index thread_index;
extern Index block_index;
extern Index grid_size;

void launch(dim3 grid, uint32_t threads, const std::function<void()>& thread);

// Returns when every thread of the block, or of the calling thread's warp, is here.
void block_barrier();
void warp_barrier();

// The number of the stream and of the capture that the test says it is in; no capture is 0.
extern unsigned long long stream_number;
extern unsigned long long capture_number;

// Where a lane of the calling thread's warp leaves 8 bytes for the others; two, so that a lane may be one ahead.
uint64_t& mailbox(uint32_t lane);

} // namespace manpp::emulation

#define threadIdx (::manpp::emulation::thread_index)
#define blockIdx (::manpp::emulation::block_index)
#define gridDim (::manpp::emulation::grid_size)

inline void __syncthreads() {
  ::manpp::emulation::block_barrier();
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, uint32_t delta) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint32_t lane = threadIdx.x % 32;
  uint32_t from = lane + delta < 32 ? lane + delta : lane;
  uint64_t& mine = ::manpp::emulation::mailbox(lane);
  const uint64_t& other = ::manpp::emulation::mailbox(from);
  std::memcpy(&mine, &value, sizeof value);
  ::manpp::emulation::warp_barrier();
  T result;
  std::memcpy(&result, &other, sizeof result);
  return result;
}

// Blocks run one after the other: there is nothing to wait for, and no cache to pass by.
inline void __threadfence() {}

template <class T>
T __ldcg(const T* p) {
  return *p;
}

inline uint32_t atomicInc(uint32_t* p, uint32_t most) {
  uint32_t found = *p;
  *p = found >= most ? 0 : found + 1;
  return found;
}

inline const char* cudaGetErrorString(cudaError_t) {
  return "";
}

inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

inline cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long* number) {
  *number = ::manpp::emulation::stream_number;
  return ::manpp::emulation::capture_number == 0 ? cudaSuccess : cudaErrorStreamCaptureUnsupported; // as on a GPU
}

inline cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* number) {
  *number = ::manpp::emulation::capture_number;
  *status = *number == 0 ? cudaStreamCaptureStatusNone : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

template <class T>
cudaError_t cudaGetSymbolAddress(void** address, T& symbol) {
  *address = &symbol;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
