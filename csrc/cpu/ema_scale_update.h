#pragma once

#include <optional>
#include <vector>

#include "../table.h"

namespace manpp::cpu {

// The tables of an update on the CPU, for the operator (built anew) and the launch plan (built once).
struct EmaLaunch {
  std::vector<Entry> entries;
  std::vector<int64_t> ends; // chunk_ends
  bool stream = false; // the effective weights go past the caches, being larger than those

  explicit EmaLaunch(std::vector<Entry> entries);
  void run(const Scalars& scalars) const;
};

// The backward pass of entries as build_backward_table() makes them; the gradient of scale where it is given.
void backward_of_entries(
    const std::vector<Entry>& entries, const Tensor& scale, const std::optional<Tensor>& grad_scale);

} // namespace manpp::cpu
