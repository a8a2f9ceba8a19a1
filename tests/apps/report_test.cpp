#include "common/error.h"
#include "report/page.h"
#include "report/run.h"
#include "report/svg.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <numeric>

namespace remnant::app::report {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

using Points = std::vector<std::pair<double, double>>;
using Runs = std::vector<Run>;  // inside a test, Run is a function of GoogleTest's

TEST(Report, TextIsEscaped) {
  EXPECT_EQ(escape("a<b> & \"c\" 'd'"), "a&lt;b&gt; &amp; &quot;c&quot; &#39;d&#39;");
  EXPECT_EQ(escape("Größe"), "Größe");
}

TEST(Report, TicksAreRoundAndInside) {
  EXPECT_EQ(round_ticks(0, 100, 5), (std::vector<double>{0, 20, 40, 60, 80, 100}));
  EXPECT_EQ(round_ticks(-1, 3.5, 5), (std::vector<double>{-1, 0, 1, 2, 3}));
  EXPECT_EQ(round_ticks(7, 7, 5), (std::vector<double>{7}));
  for (double high = 1e-6; high < 1e12; high *= 3.7) {
    const std::vector<double> ticks = round_ticks(high / 7, high, 5);
    EXPECT_GE(ticks.size(), 2u) << high;
    EXPECT_LE(ticks.size(), 6u) << high;
    EXPECT_GE(ticks.front(), high / 7 * (1 - 1e-6));
    EXPECT_LE(ticks.back(), high * (1 + 1e-6));
  }
}

TEST(Report, TicksAreFewWhereDigitsRunOut) {
  for (const double low : {5.0, 1e300, -3e18}) {
    EXPECT_LE(round_ticks(low, std::nextafter(low, INFINITY), 5).size(), 7u) << low;
  }
  EXPECT_LE(logarithmic_ticks(1e300, INFINITY).size(), 30u);
}

TEST(Report, ALogarithmicAxisIsForValuesFarApart) {
  const auto curves = [](const Points& points) { return std::vector<Curve>{{0, "run", points}}; };
  EXPECT_TRUE(far_apart(curves({{1, 800}, {2, 6}})));
  EXPECT_FALSE(far_apart(curves({{1, 8}, {2, 6}})));
  EXPECT_FALSE(far_apart(curves({{1, 800}, {2, 0}})));
  EXPECT_FALSE(far_apart({}));
  EXPECT_EQ(logarithmic_ticks(4, 250), (std::vector<double>{5, 10, 20, 50, 100, 200}));
}

TEST(Report, StretchesKeepMeansAndExtremes) {
  Points points;
  for (int i = 0; i < 1003; ++i) points.emplace_back(i, (i * 37) % 101);
  for (const size_t most : {1u, 2u, 7u, 220u, 1003u, 5000u}) {
    const std::vector<Stretch> parts = stretches(points, most);
    ASSERT_LE(parts.size(), most);
    double low = 1e9, high = -1e9;
    for (const Stretch& part : parts) {
      EXPECT_LE(part.low, part.mean);
      EXPECT_LE(part.mean, part.high);
      low = std::min(low, part.low);
      high = std::max(high, part.high);
    }
    EXPECT_EQ(low, 0);
    EXPECT_EQ(high, 100);
  }
  EXPECT_EQ(stretches(points, 1003)[5].mean, points[5].second);
  EXPECT_TRUE(stretches({}, 10).empty());
}

TEST(Report, MedianOfEvenAndOdd) {
  EXPECT_EQ(median({}), std::nullopt);
  EXPECT_EQ(median({3, 1, 2}), 2);
  EXPECT_EQ(median({4, 1, 2, 3}), 2.5);
}

TEST(Report, StepTimesHaveThreeDigits) {
  EXPECT_EQ(format_step_time(0.005923), "5.92 ms");
  EXPECT_EQ(format_step_time(0.0567), "56.7 ms");
  EXPECT_EQ(format_step_time(0.24), "240 ms");
  EXPECT_EQ(format_step_time(0.9997), "1.00 s");
  EXPECT_EQ(format_step_time(75.4), "75.4 s");
}

TEST(Report, MemoryAddsUpByLayerAndUnknownStaysUnknown) {
  const ordered_json memory = ordered_json::parse(R"({"rows": [
    {"layer": "a", "kept_bytes": 10, "predicted_bytes": null, "eager_bytes": null},
    {"layer": "b", "kept_bytes": 5, "predicted_bytes": 7, "eager_bytes": 70},
    {"layer": "a", "kept_bytes": 1, "predicted_bytes": null, "eager_bytes": null},
    {"layer": "b", "kept_bytes": 3, "predicted_bytes": 0, "eager_bytes": 0},
    {"layer": "b", "kept_bytes": 4, "predicted_bytes": null, "eager_bytes": null}]})");
  const std::vector<LayerMemory> layers = memory_by_layer(memory, "memory.json");
  ASSERT_EQ(layers.size(), 2u);
  EXPECT_EQ(layers[0].layer, "a");
  EXPECT_EQ(layers[0].kept, 11);
  EXPECT_FALSE(layers[0].predicted.has_value() || layers[0].eager.has_value());
  EXPECT_FALSE(layers[0].described_kept.has_value());
  EXPECT_EQ(layers[1].kept, 12);
  EXPECT_EQ(layers[1].described_kept, 8);
  EXPECT_EQ(layers[1].predicted, 7);
  EXPECT_EQ(layers[1].eager, 70);
  EXPECT_THROW(memory_by_layer(ordered_json::parse(R"({"rows": [{"layer": 3}]})"), "memory.json"), Error);
}

