// detach_copy on the GPU: cast and change of memory format in one pass.
#include "../detach_copy.h"
#include "common.cuh"

namespace manpp::cuda {

namespace {

constexpr int kPasses = 4; // vectors that a thread keeps in flight
constexpr int kTile = 4096; // elements of a tile: 16 a thread
constexpr int kLeastSide = 16; // of a tile, in elements: 32 bytes of the narrowest type, which memory is read in at least

template <class From, class To>
constexpr int kVector = vector_length(sizeof(From) > sizeof(To) ? sizeof(From) : sizeof(To));

template <class From, class To>
__global__ void __launch_bounds__(kThreads) cast_kernel(const From* __restrict__ x, To* __restrict__ y, int64_t n) {
  constexpr int V = kVector<From, To>;
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

// The tiles of a transposition: `height` x `width` elements, powers of two; so many of them down and across an image.
struct Tiles {
  uint32_t down;
  uint32_t across;
  int log_width;
  int log_height;
};

// An element of 2 bytes that is moved and not converted: as it is, so that a NaN keeps its bits.
struct Bits {
  uint16_t bits;

  Bits() = default;
  __device__ __forceinline__ explicit Bits(float x) {
    uint32_t word;
    memcpy(&word, &x, sizeof word);
    bits = static_cast<uint16_t>(word);
  }
  __device__ __forceinline__ explicit operator float() const {
    uint32_t word = bits;
    float x;
    memcpy(&x, &word, sizeof x);
    return x;
  }
};

// Elements of 2 bytes go in pairs where sizes allow: one by one, they are too many instructions to keep up with memory.
template <class T>
constexpr int kPair = 4 / static_cast<int>(sizeof(T));

// A thread's place in a tile that is walked along its lines, V elements at a time: it stays at `lane`, and its lines are
// `step` apart.
struct Walk {
  int lane;
  int line;
  int step;

  __device__ __forceinline__ Walk(int log_length, int v)
      : lane(threadIdx.x * v & ((1 << log_length) - 1)), line(threadIdx.x * v >> log_length),
        step(kThreads * v >> log_length) {}

  // How many of its lines are among the first `lines`, each of which has `length` elements.
  __device__ __forceinline__ int count(int64_t lines, int64_t length) const {
    int64_t left = lines - line;
    return lane >= length || left <= 0 ? 0 : static_cast<int>(min(int64_t{kTile}, left) + step - 1) / step;
  }
};

// One tile, x and y at its corner; `down` and `across` are what is left of the image from there. Where it is Whole, a
// thread asks for all that it reads before it waits for the first: the compiler mixes loads that depend on conditions
// with the stores after them.
template <bool Whole, int VX, int VY, class From, class To>
__device__ __forceinline__ void transpose_tile(
    const From* __restrict__ x, To* __restrict__ y, float* tile, int64_t rows, int64_t columns, int64_t down,
    int64_t across, const Tiles& tiles) {
  constexpr int kReads = kTile / (kThreads * VX);
  constexpr int kWrites = kTile / (kThreads * VY);
  int pitch = (1 << tiles.log_width) + 1;
  {
    Walk walk(tiles.log_width, VX);
    int count = Whole ? kReads : walk.count(down, across);
    x += walk.line * columns + walk.lane;
    int64_t stride = walk.step * columns;
    Packed<From, VX> in[kReads];
#pragma unroll
    for (int i = 0; i < kReads; ++i) {
      if (i < count) {
        in[i].load(x + i * stride);
      }
    }
    float* to = tile + walk.line * pitch + walk.lane;
#pragma unroll
    for (int i = 0; i < kReads; ++i) {
      if (i < count) {
        From element[VX];
        in[i].unpack(element);
#pragma unroll
        for (int k = 0; k < VX; ++k) {
          to[i * walk.step * pitch + k] = static_cast<float>(element[k]);
        }
      }
    }
  }
  __syncthreads();
  Walk walk(tiles.log_height, VY);
  int count = Whole ? kWrites : walk.count(across, down);
  const float* from = tile + walk.lane * pitch + walk.line;
  y += walk.line * rows + walk.lane;
  int64_t stride = walk.step * rows;
#pragma unroll
  for (int i = 0; i < kWrites; ++i) {
    if (i < count) {
      To out[VY];
#pragma unroll
      for (int k = 0; k < VY; ++k) {
        out[k] = static_cast<To>(from[k * pitch + i * walk.step]);
      }
      store_vector(y + i * stride, out);
    }
  }
}

// [rows][columns] -> [columns][rows] for every image, a tile a block: read along the rows, written along the columns,
// crossing in shared memory, whose rows are one element longer so that a column lies in 32 different banks.
template <class From, class To, int VX, int VY>
__global__ void __launch_bounds__(kThreads) transpose_kernel(
    const From* __restrict__ x, To* __restrict__ y, int64_t rows, int64_t columns, const Tiles tiles) {
  __shared__ float tile[kTile + kTile / kLeastSide];
  uint32_t line = blockIdx.x / tiles.across;
  uint32_t image = line / tiles.down;
  int64_t column = static_cast<int64_t>(blockIdx.x - line * tiles.across) << tiles.log_width;
  int64_t row = static_cast<int64_t>(line - image * tiles.down) << tiles.log_height;
  int64_t start = image * (rows * columns);
  x += start + row * columns + column;
  y += start + column * rows + row;
  int64_t down = rows - row;
  int64_t across = columns - column;
  if (down >> tiles.log_height > 0 && across >> tiles.log_width > 0) {
    transpose_tile<true, VX, VY>(x, y, tile, rows, columns, down, across, tiles);
  } else {
    transpose_tile<false, VX, VY>(x, y, tile, rows, columns, down, across, tiles);
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
  constexpr int64_t per_block = static_cast<int64_t>(kThreads) * kVector<From, To> * kPasses;
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

// The power of two that a side of `n` elements fits in, from kLeastSide to that of a square tile.
int log_side(int64_t n) {
  int log = 4;
  while (log < 6 && (int64_t{1} << log) < n) {
    ++log;
  }
  return log;
}
static_assert(1 << 4 == kLeastSide && 1 << (6 + 6) == kTile);

// Square tiles, but for images of few rows or columns, which they would be mostly off.
Tiles tiles_of(const Transposition& t) {
  constexpr int both = 12;
  Tiles tiles;
  tiles.log_height = log_side(t.rows);
  tiles.log_width = tiles.log_height < 6 ? both - tiles.log_height : log_side(t.columns);
  tiles.log_height = both - tiles.log_width;
  tiles.down = static_cast<uint32_t>((t.rows + (1 << tiles.log_height) - 1) >> tiles.log_height);
  tiles.across = static_cast<uint32_t>((t.columns + (1 << tiles.log_width) - 1) >> tiles.log_width);
  return tiles;
}

template <class From, class To>
void launch_transpose(const Tensor& x, Tensor& y, const Transposition& t, cudaStream_t stream) {
  Tiles tiles = tiles_of(t);
  uint32_t blocks = checked_blocks(t.batch * tiles.down * tiles.across);
  auto from = static_cast<const From*>(x.data_ptr());
  auto to = static_cast<To*>(y.data_ptr());
  auto run = [&](auto kernel) {
    launch_kernel("detach_copy", kernel, blocks, stream, from, to, t.rows, t.columns, tiles);
  };
  bool pairs = t.columns % kPair<From> == 0 && t.rows % kPair<To> == 0 && reinterpret_cast<uintptr_t>(from) % 4 == 0 &&
      reinterpret_cast<uintptr_t>(to) % 4 == 0;
  run(pairs ? transpose_kernel<From, To, kPair<From>, kPair<To>> : transpose_kernel<From, To, 1, 1>);
}

} // namespace

void detach_copy(Tensor x, Tensor out) {
  CopyKind kind = classify_copy(x, out);
  if (kind.how == CopyKind::Other) {
    copy(out, x);
    return;
  }
  DeviceGuard guard(x.get_device_index());
  cudaStream_t stream = current_stream(x.get_device_index());
  dispatch(dtype_of(x), [&](auto* from) {
    dispatch(dtype_of(out), [&](auto* to) {
      using From = std::remove_pointer_t<decltype(from)>;
      using To = std::remove_pointer_t<decltype(to)>;
      if (kind.how == CopyKind::Transpose) {
        constexpr bool moved = sizeof(From) == 2 && std::is_same_v<From, To>;
        launch_transpose<std::conditional_t<moved, Bits, From>, std::conditional_t<moved, Bits, To>>(
            x, out, kind.transposition, stream);
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
