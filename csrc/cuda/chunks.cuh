// How a block of a multi-tensor kernel learns what to work on: blockIdx.x is the number of a chunk, and a table says
// which stretch of which tensor that is.
#pragma once

#include <memory>

#include "common.cuh"

namespace manpp::cuda {

// Elements a block works on: 16 for each of its threads, so that one pass without a loop keeps, for each operand, four
// 16-byte loads of float32 in flight a thread.
constexpr int kChunk = 16 * kThreads;

// Elements that a thread takes at a time, one by one, where they are not worked on in vectors. It loads all of them
// before it stores the first: the compiler moves no load past a store that may go to the same place, and a chunk of n
// elements would wait for memory n / kThreads times, one after the other.
constexpr int kBatch = 8;

// A stretch of one tensor; the addresses are those of its first element.
struct alignas(16) Chunk {
  void* ema;
  const void* param;
  const void* bias;
  void* out;
  int64_t first; // its number within the tensor
  int32_t n;
  int32_t group;
  uint32_t tensor;
  DType ema_type;
  DType param_type;
  DType bias_type;
  uint8_t unused; // set to 0, as a kernel may read it with what lies beside it
};

// How many tensors fit the parameters of a launch, 32,764 bytes at most since CUDA 12.1. A launch takes longer the more
// bytes they have, used or not (of an empty kernel on an H200's host, 32 KB 4 us more than 64 bytes, and 9 more until it
// has run), so that short lists have a kernel of their own.
constexpr int kFewTensors = 128;
template <bool Weights>
constexpr int kMostTensors = Weights ? 704 : 1216;

// Tensors as a kernel parameter: no copy to the device, nothing to keep alive, and a CUDA graph records it by value.
template <bool Weights, int Capacity>
struct ParameterTable {
  static constexpr int kCapacity = Capacity;
  // Every pointer is offset by nothing; `ends` counts chunks up to and with a tensor; `tail` packs the length of its
  // last chunk (13 bits and up to kChunk itself) with the three dtypes.
  void* ema[kCapacity];
  const void* param[kCapacity];
  const void* bias[Weights ? kCapacity : 1];
  void* out[Weights ? kCapacity : 1];
  uint32_t ends[kCapacity];
  uint32_t tail[kCapacity];
  int32_t group[Weights ? kCapacity : 1];
  uint32_t first_tensor;
  int32_t count;

  __device__ __forceinline__ Chunk get(uint32_t chunk) const {
    int i = locate(ends, count, chunk);
    uint32_t within = chunk - (i == 0 ? 0 : ends[i - 1]);
    uint32_t packed = tail[i];
    Chunk c;
    c.ema_type = static_cast<DType>(packed >> 16 & 3);
    c.param_type = static_cast<DType>(packed >> 18 & 3);
    c.bias_type = static_cast<DType>(packed >> 20 & 3);
    c.first = static_cast<int64_t>(within) * kChunk;
    c.n = chunk + 1 == ends[i] ? packed & 0xFFFF : kChunk;
    c.tensor = first_tensor + i;
    c.unused = 0;
    c.ema = offset(ema[i], c.ema_type, c.first);
    c.param = offset(const_cast<void*>(param[i]), c.param_type, c.first);
    c.bias = nullptr;
    c.out = nullptr;
    c.group = 0;
    if constexpr (Weights) {
      c.bias = offset(const_cast<void*>(bias[i]), c.bias_type, c.first);
      c.out = offset(out[i], c.bias_type, c.first);
      c.group = group[i];
    }
    return c;
  }

 private:
  static __device__ __forceinline__ void* offset(void* p, DType t, int64_t elements) {
    return p == nullptr ? nullptr : static_cast<char*>(p) + elements * element_size(t);
  }
};

static_assert(sizeof(ParameterTable<false, kMostTensors<false>>) + sizeof(Scalars) + 64 <= 32764);
static_assert(sizeof(ParameterTable<true, kMostTensors<true>>) + sizeof(Scalars) + 64 <= 32764);

// Chunks in device memory: for a launch plan, and for more tensors than fit a parameter.
struct DeviceTable {
  const Chunk* chunks;

  __device__ __forceinline__ Chunk get(uint32_t chunk) const {
    return chunks[chunk];
  }
};

// The chunks of `entries`, in device memory. Written by launches that carry the tables as parameters: no copy from the
// host, so this too can be captured. Returns the number of chunks.
uint32_t write_chunks(const std::vector<Entry>& entries, bool weights, Chunk* target, cudaStream_t stream);

uint32_t count_chunks(const std::vector<Entry>& entries);

// entries[first, first + count) as a parameter; returns the number of their chunks.
template <bool Weights, int Capacity>
uint32_t fill_table(
    const std::vector<Entry>& entries, size_t first, size_t count, ParameterTable<Weights, Capacity>& table) {
  uint32_t end = 0;
  for (size_t i = 0; i < count; ++i) {
    const Entry& e = entries[first + i];
    uint32_t chunks = static_cast<uint32_t>((e.numel + kChunk - 1) / kChunk);
    uint32_t tail = static_cast<uint32_t>(e.numel - static_cast<int64_t>(chunks - 1) * kChunk);
    end += chunks;
    table.ema[i] = e.ema;
    table.param[i] = e.param;
    table.ends[i] = end;
    table.tail[i] = chunks == 0 ? 0
                                : tail | static_cast<uint32_t>(e.ema_type) << 16 |
            static_cast<uint32_t>(e.param_type) << 18 | static_cast<uint32_t>(e.bias_type) << 20;
    if constexpr (Weights) {
      table.bias[i] = e.bias;
      table.out[i] = e.out;
      table.group[i] = e.group;
    }
  }
  table.first_tensor = static_cast<uint32_t>(first);
  table.count = static_cast<int32_t>(count);
  return end;
}

// Calls launch(table, chunks): with all entries as a parameter, or, where they are too many, in device memory.
template <bool Weights, class Launch>
void launch_over(const std::vector<Entry>& entries, const Tensor& like, cudaStream_t stream, const Launch& launch) {
  if (entries.size() <= kFewTensors) {
    ParameterTable<Weights, kFewTensors> table;
    uint32_t chunks = fill_table(entries, 0, entries.size(), table);
    launch(table, chunks);
  } else if (entries.size() <= kMostTensors<Weights>) {
    auto table = std::make_unique<ParameterTable<Weights, kMostTensors<Weights>>>(); // too large for a thread's stack
    uint32_t chunks = fill_table(entries, 0, entries.size(), *table);
    launch(*table, chunks);
  } else {
    uint32_t chunks = count_chunks(entries);
    Tensor buffer = scratch(like, static_cast<int64_t>(chunks) * sizeof(Chunk));
    Chunk* target = static_cast<Chunk*>(buffer.data_ptr());
    write_chunks(entries, Weights, target, stream);
    launch(DeviceTable{target}, chunks);
  }
}

} // namespace manpp::cuda
