#include <remnant/ops/conv.h>

#include "kernels/cpu/step_kernels.h"
#include "ops/attention_common.h"
#include "ops/codes.h"
#include "ops/conv.h"
#include "ops/conv_inverse.h"
#include "ops/step_common.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/conv_transpose2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

namespace remnant {

namespace ops {

namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr double kTau = 0.05;
constexpr double kMostKept = 0.75;
// Systems are solved anew for each batch: beyond these they cost more than the input is worth, in time and in
// the peak. In numbers, and in inputs.
constexpr int64_t kSmallSystems = int64_t{1} << 21, kMostSystems = 4;

void check_geometry(const char* op, const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                    at::IntArrayRef dilation, int64_t groups) {
  TORCH_CHECK(weight.dim() == 4, op, ": weight must be [O, C / groups, kh, kw], got ", weight.sym_sizes());
  TORCH_CHECK(groups >= 1 && weight.sym_size(0) % groups == 0, op, ": groups must divide weight's ",
              weight.sym_size(0), " outputs, got ", groups);
  for (int i = 0; i < 2; ++i) {
    TORCH_CHECK(stride[i] >= 1 && padding[i] >= 0 && dilation[i] >= 1, op,
                ": stride and dilation must be at least 1 and padding at least 0, got ", stride, ", ",
                dilation, " and ", padding);
  }
}

void check(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
           at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  check_floating("conv2d", "input", input);
  TORCH_CHECK(input.dim() == 4, "conv2d: input must be [N, C, H, W], got ", input.sym_sizes());
  check_geometry("conv2d", weight, stride, padding, dilation, groups);
  TORCH_CHECK(weight.scalar_type() == input.scalar_type(), "conv2d: weight must have input's dtype ",
              toString(input.scalar_type()), ", got ", toString(weight.scalar_type()));
  TORCH_CHECK(input.sym_size(1) == weight.sym_size(1) * groups, "conv2d: input must have ",
              weight.sym_size(1) * groups, " channels (weight's ", weight.sym_size(1), " times ", groups,
              " groups), got ", input.sym_size(1));
  TORCH_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0)),
              "conv2d: bias must be [", weight.sym_size(0), "], one an output, got ", bias->sym_sizes());
}

// --- codes -----------------------------------------------------------------------------------------

at::Tensor coded_forward(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                         at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                         int64_t groups, int64_t bits, const std::optional<at::Generator>& generator) {
  check(input, weight, bias, stride, padding, dilation, groups);
  return at::conv2d(input, weight, bias, stride, padding, dilation, groups);
}

at::Tensor backward_to_input(const at::Tensor& grad, const at::Tensor& weight, at::IntArrayRef input,
                             at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                             int64_t groups) {
  std::array<int64_t, 2> left;  // input positions that no output reads
  for (int i = 0; i < 2; ++i) {
    const int64_t reach = dilation[i] * (weight.size(2 + i) - 1) + 1;
    left[i] = input[2 + i] + 2 * padding[i] - reach - (grad.size(2 + i) - 1) * stride[i];
  }
  return at::conv_transpose2d(grad, weight, OptionalTensor(), stride, padding, left, groups, dilation);
}

/// What runs of samples make: input(first, count) gives their inputs.
template <typename Input>
std::array<at::Tensor, 3> backward_by_samples(const at::Tensor& grad, const at::Tensor& weight,
                                              const ConvGeometry& shape, std::array<bool, 3> needs,
                                              int64_t at_once, Input input) {
  std::array<at::Tensor, 3> result;
  const auto wide = accumulation_type(weight.scalar_type());
  if (needs[2]) result[2] = grad.sum(at::IntArrayRef{0, 2, 3});
  if (!needs[1]) {
    if (needs[0]) {
      result[0] = backward_to_input(grad, weight, shape.input, shape.stride, shape.padding, shape.dilation,
                                    shape.groups);
    }
    return result;
  }
  if (needs[0]) result[0] = at::empty(shape.input, grad.options(), grad.suggest_memory_format());
  result[1] = at::zeros(weight.sizes(), weight.options().dtype(wide));
  const int64_t samples = grad.size(0);
  for (int64_t first = 0; first < samples; first += at_once) {
    const int64_t count = std::min(at_once, samples - first);
    const auto [dx, dw, db] = at::convolution_backward(
        grad.narrow(0, first, count), input(first, count), weight, std::nullopt, shape.stride, shape.padding,
        shape.dilation, false, at::IntArrayRef{0, 0}, shape.groups, {needs[0], true, false});
    if (needs[0]) result[0].narrow(0, first, count).copy_(dx);
    result[1].add_(dw);
  }
  result[1] = result[1].to(weight.scalar_type());
  return result;
}

