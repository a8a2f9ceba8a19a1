#include <remnant/memory.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/profiler_kineto.h>

#include "memory/timeline.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

namespace {

using remnant::memory::PeakMeter;

at::Tensor bytes(int64_t count) { return at::empty({count}, at::kByte); }

TEST(PeakMeter, CountsAllocationsAndFrees) {
  PeakMeter meter;
  EXPECT_EQ(meter.live_bytes(), 0);
  at::Tensor a = bytes(1000);
  EXPECT_EQ(meter.live_bytes(), 1000);
  at::Tensor b = bytes(500);
  a.reset();
  at::Tensor c = bytes(200);
  EXPECT_EQ(meter.live_bytes(), 700);
  EXPECT_EQ(meter.peak_bytes(), 1500);
}

TEST(PeakMeter, ViewsAllocateNothing) {
  const at::Tensor a = bytes(1024);
  const PeakMeter meter;
  const at::Tensor b = a.view({32, 32}).t().narrow(0, 1, 3);
  EXPECT_EQ(meter.peak_bytes(), 0);
}

TEST(PeakMeter, BlocksOlderThanTheMeterDoNotCount) {
  at::Tensor old = bytes(4096);
  PeakMeter meter;
  old.reset();
  EXPECT_EQ(meter.live_bytes(), 0);
  const at::Tensor a = bytes(100);
  EXPECT_EQ(meter.peak_bytes(), 100);
}

TEST(PeakMeter, SizesOfEarlierMetersAreForgotten) {
  // A block freed while nobody counts leaves its size behind in the allocator. Reuse its address.
  for (int i = 0; i < 20; ++i) {
    at::Tensor a;
    {
      const PeakMeter earlier;
      a = bytes(100000);
    }
    a.reset();
    at::Tensor b = bytes(90000);
    PeakMeter meter;
    b.reset();
    ASSERT_EQ(meter.live_bytes(), 0);
  }
}

TEST(PeakMeter, ResetMeasuresFromWhatIsLive) {
  PeakMeter meter;
  at::Tensor a = bytes(1000);
  meter.reset();
  EXPECT_EQ(meter.peak_bytes(), 0);
  at::Tensor b = bytes(300);
  EXPECT_EQ(meter.peak_bytes(), 300);
  a.reset();
  EXPECT_EQ(meter.live_bytes(), -700);
  at::Tensor c = bytes(900);
  EXPECT_EQ(meter.peak_bytes(), 300) << "what was freed makes room";
}

TEST(PeakMeter, SeesBackward) {
  constexpr int64_t n = 1 << 16;
  const at::Tensor w = at::ones({n}).requires_grad_();
  PeakMeter meter;
  at::Tensor loss = w.exp().sum();  // keeps n floats
  const int64_t after_forward = meter.live_bytes();
  EXPECT_GE(after_forward, n * 4);
  EXPECT_LT(after_forward, n * 4 + 1024);
  loss.backward();
  EXPECT_GE(meter.peak_bytes(), 2 * n * 4) << "the gradient beside what is kept";
  EXPECT_LT(meter.peak_bytes(), 2 * n * 4 + 1024);
  loss.reset();
  EXPECT_EQ(meter.live_bytes(), n * 4) << "the gradient is what stays";
}

TEST(PeakMeter, Nests) {
  PeakMeter outer;
  const at::Tensor a = bytes(100);
  {
    PeakMeter inner;
    const at::Tensor b = bytes(50);
    EXPECT_EQ(inner.peak_bytes(), 50);
    EXPECT_EQ(outer.peak_bytes(), 150);
    const PeakMeter innermost;
    const at::Tensor c = bytes(7);
    EXPECT_EQ(innermost.live_bytes(), 7);
    EXPECT_EQ(inner.peak_bytes(), 57);
  }
  const at::Tensor d = bytes(10);
  EXPECT_EQ(outer.live_bytes(), 110);
  EXPECT_EQ(outer.peak_bytes(), 157);
}

TEST(PeakMeter, MayEndInAnyOrder) {
  auto outer = std::make_unique<PeakMeter>();
  auto inner = std::make_unique<PeakMeter>();
  outer.reset();
  {
    const at::Tensor a = bytes(64);
    EXPECT_EQ(inner->live_bytes(), 64);
  }
  inner.reset();
  EXPECT_EQ(c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::PROFILER_STATE), nullptr);
  auto elsewhere = std::make_unique<PeakMeter>();
  std::thread([&] { elsewhere.reset(); }).join();
  const PeakMeter again;
  const at::Tensor b = bytes(64);
  EXPECT_EQ(again.live_bytes(), 64);
}

TEST(PeakMeter, OtherThreadsAreNotCounted) {
  const PeakMeter meter;
  at::Tensor a;
  std::thread([&] { a = bytes(1000); }).join();
  EXPECT_EQ(meter.live_bytes(), 0);
  a.reset();
  EXPECT_EQ(meter.live_bytes(), 0);
}

