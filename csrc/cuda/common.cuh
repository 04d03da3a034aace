// What the CUDA kernels share: 128-bit accesses, fixed-order sums, and the launch's surroundings.
#pragma once

#include <cuda_runtime.h>

#include "../table.h"

namespace manpp::cuda {

constexpr int kThreads = 256;

// Tells the compiler that an address, though it comes from a table, is one of global memory, which has loads and stores
// of its own.
__device__ __forceinline__ void assume_global(const void* p) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(p));
#endif
}

// V elements as they come from memory and go there, in accesses of 16 bytes, or of 8 or 4 where there are no more (or an
// element alone, where V is 1). Kept packed until they are worked on, elements of 2 bytes take half the registers.
template <class T, int V>
struct Packed {
  static constexpr int kBytes = static_cast<int>(sizeof(T)) * V;
  static_assert(V == 1 || kBytes % 16 == 0 || kBytes == 8 || kBytes == 4);
  using Several = std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 8, uint2, uint4>>;
  using Word = std::conditional_t<V == 1, T, Several>;
  static constexpr int kWords = kBytes / static_cast<int>(sizeof(Word));
  Word words[kWords];

  __device__ __forceinline__ void load(const T* p) {
    assume_global(p);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words[i] = reinterpret_cast<const Word*>(p)[i];
    }
  }
  __device__ __forceinline__ void store(T* p) const {
    assume_global(p);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      reinterpret_cast<Word*>(p)[i] = words[i];
    }
  }
  __device__ __forceinline__ void unpack(T (&x)[V]) const {
    Packed here = *this;
#ifdef __CUDA_ARCH__
    if constexpr (V > 1) { // the compiler otherwise unpacks (and converts to float) as soon as the loads are back
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if constexpr (kBytes == 4) {
          asm volatile("" : "+r"(here.words[i]));
        } else if constexpr (kBytes == 8) {
          asm volatile("" : "+r"(here.words[i].x), "+r"(here.words[i].y));
        } else {
          asm volatile("" : "+r"(here.words[i].x), "+r"(here.words[i].y), "+r"(here.words[i].z), "+r"(here.words[i].w));
        }
      }
    }
#endif
    memcpy(x, here.words, sizeof words);
  }
  __device__ __forceinline__ void pack(const T (&x)[V]) {
    memcpy(words, x, sizeof words);
  }
};

template <class T, int V>
__device__ __forceinline__ void load_vector(const T* p, T (&x)[V]) {
  Packed<T, V> packed;
  packed.load(p);
  packed.unpack(x);
}

template <class T, int V>
__device__ __forceinline__ void store_vector(T* p, const T (&x)[V]) {
  Packed<T, V> packed;
  packed.pack(x);
  packed.store(p);
}

__host__ __device__ __forceinline__ bool aligned16(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// Elements that a thread takes at a time, where the widest operand of a kernel is of `size` bytes: 16 bytes of that one.
// More, of a narrower one's 16 bytes, would be two accesses to a wide one, each to every other 16 bytes of a warp's
// stretch; stored like that, bf16 to float32 ran at 71 % of an H100's copy bandwidth.
__host__ __device__ constexpr int vector_length(int size) {
  return 16 / size;
}

// The sum over a block of kThreads threads, in a fixed order; valid in thread 0.
template <class A>
__device__ A block_sum(A x) {
  __shared__ A sums[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    x += __shfl_down_sync(0xFFFFFFFFu, x, offset);
  }
  if (threadIdx.x % 32 == 0) {
    sums[threadIdx.x / 32] = x;
  }
  __syncthreads();
  A total = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kThreads / 32; ++i) {
      total += sums[i];
    }
  }
  __syncthreads(); // the next call writes `sums` again
  return total;
}

template <class A>
__device__ __forceinline__ void write_scalar(void* p, DType t, int64_t i, A x) {
  switch (t) {
    case DType::f64:
      static_cast<double*>(p)[i] = static_cast<double>(x);
      break;
    case DType::f32:
      static_cast<float*>(p)[i] = static_cast<float>(x);
      break;
    case DType::bf16:
      static_cast<BFloat16*>(p)[i] = static_cast<BFloat16>(static_cast<float>(x));
      break;
    default:
      static_cast<Half*>(p)[i] = static_cast<Half>(static_cast<float>(x));
  }
}

// Throws where a call to CUDA failed.
inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError(); // reported here: the next launch of this thread must not report it once more
  }
  STD_TORCH_CHECK(error == cudaSuccess, "manpp_kernels: ", what, ": ", cudaGetErrorString(error));
}

// Makes a tensor's device current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  void* changed_ = nullptr; // PyTorch's guard, where another device was current
};

// PyTorch's current stream on a device.
cudaStream_t current_stream(int device);

// Whether a CUDA graph is being captured from a stream.
bool is_capturing(cudaStream_t stream);

// Waits for all work on a stream.
void wait_for(cudaStream_t stream);

// Throws where the last launch failed.
void check_launch(const char* kernel);

// Launches a kernel in blocks of kThreads threads. The tests compile the kernels for the host (csrc/testing), where this
// runs them, and the operators serve CPU tensors.
template <class... Parameters, class... Arguments>
void launch_kernel(
    const char* name, void (*kernel)(Parameters...), dim3 grid, cudaStream_t stream, const Arguments&... arguments) {
#ifdef MANPP_EMULATION
  emulation::launch(grid, kThreads, [&] { kernel(arguments...); });
#else
  kernel<<<grid, kThreads, 0, stream>>>(arguments...);
#endif
  check_launch(name);
}

#ifdef MANPP_EMULATION
#define MANPP_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(manpp_kernels, CPU, m)
#else
#define MANPP_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(manpp_kernels, CUDA, m)
#endif

// An uninitialised buffer from PyTorch's caching allocator, on the device of `like`.
Tensor scratch(const Tensor& like, int64_t bytes);

} // namespace manpp::cuda
