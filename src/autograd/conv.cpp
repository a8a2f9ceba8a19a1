#include "ops/conv.h"
#include "ops/codes.h"

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
using Coded = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, at::IntArrayRef,
                         at::IntArrayRef, at::IntArrayRef, int64_t, int64_t,
                         const std::optional<at::Generator>&);
using Rebuilt = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, at::IntArrayRef,
                           at::IntArrayRef, at::IntArrayRef, int64_t, bool);
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using CodedBackward = Gradients(const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                                const at::Tensor&, c10::SymIntArrayRef, at::IntArrayRef, at::IntArrayRef,
                                at::IntArrayRef, int64_t, int64_t, std::array<bool, 3>);

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

c10::TypedOperatorHandle<Coded> coded_op() {
  static const auto op = find<Coded>("remnant::conv2d_coded");
  return op;
}

c10::TypedOperatorHandle<Rebuilt> rebuilt_op() {
  static const auto op = find<Rebuilt>("remnant::conv2d_rebuilt");
  return op;
}

OptionalTensor optional(const at::Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; }

std::array<bool, 3> needs_of(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias) {
  return {input.requires_grad(), weight.requires_grad(), bias.has_value() && bias->requires_grad()};
}

bool any(std::array<bool, 3> needs) {
  return at::GradMode::is_enabled() && (needs[0] || needs[1] || needs[2]);
}

void save_geometry(AutogradContext* ctx, at::IntArrayRef stride, at::IntArrayRef padding,
                   at::IntArrayRef dilation, int64_t groups, std::array<bool, 3> needs) {
  ctx->saved_data["stride"] = stride.vec();
  ctx->saved_data["padding"] = padding.vec();
  ctx->saved_data["dilation"] = dilation.vec();
  ctx->saved_data["groups"] = groups;
  ctx->saved_data["needs"] = std::vector<bool>(needs.begin(), needs.end());
}

std::array<bool, 3> saved_needs(AutogradContext* ctx) {
  const auto wanted = ctx->saved_data["needs"].toBoolList();
  return {wanted[0], wanted[1], wanted[2]};
}

void refuse_double_backward(const char* policy) {
  TORCH_CHECK(!at::GradMode::is_enabled(), "conv2d has no gradient of its gradient under policy '", policy,
              "'; use policy 'exact' where you need one");
}

variable_list results(const std::array<at::Tensor, 3>& grads, std::array<bool, 3> needs, size_t size) {
  variable_list result(size);
  for (size_t i = 0; i < 3; ++i) {
    if (needs[i]) result[i] = grads[i];
  }
  return result;
}

struct CodedConv2d : torch::autograd::Function<CodedConv2d> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            const OptionalTensor& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, int64_t groups, int64_t bits,
                            const std::optional<at::Generator>& generator, std::array<bool, 3> needs) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ops::Codes kept;
    if (needs[1]) {
      kept = ops::shared_codes(input, bits, generator);
    } else {
      ops::skip_seeds(input, 1, generator);
    }
    ctx->save_for_backward({kept.codes, kept.table, needs[0] || needs[1] ? weight : at::Tensor()});
    ctx->saved_data["policy"] = "quantized:bits=" + std::to_string(bits);
    ctx->saved_data["bits"] = bits;
    ctx->saved_data["input"] = input.sym_sizes();
    save_geometry(ctx, stride, padding, dilation, groups, needs);
    return coded_op().call(input, weight, bias, stride, padding, dilation, groups, bits, generator);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    refuse_double_backward("quantized");
    static const auto op = find<CodedBackward>("remnant::conv2d_coded_backward");
    const auto needs = saved_needs(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const auto [grad_input, grad_weight, grad_bias] =
        op.call(grads[0], optional(saved[0]), optional(saved[1]), saved[2],
                ctx->saved_data["input"].toSymIntVector(), ctx->saved_data["stride"].toIntVector(),
                ctx->saved_data["padding"].toIntVector(), ctx->saved_data["dilation"].toIntVector(),
                ctx->saved_data["groups"].toInt(), ctx->saved_data["bits"].toInt(), needs);
    return results({grad_input, grad_weight, grad_bias}, needs, 10);
  }
};

struct RebuiltConv2d : torch::autograd::Function<RebuiltConv2d> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            const OptionalTensor& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, int64_t groups, bool least, std::array<bool, 3> needs) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor output =
        rebuilt_op().call(input, weight, bias, stride, padding, dilation, groups, least);
    const ops::ConvGeometry shape{input.sizes().vec(), stride.vec(), padding.vec(), dilation.vec(), groups};
    ops::KeptOfInput kept;
    if (needs[1]) kept = ops::keep_of_input(input, weight, bias, output, shape, least);
    const bool rebuilds = needs[1] && !kept.input.defined();
    ctx->save_for_backward(
        {needs[0] || needs[1] ? weight : at::Tensor(), rebuilds ? bias.value_or(at::Tensor()) : at::Tensor(),
         rebuilds ? output : at::Tensor(), kept.input, kept.ring, kept.coordinates, kept.probes});
    const std::string name = least ? "min_norm" : "invert";
    ctx->saved_data["policy"] = kept.reason.empty() ? name : name + " (input kept: " + kept.reason + ")";
    ctx->saved_data["input"] = shape.input;
    ctx->saved_data["least"] = least;
    save_geometry(ctx, stride, padding, dilation, groups, needs);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const bool least = ctx->saved_data["least"].toBool();
    refuse_double_backward(least ? "min_norm" : "invert");
    const auto needs = saved_needs(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const ops::ConvGeometry shape{
        ctx->saved_data["input"].toIntVector(), ctx->saved_data["stride"].toIntVector(),
        ctx->saved_data["padding"].toIntVector(), ctx->saved_data["dilation"].toIntVector(),
        ctx->saved_data["groups"].toInt()};
    ops::KeptOfInput kept;
    kept.input = saved[3];
    kept.ring = saved[4];
    kept.coordinates = saved[5];
    kept.probes = saved[6];
    return results(
        ops::rebuilt_backward(grads[0], saved[2], kept, saved[0], optional(saved[1]), shape, least, needs),
        needs, 9);
  }
};

at::Tensor coded_autograd(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                          at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                          int64_t groups, int64_t bits, const std::optional<at::Generator>& generator) {
  const auto needs = needs_of(input, weight, bias);
  if (!any(needs)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ops::skip_seeds(input, 1, generator);
    return coded_op().call(input, weight, bias, stride, padding, dilation, groups, bits, generator);
  }
  return CodedConv2d::apply(input, weight, bias, stride, padding, dilation, groups, bits, generator, needs);
}

at::Tensor rebuilt_autograd(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                            at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                            int64_t groups, bool least) {
  const auto needs = needs_of(input, weight, bias);
  if (!any(needs)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return rebuilt_op().call(input, weight, bias, stride, padding, dilation, groups, least);
  }
  return RebuiltConv2d::apply(input, weight, bias, stride, padding, dilation, groups, least, needs);
}

}  // namespace

TORCH_LIBRARY_IMPL(remnant, Autograd, m) {
  m.impl("conv2d_coded", TORCH_FN(coded_autograd));
  m.impl("conv2d_rebuilt", TORCH_FN(rebuilt_autograd));
}

}  // namespace remnant::autograd
