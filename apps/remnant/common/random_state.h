#pragma once

#include <ATen/core/Tensor.h>

namespace remnant::app {

/// State of torch's CPU generator, from which weights, dropout and the policies' draws come.
at::Tensor random_state();
void set_random_state(const at::Tensor& state);

/// Puts the random state back, so that looking at a model does not change how it trains.
class KeepRandomState {
 public:
  KeepRandomState() : state_(random_state()) {}
  ~KeepRandomState() { set_random_state(state_); }
  KeepRandomState(const KeepRandomState&) = delete;
  KeepRandomState& operator=(const KeepRandomState&) = delete;

 private:
  at::Tensor state_;
};

}  // namespace remnant::app
