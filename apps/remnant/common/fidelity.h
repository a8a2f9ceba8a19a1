#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <functional>
#include <optional>

namespace torch::nn {
class Module;
}

namespace remnant::app {

/// How far a step's gradient, all parameters taken together, is from the exact one.
struct Fidelity {
  double gradient_error = 0;  ///< |g - g_exact| / |g_exact|
  /// |g - g_exact|^2 over the variance that the choice of the minibatch gives g_exact: for an unbiased policy
  /// the variance it adds, for a biased one its squared bias on this batch. Where layers keep codes
  /// |g - g'|^2 / 2 in its place, g' from a pass that rounds by other draws. Empty without halves.
  std::optional<double> added_variance;
};

/// Examples as a pass of training sees them.
struct Examples {
  double weight = 0;                 ///< terms in their loss, which is a mean over them
  std::function<void()> accumulate;  ///< forward and backward: adds the loss's gradient to the parameters'
};

/// Compares the gradient that a step left in `model`'s parameters with the one of a further pass over the
/// same examples whose attention has exact gradients and whose layers keep no codes. That pass starts from
/// `random_before`, the state that the step's own started from, and so sees the same dropout. `halves` split
/// the examples in two; from their exact gradients a and b with shares s and 1 - s of the weight, the
/// variance of the whole is taken to be s (1 - s) |a - b|^2.
///
/// Leaves parameters, gradients, policies and the random state as they were. Throws Error when the exact
/// pass did not draw the step's random numbers, or when no layer of `model` is a nn::MultiheadAttention.
Fidelity check_fidelity(torch::nn::Module& model, const at::Tensor& random_before, const Examples& all,
                        const std::optional<std::array<Examples, 2>>& halves);

}  // namespace remnant::app
