#include "ops/attention_common.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace remnant::autograd {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

using Forward = ops::ForwardResult(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                   const std::optional<at::Tensor>&, bool, double, double, c10::string_view,
                                   at::IntArrayRef, bool, const std::optional<at::Generator>&);
using Backward = ops::BackwardResult(const at::Tensor&, const std::optional<at::Tensor>&,
                                     const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                                     const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                                     const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                     const at::Tensor&, const at::Tensor&, c10::SymInt, c10::SymInt, bool,
                                     double, double, c10::string_view, at::IntArrayRef, std::array<bool, 4>);

c10::TypedOperatorHandle<Forward> forward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("remnant::attention_forward", "").typed<Forward>();
  return op;
}

c10::TypedOperatorHandle<Backward> backward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("remnant::attention_backward", "").typed<Backward>();
  return op;
}

std::optional<at::Tensor> optional(const at::Tensor& x) {
  return x.defined() ? std::optional<at::Tensor>(x) : std::nullopt;
}

// The gradient of a gradient: only here to say clearly what to do instead.
struct AttentionBackwardFunction : torch::autograd::Function<AttentionBackwardFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& grad_output,
                               const std::optional<at::Tensor>& query, const std::optional<at::Tensor>& key,
                               const std::optional<at::Tensor>& value, const std::optional<at::Tensor>& mask,
                               const std::optional<at::Tensor>& output, const at::Tensor& lse,
                               const at::Tensor& probabilities, const at::Tensor& codes,
                               const at::Tensor& table, const at::Tensor& seed, c10::SymInt kv_heads,
                               c10::SymInt keys, bool causal, double dropout, double scale,
                               const std::string& policy, const std::vector<int64_t>& window,
                               std::array<bool, 4> needs) {
    ctx->saved_data["policy"] = policy;
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [grad_query, grad_key, grad_value, grad_mask] = backward_op().call(
        grad_output, query, key, value, mask, output, lse, probabilities, codes, table, seed,
        std::move(kv_heads), std::move(keys), causal, dropout, scale, policy, window, needs);
    // A Function's outputs must be defined; backward_autograd takes the placeholders out again.
    variable_list grads{grad_query, grad_key, grad_value, grad_mask};
    for (at::Tensor& grad : grads) {
      if (!grad.defined()) grad = at::empty({0}, grad_output.options());
    }
    return grads;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    TORCH_CHECK(false, "attention with policy '", ctx->saved_data["policy"].toStringRef(),
                "' has no gradient of its gradient; use policy 'exact' where you need one");
  }
};

ops::BackwardResult backward_autograd(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& query,
    const std::optional<at::Tensor>& key, const std::optional<at::Tensor>& value,
    const std::optional<at::Tensor>& mask, const std::optional<at::Tensor>& output, const at::Tensor& lse,
    const at::Tensor& probabilities, const at::Tensor& codes, const at::Tensor& table, const at::Tensor& seed,
    c10::SymInt kv_heads, c10::SymInt keys, bool causal, double dropout, double scale,
    c10::string_view policy, at::IntArrayRef window, std::array<bool, 4> needs) {
  if (!at::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return backward_op().call(grad_output, query, key, value, mask, output, lse, probabilities, codes, table,
                              seed, std::move(kv_heads), std::move(keys), causal, dropout, scale, policy,
                              window, needs);
  }
  auto grads = AttentionBackwardFunction::apply(
      grad_output, query, key, value, mask, output, lse, probabilities, codes, table, seed,
      std::move(kv_heads), std::move(keys), causal, dropout, scale, std::string(policy), window.vec(), needs);
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!needs[i]) grads[i] = at::Tensor();
  }
  return {grads[0], grads[1], grads[2], grads[3]};
}

