#include "common/adam.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_foreach_zero.h>
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <torch/nn/module.h>

#include <cstddef>

namespace remnant::app {

using at::Tensor;

Adam::Adam(const torch::nn::Module& model) {
  for (const auto& item : model.named_parameters()) {
    names_.push_back(item.key());
    parameters_.push_back(item.value());
    // Gradients live from the start, so that no step's peak counts them.
    parameters_.back().mutable_grad() = at::zeros_like(item.value(), at::MemoryFormat::Contiguous).detach();
    gradients_.push_back(parameters_.back().grad());
    mean_.push_back(at::zeros_like(item.value()).detach());
    square_.push_back(at::zeros_like(item.value()).detach());
    steps_.push_back(at::full({}, 0.0, at::kFloat));
  }
}

void Adam::zero_gradients() { at::_foreach_zero_(gradients_); }

double Adam::clip(double largest) {
  const double norm = at::stack(at::_foreach_norm(gradients_)).norm().item<double>();
  const double scale = largest / (norm + 1e-6);
  if (scale < 1) at::_foreach_mul_(gradients_, scale);
  return norm;
}

void Adam::step(double learning_rate) {
  const at::NoGradGuard no_grad;
  at::_foreach_add_(steps_, 1);
  at::_fused_adam_(parameters_, gradients_, mean_, square_, {}, steps_, learning_rate, 0.9, 0.999,
                   /*weight_decay=*/0, 1e-8, /*amsgrad=*/false, /*maximize=*/false);
}

std::map<std::string, Tensor> Adam::state() const {
  std::map<std::string, Tensor> tensors;
  for (size_t i = 0; i < names_.size(); ++i) {
    tensors["adam.mean." + names_[i]] = mean_[i];
    tensors["adam.square." + names_[i]] = square_[i];
  }
  tensors["adam.step"] = steps_.front();
  return tensors;
}

void Adam::set_steps(const Tensor& step) {
  for (Tensor& each : steps_) each.copy_(step);
}

}  // namespace remnant::app