Gradients or_empty(std::array<at::Tensor, 3> grads, const at::Tensor& like) {
  for (at::Tensor& each : grads) {
    if (!each.defined()) each = at::empty({0}, like.options());
  }
  return {grads[0], grads[1], grads[2]};
}

Gradients coded_backward(const at::Tensor& grad_output, const OptionalTensor& codes,
                         const OptionalTensor& table, const at::Tensor& weight, at::IntArrayRef input,
                         at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                         int64_t groups, int64_t bits, std::array<bool, 3> needs) {
  const ConvGeometry shape{input.vec(), stride.vec(), padding.vec(), dilation.vec(), groups};
  const int64_t sample = input[1] * input[2] * input[3], size = input[0] * sample;
  TORCH_CHECK(!needs[1] || (codes.has_value() && table.has_value() &&
                            codes->numel() == kernels::code_bytes(size, bits)),
              "conv2d_coded_backward: codes must hold ", input, " at ", bits, " bits");
  // Runs of samples begin at a group of codes.
  int64_t at_once = samples_at_once(sample);
  while (at_once < input[0] && at_once * sample % kernels::kCodeGroup != 0) ++at_once;
  const auto decoded = [&](int64_t first, int64_t count) {
    at::Tensor x = at::empty({count, input[1], input[2], input[3]}, grad_output.options());
    decode_into({*codes, *table}, bits, size, first * sample, x);
    return x;
  };
  return or_empty(backward_by_samples(grad_output, weight, shape, needs, at_once, decoded), grad_output);
}

at::Tensor coded_forward_meta(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                              int64_t groups, int64_t bits, const std::optional<at::Generator>& generator) {
  check(input, weight, bias, stride, padding, dilation, groups);
  return at::conv2d(input, weight, bias, stride, padding, dilation, groups);
}

Gradients coded_backward_meta(const at::Tensor& grad_output, const OptionalTensor& codes,
                              const OptionalTensor& table, const at::Tensor& weight,
                              c10::SymIntArrayRef input, at::IntArrayRef stride, at::IntArrayRef padding,
                              at::IntArrayRef dilation, int64_t groups, int64_t bits,
                              std::array<bool, 3> needs) {
  const auto made = [&](bool wanted, c10::SymIntArrayRef size) {
    return wanted ? at::empty_symint(size, grad_output.options()) : at::empty({0}, grad_output.options());
  };
  return {made(needs[0], input), made(needs[1], weight.sym_sizes()), made(needs[2], {weight.sym_size(0)})};
}

// --- 1 x 1 -----------------------------------------------------------------------------------------

