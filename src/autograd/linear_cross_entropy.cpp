#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Reduction.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace remnant::autograd {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Forward = Result(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                       const at::Tensor&, int64_t, double, int64_t, std::array<bool, 3>);

c10::TypedOperatorHandle<Forward> forward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::linear_cross_entropy_forward", "")
                             .typed<Forward>();
  return op;
}

struct LinearCrossEntropyFunction : torch::autograd::Function<LinearCrossEntropyFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias, const at::Tensor& target,
                               int64_t ignore_index, double label_smoothing, int64_t reduction,
                               std::array<bool, 3> needs) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [loss, grad_input, grad_weight, grad_bias] =
        forward_op().call(input, weight, bias, target, ignore_index, label_smoothing, reduction, needs);
    // Of as many rows as input but other columns it is the logits' gradient, from which input's follows.
    const bool of_logits = needs[0] && grad_input.sym_size(1) != input.sym_size(1);
    ctx->save_for_backward({grad_input, grad_weight, grad_bias, of_logits ? weight : at::Tensor()});
    ctx->saved_data["needs"] = std::vector<bool>(needs.begin(), needs.end());
    // What is held of float16 is wide, since a scale comes with the backward only.
    ctx->saved_data["input_type"] = static_cast<int64_t>(input.scalar_type());
    ctx->saved_data["weight_type"] = static_cast<int64_t>(weight.scalar_type());
    ctx->set_materialize_grads(false);  // no zeros in the residuals' shapes
    ctx->mark_non_differentiable({grad_input, grad_weight, grad_bias});
    return {loss, grad_input, grad_weight, grad_bias};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(8);
    if (!grads[0].defined()) return result;
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "linear_cross_entropy has no gradient of its gradient; use torch's linear and cross_entropy "
                "where you need one");
    const auto needs = ctx->saved_data["needs"].toBoolList();
    const variable_list saved = ctx->get_saved_variables();
    for (size_t i = 0; i < 3; ++i) {
      if (!needs[i]) continue;
      const at::Tensor grad = i == 0 && saved[3].defined()
                                  ? at::mm(saved[0], saved[3].to(saved[0].scalar_type())).mul_(grads[0])
                                  : saved[i].mul(grads[0]);
      const auto type = ctx->saved_data[i == 0 ? "input_type" : "weight_type"].toInt();
      result[i] = grad.to(static_cast<at::ScalarType>(type));
    }
    return result;
  }
};

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Backward = Gradients(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                           const std::optional<at::Tensor>&, const at::Tensor&, int64_t, double,
                           std::array<bool, 3>);

c10::TypedOperatorHandle<Backward> backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::linear_cross_entropy_backward", "")
                             .typed<Backward>();
  return op;
}

// Reduction none: what arrives for each row is known in backward only, so that makes the chunks again.
struct RowLossesFunction : torch::autograd::Function<RowLossesFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, const at::Tensor& target,
                            int64_t ignore_index, double label_smoothing, std::array<bool, 3> needs) {
    ctx->save_for_backward({input, weight, bias.value_or(at::Tensor()), target});
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["label_smoothing"] = label_smoothing;
    ctx->saved_data["needs"] = std::vector<bool>(needs.begin(), needs.end());
    const at::AutoDispatchBelowADInplaceOrView below;
    return std::get<0>(forward_op().call(input, weight, bias, target, ignore_index, label_smoothing,
                                         at::Reduction::None, {false, false, false}));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(7);
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "linear_cross_entropy has no gradient of its gradient; use torch's linear and cross_entropy "
                "where you need one");
    const auto wanted = ctx->saved_data["needs"].toBoolList();
    const std::array<bool, 3> needs{wanted[0], wanted[1], wanted[2]};
    const variable_list saved = ctx->get_saved_variables();
    const std::optional<at::Tensor> bias = saved[2].defined() ? std::optional(saved[2]) : std::nullopt;
    const auto [grad_input, grad_weight, grad_bias] = backward_op().call(
        grads[0], saved[0], saved[1], bias, saved[3], ctx->saved_data["ignore_index"].toInt(),
        ctx->saved_data["label_smoothing"].toDouble(), needs);
    if (needs[0]) result[0] = grad_input;
    if (needs[1]) result[1] = grad_weight;
    if (needs[2]) result[2] = grad_bias;
    return result;
  }
};

Result forward_autograd(const at::Tensor& input, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, const at::Tensor& target, int64_t ignore_index,
                        double label_smoothing, int64_t reduction, std::array<bool, 3> asked) {
  const std::array<bool, 3> needs{input.requires_grad(), weight.requires_grad(),
                                  bias.has_value() && bias->requires_grad()};
  if (!at::GradMode::is_enabled() || !(needs[0] || needs[1] || needs[2])) {
    const at::AutoDispatchBelowADInplaceOrView below;
    // What compiled code has recorded asks for gradients itself.
    return forward_op().call(input, weight, bias, target, ignore_index, label_smoothing, reduction, asked);
  }
  if (reduction == at::Reduction::None) {
    const at::Tensor losses =
        RowLossesFunction::apply(input, weight, bias, target, ignore_index, label_smoothing, needs);
    const auto none = [&](const at::Tensor& like) { return at::empty({0}, like.options()); };
    return {losses, none(input), none(weight), none(weight)};
  }
  auto outputs = LinearCrossEntropyFunction::apply(input, weight, bias, target, ignore_index, label_smoothing,
                                                   reduction, needs);
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(remnant, Autograd, m) {
  m.impl("linear_cross_entropy_forward", TORCH_FN(forward_autograd));
}

}  // namespace remnant::autograd
