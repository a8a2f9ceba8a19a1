#include <remnant/memory.h>

#include "memory/timeline.h"

#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/csrc/profiler/orchestration/observer.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <optional>
#include <unordered_map>

namespace remnant::memory {

namespace profiler = torch::profiler::impl;

// The allocators report to whatever is in the thread's profiler place, and PyTorch takes whatever is there
// for a ProfilerStateBase: so this is one, and a disabled one.
struct PeakMeter::State final : profiler::ProfilerStateBase {
  explicit State(std::shared_ptr<c10::ThreadLocalDebugInfo> around_info, c10::MemoryReportingInfoBase* around)
      : ProfilerStateBase(profiler::ProfilerConfig(profiler::ProfilerState::Disabled)),
        around_info(std::move(around_info)),
        around(around) {}

  profiler::ActiveProfilerType profilerType() override { return profiler::ActiveProfilerType::NONE; }

  bool memoryProfilingEnabled() const override {
    return enabled || (around != nullptr && around->memoryProfilingEnabled());
  }

  void reportMemoryUsage(void* block, int64_t size, size_t allocated, size_t reserved,
                         c10::Device device) override {
    if (enabled) count(block, size, device);
    if (around != nullptr && around->memoryProfilingEnabled()) {
      around->reportMemoryUsage(block, size, allocated, reserved, device);
    }
  }

  void reportOutOfMemory(int64_t size, size_t allocated, size_t reserved, c10::Device device) override {
    if (around != nullptr) around->reportOutOfMemory(size, allocated, reserved, device);
  }

  void count(void* block, int64_t size, c10::Device device) {
    const std::lock_guard guard(mutex);
    if (device.is_cpu()) {
      // What the CPU's allocator says of a block that was allocated while nobody counted may be the size of
      // an earlier one at the same address: only blocks seen from their allocation on are believed.
      if (size < 0) {
        const auto known = cpu_blocks.find(block);
        if (known == cpu_blocks.end()) return;
        size = -known->second;
        cpu_blocks.erase(known);
      } else {
        // A known address that is given out again was freed on a thread that does not report.
        int64_t& known = cpu_blocks[block];
        live -= known;
        known = size;
      }
    }
    live += size;
    peak = std::max(peak, live);
    if (timeline.has_value()) note();
  }

  void note() {
    const auto now = std::chrono::steady_clock::now();
    timeline->add(std::chrono::duration<double>(now - started).count(), live);
  }

  std::atomic<bool> enabled = true;
  std::mutex mutex;
  int64_t live = 0;
  int64_t peak = 0;
  std::optional<Timeline> timeline;
  std::chrono::steady_clock::time_point started;  // of the timeline
  std::unordered_map<void*, int64_t> cpu_blocks;
  const std::shared_ptr<c10::ThreadLocalDebugInfo> around_info;  // owns `around`
  c10::MemoryReportingInfoBase* const around;
};

PeakMeter::PeakMeter() {
  auto* const found = c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::PROFILER_STATE);
  const auto* const other = dynamic_cast<profiler::ProfilerStateBase*>(found);
  TORCH_CHECK(
      other == nullptr || other->config().disabled(),
      "remnant::memory::PeakMeter: a profiler records on this thread, and the allocators report to one "
      "place only; stop the profiler before the meter is made");
  state_ = std::make_shared<State>(c10::ThreadLocalDebugInfo::current(),
                                   dynamic_cast<c10::MemoryReportingInfoBase*>(found));
  c10::ThreadLocalDebugInfo::_push(c10::DebugInfoKind::PROFILER_STATE, state_);
}

PeakMeter::~PeakMeter() {
  state_->enabled = false;
  // On another thread, or under an inner meter that outlives this one, the state stays where it is and only
  // passes reports on; the inner meter takes it away with itself.
  const auto kind = c10::DebugInfoKind::PROFILER_STATE;
  try {
    while (true) {
      const auto* const top = dynamic_cast<State*>(c10::ThreadLocalDebugInfo::get(kind));
      if (top == nullptr || top->enabled) return;
      c10::ThreadLocalDebugInfo::_pop(kind);
    }
  } catch (const c10::Error&) {
    return;  // something of another kind was pushed inside and is still there
  }
}

int64_t PeakMeter::live_bytes() const {
  const std::lock_guard guard(state_->mutex);
  return state_->live;
}

int64_t PeakMeter::peak_bytes() const {
  const std::lock_guard guard(state_->mutex);
  return state_->peak;
}

void PeakMeter::reset() {
  const std::lock_guard guard(state_->mutex);
  state_->live = 0;
  state_->peak = 0;
}

void PeakMeter::record(int64_t most_samples) {
  TORCH_CHECK(most_samples >= 2,
              "remnant::memory::PeakMeter::record: most_samples should be at least 2, got ", most_samples);
  const std::lock_guard guard(state_->mutex);
  state_->timeline.emplace(most_samples);
  state_->started = std::chrono::steady_clock::now();
  state_->note();
}

std::vector<Sample> PeakMeter::samples() const {
  const std::lock_guard guard(state_->mutex);
  return state_->timeline.has_value() ? state_->timeline->samples() : std::vector<Sample>();
}

}  // namespace remnant::memory
