// What the compiled operators and the host side of a launch plan say to each other: plain addresses and numbers, so
// that the second needs no libtorch.
#pragma once

#include <cstdint>

struct ManppPlanArguments {
  double momentum;
  const void* momentum_tensor; // the address of a device value to use instead, or null
  const void* scale;
  const int64_t* seed; // stochastic rounding where not null
  int32_t momentum_type; // index into float64, float32, bfloat16, float16
  int32_t scale_type;
};

enum ManppPlanStatus : int32_t {
  kManppDone = 0,
  kManppMoved = 1, // a tensor is not where the plan was built for, or an EMA holds scale or momentum; nothing was written
  kManppFailed = 2, // manpp_plan_error() says why
};

extern "C" {
typedef int32_t (*ManppPlanUpdate)(void* plan, const ManppPlanArguments* arguments);
typedef const char* (*ManppPlanError)();
typedef void (*ManppPlanDelete)(void* plan);
}
