#pragma once

#include <vector>

#include "../multi_tensor.h"

namespace manpp::cpu {

// The tables of an update on the CPU, for the operator (built anew) and the launch plan (built once).
struct EmaLaunch {
  std::vector<Entry> entries;
  std::vector<int64_t> ends; // chunk_ends
  bool stream = false; // the effective weights go past the caches, being larger than those

  explicit EmaLaunch(std::vector<Entry> entries);
  void run(const Scalars& scalars) const;
};

} // namespace manpp::cpu
