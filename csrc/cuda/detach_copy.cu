// detach_copy on the GPU: cast and change of memory format in one pass.
#include "common.cuh"

namespace manpp::cuda {

namespace {

constexpr int kPasses = 4; // vectors that a thread keeps in flight
constexpr int kTile = 64; // a tile of 64 x 64: rows of 128 bytes and more on both sides, 16 elements a thread

template <class From, class To>
__global__ void __launch_bounds__(kThreads) cast_kernel(const From* __restrict__ x, To* __restrict__ y, int64_t n) {
  constexpr int V = vector_length(sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To));
  int64_t base = static_cast<int64_t>(blockIdx.x) * kThreads * V * kPasses;
  bool whole = base + kThreads * V * kPasses <= n && aligned16(x) && aligned16(y);
  if (!whole) {
    for (int i = threadIdx.x; i < kThreads * V * kPasses && base + i < n; i += kThreads) {
      y[base + i] = static_cast<To>(static_cast<float>(x[base + i]));
    }
    return;
  }
  From in[kPasses][V];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    load_vector(x + base + (i * kThreads + threadIdx.x) * V, in[i]);
  }
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    To out[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      out[k] = static_cast<To>(static_cast<float>(in[i][k]));
    }
    store_vector(y + base + (i * kThreads + threadIdx.x) * V, out);
  }
}

// [rows][columns] -> [columns][rows] for every image, a tile a block: read along the rows, written along the columns,
// crossing in shared memory, whose rows are one element longer so that a column lies in 32 different banks.
template <class From, class To>
__global__ void __launch_bounds__(kThreads) transpose_kernel(
    const From* __restrict__ x, To* __restrict__ y, int64_t rows, int64_t columns, int64_t down, int64_t across) {
  __shared__ float tile[kTile][kTile + 1];
  int64_t block = blockIdx.x;
  int64_t column0 = block % across * kTile;
  int64_t row0 = block / across % down * kTile;
  int64_t image = block / (across * down) * rows * columns;
  int lane = threadIdx.x % kTile;
  int line = threadIdx.x / kTile;
#pragma unroll
  for (int i = 0; i < kTile; i += kThreads / kTile) {
    int64_t row = row0 + line + i;
    int64_t column = column0 + lane;
    if (row < rows && column < columns) {
      tile[line + i][lane] = static_cast<float>(x[image + row * columns + column]);
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTile; i += kThreads / kTile) {
    int64_t column = column0 + line + i;
    int64_t row = row0 + lane;
    if (row < rows && column < columns) {
      y[image + column * rows + row] = static_cast<To>(tile[lane][line + i]);
    }
  }
}

template <class F>
void dispatch(DType t, const F& f) {
  switch (t) {
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::bf16:
      return f(static_cast<BFloat16*>(nullptr));
    default:
      return f(static_cast<Half*>(nullptr));
  }
}

uint32_t checked_blocks(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= 0x7FFFFFFF, "manpp_kernels: the tensor is too large for one launch");
  return static_cast<uint32_t>(blocks);
}

template <class From, class To>
void launch_cast(const Tensor& x, Tensor& y, cudaStream_t stream) {
  constexpr int V = vector_length(sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To));
  constexpr int64_t per_block = static_cast<int64_t>(kThreads) * V * kPasses;
  int64_t n = x.numel();
  launch_kernel(
      "detach_copy",
      cast_kernel<From, To>,
      checked_blocks((n + per_block - 1) / per_block),
      stream,
      static_cast<const From*>(x.data_ptr()),
      static_cast<To*>(y.data_ptr()),
      n);
}

template <class From, class To>
void launch_transpose(const Tensor& x, Tensor& y, const Transposition& t, cudaStream_t stream) {
  int64_t down = (t.rows + kTile - 1) / kTile;
  int64_t across = (t.columns + kTile - 1) / kTile;
  launch_kernel(
      "detach_copy",
      transpose_kernel<From, To>,
      checked_blocks(t.batch * down * across),
      stream,
      static_cast<const From*>(x.data_ptr()),
      static_cast<To*>(y.data_ptr()),
      t.rows,
      t.columns,
      down,
      across);
}

} // namespace

void detach_copy(Tensor x, Tensor out) {
  CopyKind kind = classify_copy(x, out);
  if (kind.how == CopyKind::Other) {
    torch::stable::copy_(out, x);
    return;
  }
  DeviceGuard guard(x.get_device_index());
  cudaStream_t stream = current_stream(x.get_device_index());
  dispatch(dtype_of(x), [&](auto* from) {
    dispatch(dtype_of(out), [&](auto* to) {
      using From = std::remove_pointer_t<decltype(from)>;
      using To = std::remove_pointer_t<decltype(to)>;
      if (kind.how == CopyKind::Transpose) {
        launch_transpose<From, To>(x, out, kind.transposition, stream);
      } else if constexpr (!std::is_same_v<From, To>) {
        launch_cast<From, To>(x, out, stream);
      }
    });
  });
}

MANPP_CUDA_OPERATORS(m) {
  m.impl("detach_copy", TORCH_BOX(&detach_copy));
}

} // namespace manpp::cuda
