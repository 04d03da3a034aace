#pragma once

#include <vector>

#include "../table.h"

namespace manpp::cuda {

// The tables of an update on a GPU, kept in device memory, for the launch plan.
class EmaLaunch {
 public:
  // `like` is any tensor on the device.
  EmaLaunch(const std::vector<Entry>& entries, const Tensor& like);
  // One launch on the current stream; allocates nothing and waits for nothing.
  void run(const Scalars& scalars) const;

 private:
  int device_;
  bool weights_;
  int kernel_;
  uint32_t chunks_ = 0;
  Tensor table_;
};

} // namespace manpp::cuda
