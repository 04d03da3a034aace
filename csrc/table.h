// From lists of tensors, as an operator receives them, to the table of a launch.
#pragma once

#include <deque>
#include <optional>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "multi_tensor.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK // as newer headers than those of PyTorch 2.11 name it
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace manpp {

using torch::stable::Tensor;

DType dtype_of(const Tensor& t);
// The same for a dtype as the C shim numbers it; false where it is none of the four.
bool find_dtype(int32_t number, DType* type);
int32_t dtype_number(DType type);
bool same_sizes(const Tensor& a, const Tensor& b);
bool same_layout(const Tensor& a, const Tensor& b);

// Whether the elements of t fill one stretch of memory, in whatever order.
bool is_dense(const Tensor& t);
bool is_dense(const int64_t* sizes, const int64_t* strides, int64_t dim);

// to.copy_(from), without a look at the dispatcher's list of operators by name, which takes longer than a small copy.
void copy(Tensor& to, const Tensor& from);

// A new tensor of x's dtype on x's device, with the sizes and strides of `like`.
Tensor empty_with_layout(const Tensor& x, const Tensor& like);

// An uninitialised tensor, owned by whom the handle is handed to. By the shim: the dispatcher looks operators up by name.
AtenTensorHandle new_tensor(
    int64_t dim, const int64_t* sizes, const int64_t* strides, DType type, int32_t device_type, int32_t device_index);

// As torch.empty_like, and a tensor without elements, of x's dtype and on its device.
Tensor new_like(const Tensor& x);
Tensor nothing_like(const Tensor& x);

// x where it is laid out like `like`, else a copy that is.
Tensor matching(const Tensor& x, const Tensor& like);

// The entries of a launch. Kernels walk memory, so where operands are laid out differently, or with gaps, they work on
// stand-ins laid out alike, whose results `finish` copies back.
struct Table {
  std::vector<Entry> entries;
  std::deque<Tensor> keep_alive; // whose elements stay where they are when it grows
  std::vector<std::pair<Tensor, Tensor>> copy_back; // to, from

  bool in_place() const {
    return keep_alive.empty();
  }
  void finish();
};

Table build_table(
    const std::vector<Tensor>& ema,
    const std::vector<Tensor>& params,
    const std::vector<Tensor>& bias,
    const std::vector<int64_t>& groups,
    const std::vector<Tensor>& out);

// The same for the backward pass: `param` of an entry is the gradient of the effective weights, `out` that of bias.
// Either bias and ema, or grad_bias, may be empty.
Table build_backward_table(
    const std::vector<Tensor>& grad,
    const std::vector<Tensor>& bias,
    const std::vector<Tensor>& ema,
    const std::vector<int64_t>& groups,
    const std::vector<Tensor>& grad_bias);

// Every group has an entry of scale.
void check_groups(const std::vector<int64_t>& groups, const Tensor& scale);

// The entries of scale, which kernels read as they lie: its memory has to be contiguous.
const void* scale_entries(const Tensor& scale);

Scalars make_scalars(
    double momentum,
    const std::optional<Tensor>& momentum_tensor,
    const std::optional<Tensor>& scale,
    double total,
    const std::optional<Tensor>& seed);

// How the entries of a tensor map to the channels of dimension 1: element i belongs to channel (i / inner) % channels.
struct ChannelLayout {
  int64_t outer = 1;
  int64_t channels = 1;
  int64_t inner = 1;
};

// For x dense in memory; nothing where a channel's elements are not laid out that way.
std::optional<ChannelLayout> channel_layout(const Tensor& x, const Tensor& scale);

// Memory read as [batch][rows][columns] and written as [batch][columns][rows].
struct Transposition {
  int64_t batch = 0;
  int64_t rows = 0;
  int64_t columns = 0;
};

// What a copy comes to. Integers, float64, layouts other than contiguous and channels_last, and a copy that changes
// neither layout nor dtype (a memcpy) are PyTorch's own copy's: Other.
struct CopyKind {
  enum How { Other, Cast, Transpose } how = Other;
  Transposition transposition;
};

CopyKind classify_copy(const Tensor& x, const Tensor& out);

} // namespace manpp
