#include <remnant/memory.h>
#include <remnant/nn/init.h>
#include <remnant/nn/reversible.h>

#include "autograd/coupling.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <ostream>
#include <string>

namespace remnant::nn {

namespace {

using at::Tensor;
using Plan = std::tuple<std::vector<int64_t>, std::vector<int64_t>>;

}  // namespace

// --- ReversibleChain -------------------------------------------------------------------------------

ReversibleLayerImpl::ReversibleLayerImpl(const ReversibleChainOptions& options_in) : options(options_in) {
  ReversibleLayerImpl::reset();
}

void ReversibleLayerImpl::reset() {
  conv = register_module(
      "conv",
      torch::nn::Conv2d(torch::nn::Conv2dOptions(options.channels, options.channels, options.kernel_size)
                            .padding(options.kernel_size / 2)
                            .bias(false)));
  norm = register_module(
      "norm",
      torch::nn::BatchNorm2d(
          torch::nn::BatchNorm2dOptions(options.channels).eps(options.eps).momentum(options.momentum)));
  init::dirac_orthogonal_(conv->weight, options.noise);
}

Tensor ReversibleLayerImpl::forward(const Tensor& input) {
  const Tensor x = norm(conv(input));
  if (options.activation != "maxmin") return at::leaky_relu(x, options.slope);
  const std::vector<Tensor> pair = x.chunk(2, 1);
  return at::cat({at::maximum(pair[0], pair[1]), at::minimum(pair[0], pair[1])}, 1);
}

ReversibleChainImpl::ReversibleChainImpl(const ReversibleChainOptions& options_in) : options(options_in) {
  TORCH_CHECK(options.channels > 0 && options.layers > 0,
              "remnant::nn::ReversibleChain: channels and layers should be above 0, got ", options.channels,
              " and ", options.layers);
  TORCH_CHECK(
      options.kernel_size > 0 && options.kernel_size % 2 == 1,
      "remnant::nn::ReversibleChain: kernel_size should be odd, so that zero padding keeps the size, got ",
      options.kernel_size);
  TORCH_CHECK(options.slope > 0,
              "remnant::nn::ReversibleChain: slope should be above 0, or nothing can be rebuilt; got ",
              options.slope);
  TORCH_CHECK(options.activation == "leaky" || options.activation == "maxmin",
              "remnant::nn::ReversibleChain: activation should be 'leaky' or 'maxmin', got '",
              options.activation, "'");
  TORCH_CHECK(options.activation != "maxmin" || options.channels % 2 == 0,
              "remnant::nn::ReversibleChain: maxmin takes channels in pairs, got ", options.channels);
  TORCH_CHECK(options.limit > 0 && options.plan_every > 0,
              "remnant::nn::ReversibleChain: limit and plan_every should be above 0, got ", options.limit,
              " and ", options.plan_every);
  ReversibleChainImpl::reset();
}

void ReversibleChainImpl::reset() {
  layers_.clear();
  for (int64_t i = 0; i < options.layers; ++i) {
    layers_.push_back(register_module(std::to_string(i), ReversibleLayer(options)));
  }
  errors_ =
      at::full({options.layers}, std::numeric_limits<double>::quiet_NaN(), at::TensorOptions(at::kDouble));
  since_plan_ = -1;
}

void ReversibleChainImpl::set_plan(std::vector<int64_t> anchors, std::vector<int64_t> residues) {
  for (const auto* list : {&anchors, &residues}) {
    for (const int64_t layer : *list) {
      TORCH_CHECK(layer >= 0 && layer < options.layers,
                  "remnant::nn::ReversibleChain: a plan's layers should be from 0 to ", options.layers - 1,
                  ", got ", layer);
    }
  }
  anchors_ = std::move(anchors);
  residues_ = std::move(residues);
  fixed_ = true;
}

// [forwards since the plan, anchors as flags, residues as flags, errors]
Tensor ReversibleChainImpl::plan_state() const {
  Tensor state = at::zeros({3 * options.layers + 1}, at::kDouble);
  auto* out = state.mutable_data_ptr<double>();
  *out++ = static_cast<double>(since_plan_);
  for (const int64_t layer : anchors_) out[layer] = 1;
  for (const int64_t layer : residues_) out[options.layers + layer] = 1;
  state.narrow(0, 2 * options.layers + 1, options.layers).copy_(errors_);
  return state;
}

void ReversibleChainImpl::set_plan_state(const Tensor& state) {
  const int64_t size = 3 * options.layers + 1;
  TORCH_CHECK(state.dim() == 1 && state.size(0) == size,
              "remnant::nn::ReversibleChain: the state of its plan should have the shape [", size, "], got ",
              state.sizes());
  const Tensor values = state.detach().to(at::kCPU, at::kDouble).contiguous();
  const auto* in = values.const_data_ptr<double>();
  const auto is_flag = [](double x) { return x == 0 || x == 1; };
  TORCH_CHECK(
      in[0] >= -1 && in[0] < 0x1p53 && in[0] == std::floor(in[0]) &&
          std::all_of(in + 1, in + 1 + 2 * options.layers, is_flag),
      "remnant::nn::ReversibleChain: the state of its plan should be a count of forwards, flags of 0 and 1, "
      "and errors; got other numbers: give it what plan_state() returned");
  since_plan_ = static_cast<int64_t>(*in++);
  anchors_.clear();
  residues_.clear();
  for (int64_t layer = 0; layer < options.layers; ++layer) {
    if (in[layer] != 0) anchors_.push_back(layer);
    if (in[options.layers + layer] != 0) residues_.push_back(layer);
  }
  errors_.copy_(values.narrow(0, 2 * options.layers + 1, options.layers));
}

void ReversibleChainImpl::plan(const Tensor& input) {
  using Signature = Plan(const Tensor&, at::TensorList, at::TensorList, at::TensorList, double, double,
                         c10::string_view, double);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("remnant::reversible_chain_plan", "").typed<Signature>();
  std::vector<Tensor> weights, scales, shifts;
  for (const ReversibleLayer& layer : layers_) {
    weights.push_back(layer->conv->weight);
    scales.push_back(layer->norm->weight);
    shifts.push_back(layer->norm->bias);
  }
  const Tensor samples = input.detach().narrow(0, 0, std::min<int64_t>(4, input.size(0)));
  std::tie(anchors_, residues_) = op.call(samples.to(weights[0].scalar_type()), weights, scales, shifts,
                                          options.eps, options.slope, options.activation, options.limit);
  since_plan_ = 0;
}

Tensor ReversibleChainImpl::forward(const Tensor& input) {
  const memory::LayerScope scope(this);
  const auto by_batch = [](const ReversibleLayer& layer) { return layer->norm->is_training(); };
  if (!is_training() || !std::all_of(layers_.begin(), layers_.end(), by_batch)) {
    Tensor x = input;
    for (ReversibleLayer& layer : layers_) x = layer->forward(x);
    return x;
  }
  if (!fixed_ && at::GradMode::is_enabled() && input.numel() > 0) {
    const Tensor far = errors_.gt(2 * options.limit);
    if (since_plan_ < 0 || since_plan_ >= options.plan_every || far.any().item<bool>()) plan(input);
    ++since_plan_;
  }
  std::vector<Tensor> weights, scales, shifts, means, vars;
  for (const ReversibleLayer& layer : layers_) {
    weights.push_back(layer->conv->weight);
    scales.push_back(layer->norm->weight);
    shifts.push_back(layer->norm->bias);
    means.push_back(layer->norm->running_mean);
    vars.push_back(layer->norm->running_var);
    layer->norm->num_batches_tracked.add_(1);
  }
  using Signature = Tensor(const Tensor&, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                           at::TensorList, double, double, double, c10::string_view, at::IntArrayRef,
                           at::IntArrayRef, const std::optional<Tensor>&);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("remnant::reversible_chain", "").typed<Signature>();
  return op.call(input, weights, scales, shifts, means, vars, options.momentum, options.eps, options.slope,
                 options.activation, anchors_, residues_, errors_);
}

void ReversibleChainImpl::pretty_print(std::ostream& stream) const {
  stream << "remnant::nn::ReversibleChain(channels=" << options.channels << ", layers=" << options.layers
         << ", kernel_size=" << options.kernel_size << ", activation=" << options.activation << ")";
}

// --- coupling --------------------------------------------------------------------------------------

namespace {

detail::CouplingHalf half_of(const torch::nn::AnyModule& function, bool affine) {
  const auto module = function.ptr();
  return {[function = std::make_shared<torch::nn::AnyModule>(function)](const Tensor& x) {
            return function->forward<Tensor>(x);
          },
          [module] { return module->parameters(); }, [module] { return module->buffers(); }, affine};
}

}  // namespace

CouplingImpl::CouplingImpl(torch::nn::AnyModule f_in, torch::nn::AnyModule g_in, bool affine)
    : f(std::move(f_in)), g(std::move(g_in)), affine_(affine) {
  TORCH_CHECK(!f.is_empty() && !g.is_empty(),
              "remnant::nn::Coupling: it needs both functions, got an empty one");
  register_module("f", f.ptr());
  register_module("g", g.ptr());
}

Tensor CouplingImpl::forward(const Tensor& input) {
  const memory::LayerScope scope(this);
  return detail::couple(input, {half_of(f, affine_), half_of(g, affine_)});
}

Coupling additive_coupling(torch::nn::AnyModule f, torch::nn::AnyModule g) {
  return Coupling(std::move(f), std::move(g), false);
}

Coupling affine_coupling(torch::nn::AnyModule f, torch::nn::AnyModule g) {
  return Coupling(std::move(f), std::move(g), true);
}

ReversibleSequenceImpl::ReversibleSequenceImpl(std::vector<Coupling> blocks) : blocks_(std::move(blocks)) {
  TORCH_CHECK(!blocks_.empty(), "remnant::nn::ReversibleSequence: it needs at least one block, got none");
  for (size_t i = 0; i < blocks_.size(); ++i) register_module(std::to_string(i), blocks_[i]);
}

Tensor ReversibleSequenceImpl::forward(const Tensor& input) {
  const memory::LayerScope scope(this);
  std::vector<detail::CouplingHalf> halves;
  for (const Coupling& block : blocks_) {
    halves.push_back(half_of(block->f, block->affine()));
    halves.push_back(half_of(block->g, block->affine()));
  }
  return detail::couple(input, halves);
}

}  // namespace remnant::nn
