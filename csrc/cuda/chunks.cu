#include <algorithm>

#include "chunks.cuh"

namespace manpp::cuda {

namespace {

template <class Table>
__global__ void write_chunks_kernel(const Table __grid_constant__ table, uint32_t chunks, Chunk* __restrict__ target) {
  uint32_t chunk = blockIdx.x * kThreads + threadIdx.x;
  if (chunk < chunks) {
    target[chunk] = table.get(chunk);
  }
}

template <bool Weights>
uint32_t write_all(const std::vector<Entry>& entries, Chunk* target, cudaStream_t stream) {
  using Table = ParameterTable<Weights, kMostTensors<Weights>>;
  auto table = std::make_unique<Table>(); // 30 KB, too much for a stack that may be a thread's
  uint32_t written = 0;
  for (size_t first = 0; first < entries.size(); first += Table::kCapacity) {
    size_t count = std::min<size_t>(Table::kCapacity, entries.size() - first);
    uint32_t chunks = fill_table(entries, first, count, *table);
    if (chunks > 0) {
      uint32_t blocks = (chunks + kThreads - 1) / kThreads;
      launch_kernel("write_chunks", write_chunks_kernel<Table>, blocks, stream, *table, chunks, target + written);
      written += chunks;
    }
  }
  return written;
}

} // namespace

uint32_t count_chunks(const std::vector<Entry>& entries) {
  int64_t chunks = 0;
  for (const Entry& e : entries) {
    chunks += (e.numel + kChunk - 1) / kChunk;
  }
  STD_TORCH_CHECK(chunks <= 0x7FFFFFFF, "manpp_kernels: more than 8 trillion elements in one launch");
  return static_cast<uint32_t>(chunks);
}

uint32_t write_chunks(const std::vector<Entry>& entries, bool weights, Chunk* target, cudaStream_t stream) {
  return weights ? write_all<true>(entries, target, stream) : write_all<false>(entries, target, stream);
}

} // namespace manpp::cuda
