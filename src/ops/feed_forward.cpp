#include <remnant/ops/feed_forward.h>

#include "kernels/cpu/attention_kernels.h"
#include "ops/attention_common.h"
#include "ops/product.h"
#include "ops/step_common.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/threshold_backward.h>
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
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Activation = kernels::HiddenActivation;

Activation parse_activation(std::string_view name) {
  if (name == "relu") return Activation::relu;
  TORCH_CHECK(name == "gelu", "feed_forward: activation must be 'relu' or 'gelu', got '", name, "'");
  return Activation::gelu;
}

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

// Rows whose hidden layer takes about 2 MB on a CPU: in cache, and long enough for full-speed products.
int64_t block_rows(const at::Tensor& weight1) {
  const int64_t elements = weight1.device().is_cpu() ? int64_t{1} << 19 : int64_t{1} << 24;
  return std::clamp<int64_t>(elements / std::max<int64_t>(weight1.size(0), 1), 128, 8192);
}

struct Hidden {
  std::optional<at::Tensor> bias;
  at::Tensor seed;
  Activation activation = Activation::relu;
  double dropout = 0;
};

bool runs_kernel(const at::Tensor& hidden) {
  return hidden.device().is_cpu() && hidden.scalar_type() != at::kBFloat16 &&
         hidden.scalar_type() != at::kHalf;
}

// Rows `first`, `first` + 1, ... of the hidden layer through the CPU's kernel; grad undefined in forward.
template <typename T>
void run_kernel(at::Tensor& hidden, at::Tensor& grad, const Hidden& layer, int64_t first,
                void (*kernel)(const kernels::HiddenRows<T>&, int64_t, int64_t)) {
  kernels::HiddenRows<T> rows;
  rows.columns = hidden.size(1);
  rows.first_row = first;
  rows.activation = layer.activation;
  at::Tensor bias;
  if (layer.bias.has_value()) {
    bias = layer.bias->contiguous();
    rows.bias = bias.const_data_ptr<T>();
  }
  if (layer.dropout > 0) {
    rows.seed = kernels::Seed::from(layer.seed.const_data_ptr<int64_t>());
    rows.threshold = kernels::dropout_threshold(layer.dropout);
    rows.keep_scale = static_cast<T>(kernels::dropout_keep_scale(rows.threshold));
  }
  rows.hidden = hidden.mutable_data_ptr<T>();
  if (grad.defined()) rows.grad = grad.mutable_data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, rows.columns));
  at::parallel_for(0, hidden.size(0), grain, [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
}

// The first product. Half types take the bias along, before the product is rounded; the kernel adds it later.
void first_product(at::Tensor& hidden, const at::Tensor& x, const at::Tensor& weight1, const Hidden& layer) {
  if (layer.bias.has_value() && !runs_kernel(hidden)) {
    product_into(hidden, x, weight1.t(), layer.bias);
  } else {
    product_into(hidden, x, weight1.t());
  }
}

at::Tensor drop_mask(const at::Tensor& hidden, const Hidden& layer, int64_t first) {
  return dropout_mask(layer.seed, layer.dropout, 1, 1, first, hidden.size(0), hidden.size(1),
                      hidden.options())
      .view(hidden.sizes());
}

// What first_product gave -> dropout(activation(x weight1^T + bias)), in place where it can be.
void hidden_forward(at::Tensor& hidden, const Hidden& layer, int64_t first) {
  if (runs_kernel(hidden)) {
    at::Tensor none;
    if (hidden.scalar_type() == at::kFloat) {
      run_kernel<float>(hidden, none, layer, first, kernels::cpu_kernels().hidden_forward_float);
    } else {
      run_kernel<double>(hidden, none, layer, first, kernels::cpu_kernels().hidden_forward_double);
    }
    return;
  }
  hidden = layer.activation == Activation::relu ? hidden.relu_() : at::gelu(hidden);
  if (layer.dropout > 0) hidden.mul_(drop_mask(hidden, layer, first));
}

// The same, and grad from the gradient of that to the product's.
void hidden_backward(at::Tensor& hidden, at::Tensor& grad, const Hidden& layer, int64_t first) {
  if (runs_kernel(hidden)) {
    if (hidden.scalar_type() == at::kFloat) {
      run_kernel<float>(hidden, grad, layer, first, kernels::cpu_kernels().hidden_backward_float);
    } else {
      run_kernel<double>(hidden, grad, layer, first, kernels::cpu_kernels().hidden_backward_double);
    }
    return;
  }
  at::Tensor mask;
  if (layer.dropout > 0) {
    mask = drop_mask(hidden, layer, first);
    grad.mul_(mask);
  }
  if (layer.activation == Activation::relu) {
    hidden.relu_();
    grad = at::threshold_backward(grad, hidden, 0);
  } else {
    grad = at::gelu_backward(grad, hidden);
    hidden = at::gelu(hidden);
  }
  if (mask.defined()) hidden.mul_(mask);
}

at::Tensor as_rows(const at::Tensor& x) { return x.reshape({-1, x.size(-1)}); }

Forward forward(const at::Tensor& input, const at::Tensor& weight1, const std::optional<at::Tensor>& bias1,
                const at::Tensor& weight2, const std::optional<at::Tensor>& bias2,
                c10::string_view activation, double dropout, const std::optional<at::Generator>& generator) {
  check(input, weight1, bias1, weight2, bias2, dropout);
  const at::Tensor seed =
      dropout > 0 ? draw_seed(input, generator) : at::empty({0}, input.options().dtype(at::kLong));
  const Hidden layer{bias1, seed, parse_activation(activation), dropout};
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
    first_product(hidden, x.narrow(0, first, n), weight1, layer);
    hidden_forward(hidden, layer, first);
    product_into(y.narrow(0, first, n), hidden, weight2.t(), bias2);
  }
  return {output, seed};
}

Backward backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight1,
                  const std::optional<at::Tensor>& bias1, const at::Tensor& weight2, const at::Tensor& seed,
                  c10::string_view activation, double dropout, std::array<bool, 5> needs) {
  const Hidden layer{bias1, seed, parse_activation(activation), dropout};
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
      first_product(hidden, x_block, weight1, layer);
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

Forward forward_meta(const at::Tensor& input, const at::Tensor& weight1,
                     const std::optional<at::Tensor>& bias1, const at::Tensor& weight2,
                     const std::optional<at::Tensor>& bias2, c10::string_view activation, double dropout,
                     const std::optional<at::Generator>& generator) {
  check(input, weight1, bias1, weight2, bias2, dropout);
  parse_activation(activation);
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

at::Tensor feed_forward_op(const at::Tensor& input, const at::Tensor& weight1,
                           const std::optional<at::Tensor>& bias1, const at::Tensor& weight2,
                           const std::optional<at::Tensor>& bias2, c10::string_view activation,
                           double dropout, const std::optional<at::Generator>& generator) {
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
}

}  // namespace ops

at::Tensor feed_forward(const at::Tensor& input, const at::Tensor& weight1,
                        const std::optional<at::Tensor>& bias1, const at::Tensor& weight2,
                        const std::optional<at::Tensor>& bias2, std::string_view activation, double dropout,
                        const std::optional<at::Generator>& generator) {
  // Through the dispatcher, where autocast sees it.
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::feed_forward", "")
                             .typed<decltype(ops::feed_forward_op)>();
  return op.call(input, weight1, bias1, weight2, bias2, activation, dropout, generator);
}

}  // namespace remnant
