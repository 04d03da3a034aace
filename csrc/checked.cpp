// ema_scale_update and its backward pass for the common case, with their arguments checked on the way: what Python would
// take a microsecond a tensor for. Anything out of the ordinary is left, untouched, to Python, which either names what is
// wrong or takes the long way.
#include <Python.h>

#include <algorithm>
#include <exception>
#include <utility>

#include "cpu/ema_scale_update.h"
#if defined(MANPP_WITH_CUDA) || defined(MANPP_EMULATION)
#include "cuda/ema_scale_update.h"
#endif
#include "facts.h"

namespace manpp {

namespace {

// The interpreter's lock, which an operator runs without. To let go of a tensor that Python has, too, PyTorch takes it: of
// a call on a hundred pairs, which is an update and little else, a quarter went into taking it for each of them.
class InterpreterLock {
 public:
  InterpreterLock() : taken_(Py_IsInitialized() != 0) { // a thread may outlive it
    if (taken_) {
      state_ = PyGILState_Ensure();
    }
  }
  ~InterpreterLock() {
    if (taken_) {
      PyGILState_Release(state_);
    }
  }
  InterpreterLock(const InterpreterLock&) = delete;
  InterpreterLock& operator=(const InterpreterLock&) = delete;

 private:
  bool taken_;
  PyGILState_STATE state_{};
};

// The tensors of a list argument, owned, as the handles in which they come. At a thousand tensors a std::vector<Tensor>,
// which allocates for each of them once more, costs as much as all the checks.
class Handles {
 public:
  Handles() = default;
  explicit Handles(StableIValue argument) { // a list
    auto list = torch::stable::detail::to<StableListHandle>(argument);
    size_t size = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    handles_.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item = 0;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
      handles_.push_back(torch::stable::detail::to<AtenTensorHandle>(item));
    }
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  }
  ~Handles() {
    if (handles_.empty()) {
      return;
    }
    InterpreterLock held;
    for (AtenTensorHandle handle : handles_) {
      aoti_torch_delete_tensor_object(handle);
    }
  }
  Handles(Handles&& other) noexcept : handles_(std::move(other.handles_)) {}
  Handles& operator=(Handles&& other) noexcept {
    handles_.swap(other.handles_);
    return *this;
  }
  Handles(const Handles&) = delete;
  Handles& operator=(const Handles&) = delete;

  size_t size() const {
    return handles_.size();
  }
  bool empty() const {
    return handles_.empty();
  }
  AtenTensorHandle operator[](size_t i) const {
    return handles_[i];
  }
  void push_back(AtenTensorHandle owned) {
    handles_.push_back(owned);
  }
  // The list, to be returned; empties this.
  StableIValue release() {
    StableListHandle list = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(handles_.size(), &list));
    for (AtenTensorHandle handle : handles_) {
      STABLE_TORCH_ERROR_CODE_CHECK(torch_list_push_back(list, torch::stable::detail::from(handle)));
    }
    handles_.clear();
    return torch::stable::detail::from(list);
  }
  Tensor tensor(size_t i) const {
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handles_[i], &handle));
    return Tensor(handle);
  }

 private:
  std::vector<AtenTensorHandle> handles_;
};

struct Arguments {
  Handles ema;
  Handles params;
  double momentum;
  std::optional<Tensor> scale = {}; // this and what follows: for the effective weights
  Handles bias = {};
  std::vector<int64_t> groups = {};
  double total = 0;
};

// Whether the spans that are written are disjoint from one another and from those that are read.
bool disjoint(std::vector<Span> written, const std::vector<Span>& read) {
  auto starts_before = [](const Span& a, const Span& b) { return a.begin < b.begin; };
  if (!std::is_sorted(written.begin(), written.end(), starts_before)) {
    std::sort(written.begin(), written.end(), starts_before);
  }
  for (size_t i = 1; i < written.size(); ++i) {
    if (written[i].begin < written[i - 1].end) {
      return false;
    }
  }
  auto after = written.begin(); // the first that starts where r has ended
  for (const Span& r : read) {
    auto is_it = [&] {
      return (after == written.begin() || (after - 1)->begin < r.end) && (after == written.end() || after->begin >= r.end);
    };
    // Tensors made in turns stand in memory that way, so that the next one along is mostly right.
    if (!is_it() && after != written.end()) {
      ++after;
    }
    if (!is_it()) {
      after = std::lower_bound(written.begin(), written.end(), Span{r.end, r.end}, starts_before);
    }
    // The last written span that starts before r ends is the only one that can reach into it: they are disjoint.
    if (after != written.begin() && (after - 1)->end > r.begin) {
      return false;
    }
  }
  return true;
}

