#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace remnant::autograd {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&,
                                                               const std::optional<at::Tensor>&, int64_t,
                                                               bool);
using Backward = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, bool);

c10::TypedOperatorHandle<Forward> forward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::softmax_approximation_forward", "")
                             .typed<Forward>();
  return op;
}

c10::TypedOperatorHandle<Backward> backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::softmax_approximation_backward", "")
                             .typed<Backward>();
  return op;
}

struct SoftmaxApproximationFunction : torch::autograd::Function<SoftmaxApproximationFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& energy,
                            const std::optional<at::Tensor>& mask, int64_t m, bool paper_text) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [output, codes, table] = forward_op().call(energy, mask, m, true);
    ctx->save_for_backward({codes, table});
    ctx->saved_data["m"] = m;
    ctx->saved_data["paper_text"] = paper_text;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    if (!grads[0].defined()) return variable_list(4);
    return {backward_op().call(grads[0], saved[0], saved[1], ctx->saved_data["m"].toInt(),
                               ctx->saved_data["paper_text"].toBool()),
            {},
            {},
            {}};
  }
};

struct SoftmaxApproximationBackwardFunction
    : torch::autograd::Function<SoftmaxApproximationBackwardFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext*, const at::Tensor& grad_output, const at::Tensor& codes,
                            const at::Tensor& table, int64_t m, bool paper_text) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return backward_op().call(grad_output, codes, table, m, paper_text);
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(
        false,
        "softmax_approximation has no gradient of its gradient; use torch's softmax where you need one");
  }
};

at::Tensor softmax_approximation(const at::Tensor& energy, const std::optional<at::Tensor>& mask, int64_t m,
                                 bool paper_text) {
  if (energy.requires_grad() && at::GradMode::is_enabled()) {
    return SoftmaxApproximationFunction::apply(energy, mask, m, paper_text);
  }
  return std::get<0>(forward_op().call(energy, mask, m, false));
}

at::Tensor backward_autograd(const at::Tensor& grad_output, const at::Tensor& codes, const at::Tensor& table,
                             int64_t m, bool paper_text) {
  return SoftmaxApproximationBackwardFunction::apply(grad_output, codes, table, m, paper_text);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_autograd(const at::Tensor& energy,
                                                                const std::optional<at::Tensor>& mask,
                                                                int64_t m, bool keep) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return forward_op().call(energy, mask, m, keep);
}

}  // namespace

TORCH_LIBRARY_IMPL(remnant, Autograd, m) {
  m.impl("softmax_approximation_forward", TORCH_FN(forward_autograd));
  m.impl("softmax_approximation_backward", TORCH_FN(backward_autograd));
}

TORCH_LIBRARY_IMPL(remnant, CompositeImplicitAutograd, m) {
  m.impl("softmax_approximation", TORCH_FN(softmax_approximation));
}

}  // namespace remnant::autograd
