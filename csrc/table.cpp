#include "table.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace manpp {

// In the order of DType.
static const int32_t* dtype_numbers() {
  static const int32_t numbers[] = {
      aoti_torch_dtype_float64(), aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  return numbers;
}

int32_t dtype_number(DType type) {
  return dtype_numbers()[static_cast<int>(type)];
}

// By the shim's own numbers: asking a Tensor for its ScalarType takes six times as long, and shows at a thousand tensors.
bool find_dtype(int32_t number, DType* type) {
  const int32_t* numbers = dtype_numbers();
  for (int i = 0; i < 4; ++i) {
    if (numbers[i] == number) {
      *type = static_cast<DType>(i);
      return true;
    }
  }
  return false;
}

DType dtype_of(const Tensor& t) {
  int32_t number = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &number));
  DType type = DType::f32;
  STD_TORCH_CHECK(
      find_dtype(number, &type), "manpp_kernels: every tensor has to be float64, float32, bfloat16 or float16");
  return type;
}

bool same_sizes(const Tensor& a, const Tensor& b) {
  auto x = a.sizes();
  auto y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) {
    return true;
  }
  auto sizes = a.sizes();
  auto x = a.strides();
  auto y = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && x[d] != y[d]) {
      return false;
    }
  }
  return true;
}

bool is_dense(const int64_t* sizes, const int64_t* strides, int64_t dim) {
  std::vector<int64_t> order;
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] != 1) {
      order.push_back(d);
    }
  }
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (int64_t d : order) {
    if (strides[d] != expected) {
      return false;
    }
    expected *= sizes[d];
  }
  return true;
}

bool is_dense(const Tensor& t) {
  return t.is_contiguous() || is_dense(t.sizes().data(), t.strides().data(), t.dim());
}

void copy(Tensor& to, const Tensor& from) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(to.get(), from.get(), 0));
}

AtenTensorHandle new_tensor(
    int64_t dim, const int64_t* sizes, const int64_t* strides, DType type, int32_t device_type, int32_t device_index) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, dtype_number(type), device_type, device_index, &handle));
#ifdef MANPP_EMULATION // as the tests have PyTorch fill what it hands out: what a kernel forgets to write is to show
  void* address = nullptr;
  int64_t numel = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &address));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(handle, &numel));
  std::memset(address, 0xFF, static_cast<size_t>(numel * element_size(type)));
#endif
  return handle;
}

static Tensor empty(const Tensor& x, int64_t dim, const int64_t* sizes, const int64_t* strides) {
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  return Tensor(new_tensor(dim, sizes, strides, dtype_of(x), device_type, x.get_device_index()));
}

Tensor empty_with_layout(const Tensor& x, const Tensor& like) {
  return empty(x, like.dim(), like.sizes().data(), like.strides().data());
}

Tensor new_like(const Tensor& x) {
  return is_dense(x) ? empty_with_layout(x, x) : torch::stable::empty_like(x);
}

Tensor nothing_like(const Tensor& x) {
  const int64_t none = 0;
  const int64_t one = 1;
  return empty(x, 1, &none, &one);
}

Tensor matching(const Tensor& x, const Tensor& like) {
  if (same_layout(x, like)) {
    return x;
  }
  Tensor stand_in = empty_with_layout(x, like);
  copy(stand_in, x);
  return stand_in;
}

void Table::finish() {
  for (auto& [to, from] : copy_back) {
    copy(to, from);
  }
}

