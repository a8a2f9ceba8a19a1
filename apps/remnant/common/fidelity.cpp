#include "common/fidelity.h"

#include "common/error.h"
#include "common/random_state.h"

#include <remnant/nn/attention.h>
#include <remnant/plan.h>
#include <remnant/policy.h>
#include <remnant/rounding.h>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

namespace remnant::app {
namespace {

using at::Tensor;
using Gradients = std::vector<Tensor>;  // a parameter without one has an undefined tensor

/// An exact policy that draws as many numbers as the layer's own, so that all dropout stays the same.
Policy exact_for(const nn::MultiheadAttentionOptions& options) {
  const PolicyKind kind = options.policy().kind;
  // Any policy draws a seed for dropout. These draw one without dropout too, and other layers' dropout comes
  // after it. With every key drawn the gradient is recompute's.
  const bool draws_anyway = kind == PolicyKind::quantized || kind == PolicyKind::sampled;
  if (draws_anyway && options.dropout() == 0) return Policy::sampled(std::numeric_limits<int32_t>::max());
  return Policy::recompute();
}

/// All layers have exact gradients while alive.
class ExactGradients {
 public:
  explicit ExactGradients(const torch::nn::Module& model) {
    for (const auto& module : model.modules()) {
      const auto layer = std::dynamic_pointer_cast<nn::MultiheadAttentionImpl>(module);
      if (!layer) continue;
      layers_.emplace_back(layer, layer->options.policy());
      layer->options.policy(exact_for(layer->options));
    }
  }
  ~ExactGradients() {
    for (const auto& [layer, policy] : layers_) layer->options.policy(policy);
  }
  ExactGradients(const ExactGradients&) = delete;
  ExactGradients& operator=(const ExactGradients&) = delete;

  bool any() const { return !layers_.empty(); }

 private:
  NoRounding no_rounding_;
  std::vector<std::pair<std::shared_ptr<nn::MultiheadAttentionImpl>, Policy>> layers_;
};

bool keeps_codes(torch::nn::Module& model) {
  const auto layers = get_memory(model);
  return std::any_of(layers.begin(), layers.end(), [](const auto& layer) { return layer.second.bits > 0; });
}

/// The parameters' gradients, put back at the end: the very tensors, since an optimizer may hold them.
class SetAside {
 public:
  explicit SetAside(const torch::nn::Module& model) : parameters_(model.parameters()) {
    for (Tensor& parameter : parameters_) {
      gradients_.push_back(std::exchange(parameter.mutable_grad(), Tensor()));
    }
  }
  ~SetAside() {
    for (size_t i = 0; i < parameters_.size(); ++i) parameters_[i].mutable_grad() = gradients_[i];
  }
  SetAside(const SetAside&) = delete;
  SetAside& operator=(const SetAside&) = delete;

  const Gradients& gradients() const { return gradients_; }

  /// The gradient of one pass alone.
  Gradients of(const Examples& examples) {
    examples.accumulate();
    Gradients found;
    for (Tensor& parameter : parameters_) {
      found.push_back(std::exchange(parameter.mutable_grad(), Tensor()));
    }
    return found;
  }

 private:
  std::vector<Tensor> parameters_;
  Gradients gradients_;
};

double squared_norm(const Tensor& x) {
  const double norm = at::linalg_vector_norm(x, 2, std::nullopt, false, at::kDouble).item<double>();
  return norm * norm;
}

double squared_norm(const Gradients& gradients) {
  double sum = 0;
  for (const Tensor& gradient : gradients) {
    if (gradient.defined()) sum += squared_norm(gradient);
  }
  return sum;
}

double squared_distance(const Gradients& a, const Gradients& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].defined() && b[i].defined()) {
      sum += squared_norm(a[i] - b[i]);
    } else if (a[i].defined() || b[i].defined()) {
      sum += squared_norm(a[i].defined() ? a[i] : b[i]);
    }
  }
  return sum;
}

/// Whatever is not a number is as bad as can be.
double share(double part, double whole) {
  if (part == 0 && whole == 0) return 0;
  const double result = part / whole;
  return std::isnan(result) ? std::numeric_limits<double>::infinity() : result;
}

}  // namespace

Fidelity check_fidelity(torch::nn::Module& model, const Tensor& random_before, const Examples& all,
                        const std::optional<std::array<Examples, 2>>& halves) {
  const KeepRandomState keep;
  SetAside passes(model);
  const Tensor random_after = random_state();
  const auto same_draws = [&] {
    set_random_state(random_before);
    Gradients found = passes.of(all);
    if (at::equal(random_state(), random_after)) return found;
    throw Error(
        "the fidelity check's exact pass drew other random numbers than the step, so their dropout differs: "
        "run without the check");
  };
  std::optional<double> noise;
  if (halves.has_value() && keeps_codes(model)) {
    const RoundingSalt salt(1);
    const Gradients again = same_draws();
    const at::NoGradGuard no_grad;
    noise = squared_distance(passes.gradients(), again) / 2;
  }

  const ExactGradients policies(model);
  if (!policies.any()) {
    throw Error("the fidelity check found no attention layer in the model, so there is nothing to compare");
  }
  Gradients exact = same_draws();

  const at::NoGradGuard no_grad;
  Fidelity fidelity;
  const double error = squared_distance(passes.gradients(), exact);
  fidelity.gradient_error = std::sqrt(share(error, squared_norm(exact)));
  exact.clear();  // the halves need the memory
  if (halves.has_value()) {
    const auto gradient_of = [&](const Examples& half) {
      const at::AutoGradMode with_grad(true);
      return passes.of(half);
    };
    const auto& [first, second] = *halves;
    const Gradients a = gradient_of(first), b = gradient_of(second);
    const double part = first.weight / (first.weight + second.weight);
    fidelity.added_variance = share(noise.value_or(error), part * (1 - part) * squared_distance(a, b));
  }
  return fidelity;
}

}  // namespace remnant::app
