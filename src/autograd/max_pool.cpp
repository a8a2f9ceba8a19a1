#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

namespace remnant::autograd {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Result = std::tuple<at::Tensor, at::Tensor>;
using Forward = Result(const at::Tensor&, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef,
                       bool);
using Backward = at::Tensor(const at::Tensor&, const at::Tensor&, c10::SymIntArrayRef, at::IntArrayRef,
                            at::IntArrayRef, at::IntArrayRef, at::IntArrayRef);

c10::TypedOperatorHandle<Forward> forward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("remnant::max_pool2d_forward", "").typed<Forward>();
  return op;
}

c10::TypedOperatorHandle<Backward> backward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("remnant::max_pool2d_backward", "").typed<Backward>();
  return op;
}

struct MaxPoolFunction : torch::autograd::Function<MaxPoolFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& input, at::IntArrayRef kernel,
                               at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                               bool ceil_mode) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [output, places] = forward_op().call(input, kernel, stride, padding, dilation, ceil_mode);
    ctx->save_for_backward({places});
    ctx->saved_data["sizes"] = input.sym_sizes();
    ctx->saved_data["kernel"] = kernel;
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->set_materialize_grads(false);  // no zeros in places' shape
    ctx->mark_non_differentiable({places});
    return {output, places};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(6);
    if (!grads[0].defined()) return result;
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "max_pool2d has no gradient of its gradient; use torch's where you need one");
    const auto numbers = [&](const char* name) { return ctx->saved_data[name].toIntVector(); };
    result[0] =
        backward_op().call(grads[0], ctx->get_saved_variables()[0], ctx->saved_data["sizes"].toSymIntVector(),
                           numbers("kernel"), numbers("stride"), numbers("padding"), numbers("dilation"));
    return result;
  }
};

Result forward_autograd(const at::Tensor& input, at::IntArrayRef kernel, at::IntArrayRef stride,
                        at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  if (!input.requires_grad() || !at::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return forward_op().call(input, kernel, stride, padding, dilation, ceil_mode);
  }
  auto outputs = MaxPoolFunction::apply(input, kernel, stride, padding, dilation, ceil_mode);
  return {outputs[0], outputs[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(remnant, Autograd, m) { m.impl("max_pool2d_forward", TORCH_FN(forward_autograd)); }

}  // namespace remnant::autograd
