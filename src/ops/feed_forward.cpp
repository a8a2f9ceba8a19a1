#include <remnant/ops/feed_forward.h>

#include "kernels/cpu/step_kernels.h"
#include "ops/attention_common.h"
#include "ops/codes.h"
#include "ops/hidden_layer.h"
#include "ops/product.h"
#include "ops/step_common.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>

namespace remnant {

namespace ops {

namespace {

using Forward = std::tuple<at::Tensor, at::Tensor>;
using Coded = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
void check(const at::Tensor& input, const at::Tensor& weight1, const std::optional<at::Tensor>& bias1,
           const at::Tensor& weight2, const std::optional<at::Tensor>& bias2, double dropout) {
  const auto type = input.scalar_type();
  check_floating("feed_forward", "input", input);
  TORCH_CHECK(input.dim() >= 1 && weight1.dim() == 2 && weight2.dim() == 2,
              "feed_forward: input must be [..., E] and the weights [F, E] and [G, F], got ", input.dim(),
              ", ", weight1.dim(), " and ", weight2.dim(), " dimensions");
  TORCH_CHECK(input.sym_size(-1) == weight1.sym_size(1), "feed_forward: input has ", input.sym_size(-1),
              " features, weight1 ", weight1.sym_size(1), "; expected the same");
  TORCH_CHECK(weight1.sym_size(0) == weight2.sym_size(1), "feed_forward: weight1 makes ", weight1.sym_size(0),
              " hidden features, weight2 takes ", weight2.sym_size(1), "; expected the same");
  const auto check_bias = [&](const std::optional<at::Tensor>& bias, const at::Tensor& weight,
                              const char* name) {
    TORCH_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0)),
                "feed_forward: ", name, " must be [", weight.sym_size(0), "], got ", bias->sym_sizes());
    TORCH_CHECK(!bias.has_value() || bias->scalar_type() == type, "feed_forward: ", name, " must be ",
                toString(type), " as input is, got ", toString(bias->scalar_type()));
  };
  check_bias(bias1, weight1, "bias1");
  check_bias(bias2, weight2, "bias2");
  TORCH_CHECK(weight1.scalar_type() == type && weight2.scalar_type() == type,
              "feed_forward: input and weights must have one dtype, got ", toString(type), ", ",
              toString(weight1.scalar_type()), " and ", toString(weight2.scalar_type()));
  TORCH_CHECK(dropout >= 0 && dropout < 1, "feed_forward: dropout must be in [0, 1), got ", dropout);
}

// Rows whose hidden layer takes about 2 MB on a CPU: in cache, and long enough for full-speed products. A
// multiple of a group's elements, so that codes of the input come apart there.
int64_t block_rows(const at::Tensor& weight1) {
  const int64_t elements = weight1.device().is_cpu() ? int64_t{1} << 19 : int64_t{1} << 24;
  return std::clamp<int64_t>(elements / std::max<int64_t>(weight1.size(0), 1), 128, 8192) /
         kernels::kCodeGroup * kernels::kCodeGroup;
}

Forward forward(const at::Tensor& input, const at::Tensor& weight1, const std::optional<at::Tensor>& bias1,
                const at::Tensor& weight2, const std::optional<at::Tensor>& bias2,
                c10::string_view activation, double dropout, const std::optional<at::Generator>& generator) {
  check(input, weight1, bias1, weight2, bias2, dropout);
  const at::Tensor seed =
      dropout > 0 ? draw_seed(input, generator) : at::empty({0}, input.options().dtype(at::kLong));
  const HiddenLayer layer{bias1, seed, parse_hidden_activation(activation), dropout};
  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() = weight2.size(0);
  at::Tensor output = at::empty(shape, input.options());
  if (output.numel() == 0) return {output, seed};
  const at::Tensor x = as_rows(input);
  at::Tensor y = output.view({-1, weight2.size(0)});
  const int64_t rows = x.size(0), step = std::min(block_rows(weight1), rows);
  at::Tensor buffer = at::empty({step, weight1.size(0)}, x.options());
  for (int64_t first = 0; first < rows; first += step) {
    const int64_t n = std::min(step, rows - first);
    at::Tensor hidden = buffer.narrow(0, 0, n);
    hidden_product(hidden, x.narrow(0, first, n), weight1, layer);
    hidden_forward(hidden, layer, first);
    product_into(y.narrow(0, first, n), hidden, weight2.t(), bias2);
  }
  return {output, seed};
}