// A 1 x 1 convolution's matrix [groups, out, in], inverted; the positions of input and output that meet.
struct Pointwise {
  Pointwise(const at::Tensor& weight, const ConvGeometry& shape, bool least)
      : groups(shape.groups), out(weight.size(0) / groups), in(weight.size(1)) {
    for (int i = 0; i < 2; ++i) {
      const int64_t s = shape.stride[i], p = shape.padding[i], size = shape.input[2 + i];
      const int64_t outputs = (size + 2 * p - 1) / s + 1;
      skipped[i] = std::min((p + s - 1) / s, outputs);
      const int64_t end = std::min(outputs, (size + p + s - 1) / s);
      count[i] = std::max<int64_t>(0, end - skipped[i]);
      start[i] = skipped[i] * s - p;
      step[i] = s;
    }
    const at::Tensor matrix = weight.view({groups, out, in}).to(at::kDouble);
    const auto [u, values, vh] = at::linalg_svd(matrix, out < in);
    const int64_t rank = std::min(out, in);
    const double rms = std::sqrt(values.square().mean().item<double>());
    const at::Tensor small = values.lt(kTau * rms).logical_or_(values.eq(0));
    const at::Tensor reciprocal = at::where(small, at::zeros({}, values.options()), values.reciprocal());
    amplification = std::sqrt(reciprocal.square().sum().item<double>() / static_cast<double>(groups * in)) *
                    rms * std::sqrt(static_cast<double>(rank) / static_cast<double>(out));
    inverse = at::matmul(vh.narrow(1, 0, rank).mT() * reciprocal.unsqueeze(1), u.narrow(2, 0, rank).mT())
                  .to(weight.scalar_type());
    if (least) return;
    at::Tensor kept = small;
    if (rank < in) kept = at::cat({kept, at::ones({groups, in - rank}, small.options())}, 1);
    const at::Tensor found = kept.nonzero();
    if (found.size(0) == 0) return;
    // Each kept direction in its own group's channels.
    const at::Tensor group = found.select(1, 0);
    const at::Tensor rows = vh.reshape({groups * in, in}).index_select(0, group * in + found.select(1, 1));
    basis = at::zeros({found.size(0), groups, in}, rows.options());
    basis.scatter_(1, group.view({-1, 1, 1}).expand({-1, 1, in}), rows.unsqueeze(1));
    basis = basis.view({-1, groups * in}).to(weight.scalar_type());
  }

  at::Tensor of_input(const at::Tensor& x) const {
    at::Tensor part = x;
    for (int i = 0; i < 2; ++i) {
      part = count[i] == 0 ? part.narrow(2 + i, 0, 0)
                           : part.slice(2 + i, start[i], start[i] + (count[i] - 1) * step[i] + 1, step[i]);
    }
    return part;
  }
  at::Tensor of_output(const at::Tensor& y) const {
    return y.narrow(2, skipped[0], count[0]).narrow(3, skipped[1], count[1]);
  }
  at::Tensor coordinates(const at::Tensor& part) const {
    if (part.numel() == 0)
      return at::empty({part.size(0), basis.size(0), part.size(2), part.size(3)}, part.options());
    return at::conv2d(part, basis.view({basis.size(0), basis.size(1), 1, 1}));
  }
  /// inverse times rows of outputs [.., C out], any trailing columns: [groups in, columns].
  at::Tensor apply(const at::Tensor& y) const {
    return at::bmm(inverse, y.view({groups, out, -1})).view({groups * in, -1});
  }

  int64_t groups, out, in;
  Pair start, step, count, skipped;
  at::Tensor inverse, basis;
  double amplification = 0;
};

// [n, C, h, w] as [C, n h w].
at::Tensor by_channel(const at::Tensor& x) { return x.transpose(0, 1).reshape({x.size(1), -1}); }

at::Tensor minus_bias(const at::Tensor& y, const OptionalTensor& bias) {
  return bias.has_value() ? y - bias->view({1, -1, 1, 1}) : y;
}

bool is_pointwise(const at::Tensor& weight) { return weight.size(2) == 1 && weight.size(3) == 1; }

// Signs of a run of samples.
at::Tensor signs_of(const at::Tensor& signs, int64_t first, int64_t count, int64_t samples) {
  const int64_t each = signs.size(0) / std::max<int64_t>(1, samples);
  return signs.narrow(0, first * each, count * each);
}

void require(bool right, double error, at::ScalarType type) {
  if (right) return;
  count(Inversion::failed);
  TORCH_CHECK(false, "conv2d: the input that policy 'invert' rebuilt is off by ", error,
              " of its size, expected at most ", largest_error(type),
              ": the output or the weight was changed behind autograd's back, or the bias is so large beside "
              "the rest of the output that it hides it; leave them alone until the backward, or use policy "
              "'exact'");
}

