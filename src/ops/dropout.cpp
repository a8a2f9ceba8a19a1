#include <remnant/ops/dropout.h>

#include "ops/attention_common.h"
#include "ops/step_common.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace remnant {

namespace ops {

namespace {

void check(const at::Tensor& input, double p) {
  TORCH_CHECK(at::isFloatingType(input.scalar_type()), "dropout: input must be floating point, got ",
              toString(input.scalar_type()));
  TORCH_CHECK(p >= 0 && p < 1, "dropout: p must be in [0, 1), got ", p);
}

at::Tensor apply_cpu(const at::Tensor& input, const at::Tensor& seed, double p) {
  return dropout_add_cpu(input, at::Tensor(), seed, p);
}

at::Tensor apply_composite(const at::Tensor& input, const at::Tensor& seed, double p) {
  return dropout_add_composite(input, at::Tensor(), seed, p);
}

using Forward = std::tuple<at::Tensor, at::Tensor>;

Forward forward_cpu(const at::Tensor& input, double p, const std::optional<at::Generator>& generator) {
  check(input, p);
  const at::Tensor seed = draw_seed(input, generator);
  return {apply_cpu(input, seed, p), seed};
}

Forward forward_composite(const at::Tensor& input, double p, const std::optional<at::Generator>& generator) {
  check(input, p);
  const at::Tensor seed = draw_seed(input, generator);
  return {apply_composite(input, seed, p), seed};
}

Forward forward_meta(const at::Tensor& input, double p, const std::optional<at::Generator>& generator) {
  check(input, p);
  return {at::empty_symint(input.sym_sizes(), input.options()),
          at::empty({2}, input.options().dtype(at::kLong))};
}

at::Tensor backward_meta(const at::Tensor& grad_output, const at::Tensor& seed, double p) {
  return at::empty_symint(grad_output.sym_sizes(), grad_output.options());
}

at::Tensor dropout_op(const at::Tensor& input, double p, const std::optional<at::Generator>& generator) {
  check(input, p);
  if (p == 0) return input;
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("remnant::dropout_forward", "")
          .typed<Forward(const at::Tensor&, double, const std::optional<at::Generator>&)>();
  return std::get<0>(op.call(input, p, generator));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(remnant, m) {
  m.impl("dropout", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(dropout_op));
  m.impl("dropout_forward", c10::DispatchKey::CPU, TORCH_FN(forward_cpu));
  m.impl("dropout_forward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(forward_composite));
  m.impl("dropout_forward", c10::DispatchKey::Meta, TORCH_FN(forward_meta));
  m.impl("dropout_backward", c10::DispatchKey::CPU, TORCH_FN(apply_cpu));
  m.impl("dropout_backward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(apply_composite));
  m.impl("dropout_backward", c10::DispatchKey::Meta, TORCH_FN(backward_meta));
}

}  // namespace ops

at::Tensor dropout(const at::Tensor& input, double p, const std::optional<at::Generator>& generator) {
  return ops::dropout_op(input, p, generator);
}

}  // namespace remnant
