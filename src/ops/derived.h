#pragma once

#include "ops/codes.h"

#include <ATen/core/Tensor.h>
#include <c10/core/MemoryFormat.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

/// Tensors that need not be kept because something that is kept gives them back: a convolution unit's output,
/// from the sum before its activation, from codes or from the unit's input; a shortcut, from its input.
namespace remnant::ops {

/// y = activation((base scale + shift) factor + offset + residual), each where it is defined.
struct Derived {
  enum class Base : int64_t {
    value,        ///< `value`
    codes,        ///< `codes`, decoded
    convolution,  ///< of `source` with `weight`
    shortcut      ///< of `source`, see ops/shortcut.h
  };
  using Other = std::shared_ptr<const Derived>;

  std::vector<int64_t> sizes;  ///< y's
  at::MemoryFormat format = at::MemoryFormat::Contiguous;
  at::ScalarType type = at::kFloat;

  Base base = Base::value;
  at::Tensor value;  ///< of y's shape and strides
  Codes codes;       ///< in y's memory order
  int64_t bits = 0;
  bool kinked = false;
  Other source;
  at::Tensor weight, bias;
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups = 1;
  bool average = false;  ///< a shortcut's

  at::Tensor scale, shift;    ///< wide [C] or [N, C], after a convolution
  at::Tensor factor, offset;  ///< wide [C], after a convolution or codes
  Other residual;             ///< after a convolution
  double slope = 1;           ///< y = sum where sum > 0, else slope sum
  bool silu = false;

  /// Whether y comes back as it was, up to rounding: no codes anywhere.
  bool exact() const;
};

/// A Derived as a list of tensors and numbers, which autograd can save.
struct Recipe {
  std::vector<at::Tensor> tensors;
  std::vector<int64_t> settings;
};
Recipe pack(const Derived& from);
Derived unpack(const Recipe& recipe);

/// Notes what gives y back; sizes, format and type are y's. Everything is held weakly: it ends with y's
/// storage, with a change of y in place, and with the last graph that keeps what `from` needs.
void note_derived(const at::Tensor& y, Derived from);
/// What gives x back, if a living graph keeps it.
std::optional<Derived> find_derived(const at::Tensor& x);

/// Whether find_derived looks, on this thread; returns what was. Where what a graph saves may be dropped and
/// made again (PyTorch's checkpoint), both times must save alike, which does not depend on what lives.
bool look_for_derived(bool look);

/// The order in which a dense tensor lies.
at::MemoryFormat format_of(const at::Tensor& x);

}  // namespace remnant::ops
