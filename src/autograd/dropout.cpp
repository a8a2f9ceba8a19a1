#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace remnant::autograd {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Forward = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, double,
                                                   const std::optional<at::Generator>&);
using Backward = at::Tensor(const at::Tensor&, const at::Tensor&, double);

c10::TypedOperatorHandle<Forward> forward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("remnant::dropout_forward", "").typed<Forward>();
  return op;
}

c10::TypedOperatorHandle<Backward> backward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("remnant::dropout_backward", "").typed<Backward>();
  return op;
}

// Dropout is linear: the gradient of its gradient is the same mask again.
struct DropoutBackwardFunction : torch::autograd::Function<DropoutBackwardFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& grad_output, const at::Tensor& seed,
                            double p) {
    ctx->save_for_backward({seed});
    ctx->saved_data["p"] = p;
    const at::AutoDispatchBelowADInplaceOrView below;
    return backward_op().call(grad_output, seed, p);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {
        backward_op().call(grads[0], ctx->get_saved_variables()[0], ctx->saved_data["p"].toDouble()), {}, {}};
  }
};

struct DropoutFunction : torch::autograd::Function<DropoutFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& input, double p,
                               const std::optional<at::Generator>& generator) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [output, seed] = forward_op().call(input, p, generator);
    ctx->save_for_backward({seed});
    ctx->saved_data["p"] = p;
    ctx->set_materialize_grads(false);  // no zeros in the residuals' shapes
    ctx->mark_non_differentiable({seed});
    return {output, seed};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(3);
    return {
        backward_op().call(grads[0], ctx->get_saved_variables()[0], ctx->saved_data["p"].toDouble()), {}, {}};
  }
};

std::tuple<at::Tensor, at::Tensor> forward_autograd(const at::Tensor& input, double p,
                                                    const std::optional<at::Generator>& generator) {
  if (!input.requires_grad() || !at::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return forward_op().call(input, p, generator);
  }
  auto outputs = DropoutFunction::apply(input, p, generator);
  return {outputs[0], outputs[1]};
}

at::Tensor backward_autograd(const at::Tensor& grad_output, const at::Tensor& seed, double p) {
  return DropoutBackwardFunction::apply(grad_output, seed, p);
}

}  // namespace

TORCH_LIBRARY_IMPL(remnant, Autograd, m) {
  m.impl("dropout_forward", TORCH_FN(forward_autograd));
  m.impl("dropout_backward", TORCH_FN(backward_autograd));
}

}  // namespace remnant::autograd
