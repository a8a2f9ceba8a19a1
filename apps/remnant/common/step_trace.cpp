#include "common/step_trace.h"

#include <algorithm>

namespace remnant::app {

using nlohmann::ordered_json;

StepTrace::StepTrace(const torch::nn::Module& model)
    : model_(model), started_(std::chrono::steady_clock::now()) {
  meter_.record();
}

double StepTrace::now() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - started_).count();
}

void StepTrace::begin_phase(const char* name) {
  end_phase();
  const double time = now();
  phases_.push_back({name, time, time});
}

void StepTrace::end_phase() {
  if (!phases_.empty()) phases_.back().end = now();
}

void StepTrace::forward() {
  begin_phase("forward");
  recorder_.emplace(&model_);
}

void StepTrace::backward(const at::Tensor& loss) {
  begin_phase("backward");
  recorder_->backward(loss);
  end_phase();
  add_times();
  recorder_.reset();
}

void StepTrace::optimizer() { begin_phase("optimizer"); }

void StepTrace::add_times() {
  for (const memory::LayerTime& time : recorder_->times()) {
    const auto found = std::find_if(times_.begin(), times_.end(), [&](const memory::LayerTime& known) {
      return known.layer == time.layer;
    });
    if (found == times_.end()) {
      times_.push_back(time);
    } else {
      found->forward_seconds += time.forward_seconds;
      found->backward_seconds += time.backward_seconds;
    }
  }
}

void StepTrace::write(const RunFolder& run, int64_t step, int64_t kept_bytes) {
  end_phase();
  const double seconds = now();
  ordered_json phases = ordered_json::array(), layers = ordered_json::array();
  for (const Phase& phase : phases_) {
    phases.push_back({{"phase", phase.name}, {"begin", phase.begin}, {"end", phase.end}});
  }
  for (const memory::LayerTime& time : times_) {
    layers.push_back({{"layer", time.layer},
                      {"forward_ms", time.forward_seconds * 1e3},
                      {"backward_ms", time.backward_seconds * 1e3}});
  }
  ordered_json times = ordered_json::array(), bytes = ordered_json::array();
  for (const memory::Sample& sample : meter_.samples()) {
    times.push_back(sample.seconds);
    bytes.push_back(sample.live_bytes);
  }
  run.write_json("timeline.json", {{"step", step},
                                   {"seconds", seconds},
                                   {"kept_bytes", kept_bytes},
                                   {"peak_bytes", meter_.peak_bytes()},
                                   {"phases", phases},
                                   {"layers", layers},
                                   {"sample_seconds", times},
                                   {"sample_bytes", bytes}});
}

}  // namespace remnant::app
