#pragma once

#include "common/run_folder.h"

#include <remnant/memory.h>

#include <ATen/core/Tensor.h>
#include <nlohmann/json.hpp>

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace torch::nn {
class Module;
}

namespace remnant::app {

/// One training step under observation: live bytes over time, its phases, and time by layer. The step
/// computes what it would without, and its allocations climb as high.
class StepTrace {
 public:
  /// `model` must outlive it.
  explicit StepTrace(const torch::nn::Module& model);
  /// Between a batch's start and the end of its loss's computation.
  void forward();
  /// loss.backward(), after forward().
  void backward(const at::Tensor& loss);
  void optimizer();
  /// Ends the last phase and writes timeline.json.
  void write(const RunFolder& run, int64_t step, int64_t kept_bytes);

 private:
  struct Phase {
    const char* name;
    double begin, end;
  };
  double now() const;
  void begin_phase(const char* name);
  void end_phase();
  void add_times();

  const torch::nn::Module& model_;
  memory::PeakMeter meter_;
  std::chrono::steady_clock::time_point started_;
  std::optional<memory::Recorder> recorder_;
  std::vector<Phase> phases_;
  std::vector<memory::LayerTime> times_;
};

}  // namespace remnant::app
