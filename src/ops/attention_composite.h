#pragma once

// What the files of the composite path share.

#include "ops/attention_common.h"

#include <ATen/ops/scalar_tensor.h>

#include <limits>

namespace remnant::ops {

inline constexpr double kNothing = -std::numeric_limits<double>::infinity();

// Keys and values of grouped heads, repeated to the queries' heads (a view where nothing repeats).
inline at::Tensor repeat_heads(const at::Tensor& x, int64_t heads) {
  if (x.size(1) == heads) return x;
  return x.unsqueeze(2)
      .expand({x.size(0), x.size(1), heads / x.size(1), x.size(2), x.size(3)})
      .reshape({x.size(0), heads, x.size(2), x.size(3)});
}

inline at::Tensor sum_heads(const at::Tensor& grad, int64_t kv_heads) {
  if (grad.size(1) == kv_heads) return grad;
  return grad.unflatten(1, {kv_heads, grad.size(1) / kv_heads}).sum(2);
}

inline at::Tensor mask_rows(const at::Tensor& mask, int64_t first, int64_t rows) {
  return mask.size(2) == 1 ? mask : mask.narrow(2, first, rows);
}

// A number as a tensor: with half types, a plain Scalar would be rounded to the half type first.
inline at::Tensor precise(double x) { return at::scalar_tensor(x, at::kDouble); }

inline bool may_empty_rows(const AttentionCall& call) {
  return call.mask.has_value() || call.left >= 0 || call.right >= 0;
}

// exp(z - lse), 0 in rows that attend nothing. Without a mask no row is such: scores of -Inf throughout
// come from Inf in the inputs, and the NaN they give must reach the output.
inline at::Tensor probabilities_from(const at::Tensor& scores, const at::Tensor& lse,
                                     const AttentionCall& call) {
  const at::Tensor column = lse.unsqueeze(-1);
  if (!may_empty_rows(call)) return scores.sub(column).exp_();
  return scores.sub(column.masked_fill(column.eq(kNothing), 0)).exp_();
}

inline at::Tensor widen(const at::Tensor& x, at::ScalarType type) { return x.defined() ? x.to(type) : x; }

inline AttentionCall widen_mask(AttentionCall call, at::ScalarType type) {
  if (call.mask.has_value() && call.mask->scalar_type() != at::kBool) call.mask = call.mask->to(type);
  return call;
}

// The declared layout of gradients, heads beside each other in a row.
inline at::Tensor merged(const at::Tensor& x, at::ScalarType type) {
  return x.defined() ? x.to(type).transpose(1, 2).contiguous().transpose(1, 2) : x;
}

}  // namespace remnant::ops
