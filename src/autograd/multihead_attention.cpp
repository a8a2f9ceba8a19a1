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

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Forward = Result(const at::Tensor&, const std::optional<at::Tensor>&, const at::Tensor&,
                       const std::optional<at::Tensor>&, const at::Tensor&, const std::optional<at::Tensor>&,
                       int64_t, const std::optional<at::Tensor>&, bool, double, bool,
                       const std::optional<at::Generator>&);
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, const at::Tensor&,
    const std::optional<at::Tensor>&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
    const at::Tensor&, int64_t, const std::optional<at::Tensor>&, bool, double, std::array<bool, 6>);

c10::TypedOperatorHandle<Forward> forward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::multihead_attention_forward", "")
                             .typed<Forward>();
  return op;
}

c10::TypedOperatorHandle<Backward> backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::multihead_attention_backward", "")
                             .typed<Backward>();
  return op;
}

std::optional<at::Tensor> optional(const at::Tensor& x) {
  return x.defined() ? std::optional<at::Tensor>(x) : std::nullopt;
}

struct MultiheadAttentionFunction : torch::autograd::Function<MultiheadAttentionFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& query,
                               const std::optional<at::Tensor>& memory, const at::Tensor& in_weight,
                               const std::optional<at::Tensor>& in_bias, const at::Tensor& out_weight,
                               const std::optional<at::Tensor>& out_bias, int64_t heads,
                               const std::optional<at::Tensor>& mask, bool causal, double dropout, bool keep,
                               const std::optional<at::Generator>& generator, std::array<bool, 6> needs) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [output, attended, lse, seeds] =
        forward_op().call(query, memory, in_weight, in_bias, out_weight, out_bias, heads, mask, causal,
                          dropout, keep, generator);
    // out_bias's gradient is a sum of the output's alone.
    const bool inner = needs[0] || needs[1] || needs[2] || needs[3] || needs[4];
    const auto kept = [&](const std::optional<at::Tensor>& x) {
      return inner && x.has_value() ? *x : Variable();
    };
    ctx->save_for_backward({kept(query), kept(memory), kept(in_weight), kept(in_bias), kept(out_weight),
                            kept(mask), attended, lse, seeds});
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["causal"] = causal;
    ctx->saved_data["dropout"] = dropout;
    ctx->saved_data["needs"] = std::vector<bool>(needs.begin(), needs.end());
    ctx->set_materialize_grads(false);  // no zeros in the residuals' shapes
    ctx->mark_non_differentiable({attended, lse, seeds});
    return {output, attended, lse, seeds};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(13);
    const at::Tensor& grad = grads[0];
    if (!grad.defined()) return result;
    TORCH_CHECK(
        !at::GradMode::is_enabled(),
        "multihead_attention has no gradient of its gradient; use torch's linear layers and attention "
        "with policy 'exact' where you need one");
    const auto wanted = ctx->saved_data["needs"].toBoolList();
    std::array<bool, 6> needs{};
    for (size_t i = 0; i < needs.size(); ++i) needs[i] = wanted[i];
    const variable_list saved = ctx->get_saved_variables();
    if (!saved[0].defined()) {
      result[5] = grad.flatten(0, -2).sum(0);
      return result;
    }
    const auto gradients =
        backward_op().call(grad, saved[0], optional(saved[1]), saved[2], optional(saved[3]), saved[4],
                           saved[6], saved[7], saved[8], ctx->saved_data["heads"].toInt(), optional(saved[5]),
                           ctx->saved_data["causal"].toBool(), ctx->saved_data["dropout"].toDouble(), needs);
    if (needs[0]) result[0] = std::get<0>(gradients);
    if (needs[1]) result[1] = std::get<1>(gradients);
    if (needs[2]) result[2] = std::get<2>(gradients);
    if (needs[3]) result[3] = std::get<3>(gradients);
    if (needs[4]) result[4] = std::get<4>(gradients);
    if (needs[5]) result[5] = std::get<5>(gradients);
    return result;
  }
};

Result forward_autograd(const at::Tensor& query, const std::optional<at::Tensor>& memory,
                        const at::Tensor& in_weight, const std::optional<at::Tensor>& in_bias,
                        const at::Tensor& out_weight, const std::optional<at::Tensor>& out_bias,
                        int64_t heads, const std::optional<at::Tensor>& mask, bool causal, double dropout,
                        bool keep, const std::optional<at::Generator>& generator) {
  const auto wanted = [](const std::optional<at::Tensor>& x) { return x.has_value() && x->requires_grad(); };
  const std::array<bool, 6> needs{wanted(query),   wanted(memory),     wanted(in_weight),
                                  wanted(in_bias), wanted(out_weight), wanted(out_bias)};
  const bool any = needs[0] || needs[1] || needs[2] || needs[3] || needs[4] || needs[5];
  if (!at::GradMode::is_enabled() || !(any || wanted(mask))) {
    const at::AutoDispatchBelowADInplaceOrView below;
    // What compiled code has recorded asks for the residuals itself.
    return forward_op().call(query, memory, in_weight, in_bias, out_weight, out_bias, heads, mask, causal,
                             dropout, keep, generator);
  }
  TORCH_CHECK(!wanted(mask),
              "multihead_attention: mask must not need a gradient; use attention, which gives it one");
  auto outputs = MultiheadAttentionFunction::apply(query, memory, in_weight, in_bias, out_weight, out_bias,
                                                   heads, mask, causal, dropout, keep, generator, needs);
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(remnant, Autograd, m) {
  m.impl("multihead_attention_forward", TORCH_FN(forward_autograd));
}

}  // namespace remnant::autograd
