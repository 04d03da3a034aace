// detach_copy on the CPU: a cast, a change of memory format, or both in one pass.
#include <algorithm>
#include <cstring>

#include "../detach_copy.h"
#include "../table.h"
#include "blocks.h"
#include "memory.h"

namespace manpp::cpu {

namespace {

// A tile is 64 rows of four cache lines: runs of memory long enough for the processor to foresee, 16 KB in all, which
// leaves half of a first-level cache to the lines that are read. Where there are fewer rows or shorter ones it
// takes more of the other, up to the same area.
constexpr int64_t kHeight = 64;
constexpr int64_t kRowBytes = 256;
constexpr int64_t kTileBytes = kHeight * kRowBytes;

struct TileShape {
  int64_t height;
  int64_t width;
};

inline TileShape tile_shape(DType crossing, int64_t rows, int64_t columns) {
  int64_t area = kTileBytes / element_size(crossing);
  int64_t width = std::min(kRowBytes / element_size(crossing), columns);
  int64_t height = std::min(kHeight, rows);
  if (height < kHeight) {
    width = std::min(area / height, columns);
  } else {
    height = std::min(area / width, rows);
  }
  return {height, width};
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define MANPP_SHUFFLE __builtin_shufflevector
#endif
#endif

// The part of a transposition that begins at `row` and `column`, element by element.
template <class Bits>
void transpose_scalar(
    const Bits* x,
    int64_t from,
    int64_t row,
    int64_t rows,
    int64_t column,
    int64_t columns,
    Bits* __restrict__ y,
    int64_t to) {
  for (int64_t i = row; i < rows; ++i) {
    for (int64_t j = column; j < columns; ++j) {
      y[j * to + i] = x[i * from + j];
    }
  }
}

// One transposition of rows x columns elements, whose rows are `from` elements apart, to columns that are `to` apart.
// Whole squares of 16-byte vectors cross in registers, where the compiler has vectors; bits move, so that only their size
// counts. The lines `ahead` elements further on are fetched meanwhile, so that the memory never rests.
template <class Bits>
void transpose_bits(
    const Bits* x, int64_t from, int64_t rows, int64_t columns, Bits* __restrict__ y, int64_t to, int64_t ahead) {
  constexpr int64_t side = 16 / sizeof(Bits);
  constexpr int64_t line = 64 / sizeof(Bits);
#ifdef MANPP_SHUFFLE
  typedef Bits Vector __attribute__((vector_size(16)));
  int64_t whole_rows = rows / side * side;
  int64_t whole_columns = columns / side * side;
  for (int64_t i = 0; i < whole_rows; i += side) {
    for (int64_t j = 0; j < whole_columns; j += side) {
      Vector v[side];
      Vector w[side];
      if (ahead != 0 && j % line == 0) {
        for (int64_t k = 0; k < side; ++k) {
          prefetch_line(x + (i + k) * from + j + ahead);
        }
      }
      for (int64_t k = 0; k < side; ++k) {
        std::memcpy(&v[k], x + (i + k) * from + j, sizeof(Vector));
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
        std::memcpy(y + (j + k) * to + i, &v[k], sizeof(Vector));
      }
    }
  }
  transpose_scalar(x, from, 0, whole_rows, whole_columns, columns, y, to);
  transpose_scalar(x, from, whole_rows, rows, 0, columns, y, to);
#else
  transpose_scalar(x, from, 0, rows, 0, columns, y, to);
#endif
}

struct Copy {
  DType from;
  DType to;
  const void* x;
  void* y;
  bool stream; // past the caches
};

// n elements of one type as another, of which one may be float.
void convert(DType from, DType to, const void* x, int64_t n, void* y) {
  alignas(64) float buffer[kBlock];
  if (to == DType::f32) {
    load_block(from, x, n, static_cast<float*>(y));
    return;
  }
  for (int64_t i = 0; i < n; i += kBlock) {
    int64_t m = std::min(kBlock, n - i);
    store_block(to, readable(from, at(x, from, i), m, buffer), m, at(y, to, i));
  }
}

// n elements that have crossed as type `from`, to their place.
void write(const Copy& c, DType from, const void* x, int64_t n, void* y) {
  if (from == c.to) {
    int64_t bytes = n * element_size(from);
    c.stream ? stream_bytes(x, bytes, y) : static_cast<void>(std::memcpy(y, x, static_cast<size_t>(bytes)));
    return;
  }
  if (!c.stream) {
    convert(from, c.to, x, n, y);
    return;
  }
  alignas(64) float converted[kBlock]; // the wider type is what comes out here
  for (int64_t i = 0; i < n; i += kBlock) {
    int64_t m = std::min(kBlock, n - i);
    convert(from, c.to, at(x, from, i), m, converted);
    stream_bytes(converted, m * element_size(c.to), at(y, c.to, i));
  }
}

// One tile of [rows][columns] -> [columns][rows]; x and y are where it begins. Elements cross in the narrower of the two
// types, and go by way of a buffer: lines that lie a power of two apart share the places in a cache, and would drive one
// another out of it. Not where the tile is as high as the map, as its lines then stand side by side.
void transpose_tile(
    const Copy& c, const void* x, void* y, int64_t rows, int64_t columns, TileShape tile, int64_t ahead) {
  alignas(64) unsigned char crossed[kTileBytes];
  alignas(64) unsigned char narrow[kTileBytes];
  int64_t stride = columns;
  DType crossing = c.from;
  bool together = tile.height == rows;
  if (!c.stream) { // the lines to be written arrive while elements cross
    int64_t runs = together ? 1 : tile.width;
    int64_t bytes = tile.height * (together ? tile.width : 1) * element_size(c.to);
    for (int64_t j = 0; j < runs; ++j) {
      prefetch(at(y, c.to, j * rows), bytes);
    }
  }
  if (c.from != c.to && c.to != DType::f32) {
    // Rows that follow one another without a gap are one long row.
    bool joined = tile.width == columns;
    int64_t runs = joined ? 1 : tile.height;
    int64_t length = joined ? tile.height * tile.width : tile.width;
    for (int64_t i = 0; i < runs; ++i) {
      for (int64_t j = 0; j < length; j += kBlock) {
        int64_t n = std::min(kBlock, length - j);
        const void* from = at(x, c.from, i * columns + j);
        prefetch(at(from, c.from, ahead), n * element_size(c.from));
        convert(c.from, c.to, from, n, at(narrow, c.to, i * tile.width + j));
      }
    }
    x = narrow;
    stride = tile.width;
    crossing = c.to;
    ahead = 0;
  }
  bool direct = together && crossing == c.to && !c.stream;
  void* to = direct ? y : crossed;
  auto cross = [&](const auto* from, auto* result) {
    transpose_bits(from, stride, tile.height, tile.width, result, tile.height, ahead);
  };
  if (crossing == DType::f32) {
    cross(static_cast<const uint32_t*>(x), static_cast<uint32_t*>(to));
  } else {
    cross(static_cast<const uint16_t*>(x), static_cast<uint16_t*>(to));
  }
  if (direct) {
    return;
  }
  if (together) {
    write(c, crossing, crossed, tile.height * tile.width, y);
    return;
  }
  for (int64_t j = 0; j < tile.width; ++j) {
    write(c, crossing, at(crossed, crossing, j * tile.height), tile.height, at(y, c.to, j * rows));
  }
}

// Elements that stay in their order.
void cast(const Copy& c, int64_t count) {
  torch::stable::parallel_for(0, (count + kBlock - 1) / kBlock, kGrain / kBlock, [&](int64_t begin, int64_t end) {
    int64_t stop = std::min(count, end * kBlock);
    for (int64_t i = begin * kBlock; i < stop; i += kBlock) {
      int64_t n = std::min(kBlock, stop - i);
      int64_t next = std::min(kBlock, stop - i - n);
      prefetch(at(c.x, c.from, i + n), next * element_size(c.from));
      if (!c.stream) {
        prefetch(at(c.y, c.to, i + n), next * element_size(c.to));
      }
      write(c, c.from, at(c.x, c.from, i), n, at(c.y, c.to, i));
    }
    stream_fence();
  });
}

void transpose(const Copy& c, int64_t batch, int64_t rows, int64_t columns) {
  // By the type in which elements cross, so that what is written comes in runs as long as what is read.
  TileShape most = tile_shape(element_size(c.to) < element_size(c.from) ? c.to : c.from, rows, columns);
  int64_t down = (rows + most.height - 1) / most.height;
  int64_t across = (columns + most.width - 1) / most.width;
  struct Place {
    int64_t image; // its first element
    int64_t row;
    int64_t column;
  };
  auto place_of = [=](int64_t tile) {
    int64_t within = tile % (down * across);
    return Place{
        tile / (down * across) * rows * columns, within / across * most.height, within % across * most.width};
  };
  auto offset_of = [=](const Place& p) { return p.image + p.row * columns + p.column; };
  int64_t grain = kGrain / (most.height * most.width);
  torch::stable::parallel_for(0, batch * down * across, grain, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      Place p = place_of(tile);
      Place next = place_of(std::min(tile + 1, end - 1));
      TileShape shape{std::min(most.height, rows - p.row), std::min(most.width, columns - p.column)};
      const void* x = at(c.x, c.from, offset_of(p));
      void* y = at(c.y, c.to, p.image + p.column * rows + p.row);
      transpose_tile(c, x, y, rows, columns, shape, offset_of(next) - offset_of(p));
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
  // PyTorch's own copy is at the speed of the memory, but for transpositions and most casts.
  if (kind.how == CopyKind::Other || (kind.how == CopyKind::Cast && dtype_of(out) == DType::f16)) {
    copy(out, x);
    return;
  }
  Copy c{dtype_of(x), dtype_of(out), x.data_ptr(), out.data_ptr(), false};
  c.stream = out.numel() * element_size(c.to) > kStreamBytes;
  if (kind.how == CopyKind::Cast) {
    cast(c, out.numel());
  } else {
    const Transposition& t = kind.transposition;
    transpose(c, t.batch, t.rows, t.columns);
  }
}

STABLE_TORCH_LIBRARY_IMPL(manpp_kernels, CPU, m) {
  m.impl("detach_copy", TORCH_BOX(&detach_copy));
}

} // namespace manpp::cpu
