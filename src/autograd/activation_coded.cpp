#include "kernels/cpu/step_kernels.h"
#include "ops/codes.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace remnant::autograd {

namespace {

using kernels::ActivationKind;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalGenerator = std::optional<at::Generator>;

const char* form(ActivationKind kind) { return kind == ActivationKind::gelu ? "none" : "tanh"; }

at::Tensor forward(const at::Tensor& input, int64_t kind, int64_t bits, const OptionalGenerator& generator) {
  const auto which = static_cast<ActivationKind>(kind);
  return which == ActivationKind::silu ? at::silu(input) : at::gelu(input, form(which));
}

at::Tensor derivative(const at::Tensor& input, ActivationKind kind) {
  const at::Tensor one = at::ones({1}, input.options()).expand_symint(input.sym_sizes());
  return kind == ActivationKind::silu ? at::silu_backward(one, input)
                                      : at::gelu_backward(one, input, form(kind));
}

// The gradient is linear in the derivative, so that rounding it leaves no bias.
struct CodedActivationFunction : torch::autograd::Function<CodedActivationFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, int64_t kind, int64_t bits,
                            const OptionalGenerator& generator) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const ops::Codes kept =
        ops::encode(derivative(input, static_cast<ActivationKind>(kind)), bits, generator);
    ctx->save_for_backward({kept.codes, kept.table});
    ctx->saved_data["bits"] = bits;
    return autograd::forward(input, kind, bits, generator);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "gelu and silu have no gradient of their gradient; use torch's where you need one");
    const variable_list saved = ctx->get_saved_variables();
    variable_list result(4);
    result[0] = ops::decode({saved[0], saved[1]}, ctx->saved_data["bits"].toInt(), grads[0].sym_sizes(),
                            grads[0].scalar_type())
                    .mul_(grads[0]);
    return result;
  }
};

at::Tensor forward_autograd(const at::Tensor& input, int64_t kind, int64_t bits,
                            const OptionalGenerator& generator) {
  if (!input.requires_grad() || !at::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return forward(input, kind, bits, generator);
  }
  return CodedActivationFunction::apply(input, kind, bits, generator);
}

}  // namespace

TORCH_LIBRARY_IMPL(remnant, CompositeExplicitAutograd, m) { m.impl("activation_coded", TORCH_FN(forward)); }
TORCH_LIBRARY_IMPL(remnant, Meta, m) { m.impl("activation_coded", TORCH_FN(forward)); }
TORCH_LIBRARY_IMPL(remnant, Autograd, m) { m.impl("activation_coded", TORCH_FN(forward_autograd)); }

}  // namespace remnant::autograd
