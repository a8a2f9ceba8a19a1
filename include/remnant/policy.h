#pragma once

#include <remnant/export.h>

#include <cstdint>
#include <string>
#include <string_view>

namespace remnant {

/// What an attention op keeps of its softmax output P for the backward pass. The forward is exact
/// under every policy; only the gradient may differ.
enum class PolicyKind {
  exact,      ///< keeps P. Gradient exact; the only policy with a double backward.
  recompute,  ///< keeps one log-sum-exp a row and rebuilds P from q and k. Gradient exact.
  curve,      ///< the paper's curve: m highest, m lowest, a decay and every rank. Gradient biased.
  quantized,  ///< P in 2, 4 or 8 bits by stochastic rounding. Gradient unbiased.
  sampled,    ///< m keys for every 64 rows, drawn by their share of P and re-weighted. Gradient unbiased.
  top,        ///< the m highest keys of a row; the others share the rest evenly. Gradient biased.
};

/// A policy and its parameters; written `exact`, `recompute`, `curve:m=4`, `curve:m=4,paper_text`,
/// `quantized:bits=4`, `sampled:m=128`, `top:m=32` (programs' `--attention`, Python's `policy=`).
struct REMNANT_API Policy {
  PolicyKind kind = PolicyKind::recompute;
  /// `curve`: how many of the highest and of the lowest elements of a row are kept. `sampled`: how many
  /// keys are drawn for 64 consecutive rows. `top`: how many keys of a row are kept. >= 1.
  int64_t m = 5;
  /// `curve` only: follow the paper's text, without rescaling the middle so that a row sums to 1,
  /// and with the curve's own end point instead of the kept lowest value l_m.
  bool paper_text = false;
  /// `quantized` only: 2, 4 or 8 bits an element.
  int64_t bits = 8;

  static Policy exact();
  static Policy recompute();
  /// Throws c10::Error unless m >= 1.
  static Policy curve(int64_t m, bool paper_text = false);
  /// Throws c10::Error unless bits is 2, 4 or 8.
  static Policy quantized(int64_t bits);
  /// Throws c10::Error unless m >= 1.
  static Policy sampled(int64_t m = 128);
  /// Throws c10::Error unless m >= 1.
  static Policy top(int64_t m = 32);

  /// Reads the written form. Throws c10::Error with one sentence that names the nearest policy or
  /// parameter when `text` does not parse.
  static Policy parse(std::string_view text);
  /// The written form; parse(str()) gives the same policy.
  std::string str() const;

  bool operator==(const Policy&) const = default;
};

}  // namespace remnant
