// The launch plan on the side of the operators: what holds the tables and watches the tensors.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "cpu/ema_scale_update.h"
#include "facts.h"
#include "plan_abi.h"
#ifdef MANPP_WITH_CUDA
#include "cuda/ema_scale_update.h"
#endif

#define MANPP_EXPORT extern "C" __attribute__((visibility("default")))

namespace manpp {

namespace {

// A tensor and where it was when the plan was built. Assigning to .data, module.to() and resize_() change the tensor
// that the handle refers to, so a look at it tells.
struct Watched {
  Tensor tensor;
  const void* address;
  int64_t numel;
  int64_t size; // of an element
  int32_t dtype;
  bool contiguous;
  // Sizes, then strides: .data may come to be another view of the same memory. Empty for a contiguous tensor, whose
  // elements stand in the same order as long as it stays contiguous.
  std::vector<int64_t> layout;

  explicit Watched(const Tensor& t)
      : tensor(t), address(t.data_ptr()), numel(t.numel()), size(element_size(dtype_of(t))), dtype(type_of(t)),
        contiguous(t.is_contiguous()) {
    if (!contiguous) {
      layout.insert(layout.end(), t.sizes().begin(), t.sizes().end());
      layout.insert(layout.end(), t.strides().begin(), t.strides().end());
    }
  }

  static int32_t type_of(const Tensor& t) {
    int32_t type = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &type));
    return type;
  }
  bool moved() const {
    if (tensor.data_ptr() != address || tensor.numel() != numel || type_of(tensor) != dtype) {
      return true;
    }
    if (contiguous) {
      return !tensor.is_contiguous();
    }
    auto sizes = tensor.sizes();
    auto strides = tensor.strides();
    return sizes.size() + strides.size() != layout.size() ||
        !std::equal(sizes.begin(), sizes.end(), layout.begin()) ||
        !std::equal(strides.begin(), strides.end(), layout.begin() + sizes.size());
  }
};

struct Plan {
  std::vector<Watched> watched; // what an update writes first
  size_t written = 0; // how many those are
  int64_t groups = 1;
  double total;
  std::unique_ptr<cpu::EmaLaunch> on_cpu;
#ifdef MANPP_WITH_CUDA
  std::unique_ptr<cuda::EmaLaunch> on_cuda;
#endif

  bool moved() const {
    for (const Watched& w : watched) {
      if (w.moved()) {
        return true;
      }
    }
    return false;
  }

  // Whether some of `count` numbers in device memory are in what an update writes, and would change under it.
  bool holds(const void* numbers, DType type, int64_t count) const {
    if (numbers == nullptr) {
      return false;
    }
    Span read = span_of(numbers, type, count);
    for (size_t i = 0; i < written; ++i) {
      const Watched& w = watched[i];
      uintptr_t begin = reinterpret_cast<uintptr_t>(w.address);
      if (w.numel > 0 && read.begin < begin + static_cast<uintptr_t>(w.numel * w.size) && begin < read.end) {
        return true;
      }
    }
    return false;
  }

  void run(const Scalars& scalars) const {
#ifdef MANPP_WITH_CUDA
    if (on_cuda) {
      on_cuda->run(scalars);
      return;
    }
#endif
    on_cpu->run(scalars);
  }
};

thread_local std::string last_error;

} // namespace

// Returns the plan's address, or 0 where an operand's layout needs a copy at every step, which a plan does not make.
int64_t plan_create(
    std::vector<Tensor> ema,
    std::vector<Tensor> params,
    std::vector<Tensor> bias,
    std::vector<int64_t> groups,
    double total,
    std::vector<Tensor> out) {
  auto plan = std::make_unique<Plan>();
  plan->total = total;
  plan->written = ema.size() + out.size();
  plan->groups = groups.empty() ? 1 : *std::max_element(groups.begin(), groups.end()) + 1;
  Table table = build_table(ema, params, bias, groups, out);
  if (!table.in_place()) {
    return 0;
  }
  for (const auto* list : {&ema, &out, &params, &bias}) {
    for (const Tensor& t : *list) {
      plan->watched.emplace_back(t);
    }
  }
  if (ema[0].is_cpu()) {
    plan->on_cpu = std::make_unique<cpu::EmaLaunch>(std::move(table.entries));
  }
#ifdef MANPP_WITH_CUDA
  if (ema[0].is_cuda()) {
    plan->on_cuda = std::make_unique<cuda::EmaLaunch>(table.entries, ema[0]);
  }
#endif
  return reinterpret_cast<int64_t>(plan.release());
}

MANPP_EXPORT int32_t manpp_plan_update(void* address, const ManppPlanArguments* arguments) {
  try {
    const Plan& plan = *static_cast<const Plan*>(address);
    auto momentum_type = static_cast<DType>(arguments->momentum_type);
    auto scale_type = static_cast<DType>(arguments->scale_type);
    if (plan.moved() || plan.holds(arguments->momentum_tensor, momentum_type, 1) ||
        plan.holds(arguments->scale, scale_type, plan.groups)) {
      return kManppMoved;
    }
    Scalars scalars;
    scalars.keep = arguments->momentum;
    scalars.take = 1.0 - arguments->momentum;
    scalars.total = plan.total;
    scalars.momentum = arguments->momentum_tensor;
    scalars.momentum_type = momentum_type;
    scalars.scale = arguments->scale;
    scalars.scale_type = scale_type;
    scalars.seed = arguments->seed;
    plan.run(scalars);
    return kManppDone;
  } catch (const std::exception& error) {
    last_error = error.what();
    return kManppFailed;
  }
}

MANPP_EXPORT const char* manpp_plan_error() {
  return last_error.c_str();
}

MANPP_EXPORT void manpp_plan_delete(void* address) {
  delete static_cast<Plan*>(address);
}

STABLE_TORCH_LIBRARY_IMPL(manpp_kernels, CPU, m) {
  m.impl("_plan_create", TORCH_BOX(&plan_create));
}
#ifdef MANPP_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(manpp_kernels, CUDA, m) {
  m.impl("_plan_create", TORCH_BOX(&plan_create));
}
#endif

} // namespace manpp