void require_right(double error, at::ScalarType type) {
  // NaN: the output has NaN or Inf, and the gradient shows it.
  require(std::isnan(error) || error <= largest_error(type), error, type);
}

// Other directions than those whose coordinates were kept: another weight.
void require_same(const at::Tensor& coordinates, int64_t wanted, at::ScalarType type) {
  require((coordinates.defined() ? coordinates.size(1) : 0) == wanted,
          std::numeric_limits<double>::infinity(), type);
}

std::array<at::Tensor, 3> pointwise_backward(const at::Tensor& grad, const at::Tensor& output,
                                             const KeptOfInput& kept, const at::Tensor& weight,
                                             const OptionalTensor& bias, const ConvGeometry& shape,
                                             bool least, std::array<bool, 3> needs) {
  const Pointwise map(weight, shape, least);
  require_same(kept.coordinates, map.basis.defined() ? map.basis.size(0) : 0, weight.scalar_type());
  std::array<at::Tensor, 3> result = backward_by_samples(grad, weight, shape, {needs[0], false, needs[2]}, 1,
                                                         [](int64_t, int64_t) { return at::Tensor(); });
  const int64_t g = map.groups, samples = grad.size(0);
  const auto options = grad.options();
  at::Tensor products = at::zeros({g, map.out, map.out}, options), seen, with_kept;
  at::Tensor probes, signs;
  if (!least) {
    signs = probe_signs(samples * map.count[0] * map.count[1], options);
    seen = at::zeros({g * map.in, 4}, options);
  }
  if (kept.coordinates.defined()) with_kept = at::zeros({grad.size(1), map.basis.size(0)}, options);
  const int64_t at_once = samples_at_once(grad.size(1) * map.count[0] * map.count[1]);
  for (int64_t first = 0; first < samples; first += at_once) {
    const int64_t count = std::min(at_once, samples - first);
    const at::Tensor dy = by_channel(map.of_output(grad.narrow(0, first, count)));
    const at::Tensor y = by_channel(minus_bias(map.of_output(output.narrow(0, first, count)), bias));
    products.baddbmm_(dy.view({g, map.out, -1}), y.view({g, map.out, -1}).mT());
    at::Tensor z;
    if (kept.coordinates.defined()) {
      z = by_channel(kept.coordinates.narrow(0, first, count));
      with_kept.addmm_(dy, z.t());
    }
    if (!least) {
      const at::Tensor part = signs_of(signs, first, count, samples);
      seen.add_(map.apply(at::mm(y, part)));
      if (z.defined()) seen.addmm_(map.basis.t(), at::mm(z, part));
    }
  }
  if (!least) require_right(probe_error(seen, kept.probes), weight.scalar_type());
  at::Tensor dw = at::bmm(products, map.inverse.mT());
  if (with_kept.defined()) {
    // [groups out, groups in]: only what stays within a group.
    const at::Tensor whole = at::mm(with_kept, map.basis).view({g, map.out, g, map.in});
    dw = dw + whole.diagonal(0, 0, 2).permute({2, 0, 1});
  }
  result[1] = dw.reshape(weight.sizes());
  return result;
}

// error: of the input as the backward will rebuild it.
KeptOfInput keep_of_pointwise(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                              const at::Tensor& output, const ConvGeometry& shape, bool least,
                              double& error) {
  KeptOfInput kept;
  error = 0;
  const Pointwise map(weight, shape, least);
  if (least) return kept;
  const int64_t samples = input.size(0);
  const at::Tensor signs = probe_signs(samples * map.count[0] * map.count[1], input.options());
  kept.probes = at::zeros({input.size(1), 4}, input.options());
  at::Tensor seen = at::zeros_like(kept.probes);
  std::vector<at::Tensor> coordinates;
  const int64_t at_once = samples_at_once(input.size(1) * map.count[0] * map.count[1]);
  for (int64_t first = 0; first < samples; first += at_once) {
    const int64_t count = std::min(at_once, samples - first);
    const at::Tensor x = map.of_input(input.narrow(0, first, count));
    const at::Tensor part = signs_of(signs, first, count, samples);
    kept.probes.addmm_(by_channel(x), part);
    const at::Tensor y = by_channel(minus_bias(map.of_output(output.narrow(0, first, count)), bias));
    seen.add_(map.apply(at::mm(y, part)));
    if (map.basis.defined()) {
      coordinates.push_back(map.coordinates(x).contiguous());
      seen.addmm_(map.basis.t(), at::mm(by_channel(coordinates.back()), part));
    }
  }
  if (map.basis.defined())
    kept.coordinates = coordinates.size() == 1 ? coordinates[0] : at::cat(coordinates, 0);
  error = probe_error(seen, kept.probes);
  return kept;
}

