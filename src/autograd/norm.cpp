#include "ops/attention_common.h"
#include "ops/codes.h"
#include "ops/seed.h"
#include "ops/step_common.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace remnant::autograd {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using OptionalTensor = std::optional<at::Tensor>;
using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Forward = Result(const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                       const OptionalTensor&, double, double, bool, bool, bool, at::IntArrayRef, bool,
                       int64_t);
using Backward = Result(const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                        const OptionalTensor&, const at::Tensor&, const OptionalTensor&,
                        const OptionalTensor&, const OptionalTensor&, double, bool, at::IntArrayRef,
                        std::array<bool, 4>);
using DropoutBackward = at::Tensor(const at::Tensor&, const at::Tensor&, double);

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

c10::TypedOperatorHandle<Forward> forward_op() {
  static const auto op = find<Forward>("remnant::norm_forward");
  return op;
}

c10::TypedOperatorHandle<Backward> backward_op() {
  static const auto op = find<Backward>("remnant::norm_backward");
  return op;
}

c10::TypedOperatorHandle<DropoutBackward> dropout_backward_op() {
  static const auto op = find<DropoutBackward>("remnant::dropout_backward");
  return op;
}

OptionalTensor optional(const at::Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; }

struct NormFunction : torch::autograd::Function<NormFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& input, const OptionalTensor& residual,
                               const OptionalTensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& seed, double p, double eps, bool center, bool need_sum,
                               int64_t bits, std::array<bool, 4> needs) {
    // x^ is what every gradient but bias's needs.
    const bool keep = needs[0] || needs[1] || needs[2];
    const auto hidden = keep ? ops::hidden_columns(input, weight, bias, bits) : ops::HiddenColumns{};
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [output, sum, rstd, aside] = forward_op().call(
        input, residual, weight, bias, seed, p, eps, center, need_sum, keep, hidden.list, hidden.all, bits);
    const bool normalised = keep && !hidden.all;
    const bool rows = needs[0] || needs[1];
    const auto when = [](bool wanted, const OptionalTensor& x) { return wanted && x ? *x : at::Tensor(); };
    ops::Codes kept;
    const bool coded = keep && bits > 0;
    if (coded) {
      kept = ops::shared_codes(hidden.all ? aside : output, bits, std::nullopt);
    } else if (bits > 0) {
      ops::skip_seeds(output, 1, std::nullopt);
    }
    ctx->save_for_backward({when(normalised && bits == 0, output), when(rows, rstd),
                            keep && !(coded && hidden.all) ? aside : at::Tensor(), when(keep, weight),
                            when(normalised, bias), when(needs[0], seed), kept.codes, kept.table});
    ctx->saved_data["bits"] = bits;
    ctx->saved_data["p"] = p;
    ctx->saved_data["center"] = center;
    ctx->saved_data["hidden"] = hidden.list;
    ctx->saved_data["needs"] = std::vector<bool>(needs.begin(), needs.end());
    ctx->saved_data["columns"] = input.sym_size(-1);
    ctx->set_materialize_grads(false);  // no zeros in the residuals' shapes
    need_sum ? ctx->mark_non_differentiable({rstd, aside}) : ctx->mark_non_differentiable({sum, rstd, aside});
    return {output, sum, rstd, aside};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(11);
    const auto wanted = ctx->saved_data["needs"].toBoolList();
    const std::array<bool, 4> needs{wanted[0], wanted[1], wanted[2], wanted[3]};
    const variable_list saved = ctx->get_saved_variables();
    const double p = ctx->saved_data["p"].toDouble();
    if (!grads[0].defined()) {
      // Only the sum was used: the norm is not in the way.
      if (!grads[1].defined()) return result;
      if (needs[0])
        result[0] = saved[5].defined() ? dropout_backward_op().call(grads[1], saved[5], p) : grads[1];
      if (needs[1]) result[1] = grads[1];
      return result;
    }
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "layer_norm and rms_norm have no gradient of their gradient; use torch's where you need one");
    if (!(needs[0] || needs[1] || needs[2])) {
      result[3] = grads[0]
                      .reshape_symint({-1, ctx->saved_data["columns"].toSymInt()})
                      .sum(at::IntArrayRef{0}, false, ops::accumulation_type(grads[0].scalar_type()));
      return result;
    }
    const auto hidden = ctx->saved_data["hidden"].toIntVector();
    at::Tensor output = saved[0], aside = saved[2];
    if (saved[6].defined()) {
      const ops::Codes codes{saved[6], saved[7]};
      const int64_t bits = ctx->saved_data["bits"].toInt();
      const auto type = grads[0].scalar_type();
      if (aside.defined()) {
        output = ops::decode(codes, bits, grads[0].sym_sizes(), type);
      } else {  // of x^
        const c10::SymInt columns = grads[0].sym_size(-1);
        aside =
            ops::decode(codes, bits, {grads[0].sym_numel() / columns, columns}, ops::accumulation_type(type));
      }
    }
    const auto [grad_input, grad_residual, grad_weight, grad_bias] = backward_op().call(
        grads[0], optional(grads[1]), optional(output), optional(saved[1]), aside, optional(saved[3]),
        optional(saved[4]), optional(saved[5]), p, ctx->saved_data["center"].toBool(), hidden, needs);
    if (needs[0]) result[0] = grad_input;
    if (needs[1]) result[1] = grad_residual;
    if (needs[2]) result[2] = grad_weight;
    if (needs[3]) result[3] = grad_bias;
    return result;
  }
};

Result forward_autograd(const at::Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& seed, double p, double eps,
                        bool center, bool need_sum, bool keep, at::IntArrayRef hidden, bool all_hidden,
                        int64_t bits) {
  const auto needs_gradient = [](const OptionalTensor& x) { return x.has_value() && x->requires_grad(); };
  const std::array<bool, 4> needs{input.requires_grad(), needs_gradient(residual), needs_gradient(weight),
                                  needs_gradient(bias)};
  if (!at::GradMode::is_enabled() || !(needs[0] || needs[1] || needs[2] || needs[3])) {
    const at::AutoDispatchBelowADInplaceOrView below;
    if (bits > 0) ops::skip_seeds(input, 1, std::nullopt);
    return forward_op().call(input, residual, weight, bias, seed, p, eps, center, need_sum, keep, hidden,
                             all_hidden, bits);
  }
  if (bits > 0 && ops::keeps_whole()) {
    ops::skip_seeds(input, 1, std::nullopt);
    bits = 0;
  }
  auto outputs =
      NormFunction::apply(input, residual, weight, bias, seed, p, eps, center, need_sum, bits, needs);
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(remnant, Autograd, m) { m.impl("norm_forward", TORCH_FN(forward_autograd)); }

}  // namespace remnant::autograd
