#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace remnant::autograd {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Result = std::tuple<at::Tensor, at::Tensor>;
using Forward = Result(const at::Tensor&, int64_t, double, int64_t, bool);
using Backward = at::Tensor(const at::Tensor&, const std::optional<at::Tensor>&, const at::Tensor&, int64_t,
                            double, int64_t);

c10::TypedOperatorHandle<Forward> forward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("remnant::activation_forward", "").typed<Forward>();
  return op;
}

c10::TypedOperatorHandle<Backward> backward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("remnant::activation_backward", "").typed<Backward>();
  return op;
}

// From codes the gradient is linear in the incoming one: its gradient is the same again.
struct ActivationBackwardFunction : torch::autograd::Function<ActivationBackwardFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& grad_output, const at::Tensor& codes,
                            int64_t kind, double slope, int64_t bits) {
    ctx->save_for_backward({codes});
    ctx->saved_data["kind"] = kind;
    ctx->saved_data["slope"] = slope;
    ctx->saved_data["bits"] = bits;
    const at::AutoDispatchBelowADInplaceOrView below;
    return backward_op().call(grad_output, std::nullopt, codes, kind, slope, bits);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(5);
    result[0] = backward_op().call(grads[0], std::nullopt, ctx->get_saved_variables()[0],
                                   ctx->saved_data["kind"].toInt(), ctx->saved_data["slope"].toDouble(),
                                   ctx->saved_data["bits"].toInt());
    return result;
  }
};

struct ActivationFunction : torch::autograd::Function<ActivationFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& input, int64_t kind, double slope,
                               int64_t bits) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [output, codes] = forward_op().call(input, kind, slope, bits, true);
    ctx->save_for_backward({bits == 0 ? input : codes});
    ctx->saved_data["kind"] = kind;
    ctx->saved_data["slope"] = slope;
    ctx->saved_data["bits"] = bits;
    ctx->set_materialize_grads(false);  // no zeros in the residuals' shapes
    ctx->mark_non_differentiable({codes});
    return {output, codes};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(4);
    if (!grads[0].defined()) return result;
    const int64_t kind = ctx->saved_data["kind"].toInt(), bits = ctx->saved_data["bits"].toInt();
    const double slope = ctx->saved_data["slope"].toDouble();
    // The derivative of a step function would leave out the activation's own second derivative.
    TORCH_CHECK(bits == 1 || !at::GradMode::is_enabled(),
                "gelu and silu have no gradient of their gradient; use torch's where you need one");
    const at::Tensor saved = ctx->get_saved_variables()[0];
    result[0] = bits == 0
                    ? backward_op().call(grads[0], saved, at::empty({0}, grads[0].options().dtype(at::kByte)),
                                         kind, slope, bits)
                    : backward_op().call(grads[0], std::nullopt, saved, kind, slope, bits);
    return result;
  }
};

Result forward_autograd(const at::Tensor& input, int64_t kind, double slope, int64_t bits, bool keep) {
  if (!input.requires_grad() || !at::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return forward_op().call(input, kind, slope, bits, keep);
  }
  auto outputs = ActivationFunction::apply(input, kind, slope, bits);
  return {outputs[0], outputs[1]};
}

at::Tensor backward_autograd(const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
                             const at::Tensor& codes, int64_t kind, double slope, int64_t bits) {
  if (bits == 1) return ActivationBackwardFunction::apply(grad_output, codes, kind, slope, bits);
  const at::AutoDispatchBelowADInplaceOrView below;
  return backward_op().call(grad_output, input, codes, kind, slope, bits);
}

}  // namespace

TORCH_LIBRARY_IMPL(remnant, Autograd, m) {
  m.impl("activation_forward", TORCH_FN(forward_autograd));
  m.impl("activation_backward", TORCH_FN(backward_autograd));
}

}  // namespace remnant::autograd