// --- larger kernels --------------------------------------------------------------------------------

struct Decision {
  std::string reason;  // why not to invert
  double share = 0;    // of the input that is kept
  double amplification = 0;
};

Decision decide(const at::Tensor& weight, const ConvGeometry& shape, double coordinates, double amplification,
                int64_t ring) {
  Decision made;
  const double sample = static_cast<double>(shape.input[1] * shape.input[2] * shape.input[3]);
  made.amplification = amplification;
  made.share = (coordinates + static_cast<double>(ring * weight.size(0))) / sample;
  if (made.share > kMostKept) {
    std::ostringstream text;
    text.precision(3);
    text << "what the output does not tell is " << made.share << " of the input";
    made.reason = text.str();
  }
  return made;
}

std::string hopeless(const at::Tensor& weight, const ConvGeometry& shape) {
  if (weight.scalar_type() != at::kFloat && weight.scalar_type() != at::kDouble) return "half precision";
  if (weight.size(1) == 1 && shape.groups > 1) return "depthwise, one input channel a group";
  if (weight.numel() == 0 || shape.input[2] * shape.input[3] == 0) return "empty";
  if (!weight.isfinite().all().item<bool>()) return "weight has NaN or Inf";
  if (weight.eq(0).all().item<bool>()) return "weight is 0";
  return "";
}

struct Systems {
  Systems(const at::Tensor& weight, const ConvGeometry& given, bool keep_basis)
      : shape(given.input, weight.sizes(), given.stride, given.padding, given.dilation, given.groups),
        weight(shape.unfold_weight(weight)),
        transform(shape.full, weight.options()),
        inverse(shape, transform, this->weight, kTau, keep_basis) {}
  Systems(const Systems&) = delete;
  Systems& operator=(const Systems&) = delete;

  int64_t at_once() const {
    return samples_at_once(shape.full[0] * shape.full[1] * shape.groups *
                           std::max(shape.out_channels, shape.unknowns()));
  }
  /// y without bias and with what was kept of those samples: x, channels last.
  at::Tensor rebuild(const at::Tensor& y, const at::Tensor& ring, const at::Tensor& coordinates) const {
    return shape.fold(inverse.solve(shape.join(y, ring), coordinates));
  }

  FullConvolution shape;
  at::Tensor weight;
  GridTransform transform;
  FrequencyInverse inverse;
};

// [n, C, H, W] as [n, H W C].
at::Tensor flat(const at::Tensor& x) { return x.permute({0, 2, 3, 1}).reshape({x.size(0), -1}); }

at::Tensor some(const at::Tensor& x, int64_t first, int64_t count) {
  return x.defined() ? x.narrow(0, first, count) : x;
}

std::string off_by(double error) {
  std::ostringstream text;
  text.precision(3);
  text << "rebuilt for trial it is off by " << error;
  return text.str();
}

// Samples from which on the systems are in proportion to the input.
int64_t smallest_batch(const FullConvolution& shape) {
  const int64_t systems =
      (shape.full[0] / 2 + 1) * shape.full[1] * shape.groups * 4 * shape.out_channels * shape.unknowns();
  const int64_t sample = shape.groups * shape.in_channels * shape.size[0] * shape.size[1];
  return systems <= kSmallSystems ? 1 : (systems + kMostSystems * sample - 1) / (kMostSystems * sample);
}