bool scale_fits(const Tensor& scale_tensor, const std::vector<int64_t>& groups, const Facts& first) {
  Facts scale(scale_tensor.get());
  int64_t entries = has_memory(scale) ? scale.numel() : 0;
  return entries > 0 && scale.dim <= 1 && scale.on_device_of(first) && (!groups.empty() || entries == 1) &&
      std::all_of(groups.begin(), groups.end(), [&](int64_t g) { return 0 <= g && g < entries; });
}

// No address: a storage that was freed, as sharded training does between uses.
bool has_memory(const Entry& entry, bool with_ema, bool with_bias) {
  return entry.numel == 0 ||
      (entry.param != nullptr && (!with_ema || entry.ema != nullptr) && (!with_bias || entry.bias != nullptr));
}

// The table of the launch, without the results' addresses; nothing where the arguments are out of the ordinary.
std::optional<std::vector<Entry>> ordinary(const Arguments& a) {
  size_t count = a.ema.size();
  bool weights = !a.bias.empty();
  if (count == 0 || a.params.size() != count || (weights && a.bias.size() != count) ||
      (!a.groups.empty() && a.groups.size() != count) || weights != a.scale.has_value()) {
    return std::nullopt;
  }
  Facts first(a.ema[0]);
  if (!first.known || !(a.scale ? scale_fits(*a.scale, a.groups, first) : a.groups.empty())) {
    return std::nullopt;
  }
  std::vector<Entry> entries(count);
  std::vector<Span> written;
  std::vector<Span> read;
  written.reserve(count);
  read.reserve(2 * count);
  for (size_t i = 0; i < count; ++i) {
    Entry& entry = entries[i];
    Facts e(a.ema[i]);
    Facts p(a.params[i]);
    if (!e.known || !e.on_device_of(first) || !p.matches(e) || !e.dense()) {
      return std::nullopt;
    }
    entry.numel = e.numel();
    entry.ema = e.address;
    entry.param = p.address;
    entry.ema_type = e.type;
    entry.param_type = p.type;
    entry.group = a.groups.empty() ? 0 : static_cast<int32_t>(a.groups[i]);
    if (weights) {
      Facts b(a.bias[i]);
      if (!b.matches(e)) {
        return std::nullopt;
      }
      entry.bias = b.address;
      entry.bias_type = b.type;
    }
    if (!has_memory(entry, true, weights)) {
      return std::nullopt;
    }
    if (entry.numel > 0) {
      written.push_back(span_of(entry.ema, entry.ema_type, entry.numel));
      read.push_back(span_of(entry.param, entry.param_type, entry.numel));
      if (weights) {
        read.push_back(span_of(entry.bias, entry.bias_type, entry.numel));
      }
    }
  }
  if (weights) {
    Facts scale(a.scale->get());
    read.push_back(span_of(scale.address, scale.type, scale.numel()));
  }
  if (!disjoint(std::move(written), read)) {
    return std::nullopt;
  }
  return entries;
}

struct BackwardArguments {
  Handles grad;
  Handles bias; // with ema, for the gradient of scale
  Handles ema;
  Tensor scale;
  std::vector<int64_t> groups;
};

// The same for the backward pass, whose `param` is the gradient of the effective weights.
std::optional<std::vector<Entry>> ordinary(const BackwardArguments& a) {
  size_t count = a.grad.size();
  bool share = !a.bias.empty();
  if (count == 0 || a.bias.size() != a.ema.size() || (share && a.bias.size() != count) ||
      (!a.groups.empty() && a.groups.size() != count)) {
    return std::nullopt;
  }
  Facts first(a.grad[0]);
  if (!first.known || !scale_fits(a.scale, a.groups, first)) {
    return std::nullopt;
  }
  std::vector<Entry> entries(count);
  for (size_t i = 0; i < count; ++i) {
    Entry& entry = entries[i];
    Facts g(a.grad[i]);
    if (!g.known || !g.on_device_of(first) || !g.dense()) {
      return std::nullopt;
    }
    entry.numel = g.numel();
    entry.param = g.address;
    entry.param_type = entry.ema_type = entry.bias_type = g.type;
    entry.group = a.groups.empty() ? 0 : static_cast<int32_t>(a.groups[i]);
    if (share) {
      Facts b(a.bias[i]);
      Facts e(a.ema[i]);
      if (!b.matches(g) || !e.matches(g)) {
        return std::nullopt;
      }
      entry.bias = b.address;
      entry.bias_type = b.type;
      entry.ema = e.address;
      entry.ema_type = e.type;
    }
    if (!has_memory(entry, share, share)) {
      return std::nullopt;
    }
  }
  return entries;
}

