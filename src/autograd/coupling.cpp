#include "autograd/coupling.h"

#include "autograd/replay.h"
#include "ops/conv_inverse.h"

#include <ATen/SequenceNumber.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros_like.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <unordered_set>

namespace remnant::detail {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A block multiplies by at most e, and divides by as much on the way back.
constexpr double kLargestLog = 1.0;

at::Tensor log_scale(const at::Tensor& s) { return at::tanh(s / kLargestLog) * kLargestLog; }

std::array<at::Tensor, 2> halves_of(const at::Tensor& x) {
  const int64_t each = x.size(1) / 2;
  return {x.narrow(1, 0, each), x.narrow(1, each, each)};
}

void check_half(const at::Tensor& made, const at::Tensor& other, bool affine) {
  TORCH_CHECK(made.dim() == other.dim() && made.size(0) == other.size(0) &&
                  made.size(1) == (affine ? 2 : 1) * other.size(1),
              "coupling: a half of shape ", other.sizes(), " needs ", affine ? "twice as many" : "as many",
              " channels from its function, got ", made.sizes());
}

at::Tensor combine(const at::Tensor& x, const at::Tensor& made, bool affine) {
  if (!affine) return x + made;
  const auto [s, t] = halves_of(made);
  return x * at::exp(log_scale(s)) + t;
}

at::Tensor separate(const at::Tensor& y, const at::Tensor& made, bool affine) {
  if (!affine) return y - made;
  const auto [s, t] = halves_of(made);
  return (y - t) * at::exp(-log_scale(s));
}

// How halves are added up. A function in half precision hangs on the last bit of what it gets: walked back in
// float32, rounding errors grow to half's own within a few blocks. So where half precision is at work, sums
// are float64 and everything that is added a whole multiple of one step: such sums are exact, and functions
// see in the backward, to the bit, what they saw in the forward.
class Arithmetic {
 public:
  explicit Arithmetic(const at::Tensor& input)
      : type(input.scalar_type()),
        exact(type == at::kHalf || type == at::kBFloat16 ||
              (type == at::kFloat && at::autocast::is_autocast_enabled(input.device().type()))),
        format_(input.suggest_memory_format()) {
    if (!exact) return;
    const double rms = input.detach().to(at::kDouble).norm().item<double>() /
                       std::sqrt(static_cast<double>(std::max<int64_t>(1, input.numel())));
    // As fine as float32 is for the input; beside an input of zeros, for numbers of about 1e-5.
    if (std::isfinite(rms)) step_ = std::exp2((rms > 0 ? std::floor(std::log2(rms)) : -16) - 24);
  }

  // The input as it is walked.
  at::Tensor of_input(const at::Tensor& input) const { return exact ? whole(input.to(at::kDouble)) : input; }
  // What a function gets: in one order in memory, which may decide how it rounds.
  at::Tensor argument(const at::Tensor& half) const {
    return exact ? half.to(type).contiguous(format_) : half;
  }
  // What a function made, as it is added.
  at::Tensor of_function(const at::Tensor& made, bool affine) const {
    if (!exact) return made;
    return affine ? made.to(at::kDouble) : whole(made.to(at::kDouble));
  }
  // For gradients, which need no exact sums.
  at::Tensor rounded(const at::Tensor& x) const { return exact ? x.to(at::kFloat) : x; }

  // What float32 loses of the sums: whole steps, of which a byte holds enough unless sums are some 100 times
  // as large as the input, or affine.
  at::Tensor rest(const at::Tensor& walked) const {
    if (!exact) return {};
    const at::Tensor lost = walked - walked.to(at::kFloat);
    const at::Tensor steps = (lost / step_).to(at::kChar);
    return steps.to(at::kDouble).mul_(step_).equal(lost) ? steps : lost.to(at::kFloat);
  }
  at::Tensor joined(const at::Tensor& output, const at::Tensor& rest) const {
    if (!exact) return output;
    const at::Tensor lost = rest.to(at::kDouble);
    return (rest.scalar_type() == at::kChar ? lost * step_ : lost).add_(output);
  }