std::string needs_batch(int64_t samples) {
  return "a batch of fewer than " + std::to_string(samples) + " samples is small beside its systems";
}

}  // namespace

KeptOfInput keep_of_input(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                          const at::Tensor& output, const ConvGeometry& shape, bool least) {
  KeptOfInput kept;
  const auto keep_input = [&](std::string reason) {
    count(Inversion::kept);
    KeptOfInput whole;
    whole.input = input;
    whole.reason = std::move(reason);
    return whole;
  };
  if (input.numel() == 0) return keep_input("empty");
  if (std::string reason = hopeless(weight, shape); !reason.empty()) return keep_input(std::move(reason));
  if (is_pointwise(weight)) {
    double error = 0;
    kept = keep_of_pointwise(input, weight, bias, output, shape, least, error);
    const double share = kept.coordinates.defined() ? static_cast<double>(kept.coordinates.numel()) /
                                                          static_cast<double>(input.numel())
                                                    : 0;
    if (share > kMostKept) return keep_input("what the output does not tell is most of the input");
    // NaN: the input has NaN or Inf, and the gradient will show it.
    if (error > largest_error(weight.scalar_type())) return keep_input(off_by(error));
    return kept;
  }
  const FullConvolution full(shape.input, weight.sizes(), shape.stride, shape.padding, shape.dilation,
                             shape.groups);
  if (const int64_t least_batch = smallest_batch(full); input.size(0) < least_batch) {
    return keep_input(needs_batch(least_batch));
  }
  const Systems systems(weight, shape, !least);
  const FullConvolution& whole = systems.shape;
  const Decision made = decide(weight, shape, 2.0 * static_cast<double>(systems.inverse.coordinates()),
                               systems.inverse.amplification(), whole.ring_positions());
  if (!made.reason.empty()) return keep_input(made.reason);
  const int64_t samples = input.size(0), at_once = systems.at_once();
  const bool coordinates = systems.inverse.coordinates() > 0;
  kept.ring = at::empty({samples, whole.ring_positions(), weight.size(0)}, input.options());
  at::Tensor signs;
  if (!least) {
    signs = probe_signs(input.numel() / samples, input.options());
    kept.probes = at::empty({samples, 4}, input.options());
    if (coordinates) {
      kept.coordinates = at::empty({samples, systems.inverse.coordinates(), 2}, input.options());
    }
  }
  for (int64_t first = 0; first < samples; first += at_once) {
    const int64_t count = std::min(at_once, samples - first);
    const at::Tensor x = input.narrow(0, first, count), phases = whole.unfold(x);
    kept.ring.narrow(0, first, count).copy_(whole.ring(phases, systems.weight));
    if (least) continue;
    kept.probes.narrow(0, first, count).copy_(at::mm(flat(x), signs));
    if (coordinates) {
      kept.coordinates.narrow(0, first, count)
          .copy_(systems.inverse.coordinates_of(phases.permute({0, 2, 3, 1}).contiguous()));
    }
  }
  if (!least) {
    const at::Tensor x = input.narrow(0, 0, 1);
    const at::Tensor rebuilt = systems.rebuild(minus_bias(output.narrow(0, 0, 1), bias),
                                               some(kept.ring, 0, 1), some(kept.coordinates, 0, 1));
    const double error = (rebuilt - x).norm().item<double>() / x.norm().item<double>();
    if (error > largest_error(weight.scalar_type())) return keep_input(off_by(error));
  }
  return kept;
}

