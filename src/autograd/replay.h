#pragma once

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <mutex>
#include <vector>

/// What a function depends on beside its arguments, as it was in the forward: random state and autocast.
namespace remnant::detail {

struct AutocastOf {
  at::DeviceType device;
  bool enabled;
  at::ScalarType dtype;

  static AutocastOf now(at::DeviceType device) {
    return {device, at::autocast::is_autocast_enabled(device), at::autocast::get_autocast_dtype(device)};
  }
  void set() const {
    at::autocast::set_autocast_enabled(device, enabled);
    at::autocast::set_autocast_dtype(device, dtype);
  }
};

/// The CPU, and the devices of the inputs.
inline std::vector<at::Device> devices_of(const std::vector<at::Tensor>& inputs) {
  std::vector<at::Device> devices{at::Device(at::kCPU)};
  for (const at::Tensor& x : inputs) {
    if (x.device().is_cpu() || x.device().is_meta()) continue;
    if (std::find(devices.begin(), devices.end(), x.device()) == devices.end()) devices.push_back(x.device());
  }
  return devices;
}

inline at::Tensor state_of(at::Generator& generator) {
  const std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get_state();
}

inline void set_state(at::Generator& generator, const at::Tensor& state) {
  const std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(state);
}

/// The generators as they were in the forward, until the end of the scope.
class RandomState {
 public:
  RandomState(std::vector<at::Generator>& generators, const std::vector<at::Tensor>& states)
      : generators_(generators) {
    for (size_t i = 0; i < generators_.size(); ++i) {
      before_.push_back(state_of(generators_[i]));
      set_state(generators_[i], states[i]);
    }
  }
  ~RandomState() {
    for (size_t i = 0; i < before_.size(); ++i) set_state(generators_[i], before_[i]);
  }
  RandomState(const RandomState&) = delete;
  RandomState& operator=(const RandomState&) = delete;

 private:
  std::vector<at::Generator>& generators_;
  std::vector<at::Tensor> before_;
};

/// Autocast as it was in the forward, until the end of the scope. Cached casts of weights stay on their side:
/// those from before lead into another graph, and those made in the scope would outlive an optimizer's step.
class AutocastState {
 public:
  explicit AutocastState(const std::vector<AutocastOf>& states) {
    at::autocast::clear_cache();
    at::autocast::increment_nesting();
    for (const AutocastOf& state : states) {
      before_.push_back(AutocastOf::now(state.device));
      state.set();
    }
  }
  ~AutocastState() {
    for (const AutocastOf& state : before_) state.set();
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
  }
  AutocastState(const AutocastState&) = delete;
  AutocastState& operator=(const AutocastState&) = delete;

  /// The same devices without autocast.
  static std::vector<AutocastOf> off(std::vector<AutocastOf> states) {
    for (AutocastOf& state : states) state.enabled = false;
    return states;
  }

 private:
  std::vector<AutocastOf> before_;
};

}  // namespace remnant::detail
