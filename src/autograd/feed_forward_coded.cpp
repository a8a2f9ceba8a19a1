#include "ops/codes.h"
#include "ops/seed.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace remnant::autograd {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

using OptionalTensor = std::optional<at::Tensor>;
using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&,
                                                               const OptionalTensor&, const at::Tensor&,
                                                               const OptionalTensor&, c10::string_view,
                                                               double, int64_t,
                                                               const std::optional<at::Generator>&);
using Whole = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                                 const at::Tensor&, const OptionalTensor&, c10::string_view,
                                                 double, const std::optional<at::Generator>&);
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const at::Tensor&, const at::Tensor&,
    const at::Tensor&, const at::Tensor&, c10::string_view, double, int64_t, std::array<bool, 5>);

c10::TypedOperatorHandle<Forward> forward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("remnant::feed_forward_coded", "").typed<Forward>();
  return op;
}

/// The op that keeps its input.
c10::TypedOperatorHandle<Whole> whole_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("remnant::feed_forward_forward", "").typed<Whole>();
  return op;
}

c10::TypedOperatorHandle<Backward> backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::feed_forward_coded_backward", "")
                             .typed<Backward>();
  return op;
}

OptionalTensor optional(const at::Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; }

// Every gradient is linear in one of what codes stand for: the hidden layer, its derivative, the input.
struct CodedFeedForwardFunction : torch::autograd::Function<CodedFeedForwardFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight1,
                               const OptionalTensor& bias1, const at::Tensor& weight2,
                               const OptionalTensor& bias2, const std::string& activation, double dropout,
                               int64_t bits, const std::optional<at::Generator>& generator,
                               std::array<bool, 5> needs) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ops::Codes kept;
    if (needs[1]) {
      kept = ops::shared_codes(input, bits, generator);
    } else {
      ops::skip_seeds(input, 1, generator);
    }
    const auto [output, seed, codes] =
        forward_op().call(input, weight1, bias1, weight2, bias2, activation, dropout, bits, generator);
    // bias2's gradient is a sum of the output's alone.
    const bool hidden = needs[0] || needs[1] || needs[2] || needs[3];
    ctx->save_for_backward({kept.codes, kept.table, hidden ? weight1 : Variable(),
                            hidden ? weight2 : Variable(), hidden ? seed : Variable(),
                            hidden ? codes : Variable()});
    ctx->saved_data["activation"] = activation;
    ctx->saved_data["dropout"] = dropout;
    ctx->saved_data["bits"] = bits;
    ctx->saved_data["policy"] = "quantized:bits=" + std::to_string(bits);
    ctx->saved_data["needs"] = std::vector<bool>(needs.begin(), needs.end());
    ctx->set_materialize_grads(false);  // no zeros in the residuals' shapes
    ctx->mark_non_differentiable({seed, codes});
    return {output, seed, codes};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(10);
    const at::Tensor& grad = grads[0];
    if (!grad.defined()) return result;
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "feed_forward has no gradient of its gradient; use torch's linear and activation where you "
                "need one");
    const auto wanted = ctx->saved_data["needs"].toBoolList();
    const std::array<bool, 5> needs{wanted[0], wanted[1], wanted[2], wanted[3], wanted[4]};
    const variable_list saved = ctx->get_saved_variables();
    if (!saved[5].defined()) {
      result[4] = grad.flatten(0, -2).sum(0);
      return result;
    }
    const auto gradients =
        backward_op().call(grad, optional(saved[0]), optional(saved[1]), saved[2], saved[3], saved[4],
                           saved[5], ctx->saved_data["activation"].toStringRef(),
                           ctx->saved_data["dropout"].toDouble(), ctx->saved_data["bits"].toInt(), needs);
    if (needs[0]) result[0] = std::get<0>(gradients);
    if (needs[1]) result[1] = std::get<1>(gradients);
    if (needs[2]) result[2] = std::get<2>(gradients);
    if (needs[3]) result[3] = std::get<3>(gradients);
    if (needs[4]) result[4] = std::get<4>(gradients);
    return result;
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_autograd(
    const at::Tensor& input, const at::Tensor& weight1, const OptionalTensor& bias1,
    const at::Tensor& weight2, const OptionalTensor& bias2, c10::string_view activation, double dropout,
    int64_t bits, const std::optional<at::Generator>& generator) {
  const std::array<bool, 5> needs{input.requires_grad(), weight1.requires_grad(),
                                  bias1.has_value() && bias1->requires_grad(), weight2.requires_grad(),
                                  bias2.has_value() && bias2->requires_grad()};
  const bool any = needs[0] || needs[1] || needs[2] || needs[3] || needs[4];
  if (!any || !at::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ops::skip_seeds(input, 1, generator);
    return forward_op().call(input, weight1, bias1, weight2, bias2, activation, dropout, bits, generator);
  }
  if (ops::keeps_whole()) {
    // Of the input's codes; and of the hidden layer's, which is dropout's as well.
    ops::skip_seeds(input, dropout > 0 ? 1 : 2, generator);
    const auto [output, seed] =
        whole_op().call(input, weight1, bias1, weight2, bias2, activation, dropout, generator);
    return {output, seed, at::Tensor()};
  }
  auto outputs = CodedFeedForwardFunction::apply(input, weight1, bias1, weight2, bias2,
                                                 std::string(activation), dropout, bits, generator, needs);
  return {outputs[0], outputs[1], outputs[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(remnant, Autograd, m) { m.impl("feed_forward_coded", TORCH_FN(forward_autograd)); }

}  // namespace remnant::autograd
