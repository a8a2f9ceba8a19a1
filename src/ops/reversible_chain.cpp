#include "ops/reversible_chain.h"

#include "kernels/cpu/step_kernels.h"
#include "ops/conv_inverse.h"
#include "ops/step_common.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

namespace remnant::ops {

namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr auto kLast = at::MemoryFormat::ChannelsLast;

// A channel's scale below this share of its shift, or of the scales' root mean square, hides x^ in rounding.
constexpr double kHidden = 0.05;

// --- the activation --------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> leaky(const at::Tensor& x, double slope, bool keep) {
  using Signature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, int64_t, double, int64_t, bool);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("remnant::activation_forward", "").typed<Signature>();
  const auto [y, codes] =
      op.call(x.permute({0, 2, 3, 1}), static_cast<int64_t>(kernels::ActivationKind::leaky), slope, 1, keep);
  return {y.permute({0, 3, 1, 2}), codes};
}

// x times slope where the sign was not positive: the activation's derivative, and with 1 / slope its inverse.
at::Tensor by_sign(const at::Tensor& x, const at::Tensor& signs, double slope) {
  using Signature =
      at::Tensor(const at::Tensor&, const OptionalTensor&, const at::Tensor&, int64_t, double, int64_t);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("remnant::activation_backward", "").typed<Signature>();
  return op
      .call(x.permute({0, 2, 3, 1}), std::nullopt, signs,
            static_cast<int64_t>(kernels::ActivationKind::leaky), slope, 1)
      .permute({0, 3, 1, 2});
}

// [N, C, H, W] as its halves.
std::array<at::Tensor, 2> halves(const at::Tensor& x) {
  const int64_t each = x.size(1) / 2;
  return {x.narrow(1, 0, each), x.narrow(1, each, each)};
}

std::tuple<at::Tensor, at::Tensor> activate(const at::Tensor& x, const ChainOptions& options, bool keep) {
  if (options.activation == ChainActivation::leaky) return leaky(x, options.slope, keep);
  const auto [a, b] = halves(x);
  at::Tensor y = at::empty(x.sizes(), x.options(), kLast), signs;
  auto [high, low] = halves(y);
  at::maximum_out(high, a, b);
  at::minimum_out(low, a, b);
  if (keep) signs = std::get<1>(leaky(a - b, 1, true));
  return {y, signs};
}

// The pairs of x exchanged where the second was the larger: maxmin's derivative and its inverse.
at::Tensor exchange(const at::Tensor& x, const at::Tensor& signs) {
  const auto [a, b] = halves(x);
  const at::Tensor first = by_sign(at::ones_like(a, a.options(), kLast), signs, 0).gt(0);
  at::Tensor y = at::empty(x.sizes(), x.options(), kLast);
  auto [high, low] = halves(y);
  at::where_out(high, first, a, b);
  at::where_out(low, first, b, a);
  return y;
}

at::Tensor activation_gradient(const at::Tensor& grad, const at::Tensor& signs, const ChainOptions& options) {
  return options.activation == ChainActivation::leaky ? by_sign(grad, signs, options.slope)
                                                      : exchange(grad, signs);
}

at::Tensor activation_inverse(const at::Tensor& output, const at::Tensor& signs,
                              const ChainOptions& options) {
  return options.activation == ChainActivation::leaky ? by_sign(output, signs, 1 / options.slope)
                                                      : exchange(output, signs);
}

// --- residues --------------------------------------------------------------------------------------

// x in whole steps, a power of two: wide enough for any x that float holds to so many digits.
at::Tensor whole_steps(const at::Tensor& x, double step) {
  return x.div(step).round_().to(x.scalar_type() == at::kDouble ? at::kLong : at::kInt);
}

at::ScalarType residue_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kInt : at::kShort;
}

double residue_step(const at::Tensor& x) {
  const double rms = x.norm().item<double>() / std::sqrt(static_cast<double>(x.numel()));
  if (!(rms > 0) || !std::isfinite(rms)) return 1;
  return std::exp2(std::floor(std::log2(rms)) - (x.scalar_type() == at::kDouble ? 49 : 20));
}

at::Tensor residue_of(const at::Tensor& x, double step) { return whole_steps(x, step).to(residue_type(x)); }

