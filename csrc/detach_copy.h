// The signature of the operator, which its schema in Python dictates, once for every backend.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace manpp {

using DetachCopy = void(torch::stable::Tensor x, torch::stable::Tensor out);

namespace cpu {
DetachCopy detach_copy;
}
namespace cuda {
DetachCopy detach_copy;
}

} // namespace manpp