std::array<at::Tensor, 3> rebuilt_backward(const at::Tensor& grad_output, const at::Tensor& output,
                                           const KeptOfInput& kept, const at::Tensor& weight,
                                           const OptionalTensor& bias, const ConvGeometry& shape, bool least,
                                           std::array<bool, 3> needs) {
  const auto none = [](int64_t, int64_t) { return at::Tensor(); };
  if (!needs[1]) return backward_by_samples(grad_output, weight, shape, needs, 1, none);
  if (kept.input.defined()) {
    return backward_by_samples(grad_output, weight, shape, needs, grad_output.size(0),
                               [&](int64_t, int64_t) { return kept.input; });
  }
  count(Inversion::rebuilt);
  if (is_pointwise(weight)) {
    return pointwise_backward(grad_output, output, kept, weight, bias, shape, least, needs);
  }
  const Systems systems(weight, shape, !least);
  require_same(kept.coordinates, systems.inverse.coordinates(), weight.scalar_type());
  at::Tensor signs;
  if (!least) {
    signs = probe_signs(shape.input[1] * shape.input[2] * shape.input[3], weight.options());
  }
  return backward_by_samples(
      grad_output, weight, shape, needs, systems.at_once(), [&](int64_t first, int64_t count) {
        at::Tensor x = systems.rebuild(minus_bias(output.narrow(0, first, count), bias),
                                       some(kept.ring, first, count), some(kept.coordinates, first, count));
        if (!least) {
          require_right(probe_error(at::mm(flat(x), signs), some(kept.probes, first, count)),
                        weight.scalar_type());
        }
        return x;
      });
}

namespace {

at::Tensor rebuilt_forward(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                           at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                           int64_t groups, bool least) {
  check(input, weight, bias, stride, padding, dilation, groups);
  return at::conv2d(input, weight, bias, stride, padding, dilation, groups);
}

at::Tensor conv2d_op(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                     int64_t groups, c10::string_view policy, const std::optional<at::Generator>& generator) {
  check(input, weight, bias, stride, padding, dilation, groups);
  if (policy == "exact") return at::conv2d(input, weight, bias, stride, padding, dilation, groups);
  if (policy == "invert" || policy == "min_norm") {
    if (is_traced(input)) return at::conv2d(input, weight, bias, stride, padding, dilation, groups);
    static const auto rebuilt = c10::Dispatcher::singleton()
                                    .findSchemaOrThrow("remnant::conv2d_rebuilt", "")
                                    .typed<decltype(rebuilt_forward)>();
    return rebuilt.call(input, weight, bias, stride, padding, dilation, groups, policy == "min_norm");
  }
  int64_t bits = 0;
  for (const int64_t each : {8, 4, 2}) {
    if (policy == "quantized:bits=" + std::to_string(each)) bits = each;
  }
  TORCH_CHECK(bits != 0, "conv2d: unknown policy '", policy,
              "'; expected one of 'exact', 'quantized:bits=8', 'quantized:bits=4', 'quantized:bits=2', "
              "'invert', 'min_norm'");
  static const auto coded = c10::Dispatcher::singleton()
                                .findSchemaOrThrow("remnant::conv2d_coded", "")
                                .typed<decltype(coded_forward)>();
  return coded.call(input, weight, bias, stride, padding, dilation, groups, bits, generator);
}

std::string inversion_op(const at::Tensor& weight, at::IntArrayRef input_size, at::IntArrayRef stride,
                         at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  TORCH_CHECK(input_size.size() == 2, "conv2d_inversion: input_size must be [H, W], got ", input_size);
  TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
              "conv2d_inversion: stride, padding and dilation must be two numbers each, got ", stride, ", ",
              padding, " and ", dilation);
  check_geometry("conv2d_inversion", weight, stride, padding, dilation, groups);
  for (int i = 0; i < 2; ++i) {
    TORCH_CHECK(input_size[i] >= 0 && input_size[i] + 2 * padding[i] > dilation[i] * (weight.size(2 + i) - 1),
                "conv2d_inversion: the kernel ", weight.sizes(), " is larger than the padded input ",
                input_size);
  }
  const ConvGeometry shape{{1, weight.size(1) * groups, input_size[0], input_size[1]},
                           stride.vec(),
                           padding.vec(),
                           dilation.vec(),
                           groups};
  const at::Tensor w = weight.detach();
  Decision made;
  int64_t least_batch = 1;
  made.reason = hopeless(w, shape);
  if (made.reason.empty()) {
    if (is_pointwise(w)) {
      const Pointwise map(w, shape, false);
      const int64_t kept = map.basis.defined() ? map.basis.size(0) : 0;
      made = decide(w, shape, static_cast<double>(kept * map.count[0] * map.count[1]), map.amplification, 0);
    } else {
      const Systems systems(w, shape, true);
      made = decide(w, shape, 2.0 * static_cast<double>(systems.inverse.coordinates()),
                    systems.inverse.amplification(), systems.shape.ring_positions());
      least_batch = smallest_batch(systems.shape);
    }
  }
  if (!made.reason.empty()) return "exact: " + made.reason;
  std::ostringstream text;
  text.precision(3);
  text << "invert: keeps " << made.share << " of the input, amplification " << made.amplification;
  if (least_batch > 1) text << "; " << needs_batch(least_batch) << ", and is kept";
  return text.str();
}