// The number next to `near` that has this residue.
at::Tensor with_residue(const at::Tensor& near, const at::Tensor& residue, double step) {
  const at::Tensor whole = whole_steps(near, step);
  const at::Tensor shift = (residue.to(whole.scalar_type()) - whole).to(residue.scalar_type());
  return (whole + shift).to(near.scalar_type()).mul_(step);
}

// --- layers ----------------------------------------------------------------------------------------

struct Geometry {
  Geometry(const at::Tensor& input, const at::Tensor& weight)
      : padding{weight.size(2) / 2, weight.size(3) / 2},
        shape(input.sizes(), weight.sizes(), at::IntArrayRef{1, 1}, padding, at::IntArrayRef{1, 1}, 1),
        transform(shape.full, weight.options()) {}
  Geometry(const Geometry&) = delete;
  Geometry& operator=(const Geometry&) = delete;

  std::vector<int64_t> padding;
  FullConvolution shape;
  GridTransform transform;
};

at::Tensor convolve(const at::Tensor& x, const at::Tensor& weight, const Geometry& geometry) {
  return at::conv2d(x, weight, OptionalTensor(), at::IntArrayRef{1, 1}, geometry.padding).contiguous(kLast);
}

std::vector<std::vector<int64_t>> hidden_channels(const ChainTensors& tensors) {
  const at::Tensor scale = at::stack(tensors.scales).detach().to(at::kDouble).abs();
  const at::Tensor shift = at::stack(tensors.shifts).detach().to(at::kDouble).abs();
  const at::Tensor rms = scale.square().mean(1, true).sqrt_();
  const at::Tensor seen =
      scale.ge(shift * kHidden).logical_and_(scale.ge(rms * kHidden)).logical_and_(scale.gt(0));
  const at::Tensor found = seen.logical_not().nonzero().cpu();
  std::vector<std::vector<int64_t>> hidden(tensors.scales.size());
  const auto place = found.accessor<int64_t, 2>();
  for (int64_t i = 0; i < found.size(0); ++i) hidden[place[i][0]].push_back(place[i][1]);
  return hidden;
}

bool contains(const std::vector<int64_t>& list, int64_t value) {
  return std::find(list.begin(), list.end(), value) != list.end();
}

at::Tensor flat(const at::Tensor& x) { return x.permute({0, 2, 3, 1}).reshape({x.size(0), -1}); }

// The convolution's output from the layer's.
at::Tensor before_norm(const at::Tensor& output, const KeptOfLayer& kept, const at::Tensor& scale,
                       const at::Tensor& shift, const ChainOptions& options) {
  at::Tensor x = activation_inverse(output, kept.signs, options);
  const at::Tensor width = (scale * kept.deviation).reciprocal_();
  x.sub_(shift.view({1, -1, 1, 1})).mul_(width.view({1, -1, 1, 1})).add_(kept.mean.view({1, -1, 1, 1}));
  if (kept.hidden.defined()) x.index_copy_(1, kept.columns, kept.hidden);
  return x;
}

// The layer's input from the convolution's output, a few samples at a time.
at::Tensor rebuild(const at::Tensor& y, const at::Tensor& ring, const Geometry& geometry,
                   const FrequencyInverse& inverse) {
  const FullConvolution& shape = geometry.shape;
  at::Tensor x = at::empty(y.sizes(), y.options(), kLast);
  const int64_t at_once = samples_at_once(shape.full[0] * shape.full[1] * y.size(1));
  for (int64_t first = 0; first < y.size(0); first += at_once) {
    const int64_t count = std::min(at_once, y.size(0) - first);
    const at::Tensor part =
        inverse.solve(shape.join(y.narrow(0, first, count), ring.narrow(0, first, count)), at::Tensor());
    x.narrow(0, first, count).copy_(part.permute({0, 3, 1, 2}));
  }
  return x;
}

// The layer's output from its convolution's, by the forward's statistics.
at::Tensor after_norm(at::Tensor y, const ChainTensors& tensors, size_t layer, const KeptOfLayer& kept,
                      const ChainOptions& options) {
  const at::Tensor width = tensors.scales[layer] * kept.deviation;
  y.sub_(kept.mean.view({1, -1, 1, 1})).mul_(width.view({1, -1, 1, 1}));
  y.add_(tensors.shifts[layer].view({1, -1, 1, 1}));
  // By the forward's signs, wherever rounding leads.
  return options.activation == ChainActivation::leaky ? by_sign(y, kept.signs, options.slope)
                                                      : exchange(y, kept.signs);
}

