#pragma once

#include "kernels/hidden_codes.h"

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>

/// A feed-forward block's hidden layer, dropout(activation(product + bias)), on rows of a block.
namespace remnant::ops {

struct HiddenLayer {
  std::optional<at::Tensor> bias;
  at::Tensor seed;  ///< of dropout, and of its codes' rounding
  kernels::HiddenActivation activation = kernels::HiddenActivation::relu;
  double dropout = 0;
  int64_t bits = 0;  ///< of the setting: 8, 4 or 2
};

kernels::HiddenActivation parse_hidden_activation(std::string_view name);

/// hidden = x weight^T, and the bias where the functions below do not add it.
void hidden_product(at::Tensor& hidden, const at::Tensor& x, const at::Tensor& weight,
                    const HiddenLayer& layer);
/// What hidden_product gave -> the hidden layer, in place where it can be. `first`: its first row.
void hidden_forward(at::Tensor& hidden, const HiddenLayer& layer, int64_t first);
/// The same, and grad from the hidden layer's gradient to the product's.
void hidden_backward(at::Tensor& hidden, at::Tensor& grad, const HiddenLayer& layer, int64_t first);

/// Bytes of a row's codes.
int64_t hidden_code_row(const HiddenLayer& layer, int64_t columns);
/// hidden_forward that writes rows [first, first + hidden.size(0)) of codes, uint8 [rows, hidden_code_row].
void hidden_encode(at::Tensor& hidden, at::Tensor& codes, const HiddenLayer& layer, int64_t first);
/// hidden_backward from these codes: hidden's values are not read. Unbiased.
void hidden_decode(at::Tensor& hidden, at::Tensor& grad, const at::Tensor& codes, const HiddenLayer& layer,
                   int64_t first);

}  // namespace remnant::ops
