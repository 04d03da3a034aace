// What the checked forms of the operators (checked.cpp, checked_copy.cpp, checked_mix.cpp) ask of a tensor.
#pragma once

#include <algorithm>
#include <exception>
#include <optional>

#include "table.h"

namespace manpp {

// What there is to know of a tensor, asked for once: each question is a call into libtorch.
struct Facts {
  void* address = nullptr;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int64_t dim = 0;
  int32_t device_type = 0;
  int32_t device_index = 0;
  DType type = DType::f32;
  bool known = false; // of one of the four dtypes
  bool contiguous = false;

  explicit Facts(AtenTensorHandle t) {
    int32_t dtype = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t, &dtype));
    known = find_dtype(dtype, &type);
    if (!known) {
      return;
    }
    int64_t* borrowed = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(t, &address));
    int64_t offset = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t, &offset));
    if (reinterpret_cast<uintptr_t>(address) == static_cast<uintptr_t>(offset * element_size(type))) {
      address = nullptr; // a view of a storage that was freed
    }
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t, &borrowed));
    sizes = borrowed;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t, &borrowed));
    strides = borrowed;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t, &dim));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t, &device_type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t, &device_index));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(t, &contiguous));
  }

  int64_t numel() const {
    int64_t product = 1;
    for (int64_t d = 0; d < dim; ++d) {
      product *= sizes[d];
    }
    return product;
  }

  bool dense() const {
    return contiguous || is_dense(sizes, strides, dim);
  }

  bool on_device_of(const Facts& other) const {
    return device_type == other.device_type && device_index == other.device_index;
  }

  // Of the same shape and on the same device.
  bool fits(const Facts& other) const {
    return known && on_device_of(other) && dim == other.dim && std::equal(sizes, sizes + dim, other.sizes);
  }

  // And with its elements in the same order.
  bool matches(const Facts& other) const {
    if (!fits(other) || contiguous != other.contiguous) {
      return false;
    }
    for (int64_t d = 0; !contiguous && d < dim; ++d) {
      if (sizes[d] > 1 && strides[d] != other.strides[d]) {
        return false;
      }
    }
    return true;
  }
};

inline std::optional<Facts> facts_of(const Tensor& t) {
  try {
    return Facts(t.get());
  } catch (const std::exception&) { // a tensor without strides or storage
    return std::nullopt;
  }
}

// Of one of the four dtypes, with elements. (Without an address: a storage that was freed.)
inline bool has_memory(const Facts& t) {
  return t.known && t.address != nullptr && t.numel() > 0;
}

} // namespace manpp
