#include "autograd/coupling.h"

#include "autograd/replay.h"
#include "ops/conv_inverse.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <bit>
#include <cmath>

namespace remnant::detail {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A block multiplies by at most e, and divides by as much on the way back.
constexpr double kLargestLog = 1.0;

// What travels in the graph beside tensors.
struct Blocks {
  std::vector<CouplingHalf> halves;
  std::vector<at::Generator> generators;
  std::vector<AutocastOf> autocast;
  std::vector<bool> draws;  // of each half: whether it changed a random state
};

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

at::Tensor sums(const at::Tensor& x) {
  const at::Tensor rows = x.reshape({x.size(0), -1});
  return at::mm(rows, ops::probe_signs(rows.size(1), rows.options()));
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
    auto [a, b] = halves_of(input);
    for (const CouplingHalf& half : blocks->halves) {
      variable_list before;
      for (at::Generator& each : blocks->generators) before.push_back(state_of(each));
      const at::Tensor made = half.run(b);
      check_half(made, a, half.affine);
      bool draws = false;
      for (size_t i = 0; i < before.size(); ++i)
        draws = draws || !before[i].equal(state_of(blocks->generators[i]));
      blocks->draws.push_back(draws);
      if (draws) states.insert(states.end(), before.begin(), before.end());
      const at::Tensor changed = combine(a, made, half.affine);
      // The next half changes the other one.
      a = b;
      b = changed;
    }
    if (blocks->halves.size() % 2 != 0) std::swap(a, b);
    const at::Tensor output = at::cat({a, b}, 1);
    variable_list saved{output, sums(input)};
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
    auto [a, b] = halves_of(saved[0].detach());
    auto [grad_a, grad_b] = halves_of(grads[0]);
    if (blocks.halves.size() % 2 != 0) {
      std::swap(a, b);
      std::swap(grad_a, grad_b);
    }
    for (size_t k = blocks.halves.size(); k-- > 0;) {
      const CouplingHalf& half = blocks.halves[k];
      const Buffers buffers(half.buffers());
      variable_list wanted{a.detach().set_requires_grad(true), at::Tensor()};
      at::Tensor made;
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
      wanted[1] = separate(b, made.detach(), half.affine).set_requires_grad(true);
      at::Tensor combined;
      {
        const at::AutoGradMode grad_mode(true);
        combined = combine(wanted[1], made, half.affine);
      }
      made.reset();
      const variable_list own = half.parameters();
      variable_list roots = wanted;
      for (const at::Tensor& each : own) {
        if (each.requires_grad()) roots.push_back(each);
      }
      const variable_list found =
          torch::autograd::grad({combined}, roots, {grad_b}, std::nullopt, false, true);
      next_parameter -= own.size();
      size_t place = 2;
      for (size_t i = 0; i < own.size(); ++i) {
        if (own[i].requires_grad()) result[2 + next_parameter + i] = found[place++];
      }
      // The half that was changed was the other's partner before.
      const at::Tensor before = wanted[1].detach();
      const at::Tensor sum = found[0].defined() ? grad_a + found[0] : grad_a;
      b = a;
      a = before;
      grad_b = sum;
      grad_a = found[1];
    }
    const at::Tensor rebuilt = at::cat({a, b}, 1);
    ops::count(ops::Inversion::rebuilt);
    const double error = ops::probe_error(sums(rebuilt), saved[1]);
    if (!std::isnan(error) && error > ops::largest_error(rebuilt.scalar_type())) {
      ops::count(ops::Inversion::failed);
      TORCH_CHECK(
          false, "coupling: the input that the blocks gave back is off by ", error,
          " of its size, expected at most ", ops::largest_error(rebuilt.scalar_type()),
          ": a function depends on something that changed after the forward, or there are too many affine "
          "blocks; make the functions repeat themselves, or split the sequence");
    }
    result[1] = at::cat({grad_a, grad_b}, 1);
    return result;
  }
};

}  // namespace

at::Tensor couple(const at::Tensor& input, const std::vector<CouplingHalf>& halves) {
  TORCH_CHECK(input.dim() >= 2 && input.size(1) % 2 == 0,
              "coupling: input must have an even number of channels in dimension 1, got ", input.sizes());
  if (!at::GradMode::is_enabled()) {
    auto [a, b] = halves_of(input);
    for (const CouplingHalf& half : halves) {
      const at::Tensor made = half.run(b);
      check_half(made, a, half.affine);
      const at::Tensor changed = combine(a, made, half.affine);
      a = b;
      b = changed;
    }
    if (halves.size() % 2 != 0) std::swap(a, b);
    return at::cat({a, b}, 1);
  }
  auto blocks = std::make_shared<Blocks>();
  blocks->halves = halves;
  variable_list parameters;
  for (const CouplingHalf& half : halves) {
    const variable_list own = half.parameters();
    parameters.insert(parameters.end(), own.begin(), own.end());
  }
  Blocks* const pointer = blocks.get();
  const at::Tensor owner =
      at::from_blob(pointer, {0}, [kept = std::move(blocks)](void*) {}, at::kFloat).set_requires_grad(true);
  return CoupleFunction::apply(owner, input, at::TensorList(parameters), pointer);
}

}  // namespace remnant::detail
