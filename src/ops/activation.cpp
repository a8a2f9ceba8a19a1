#include <remnant/ops/activation.h>

#include "kernels/cpu/step_kernels.h"
#include "ops/attention_common.h"
#include "ops/step_common.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bucketize.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>

namespace remnant {

namespace ops {

namespace {

using kernels::ActivationKind;

double derivative(ActivationKind kind, double x) {
  if (kind == ActivationKind::gelu) {
    return 0.5 * std::erfc(-x / std::sqrt(2.0)) + x * std::exp(-x * x / 2) / std::sqrt(8 * std::atan(1.0));
  }
  double v = x, slope = 1;
  if (kind == ActivationKind::gelu_tanh) {
    const double scale = std::sqrt(2 / std::atan(1.0));  // 2 sqrt(2 / pi)
    v = scale * (x + 0.044715 * x * x * x);
    slope = scale * (1 + 3 * 0.044715 * x * x);
  }
  const double s = 1 / (1 + std::exp(-v));
  return s + x * s * (1 - s) * slope;
}

struct FewBit {
  std::vector<double> bounds, levels;
};

// The step function of 2^bits steps next to the derivative, in the mean square over [-8, 8] without a
// weight, by dynamic programming over cuts between cells of 1/64.
FewBit optimise(ActivationKind kind, int64_t bits) {
  constexpr int64_t cells = 1024;
  constexpr double width = 16.0 / cells;
  std::vector<double> sum(cells + 1), squares(cells + 1);
  for (int64_t c = 0; c < cells; ++c) {
    const double d = derivative(kind, -8 + (static_cast<double>(c) + 0.5) * width);
    sum[c + 1] = sum[c] + d;
    squares[c + 1] = squares[c] + d * d;
  }
  const auto error = [&](int64_t from, int64_t to) {
    const double s = sum[to] - sum[from];
    return squares[to] - squares[from] - s * s / static_cast<double>(to - from);
  };
  const int64_t steps = int64_t{1} << bits;
  std::vector<double> least(cells + 1);
  std::vector<std::vector<int64_t>> cut(steps, std::vector<int64_t>(cells + 1));
  for (int64_t to = 1; to <= cells; ++to) least[to] = error(0, to);
  for (int64_t step = 1; step < steps; ++step) {
    // Downwards, since the shorter prefixes' errors are still those of one step fewer.
    for (int64_t to = cells; to > step; --to) {
      double best = std::numeric_limits<double>::infinity();
      for (int64_t from = step; from < to; ++from) {
        const double candidate = least[from] + error(from, to);
        if (candidate < best) {
          best = candidate;
          cut[step][to] = from;
        }
      }
      least[to] = best;
    }
  }
  FewBit found;
  int64_t to = cells;
  for (int64_t step = steps - 1; step >= 0; --step) {
    const int64_t from = step == 0 ? 0 : cut[step][to];
    found.levels.insert(found.levels.begin(), (sum[to] - sum[from]) / static_cast<double>(to - from));
    if (step > 0) found.bounds.insert(found.bounds.begin(), -8 + static_cast<double>(from) * width);
    to = from;
  }
  return found;
}

const FewBit& few_bit(ActivationKind kind, int64_t bits) {
  static const auto tables = [] {
    std::vector<FewBit> all;
    for (const auto k : {ActivationKind::gelu, ActivationKind::gelu_tanh, ActivationKind::silu}) {
      for (int64_t b = 2; b <= 4; ++b) all.push_back(optimise(k, b));
    }
    return all;
  }();
  return tables[static_cast<size_t>((static_cast<int64_t>(kind) - 1) * 3 + bits - 2)];
}

ActivationKind kind_of(int64_t kind) {
  TORCH_CHECK(kind >= 0 && kind <= 3, "activation: kind must be 0 to 3, got ", kind);
  return static_cast<ActivationKind>(kind);
}

void check(const at::Tensor& input, int64_t kind, int64_t bits) {
  check_floating("activation", "input", input);
  const bool leaky = kind_of(kind) == ActivationKind::leaky;
  TORCH_CHECK(leaky ? bits == 1 : bits == 0 || (bits >= 2 && bits <= 4),
              "activation: bits must be 0 or 2 to 4 (leaky: 1), got ", bits);
}

c10::SymInt code_bytes(const at::Tensor& x, int64_t bits) {
  const c10::SymInt size = x.sym_numel();
  const c10::SymInt planes = (size + 7) / 8 * bits;
  return bits == 1 ? planes : planes + (size + (kernels::kMarkedElements - 1)) / kernels::kMarkedElements;
}

kernels::Activation make_problem(const at::Tensor& x, ActivationKind kind, double slope, int64_t bits,
                                 const at::Tensor& codes) {
  kernels::Activation problem;
  problem.element = element_of(x.scalar_type());
  problem.kind = kind;
  problem.size = x.numel();
  problem.slope = slope;
  problem.bits = bits;
  if (codes.numel() > 0) {
    problem.codes = static_cast<uint8_t*>(codes.data_ptr());
    if (bits > 1) problem.marks = problem.codes + kernels::plane_bytes(problem.size, bits);
  }
  if (bits > 1) {
    problem.bounds = few_bit(kind, bits).bounds.data();
    problem.levels = few_bit(kind, bits).levels.data();
  }
  return problem;
}

// Threads take whole bytes of marks.
void run(const kernels::Activation& problem, void (*kernel)(const kernels::Activation&, int64_t, int64_t)) {
  constexpr int64_t unit = kernels::kMarkedElements;
  at::parallel_for(0, (problem.size + unit - 1) / unit, 32, [&](int64_t begin, int64_t end) {
    kernel(problem, begin * unit, std::min(end * unit, problem.size));
  });
}

// The layout of kernels::Activation in ATen operations: [groups, 64] to [groups, bits, 8], the last group
// cut.
at::Tensor pack_planes(const at::Tensor& flat, int64_t bits) {
  const int64_t size = flat.numel();
  const int64_t whole = size / kernels::kCodeGroup, rest = size % kernels::kCodeGroup;
  const auto planes = [&](const at::Tensor& groups) {
    const int64_t bytes = groups.size(1) / 8;
    const at::Tensor plane = at::arange(bits, groups.options()).view({1, bits, 1, 1});
    const at::Tensor place = at::arange(8, groups.options());
    return groups.view({-1, 1, bytes, 8})
        .bitwise_right_shift(plane)
        .bitwise_and(1)
        .bitwise_left_shift(place)
        .sum(-1)
        .to(at::kByte)
        .flatten();
  };
  const at::Tensor first =
      planes(flat.narrow(0, 0, whole * kernels::kCodeGroup).view({whole, kernels::kCodeGroup}));
  if (rest == 0) return first;
  const at::Tensor last = flat.narrow(0, whole * kernels::kCodeGroup, rest);
  return at::cat({first, planes(at::constant_pad_nd(last, {0, (8 - rest % 8) % 8}).unsqueeze(0))});
}

at::Tensor unpack_planes(const at::Tensor& codes, int64_t size, int64_t bits) {
  const int64_t whole = size / kernels::kCodeGroup, rest = size % kernels::kCodeGroup;
  const auto values = [&](const at::Tensor& bytes, int64_t groups) {
    const at::Tensor wide = bytes.to(at::kLong).view({groups, bits, -1, 1});
    const at::Tensor plane = at::arange(bits, wide.options()).view({1, bits, 1, 1});
    const at::Tensor place = at::arange(8, wide.options());
    return wide.bitwise_right_shift(place).bitwise_and(1).bitwise_left_shift(plane).sum(1).flatten();
  };
  const int64_t bytes = whole * bits * (kernels::kCodeGroup / 8);
  const at::Tensor first =
      whole > 0 ? values(codes.narrow(0, 0, bytes), whole) : at::empty({0}, codes.options().dtype(at::kLong));
  if (rest == 0) return first;
  return at::cat({first, values(codes.narrow(0, bytes, (rest + 7) / 8 * bits), 1).narrow(0, 0, rest)});
}

at::Tensor plain_value(const at::Tensor& x, ActivationKind kind, double slope) {
  switch (kind) {
    case ActivationKind::leaky:
      return slope == 0 ? at::where(x.le(0), at::zeros({}, x.options()), x) : at::leaky_relu(x, slope);
    case ActivationKind::gelu:
      return at::gelu(x);
    case ActivationKind::gelu_tanh:
      return at::gelu(x, "tanh");
    case ActivationKind::silu:
      return at::silu(x);
  }
  return x;
}

using Forward = std::tuple<at::Tensor, at::Tensor>;

Forward forward_composite(const at::Tensor& input, int64_t kind, double slope, int64_t bits, bool keep) {
  check(input, kind, bits);
  const at::Tensor x = input.contiguous();
  const at::Tensor y = plain_value(x, kind_of(kind), slope);
  if (!keep || bits == 0) return {y, at::empty({0}, x.options().dtype(at::kByte))};
  const at::Tensor flat = x.flatten().to(accumulation_type(x.scalar_type()));
  if (bits == 1) return {y, pack_planes(flat.le(0).logical_not().to(at::kLong), 1)};
  const at::Tensor bounds = at::tensor(few_bit(kind_of(kind), bits).bounds, flat.options());
  const at::Tensor finite = flat.isfinite();
  // NaN is put into no interval by any comparison.
  const at::Tensor code = at::bucketize(flat.masked_fill(flat.isnan(), -100.0), bounds);
  const int64_t padding = (kernels::kCodeGroup - flat.numel() % kernels::kCodeGroup) % kernels::kCodeGroup;
  const at::Tensor groups =
      at::constant_pad_nd(finite.logical_not().to(at::kLong), {0, padding}).view({-1, kernels::kCodeGroup});
  const at::Tensor marked = groups.sum(1).gt(0).to(at::kLong);
  const at::Tensor bytes = at::constant_pad_nd(marked, {0, (8 - marked.numel() % 8) % 8}).view({-1, 8});
  const at::Tensor marks = bytes.bitwise_left_shift(at::arange(8, bytes.options())).sum(1).to(at::kByte);
  return {y, at::cat({pack_planes(code, bits), marks})};
}

Forward forward_cpu(const at::Tensor& input, int64_t kind, double slope, int64_t bits, bool keep) {
  if (!fused_on_cpu()) return forward_composite(input, kind, slope, bits, keep);
  check(input, kind, bits);
  const at::Tensor x = input.contiguous();
  at::Tensor y = at::empty_like(x);
  const at::Tensor codes =
      at::empty({keep && bits > 0 ? code_bytes(x, bits).expect_int() : 0}, x.options().dtype(at::kByte));
  kernels::Activation problem = make_problem(x, kind_of(kind), slope, bits, codes);
  problem.x = x.const_data_ptr();
  problem.y = y.mutable_data_ptr();
  run(problem, kernels::step_kernels().activation_forward);
  return {y, codes};
}

Forward forward_meta(const at::Tensor& input, int64_t kind, double slope, int64_t bits, bool keep) {
  check(input, kind, bits);
  const auto bytes = input.options().dtype(at::kByte);
  return {at::empty_symint(input.sym_sizes(), input.options()),
          keep && bits > 0 ? at::empty_symint({code_bytes(input, bits)}, bytes) : at::empty({0}, bytes)};
}

void check_backward(const at::Tensor& grad, const std::optional<at::Tensor>& input, const at::Tensor& codes,
                    int64_t kind, int64_t bits) {
  check(grad, kind, bits);
  TORCH_CHECK(bits > 0 || (input.has_value() && input->sizes() == grad.sizes() &&
                           input->scalar_type() == grad.scalar_type()),
              "activation_backward: input must have grad's shape ", grad.sizes(), " and dtype");
  TORCH_CHECK(bits == 0 || codes.numel() == code_bytes(grad, bits).expect_int(),
              "activation_backward: expected ", code_bytes(grad, bits), " bytes of codes, got ",
              codes.numel());
}

at::Tensor backward_composite(const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
                              const at::Tensor& codes, int64_t kind, double slope, int64_t bits) {
  check_backward(grad_output, input, codes, kind, bits);
  const at::Tensor g = grad_output.contiguous();
  if (bits == 0) {
    if (kind_of(kind) == ActivationKind::silu) return at::silu_backward(g, *input);
    return at::gelu_backward(g, *input, kind_of(kind) == ActivationKind::gelu ? "none" : "tanh");
  }
  const at::Tensor code = unpack_planes(codes, g.numel(), bits);
  if (bits == 1) {
    const at::Tensor blocked = slope == 0 ? at::zeros({}, g.options()) : g.mul(slope);
    return at::where(code.view(g.sizes()).gt(0), g, blocked);
  }
  const auto wide = accumulation_type(g.scalar_type());
  const at::Tensor levels = at::tensor(few_bit(kind_of(kind), bits).levels, g.options().dtype(wide));
  const at::Tensor marks =
      codes.narrow(0, kernels::plane_bytes(g.numel(), bits), kernels::mark_bytes(g.numel()))
          .to(at::kLong)
          .unsqueeze(1);
  const at::Tensor marked = marks.bitwise_right_shift(at::arange(8, marks.options()))
                                .bitwise_and(1)
                                .flatten()
                                .repeat_interleave(kernels::kCodeGroup)
                                .narrow(0, 0, g.numel());
  const at::Tensor slopes =
      levels.index_select(0, code).masked_fill(marked.gt(0), std::numeric_limits<double>::quiet_NaN());
  return g.to(wide).mul(slopes.view(g.sizes())).to(g.scalar_type());
}

at::Tensor backward_cpu(const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
                        const at::Tensor& codes, int64_t kind, double slope, int64_t bits) {
  if (!fused_on_cpu()) return backward_composite(grad_output, input, codes, kind, slope, bits);
  check_backward(grad_output, input, codes, kind, bits);
  const at::Tensor g = grad_output.contiguous();
  const at::Tensor x = input.has_value() ? input->contiguous() : at::Tensor();
  at::Tensor grad_input = at::empty_like(g);
  kernels::Activation problem = make_problem(g, kind_of(kind), slope, bits, codes);
  if (x.defined()) problem.x = x.const_data_ptr();
  problem.grad = g.const_data_ptr();
  problem.grad_x = grad_input.mutable_data_ptr();
  run(problem, kernels::step_kernels().activation_backward);
  return grad_input;
}

at::Tensor backward_meta(const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
                         const at::Tensor& codes, int64_t kind, double slope, int64_t bits) {
  return at::empty_symint(grad_output.sym_sizes(), grad_output.options());
}

at::Tensor call(const at::Tensor& input, ActivationKind kind, double slope, int64_t bits) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::activation_forward", "")
                             .typed<decltype(forward_cpu)>();
  return std::get<0>(op.call(input, static_cast<int64_t>(kind), slope, bits, false));
}

const char* form(ActivationKind kind) { return kind == ActivationKind::gelu ? "none" : "tanh"; }

at::Tensor coded_forward(const at::Tensor& input, int64_t kind, int64_t bits,
                         const std::optional<at::Generator>& generator) {
  const auto which = static_cast<ActivationKind>(kind);
  return which == ActivationKind::silu ? at::silu(input) : at::gelu(input, form(which));
}

at::Tensor call_coded(const char* name, const at::Tensor& input, ActivationKind kind,
                      c10::string_view policy) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("remnant::activation_coded", "")
          .typed<at::Tensor(const at::Tensor&, int64_t, int64_t, const std::optional<at::Generator>&)>();
  return op.call(input, static_cast<int64_t>(kind), parse_bits(name, policy, "quantized", {8, 4, 2}),
                 std::nullopt);
}

at::Tensor relu_op(const at::Tensor& input) {
  check_floating("relu", "input", input);
  return call(input, ActivationKind::leaky, 0, 1);
}

at::Tensor leaky_relu_op(const at::Tensor& input, double slope) {
  check_floating("leaky_relu", "input", input);
  return call(input, ActivationKind::leaky, slope, 1);
}

at::Tensor gelu_op(const at::Tensor& input, c10::string_view approximate, c10::string_view policy) {
  check_floating("gelu", "input", input);
  TORCH_CHECK(approximate == "none" || approximate == "tanh",
              "gelu: approximate must be 'none' or 'tanh', got '", approximate, "'");
  const auto kind = approximate == "none" ? ActivationKind::gelu : ActivationKind::gelu_tanh;
  if (policy.starts_with("quantized")) return call_coded("gelu", input, kind, policy);
  return call(input, kind, 0, parse_bits("gelu", policy, "fewbit", {2, 3, 4}));
}

at::Tensor silu_op(const at::Tensor& input, c10::string_view policy) {
  check_floating("silu", "input", input);
  if (policy.starts_with("quantized")) return call_coded("silu", input, ActivationKind::silu, policy);
  return call(input, ActivationKind::silu, 0, parse_bits("silu", policy, "fewbit", {2, 3, 4}));
}

}  // namespace