// What a failed check makes again, each output of a layer held against the forward's.
class Repair {
 public:
  Repair(const at::Tensor& input, const at::Tensor& probes, const ChainTensors& tensors,
         const ChainOptions& options, const ChainKept& kept, const Geometry& geometry)
      : probes_(probes),
        input_(input),
        tensors_(tensors),
        options_(options),
        kept_(kept),
        geometry_(geometry),
        known_(kept.layers.size() + 1) {}

  // Of layer i's input, or with i = layers of the output.
  double error(int64_t i, const at::Tensor& x) const {
    // NaN where numbers were kept: the walk has overflowed.
    const double measured = probe_error(at::mm(flat(x), probes_), probes_of(i));
    return std::isnan(measured) ? std::numeric_limits<double>::infinity() : measured;
  }

  bool has(int64_t i) const { return known_[i].defined(); }
  at::Tensor take(int64_t i) { return std::move(known_[i]); }

  // The input of layer i, or with i = layers the output, from the nearest anchor or the chain's input. Those
  // in between become known.
  at::Tensor make(int64_t i) {
    count(Inversion::failed);
    int64_t from = i - 1;
    while (from > 0 && !kept_.layers[from].input.defined()) --from;
    at::Tensor x = from == 0 ? input_.contiguous(kLast) : kept_.layers[from].input;
    for (int64_t k = from; k < i; ++k) {
      x = output_of(k, convolution(k, x));
      if (k + 1 < i) known_[k + 1] = x;
    }
    return x;
  }
  // Layer i's convolution of its input, checked by what the layer's output was.
  at::Tensor convolution_of(int64_t i, const at::Tensor& x) const {
    at::Tensor y = convolution(i, x);
    output_of(i, y.clone());
    return y;
  }

 private:
  at::Tensor convolution(int64_t i, const at::Tensor& x) const {
    count(Inversion::repeated);
    return convolve(x, tensors_.weights[i], geometry_);
  }
  at::Tensor output_of(int64_t i, at::Tensor y) const {
    const at::Tensor z = after_norm(std::move(y), tensors_, i, kept_.layers[i], options_);
    const double off = error(i + 1, z), limit = largest_error(z.scalar_type());
    TORCH_CHECK(
        off <= limit, "reversible_chain: the output of layer ", i,
        ", made again from a kept input, is off by ", off, " of its size, expected at most ", limit,
        ": the chain's input, its output or a parameter was changed behind autograd's back; leave them "
        "alone until the backward");
    return z;
  }
  at::Tensor probes_of(int64_t i) const {
    if (i == static_cast<int64_t>(kept_.layers.size())) return kept_.probes;
    const KeptOfLayer& layer = kept_.layers[i];
    return layer.input.defined() ? at::mm(flat(layer.input), probes_) : layer.probes;
  }

  const at::Tensor &probes_, &input_;
  const ChainTensors& tensors_;
  const ChainOptions& options_;
  const ChainKept& kept_;
  const Geometry& geometry_;
  std::vector<at::Tensor> known_;  // inputs of layers
};

}  // namespace

void check_chain(const at::Tensor& input, const ChainTensors& tensors, const ChainOptions& options) {
  const auto type = input.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble,
              "reversible_chain: input must be float32 or float64, got ", toString(type));
  TORCH_CHECK(input.dim() == 4, "reversible_chain: input must be [N, C, H, W], got ", input.sizes());
  const size_t count = tensors.weights.size();
  TORCH_CHECK(count > 0 && tensors.scales.size() == count && tensors.shifts.size() == count &&
                  tensors.running_means.size() == tensors.running_vars.size() &&
                  (tensors.running_means.empty() || tensors.running_means.size() == count),
              "reversible_chain: every layer must have a weight, a norm's weight and bias, and running "
              "statistics or none, "
              "got ",
              count, ", ", tensors.scales.size(), ", ", tensors.shifts.size(), ", ",
              tensors.running_means.size(), " and ", tensors.running_vars.size());
  const int64_t channels = input.size(1);
  for (size_t i = 0; i < count; ++i) {
    const at::Tensor& w = tensors.weights[i];
    TORCH_CHECK(w.dim() == 4 && w.sizes() == tensors.weights[0].sizes() && w.size(0) == channels &&
                    w.size(1) == channels && w.size(2) % 2 == 1 && w.size(3) % 2 == 1,
                "reversible_chain: weights must all be [", channels, ", ", channels,
                ", kh, kw] with one odd kernel, got ", w.sizes(), " in layer ", i);
    for (const at::Tensor& each : {tensors.scales[i], tensors.shifts[i]}) {
      TORCH_CHECK(each.dim() == 1 && each.size(0) == channels,
                  "reversible_chain: a norm's weight and bias must be [", channels, "], got ", each.sizes(),
                  " in layer ", i);
      TORCH_CHECK(each.scalar_type() == type && w.scalar_type() == type,
                  "reversible_chain: parameters must have input's dtype ", toString(type), ", got ",
                  toString(w.scalar_type()), " and ", toString(each.scalar_type()), " in layer ", i);
    }
  }
  TORCH_CHECK(options.activation != ChainActivation::maxmin || channels % 2 == 0,
              "reversible_chain: maxmin takes channels in pairs, got ", channels);
  TORCH_CHECK(options.slope > 0, "reversible_chain: slope must be above 0, or nothing can be rebuilt; got ",
              options.slope);
  for (const auto* list : {&options.anchors, &options.residues}) {
    for (const int64_t layer : *list) {
      TORCH_CHECK(layer >= 0 && layer < static_cast<int64_t>(count),
                  "reversible_chain: anchors and residues must be layers from 0 to ", count - 1, ", got ",
                  layer);
    }
  }
}