TEST(Report, LayersThatAreForetoldComeBeforeRows) {
  const ordered_json memory = ordered_json::parse(R"({"rows": [], "layers": [
    {"layer": "a", "kept_bytes": 10, "predicted_bytes": 11, "eager_bytes": 40}]})");
  const std::vector<LayerMemory> layers = memory_by_layer(memory, "memory.json");
  ASSERT_EQ(layers.size(), 1u);
  EXPECT_EQ(layers[0].kept, 10);
  EXPECT_EQ(layers[0].described_kept, 10);
  EXPECT_EQ(layers[0].predicted, 11);
  EXPECT_EQ(layers[0].eager, 40);
  EXPECT_THROW(
      memory_by_layer(ordered_json::parse(R"({"rows": [], "layers": [{"layer": "a"}]})"), "memory.json"),
      Error);
}

TEST(Report, ThePeakIsLabelledWithItsPhase) {
  const Timeline timeline{.step = 2,
                          .kept_bytes = 6000,
                          .peak_bytes = 9000,
                          .seconds = 0.3,
                          .phases = {{"forward", 0, 0.1}, {"backward", 0.1, 0.25}, {"optimizer", 0.25, 0.3}},
                          .samples = {{0, 0}, {0.05, 4000}, {0.12, 9000}, {0.2, 9000}, {0.25, 0}},
                          .layers = {}};
  EXPECT_EQ(peak_of(timeline), (std::pair<double, int64_t>(0.12, 9000)));
  EXPECT_EQ(phase_at(timeline, 0.12), "backward");
  EXPECT_EQ(phase_at(timeline, 0.5), "");
  const std::string svg = timeline_chart({"id", "title", "words"}, timeline, 0, 0.3, 9000);
  EXPECT_NE(svg.find("peak 9.0 kB"), std::string::npos);
}

TEST(Report, ChartsOfOneValueOrConstantsAreDrawn) {
  for (const Points& points :
       {Points{{1, 0}}, Points{{5, 2.5}}, Points{{1, 3}, {2, 3}}, Points{{1, -1}, {9, -2}},
        Points{{1, 1e-9}, {2, 1e9}}, Points{{1, 5}, {2, std::nextafter(5.0, 6)}},
        Points{{1, 1e-300}, {2, 1.7e308}}}) {
    const std::vector<Curve> curves{{0, "run", points}};
    const std::string svg = line_chart({"id", "title", "words"}, curves, far_apart(curves));
    EXPECT_EQ(svg.find("nan"), std::string::npos) << svg;
    EXPECT_EQ(svg.find("inf"), std::string::npos) << svg;
  }
  EXPECT_EQ(bar_chart({"id", "t", "d"}, {{"layer", {{{{"kept", 0}}, "kept", "0 B", ""}}}}).find("nan"),
            std::string::npos);
}

class ReportFolder : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "remnant_report_XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string run(const std::string& name, const std::string& program, const std::string& metrics) {
    fs::create_directories(folder_ / name);
    std::ofstream(folder_ / name / "config.json") << R"({"program": ")" << program << R"(", "lr": 0.1})";
    std::ofstream(folder_ / name / "metrics.jsonl") << metrics;
    return (folder_ / name).string();
  }

  std::string error_of(const std::vector<std::string>& paths) {
    try {
      load_runs(paths);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  }

  fs::path folder_;
};

TEST_F(ReportFolder, OnlyTheLastLineMayBeCut) {
  const Runs runs = load_runs({run("a", "lm", "{\"step\":1,\"loss\":2}\n\n{\"step\":2,\"lo")});
  ASSERT_EQ(runs[0].lines.size(), 1u);
  EXPECT_NE(page(runs).find("line 3, is cut short"), std::string::npos);
  EXPECT_NE(error_of({run("b", "lm", "{\"step\":1,\"lo\n{\"step\":2,\"loss\":1}\n")}).find("line 1"),
            std::string::npos);
  EXPECT_NE(error_of({run("c", "lm", "{\"loss\":1}\n{\"step\":2,\"loss\":1}\n")}).find("with a step"),
            std::string::npos);
}

TEST_F(ReportFolder, ValuesThatAreNotFiniteAreLeftOut) {
  const Runs runs = load_runs({run("a", "lm", "{\"step\":1,\"loss\":null}\n{\"step\":2,\"loss\":1.5}\n")});
  EXPECT_EQ(series(runs[0], "loss"), (Points{{2, 1.5}}));
}

TEST_F(ReportFolder, RunsAreOfOneProgramAndNamedApart) {
  const std::string a = run("x/run", "lm", ""), b = run("y/run", "lm", ""), c = run("z", "classify", "");
  const Runs runs = load_runs({a, b});
  EXPECT_NE(runs[0].name, runs[1].name);
  EXPECT_EQ(load_runs({a + "/"})[0].name, "run");
  EXPECT_NE(error_of({a, c}).find("runs of one program"), std::string::npos);
  EXPECT_NE(error_of({a, a + "/."}).find("given twice"), std::string::npos);
  EXPECT_TRUE(page(runs).starts_with(kPageMark));
}

TEST_F(ReportFolder, DamagedTimelinesAreNamed) {
  const std::string a = run("a", "lm", "");
  std::ofstream(folder_ / "a/timeline.json")
      << R"({"step": 1, "seconds": 1, "kept_bytes": 1, "peak_bytes": 1, "phases": [], "layers": [],
             "sample_seconds": [0, 1], "sample_bytes": [0]})";
  EXPECT_NE(error_of({a}).find("timeline.json is damaged: sample_seconds holds 2"), std::string::npos);
}

}  // namespace
}  // namespace remnant::app::report