  at::ScalarType type;  // the input's
  bool exact;

 private:
  // The gradient is the identity's.
  at::Tensor whole(const at::Tensor& x) const {
    const at::Tensor numbers = x.detach();
    return x + (numbers / step_).round_().mul_(step_).sub_(numbers);
  }

  at::MemoryFormat format_;
  double step_ = 1;
};

// What travels in the graph beside tensors.
struct Blocks {
  Blocks(std::vector<CouplingHalf> halves_in, const at::Tensor& input)
      : halves(std::move(halves_in)), arithmetic(input), result(arithmetic.type) {}
  std::vector<CouplingHalf> halves;
  Arithmetic arithmetic;
  at::ScalarType result;  // what torch's own sums would be
  std::vector<at::Generator> generators;
  std::vector<AutocastOf> autocast;
  std::vector<bool> draws;  // of each half: whether it changed a random state
};

// The blocks one after the other, as they are walked. `states`, unless null, receives the random states of
// halves that draw.
at::Tensor walk(const at::Tensor& input, Blocks& blocks, variable_list* states) {
  auto [a, b] = halves_of(blocks.arithmetic.of_input(input));
  for (const CouplingHalf& half : blocks.halves) {
    variable_list before;
    for (at::Generator& each : blocks.generators) before.push_back(state_of(each));
    const at::Tensor made = half.run(blocks.arithmetic.argument(b));
    check_half(made, a, half.affine);
    blocks.result = c10::promoteTypes(blocks.result, made.scalar_type());
    if (states != nullptr) {
      bool draws = false;
      for (size_t i = 0; i < before.size(); ++i) {
        draws = draws || !before[i].equal(state_of(blocks.generators[i]));
      }
      blocks.draws.push_back(draws);
      if (draws) states->insert(states->end(), before.begin(), before.end());
    }
    // The next half changes the other one.
    at::Tensor changed = combine(a, blocks.arithmetic.of_function(made, half.affine), half.affine);
    a = std::exchange(b, std::move(changed));
  }
  if (blocks.halves.size() % 2 != 0) std::swap(a, b);
  return at::cat({a, b}, 1);
}

// A half's buffers (running statistics) as they are now, back in place at the end of the scope.
class Buffers {
 public:
  explicit Buffers(std::vector<at::Tensor> buffers) : buffers_(std::move(buffers)) {
    for (const at::Tensor& each : buffers_) before_.push_back(each.detach().clone());
  }
  ~Buffers() {
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < before_.size(); ++i) buffers_[i].copy_(before_[i]);
  }
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;

 private:
  std::vector<at::Tensor> buffers_, before_;
};

at::Tensor sums(const at::Tensor& x, const Arithmetic& arithmetic) {
  const at::Tensor rows = x.reshape({x.size(0), -1});
  return arithmetic.rounded(at::mm(rows, ops::probe_signs(rows.size(1), rows.options())));
}

// Hooks of leaves put aside until the end of the scope: autograd runs them where it adds to the gradient.
class HooksAside {
 public:
  explicit HooksAside(const variable_list& leaves) {
    for (const at::Tensor& each : leaves) {
      auto* meta = torch::autograd::impl::get_autograd_meta(each);
      if (meta == nullptr || !each.is_leaf()) continue;
      hooks_.emplace_back(meta, std::move(meta->hooks_));
      meta->hooks_.clear();
    }
  }
  ~HooksAside() {
    for (auto& [meta, hooks] : hooks_) meta->hooks_ = std::move(hooks);
  }
  HooksAside(const HooksAside&) = delete;
  HooksAside& operator=(const HooksAside&) = delete;

 private:
  using Hooks = decltype(torch::autograd::AutogradMeta::hooks_);
  std::vector<std::pair<torch::autograd::AutogradMeta*, Hooks>> hooks_;
};

