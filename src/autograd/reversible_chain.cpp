#include "ops/reversible_chain.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

namespace remnant::autograd {

namespace {

using ops::ChainKept;
using ops::ChainOptions;
using ops::ChainTensors;
using ops::KeptOfLayer;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// One order for the tensors of a layer, in and out of the graph.
constexpr size_t kTensorsOfLayer = 10;

void pack(variable_list& list, const KeptOfLayer& layer) {
  for (const at::Tensor& each : {layer.ring, layer.mean, layer.deviation, layer.signs, layer.hidden,
                                 layer.columns, layer.input, layer.residue, layer.step, layer.probes}) {
    list.push_back(each);
  }
}

KeptOfLayer unpack(const variable_list& list, size_t from) {
  return {list[from],     list[from + 1], list[from + 2], list[from + 3], list[from + 4],
          list[from + 5], list[from + 6], list[from + 7], list[from + 8], list[from + 9]};
}

// Products in half precision leave nothing to rebuild an input from, in the plan and in the backward alike.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

variable_list part(const variable_list& list, size_t from, size_t count) {
  return {list.begin() + static_cast<int64_t>(from), list.begin() + static_cast<int64_t>(from + count)};
}

struct ReversibleChainFunction : torch::autograd::Function<ReversibleChainFunction> {
  // `parameters`: weights, then the norms' weights, then their biases.
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, at::TensorList parameters,
                            const ChainTensors* tensors, const ChainOptions* options,
                            const at::Tensor* errors) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ChainKept kept;
    const at::Tensor output = ops::chain_forward(input, *tensors, *options, &kept);
    variable_list saved{input, output, *errors, kept.probes};
    for (const at::Tensor& each : parameters) saved.push_back(each);
    for (const KeptOfLayer& layer : kept.layers) pack(saved, layer);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["policy"] = "reversible chain: " + std::to_string(options->anchors.size()) +
                                " anchors, " + std::to_string(options->residues.size()) + " residues";
    ctx->saved_data["layers"] = static_cast<int64_t>(kept.layers.size());
    ctx->saved_data["maxmin"] = options->activation == ops::ChainActivation::maxmin;
    ctx->saved_data["slope"] = options->slope;
    ctx->saved_data["eps"] = options->eps;
    ctx->saved_data["needs_input"] = input.requires_grad();
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK(
        !at::GradMode::is_enabled(),
        "reversible_chain has no gradient of its gradient; use the layers by themselves where you need one");
    const NoAutocast no_autocast;
    const variable_list saved = ctx->get_saved_variables();
    const auto layers = static_cast<size_t>(ctx->saved_data["layers"].toInt());
    ChainOptions options;
    if (ctx->saved_data["maxmin"].toBool()) options.activation = ops::ChainActivation::maxmin;
    options.slope = ctx->saved_data["slope"].toDouble();
    options.eps = ctx->saved_data["eps"].toDouble();
    const ChainTensors tensors{
        part(saved, 4, layers), part(saved, 4 + layers, layers), part(saved, 4 + 2 * layers, layers), {}, {}};
    ChainKept kept;
    kept.probes = saved[3];
    for (size_t i = 0; i < layers; ++i) {
      kept.layers.push_back(unpack(saved, 4 + 3 * layers + i * kTensorsOfLayer));
    }
    const auto made = ops::chain_backward(grads[0], saved[0], saved[1], tensors, options, kept,
                                          ctx->saved_data["needs_input"].toBool(), saved[2]);
    variable_list result{made.input};
    for (const auto* list : {&made.weights, &made.scales, &made.shifts}) {
      result.insert(result.end(), list->begin(), list->end());
    }
    result.resize(result.size() + 3);  // tensors, options and errors are no variables
    return result;
  }
};

ChainTensors make_tensors(at::TensorList weights, at::TensorList scales, at::TensorList shifts,
                          at::TensorList means, at::TensorList vars) {
  return {weights.vec(), scales.vec(), shifts.vec(), means.vec(), vars.vec()};
}

ops::ChainActivation parse(c10::string_view name) {
  TORCH_CHECK(name == "leaky" || name == "maxmin",
              "reversible_chain: activation must be 'leaky' or 'maxmin', got '", name, "'");
  return name == "leaky" ? ops::ChainActivation::leaky : ops::ChainActivation::maxmin;
}

at::Tensor chain(const at::Tensor& input, at::TensorList weights, at::TensorList scales,
                 at::TensorList shifts, at::TensorList means, at::TensorList vars, double momentum,
                 double eps, double slope, c10::string_view activation, at::IntArrayRef anchors,
                 at::IntArrayRef residues, const std::optional<at::Tensor>& errors) {
  const NoAutocast no_autocast;
  const ChainTensors tensors = make_tensors(weights, scales, shifts, means, vars);
  const ChainOptions options{parse(activation), slope, eps, momentum, anchors.vec(), residues.vec()};
  ops::check_chain(input, tensors, options);
  const auto wanted = [](at::TensorList list) {
    return std::any_of(list.begin(), list.end(), [](const at::Tensor& x) { return x.requires_grad(); });
  };
  if (!at::GradMode::is_enabled() ||
      !(input.requires_grad() || wanted(weights) || wanted(scales) || wanted(shifts))) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return ops::chain_forward(input, tensors, options, nullptr);
  }
  const auto count = static_cast<int64_t>(weights.size());
  TORCH_CHECK(!errors.has_value() || (errors->is_cpu() && errors->scalar_type() == at::kDouble &&
                                      errors->is_contiguous() && errors->numel() == count),
              "reversible_chain: errors must be ", count, " float64 numbers on the CPU, one a layer");
  const at::Tensor record = errors.has_value() ? *errors : at::empty({count}, at::TensorOptions(at::kDouble));
  std::vector<at::Tensor> parameters = weights.vec();
  for (const at::TensorList& list : {scales, shifts})
    parameters.insert(parameters.end(), list.begin(), list.end());
  return ReversibleChainFunction::apply(input, at::TensorList(parameters), &tensors, &options, &record);
}

std::tuple<std::vector<int64_t>, std::vector<int64_t>> plan(const at::Tensor& samples, at::TensorList weights,
                                                            at::TensorList scales, at::TensorList shifts,
                                                            double eps, double slope,
                                                            c10::string_view activation, double limit) {
  const at::NoGradGuard no_grad;
  const NoAutocast no_autocast;
  ChainOptions options;
  options.activation = parse(activation);
  options.slope = slope;
  options.eps = eps;
  const ChainTensors tensors = make_tensors(weights, scales, shifts, {}, {});
  ops::check_chain(samples, tensors, options);
  ops::plan_chain(samples, tensors, options, limit);
  return {options.anchors, options.residues};
}

}  // namespace

TORCH_LIBRARY_IMPL(remnant, CompositeImplicitAutograd, m) {
  m.impl("reversible_chain", TORCH_FN(chain));
  m.impl("reversible_chain_plan", TORCH_FN(plan));
}

}  // namespace remnant::autograd
