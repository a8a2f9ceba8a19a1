#include <remnant/ops/shortcut.h>

#include "ops/derived.h"
#include "ops/shortcut.h"
#include "ops/step_common.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/constant_pad_nd.h>
#include <torch/library.h>

#include <memory>
#include <vector>

namespace remnant {

namespace ops {

at::Tensor shortcut_of(const at::Tensor& x, at::IntArrayRef stride, int64_t channels, bool average) {
  at::Tensor y = x;
  if (average) {
    std::vector<int64_t> inside;
    for (int64_t i = static_cast<int64_t>(stride.size()); i-- > 0;) {
      const int64_t step = stride[static_cast<size_t>(i)];
      const auto windows = y.sym_size(i + 2) / step;
      y = y.slice_symint(i + 2, 0, windows * step).unflatten_symint(i + 2, {windows, step});
      for (int64_t& dim : inside) ++dim;
      inside.push_back(i + 3);
    }
    y = y.mean(inside);
  } else {
    for (size_t i = 0; i < stride.size(); ++i) {
      if (stride[i] > 1) y = y.slice(static_cast<int64_t>(i) + 2, {}, {}, stride[i]);
    }
  }
  const auto more = channels - y.sym_size(1);
  if (more == 0) return y;
  std::vector<c10::SymInt> padding(2 * stride.size() + 1, 0);
  padding.push_back(more);
  return at::constant_pad_nd_symint(y, padding);
}

namespace {

at::Tensor shortcut_composite(const at::Tensor& input, int64_t stride, int64_t channels, bool average) {
  check_floating("shortcut", "input", input);
  TORCH_CHECK(input.dim() >= 3 && input.dim() <= 5,
              "shortcut: input must be [N, C, L], [N, C, H, W] or [N, C, D, H, W], got ", input.sym_sizes());
  TORCH_CHECK(stride > 0, "shortcut: stride must be positive, got ", stride);
  TORCH_CHECK(input.sym_size(1) <= channels, "shortcut: channels must be at least input's ",
              input.sym_size(1), ", got ", channels);
  const std::vector<int64_t> strides(static_cast<size_t>(input.dim() - 2), stride);
  const auto format = input.suggest_memory_format();
  at::Tensor y = shortcut_of(input, strides, channels, average);
  y = average || input.sym_size(1) < channels ? y.contiguous(format) : y.clone(format);
  const auto found = find_derived(input);
  if (found.has_value()) {
    Derived from;
    from.base = Derived::Base::shortcut;
    from.source = std::make_shared<const Derived>(*found);
    from.stride = strides;
    from.average = average;
    note_derived(y, std::move(from));
  }
  return y;
}

}  // namespace

}  // namespace ops

at::Tensor shortcut(const at::Tensor& input, int64_t stride, int64_t channels, bool average) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::shortcut", "")
                             .typed<at::Tensor(const at::Tensor&, int64_t, int64_t, bool)>();
  return op.call(input, stride, channels, average);
}

TORCH_LIBRARY_IMPL(remnant, CompositeImplicitAutograd, m) {
  m.impl("shortcut", TORCH_FN(ops::shortcut_composite));
}

}  // namespace remnant
