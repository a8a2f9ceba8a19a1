#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace remnant::autograd {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Forward = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, double);
using DropoutBackward = at::Tensor(const at::Tensor&, const at::Tensor&, double);

c10::TypedOperatorHandle<Forward> forward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("remnant::dropout_add_forward", "").typed<Forward>();
  return op;
}

c10::TypedOperatorHandle<DropoutBackward> dropout_backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::dropout_backward", "")
                             .typed<DropoutBackward>();
  return op;
}

struct DropoutAddFunction : torch::autograd::Function<DropoutAddFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& residual,
                            const at::Tensor& seed, double p) {
    ctx->saved_data["residual"] = residual.requires_grad();
    if (input.requires_grad()) {
      ctx->save_for_backward({seed});
      ctx->saved_data["p"] = p;
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    return forward_op().call(input, residual, seed, p);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(4);
    const variable_list saved = ctx->get_saved_variables();
    if (!saved.empty()) {
      // dropout_backward has a gradient of its own.
      result[0] = dropout_backward_op().call(grads[0], saved[0], ctx->saved_data["p"].toDouble());
    }
    if (ctx->saved_data["residual"].toBool()) result[1] = grads[0];
    return result;
  }
};

at::Tensor forward_autograd(const at::Tensor& input, const at::Tensor& residual, const at::Tensor& seed,
                            double p) {
  if (!at::GradMode::is_enabled() || !(input.requires_grad() || residual.requires_grad())) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return forward_op().call(input, residual, seed, p);
  }
  return DropoutAddFunction::apply(input, residual, seed, p);
}

}  // namespace

TORCH_LIBRARY_IMPL(remnant, Autograd, m) { m.impl("dropout_add_forward", TORCH_FN(forward_autograd)); }

}  // namespace remnant::autograd
