// detach_copy on the CPU: a change of memory format, and a cast with it, in one pass.
#include <algorithm>
#include <cstring>

#include "../table.h"
#include "blocks.h"
#include "memory.h"

namespace manpp::cpu {

namespace {

constexpr int64_t kGrain = 32768; // elements below which a second thread is not worth waking
// A tile is kTile rows of four cache lines: runs of memory long enough for the processor to foresee, 16 KB in all, which
// leaves half of a first-level cache to the lines that are read.
constexpr int64_t kTile = 64;
constexpr int64_t kRowBytes = 256;
constexpr int64_t kLongest = kRowBytes / 2; // elements of a row

inline int64_t row_length(DType read) {
  return kRowBytes / element_size(read);
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define MANPP_SHUFFLE __builtin_shufflevector
#endif
#endif

#if defined(__GNUC__)
#define MANPP_PREFETCH(p) __builtin_prefetch(p)
#else
#define MANPP_PREFETCH(p) (void)(p)
#endif

// One transposition of rows x columns elements that are `stride` apart from row to row, to `kTile` apart. Whole squares
// of 16-byte vectors cross in registers, where the compiler has vectors; bits move, so that only their size counts.
template <class Bits>
void transpose_scalar(
    const Bits* x, int64_t stride, int64_t row, int64_t rows, int64_t column, int64_t columns, Bits* __restrict__ y) {
  for (int64_t i = row; i < rows; ++i) {
    for (int64_t j = column; j < columns; ++j) {
      y[j * kTile + i] = x[i * stride + j];
    }
  }
}

template <class Bits>
void transpose_bits(const Bits* x, int64_t stride, int64_t rows, int64_t columns, Bits* __restrict__ y) {
  constexpr int64_t side = 16 / sizeof(Bits);
#ifdef MANPP_SHUFFLE
  typedef Bits Vector __attribute__((vector_size(16)));
  int64_t whole_rows = rows / side * side;
  int64_t whole_columns = columns / side * side;
  for (int64_t i = 0; i < whole_rows; i += side) {
    for (int64_t j = 0; j < whole_columns; j += side) {
      Vector v[side];
      Vector w[side];
      for (int64_t k = 0; k < side; ++k) {
        std::memcpy(&v[k], x + (i + k) * stride + j, sizeof(Vector));
      }
      // Interleaving row k with row k + side / 2 turns the number of an element, (row, column), by one bit to the left:
      // after as many rounds as a row number has bits, row and column have changed places.
      for (int64_t round = 1; round < side; round *= 2) {
        for (int64_t k = 0; k < side / 2; ++k) {
          if constexpr (side == 4) {
            w[2 * k] = MANPP_SHUFFLE(v[k], v[k + 2], 0, 4, 1, 5);
            w[2 * k + 1] = MANPP_SHUFFLE(v[k], v[k + 2], 2, 6, 3, 7);
          } else {
            w[2 * k] = MANPP_SHUFFLE(v[k], v[k + 4], 0, 8, 1, 9, 2, 10, 3, 11);
            w[2 * k + 1] = MANPP_SHUFFLE(v[k], v[k + 4], 4, 12, 5, 13, 6, 14, 7, 15);
          }
        }
        std::copy(w, w + side, v);
      }
      for (int64_t k = 0; k < side; ++k) {
        std::memcpy(y + (j + k) * kTile + i, &v[k], sizeof(Vector));
      }
    }
  }
  transpose_scalar(x, stride, 0, whole_rows, whole_columns, columns, y);
  transpose_scalar(x, stride, whole_rows, rows, 0, columns, y);
#else
  transpose_scalar(x, stride, 0, rows, 0, columns, y);
#endif
}

void write_line(const void* x, int64_t bytes, void* y, bool stream) {
  if (stream) {
    stream_bytes(x, bytes, y);
  } else {
    std::memcpy(y, x, static_cast<size_t>(bytes));
  }
}

// n elements of one type as another; `buffer` is for those that are float neither before nor after.
void convert_line(DType from, DType to, const void* x, int64_t n, void* y, float* buffer) {
  if (to == DType::f32) {
    load_block(from, x, n, static_cast<float*>(y));
  } else {
    store_block(to, readable(from, x, n, buffer), n, y);
  }
}

struct Copy {
  DType from;
  DType to;
  const void* x;
  void* y;
  bool stream; // past the caches
};

// One tile of [rows][columns] -> [columns][rows]. Elements cross in the narrower of the two types, and go by way of a
// buffer: rows that lie a power of two apart share the places in a cache, and would drive one another out of it.
void transpose_tile(const Copy& c, const void* x, void* y, int64_t rows, int64_t columns, int64_t row, int64_t column) {
  int64_t height = std::min(kTile, rows - row);
  int64_t width = std::min(row_length(c.from), columns - column);
  alignas(64) uint16_t crossed[kTile * kLongest]; // or half as many floats
  alignas(64) uint16_t narrow[kTile * kLongest];
  alignas(64) float line[kLongest];
  x = at(x, c.from, row * columns + column);
  int64_t stride = columns;
  DType crossing = c.from;
  if (c.from != c.to && c.to != DType::f32) {
    for (int64_t i = 0; i < height; ++i) {
      convert_line(c.from, c.to, at(x, c.from, i * columns), width, narrow + i * kLongest, line);
    }
    x = narrow;
    stride = kLongest;
    crossing = c.to;
  }
  if (crossing == DType::f32) {
    transpose_bits(static_cast<const uint32_t*>(x), stride, height, width, reinterpret_cast<uint32_t*>(crossed));
  } else {
    transpose_bits(static_cast<const uint16_t*>(x), stride, height, width, crossed);
  }
  for (int64_t j = 0; j < width; ++j) {
    const void* from = at(crossed, crossing, j * kTile);
    if (crossing != c.to) {
      load_block(crossing, from, height, line);
      from = line;
    }
    write_line(from, height * element_size(c.to), at(y, c.to, (column + j) * rows + row), c.stream);
  }
}

void transpose(const Copy& c, int64_t batch, int64_t rows, int64_t columns) {
  struct Place {
    int64_t image; // its first element
    int64_t row;
    int64_t column;
  };
  int64_t down = (rows + kTile - 1) / kTile;
  int64_t length = row_length(c.from);
  int64_t across = (columns + length - 1) / length;
  auto place_of = [=](int64_t tile) {
    int64_t within = tile % (down * across);
    return Place{tile / (down * across) * rows * columns, within / across * kTile, within % across * length};
  };
  torch::stable::parallel_for(0, batch * down * across, kGrain / (kTile * kTile), [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      if (tile + 1 < end) {
        // The lines of the next tile: short runs far apart, which the processor does not foresee.
        Place next = place_of(tile + 1);
        int64_t bytes = std::min(length, columns - next.column) * element_size(c.from);
        for (int64_t i = next.row; i < std::min(rows, next.row + kTile); ++i) {
          const char* line = static_cast<const char*>(at(c.x, c.from, next.image + i * columns + next.column));
          for (int64_t offset = 0; offset < bytes; offset += 64) {
            MANPP_PREFETCH(line + offset);
          }
        }
      }
      Place p = place_of(tile);
      transpose_tile(c, at(c.x, c.from, p.image), at(c.y, c.to, p.image), rows, columns, p.row, p.column);
    }
    stream_fence();
  });
}

} // namespace

void detach_copy(Tensor x, Tensor out) {
  if (is_dense(out)) {
    expect_writes(out.data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  }
  CopyKind kind = classify_copy(x, out);
  if (kind.how != CopyKind::Transpose) {
    torch::stable::copy_(out, x); // PyTorch's own is at the speed of the memory, but for transpositions
    return;
  }
  Copy c{dtype_of(x), dtype_of(out), x.data_ptr(), out.data_ptr(), false};
  c.stream = out.numel() * element_size(c.to) > kStreamBytes;
  const Transposition& t = kind.transposition;
  transpose(c, t.batch, t.rows, t.columns);
}

STABLE_TORCH_LIBRARY_IMPL(manpp_kernels, CPU, m) {
  m.impl("detach_copy", TORCH_BOX(&detach_copy));
}

} // namespace manpp::cpu
