#pragma once

#include <remnant/export.h>

#include <ATen/core/Tensor.h>

/// Weights that stay invertible.
namespace remnant::nn::init {

/// A convolution's weight [O, C / groups, ...]: in each group an orthogonal matrix (orthonormal columns where
/// O is above C, rows where it is below) at the kernel's centre, and normal noise of deviation `noise`
/// everywhere. All singular values are then near 1, the smallest above 1 - 2 noise sqrt(taps max(O, C)) or
/// so. Returns weight. Throws c10::Error.
REMNANT_API at::Tensor dirac_orthogonal_(at::Tensor weight, double noise = 0.02, int64_t groups = 1);

/// How far a 2-d convolution's singular values (circular, over all frequencies) are from being equal: the
/// mean of |A^H A - r|^2 / r^2 a column (of a wide weight A A^H), r the mean of their squares; 0 for an
/// orthogonal one. Differentiable: added to a loss, it keeps the spectrum away from 0 without fixing the
/// weight's size. weight [O, C, kh, kw], floating.
REMNANT_API at::Tensor spectrum_penalty(const at::Tensor& weight);

}  // namespace remnant::nn::init