at::Tensor activation_derivative(const at::Tensor& input, ActivationKind kind) {
  const at::Tensor one = at::ones({}, input.options()).expand_symint(input.sym_sizes());
  return kind == ActivationKind::silu ? at::silu_backward(one, input)
                                      : at::gelu_backward(one, input, form(kind));
}

TORCH_LIBRARY_FRAGMENT(remnant, m) {
  m.impl("activation_coded", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(coded_forward));
  m.impl("activation_coded", c10::DispatchKey::Meta, TORCH_FN(coded_forward));
  m.impl("relu", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(relu_op));
  m.impl("leaky_relu", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(leaky_relu_op));
  m.impl("gelu", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(gelu_op));
  m.impl("silu", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(silu_op));
  m.impl("activation_forward", c10::DispatchKey::CPU, TORCH_FN(forward_cpu));
  m.impl("activation_forward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(forward_composite));
  m.impl("activation_forward", c10::DispatchKey::Meta, TORCH_FN(forward_meta));
  m.impl("activation_backward", c10::DispatchKey::CPU, TORCH_FN(backward_cpu));
  m.impl("activation_backward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(backward_composite));
  m.impl("activation_backward", c10::DispatchKey::Meta, TORCH_FN(backward_meta));
}

}  // namespace ops

at::Tensor relu(const at::Tensor& input) { return ops::relu_op(input); }

at::Tensor leaky_relu(const at::Tensor& input, double slope) { return ops::leaky_relu_op(input, slope); }

at::Tensor gelu(const at::Tensor& input, c10::string_view approximate, c10::string_view policy) {
  return ops::gelu_op(input, approximate, policy);
}

at::Tensor silu(const at::Tensor& input, c10::string_view policy) { return ops::silu_op(input, policy); }

}  // namespace remnant
