#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

/// Matrix products of the ops: ATen's, or where that is much faster on this machine panels over oneDNN's
/// micro-kernels.
namespace remnant::ops {

/// out [m, n] = a [m, k] b [k, n] + bias [n], or out += a b.
void product_into(at::Tensor out, const at::Tensor& a, const at::Tensor& b,
                  const std::optional<at::Tensor>& bias = std::nullopt);
void product_add(at::Tensor out, const at::Tensor& a, const at::Tensor& b);
at::Tensor product(const at::Tensor& a, const at::Tensor& b,
                   const std::optional<at::Tensor>& bias = std::nullopt);

/// Whether products of this tensor's dtype and device take the panels. Measured once a process, on its
/// first product; the environment variable REMNANT_PRODUCTS=panels|aten decides without measuring.
bool uses_panels(const at::Tensor& x);

}  // namespace remnant::ops