// The same with codes of the hidden layer beside the output.
Coded coded(const at::Tensor& input, const at::Tensor& weight1, const std::optional<at::Tensor>& bias1,
            const at::Tensor& weight2, const std::optional<at::Tensor>& bias2, c10::string_view activation,
            double dropout, int64_t bits, const std::optional<at::Generator>& generator) {
  check(input, weight1, bias1, weight2, bias2, dropout);
  const HiddenLayer layer{bias1, draw_seed(input, generator), parse_hidden_activation(activation), dropout,
                          bits};
  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() = weight2.size(0);
  at::Tensor output = at::empty(shape, input.options());
  const at::Tensor x = as_rows(input);
  const int64_t rows = x.size(0), step = std::min(block_rows(weight1), rows);
  at::Tensor codes =
      at::empty({rows, hidden_code_row(layer, weight1.size(0))}, input.options().dtype(at::kByte));
  if (output.numel() == 0) return {output, layer.seed, codes};
  at::Tensor y = output.view({-1, weight2.size(0)});
  at::Tensor buffer = at::empty({step, weight1.size(0)}, x.options());
  for (int64_t first = 0; first < rows; first += step) {
    const int64_t n = std::min(step, rows - first);
    at::Tensor hidden = buffer.narrow(0, 0, n);
    hidden_product(hidden, x.narrow(0, first, n), weight1, layer);
    hidden_encode(hidden, codes, layer, first);
    product_into(y.narrow(0, first, n), hidden, weight2.t(), bias2);
  }
  return {output, layer.seed, codes};
}

Backward backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight1,
                  const std::optional<at::Tensor>& bias1, const at::Tensor& weight2, const at::Tensor& seed,
                  c10::string_view activation, double dropout, std::array<bool, 5> needs) {
  const HiddenLayer layer{bias1, seed, parse_hidden_activation(activation), dropout};
  const auto options = input.options();
  const auto wide = options.dtype(accumulation_type(input.scalar_type()));
  const auto sum_like = [&](bool needed, at::IntArrayRef shape) {
    return needed ? at::zeros(shape, wide) : at::empty({0}, wide);
  };
  const int64_t features = weight1.size(0), in = weight1.size(1), out = weight2.size(0);
  at::Tensor grad_input = needs[0] ? at::empty(input.sizes(), options) : at::empty({0}, options);
  at::Tensor grad_weight1 = sum_like(needs[1], {features, in}), grad_bias1 = sum_like(needs[2], {features});
  at::Tensor grad_weight2 = sum_like(needs[3], {out, features}), grad_bias2 = sum_like(needs[4], {out});
  const bool through = needs[0] || needs[1] || needs[2];  // past the activation
  if (grad_output.numel() > 0) {
    const at::Tensor x = as_rows(input), g = as_rows(grad_output);
    at::Tensor dx = needs[0] ? grad_input.view({-1, in}) : grad_input;
    const int64_t rows = x.size(0), step = std::min(block_rows(weight1), rows);
    at::Tensor buffer = at::empty({through || needs[3] ? step : 0, features}, options);
    at::Tensor grad_buffer = at::empty({through ? step : 0, features}, options);
    for (int64_t first = 0; first < rows; first += step) {
      const int64_t n = std::min(step, rows - first);
      const at::Tensor g_block = g.narrow(0, first, n);
      if (needs[4]) grad_bias2.add_(g_block.sum(0, false, wide.dtype().toScalarType()));
      if (!through && !needs[3]) continue;
      const at::Tensor x_block = x.narrow(0, first, n);
      at::Tensor hidden = buffer.narrow(0, 0, n);
      hidden_product(hidden, x_block, weight1, layer);
      if (!through) {
        hidden_forward(hidden, layer, first);
        add_product(grad_weight2, g_block, hidden);
        continue;
      }
      at::Tensor grad = grad_buffer.narrow(0, 0, n);
      product_into(grad, g_block, weight2);
      hidden_backward(hidden, grad, layer, first);
      if (needs[3]) add_product(grad_weight2, g_block, hidden);
      if (needs[2]) grad_bias1.add_(grad.sum(0, false, wide.dtype().toScalarType()));
      if (needs[1]) add_product(grad_weight1, grad, x_block);
      if (needs[0]) product_into(dx.narrow(0, first, n), grad, weight1);
    }
  }
  const auto type = input.scalar_type();
  return {grad_input, grad_weight1.to(type), grad_bias1.to(type), grad_weight2.to(type), grad_bias2.to(type)};
}

