// detach_copy on the CPU: cast and change of memory format in one pass.
#include <algorithm>

#include "../table.h"
#include "blocks.h"

namespace manpp::cpu {

namespace {

constexpr int64_t kGrain = 32768; // elements below which a second thread is not worth waking
constexpr int64_t kTile = 32; // a float tile of 32 x 32 is 4 KB: source and target lie in the first-level cache

// [rows][columns] -> [columns][rows], a tile at a time, converting on the way. Elements are read along the rows and
// written along the columns; in between they cross in a buffer of the arithmetic type.
void transpose_tile(
    DType from, DType to, const void* x, void* y, int64_t rows, int64_t columns, int64_t row, int64_t column) {
  int64_t height = std::min(kTile, rows - row);
  int64_t width = std::min(kTile, columns - column);
  alignas(64) float read[kTile];
  alignas(64) float crossed[kTile][kTile];
  for (int64_t i = 0; i < height; ++i) {
    const float* line = readable(from, at(x, from, (row + i) * columns + column), width, read);
    for (int64_t j = 0; j < width; ++j) {
      crossed[j][i] = line[j];
    }
  }
  for (int64_t j = 0; j < width; ++j) {
    store_block(to, crossed[j], height, at(y, to, (column + j) * rows + row));
  }
}

void transpose(DType from, DType to, const void* x, void* y, int64_t batch, int64_t rows, int64_t columns) {
  int64_t down = (rows + kTile - 1) / kTile;
  int64_t across = (columns + kTile - 1) / kTile;
  int64_t per_image = down * across;
  torch::stable::parallel_for(0, batch * per_image, kGrain / (kTile * kTile), [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      int64_t image = tile / per_image * rows * columns;
      int64_t within = tile % per_image;
      transpose_tile(
          from,
          to,
          at(x, from, image),
          at(y, to, image),
          rows,
          columns,
          within / across * kTile,
          within % across * kTile);
    }
  });
}

void cast(DType from, DType to, const void* x, void* y, int64_t n) {
  torch::stable::parallel_for(0, (n + kBlock - 1) / kBlock, kGrain / kBlock, [&](int64_t begin, int64_t end) {
    alignas(64) float buffer[kBlock];
    for (int64_t i = begin * kBlock; i < std::min(n, end * kBlock); i += kBlock) {
      int64_t length = std::min(kBlock, n - i);
      const float* line = readable(from, at(x, from, i), length, buffer);
      store_block(to, line, length, at(y, to, i));
    }
  });
}

} // namespace

void detach_copy(Tensor x, Tensor out) {
  CopyKind kind = classify_copy(x, out);
  if (kind.how == CopyKind::Other) {
    torch::stable::copy_(out, x);
    return;
  }
  DType from = dtype_of(x);
  DType to = dtype_of(out);
  if (kind.how == CopyKind::Cast) {
    cast(from, to, x.data_ptr(), out.data_ptr(), x.numel());
  } else {
    const Transposition& t = kind.transposition;
    transpose(from, to, x.data_ptr(), out.data_ptr(), t.batch, t.rows, t.columns);
  }
}

STABLE_TORCH_LIBRARY_IMPL(manpp_kernels, CPU, m) {
  m.impl("detach_copy", TORCH_BOX(&detach_copy));
}

} // namespace manpp::cpu
