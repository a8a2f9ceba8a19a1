#include "nn/conv_run.h"

#include <remnant/memory.h>

#include "ops/derived.h"

#include <ATen/ops/clone.h>

#include <optional>

namespace remnant::nn::detail {

at::Tensor UnitCall::compute() const {
  const memory::LayerScope scope(layer);
  const auto given = [](const at::Tensor& x) { return x.defined() ? std::optional(x) : std::nullopt; };
  const at::Tensor y = conv_norm_act(input, weight, given(bias), given(norm_weight), given(norm_bias),
                                     given(running_mean), given(running_var), std::nullopt, options);
  const auto kept = y.requires_grad() ? ops::find_derived(y) : std::nullopt;
  if (!kept.has_value() || !kept->value.is_same(y)) return y;
  // The unit keeps its output: hand on another tensor, which the next unit finds the kept one for.
  const at::Tensor copy = y.clone();
  ops::note_derived(copy, *kept);
  return copy;
}

}  // namespace remnant::nn::detail