Backward coded_backward(const at::Tensor& grad_output, const std::optional<at::Tensor>& input_codes,
                        const std::optional<at::Tensor>& input_table, const at::Tensor& weight1,
                        const at::Tensor& weight2, const at::Tensor& seed, const at::Tensor& codes,
                        c10::string_view activation, double dropout, int64_t bits,
                        std::array<bool, 5> needs) {
  const HiddenLayer layer{std::nullopt, seed, parse_hidden_activation(activation), dropout, bits};
  const auto options = grad_output.options();
  const auto wide = options.dtype(accumulation_type(grad_output.scalar_type()));
  const auto sum_like = [&](bool needed, at::IntArrayRef shape) {
    return needed ? at::zeros(shape, wide) : at::empty({0}, wide);
  };
  const int64_t features = weight1.size(0), in = weight1.size(1), out = weight2.size(0);
  const at::Tensor g = as_rows(grad_output);
  const int64_t rows = g.size(0);
  TORCH_CHECK(codes.dim() == 2 && codes.size(0) == rows && codes.size(1) == hidden_code_row(layer, features),
              "feed_forward_coded_backward: codes must be [", rows, ", ", hidden_code_row(layer, features),
              "], got ", codes.sizes());
  TORCH_CHECK(!needs[1] || (input_codes.has_value() && input_table.has_value() &&
                            input_codes->numel() == kernels::code_bytes(rows * in, bits)),
              "feed_forward_coded_backward: input_codes must hold ", rows, " rows of ", in, " columns at ",
              bits, " bits");
  std::vector<int64_t> shape = grad_output.sizes().vec();
  shape.back() = in;
  at::Tensor grad_input = needs[0] ? at::empty(shape, options) : at::empty({0}, options);
  at::Tensor grad_weight1 = sum_like(needs[1], {features, in}), grad_bias1 = sum_like(needs[2], {features});
  at::Tensor grad_weight2 = sum_like(needs[3], {out, features}), grad_bias2 = sum_like(needs[4], {out});
  if (rows > 0) {
    at::Tensor dx = needs[0] ? grad_input.view({-1, in}) : grad_input;
    const int64_t step = std::min(block_rows(weight1), rows);
    at::Tensor buffer = at::empty({step, features}, options),
               grad_buffer = at::empty({step, features}, options);
    at::Tensor x_buffer = at::empty({needs[1] ? step : 0, in}, options);
    for (int64_t first = 0; first < rows; first += step) {
      const int64_t n = std::min(step, rows - first);
      const at::Tensor g_block = g.narrow(0, first, n);
      if (needs[4]) grad_bias2.add_(g_block.sum(0, false, wide.dtype().toScalarType()));
      at::Tensor hidden = buffer.narrow(0, 0, n), grad = grad_buffer.narrow(0, 0, n);
      product_into(grad, g_block, weight2);
      hidden_decode(hidden, grad, codes, layer, first);
      if (needs[3]) add_product(grad_weight2, g_block, hidden);
      if (needs[2]) grad_bias1.add_(grad.sum(0, false, wide.dtype().toScalarType()));
      if (needs[1]) {
        at::Tensor x = x_buffer.narrow(0, 0, n);
        decode_into({*input_codes, *input_table}, bits, rows * in, first * in, x);
        add_product(grad_weight1, grad, x);
      }
      if (needs[0]) product_into(dx.narrow(0, first, n), grad, weight1);
    }
  }
  const auto type = grad_output.scalar_type();
  return {grad_input, grad_weight1.to(type), grad_bias1.to(type), grad_weight2.to(type), grad_bias2.to(type)};
}

Forward forward_meta(const at::Tensor& input, const at::Tensor& weight1,
                     const std::optional<at::Tensor>& bias1, const at::Tensor& weight2,
                     const std::optional<at::Tensor>& bias2, c10::string_view activation, double dropout,
                     const std::optional<at::Generator>& generator) {
  check(input, weight1, bias1, weight2, bias2, dropout);
  parse_hidden_activation(activation);
  std::vector<c10::SymInt> shape = input.sym_sizes().vec();
  shape.back() = weight2.sym_size(0);
  return {at::empty_symint(shape, input.options()),
          at::empty({dropout > 0 ? 2 : 0}, input.options().dtype(at::kLong))};
}

