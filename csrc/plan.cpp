// The module manpp_kernels._plan: the host side of a launch plan. A call costs one Python method and one C call; it knows
// addresses and no tensors, and links no libtorch.
#include <stdexcept>

#include <pybind11/pybind11.h>

#include "plan_abi.h"

namespace py = pybind11;

namespace {

class Plan {
 public:
  Plan(uintptr_t plan, uintptr_t update, uintptr_t error, uintptr_t destroy)
      : plan_(reinterpret_cast<void*>(plan)), update_(reinterpret_cast<ManppPlanUpdate>(update)),
        error_(reinterpret_cast<ManppPlanError>(error)), destroy_(reinterpret_cast<ManppPlanDelete>(destroy)) {}

  ~Plan() {
    destroy_(plan_);
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  bool update(double momentum) const {
    ManppPlanArguments arguments{};
    arguments.momentum = momentum;
    return run(arguments);
  }

  bool update_with(
      double momentum,
      uintptr_t momentum_tensor,
      int32_t momentum_type,
      uintptr_t scale,
      int32_t scale_type,
      uintptr_t seed) const {
    ManppPlanArguments arguments{};
    arguments.momentum = momentum;
    arguments.momentum_tensor = reinterpret_cast<const void*>(momentum_tensor);
    arguments.momentum_type = momentum_type;
    arguments.scale = reinterpret_cast<const void*>(scale);
    arguments.scale_type = scale_type;
    arguments.seed = reinterpret_cast<const int64_t*>(seed);
    return run(arguments);
  }

 private:
  bool run(const ManppPlanArguments& arguments) const {
    int32_t status = 0;
    {
      py::gil_scoped_release release; // on the CPU an update of a large model takes milliseconds
      status = update_(plan_, &arguments);
    }
    if (status == kManppFailed) {
      throw std::runtime_error(error_());
    }
    return status == kManppDone;
  }

  void* plan_;
  ManppPlanUpdate update_;
  ManppPlanError error_;
  ManppPlanDelete destroy_;
};

} // namespace

PYBIND11_MODULE(_plan, m) {
  m.doc() = "The host side of a launch plan: addresses in, a launch out.";
  py::class_<Plan>(m, "Plan")
      .def(py::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t>(), "The plan, and three functions of the library.")
      .def("update", &Plan::update, "Runs the update; False, with nothing written, where a tensor has moved.")
      .def("update_with", &Plan::update_with, "The same with values that stand in device memory.");
}
