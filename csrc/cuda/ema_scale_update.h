#pragma once

#include <optional>
#include <vector>

#include "../table.h"

namespace manpp::cuda {

// An update of entries on the device of `like`: one launch, or two where they are more than fit its parameters.
void update_entries(const std::vector<Entry>& entries, bool weights, const Tensor& like, const Scalars& scalars);

// The backward pass of entries as build_backward_table() makes them, which it may put into another order; the gradient of
// scale where it is given. One launch, or two as above.
void backward_of_entries(std::vector<Entry>& entries, const Tensor& scale, const std::optional<Tensor>& grad_scale);

// The tables of an update on a GPU, kept in device memory, for the launch plan.
class EmaLaunch {
 public:
  // `like` is any tensor on the device.
  EmaLaunch(const std::vector<Entry>& entries, const Tensor& like);
  // One launch on the current stream; allocates nothing and waits for nothing.
  void run(const Scalars& scalars);

 private:
  void keep_for_good();

  int device_;
  int kernel_;
  uint32_t chunks_;
  bool weights_ = false;
  Tensor table_;
  void* stream_ = nullptr; // on which the table was allocated
  bool kept_ = false;
  // Where it was built inside a capture, which writes nothing yet: every update in a capture then writes the table
  // first, for its graph may be the first to run, and so does the first update outside.
  std::vector<Entry> unwritten_;
};

} // namespace manpp::cuda
