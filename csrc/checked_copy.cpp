// detach_copy into a given tensor for the common case, with its arguments checked on the way: in Python that takes as long
// as to copy a small feature map. Anything out of the ordinary is left, untouched, to the public function.
#include <optional>

#include "detach_copy.h"
#include "facts.h"

namespace manpp {

namespace {

// With elements, all of which fill one stretch of memory.
bool ordinary(const std::optional<Facts>& t) {
  return t && has_memory(*t) && t->dense();
}

bool apart(const Facts& x, const Facts& y) {
  Span a = span_of(x.address, x.type, x.numel());
  Span b = span_of(y.address, y.type, y.numel());
  return a.end <= b.begin || b.end <= a.begin;
}

// Whether x was copied into out; false with nothing written where the arguments are out of the ordinary.
template <DetachCopy* copy>
bool copy_into(Tensor x, Tensor out) {
  std::optional<Facts> from = facts_of(x);
  std::optional<Facts> to = facts_of(out);
  if (!ordinary(from) || !ordinary(to) || !to->fits(*from) || !apart(*from, *to)) {
    return false;
  }
  copy(x, out);
  return true;
}

} // namespace

#ifdef MANPP_EMULATION
constexpr DetachCopy* on_cpu = cuda::detach_copy; // on the GPU that csrc/testing emulates
#else
constexpr DetachCopy* on_cpu = cpu::detach_copy;
#endif

STABLE_TORCH_LIBRARY_IMPL(manpp_kernels, CPU, m) {
  m.impl("_detach_copy_checked", TORCH_BOX(&copy_into<on_cpu>));
}
#ifdef MANPP_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(manpp_kernels, CUDA, m) {
  m.impl("_detach_copy_checked", TORCH_BOX(&copy_into<cuda::detach_copy>));
}
#endif

} // namespace manpp