namespace {

// x, or a stand-in for it, laid out like `layout`; `read` and `written` say what the kernel does with it.
const Tensor& operand(Table& table, const Tensor& x, const Tensor& layout, bool read, bool written) {
  STD_TORCH_CHECK(
      same_sizes(x, layout) && x.get_device_index() == layout.get_device_index() && x.is_cuda() == layout.is_cuda(),
      "manpp_kernels: the tensors of a pair have to be of one shape and on one device");
  if (same_layout(x, layout)) {
    return x;
  }
  Tensor stand_in = empty_with_layout(x, layout);
  if (read) {
    copy(stand_in, x);
  }
  if (written) {
    table.copy_back.emplace_back(x, stand_in);
  }
  table.keep_alive.push_back(stand_in);
  return table.keep_alive.back();
}

// What the others are laid out like: x itself where it is dense, else a contiguous tensor of its sizes.
const Tensor& reference_layout(Table& table, const Tensor& x) {
  if (is_dense(x)) {
    return x;
  }
  table.keep_alive.push_back(torch::stable::contiguous(x));
  return table.keep_alive.back();
}

void check_length(size_t found, size_t expected) {
  STD_TORCH_CHECK(found == expected, "manpp_kernels: the lists go in pairs, and have ", found, " and ", expected);
}

int32_t group_of(const std::vector<int64_t>& groups, size_t i) {
  return groups.empty() ? 0 : static_cast<int32_t>(groups[i]);
}

} // namespace

Table build_table(
    const std::vector<Tensor>& ema,
    const std::vector<Tensor>& params,
    const std::vector<Tensor>& bias,
    const std::vector<int64_t>& groups,
    const std::vector<Tensor>& out) {
  check_length(params.size(), ema.size());
  check_length(out.size(), bias.size());
  if (!bias.empty()) {
    check_length(bias.size(), ema.size());
  }
  if (!groups.empty()) {
    check_length(groups.size(), ema.size());
  }
  Table table;
  table.entries.reserve(ema.size());
  for (size_t i = 0; i < ema.size(); ++i) {
    Entry entry;
    entry.numel = ema[i].numel();
    if (entry.numel == 0) {
      table.entries.push_back(entry);
      continue;
    }
    const Tensor& layout = reference_layout(table, ema[i]);
    const Tensor& e = operand(table, ema[i], layout, true, true);
    const Tensor& p = operand(table, params[i], layout, true, false);
    entry.ema = e.data_ptr();
    entry.param = p.data_ptr();
    entry.ema_type = dtype_of(e);
    entry.param_type = dtype_of(p);
    entry.group = group_of(groups, i);
    if (!bias.empty()) {
      const Tensor& b = operand(table, bias[i], layout, true, false);
      const Tensor& w = operand(table, out[i], layout, false, true);
      entry.bias = b.data_ptr();
      entry.out = w.data_ptr();
      entry.bias_type = dtype_of(b);
      STD_TORCH_CHECK(dtype_of(w) == entry.bias_type, "manpp_kernels: out has to be of bias's dtype");
    }
    table.entries.push_back(entry);
  }
  return table;
}

Table build_backward_table(
    const std::vector<Tensor>& grad,
    const std::vector<Tensor>& bias,
    const std::vector<Tensor>& ema,
    const std::vector<int64_t>& groups,
    const std::vector<Tensor>& grad_bias) {
  check_length(bias.size(), ema.size());
  if (!bias.empty()) {
    check_length(bias.size(), grad.size());
  }
  if (!grad_bias.empty()) {
    check_length(grad_bias.size(), grad.size());
  }
  Table table;
  table.entries.reserve(grad.size());
  for (size_t i = 0; i < grad.size(); ++i) {
    Entry entry;
    entry.numel = grad[i].numel();
    entry.group = group_of(groups, i);
    if (entry.numel > 0) {
      const Tensor& layout = reference_layout(table, grad[i]);
      const Tensor& g = operand(table, grad[i], layout, true, false);
      entry.param = g.data_ptr();
      entry.param_type = dtype_of(g);
      entry.ema_type = entry.bias_type = entry.param_type;
      if (!bias.empty()) {
        const Tensor& b = operand(table, bias[i], layout, true, false);
        const Tensor& e = operand(table, ema[i], layout, true, false);
        entry.bias = b.data_ptr();
        entry.ema = e.data_ptr();
        entry.bias_type = dtype_of(b);
        entry.ema_type = dtype_of(e);
      }
      if (!grad_bias.empty()) {
        const Tensor& w = operand(table, grad_bias[i], layout, false, true);
        entry.out = w.data_ptr();
        STD_TORCH_CHECK(
            bias.empty() || dtype_of(w) == entry.bias_type, "manpp_kernels: grad_bias has to be of bias's dtype");
        entry.bias_type = dtype_of(w);
      }
    }
    table.entries.push_back(entry);
  }
  return table;
}