TEST(PeakMeter, ABlockFreedElsewhereIsNotedWhenItsAddressComesBack) {
  const PeakMeter meter;
  for (int i = 0; i < 20; ++i) {
    at::Tensor a = bytes(5000);
    std::thread([&] { a.reset(); }).join();
  }
  // The allocator hands out a few addresses again and again; without the rule this is 20 * 5000.
  EXPECT_LT(meter.live_bytes(), 20 * 5000);
}

struct Collector : c10::MemoryReportingInfoBase {
  void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device) override { sum += size; }
  bool memoryProfilingEnabled() const override { return true; }
  int64_t sum = 0;
};

TEST(PeakMeter, PassesReportsOn) {
  const auto collector = std::make_shared<Collector>();
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, collector);
  const PeakMeter meter;
  const at::Tensor a = bytes(77);
  EXPECT_EQ(meter.live_bytes(), 77);
  EXPECT_EQ(collector->sum, 77);
}

TEST(PeakMeter, SaysThatAProfilerIsInTheWay) {
  namespace profiler = torch::autograd::profiler;
  const profiler::ProfilerConfig config(profiler::ProfilerState::KINETO);
  const std::set<profiler::ActivityType> activities{profiler::ActivityType::CPU};
  profiler::prepareProfiler(config, activities);
  profiler::enableProfiler(config, activities);
  EXPECT_THROW(PeakMeter(), c10::Error);
  profiler::disableProfiler();
  const PeakMeter meter;
  EXPECT_FALSE(torch::profiler::impl::profilerEnabled()) << "a meter must not pass for a profiler";
}

TEST(PeakMeter, ARecordingKeepsThePeakHoweverFewItsSamples) {
  for (const int64_t most : {2, 3, 10, 64, 5000}) {
    PeakMeter meter;
    meter.record(most);
    std::vector<at::Tensor> held;
    for (int i = 0; i < 300; ++i) {
      held.push_back(bytes(100 + i));
      if (i % 3 == 0) held.erase(held.begin());
    }
    {
      const at::Tensor highest = bytes(1 << 20);
    }
    held.clear();
    const std::vector<remnant::memory::Sample> samples = meter.samples();
    ASSERT_LE(static_cast<int64_t>(samples.size()), most);
    int64_t highest = 0, lowest = samples.front().live_bytes;
    double before = 0;
    for (const auto& sample : samples) {
      EXPECT_GE(sample.seconds, before);
      before = sample.seconds;
      highest = std::max(highest, sample.live_bytes);
      lowest = std::min(lowest, sample.live_bytes);
    }
    EXPECT_EQ(highest, meter.peak_bytes());
    EXPECT_EQ(lowest, 0);
  }
}

TEST(PeakMeter, AllAllocationsAreThereWhereThereIsRoom) {
  PeakMeter meter;
  EXPECT_TRUE(meter.samples().empty());
  meter.record();
  std::vector<at::Tensor> held;
  for (int i = 0; i < 5; ++i) {
    held.push_back(bytes(1000));
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  std::vector<int64_t> live;
  for (const auto& sample : meter.samples()) live.push_back(sample.live_bytes);
  // The first allocation may share its microsecond with the recording's start.
  EXPECT_EQ(live, (std::vector<int64_t>{0, 1000, 2000, 3000, 4000, 5000}));
  meter.record();
  EXPECT_EQ(meter.samples().size(), 1u) << "a new recording starts anew";
  EXPECT_THROW(meter.record(1), c10::Error);
}

TEST(PeakMeter, RecordingsOfNestedMetersSeeTheSame) {
  PeakMeter outer;
  outer.record();
  {
    PeakMeter inner;
    inner.record();
    const at::Tensor a = bytes(5000);
    EXPECT_EQ(inner.samples().back().live_bytes, 5000);
  }
  EXPECT_EQ(outer.samples().back().live_bytes, 0);
  EXPECT_EQ(outer.peak_bytes(), 5000);
}

TEST(Timeline, HalvesItsSlotsAndKeepsExtremesInOrder) {
  remnant::memory::Timeline timeline(8);
  for (int i = 0; i < 10000; ++i) timeline.add(i * 1e-4, i == 5000 ? 77 : i == 5001 ? -77 : i % 10);
  const auto samples = timeline.samples();
  ASSERT_LE(samples.size(), 8u);
  ASSERT_GE(samples.size(), 4u);
  const auto high =
      std::find_if(samples.begin(), samples.end(), [](const auto& s) { return s.live_bytes == 77; });
  ASSERT_NE(high, samples.end());
  EXPECT_DOUBLE_EQ(high->seconds, 0.5);
  ASSERT_NE(high + 1, samples.end());
  EXPECT_EQ((high + 1)->live_bytes, -77);
}

}  // namespace
