#include "common/optimizer.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_foreach_zero.h>
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/_fused_sgd.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <torch/nn/module.h>

#include <cstddef>

namespace remnant::app {

using at::Tensor;

Optimizer::Optimizer(const torch::nn::Module& model) {
  for (const auto& item : model.named_parameters()) {
    names_.push_back(item.key());
    parameters_.push_back(item.value());
    // Gradients live from the start, so that no step's peak counts them. They are laid out as the parameter:
    // fused kernels walk over memory.
    parameters_.back().mutable_grad() = at::zeros_like(item.value()).detach();
    gradients_.push_back(parameters_.back().grad());
  }
}

void Optimizer::zero_gradients() { at::_foreach_zero_(gradients_); }

double Optimizer::clip(double largest) {
  const double norm = at::stack(at::_foreach_norm(gradients_)).norm().item<double>();
  const double scale = largest / (norm + 1e-6);
  if (largest > 0 && scale < 1) at::_foreach_mul_(gradients_, scale);
  return norm;
}

Adam::Adam(const torch::nn::Module& model) : Optimizer(model) {
  for (const Tensor& parameter : parameters_) {
    mean_.push_back(at::zeros_like(parameter).detach());
    square_.push_back(at::zeros_like(parameter).detach());
    steps_.push_back(at::full({}, 0.0, at::kFloat));
  }
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

void Adam::loaded() {
  for (Tensor& each : steps_) each.copy_(steps_.front());
}

Sgd::Sgd(const torch::nn::Module& model, double momentum, double weight_decay)
    : Optimizer(model), momentum_(momentum), weight_decay_(weight_decay) {
  for (const Tensor& parameter : parameters_) velocity_.push_back(at::zeros_like(parameter).detach());
}

void Sgd::step(double learning_rate) {
  const at::NoGradGuard no_grad;
  for (const bool decays : {true, false}) {
    std::vector<Tensor> parameters, gradients, velocity;
    for (size_t i = 0; i < parameters_.size(); ++i) {
      if ((parameters_[i].dim() > 1) != decays) continue;
      parameters.push_back(parameters_[i]);
      gradients.push_back(gradients_[i]);
      velocity.push_back(velocity_[i]);
    }
    if (parameters.empty()) continue;
    at::_fused_sgd_(parameters, gradients, velocity, decays ? weight_decay_ : 0.0, momentum_, learning_rate,
                    /*dampening=*/0, /*nesterov=*/false, /*maximize=*/false, /*is_first_step=*/false);
  }
}

std::map<std::string, Tensor> Sgd::state() const {
  std::map<std::string, Tensor> tensors;
  for (size_t i = 0; i < names_.size(); ++i) tensors["sgd.velocity." + names_[i]] = velocity_[i];
  return tensors;
}

}  // namespace remnant::app