// The leaves of the graph of what a function made, since this thread's sequence number was `since`. Throws
// where that graph reaches beyond the function.
variable_list leaves_of(const at::Tensor& made, uint64_t since) {
  variable_list found;
  std::unordered_set<torch::autograd::Node*> seen;
  std::vector<torch::autograd::Node*> left;
  const auto visit = [&](const torch::autograd::Edge& edge) {
    if (edge.function != nullptr && seen.insert(edge.function.get()).second) {
      left.push_back(edge.function.get());
    }
  };
  const torch::autograd::Edge root =
      made.requires_grad() ? torch::autograd::impl::gradient_edge(made) : torch::autograd::Edge();
  visit(root);
  while (!left.empty()) {
    torch::autograd::Node* const node = left.back();
    left.pop_back();
    if (const auto* leaf = dynamic_cast<torch::autograd::AccumulateGrad*>(node)) {
      found.push_back(leaf->variable);
      continue;
    }
    TORCH_CHECK(
        node->sequence_nr() >= since && node->thread_id() == at::RecordFunction::currentThreadId(),
        "coupling: a function uses a tensor that was computed outside of it and needs a gradient (by ",
        node->name(), "), which blocks do not pass on; compute it inside of the function, or detach it");
    for (const torch::autograd::Edge& edge : node->next_edges()) visit(edge);
  }
  return found;
}

struct CoupleFunction : torch::autograd::Function<CoupleFunction> {
  // The first variable owns the blocks as long as the graph holds it.
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& owner, const at::Tensor& input,
                            at::TensorList parameters, Blocks* blocks) {
    for (const at::Device& device : devices_of({input})) {
      blocks->generators.push_back(at::globalContext().defaultGenerator(device));
      blocks->autocast.push_back(AutocastOf::now(device.type()));
    }
    variable_list states;
    const Arithmetic& arithmetic = blocks->arithmetic;
    const at::Tensor walked = walk(input, *blocks, &states);
    const at::Tensor output = arithmetic.rounded(walked);
    variable_list saved{output, sums(arithmetic.of_input(input), arithmetic), arithmetic.rest(walked)};
    for (const at::Tensor& each : parameters) saved.push_back(each);
    saved.insert(saved.end(), states.begin(), states.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["policy"] = "coupling";
    ctx->saved_data["parameters"] = static_cast<int64_t>(parameters.size());
    ctx->saved_data["blocks"] = std::bit_cast<int64_t>(blocks);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK(
        !at::GradMode::is_enabled(),
        "coupling has no gradient of its gradient; call the blocks' functions themselves where you need one");
    auto& blocks = *std::bit_cast<Blocks*>(ctx->saved_data["blocks"].toInt());
    const variable_list saved = ctx->get_saved_variables();
    const auto count = static_cast<size_t>(ctx->saved_data["parameters"].toInt());
    variable_list result(2 + count + 1);
    size_t next_parameter = count, next_state = saved.size();
    const Arithmetic& arithmetic = blocks.arithmetic;
    const AutocastState no_autocast(AutocastState::off(blocks.autocast));
    auto [a, b] = halves_of(arithmetic.joined(saved[0].detach(), saved[2]));
    auto [grad_a, grad_b] = halves_of(grads[0]);
    if (blocks.halves.size() % 2 != 0) {
      std::swap(a, b);
      std::swap(grad_a, grad_b);
    }
    for (size_t k = blocks.halves.size(); k-- > 0;) {
      const CouplingHalf& half = blocks.halves[k];
      const Buffers buffers(half.buffers());
      variable_list wanted{arithmetic.argument(a).detach().set_requires_grad(true), at::Tensor()};
      at::Tensor made;
      const uint64_t start = at::sequence_number::peek();
      {
        const at::AutoGradMode grad_mode(true);
        const AutocastState autocast(blocks.autocast);
        if (blocks.draws[k]) {
          next_state -= blocks.generators.size();
          const RandomState random(
              blocks.generators,
              {saved.begin() + static_cast<int64_t>(next_state),
               saved.begin() + static_cast<int64_t>(next_state + blocks.generators.size())});
          made = half.run(wanted[0]);
        } else {
          made = half.run(wanted[0]);
        }
      }
      // The half that was changed, as it was before.
      const at::Tensor before = separate(b, arithmetic.of_function(made.detach(), half.affine), half.affine);
      wanted[1] = arithmetic.rounded(before).detach().set_requires_grad(true);
      const variable_list own = half.parameters();
      variable_list roots = wanted;
      for (const at::Tensor& each : own) {
        if (each.requires_grad()) roots.push_back(each);
      }
      const variable_list leaves = leaves_of(made, start);
      variable_list captured;
      for (const at::Tensor& leaf : leaves) {
        const bool known = std::any_of(roots.begin(), roots.end(),
                                       [&](const at::Tensor& each) { return each.is_same(leaf); });
        if (!known) captured.push_back(leaf);
      }
      roots.insert(roots.end(), captured.begin(), captured.end());
      at::Tensor combined;
      {
        const at::AutoGradMode grad_mode(true);
        combined = combine(wanted[1], arithmetic.rounded(made), half.affine);
      }
      made.reset();
      variable_list found;
      {
        const HooksAside aside(leaves);
        found = torch::autograd::grad({combined}, roots, {grad_b}, std::nullopt, false, true);
      }
      next_parameter -= own.size();
      size_t place = 2;
      for (size_t i = 0; i < own.size(); ++i) {
        if (own[i].requires_grad()) result[2 + next_parameter + i] = found[place++];
      }
      for (const at::Tensor& leaf : captured) {
        // Undefined: what nested blocks and checkpoints hold on to.
        if (found[place].defined()) torch::autograd::backward({leaf}, {found[place]});
        ++place;
      }
      const at::Tensor sum = found[0].defined() ? grad_a + found[0] : grad_a;
      b = a;
      a = before;
      grad_b = sum;
      grad_a = found[1];
    }
    const at::Tensor rebuilt = at::cat({a, b}, 1);
    ops::count(ops::Inversion::rebuilt);
    const double error = ops::probe_error(sums(rebuilt, arithmetic), saved[1]);
    const double limit = ops::largest_error(saved[1].scalar_type());
    if (!std::isnan(error) && error > limit) {
      ops::count(ops::Inversion::failed);
      TORCH_CHECK(
          false, "coupling: the input that the blocks gave back is off by ", error,
          " of its size, expected at most ", limit,
          ": a function depends on something that changed after the forward, or there are too many affine "
          "blocks; make the functions repeat themselves, or split the sequence");
    }
    result[1] = at::cat({grad_a, grad_b}, 1).to(arithmetic.type);
    return result;
  }
};

}  // namespace

