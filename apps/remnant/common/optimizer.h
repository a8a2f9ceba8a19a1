#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <vector>

namespace torch::nn {
class Module;
}

namespace remnant::app {

/// On fused kernels, with its state in the open for checkpoints.
class Optimizer {
 public:
  explicit Optimizer(const torch::nn::Module& model);
  virtual ~Optimizer() = default;
  Optimizer(const Optimizer&) = delete;
  Optimizer& operator=(const Optimizer&) = delete;
  void zero_gradients();
  /// Scales the gradients to a norm of at most `largest`, unless that is 0; returns the norm before.
  double clip(double largest);
  virtual void step(double learning_rate) = 0;
  /// The state's tensors by name; loading copies into them and then calls loaded().
  virtual std::map<std::string, at::Tensor> state() const = 0;
  virtual void loaded() {}

 protected:
  std::vector<std::string> names_;
  std::vector<at::Tensor> parameters_, gradients_;
};

class Adam final : public Optimizer {
 public:
  explicit Adam(const torch::nn::Module& model);
  void step(double learning_rate) override;
  std::map<std::string, at::Tensor> state() const override;
  void loaded() override;

 private:
  std::vector<at::Tensor> mean_, square_, steps_;
};

/// Stochastic gradient descent with momentum. Weights decay; vectors, which are biases and the parameters of
/// normalisations, do not.
class Sgd final : public Optimizer {
 public:
  Sgd(const torch::nn::Module& model, double momentum, double weight_decay);
  void step(double learning_rate) override;
  std::map<std::string, at::Tensor> state() const override;

 private:
  double momentum_, weight_decay_;
  std::vector<at::Tensor> velocity_;
};

}  // namespace remnant::app
