// Other ways for blocks to share out the EMA's tensors, each a kernel: float32, without effective weights. What the
// package does is in csrc/cuda/ema_scale_update.cu; ema_variants.py builds these and times them beside it.
//
// Every kernel takes a table of pieces in device memory. Lengths and addresses may be anything; whole 16-byte vectors are
// worked on as such.
#include <cstdint>

#include <cuda/ptx>

#include "../csrc/elementwise.h"

namespace {

namespace ptx = cuda::ptx;

constexpr int kThreads = 256;
constexpr int kChunk = 4096; // elements of a piece at most, but where a warp takes one
constexpr int kFlight = 4; // vectors of each operand that a thread keeps in flight

struct Piece {
  float* ema;
  const float* param;
  int64_t n;
};

__device__ bool whole_vectors(const Piece& p) {
  return (reinterpret_cast<uintptr_t>(p.ema) | reinterpret_cast<uintptr_t>(p.param)) % 16 == 0 && p.n % 4 == 0;
}

__device__ float4 step(float4 e, float4 p, float keep, float take) {
  return {manpp::ema_step(e.x, p.x, keep, take), manpp::ema_step(e.y, p.y, keep, take),
          manpp::ema_step(e.z, p.z, keep, take), manpp::ema_step(e.w, p.w, keep, take)};
}

// One piece by `lanes` threads.
__device__ void update(const Piece& piece, int lane, int lanes, float keep, float take) {
  if (!whole_vectors(piece)) {
    for (int64_t at = lane; at < piece.n; at += lanes) {
      piece.ema[at] = manpp::ema_step(piece.ema[at], piece.param[at], keep, take);
    }
    return;
  }
  float4* ema = reinterpret_cast<float4*>(piece.ema);
  const float4* param = reinterpret_cast<const float4*>(piece.param);
  int vectors = static_cast<int>(piece.n / 4);
  for (int first = lane; first < vectors; first += kFlight * lanes) {
    float4 e[kFlight];
    float4 p[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      int at = first + i * lanes;
      if (at < vectors) {
        e[i] = ema[at];
        p[i] = param[at];
      }
    }
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      int at = first + i * lanes;
      if (at < vectors) {
        ema[at] = step(e[i], p[i], keep, take);
      }
    }
  }
}

// A block a piece.
__global__ void __launch_bounds__(kThreads) chunks_kernel(const Piece* table, int, float keep, float take) {
  update(table[blockIdx.x], threadIdx.x, kThreads, keep, take);
}

// As many blocks as run at once, each with many pieces.
__global__ void __launch_bounds__(kThreads) persistent_kernel(const Piece* table, int pieces, float keep, float take) {
  for (int i = blockIdx.x; i < pieces; i += gridDim.x) {
    update(table[i], threadIdx.x, kThreads, keep, take);
  }
}

// A warp a piece, so that a block takes eight tiny tensors.
__global__ void __launch_bounds__(kThreads) warps_kernel(const Piece* table, int pieces, float keep, float take) {
  int i = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (i < pieces) {
    update(table[i], threadIdx.x % 32, 32, keep, take);
  }
}

// Pieces by cp.async.bulk, the copy engine of a multiprocessor, into shared memory and out of it, the next ones while one
// is worked on.
constexpr int kStages = 3;
constexpr int kBulkBytes = kStages * 2 * kChunk * static_cast<int>(sizeof(float));

__global__ void __launch_bounds__(kThreads) bulk_kernel(const Piece* table, int pieces, float keep, float take) {
  extern __shared__ __align__(128) float4 memory[]; // [kStages][2][kChunk / 4]
  __shared__ uint64_t arrived[kStages];
  auto place = [&](int stage, int operand) { return memory + (stage * 2 + operand) * (kChunk / 4); };
  auto start = [&](int k) {
    int64_t i = blockIdx.x + static_cast<int64_t>(k) * gridDim.x;
    if (i >= pieces || !whole_vectors(table[i])) {
      return;
    }
    Piece p = table[i];
    int stage = k % kStages;
    uint32_t bytes = static_cast<uint32_t>(p.n * sizeof(float));
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &arrived[stage], 2 * bytes);
    ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, place(stage, 0), p.ema, bytes, &arrived[stage]);
    ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, place(stage, 1), p.param, bytes, &arrived[stage]);
  };
  if (threadIdx.x == 0) {
    for (uint64_t& barrier : arrived) {
      ptx::mbarrier_init(&barrier, 1);
    }
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    for (int k = 0; k < kStages - 1; ++k) {
      start(k);
    }
  }
  __syncthreads();
  uint32_t phases = 0; // a bit a stage
  for (int k = 0; blockIdx.x + static_cast<int64_t>(k) * gridDim.x < pieces; ++k) {
    if (threadIdx.x == 0) {
      ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>()); // what the next one overwrites has been stored
      start(k + kStages - 1);
    }
    Piece p = table[blockIdx.x + static_cast<int64_t>(k) * gridDim.x];
    if (!whole_vectors(p)) {
      update(p, threadIdx.x, kThreads, keep, take);
      continue;
    }
    int stage = k % kStages;
    while (!ptx::mbarrier_try_wait_parity(&arrived[stage], phases >> stage & 1)) {
    }
    phases ^= 1u << stage;
    float4* ema = place(stage, 0);
    const float4* param = place(stage, 1);
    for (int at = threadIdx.x; at < p.n / 4; at += kThreads) {
      ema[at] = step(ema[at], param[at], keep, take);
    }
    ptx::fence_proxy_async(ptx::space_shared);
    __syncthreads();
    if (threadIdx.x == 0) {
      uint32_t bytes = static_cast<uint32_t>(p.n * sizeof(float));
      ptx::cp_async_bulk(ptx::space_global, ptx::space_shared, p.ema, ema, bytes);
      ptx::cp_async_bulk_commit_group();
    }
  }
  if (threadIdx.x == 0) {
    ptx::cp_async_bulk_wait_group(ptx::n32_t<0>());
  }
}

using Kernel = void (*)(const Piece*, int, float, float);

// Blocks of `kernel` that the device runs at once.
int at_once(Kernel kernel, int shared) {
  int device = 0;
  int processors = 0;
  int each = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, shared);
  return processors * each;
}

int launch(Kernel kernel, int blocks, int shared, const void* table, int pieces, float keep, float take, void* stream) {
  kernel<<<blocks, kThreads, shared, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const Piece*>(table), pieces, keep, take);
  return cudaGetLastError();
}

} // namespace

// Each returns a cudaError_t.
extern "C" {

int ema_chunks(const void* table, int pieces, float keep, float take, void* stream) {
  return launch(chunks_kernel, pieces, 0, table, pieces, keep, take, stream);
}

int ema_persistent(const void* table, int pieces, float keep, float take, void* stream) {
  static int most = at_once(persistent_kernel, 0);
  return launch(persistent_kernel, pieces < most ? pieces : most, 0, table, pieces, keep, take, stream);
}

int ema_warps(const void* table, int pieces, float keep, float take, void* stream) {
  int warps = kThreads / 32;
  return launch(warps_kernel, (pieces + warps - 1) / warps, 0, table, pieces, keep, take, stream);
}

int ema_bulk(const void* table, int pieces, float keep, float take, void* stream) {
  static int allowed = cudaFuncSetAttribute(bulk_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBulkBytes);
  static int most = at_once(bulk_kernel, kBulkBytes);
  if (allowed != cudaSuccess) {
    return allowed;
  }
  return launch(bulk_kernel, pieces < most ? pieces : most, kBulkBytes, table, pieces, keep, take, stream);
}
}