at::Tensor couple(const at::Tensor& input, const std::vector<CouplingHalf>& halves) {
  TORCH_CHECK(input.dim() >= 2 && input.size(1) % 2 == 0,
              "coupling: input must have an even number of channels in dimension 1, got ", input.sizes());
  auto blocks = std::make_shared<Blocks>(halves, input);
  variable_list parameters;
  for (const CouplingHalf& half : halves) {
    const variable_list own = half.parameters();
    parameters.insert(parameters.end(), own.begin(), own.end());
  }
  const bool needs =
      input.requires_grad() || std::any_of(parameters.begin(), parameters.end(),
                                           [](const at::Tensor& x) { return x.requires_grad(); });
  // Without a node of its own what functions captured still gets its gradient, from autograd.
  if (!at::GradMode::is_enabled() || !needs) {
    const at::Tensor output = walk(input, *blocks, nullptr);
    return output.to(blocks->result);
  }
  Blocks* const pointer = blocks.get();
  const at::Tensor owner =
      at::from_blob(pointer, {0}, [blocks](void*) {}, at::kFloat).set_requires_grad(true);
  const at::Tensor output = CoupleFunction::apply(owner, input, at::TensorList(parameters), pointer);
  return output.to(blocks->result);
}

}  // namespace remnant::detail