std::tuple<double, double> inversion_error_op(const at::Tensor& input, const at::Tensor& weight,
                                              const OptionalTensor& bias, at::IntArrayRef stride,
                                              at::IntArrayRef padding, at::IntArrayRef dilation,
                                              int64_t groups) {
  check(input, weight, bias, stride, padding, dilation, groups);
  const at::NoGradGuard no_grad;
  const at::Tensor y = at::conv2d(input, weight, bias, stride, padding, dilation, groups);
  const ConvGeometry shape{input.sizes().vec(), stride.vec(), padding.vec(), dilation.vec(), groups};
  const KeptOfInput kept = keep_of_input(input, weight, bias, y, shape, false);
  if (kept.input.defined()) return {0, 1};
  int64_t elements = 0;
  for (const at::Tensor& each : {kept.ring, kept.coordinates, kept.probes}) {
    if (each.defined()) elements += each.numel();
  }
  const double share = static_cast<double>(elements) / static_cast<double>(input.numel());
  at::Tensor rebuilt, wanted = input;
  if (is_pointwise(weight)) {
    const Pointwise map(weight, shape, false);
    wanted = by_channel(map.of_input(input));
    rebuilt = map.apply(by_channel(minus_bias(map.of_output(y), bias)));
    if (kept.coordinates.defined()) rebuilt.addmm_(map.basis.t(), by_channel(kept.coordinates));
  } else {
    rebuilt = Systems(weight, shape, true).rebuild(minus_bias(y, bias), kept.ring, kept.coordinates);
  }
  return {(rebuilt - wanted).norm().item<double>() / wanted.norm().item<double>(), share};
}

std::vector<int64_t> counters_op() {
  return {counted(Inversion::rebuilt), counted(Inversion::kept), counted(Inversion::failed),
          counted(Inversion::repeated)};
}

void reset_op() { reset_counters(); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(remnant, m) {
  m.impl("conv2d", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(conv2d_op));
  m.impl("conv2d_coded", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(coded_forward));
  m.impl("conv2d_coded", c10::DispatchKey::Meta, TORCH_FN(coded_forward_meta));
  m.impl("conv2d_coded_backward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(coded_backward));
  m.impl("conv2d_coded_backward", c10::DispatchKey::Meta, TORCH_FN(coded_backward_meta));
  m.impl("conv2d_rebuilt", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(rebuilt_forward));
  m.impl("conv2d_inversion", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(inversion_op));
  m.impl("conv2d_inversion_error", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(inversion_error_op));
  m.impl("inversion_counters", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(counters_op));
  m.impl("reset_inversion_counters", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(reset_op));
}

}  // namespace ops

at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                  c10::string_view policy, const std::optional<at::Generator>& generator) {
  // Through the dispatcher, where autocast sees it.
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("remnant::conv2d", "").typed<decltype(ops::conv2d_op)>();
  return op.call(input, weight, bias, stride, padding, dilation, groups, policy, generator);
}

std::string conv2d_inversion(const at::Tensor& weight, at::IntArrayRef input_size, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  return ops::inversion_op(weight, input_size, stride, padding, dilation, groups);
}

InversionCounters inversion_counters() {
  const auto all = ops::counters_op();
  return {all[0], all[1], all[2], all[3]};
}

void reset_inversion_counters() { ops::reset_counters(); }

}  // namespace remnant
