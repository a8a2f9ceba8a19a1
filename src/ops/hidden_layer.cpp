#include "ops/hidden_layer.h"

#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/step_kernels.h"
#include "ops/attention_common.h"
#include "ops/codes.h"
#include "ops/product.h"
#include "ops/seed.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/bucketize.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <limits>

namespace remnant::ops {

namespace {

using Activation = kernels::HiddenActivation;
using Grid = kernels::HiddenGrid<double>;

// Half types on a CPU: their codes are made and read in float32, a block at a time.
bool runs_wide_kernel(const at::Tensor& hidden) {
  return hidden.device().is_cpu() && fused_on_cpu() &&
         (hidden.scalar_type() == at::kBFloat16 || hidden.scalar_type() == at::kHalf);
}

bool runs_kernel(const at::Tensor& hidden) {
  return hidden.device().is_cpu() && hidden.scalar_type() != at::kBFloat16 &&
         hidden.scalar_type() != at::kHalf && fused_on_cpu();
}

// Rows `first`, `first` + 1, ... of the hidden layer through the CPU's kernel; grad and codes undefined where
// they have no part.
template <typename T>
void run_kernel(at::Tensor& hidden, at::Tensor& grad, const at::Tensor& codes, const HiddenLayer& layer,
                int64_t first, void (*kernel)(const kernels::HiddenRows<T>&, int64_t, int64_t)) {
  kernels::HiddenRows<T> rows;
  rows.columns = hidden.size(1);
  rows.first_row = first;
  rows.activation = layer.activation;
  at::Tensor bias;
  if (layer.bias.has_value()) {
    bias = layer.bias->contiguous();
    rows.bias = bias.const_data_ptr<T>();
  }
  if (layer.dropout > 0 || codes.defined()) {
    rows.seed = seed_of(layer.seed);
  }
  if (layer.dropout > 0) {
    rows.threshold = kernels::dropout_threshold(layer.dropout);
    rows.keep_scale = static_cast<T>(kernels::dropout_keep_scale(rows.threshold));
  }
  rows.hidden = hidden.mutable_data_ptr<T>();
  if (grad.defined()) rows.grad = grad.mutable_data_ptr<T>();
  if (codes.defined()) {
    rows.bits = kernels::hidden_code_bits(layer.activation, layer.bits);
    rows.codes = static_cast<uint8_t*>(codes.data_ptr());
    rows.code_row_bytes = codes.size(1);
    if (layer.activation == Activation::gelu) rows.grid = &kernels::hidden_grid<T>(rows.bits);
  }
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, rows.columns));
  at::parallel_for(0, hidden.size(0), grain, [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
}

at::Tensor drop_mask(const at::Tensor& hidden, const HiddenLayer& layer, int64_t first) {
  return dropout_mask(layer.seed, layer.dropout, 1, 1, first, hidden.size(0), hidden.size(1),
                      hidden.options())
      .view(hidden.sizes());
}

// Codes of rows, [rows, columns], to bytes and back.
at::Tensor pack_rows(const at::Tensor& codes, int64_t bits) {
  const int64_t rows = codes.size(0), columns = codes.size(1);
  const int64_t whole = columns / kernels::kCodeGroup * kernels::kCodeGroup;
  std::vector<at::Tensor> parts;
  if (whole > 0) {
    parts.push_back(
        pack_groups(codes.narrow(1, 0, whole).reshape({-1, kernels::kCodeGroup}), bits).view({rows, -1}));
  }
  if (whole < columns) {
    parts.push_back(pack_groups(codes.narrow(1, whole, columns - whole), bits).view({rows, -1}));
  }
  return at::cat(parts, 1);
}
at::Tensor unpack_rows(const at::Tensor& bytes, int64_t columns, int64_t bits) {
  const int64_t rows = bytes.size(0), groups = columns / kernels::kCodeGroup;
  const int64_t whole = groups * kernels::kCodeGroup, split = whole * bits / 8;
  std::vector<at::Tensor> parts;
  if (whole > 0) {
    parts.push_back(
        unpack_groups(bytes.narrow(1, 0, split).reshape({-1}), rows * groups, kernels::kCodeGroup, bits)
            .view({rows, whole}));
  }
  if (whole < columns) {
    parts.push_back(unpack_groups(bytes.narrow(1, split, bytes.size(1) - split).reshape({-1}), rows,
                                  columns - whole, bits));
  }
  return at::cat(parts, 1);
}

// Uniform in (0, 1), of x's shape.
at::Tensor rounding_noise(const at::Tensor& x, const at::Tensor& seed, int64_t first) {
  const int64_t blocks = (x.size(1) + kernels::kDropoutColumns - 1) / kernels::kDropoutColumns;
  const at::Tensor words =
      random_words(seed, static_cast<uint32_t>(kernels::Stream::rounding), 1, first, x.size(0), blocks);
  return at::stack({words.bitwise_and(0xFFFF), words.bitwise_right_shift(16)}, -1)
      .flatten(-2)
      .select(0, 0)
      .narrow(1, 0, x.size(1))
      .to(x.scalar_type())
      .add_(0.5)
      .mul_(1.0 / 65536);
}

at::Tensor table(const double* numbers, int64_t count, const at::Tensor& like) {
  return at::from_blob(const_cast<double*>(numbers), {count}, at::TensorOptions(at::kDouble))
      .to(like.options());
}

at::Tensor encode_gelu(const at::Tensor& x, const at::Tensor& noise, int64_t bits) {
  const Grid& grid = kernels::hidden_grid<double>(bits);
  const at::Tensor ones = x.new_ones({}).expand(x.sizes());
  const at::Tensor value = at::gelu(x), slope = at::gelu_backward(ones, x);
  const at::Tensor place = x.nan_to_num()
                               .clamp(-Grid::edge, Grid::edge)
                               .add_(Grid::edge)
                               .mul_(Grid::places / (2 * Grid::edge))
                               .to(at::kLong)
                               .clamp_max_(Grid::places - 1);
  const at::Tensor arcs =
      at::from_blob(const_cast<int32_t*>(grid.arc_of), {Grid::places}, at::TensorOptions(at::kInt))
          .to(x.device(), at::kLong);
  const at::Tensor far = table(grid.far, grid.far_points + 1, x);
  const at::Tensor beyond = x.ge(Grid::edge);
  const at::Tensor far_arc = at::bucketize(x, far, /*out_int32=*/false, /*right=*/true)
                                 .clamp_(1, grid.far_points)
                                 .add_(grid.far_arc - 1);
  const at::Tensor arc = at::where(beyond, far_arc, arcs.take(place));
  const auto weight = [&](const double(&of)[3][Grid::most_arcs]) {
    const auto at_arc = [&](int64_t i) { return table(of[i], Grid::most_arcs, x).take(arc); };
    return at_arc(0).mul_(value).add_(at_arc(1).mul_(slope).add_(at_arc(2)));
  };
  const at::Tensor first = table(grid.code, Grid::most_arcs, x).take(arc);
  const at::Tensor last = first + 2 - beyond.to(x.scalar_type());
  at::Tensor code = at::where(noise.gt(1 - weight(grid.first)), first, first + 1);
  code = at::where(noise.lt(weight(grid.last)), last, code);
  const at::Tensor fits =
      x.le(grid.far[grid.far_points]).logical_and(x.ne(-std::numeric_limits<double>::infinity()));
  return at::where(fits, code, code.new_full({}, static_cast<double>((1 << bits) - 1))).to(at::kLong);
}

// Codes, and a step a group in bytes.
std::pair<at::Tensor, at::Tensor> encode_relu(const at::Tensor& x, const at::Tensor& noise, int64_t bits) {
  const int64_t rows = x.size(0), columns = x.size(1);
  const int64_t groups = (columns + kernels::kCodeGroup - 1) / kernels::kCodeGroup;
  const auto by_group = [&](const at::Tensor& t) {
    return at::constant_pad_nd(t, {0, groups * kernels::kCodeGroup - columns})
        .view({rows, groups, kernels::kCodeGroup});
  };
  const auto levels = static_cast<double>((1 << bits) - 2);
  const at::Tensor v = by_group(x);
  const at::Tensor above = v.amax({2}, true).clamp_min(0);
  const at::Tensor good = v.isfinite().all(2, true).logical_and(above.le(std::numeric_limits<float>::max()));
  const at::Tensor exact = above / levels;
  const at::Tensor least =
      at::where(exact.gt(0).logical_and(exact.lt(0x1p-120)), exact.new_full({}, 0x1p-120), exact);
  const at::Tensor step = narrow_to_bfloat16(
      at::where(good, least, x.new_full({}, std::numeric_limits<double>::quiet_NaN())), /*up=*/true);
  const at::Tensor inverse = at::where(step.gt(0), step.to(x.scalar_type()).reciprocal(), x.new_zeros({}));
  const at::Tensor level = v.mul(inverse).add(by_group(noise)).clamp_max_(levels).floor().add_(1);
  const at::Tensor code = at::where(v.gt(0), level, level.new_zeros({}))
                              .nan_to_num()
                              .to(at::kLong)
                              .view({rows, -1})
                              .narrow(1, 0, columns);
  return {code, step.view({rows, groups}).contiguous().view(at::kByte)};
}

}  // namespace

Activation parse_hidden_activation(std::string_view name) {
  if (name == "relu") return Activation::relu;
  TORCH_CHECK(name == "gelu", "feed_forward: activation must be 'relu' or 'gelu', got '", name, "'");
  return Activation::gelu;
}

// Half types take the bias along, before the product is rounded; the kernel adds it later.
void hidden_product(at::Tensor& hidden, const at::Tensor& x, const at::Tensor& weight,
                    const HiddenLayer& layer) {
  if (layer.bias.has_value() && !runs_kernel(hidden)) {
    product_into(hidden, x, weight.t(), layer.bias);
  } else {
    product_into(hidden, x, weight.t());
  }
}

void hidden_forward(at::Tensor& hidden, const HiddenLayer& layer, int64_t first) {
  if (runs_kernel(hidden)) {
    at::Tensor none;
    if (hidden.scalar_type() == at::kFloat) {
      run_kernel<float>(hidden, none, none, layer, first, kernels::cpu_kernels().hidden_forward_float);
    } else {
      run_kernel<double>(hidden, none, none, layer, first, kernels::cpu_kernels().hidden_forward_double);
    }
    return;
  }
  hidden = layer.activation == Activation::relu ? hidden.relu_() : at::gelu(hidden);
  if (layer.dropout > 0) hidden.mul_(drop_mask(hidden, layer, first));
}

void hidden_backward(at::Tensor& hidden, at::Tensor& grad, const HiddenLayer& layer, int64_t first) {
  if (runs_kernel(hidden)) {
    if (hidden.scalar_type() == at::kFloat) {
      run_kernel<float>(hidden, grad, {}, layer, first, kernels::cpu_kernels().hidden_backward_float);
    } else {
      run_kernel<double>(hidden, grad, {}, layer, first, kernels::cpu_kernels().hidden_backward_double);
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

int64_t hidden_code_row(const HiddenLayer& layer, int64_t columns) {
  return kernels::hidden_row_bytes(layer.activation, kernels::hidden_code_bits(layer.activation, layer.bits),
                                   columns);
}

void hidden_encode(at::Tensor& hidden, at::Tensor& codes, const HiddenLayer& layer, int64_t first) {
  if (runs_kernel(hidden)) {
    at::Tensor none;
    if (hidden.scalar_type() == at::kFloat) {
      run_kernel<float>(hidden, none, codes, layer, first, kernels::cpu_kernels().hidden_encode_float);
    } else {
      run_kernel<double>(hidden, none, codes, layer, first, kernels::cpu_kernels().hidden_encode_double);
    }
    return;
  }
  if (runs_wide_kernel(hidden)) {
    HiddenLayer biased = layer;
    biased.bias.reset();  // hidden_product has added it
    at::Tensor wide = hidden.to(at::kFloat);
    hidden_encode(wide, codes, biased, first);
    hidden.copy_(wide);
    return;
  }
  const int64_t bits = kernels::hidden_code_bits(layer.activation, layer.bits);
  const at::Tensor x = hidden.to(accumulation_type(hidden.scalar_type()));
  const at::Tensor noise = rounding_noise(x, layer.seed, first);
  at::Tensor out = codes.narrow(0, first, hidden.size(0));
  if (layer.activation == Activation::relu) {
    const auto [code, steps] = encode_relu(x, noise, bits);
    out.copy_(at::cat({pack_rows(code, bits), steps}, 1));
  } else {
    const at::Tensor code = encode_gelu(x, noise, bits);
    out.copy_(
        bits == 6
            ? at::cat({pack_rows(code.bitwise_and(15), 4), pack_rows(code.bitwise_right_shift(4), 2)}, 1)
            : pack_rows(code, bits));
  }
  hidden_forward(hidden, layer, first);
}

void hidden_decode(at::Tensor& hidden, at::Tensor& grad, const at::Tensor& codes, const HiddenLayer& layer,
                   int64_t first) {
  if (runs_kernel(hidden)) {
    if (hidden.scalar_type() == at::kFloat) {
      run_kernel<float>(hidden, grad, codes, layer, first, kernels::cpu_kernels().hidden_decode_float);
    } else {
      run_kernel<double>(hidden, grad, codes, layer, first, kernels::cpu_kernels().hidden_decode_double);
    }
    return;
  }
  if (runs_wide_kernel(hidden)) {
    at::Tensor wide = at::empty(hidden.sizes(), hidden.options().dtype(at::kFloat));
    at::Tensor wide_grad = grad.to(at::kFloat);
    hidden_decode(wide, wide_grad, codes, layer, first);
    hidden.copy_(wide);
    grad.copy_(wide_grad);
    return;
  }
  const int64_t bits = kernels::hidden_code_bits(layer.activation, layer.bits), columns = hidden.size(1);
  const int64_t low = kernels::hidden_low_bytes(bits, columns);
  const auto wide = hidden.options().dtype(accumulation_type(hidden.scalar_type()));
  const at::Tensor in = codes.narrow(0, first, hidden.size(0));
  at::Tensor code = unpack_rows(in.narrow(1, 0, low), columns, bits == 6 ? 4 : bits);
  at::Tensor value, slope;
  if (layer.activation == Activation::relu) {
    const at::Tensor step = in.narrow(1, low, in.size(1) - low)
                                .contiguous()
                                .view(at::kBFloat16)
                                .to(wide.dtype().toScalarType())
                                .repeat_interleave(kernels::kCodeGroup, 1)
                                .narrow(1, 0, columns);
    const at::Tensor nothing = step - step;
    value = code.sub(1).clamp_min_(0).to(wide.dtype().toScalarType()).mul_(step).add_(nothing);
    slope = code.gt(0).to(wide.dtype().toScalarType()).add_(nothing);
  } else {
    if (bits == 6) {
      code =
          code.bitwise_or(unpack_rows(in.narrow(1, low, in.size(1) - low), columns, 2).bitwise_left_shift(4));
    }
    const Grid& grid = kernels::hidden_grid<double>(bits);
    const at::Tensor like = at::empty({0}, wide);
    value = table(grid.value, 256, like).take(code);
    slope = table(grid.slope, 256, like).take(code);
  }
  if (layer.dropout > 0) {
    const at::Tensor mask = drop_mask(hidden, layer, first);
    value.mul_(mask);
    grad.mul_(mask);
  }
  grad.mul_(slope);
  hidden.copy_(value);
}

}  // namespace remnant::ops