#if defined(MANPP_WITH_CUDA) || defined(MANPP_EMULATION)
bool on_gpu(AtenTensorHandle tensor) {
#ifdef MANPP_EMULATION
  return true; // the GPU that csrc/testing emulates on CPU tensors
#else
  int32_t type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &type));
  return type == aoti_torch_device_type_cuda();
#endif
}
#endif

template <class Lists>
std::optional<std::vector<Entry>> ordinary_entries(const Lists& a) {
  try {
    return ordinary(a);
  } catch (const std::exception&) { // a tensor without strides or storage
    return std::nullopt;
  }
}

AtenTensorHandle empty_like(const Facts& x, DType type) {
  return new_tensor(x.dim, x.sizes, x.strides, type, x.device_type, x.device_index);
}

// Results of bias's dtypes, laid out like the given tensors, whose addresses go into the table.
Handles allocate(const Handles& like, std::vector<Entry>& entries) {
  Handles out;
  for (size_t i = 0; i < entries.size(); ++i) {
    out.push_back(empty_like(Facts(like[i]), entries[i].bias_type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(out[i], &entries[i].out));
  }
  return out;
}

void run(const Arguments& a, std::vector<Entry> entries) {
  Scalars scalars = make_scalars(a.momentum, std::nullopt, a.scale, a.total, std::nullopt);
#if defined(MANPP_WITH_CUDA) || defined(MANPP_EMULATION)
  if (on_gpu(a.ema[0])) {
    cuda::update_entries(entries, !a.bias.empty(), a.ema.tensor(0), scalars);
    return;
  }
#endif
  cpu::EmaLaunch(std::move(entries)).run(scalars);
}

void run_backward(std::vector<Entry>& entries, const Tensor& scale, const std::optional<Tensor>& grad_scale) {
#if defined(MANPP_WITH_CUDA) || defined(MANPP_EMULATION)
  if (on_gpu(scale.get())) {
    cuda::backward_of_entries(entries, scale, grad_scale);
    return;
  }
#endif
  cpu::backward_of_entries(entries, scale, grad_scale);
}

// As TORCH_BOX would write them, but for the lists of tensors.

// Whether the update was done; false with nothing written where the arguments are out of the ordinary.
void ema_update_checked(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  Arguments arguments{Handles(stack[0]), Handles(stack[1]), to<double>(stack[2])};
  std::optional<std::vector<Entry>> entries = ordinary_entries(arguments);
  if (entries) {
    run(arguments, std::move(*entries));
  }
  stack[0] = torch::stable::detail::from(entries.has_value());
}

// The effective weights; none, with nothing written, where the arguments are out of the ordinary.
void ema_scale_update_checked(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  Arguments arguments{
      Handles(stack[0]),
      Handles(stack[1]),
      to<double>(stack[2]),
      to<Tensor>(stack[3]),
      Handles(stack[4]),
      to<std::vector<int64_t>>(stack[5]),
      to<double>(stack[6])};
  std::optional<std::vector<Entry>> entries = ordinary_entries(arguments);
  Handles out = entries ? allocate(arguments.bias, *entries) : Handles();
  if (entries) {
    run(arguments, std::move(*entries));
  }
  stack[0] = out.release();
}

// The gradients of bias, if they are wanted, and that of scale where there are bias and ema; none of them, with nothing
// written, where the arguments are out of the ordinary.
void ema_scale_update_backward_checked(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  BackwardArguments arguments{
      Handles(stack[0]),
      Handles(stack[1]),
      Handles(stack[2]),
      to<Tensor>(stack[3]),
      to<std::vector<int64_t>>(stack[4])};
  bool need_bias = to<bool>(stack[5]);
  Handles out;
  if (std::optional<std::vector<Entry>> entries = ordinary_entries(arguments)) {
    if (need_bias) {
      out = allocate(arguments.grad, *entries);
    }
    std::optional<Tensor> grad_scale;
    if (!arguments.bias.empty()) {
      Facts scale(arguments.scale.get());
      out.push_back(empty_like(scale, scale.type));
      grad_scale = out.tensor(out.size() - 1);
    }
    run_backward(*entries, arguments.scale, grad_scale);
  }
  stack[0] = out.release();
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(manpp_kernels, CPU, m) {
  m.impl("_ema_update_checked", &ema_update_checked);
  m.impl("_ema_scale_update_checked", &ema_scale_update_checked);
  m.impl("_ema_scale_update_backward_checked", &ema_scale_update_backward_checked);
}
#ifdef MANPP_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(manpp_kernels, CUDA, m) {
  m.impl("_ema_update_checked", &ema_update_checked);
  m.impl("_ema_scale_update_checked", &ema_scale_update_checked);
  m.impl("_ema_scale_update_backward_checked", &ema_scale_update_backward_checked);
}
#endif

} // namespace manpp
