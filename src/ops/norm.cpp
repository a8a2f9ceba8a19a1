#include <remnant/ops/norm.h>

#include "kernels/cpu/step_kernels.h"
#include "ops/attention_common.h"
#include "ops/seed.h"
#include "ops/step_common.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>

namespace remnant {

namespace ops {

namespace {

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using OptionalTensor = std::optional<at::Tensor>;

// y is rounded to one part in 2^24 (2^53, 2^9, 2^12), so (y - bias) / weight is off by at most that times
// |x^| + |bias / weight|.
constexpr double kMostBias = 16, kMostBiasOfHalf = 1;
constexpr double kLeastWeight = 0x1p-64, kMostWeight = 0x1p64;

// x^ from codes of y has a group's rounding over its own weight. Where another column of the group is larger
// by more than this at 4 bits, and by as much more as codes of more bits are finer, it is hidden.
constexpr double kMostSpread = 8;

template <typename T>
void find_hidden_by_codes(const T* weight, const T* bias, int64_t columns, int64_t bits,
                          std::vector<int64_t>& list) {
  const double most = kMostSpread * std::max(1.0, std::exp2(static_cast<double>(bits)) / 16);
  // Groups of other widths end at another column in each row.
  const int64_t group = columns % kernels::kCodeGroup == 0 ? kernels::kCodeGroup : columns;
  std::vector<int64_t> found;
  for (int64_t first = 0; first < columns; first += group) {
    double widest = 0;
    for (int64_t j = first; j < first + group; ++j) {
      const double b = bias != nullptr ? std::abs(static_cast<double>(bias[j])) : 0;
      // x^ has about 3 deviations on either side.
      widest = std::max(widest, std::abs(static_cast<double>(weight[j])) + b / 3);
    }
    for (int64_t j = first; j < first + group; ++j) {
      if (std::abs(static_cast<double>(weight[j])) * most < widest) found.push_back(j);
    }
  }
  std::vector<int64_t> both;
  std::set_union(list.begin(), list.end(), found.begin(), found.end(), std::back_inserter(both));
  list = std::move(both);
}

template <typename T>
void find_hidden(const T* weight, const T* bias, int64_t columns, T most, std::vector<int64_t>& list) {
  for (int64_t j = 0; j < columns; ++j) {
    const T w = weight != nullptr ? std::abs(weight[j]) : T(1);
    const T b = bias != nullptr ? std::abs(bias[j]) : T(0);
    // Written so that NaN is hidden.
    if (!(w >= T(kLeastWeight) && w <= T(kMostWeight) && b <= most * w)) list.push_back(j);
  }
}

void check_parameter(const char* op, const char* name, const at::Tensor& input,
                     const OptionalTensor& parameter) {
  if (!parameter.has_value()) return;
  TORCH_CHECK(parameter->dim() == 1 && parameter->sym_size(0) == input.sym_size(-1), op, ": ", name,
              " must be [", input.sym_size(-1), "], the last dimension of input, got ",
              parameter->sym_sizes());
  const auto type = parameter->scalar_type();
  TORCH_CHECK(type == input.scalar_type() || type == accumulation_type(input.scalar_type()), op, ": ", name,
              " must have input's dtype ", toString(input.scalar_type()),
              " (or float32 beside a half type), got ", toString(type));
  TORCH_CHECK(parameter->device() == input.device(), op, ": ", name, " is on ", parameter->device(),
              ", input on ", input.device(), "; expected one device");
}

void check(const char* op, const at::Tensor& input, const OptionalTensor& residual,
           const OptionalTensor& weight, const OptionalTensor& bias, double p) {
  check_floating(op, "input", input);
  TORCH_CHECK(input.dim() >= 1 && input.sym_size(-1) > 0, op,
              ": input must have a last dimension of at least 1, got ", input.sym_sizes());
  check_parameter(op, "weight", input, weight);
  check_parameter(op, "bias", input, bias);
  TORCH_CHECK(p >= 0 && p < 1, op, ": p must be in [0, 1), got ", p);
  if (!residual.has_value()) return;
  TORCH_CHECK(residual->scalar_type() == input.scalar_type() && residual->device() == input.device(), op,
              ": residual must have input's dtype and device, got ", toString(residual->scalar_type()),
              " on ", residual->device(), " beside ", toString(input.scalar_type()), " on ", input.device());
  TORCH_CHECK(residual->sym_sizes() == input.sym_sizes(), op, ": residual must have input's shape ",
              input.sym_sizes(), ", got ", residual->sym_sizes());
}

at::Tensor wide_parameter(const OptionalTensor& parameter, at::ScalarType type) {
  return parameter.has_value() ? parameter->to(type).contiguous() : at::Tensor();
}

// 1 / weight, but 0 in hidden columns, whose x^ is put in its place afterwards.
at::Tensor inverse_of(const at::Tensor& weight, at::IntArrayRef hidden) {
  if (!weight.defined()) return weight;
  at::Tensor inverse = weight.reciprocal();
  if (inverse.device().is_cpu()) {
    AT_DISPATCH_FLOATING_TYPES(inverse.scalar_type(), "norm", [&] {
      for (int64_t j : hidden) inverse.mutable_data_ptr<scalar_t>()[j] = 0;
    });
    return inverse;
  }
  if (!hidden.empty()) inverse.index_fill_(0, at::tensor(hidden, inverse.options().dtype(at::kLong)), 0);
  return inverse;
}

c10::SymInt rows_of(const at::Tensor& x) { return x.sym_numel() / x.sym_size(-1); }

// Allocates whatever comes out beside y.
struct Residuals {
  at::Tensor sum, rstd, aside;
  Residuals(const at::Tensor& x, bool need_sum, bool keep, at::IntArrayRef hidden, bool all) {
    const auto wide = x.options().dtype(accumulation_type(x.scalar_type()));
    const c10::SymInt kept =
        !keep ? c10::SymInt(0) : (all ? x.sym_size(-1) : c10::SymInt(static_cast<int64_t>(hidden.size())));
    sum = need_sum ? at::empty_symint(x.sym_sizes(), x.options()) : at::empty({0}, x.options());
    rstd = keep ? at::empty_symint({rows_of(x)}, wide) : at::empty({0}, wide);
    // kept == 0 would make a symbolic number of rows with nothing in them.
    aside =
        keep && (all || !hidden.empty()) ? at::empty_symint({rows_of(x), kept}, wide) : at::empty({0}, wide);
  }
};

Forward forward_composite(const at::Tensor& input, const OptionalTensor& residual,
                          const OptionalTensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& seed, double p, double eps, bool center, bool need_sum,
                          bool keep, at::IntArrayRef hidden, bool all_hidden, int64_t bits) {
  check("layer_norm", input, residual, weight, bias, p);
  const auto type = input.scalar_type();
  const auto wide = accumulation_type(type);
  const at::Tensor x = input.contiguous();
  Residuals out(x, need_sum, keep, hidden, all_hidden);
  at::Tensor v = x.to(wide);
  if (p > 0 && seed.has_value()) v = v.mul(flat_dropout_mask(x, *seed, p, v.options()));
  if (residual.has_value()) v = v.add(*residual);
  if (need_sum) out.sum.copy_(v);
  const at::Tensor centred = center ? v.sub(v.mean({-1}, true)) : v;
  const at::Tensor rstd = centred.mul(centred).mean({-1}, true).add_(eps).rsqrt_();
  const at::Tensor normalised = centred.mul(rstd);
  at::Tensor y = weight.has_value() ? normalised.mul(weight->to(wide)) : normalised;
  if (bias.has_value()) y = y.add(bias->to(wide));
  if (keep) {
    out.rstd.copy_(rstd.view(-1));
    const at::Tensor rows = normalised.view({-1, x.size(-1)});
    if (all_hidden) {
      out.aside.copy_(rows);
    } else if (!hidden.empty()) {
      out.aside.copy_(rows.index_select(1, at::tensor(hidden, x.options().dtype(at::kLong))));
    }
  }
  // Never the input's own storage.
  return {type == wide ? y : y.to(type), out.sum, out.rstd, out.aside};
}

Forward forward_cpu(const at::Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                    const OptionalTensor& bias, const OptionalTensor& seed, double p, double eps, bool center,
                    bool need_sum, bool keep, at::IntArrayRef hidden, bool all_hidden, int64_t bits) {
  if (!fused_on_cpu()) {
    return forward_composite(input, residual, weight, bias, seed, p, eps, center, need_sum, keep, hidden,
                             all_hidden, bits);
  }
  check("layer_norm", input, residual, weight, bias, p);
  const auto wide = accumulation_type(input.scalar_type());
  const at::Tensor x = input.contiguous();
  const at::Tensor added = residual.has_value() ? residual->contiguous() : at::Tensor();
  const at::Tensor w = wide_parameter(weight, wide), b = wide_parameter(bias, wide);
  at::Tensor y = at::empty_like(x);
  Residuals out(x, need_sum, keep, hidden, all_hidden);
  kernels::NormForward problem;
  problem.element = element_of(x.scalar_type());
  problem.columns = x.size(-1);
  problem.center = center;
  problem.eps = eps;
  problem.x = x.const_data_ptr();
  if (added.defined()) problem.residual = added.const_data_ptr();
  if (w.defined()) problem.weight = w.const_data_ptr();
  if (b.defined()) problem.bias = b.const_data_ptr();
  if (p > 0 && seed.has_value()) {
    problem.drop_threshold = kernels::dropout_threshold(p);
    problem.seed = seed_of(*seed);
  }
  problem.y = y.mutable_data_ptr();
  if (need_sum) problem.sum = out.sum.mutable_data_ptr();
  if (keep) problem.rstd = out.rstd.mutable_data_ptr();
  if (out.aside.numel() > 0) {
    problem.aside = out.aside.mutable_data_ptr();
    problem.aside_count = out.aside.size(1);
    if (!all_hidden) problem.aside_columns = hidden.data();
  }
  const int64_t bytes = kernels::norm_scratch_bytes(problem.columns);
  const at::Tensor scratch = at::empty({at::get_num_threads(), bytes}, x.options().dtype(at::kByte));
  auto* const memory = scratch.mutable_data_ptr<uint8_t>();
  const int64_t grain = std::max<int64_t>(1, 16384 / problem.columns);
  at::parallel_for(0, x.numel() / problem.columns, grain, [&](int64_t begin, int64_t end) {
    kernels::step_kernels().norm_forward(problem, begin, end, memory + at::get_thread_num() * bytes);
  });
  return {y, out.sum, out.rstd, out.aside};
}

Forward forward_meta(const at::Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                     const OptionalTensor& bias, const OptionalTensor& seed, double p, double eps,
                     bool center, bool need_sum, bool keep, at::IntArrayRef hidden, bool all_hidden,
                     int64_t bits) {
  check("layer_norm", input, residual, weight, bias, p);
  const Residuals out(input, need_sum, keep, hidden, all_hidden);
  return {at::empty_symint(input.sym_sizes(), input.options()), out.sum, out.rstd, out.aside};
}

void check_backward(const at::Tensor& grad_output, const OptionalTensor& output, const OptionalTensor& rstd,
                    const at::Tensor& aside, const OptionalTensor& weight, const OptionalTensor& bias,
                    at::IntArrayRef hidden, const std::array<bool, 4>& needs) {
  const int64_t columns = grad_output.size(-1);
  const int64_t rows = grad_output.numel() / columns;
  TORCH_CHECK(!output.has_value() || output->sizes() == grad_output.sizes(),
              "norm_backward: output must have grad_output's shape ", grad_output.sizes(), ", got ",
              output->sizes());
  TORCH_CHECK(!(needs[0] || needs[1]) || (rstd.has_value() && rstd->numel() == rows),
              "norm_backward: rstd must hold one number for each of ", rows, " rows");
  const auto count = output.has_value() ? static_cast<int64_t>(hidden.size()) : columns;
  TORCH_CHECK(aside.numel() == rows * count, "norm_backward: aside must be [", rows, ", ", count, "], got ",
              aside.sizes());
  for (int64_t j : hidden) {
    TORCH_CHECK(j >= 0 && j < columns, "norm_backward: hidden columns must be in [0, ", columns, "), got ",
                j);
  }
  for (const OptionalTensor* x : {&weight, &bias}) {
    TORCH_CHECK(!x->has_value() || (*x)->numel() == columns, "norm_backward: weight and bias must be [",
                columns, "]");
  }
}

// The parameters' gradients are wide; autograd narrows them.
Backward backward_composite(const at::Tensor& grad_output, const OptionalTensor& grad_sum,
                            const OptionalTensor& output, const OptionalTensor& rstd, const at::Tensor& aside,
                            const OptionalTensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& seed, double p, bool center, at::IntArrayRef hidden,
                            std::array<bool, 4> needs) {
  check_backward(grad_output, output, rstd, aside, weight, bias, hidden, needs);
  const auto type = grad_output.scalar_type();
  const auto wide = accumulation_type(type);
  const at::Tensor g = grad_output.contiguous().to(wide);
  const int64_t columns = g.size(-1);
  at::Tensor normalised;
  if (!output.has_value()) {
    normalised = aside.view(g.sizes());
  } else {
    normalised = output->to(wide);
    if (bias.has_value()) normalised = normalised.sub(bias->to(wide));
    if (weight.has_value()) normalised = normalised.mul(inverse_of(weight->to(wide), hidden));
    if (!hidden.empty()) {
      normalised = normalised.reshape({-1, columns})
                       .index_copy(1, at::tensor(hidden, g.options().dtype(at::kLong)), aside)
                       .view(g.sizes());
    }
  }
  const auto none = [&] { return at::empty({0}, grad_output.options()); };
  at::Tensor grad_input = none(), grad_residual = none(), grad_weight = none(), grad_bias = none();
  if (needs[2]) grad_weight = g.mul(normalised).view({-1, columns}).sum(0);
  if (needs[3]) grad_bias = g.view({-1, columns}).sum(0);
  if (needs[0] || needs[1]) {
    const at::Tensor h = weight.has_value() ? g.mul(weight->to(wide)) : g;
    std::vector<int64_t> shape = g.sizes().vec();
    shape.back() = 1;
    at::Tensor d = h.sub(normalised.mul(h.mul(normalised).mean({-1}, true)));
    if (center) d.sub_(h.mean({-1}, true));
    d.mul_(rstd->view(shape));
    if (grad_sum.has_value()) d.add_(*grad_sum);
    const bool drop = p > 0 && seed.has_value();
    if (needs[0]) {
      grad_input = (drop ? d.mul(flat_dropout_mask(d, *seed, p, d.options())) : d).to(type);
    }
    if (needs[1]) grad_residual = !drop && needs[0] ? grad_input.clone() : d.to(type);
  }
  return {grad_input, grad_residual, grad_weight, grad_bias};
}

Backward backward_cpu(const at::Tensor& grad_output, const OptionalTensor& grad_sum,
                      const OptionalTensor& output, const OptionalTensor& rstd, const at::Tensor& aside,
                      const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& seed,
                      double p, bool center, at::IntArrayRef hidden, std::array<bool, 4> needs) {
  if (!fused_on_cpu()) {
    return backward_composite(grad_output, grad_sum, output, rstd, aside, weight, bias, seed, p, center,
                              hidden, needs);
  }
  check_backward(grad_output, output, rstd, aside, weight, bias, hidden, needs);
  const auto type = grad_output.scalar_type();
  const auto wide = accumulation_type(type);
  const at::Tensor g = grad_output.contiguous();
  const at::Tensor g_sum = grad_sum.has_value() ? grad_sum->contiguous() : at::Tensor();
  const at::Tensor y = output.has_value() ? output->contiguous() : at::Tensor();
  const at::Tensor w = wide_parameter(weight, wide), b = wide_parameter(bias, wide);
  const at::Tensor inverse = y.defined() ? inverse_of(w, hidden) : at::Tensor();
  const auto none = [&] { return at::empty({0}, g.options()); };
  at::Tensor grad_input = none(), grad_residual = none(), grad_weight = none(), grad_bias = none();
  const int64_t columns = g.size(-1);
  kernels::NormBackward problem;
  problem.element = element_of(type);
  problem.columns = columns;
  problem.center = center;
  problem.grad_y = g.const_data_ptr();
  if (g_sum.defined()) problem.grad_sum = g_sum.const_data_ptr();
  if (y.defined()) problem.y = y.const_data_ptr();
  if (rstd.has_value()) problem.rstd = rstd->const_data_ptr();
  if (w.defined()) problem.weight = w.const_data_ptr();
  if (inverse.defined()) problem.inverse_weight = inverse.const_data_ptr();
  if (b.defined()) problem.bias = b.const_data_ptr();
  if (aside.numel() > 0) {
    problem.aside = aside.const_data_ptr();
    problem.aside_count = aside.size(1);
    problem.aside_columns = hidden.data();
  }
  if (p > 0 && seed.has_value()) {
    problem.drop_threshold = kernels::dropout_threshold(p);
    problem.seed = seed_of(*seed);
  }
  if (needs[0]) {
    grad_input = at::empty_like(g);
    problem.grad_x = grad_input.mutable_data_ptr();
  }
  if (needs[1]) {
    grad_residual = at::empty_like(g);
    problem.grad_residual = grad_residual.mutable_data_ptr();
  }
  // Each lane sums its rows' share of the parameters' gradients, so that the same number of threads gives
  // the same bits.
  const int64_t rows = g.numel() / columns;
  const int64_t lanes =
      std::clamp<int64_t>(rows * columns / 16384, 1, std::max<int64_t>(1, at::get_num_threads()));
  const at::Tensor sums =
      needs[2] || needs[3] ? at::zeros({lanes, 2, columns}, g.options().dtype(wide)) : at::Tensor();
  const int64_t bytes = kernels::norm_scratch_bytes(columns);
  const at::Tensor scratch = at::empty({lanes, bytes}, g.options().dtype(at::kByte));
  auto* const memory = scratch.mutable_data_ptr<uint8_t>();
  auto* const partial = sums.defined() ? static_cast<uint8_t*>(sums.mutable_data_ptr()) : nullptr;
  const int64_t vector_bytes = columns * static_cast<int64_t>(c10::elementSize(wide));
  at::parallel_for(0, lanes, 1, [&](int64_t first, int64_t last) {
    for (int64_t lane = first; lane < last; ++lane) {
      kernels::NormBackward own = problem;
      if (needs[2]) own.grad_weight = partial + 2 * lane * vector_bytes;
      if (needs[3]) own.grad_bias = partial + (2 * lane + 1) * vector_bytes;
      kernels::step_kernels().norm_backward(own, rows * lane / lanes, rows * (lane + 1) / lanes,
                                            memory + lane * bytes);
    }
  });
  if (needs[2]) grad_weight = sums.select(1, 0).sum(0);
  if (needs[3]) grad_bias = sums.select(1, 1).sum(0);
  return {grad_input, grad_residual, grad_weight, grad_bias};
}

Backward backward_meta(const at::Tensor& grad_output, const OptionalTensor& grad_sum,
                       const OptionalTensor& output, const OptionalTensor& rstd, const at::Tensor& aside,
                       const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& seed,
                       double p, bool center, at::IntArrayRef hidden, std::array<bool, 4> needs) {
  const auto like = [&](bool wanted, const at::Tensor& x) {
    return wanted ? at::empty_symint(x.sym_sizes(), x.options()) : at::empty({0}, grad_output.options());
  };
  const auto sums = [&](bool wanted) {
    return wanted
               ? at::empty_symint({grad_output.sym_size(-1)},
                                  grad_output.options().dtype(accumulation_type(grad_output.scalar_type())))
               : at::empty({0}, grad_output.options());
  };
  return {like(needs[0], grad_output), like(needs[1], grad_output), sums(needs[2]), sums(needs[3])};
}

c10::TypedOperatorHandle<decltype(forward_cpu)> forward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::norm_forward", "")
                             .typed<decltype(forward_cpu)>();
  return op;
}

at::Tensor layer_norm_op(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                         double eps, c10::string_view policy) {
  const int64_t bits = parse_bits("layer_norm", policy, "quantized", {8, 4, 2});
  check("layer_norm", input, std::nullopt, weight, bias, 0);
  return std::get<0>(forward_op().call(input, std::nullopt, weight, bias, std::nullopt, 0.0, eps, true, false,
                                       false, {}, false, bits));
}

at::Tensor rms_norm_op(const at::Tensor& input, const OptionalTensor& weight, std::optional<double> eps,
                       c10::string_view policy) {
  const int64_t bits = parse_bits("rms_norm", policy, "quantized", {8, 4, 2});
  check("rms_norm", input, std::nullopt, weight, std::nullopt, 0);
  // Of the type that is computed in, as in torch.
  const double machine = input.scalar_type() == at::kDouble ? std::numeric_limits<double>::epsilon()
                                                            : std::numeric_limits<float>::epsilon();
  return std::get<0>(forward_op().call(input, std::nullopt, weight, std::nullopt, std::nullopt, 0.0,
                                       eps.value_or(machine), false, false, false, {}, false, bits));
}

std::tuple<at::Tensor, at::Tensor> dropout_add_layer_norm_op(const at::Tensor& input,
                                                             const at::Tensor& residual, double p,
                                                             const OptionalTensor& weight,
                                                             const OptionalTensor& bias, double eps,
                                                             const std::optional<at::Generator>& generator,
                                                             bool need_sum, c10::string_view policy) {
  const int64_t bits = parse_bits("dropout_add_layer_norm", policy, "quantized", {8, 4, 2});
  check("dropout_add_layer_norm", input, residual, weight, bias, p);
  static const auto draw = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("remnant::draw_seed", "")
                               .typed<at::Tensor(const at::Tensor&, const std::optional<at::Generator>&)>();
  const OptionalTensor seed = p > 0 ? OptionalTensor(draw.call(input.detach(), generator)) : std::nullopt;
  auto [output, sum, rstd, aside] =
      forward_op().call(input, residual, weight, bias, seed, p, eps, true, need_sum, false, {}, false, bits);
  return {output, sum};
}

}  // namespace

HiddenColumns hidden_columns(const at::Tensor& input, const OptionalTensor& weight,
                             const OptionalTensor& bias, int64_t bits) {
  HiddenColumns hidden;
  if (!weight.has_value() && !bias.has_value()) return hidden;
  if (is_traced(input) || (weight.has_value() && is_traced(*weight)) ||
      (bias.has_value() && is_traced(*bias))) {
    hidden.all = true;
    return hidden;
  }
  const auto wide = accumulation_type(input.scalar_type());
  const auto values = [&](const OptionalTensor& x) {
    return x.has_value() ? x->detach().to(at::kCPU, wide).contiguous() : at::Tensor();
  };
  const at::Tensor w = values(weight), b = values(bias);
  const double most = c10::elementSize(input.scalar_type()) == 2 ? kMostBiasOfHalf : kMostBias;
  const int64_t columns = input.size(-1);
  AT_DISPATCH_FLOATING_TYPES(wide, "norm", [&] {
    find_hidden(w.defined() ? w.const_data_ptr<scalar_t>() : nullptr,
                b.defined() ? b.const_data_ptr<scalar_t>() : nullptr, columns, static_cast<scalar_t>(most),
                hidden.list);
    if (bits > 0 && w.defined()) {
      find_hidden_by_codes(w.const_data_ptr<scalar_t>(), b.defined() ? b.const_data_ptr<scalar_t>() : nullptr,
                           columns, bits, hidden.list);
    }
  });
  const auto count = static_cast<int64_t>(hidden.list.size());
  const int64_t wide_bits = 8 * static_cast<int64_t>(c10::elementSize(wide));
  if (count == columns || (bits > 0 && count * wide_bits > columns * bits)) hidden = {{}, true};
  return hidden;
}

TORCH_LIBRARY_FRAGMENT(remnant, m) {
  m.impl("layer_norm", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(layer_norm_op));
  m.impl("rms_norm", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(rms_norm_op));
  m.impl("dropout_add_layer_norm", c10::DispatchKey::CompositeImplicitAutograd,
         TORCH_FN(dropout_add_layer_norm_op));
  m.impl("norm_forward", c10::DispatchKey::CPU, TORCH_FN(forward_cpu));
  m.impl("norm_forward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(forward_composite));
  m.impl("norm_forward", c10::DispatchKey::Meta, TORCH_FN(forward_meta));
  m.impl("norm_backward", c10::DispatchKey::CPU, TORCH_FN(backward_cpu));
  m.impl("norm_backward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(backward_composite));
  m.impl("norm_backward", c10::DispatchKey::Meta, TORCH_FN(backward_meta));
}

}  // namespace ops

at::Tensor layer_norm(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                      const std::optional<at::Tensor>& bias, double eps, c10::string_view policy) {
  // Through the dispatcher, where autocast sees it.
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::layer_norm", "")
                             .typed<decltype(ops::layer_norm_op)>();
  return op.call(input, weight, bias, eps, policy);
}

at::Tensor rms_norm(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                    std::optional<double> eps, c10::string_view policy) {
  // Through the dispatcher, where autocast sees it.
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::rms_norm", "")
                             .typed<decltype(ops::rms_norm_op)>();
  return op.call(input, weight, eps, policy);
}

std::tuple<at::Tensor, at::Tensor> dropout_add_layer_norm(const at::Tensor& input, const at::Tensor& residual,
                                                          double p, const std::optional<at::Tensor>& weight,
                                                          const std::optional<at::Tensor>& bias, double eps,
                                                          const std::optional<at::Generator>& generator,
                                                          bool need_sum, c10::string_view policy) {
  // Through the dispatcher, where autocast sees it.
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::dropout_add_layer_norm", "")
                             .typed<decltype(ops::dropout_add_layer_norm_op)>();
  return op.call(input, residual, p, weight, bias, eps, generator, need_sum, policy);
}

}  // namespace remnant