// Saves the least that the wanted gradients need: with only value's gradient wanted, no value and no
// output; curve and codes stand for P, so key and query are there for dq and dk alone.
struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, const std::optional<at::Tensor>& mask, bool causal,
                               double dropout, double scale, const std::string& policy,
                               const std::vector<int64_t>& window,
                               const std::optional<at::Generator>& generator, std::array<bool, 4> needs) {
    const auto [output, lse, probabilities, codes, table, seed] = [&] {
      const at::AutoDispatchBelowADInplaceOrView below;
      return forward_op().call(query, key, value, mask, causal, dropout, scale, policy, window, true,
                               generator);
    }();
    const PolicyKind kind = Policy::parse(policy).kind;
    const bool scores = needs[0] || needs[1] || needs[3];
    const bool rebuilds =
        kind == PolicyKind::recompute || kind == PolicyKind::sampled || kind == PolicyKind::top;
    const bool exact = kind == PolicyKind::exact;
    // Biased P takes delta from itself, so that rows of dz sum to 0; exact without dropout sums over P as
    // torch does.
    const bool biased = kind == PolicyKind::curve || kind == PolicyKind::top;
    const bool delta_from_output = scores && !biased && (!exact || dropout > 0);
    // Exact's second derivative differentiates P through query and key, whatever is wanted now.
    const bool keep_query = needs[1] || rebuilds || (exact && scores);
    const bool keep_key = needs[0] || rebuilds || (exact && scores);
    const bool keep_mask = mask.has_value() && (rebuilds || (exact && scores) || needs[3]);
    ctx->save_for_backward({keep_query ? query : Variable(), keep_key ? key : Variable(),
                            scores ? value : Variable(), keep_mask ? *mask : Variable(),
                            delta_from_output ? output : Variable(), lse, probabilities, codes, table, seed});
    ctx->saved_data["kv_heads"] = key.sym_size(1);
    ctx->saved_data["keys"] = key.sym_size(2);
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
    const variable_list saved = ctx->get_saved_variables();
    variable_list result(11);
    const at::Tensor& grad_output = grads[0];
    if (!grad_output.defined()) return result;
    const auto kv_heads = ctx->saved_data["kv_heads"].toSymInt();
    const auto keys = ctx->saved_data["keys"].toSymInt();
    const bool causal = ctx->saved_data["causal"].toBool();
    const double dropout = ctx->saved_data["dropout"].toDouble();
    const double scale = ctx->saved_data["scale"].toDouble();
    const std::string policy = ctx->saved_data["policy"].toStringRef();
    const std::vector<int64_t> window = ctx->saved_data["window"].toIntVector();
    const auto wanted = ctx->saved_data["needs"].toBoolList();
    const std::array<bool, 4> needs{wanted[0], wanted[1], wanted[2], wanted[3]};
    ops::BackwardResult gradients;
    if (at::GradMode::is_enabled() && Policy::parse(policy).kind == PolicyKind::exact) {
      const ops::AttentionCall call =
          ops::make_call(optional(saved[3]), causal, dropout, scale, policy, window);
      gradients = ops::exact_backward_differentiable({grad_output,
                                                      saved[0],
                                                      saved[1],
                                                      saved[2],
                                                      {},
                                                      {saved[5], saved[6], saved[7], saved[8], saved[9]},
                                                      kv_heads.guard_int(__FILE__, __LINE__),
                                                      keys.guard_int(__FILE__, __LINE__),
                                                      needs},
                                                     call);
      if (needs[3]) std::get<3>(gradients) = std::get<3>(gradients).view(saved[3].sizes());
    } else {
      gradients =
          backward_op().call(grad_output, optional(saved[0]), optional(saved[1]), optional(saved[2]),
                             optional(saved[3]), optional(saved[4]), saved[5], saved[6], saved[7], saved[8],
                             saved[9], kv_heads, keys, causal, dropout, scale, policy, window, needs);
    }
    result[0] = std::get<0>(gradients);
    result[1] = std::get<1>(gradients);
    result[2] = std::get<2>(gradients);
    result[3] = std::get<3>(gradients);
    return result;
  }
};

ops::ForwardResult forward_autograd(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                    const std::optional<at::Tensor>& mask, bool causal, double dropout,
                                    double scale, c10::string_view policy, at::IntArrayRef window, bool keep,
                                    const std::optional<at::Generator>& generator) {
  const std::array<bool, 4> needs{query.requires_grad(), key.requires_grad(), value.requires_grad(),
                                  mask.has_value() && mask->requires_grad()};
  const bool any = needs[0] || needs[1] || needs[2] || needs[3];
  if (!any || !at::GradMode::is_enabled()) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return forward_op().call(query, key, value, mask, causal, dropout, scale, policy, window, keep,
                             generator);
  }
  auto outputs = AttentionFunction::apply(query, key, value, mask, causal, dropout, scale,
                                          std::string(policy), window.vec(), generator, needs);
  return {outputs[0], outputs[1], outputs[2], outputs[3], outputs[4], outputs[5]};
}

}  // namespace

TORCH_LIBRARY_IMPL(remnant, Autograd, m) {
  m.impl("attention_forward", TORCH_FN(forward_autograd));
  m.impl("attention_backward", TORCH_FN(backward_autograd));
}

}  // namespace remnant::autograd
