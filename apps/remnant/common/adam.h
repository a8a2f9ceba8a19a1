#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <vector>

namespace torch::nn {
class Module;
}

namespace remnant::app {

/// Adam on the fused kernel, with its state in the open for checkpoints.
class Adam {
 public:
  explicit Adam(const torch::nn::Module& model);
  void zero_gradients();
  /// Scales the gradients to a norm of at most `largest`; returns the norm before.
  double clip(double largest);
  void step(double learning_rate);
  /// The state's tensors by name; loading copies into them.
  std::map<std::string, at::Tensor> state() const;
  void set_steps(const at::Tensor& step);

 private:
  std::vector<std::string> names_;
  std::vector<at::Tensor> parameters_, gradients_, mean_, square_, steps_;
};

}  // namespace remnant::app
