#include <remnant/memory.h>
#include <remnant/nn/conv.h>
#include <remnant/ops/conv_norm_act.h>

#include "ops/conv_settings.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/nn/init.h>

#include <cmath>

namespace remnant::nn {
namespace {

using at::Tensor;

std::optional<Tensor> optional(const Tensor& x) { return x.defined() ? std::make_optional(x) : std::nullopt; }

void check(const ConvNormActOptions& options, int64_t spatial) {
  ops::parse_unit(options.norm, options.activation, options.memory.str());
  TORCH_CHECK(
      options.in_channels > 0 && options.out_channels > 0 && options.groups > 0 &&
          options.in_channels % options.groups == 0 && options.out_channels % options.groups == 0,
      "remnant::nn::ConvNormAct: groups should divide in_channels and out_channels, all positive, got ",
      options.groups, ", ", options.in_channels, " and ", options.out_channels);
  const auto fits = [&](const char* name, const std::vector<int64_t>& numbers, int64_t least) {
    const auto count = static_cast<int64_t>(numbers.size());
    TORCH_CHECK(count == 1 || count == spatial, "remnant::nn::ConvNormAct: ", name, " should have 1 or ",
                spatial, " numbers, got ", at::IntArrayRef(numbers));
    for (int64_t number : numbers) {
      TORCH_CHECK(number >= least, "remnant::nn::ConvNormAct: ", name, " should be at least ", least,
                  ", got ", at::IntArrayRef(numbers));
    }
  };
  fits("kernel_size", options.kernel_size, 1);
  fits("stride", options.stride, 1);
  fits("padding", options.padding, 0);
  fits("dilation", options.dilation, 1);
}

}  // namespace

namespace detail {

UnitConvImpl::UnitConvImpl(ConvNormActOptions options, int64_t spatial)
    : options_(std::move(options)), spatial_(spatial) {
  UnitConvImpl::reset();
}

void UnitConvImpl::reset() {
  std::vector<int64_t> shape{options_.out_channels, options_.in_channels / options_.groups};
  for (int64_t i = 0; i < spatial_; ++i) {
    shape.push_back(options_.kernel_size[options_.kernel_size.size() == 1 ? 0 : static_cast<size_t>(i)]);
  }
  weight = register_parameter("weight", at::empty(shape));
  bias = register_parameter("bias", options_.bias ? at::empty({options_.out_channels}) : Tensor(),
                            options_.bias);
  // As torch's convolutions begin.
  torch::nn::init::kaiming_uniform_(weight, std::sqrt(5.0));
  if (options_.bias) {
    const double fan_in = static_cast<double>(weight.numel()) / static_cast<double>(weight.size(0));
    torch::nn::init::uniform_(bias, -1 / std::sqrt(fan_in), 1 / std::sqrt(fan_in));
  }
}

UnitNormImpl::UnitNormImpl(ConvNormActOptions options) : options_(std::move(options)) {
  UnitNormImpl::reset();
}

void UnitNormImpl::reset() {
  weight = register_parameter("weight", at::ones({options_.out_channels}));
  bias = register_parameter("bias", at::zeros({options_.out_channels}));
  if (options_.norm != "batch") return;
  running_mean = register_buffer("running_mean", at::zeros({options_.out_channels}));
  running_var = register_buffer("running_var", at::ones({options_.out_channels}));
  num_batches_tracked = register_buffer("num_batches_tracked", at::zeros({}, at::kLong));
}

}  // namespace detail

template <size_t kSpatial, typename Derived>
ConvNormActImplBase<kSpatial, Derived>::ConvNormActImplBase(ConvNormActOptions options_in)
    : options(std::move(options_in)) {
  ConvNormActImplBase::reset();
}

template <size_t kSpatial, typename Derived>
void ConvNormActImplBase<kSpatial, Derived>::reset() {
  check(options, kSpatial);
  conv = this->register_module(
      "conv", std::make_shared<detail::UnitConvImpl>(options, static_cast<int64_t>(kSpatial)));
  norm = options.norm == "none"
             ? nullptr
             : this->register_module("norm", std::make_shared<detail::UnitNormImpl>(options));
}

template <size_t kSpatial, typename Derived>
Tensor ConvNormActImplBase<kSpatial, Derived>::forward(const Tensor& input, const Tensor& residual) {
  const memory::LayerScope scope(this);
  remnant::ConvNormActOptions call;
  call.stride = options.stride;
  call.padding = options.padding;
  call.dilation = options.dilation;
  call.groups = options.groups;
  call.norm = options.norm;
  call.eps = options.eps;
  call.activation = options.activation;
  call.memory = options.memory;
  call.recompute = options.recompute;
  if (!norm) {
    return remnant::conv_norm_act(input, conv->weight, optional(conv->bias), {}, {}, {}, {},
                                  optional(residual), call);
  }
  call.training = norm->is_training();
  call.momentum = options.momentum.value_or(0.0);
  if (call.training && norm->num_batches_tracked.defined()) {
    const at::NoGradGuard no_grad;
    norm->num_batches_tracked.add_(1);
    if (!options.momentum.has_value()) {
      call.momentum = 1.0 / static_cast<double>(norm->num_batches_tracked.template item<int64_t>());
    }
  }
  return remnant::conv_norm_act(input, conv->weight, optional(conv->bias), norm->weight, norm->bias,
                                optional(norm->running_mean), optional(norm->running_var), optional(residual),
                                call);
}

template <size_t kSpatial, typename Derived>
void ConvNormActImplBase<kSpatial, Derived>::pretty_print(std::ostream& stream) const {
  stream << "remnant::nn::ConvNormAct" << kSpatial << "d(" << options.in_channels << ", "
         << options.out_channels << ", kernel_size=" << at::IntArrayRef(options.kernel_size)
         << ", stride=" << at::IntArrayRef(options.stride) << ", padding=" << at::IntArrayRef(options.padding)
         << ", norm=" << options.norm << ", activation=" << options.activation
         << ", memory=" << options.memory.str() << (options.recompute ? ", recompute" : "") << ")";
}

template class ConvNormActImplBase<1, ConvNormAct1dImpl>;
template class ConvNormActImplBase<2, ConvNormAct2dImpl>;
template class ConvNormActImplBase<3, ConvNormAct3dImpl>;

}  // namespace remnant::nn