void check_groups(const std::vector<int64_t>& groups, const Tensor& scale) {
  int64_t entries = scale.numel();
  STD_TORCH_CHECK(entries > 0, "manpp_kernels: scale has no entries");
  for (int64_t g : groups) {
    STD_TORCH_CHECK(g >= 0 && g < entries, "manpp_kernels: group ", g, " of a scale with ", entries, " entries");
  }
}

const void* scale_entries(const Tensor& scale) {
  STD_TORCH_CHECK(scale.dim() <= 1, "manpp_kernels: scale has to be 0-dim or of one dimension");
  STD_TORCH_CHECK(scale.is_contiguous(), "manpp_kernels: scale has to be contiguous");
  return scale.data_ptr();
}

Scalars make_scalars(
    double momentum,
    const std::optional<Tensor>& momentum_tensor,
    const std::optional<Tensor>& scale,
    double total,
    const std::optional<Tensor>& seed) {
  Scalars s;
  s.keep = momentum;
  s.take = 1.0 - momentum;
  s.total = total;
  if (momentum_tensor) {
    s.momentum = momentum_tensor->data_ptr();
    s.momentum_type = dtype_of(*momentum_tensor);
  }
  if (scale) {
    s.scale = scale_entries(*scale);
    s.scale_type = dtype_of(*scale);
  }
  if (seed) {
    s.seed = static_cast<const int64_t*>(seed->data_ptr());
  }
  return s;
}

std::optional<ChannelLayout> channel_layout(const Tensor& x, const Tensor& scale) {
  ChannelLayout layout;
  if (scale.numel() == 1) { // whatever the order of memory
    layout.inner = x.numel();
    return layout;
  }
  layout.channels = x.size(1);
  if (x.is_contiguous()) {
    layout.outer = x.size(0);
    layout.inner = x.numel() / std::max<int64_t>(1, layout.outer * layout.channels);
    return layout;
  }
  if (x.stride(1) == 1 && is_dense(x)) { // channels_last
    layout.outer = x.numel() / std::max<int64_t>(1, layout.channels);
    return layout;
  }
  return std::nullopt;
}

// Whether t is float32, bfloat16 or float16, and which.
static bool is_narrow_float(const Tensor& t, DType* type) {
  int32_t number = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &number));
  return find_dtype(number, type) && *type != DType::f64;
}

// Channels innermost, and the other dimensions in the order of their numbers: not every tensor whose channels lie side by
// side is laid out so.
static bool is_channels_last(const Tensor& t) {
  if (t.dim() < 3 || t.is_contiguous()) {
    return false;
  }
  int64_t expected = 1;
  auto goes_on = [&](int64_t d) {
    bool right = t.size(d) == 1 || t.stride(d) == expected;
    expected *= t.size(d);
    return right;
  };
  bool right = goes_on(1);
  for (int64_t d = t.dim() - 1; d >= 2 && right; --d) {
    right = goes_on(d);
  }
  return right && goes_on(0);
}

CopyKind classify_copy(const Tensor& x, const Tensor& out) {
  CopyKind kind;
  DType from = DType::f32;
  DType to = DType::f32;
  if (!is_narrow_float(x, &from) || !is_narrow_float(out, &to) || x.numel() == 0) {
    return kind;
  }
  if (same_layout(x, out)) {
    if (is_dense(x) && from != to) {
      kind.how = CopyKind::Cast;
    }
    return kind;
  }
  bool to_last = x.is_contiguous() && is_channels_last(out);
  bool to_first = is_channels_last(x) && out.is_contiguous();
  if (to_last || to_first) {
    int64_t batch = x.size(0);
    int64_t channels = x.size(1);
    int64_t pixels = x.numel() / (batch * channels);
    kind.how = CopyKind::Transpose;
    kind.transposition = {batch, to_last ? channels : pixels, to_last ? pixels : channels};
  }
  return kind;
}

} // namespace manpp
