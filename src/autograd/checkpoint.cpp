#include <remnant/checkpoint.h>

#include "autograd/replay.h"

#include <ATen/SequenceNumber.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <bit>
#include <memory>
#include <unordered_set>

namespace remnant::detail {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// The graph takes no undefined tensors: which of a list are defined, these alone, and the list from them.
std::vector<bool> which_defined(const variable_list& list) {
  std::vector<bool> defined;
  for (const at::Tensor& each : list) defined.push_back(each.defined());
  return defined;
}

variable_list only_defined(variable_list list) {
  std::erase_if(list, [](const at::Tensor& each) { return !each.defined(); });
  return list;
}

variable_list with_undefined(const variable_list& given, const std::vector<bool>& defined) {
  variable_list list;
  size_t next = 0;
  for (const bool each : defined) list.push_back(each ? given[next++] : at::Tensor());
  return list;
}

/// What travels in the graph beside tensors.
struct Closure {
  CheckpointFunction run;
  std::vector<bool> inputs, outputs;  // which are defined
  std::vector<at::Generator> generators;
  std::vector<AutocastOf> autocast;
  // When the forward ran: a thread numbers the nodes that it makes.
  uint64_t thread = 0, first_node = 0;
};

/// Refuses a graph that leads to what was computed before the forward: a gradient would pass there now, and
/// again when the graph around this one gets there.
void check_captured(const variable_list& roots, const Closure& closure) {
  std::vector<torch::autograd::Node*> open;
  std::unordered_set<torch::autograd::Node*> seen;
  const auto visit = [&](torch::autograd::Node* node) {
    if (node != nullptr && seen.insert(node).second) open.push_back(node);
  };
  for (const at::Tensor& root : roots) visit(root.grad_fn().get());
  while (!open.empty()) {
    const torch::autograd::Node& node = *open.back();
    open.pop_back();
    TORCH_CHECK(
        node.thread_id() != closure.thread || node.sequence_nr() >= closure.first_node,
        "checkpoint: the function captures a tensor that was computed from what needs a gradient (by ",
        node.name(), "), expected parameters or tensors without one; pass it to checkpoint as an argument");
    for (const torch::autograd::Edge& edge : node.next_edges()) visit(edge.function.get());
  }
}

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
    closure->thread = at::RecordFunction::currentThreadId();
    closure->first_node = at::sequence_number::peek();
    variable_list outputs = closure->run(with_undefined(inputs, closure->inputs));
    closure->outputs = which_defined(outputs);
    outputs = only_defined(std::move(outputs));
    // The graph makes an output its own. One that somebody else holds, an argument or a captured tensor, has
    // to stay what it is: a view of it takes its place, since autograd refuses to change such a view in
    // place.
    for (at::Tensor& output : outputs) {
      if (output.use_count() > 1) output = output.alias();
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
      outputs = closure.run(with_undefined(inputs, closure.inputs));
    }
    TORCH_CHECK(which_defined(outputs) == closure.outputs, "checkpoint: the function returned ",
                closure.outputs.size(), " tensors in the forward, ", grads.size(), " of them defined, and ",
                outputs.size(), " when run again, defined or undefined; expected the same");
    outputs = only_defined(std::move(outputs));
    variable_list roots, root_grads;
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (!grads[i].defined() || !outputs[i].requires_grad()) continue;
      roots.push_back(outputs[i]);
      root_grads.push_back(grads[i]);
    }
    variable_list result(count + 2);  // none for the anchor and the closure
    if (roots.empty()) return result;
    check_captured(roots, closure);
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
  auto closure = std::make_shared<Closure>();
  closure->run = std::move(function);
  closure->inputs = which_defined(inputs);
  const variable_list given = only_defined(std::move(inputs));
  Closure* const pointer = closure.get();
  const at::Tensor anchor =
      at::from_blob(pointer, {0}, [owner = std::move(closure)](void*) {}, at::kFloat).set_requires_grad(true);
  const variable_list outputs = CheckpointFunctionNode::apply(anchor, at::TensorList(given), pointer);
  return with_undefined(outputs, pointer->outputs);
}

}  // namespace remnant::detail