at::Tensor chain_forward(const at::Tensor& input, const ChainTensors& tensors, const ChainOptions& options,
                         ChainKept* kept) {
  const size_t count = tensors.weights.size();
  const Geometry geometry(input, tensors.weights[0]);
  std::vector<std::vector<int64_t>> hidden(count);
  at::Tensor probes;
  if (kept != nullptr) {
    hidden = hidden_channels(tensors);
    probes = probe_signs(input.numel() / std::max<int64_t>(1, input.size(0)), input.options());
    kept->layers.assign(count, {});
  }
  at::Tensor x = input.contiguous(kLast);
  for (size_t i = 0; i < count; ++i) {
    at::Tensor y = convolve(x, tensors.weights[i], geometry);
    KeptOfLayer layer;
    if (kept != nullptr && i > 0) {
      const auto index = static_cast<int64_t>(i);
      if (contains(options.anchors, index)) {
        layer.input = x;
      } else {
        layer.ring = geometry.shape.ring(x, tensors.weights[i]);
        layer.probes = at::mm(flat(x), probes);
        if (contains(options.residues, index)) {
          const double step = residue_step(x);
          layer.residue = residue_of(x, step);
          layer.step = at::tensor(step, at::TensorOptions(at::kDouble));
        }
      }
    }
    const OptionalTensor mean = tensors.running_means.empty() ? OptionalTensor() : tensors.running_means[i];
    const OptionalTensor var = tensors.running_vars.empty() ? OptionalTensor() : tensors.running_vars[i];
    auto [n, batch_mean, deviation] = at::native_batch_norm(y, tensors.scales[i], tensors.shifts[i], mean,
                                                            var, true, options.momentum, options.eps);
    if (kept != nullptr && !hidden[i].empty()) {
      layer.columns = at::tensor(hidden[i], y.options().dtype(at::kLong));
      layer.hidden = y.index_select(1, layer.columns);
    }
    y.reset();
    std::tie(x, layer.signs) = activate(n, options, kept != nullptr);
    if (kept == nullptr) continue;
    layer.mean = batch_mean;
    layer.deviation = deviation;
    kept->layers[i] = std::move(layer);
  }
  if (kept != nullptr) kept->probes = at::mm(flat(x), probes);
  return x;
}

