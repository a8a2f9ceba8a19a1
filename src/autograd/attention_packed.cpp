#include "ops/attention_common.h"

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

using Forward = ops::ForwardResult(const at::Tensor&, const at::Tensor&, const at::Tensor&, at::IntArrayRef,
                                   at::IntArrayRef, bool, double, double, c10::string_view, at::IntArrayRef,
                                   bool, const std::optional<at::Generator>&);
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
    const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, at::IntArrayRef, at::IntArrayRef,
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t,
    bool, double, double, c10::string_view, at::IntArrayRef, std::array<bool, 3>);

c10::TypedOperatorHandle<Forward> forward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::attention_packed_forward", "")
                             .typed<Forward>();
  return op;
}

c10::TypedOperatorHandle<Backward> backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::attention_packed_backward", "")
                             .typed<Backward>();
  return op;
}

// Saves what the wanted gradients need, as attention does.
struct PackedFunction : torch::autograd::Function<PackedFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, const std::vector<int64_t>& ends_q,
                               const std::vector<int64_t>& ends_k, bool causal, double dropout, double scale,
                               const std::string& policy, const std::vector<int64_t>& window,
                               const std::optional<at::Generator>& generator, std::array<bool, 3> needs) {
    const auto [output, lse, probabilities, codes, table, seed] = [&] {
      const at::AutoDispatchBelowADInplaceOrView below;
      return forward_op().call(query, key, value, ends_q, ends_k, causal, dropout, scale, policy, window,
                               true, generator);
    }();
    const PolicyKind kind = Policy::parse(policy).kind;
    const bool scores = needs[0] || needs[1];
    const bool rebuilds = kind == PolicyKind::recompute || kind == PolicyKind::sampled;
    // Biased P takes delta from itself, so that rows of dz sum to 0.
    const bool delta_from_output = scores && kind != PolicyKind::curve;
    ctx->save_for_backward({needs[1] || rebuilds ? query : Variable(),
                            needs[0] || rebuilds ? key : Variable(), scores ? value : Variable(),
                            delta_from_output ? output : Variable(), lse, probabilities, codes, table, seed});
    ctx->saved_data["ends_q"] = ends_q;
    ctx->saved_data["ends_k"] = ends_k;
    ctx->saved_data["kv_heads"] = key.size(1);
    ctx->saved_data["causal"] = causal;
    ctx->saved_data["dropout"] = dropout;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["policy"] = policy;
    ctx->saved_data["window"] = window;
    ctx->saved_data["needs"] = std::vector<bool>(needs.begin(), needs.end());
    ctx->set_materialize_grads(false);  // no zeros in the residuals' shapes
    ctx->mark_non_differentiable({lse, probabilities, codes, table, seed});
    return {output, lse, probabilities, codes, table, seed};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "attention_packed has no gradient of its gradient; use `attention` with policy 'exact' on a "
                "padded batch where you need one");
    const variable_list saved = ctx->get_saved_variables();
    variable_list result(12);
    if (!grads[0].defined()) return result;
    const auto optional = [](const at::Tensor& x) {
      return x.defined() ? std::optional<at::Tensor>(x) : std::nullopt;
    };
    const auto wanted = ctx->saved_data["needs"].toBoolList();
    std::tie(result[0], result[1], result[2]) = backward_op().call(
        grads[0], optional(saved[0]), optional(saved[1]), optional(saved[2]), optional(saved[3]),
        ctx->saved_data["ends_q"].toIntVector(), ctx->saved_data["ends_k"].toIntVector(), saved[4], saved[5],
        saved[6], saved[7], saved[8], ctx->saved_data["kv_heads"].toInt(), ctx->saved_data["causal"].toBool(),
        ctx->saved_data["dropout"].toDouble(), ctx->saved_data["scale"].toDouble(),
        ctx->saved_data["policy"].toStringRef(), ctx->saved_data["window"].toIntVector(),
        {wanted[0], wanted[1], wanted[2]});
    return result;
  }
};

ops::ForwardResult forward_autograd(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                    at::IntArrayRef ends_q, at::IntArrayRef ends_k, bool causal,
                                    double dropout, double scale, c10::string_view policy,
                                    at::IntArrayRef window, bool keep,
                                    const std::optional<at::Generator>& generator) {
  const std::array<bool, 3> needs{query.requires_grad(), key.requires_grad(), value.requires_grad()};
  if (!(needs[0] || needs[1] || needs[2]) || !at::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return forward_op().call(query, key, value, ends_q, ends_k, causal, dropout, scale, policy, window, keep,
                             generator);
  }
  auto outputs = PackedFunction::apply(query, key, value, ends_q.vec(), ends_k.vec(), causal, dropout, scale,
                                       std::string(policy), window.vec(), generator, needs);
  return {outputs[0], outputs[1], outputs[2], outputs[3], outputs[4], outputs[5]};
}

}  // namespace

TORCH_LIBRARY_IMPL(remnant, Autograd, m) { m.impl("attention_packed_forward", TORCH_FN(forward_autograd)); }

}  // namespace remnant::autograd
