#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <vector>

namespace remnant::detail {

/// One half of a coupling block: what it adds to (and, affine, multiplies with) the other half.
struct CouplingHalf {
  std::function<at::Tensor(const at::Tensor&)> run;
  std::function<std::vector<at::Tensor>()> parameters, buffers;
  bool affine = false;
};

/// y1 = x1 + F(x2), y2 = x2 + G(y1) for each pair (F, G) of `halves`, over the two halves of dimension 1;
/// affine: y1 = x1 exp(s) + t with (s, t) = F(x2), s bounded. Saves the output, 4 sums a sample of the input,
/// and the random state of halves that draw; for a half input or under autocast, float32 of the output and
/// what that loses of exact sums. The backward runs each half once more; its buffers end as the forward left
/// them. Without grad mode, or where neither input nor parameters need a gradient, plain operations.
at::Tensor couple(const at::Tensor& input, const std::vector<CouplingHalf>& halves);

}  // namespace remnant::detail
