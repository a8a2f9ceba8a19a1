#include "kernels/cpu/step_kernels.h"
#include "ops/codes.h"
#include "ops/step_common.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace remnant::autograd {

namespace {

using kernels::ActivationKind;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalGenerator = std::optional<at::Generator>;

c10::TypedOperatorHandle<at::Tensor(const at::Tensor&, int64_t, int64_t, const OptionalGenerator&)>
forward_op() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("remnant::activation_coded", "")
          .typed<at::Tensor(const at::Tensor&, int64_t, int64_t, const OptionalGenerator&)>();
  return op;
}

// The gradient is linear in the derivative, so that rounding it leaves no bias.
struct CodedActivationFunction : torch::autograd::Function<CodedActivationFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, int64_t kind, int64_t bits,
                            const OptionalGenerator& generator) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const ops::Codes kept =
        ops::encode(ops::activation_derivative(input, static_cast<ActivationKind>(kind)), bits, generator);
    ctx->save_for_backward({kept.codes, kept.table});
    ctx->saved_data["bits"] = bits;
    return forward_op().call(input, kind, bits, generator);
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
    ops::skip_seeds(input, 1, generator);
    return forward_op().call(input, kind, bits, generator);
  }
  return CodedActivationFunction::apply(input, kind, bits, generator);
}

}  // namespace

TORCH_LIBRARY_IMPL(remnant, Autograd, m) { m.impl("activation_coded", TORCH_FN(forward_autograd)); }

}  // namespace remnant::autograd
