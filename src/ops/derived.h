#pragma once

#include "ops/codes.h"

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

/// Tensors that need not be kept because something that is kept gives them back: a convolution unit's output,
/// from the sum before its activation or from codes.
namespace remnant::ops {

/// y = activation(sum); the sum is `value`, or decoded and then times `factor` plus `offset`, wide
/// [channels], where those are defined.
struct Derived {
  at::Tensor value;  ///< of y's shape and strides; undefined: codes
  Codes codes;       ///< in y's memory order
  at::Tensor factor, offset;
  int64_t bits = 0;
  bool kinked = false;
  double slope = 1;  ///< y = sum where sum > 0, else slope sum
  bool silu = false;
};

/// Notes what gives y back. Everything is held weakly: it ends with y's storage, with a change of y in place,
/// and with the last graph that keeps `from`.
void note_derived(const at::Tensor& y, const Derived& from);
/// What gives x back, if a living graph keeps it.
std::optional<Derived> find_derived(const at::Tensor& x);

}  // namespace remnant::ops
