#pragma once

#include "ops/codes.h"
#include "ops/derived.h"

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

/// The elementwise passes around a convolution, over dense tensors [N, C, ...], contiguous or channels-last.
/// Parameters are wide [sets, C], one set for all samples or one a sample. Any device; CPU takes the fused
/// kernels.
namespace remnant::ops {

/// x itself where it is dense in one of the two orders, else a contiguous copy.
at::Tensor dense(const at::Tensor& x);
/// A contiguous view of a dense tensor, in its memory's order.
at::Tensor in_memory_order(const at::Tensor& x);
/// x in the order of `like`, copied where it must be.
at::Tensor in_order_of(const at::Tensor& x, const at::Tensor& like);

/// What a unit writes in its forward besides y, and reads in its backward.
struct UnitKept {
  at::Tensor value;         ///< the sum s, or the output from which it comes back by inverse_slope
  at::Tensor normal_value;  ///< u itself, made again
  Codes normal, sum;        ///< codes of u and of s; each may be undefined
  bool normal_kinked = false;
  int64_t bits = 0;
  at::Tensor factor, offset;  ///< wide [C]: s = u factor + offset (+ residual); undefined: s = u
  at::Tensor residual;        ///< with `value`: u = s - residual
  double slope = 1, inverse_slope = 1, residual_slope = 1;
};

/// Sums over a set's elements of x - pivot and of its square: double [2, sets, C].
at::Tensor unit_moments(const at::Tensor& x, const at::Tensor& pivot);

/// u = x scale + shift, s = u factor + offset + residual, y = s where s > 0 else slope s. `scale` and `shift`
/// may be undefined. y is written into x's storage unless `keep_sum`, when s is. Encodes u and s where seeds
/// are given. Returns y.
at::Tensor unit_forward(at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift,
                        const at::Tensor& residual, UnitKept& kept, bool keep_sum,
                        const at::Tensor& normal_seed, const at::Tensor& sum_seed);

/// Sums over a set's elements of g and of g u, where g = grad times the slope at s: double [2, sets, C].
at::Tensor unit_reduce(const at::Tensor& grad, const UnitKept& kept, int64_t sets);

/// {g of_grad + u of_u + constant, g}; each where wanted.
std::tuple<at::Tensor, at::Tensor> unit_backward(const at::Tensor& grad, const UnitKept& kept,
                                                 const at::Tensor& of_grad, const at::Tensor& of_u,
                                                 const at::Tensor& constant, bool want_x, bool want_residual);

/// The convolution that `from` is based on, of `source`.
at::Tensor convolve(const Derived& from, const at::Tensor& source);
/// What follows it: `from`'s norm, residual and activation, in z's memory.
at::Tensor finish(const Derived& from, at::Tensor z);
/// The tensor that `from` stands for.
at::Tensor rebuild(const Derived& from);

}  // namespace remnant::ops