Backward backward_meta(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight1,
                       const std::optional<at::Tensor>& bias1, const at::Tensor& weight2,
                       const at::Tensor& seed, c10::string_view activation, double dropout,
                       std::array<bool, 5> needs) {
  const auto make = [&](bool needed, c10::SymIntArrayRef shape) {
    return needed ? at::empty_symint(shape, input.options()) : at::empty({0}, input.options());
  };
  return {make(needs[0], input.sym_sizes()), make(needs[1], weight1.sym_sizes()),
          make(needs[2], {weight1.sym_size(0)}), make(needs[3], weight2.sym_sizes()),
          make(needs[4], {weight2.sym_size(0)})};
}

Coded coded_meta(const at::Tensor& input, const at::Tensor& weight1, const std::optional<at::Tensor>& bias1,
                 const at::Tensor& weight2, const std::optional<at::Tensor>& bias2,
                 c10::string_view activation, double dropout, int64_t bits,
                 const std::optional<at::Generator>& generator) {
  check(input, weight1, bias1, weight2, bias2, dropout);
  const HiddenLayer layer{bias1, {}, parse_hidden_activation(activation), dropout, bits};
  std::vector<c10::SymInt> shape = input.sym_sizes().vec();
  shape.back() = weight2.sym_size(0);
  c10::SymInt rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
  return {
      at::empty_symint(shape, input.options()), at::empty({2}, input.options().dtype(at::kLong)),
      at::empty_symint({rows, hidden_code_row(layer, weight1.size(0))}, input.options().dtype(at::kByte))};
}

Backward coded_backward_meta(const at::Tensor& grad_output, const std::optional<at::Tensor>& input_codes,
                             const std::optional<at::Tensor>& input_table, const at::Tensor& weight1,
                             const at::Tensor& weight2, const at::Tensor& seed, const at::Tensor& codes,
                             c10::string_view activation, double dropout, int64_t bits,
                             std::array<bool, 5> needs) {
  const auto make = [&](bool needed, c10::SymIntArrayRef shape) {
    return needed ? at::empty_symint(shape, grad_output.options()) : at::empty({0}, grad_output.options());
  };
  std::vector<c10::SymInt> shape = grad_output.sym_sizes().vec();
  shape.back() = weight1.sym_size(1);
  return {make(needs[0], shape), make(needs[1], weight1.sym_sizes()), make(needs[2], {weight1.sym_size(0)}),
          make(needs[3], weight2.sym_sizes()), make(needs[4], {weight2.sym_size(0)})};
}

at::Tensor feed_forward_op(const at::Tensor& input, const at::Tensor& weight1,
                           const std::optional<at::Tensor>& bias1, const at::Tensor& weight2,
                           const std::optional<at::Tensor>& bias2, c10::string_view activation,
                           double dropout, c10::string_view policy,
                           const std::optional<at::Generator>& generator) {
  const int64_t bits = parse_bits("feed_forward", policy, "quantized", {8, 4, 2});
  if (bits > 0) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("remnant::feed_forward_coded", "")
                               .typed<decltype(coded)>();
    return std::get<0>(op.call(input, weight1, bias1, weight2, bias2, activation, dropout, bits, generator));
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::feed_forward_forward", "")
                             .typed<decltype(forward)>();
  return std::get<0>(op.call(input, weight1, bias1, weight2, bias2, activation, dropout, generator));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(remnant, m) {
  m.impl("feed_forward", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(feed_forward_op));
  m.impl("feed_forward_forward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(forward));
  m.impl("feed_forward_forward", c10::DispatchKey::Meta, TORCH_FN(forward_meta));
  m.impl("feed_forward_backward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(backward));
  m.impl("feed_forward_backward", c10::DispatchKey::Meta, TORCH_FN(backward_meta));
  m.impl("feed_forward_coded", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(coded));
  m.impl("feed_forward_coded", c10::DispatchKey::Meta, TORCH_FN(coded_meta));
  m.impl("feed_forward_coded_backward", c10::DispatchKey::CompositeExplicitAutograd,
         TORCH_FN(coded_backward));
  m.impl("feed_forward_coded_backward", c10::DispatchKey::Meta, TORCH_FN(coded_backward_meta));
}

}  // namespace ops

at::Tensor feed_forward(const at::Tensor& input, const at::Tensor& weight1,
                        const std::optional<at::Tensor>& bias1, const at::Tensor& weight2,
                        const std::optional<at::Tensor>& bias2, std::string_view activation, double dropout,
                        std::string_view policy, const std::optional<at::Generator>& generator) {
  // Through the dispatcher, where autocast sees it.
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::feed_forward", "")
                             .typed<decltype(ops::feed_forward_op)>();
  return op.call(input, weight1, bias1, weight2, bias2, activation, dropout, policy, generator);
}

}  // namespace remnant
