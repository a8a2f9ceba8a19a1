#pragma once

#include <remnant/ops/conv_norm_act.h>
#include <remnant/plan.h>

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/normalization.h>

#include <ATen/core/grad_mode.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <ostream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

/// What takes the places of a convolution, its norm and its activation in a torch::nn::Sequential. Each keeps
/// the parameters and options of the module that was there, under its name; all but the last hand on what
/// there is to compute, and the last computes it as one conv_norm_act.
namespace remnant::nn::detail {

struct UnitCall {
  at::Tensor input, weight, bias, norm_weight, norm_bias, running_mean, running_var;
  remnant::ConvNormActOptions options;
  torch::nn::Module* layer = nullptr;  ///< in whose scope it runs

  /// The output, which nothing keeps, so that whoever takes it may change it in place as torch's.
  at::Tensor compute() const;
};

class RunPart {
 public:
  virtual ~RunPart() = default;
  /// The module that was there.
  virtual torch::nn::AnyModule original() const = 0;
  virtual const char* original_type() const = 0;
};

/// Holds the module that was there, a `Torch`, and registers its parameters and buffers as its own.
template <typename Torch, typename Part>
class RunPartOf : public torch::nn::Cloneable<Part>, public RunPart {
 public:
  explicit RunPartOf(std::shared_ptr<Torch> source) : source_(std::move(source)) {
    this->train(source_->is_training());
    take();
  }
  /// For clone().
  void reset() override {
    source_ = std::dynamic_pointer_cast<Torch>(source_->clone());
    take();
  }
  void pretty_print(std::ostream& stream) const override {
    stream << "remnant::nn::ConvNormAct of ";
    source_->pretty_print(stream);
  }
  torch::nn::AnyModule original() const override {
    source_->train(this->is_training());
    return torch::nn::AnyModule(source_);
  }

 protected:
  Torch& source() const { return *source_; }

 private:
  void take() {
    for (const auto& item : source_->named_parameters(/*recurse=*/false)) {
      this->register_parameter(item.key(), item.value(), item.value().requires_grad());
    }
    for (const auto& item : source_->named_buffers(/*recurse=*/false)) {
      this->register_buffer(item.key(), item.value());
    }
  }

  std::shared_ptr<Torch> source_;
};

template <size_t kSpatial>
struct TorchTypes;
template <>
struct TorchTypes<1> {
  using Conv = torch::nn::Conv1dImpl;
  using Norm = torch::nn::BatchNorm1dImpl;
  static constexpr const char *kConv = "torch::nn::Conv1d", *kNorm = "torch::nn::BatchNorm1d";
};
template <>
struct TorchTypes<2> {
  using Conv = torch::nn::Conv2dImpl;
  using Norm = torch::nn::BatchNorm2dImpl;
  static constexpr const char *kConv = "torch::nn::Conv2d", *kNorm = "torch::nn::BatchNorm2d";
};
template <>
struct TorchTypes<3> {
  using Conv = torch::nn::Conv3dImpl;
  using Norm = torch::nn::BatchNorm3dImpl;
  static constexpr const char *kConv = "torch::nn::Conv3d", *kNorm = "torch::nn::BatchNorm3d";
};

template <size_t kSpatial>
class ConvPart : public RunPartOf<typename TorchTypes<kSpatial>::Conv, ConvPart<kSpatial>>,
                 public KeepsByChoice {
 public:
  /// `padding` is that of `source` in numbers.
  ConvPart(std::shared_ptr<typename TorchTypes<kSpatial>::Conv> source, std::vector<int64_t> padding,
           bool recompute)
      : ConvPart::RunPartOf(std::move(source)), padding_(std::move(padding)), recompute_(recompute) {}

  UnitCall forward(const at::Tensor& input) {
    const auto& options = this->source().options;
    UnitCall call;
    call.input = input;
    call.weight = this->source().weight;
    call.bias = this->source().bias;
    call.layer = this;
    call.options.stride = at::IntArrayRef(options.stride()).vec();
    call.options.padding = padding_;
    call.options.dilation = at::IntArrayRef(options.dilation()).vec();
    call.options.groups = options.groups();
    call.options.recompute = recompute_;
    call.options.memory = memory_.bits > 0                          ? Memory::unbiased(memory_.bits)
                          : memory_ == LayerMemory(Memory::eager()) ? Memory::eager()
                                                                    : Memory::exact();
    return call;
  }
  const char* original_type() const override { return TorchTypes<kSpatial>::kConv; }
  const LayerMemory& memory() const override { return memory_; }
  void set_memory(const LayerMemory& memory) override { memory_ = memory; }

 private:
  std::vector<int64_t> padding_;
  bool recompute_;
  LayerMemory memory_ = Memory::exact();
};

/// `Norm`: a batch norm, or GroupNorm. `Result`: UnitCall before an activation, at::Tensor at the end of a
/// run.
template <typename Norm, typename Result>
class NormPart : public RunPartOf<Norm, NormPart<Norm, Result>> {
 public:
  NormPart(std::shared_ptr<Norm> source, const char* original_type)
      : NormPart::RunPartOf(std::move(source)), original_type_(original_type) {}

  Result forward(UnitCall call) {
    auto& norm = this->source();
    call.norm_weight = norm.weight;
    call.norm_bias = norm.bias;
    call.options.eps = norm.options.eps();
    call.options.activation = "identity";
    if constexpr (std::is_same_v<Norm, torch::nn::GroupNormImpl>) {
      call.options.norm = "group:groups=" + std::to_string(norm.options.num_groups());
    } else {
      call.running_mean = norm.running_mean;
      call.running_var = norm.running_var;
      const bool tracks = norm.options.track_running_stats();
      call.options.training = this->is_training() || !tracks;
      call.options.momentum = norm.options.momentum().value_or(0.0);
      if (this->is_training() && tracks) {
        const at::NoGradGuard no_grad;
        norm.num_batches_tracked.add_(1);
        if (!norm.options.momentum().has_value()) {
          call.options.momentum = 1.0 / norm.num_batches_tracked.template item<double>();
        }
      }
    }
    if constexpr (std::is_same_v<Result, at::Tensor>) {
      return call.compute();
    } else {
      return call;
    }
  }
  const char* original_type() const override { return original_type_; }

 private:
  const char* original_type_;
};

/// An activation has no tensors: the module that was there is held.
class ActivationPart : public torch::nn::Cloneable<ActivationPart>, public RunPart {
 public:
  /// `activation` as conv_norm_act takes it.
  ActivationPart(const torch::nn::AnyModule& original, const char* original_type, std::string activation)
      : original_(original), original_type_(original_type), activation_(std::move(activation)) {
    train(original_.ptr()->is_training());
  }
  void reset() override {}
  void pretty_print(std::ostream& stream) const override {
    stream << "remnant::nn::ConvNormAct of ";
    original_.ptr()->pretty_print(stream);
  }
  at::Tensor forward(const UnitCall& call) {
    UnitCall whole = call;
    whole.options.activation = activation_;
    return whole.compute();
  }
  torch::nn::AnyModule original() const override {
    original_.ptr()->train(is_training());
    return original_;
  }
  const char* original_type() const override { return original_type_; }

 private:
  torch::nn::AnyModule original_;
  const char* original_type_;
  std::string activation_;
};

}  // namespace remnant::nn::detail
