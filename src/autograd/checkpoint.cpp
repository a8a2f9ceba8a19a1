#include <remnant/checkpoint.h>

#include "autograd/replay.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <bit>
#include <memory>

namespace remnant::detail {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

/// What travels in the graph beside tensors.
struct Closure {
  explicit Closure(CheckpointFunction run_in) : run(std::move(run_in)) {}
  CheckpointFunction run;
  std::vector<at::Generator> generators;
  std::vector<AutocastOf> autocast;
  std::vector<bool> defined;  // which inputs are; the graph takes no others

  variable_list all_inputs(const variable_list& given) const {
    variable_list all;
    size_t next = 0;
    for (const bool each : defined) all.push_back(each ? given[next++] : at::Tensor());
    return all;
  }
};

struct CheckpointFunctionNode : torch::autograd::Function<CheckpointFunctionNode> {
  // The first variable makes the outputs need a gradient, for what the function captures, and owns the
  // closure as long as the graph holds it.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& anchor, at::TensorList arguments,
                               Closure* closure) {
    const variable_list inputs = arguments.vec();
    for (const at::Device& device : devices_of(inputs)) {
      closure->generators.push_back(at::globalContext().defaultGenerator(device));
      closure->autocast.push_back(AutocastOf::now(device.type()));
    }
    variable_list saved = inputs;
    for (at::Generator& generator : closure->generators) saved.push_back(state_of(generator));
    variable_list outputs = closure->run(closure->all_inputs(inputs));
    // An input handed through would be its own output in the graph.
    for (at::Tensor& output : outputs) {
      const bool is_input = std::any_of(inputs.begin(), inputs.end(),
                                        [&](const at::Tensor& input) { return input.is_same(output); });
      if (is_input) output = output.alias();
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["inputs"] = static_cast<int64_t>(inputs.size());
    ctx->saved_data["closure"] = std::bit_cast<int64_t>(closure);
    ctx->set_materialize_grads(false);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "checkpoint has no gradient of its gradient; run the function without it where you need one");
    const variable_list saved = ctx->get_saved_variables();
    const auto count = static_cast<size_t>(ctx->saved_data["inputs"].toInt());
    auto& closure = *std::bit_cast<Closure*>(ctx->saved_data["closure"].toInt());
    variable_list inputs;
    for (size_t i = 0; i < count; ++i) {
      inputs.push_back(saved[i].detach().set_requires_grad(saved[i].requires_grad()));
    }
    variable_list outputs;
    {
      const at::AutoGradMode grad_mode(true);
      const RandomState random(closure.generators, variable_list(saved.begin() + count, saved.end()));
      const AutocastState autocast(closure.autocast);
      outputs = closure.run(closure.all_inputs(inputs));
    }
    TORCH_CHECK(outputs.size() == grads.size(), "checkpoint: the function returned ", grads.size(),
                " tensors in the forward and ", outputs.size(), " when run again; expected the same");
    variable_list roots, root_grads;
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (!grads[i].defined() || !outputs[i].requires_grad()) continue;
      roots.push_back(outputs[i]);
      root_grads.push_back(grads[i]);
    }
    variable_list result(count + 2);  // none for the anchor and the closure
    if (roots.empty()) return result;
    torch::autograd::backward(roots, root_grads);
    for (size_t i = 0; i < count; ++i) {
      if (inputs[i].requires_grad()) result[i + 1] = inputs[i].grad();
    }
    return result;
  }
};

}  // namespace

std::vector<at::Tensor> checkpoint(CheckpointFunction function, std::vector<at::Tensor> inputs) {
  if (!at::GradMode::is_enabled()) return function(inputs);
  auto closure = std::make_shared<Closure>(std::move(function));
  variable_list given;
  for (at::Tensor& input : inputs) {
    closure->defined.push_back(input.defined());
    if (input.defined()) given.push_back(std::move(input));
  }
  Closure* const pointer = closure.get();
  const at::Tensor anchor =
      at::from_blob(pointer, {0}, [owner = std::move(closure)](void*) {}, at::kFloat).set_requires_grad(true);
  return CheckpointFunctionNode::apply(anchor, at::TensorList(given), pointer);
}

}  // namespace remnant::detail