ChainGradients chain_backward(const at::Tensor& grad, const at::Tensor& input, const at::Tensor& output,
                              const ChainTensors& tensors, const ChainOptions& options, const ChainKept& kept,
                              bool needs_input, const at::Tensor& errors) {
  const auto layers = static_cast<int64_t>(tensors.weights.size());
  const Geometry geometry(input, tensors.weights[0]);
  const double limit = largest_error(input.scalar_type());
  const at::Tensor probes = probe_signs(input.numel() / std::max<int64_t>(1, input.size(0)), input.options());
  double* const measured = errors.data_ptr<double>();
  std::fill(measured, measured + layers, std::numeric_limits<double>::quiet_NaN());
  ChainGradients result;
  for (auto* list : {&result.weights, &result.scales, &result.shifts}) list->resize(layers);
  Repair repair(input, probes, tensors, options, kept, geometry);
  at::Tensor g = grad.contiguous(kLast), z = output;
  if (repair.error(layers, z) > limit) z = repair.make(layers);
  for (int64_t i = layers - 1; i >= 0; --i) {
    const KeptOfLayer& layer = kept.layers[i];
    const at::Tensor &weight = tensors.weights[i], &scale = tensors.scales[i];
    g = activation_gradient(g, layer.signs, options);
    at::Tensor y = before_norm(z, layer, scale, tensors.shifts[i], options), x;
    z.reset();
    if (i == 0) {
      x = input.contiguous(kLast);
    } else if (layer.input.defined()) {
      x = layer.input;
    } else if (repair.has(i)) {
      x = repair.take(i);
    } else {
      {
        const FrequencyInverse inverse(geometry.shape, geometry.transform, weight, 0, false);
        x = rebuild(y, layer.ring, geometry, inverse);
      }
      if (layer.residue.defined()) x = with_residue(x, layer.residue, layer.step.item<double>());
      count(Inversion::rebuilt);
      measured[i] = repair.error(i, x);
      if (measured[i] > limit) {
        x = repair.make(i);
        y = repair.convolution_of(i, x);
      }
    }
    std::tie(g, result.scales[i], result.shifts[i]) =
        at::native_batch_norm_backward(g, y, scale, std::nullopt, std::nullopt, layer.mean, layer.deviation,
                                       true, options.eps, {true, true, true});
    y.reset();
    z = x;
    std::tie(g, result.weights[i], std::ignore) = at::convolution_backward(
        g, x, weight, std::nullopt, at::IntArrayRef{1, 1}, geometry.padding, at::IntArrayRef{1, 1}, false,
        at::IntArrayRef{0, 0}, 1, {i > 0 || needs_input, true, false});
  }
  if (needs_input) result.input = g;
  return result;
}

void plan_chain(const at::Tensor& samples, const ChainTensors& tensors, ChainOptions& options, double limit) {
  const auto layers = static_cast<int64_t>(tensors.weights.size());
  const Geometry geometry(samples, tensors.weights[0]);
  options.anchors.clear();
  options.residues.clear();
  // Every input kept, and every ring.
  std::vector<at::Tensor> inputs{samples.contiguous(kLast)};
  std::vector<KeptOfLayer> kept(layers);
  const auto hidden = hidden_channels(tensors);
  for (int64_t i = 0; i < layers; ++i) {
    const at::Tensor y = convolve(inputs[i], tensors.weights[i], geometry);
    kept[i].ring = geometry.shape.ring(inputs[i], tensors.weights[i]);
    at::Tensor n;
    std::tie(n, kept[i].mean, kept[i].deviation) = at::native_batch_norm(
        y, tensors.scales[i], tensors.shifts[i], std::nullopt, std::nullopt, true, 0, options.eps);
    if (!hidden[i].empty()) {
      kept[i].columns = at::tensor(hidden[i], y.options().dtype(at::kLong));
      kept[i].hidden = y.index_select(1, kept[i].columns);
    }
    at::Tensor z;
    std::tie(z, kept[i].signs) = activate(n, options, true);
    inputs.push_back(z);
  }
  at::Tensor z = inputs[layers];
  for (int64_t i = layers - 1; i > 0; --i) {
    const FrequencyInverse inverse(geometry.shape, geometry.transform, tensors.weights[i], 0, false);
    const double size = inputs[i].norm().item<double>();
    at::Tensor x;
    const auto good = [&](const at::Tensor& from) {
      x = rebuild(before_norm(from, kept[i], tensors.scales[i], tensors.shifts[i], options), kept[i].ring,
                  geometry, inverse);
      return (x - inputs[i]).norm().item<double>() <= limit * size;
    };
    const bool fresh =
        i + 1 == layers || contains(options.anchors, i + 1) || contains(options.residues, i + 1);
    bool done = good(z);
    if (!done && !fresh) {
      // What is left of the error in the layer above's input goes, for half the price of an anchor.
      const double step = residue_step(inputs[i + 1]);
      options.residues.push_back(i + 1);
      done = good(with_residue(z, residue_of(inputs[i + 1], step), step));
    }
    if (!done) {
      options.anchors.push_back(i);
      x = inputs[i];
    }
    z = x;
  }
}

}  // namespace remnant::ops
