#include <remnant/memory.h>

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <sstream>

namespace {

using remnant::memory::Report;
using remnant::memory::SavedRow;

SavedRow row(const std::string& layer, const std::string& op, std::vector<int64_t> shape, int64_t bytes,
             int64_t predicted = -1) {
  SavedRow result;
  result.layer = layer;
  result.op = op;
  result.shape = std::move(shape);
  result.dtype = "Float";
  result.kept_bytes = bytes;
  result.predicted_bytes = predicted;
  return result;
}

Report example() {
  Report report;
  report.rows = {row("encoder.layers.0", "AddmmBackward0", {2, 3}, 24),
                 row("encoder.layers.1", "AddmmBackward0", {2, 3}, 24),
                 row("encoder.layers.1", "AddmmBackward0", {4, 3}, 48),
                 row("head", "AttentionBackward", {250000}, 1000000, 1000000),
                 row("head", "AttentionBackward", {250000}, 1000000, 0)};
  report.rows[3].policy = report.rows[4].policy = "curve:m=4";
  report.kept_bytes = 2000096;
  return report;
}

std::string read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

class ReportFile : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::path(::testing::TempDir()) /
              ("remnant_report_" + std::to_string(std::hash<std::string>()(
                                       ::testing::UnitTest::GetInstance()->current_test_info()->name())));
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  std::filesystem::path folder_;
};

TEST(Report, TableFoldsLayersThatDifferInTheirNumbers) {
  EXPECT_EQ(
      example().table(),
      "layer             op                 policy     shape   dtype  count  kept bytes  predicted bytes  "
      "eager bytes\n"
      "encoder.layers.*  AddmmBackward0                2x3     Float      2          48\n"
      "encoder.layers.1  AddmmBackward0                4x3     Float      1          48\n"
      "head              AttentionBackward  curve:m=4  250000  Float      2   2,000,000        1,000,000\n"
      "total                                                              5   2,000,096\n");
}

TEST(Report, TableSaysWhatIsMissing) {
  Report report = example();
  report.unreadable = 3;
  EXPECT_NE(report.table().find("not counted: what 3 nodes keep"), std::string::npos) << report.table();
}

TEST(Report, JsonHoldsEveryRow) {
  Report report;
  report.rows = {row("a \"b\"\\\n", "Op", {2, 3}, 24, 24), row("", "Op", {}, 4)};
  report.rows[0].eager_bytes = 0;
  report.kept_bytes = 28;
  EXPECT_EQ(
      report.json(),
      "{\n  \"kept_bytes\": 28,\n  \"unreadable\": 0,\n  \"rows\": [\n"
      "    {\"layer\": \"a \\\"b\\\"\\\\\\u000a\", \"op\": \"Op\", \"policy\": \"\", \"shape\": [2, 3], "
      "\"dtype\": \"Float\", \"count\": 1, \"kept_bytes\": 24, \"predicted_bytes\": 24, \"eager_bytes\": "
      "0},\n"
      "    {\"layer\": \"\", \"op\": \"Op\", \"policy\": \"\", \"shape\": [], "
      "\"dtype\": \"Float\", \"count\": 1, \"kept_bytes\": 4, \"predicted_bytes\": null, "
      "\"eager_bytes\": null}\n  ]\n}\n");
  EXPECT_EQ(Report().json(), "{\n  \"kept_bytes\": 0,\n  \"unreadable\": 0,\n  \"rows\": []\n}\n");
}

TEST(Report, CsvQuotesWhatItMust) {
  Report report;
  report.rows = {row("a,\"b\"", "Op", {2, 3}, 24, 24)};
  EXPECT_EQ(report.csv(),
            "layer,op,policy,shape,dtype,count,kept_bytes,predicted_bytes,eager_bytes\n"
            "\"a,\"\"b\"\"\",Op,,2x3,Float,1,24,24,\n");
}

TEST_F(ReportFile, TheEndingChoosesTheForm) {
  const Report report = example();
  for (const auto& [name, text] : {std::pair<std::string, std::string>{"memory.json", report.json()},
                                   {"memory.csv", report.csv()},
                                   {"memory.txt", report.table()}}) {
    report.write((folder_ / name).string());
    EXPECT_EQ(read(folder_ / name), text) << name;
  }
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder_), {}), 3)
      << "nothing else is left behind";
}

TEST_F(ReportFile, AFailureLeavesTheEarlierFile) {
  const auto path = folder_ / "memory.json";
  std::filesystem::create_directory(path);  // cannot be renamed over
  std::ofstream(path / "inside") << "kept";
  EXPECT_THROW(example().write(path.string()), c10::Error);
  EXPECT_EQ(read(path / "inside"), "kept");
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder_), {}), 1) << "no partial file is left";
}

TEST_F(ReportFile, AMissingFolderIsOneSentence) {
  const std::string path = (folder_ / "none" / "memory.csv").string();
  try {
    example().write(path);
    FAIL() << "wrote into a folder that does not exist";
  } catch (const c10::Error& error) {
    const std::string text = error.what_without_backtrace();
    EXPECT_NE(text.find("cannot write " + path + ": No such file or directory"), std::string::npos) << text;
  }
}

}  // namespace
