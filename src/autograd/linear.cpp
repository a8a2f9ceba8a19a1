#include "ops/codes.h"
#include "ops/seed.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace remnant::autograd {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using OptionalTensor = std::optional<at::Tensor>;
using Forward = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t,
                           const std::optional<at::Generator>&);
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Backward = Gradients(const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                           const OptionalTensor&, c10::SymInt, int64_t, std::array<bool, 3>);

c10::TypedOperatorHandle<Forward> forward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("remnant::linear_coded", "").typed<Forward>();
  return op;
}

c10::TypedOperatorHandle<Backward> backward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("remnant::linear_coded_backward", "").typed<Backward>();
  return op;
}

OptionalTensor optional(const at::Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; }

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            const OptionalTensor& bias, int64_t bits,
                            const std::optional<at::Generator>& generator, std::array<bool, 3> needs) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ops::Codes kept;
    if (needs[1] && bits == 0) kept.codes = input;
    if (needs[1] && bits > 0) {
      kept = ops::shared_codes(input, bits, generator);
    } else if (bits > 0) {
      ops::skip_seeds(input, 1, generator);
    }
    ctx->save_for_backward({kept.codes, kept.table, needs[0] ? weight : at::Tensor()});
    ctx->saved_data["policy"] = bits == 0 ? "exact" : "quantized:bits=" + std::to_string(bits);
    ctx->saved_data["bits"] = bits;
    ctx->saved_data["columns"] = weight.sym_size(1);
    ctx->saved_data["needs"] = std::vector<bool>(needs.begin(), needs.end());
    return forward_op().call(input, weight, bias, bits, generator);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(6);
    const int64_t bits = ctx->saved_data["bits"].toInt();
    TORCH_CHECK(
        bits == 0 || !at::GradMode::is_enabled(),
        "linear has no gradient of its gradient under policy 'quantized'; use policy 'exact' where you "
        "need one");
    const auto wanted = ctx->saved_data["needs"].toBoolList();
    const std::array<bool, 3> needs{wanted[0], wanted[1], wanted[2]};
    const variable_list saved = ctx->get_saved_variables();
    if (at::GradMode::is_enabled()) {  // only bits 0 comes here: products that have a gradient themselves
      const auto rows = [](const at::Tensor& x) { return x.reshape_symint({-1, x.sym_size(-1)}); };
      if (needs[0]) result[0] = at::matmul(grads[0], saved[2]);
      if (needs[1]) result[1] = at::mm(rows(grads[0]).t(), rows(saved[0]));
      if (needs[2]) result[2] = rows(grads[0]).sum(0);
      return result;
    }
    const auto [grad_input, grad_weight, grad_bias] =
        backward_op().call(grads[0], optional(saved[0]), optional(saved[1]), optional(saved[2]),
                           ctx->saved_data["columns"].toSymInt(), bits, needs);
    if (needs[0]) result[0] = grad_input;
    if (needs[1]) result[1] = grad_weight;
    if (needs[2]) result[2] = grad_bias;
    return result;
  }
};

at::Tensor forward_autograd(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                            int64_t bits, const std::optional<at::Generator>& generator) {
  const std::array<bool, 3> needs{input.requires_grad(), weight.requires_grad(),
                                  bias.has_value() && bias->requires_grad()};
  if (!at::GradMode::is_enabled() || !(needs[0] || needs[1] || needs[2])) {
    const at::AutoDispatchBelowADInplaceOrView below;
    if (bits > 0) ops::skip_seeds(input, 1, generator);
    return forward_op().call(input, weight, bias, bits, generator);
  }
  if (bits > 0 && ops::keeps_whole()) {
    ops::skip_seeds(input, 1, generator);
    return LinearFunction::apply(input.to(weight.scalar_type()), weight, bias, 0, generator, needs);
  }
  return LinearFunction::apply(input, weight, bias, bits, generator, needs);
}

}  // namespace

TORCH_LIBRARY_IMPL(remnant, Autograd, m) { m.impl("linear_coded", TORCH_FN(forward_autograd)); }

}  // namespace remnant::autograd
