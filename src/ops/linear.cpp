#include <remnant/ops/linear.h>

#include "kernels/cpu/step_kernels.h"
#include "ops/attention_common.h"
#include "ops/codes.h"
#include "ops/product.h"
#include "ops/step_common.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <utility>
#include <vector>

namespace remnant {

namespace ops {

namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

void check(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias) {
  check_floating("linear", "input", input);
  check_floating("linear", "weight", weight);
  TORCH_CHECK(weight.dim() == 2, "linear: weight must be [N, K], got ", weight.sym_sizes());
  TORCH_CHECK(input.dim() >= 1 && input.sym_size(-1) == weight.sym_size(1),
              "linear: input's last dimension must be weight's K = ", weight.sym_size(1), ", got ",
              input.sym_sizes());
  TORCH_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0)),
              "linear: bias must be [", weight.sym_size(0), "], one an output, got ", bias->sym_sizes());
  TORCH_CHECK(!bias.has_value() || bias->scalar_type() == weight.scalar_type(),
              "linear: bias must have weight's dtype ", toString(weight.scalar_type()), ", got ",
              toString(bias->scalar_type()));
}

at::Tensor coded_forward(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                         int64_t bits, const std::optional<at::Generator>& generator) {
  check(input, weight, bias);
  const at::Tensor x = input.to(weight.scalar_type());
  if (!uses_panels(x) || x.numel() == 0) return at::linear(x, weight, bias);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(0);
  return product(as_rows(x), weight.t(), bias).view(shape);
}

at::Tensor coded_forward_meta(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                              int64_t bits, const std::optional<at::Generator>& generator) {
  check(input, weight, bias);
  std::vector<c10::SymInt> shape = input.sym_sizes().vec();
  shape.back() = weight.sym_size(0);
  return at::empty_symint(shape, weight.options());
}

// Rows that make about 4 MB, a multiple of a group's elements whatever K is.
constexpr int64_t kChunkElements = int64_t{1} << 20;

Gradients coded_backward(const at::Tensor& grad_output, const OptionalTensor& codes,
                         const OptionalTensor& table, const OptionalTensor& weight, int64_t columns,
                         int64_t bits, std::array<bool, 3> needs) {
  const auto type = grad_output.scalar_type();
  const int64_t outputs = grad_output.size(-1);
  const at::Tensor g = as_rows(grad_output);
  const int64_t rows = g.size(0);
  const auto none = [&] { return at::empty({0}, g.options()); };
  at::Tensor grad_input = none(), grad_weight = none(), grad_bias = none();
  if (needs[0]) {
    std::vector<int64_t> shape = grad_output.sizes().vec();
    shape.back() = columns;
    grad_input = product(g, *weight).view(shape);
  }
  if (needs[1] && bits == 0) {
    TORCH_CHECK(codes.has_value() && codes->numel() == rows * columns,
                "linear_coded_backward: without bits the input itself must be there, ", rows, " rows of ",
                columns, " columns");
    grad_weight = product(g.t(), codes->reshape({rows, columns}));
  } else if (needs[1]) {
    TORCH_CHECK(
        codes.has_value() && table.has_value() && codes->numel() == kernels::code_bytes(rows * columns, bits),
        "linear_coded_backward: codes must hold ", rows, " rows of ", columns, " columns at ", bits, " bits");
    const int64_t chunk =
        std::max<int64_t>(kernels::kCodeGroup, kChunkElements / std::max<int64_t>(1, columns) /
                                                   kernels::kCodeGroup * kernels::kCodeGroup);
    if (rows <= chunk) {
      at::Tensor x = at::empty({rows, columns}, g.options());
      decode_into({*codes, *table}, bits, rows * columns, 0, x);
      grad_weight = product(g.t(), x);
    } else {
      // Half types: each chunk's product is rounded, their sum is not.
      grad_weight = at::zeros({outputs, columns}, g.options().dtype(accumulation_type(type)));
      const at::Tensor buffer = at::empty({chunk, columns}, g.options());
      for (int64_t first = 0; first < rows; first += chunk) {
        const int64_t count = std::min(chunk, rows - first);
        at::Tensor x = buffer.narrow(0, 0, count);
        decode_into({*codes, *table}, bits, rows * columns, first * columns, x);
        const at::Tensor part = g.narrow(0, first, count).t();
        if (type == grad_weight.scalar_type()) {
          product_add(grad_weight, part, x);
        } else {
          grad_weight.add_(at::mm(part, x));
        }
      }
      grad_weight = grad_weight.to(type);
    }
  }
  if (needs[2]) grad_bias = g.sum(0);
  return {grad_input, grad_weight, grad_bias};
}

Gradients coded_backward_meta(const at::Tensor& grad_output, const OptionalTensor& codes,
                              const OptionalTensor& table, const OptionalTensor& weight, c10::SymInt columns,
                              int64_t bits, std::array<bool, 3> needs) {
  const auto options = grad_output.options();
  std::vector<c10::SymInt> shape = grad_output.sym_sizes().vec();
  const c10::SymInt outputs = shape.back();
  shape.back() = std::move(columns);
  const auto made = [&](bool wanted, c10::SymIntArrayRef size) {
    return wanted ? at::empty_symint(size, options) : at::empty({0}, options);
  };
  return {made(needs[0], shape), made(needs[1], {outputs, shape.back()}), made(needs[2], {outputs})};
}

at::Tensor linear_op(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                     c10::string_view policy, const std::optional<at::Generator>& generator) {
  check(input, weight, bias);
  const int64_t bits = parse_bits("linear", policy, "quantized", {8, 4, 2});
  if (bits == 0) {
    TORCH_CHECK(input.scalar_type() == weight.scalar_type(), "linear: input must have weight's dtype ",
                toString(weight.scalar_type()), ", got ", toString(input.scalar_type()));
    if (is_traced(input) || is_traced(weight) || !uses_panels(input)) return at::linear(input, weight, bias);
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::linear_coded", "")
                             .typed<decltype(coded_forward)>();
  return op.call(input, weight, bias, bits, generator);
}

int64_t code_bytes_op(int64_t elements, int64_t bits) {
  TORCH_CHECK(bits == 8 || bits == 4 || bits == 2, "linear_code_bytes: bits must be 8, 4 or 2, got ", bits);
  TORCH_CHECK(elements >= 0, "linear_code_bytes: elements must be at least 0, got ", elements);
  return kernels::code_bytes(elements, bits) + 4 * kernels::code_groups(elements);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(remnant, m) {
  m.impl("linear", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(linear_op));
  m.impl("linear_coded", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(coded_forward));
  m.impl("linear_coded", c10::DispatchKey::Meta, TORCH_FN(coded_forward_meta));
  m.impl("linear_coded_backward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(coded_backward));
  m.impl("linear_coded_backward", c10::DispatchKey::Meta, TORCH_FN(coded_backward_meta));
  m.impl("linear_code_bytes", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(code_bytes_op));
}

}  // namespace ops

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                  c10::string_view policy, const std::optional<at::Generator>& generator) {
  // Through the dispatcher, where autocast sees it.
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("remnant::linear", "").typed<decltype(ops::linear_op)>();
  return op.call(input, weight, bias, policy, generator);
}

int64_t linear_code_bytes(int64_t elements, int64_t bits) { return ops::code_bytes_op(elements, bits); }

}  // namespace remnant
