#include "common/run_folder.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <pty.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <optional>
#include <random>
#include <set>
#include <sstream>
#include <thread>

#include "common/error.h"

namespace remnant::app {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

class Folder : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "remnant_run_folder_XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override {
    fs::permissions(folder_, fs::perms::owner_all);
    fs::remove_all(folder_);
  }
  fs::path folder_;
};

using WriteFile = Folder;
using TensorFile = Folder;
using RunFolderTest = Folder;
using ReplaceDirectory = Folder;
using Events = Folder;

std::string read(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in) << path;
  return {std::istreambuf_iterator<char>(in), {}};
}

void write(const fs::path& path, const std::string& content) {
  std::ofstream out(path, std::ios::binary);
  out << content;
  ASSERT_TRUE(out.flush()) << path;
}

std::set<std::string> names_in(const fs::path& folder) {
  std::set<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) names.insert(entry.path().filename().string());
  return names;
}

template <typename Function>
std::string error_of(const Function& function) {
  try {
    function();
  } catch (const Error& error) {
    return error.what();
  }
  ADD_FAILURE() << "no Error was thrown";
  return "";
}

// Files cannot grow past `bytes`: what a full disk looks like to a writer, apart from the reason.
class SizeLimit {
 public:
  explicit SizeLimit(rlim_t bytes) {
    handler_ = std::signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &before_);
    rlimit limit = before_;
    limit.rlim_cur = bytes;
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~SizeLimit() {
    setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, handler_);
  }

 private:
  rlimit before_;
  void (*handler_)(int);
};

TEST_F(WriteFile, WritesAndReplaces) {
  const fs::path file = folder_ / "a.txt";
  write_file_atomically(file, "first");
  EXPECT_EQ(read(file), "first");
  const std::string binary("\0\n\xff", 3);
  write_file_atomically(file, binary);
  EXPECT_EQ(read(file), binary);
  write_file_atomically(file, "");
  EXPECT_EQ(read(file), "");
  EXPECT_EQ(names_in(folder_), std::set<std::string>{"a.txt"});
}

TEST_F(WriteFile, AReaderThatHasTheOldFileOpenKeepsIt) {
  const fs::path file = folder_ / "a.txt";
  write_file_atomically(file, "old");
  std::ifstream open_before(file);
  write_file_atomically(file, "new content");
  std::string seen;
  std::getline(open_before, seen);
  EXPECT_EQ(seen, "old");
}

TEST_F(WriteFile, AFullDiskLeavesTheOldFileAndNothingElse) {
  const fs::path file = folder_ / "a.txt";
  write_file_atomically(file, "old");
  std::string message;
  {
    const SizeLimit limit(100);
    message = error_of([&] { write_file_atomically(file, std::string(1000, 'x')); });
  }
  EXPECT_EQ(message, "cannot write " + file.string() + ": File too large");
  EXPECT_EQ(read(file), "old");
  EXPECT_EQ(names_in(folder_), std::set<std::string>{"a.txt"});
}

TEST_F(WriteFile, AnExceptionOfTheWriterLeavesTheOldFileAndNothingElse) {
  const fs::path file = folder_ / "a.txt";
  write_file_atomically(file, "old");
  const auto fails = [&] {
    write_file_atomically(file, [](const ByteSink& sink) {
      sink("new", 3);
      throw std::logic_error("no");
    });
  };
  EXPECT_THROW(fails(), std::logic_error);
  EXPECT_EQ(read(file), "old");
  EXPECT_EQ(names_in(folder_), std::set<std::string>{"a.txt"});
}

TEST_F(WriteFile, SaysWhyItCannotWrite) {
  EXPECT_EQ(error_of([&] { write_file_atomically(folder_ / "none" / "a", "x"); }),
            "cannot write " + (folder_ / "none" / "a").string() + ": No such file or directory");
  fs::create_directory(folder_ / "taken");
  EXPECT_EQ(error_of([&] { write_file_atomically(folder_ / "taken", "x"); }),
            "cannot write " + (folder_ / "taken").string() + ": Is a directory");
  EXPECT_EQ(names_in(folder_), std::set<std::string>{"taken"});
}

TEST_F(WriteFile, SaysThatTheFolderIsNotWritable) {
  if (geteuid() == 0) GTEST_SKIP() << "root may write everywhere";
  fs::permissions(folder_, fs::perms::owner_read | fs::perms::owner_exec);
  EXPECT_EQ(error_of([&] { write_file_atomically(folder_ / "a", "x"); }),
            "cannot write " + (folder_ / "a").string() + ": Permission denied");
}

TEST_F(WriteFile, ThreadsThatWriteOneFileDoNotMix) {
  const fs::path file = folder_ / "a.txt";
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (const char c : {'a', 'b'}) {
    threads.emplace_back([&, c] {
      try {
        for (int i = 0; i < 20; ++i) write_file_atomically(file, std::string(5000, c));
      } catch (const Error&) {
        ++failures;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failures, 0);
  const std::string content = read(file);
  EXPECT_EQ(content, std::string(5000, content.at(0)));
  EXPECT_EQ(names_in(folder_), std::set<std::string>{"a.txt"});
}

std::string with_length(const std::string& header) {
  const uint64_t length = header.size();
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  return bytes + header;
}

// Not at::equal, for which NaN differs from itself.
void expect_same_bytes(const at::Tensor& actual, const at::Tensor& expected) {
  EXPECT_EQ(actual.scalar_type(), expected.scalar_type());
  ASSERT_EQ(actual.sizes(), expected.sizes());
  EXPECT_TRUE(actual.is_contiguous());
  const at::Tensor dense = expected.contiguous();
  if (dense.numel() == 0) return;
  EXPECT_EQ(std::memcmp(actual.const_data_ptr(), dense.const_data_ptr(), dense.nbytes()), 0);
}

TEST_F(TensorFile, EveryDtypeComesBack) {
  std::map<std::string, at::Tensor> tensors;
  for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt,
                                    at::kShort, at::kChar, at::kByte, at::kBool}) {
    tensors[std::string("t.") + toString(type)] = at::randn({3, 5}).mul(50).abs().to(type);
  }
  save_tensors(folder_ / "t", tensors, {{"format", "pt"}, {"größe", "\"5\"\n"}});
  const LoadedTensors loaded = load_tensors(folder_ / "t");
  ASSERT_EQ(loaded.tensors.size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    SCOPED_TRACE(name);
    expect_same_bytes(loaded.tensors.at(name), tensor);
  }
  EXPECT_EQ(loaded.metadata, (std::map<std::string, std::string>{{"format", "pt"}, {"größe", "\"5\"\n"}}));
}

TEST_F(TensorFile, ViewsScalarsAndEmptyTensorsComeBack) {
  const at::Tensor base = at::arange(24, at::kFloat).view({2, 3, 4});
  const std::map<std::string, at::Tensor> tensors = {
      {"transposed", base.transpose(0, 2)},
      {"strided", base.slice(2, 1, 4, 2)},
      {"expanded", base.select(0, 1).unsqueeze(0).expand({3, 3, 4})},
      {"scalar", at::full({}, 7.5, at::kDouble)},
      {"empty", at::empty({0}, at::kLong)},
      {"empty matrix", at::empty({3, 0, 2})},
      {"learned", at::randn({4}).requires_grad_(true)},
      {"", at::ones({1}, at::kByte)}};
  save_tensors(folder_ / "t", tensors);
  const LoadedTensors loaded = load_tensors(folder_ / "t");
  ASSERT_EQ(loaded.tensors.size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    SCOPED_TRACE(name);
    expect_same_bytes(loaded.tensors.at(name), tensor);
  }
  EXPECT_TRUE(loaded.metadata.empty());
  EXPECT_FALSE(loaded.tensors.at("learned").requires_grad());
}

TEST_F(TensorFile, ValuesThatAreNoNumbersKeepTheirBits) {
  const double infinity = std::numeric_limits<double>::infinity();
  at::Tensor odd = at::tensor({std::nan("1"), infinity, -infinity, -0.0, 5e-324}, at::kDouble);
  save_tensors(folder_ / "t", {{"odd", odd}, {"half", odd.to(at::kHalf)}});
  const LoadedTensors loaded = load_tensors(folder_ / "t");
  expect_same_bytes(loaded.tensors.at("odd"), odd);
  expect_same_bytes(loaded.tensors.at("half"), odd.to(at::kHalf));
  EXPECT_TRUE(at::isnan(loaded.tensors.at("odd")[0]).item<bool>());
}

TEST_F(TensorFile, TheBytesAreTheLayouts) {
  save_tensors(folder_ / "t",
               {{"a", at::tensor({1, 2, 255}, at::kByte)}, {"b", at::tensor({1.0f}, at::kFloat)}},
               {{"k", "v"}});
  std::string header = R"({"__metadata__":{"k":"v"},)"
                       R"("a":{"dtype":"U8","shape":[3],"data_offsets":[4,7]},)"
                       R"("b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})";
  while (header.size() % 8 != 0) header += ' ';
  EXPECT_EQ(read(folder_ / "t"), with_length(header) + std::string("\0\0\x80\x3f\x01\x02\xff", 7));
}

TEST_F(TensorFile, EveryTensorIsAligned) {
  save_tensors(folder_ / "t", {{"a", at::ones({3}, at::kBool)},
                               {"b", at::ones({5}, at::kShort)},
                               {"c", at::ones({3}, at::kFloat)},
                               {"d", at::ones({2}, at::kDouble)}});
  const std::string content = read(folder_ / "t");
  uint64_t length = 0;
  std::memcpy(&length, content.data(), 8);
  EXPECT_EQ(length % 8, 0u);
  const auto header = ordered_json::parse(content.substr(8, length));
  const std::map<std::string, int64_t> sizes = {{"a", 1}, {"b", 2}, {"c", 4}, {"d", 8}};
  for (const auto& [name, size] : sizes) {
    EXPECT_EQ(header[name]["data_offsets"][0].get<int64_t>() % size, 0) << name;
  }
}

TEST_F(TensorFile, AFileOfAnotherWriterLoads) {
  // Unpadded, in another order, with spaces and a field of its own.
  const std::string header =
      R"({ "y": {"shape": [2,1], "dtype": "I16", "data_offsets": [1, 5], "note": "x"},)"
      R"( "x": {"data_offsets": [0, 1], "dtype": "BOOL", "shape": []} })";
  write(folder_ / "t", with_length(header) + std::string("\x01\x02\x00\xff\xff", 5));
  const LoadedTensors loaded = load_tensors(folder_ / "t");
  expect_same_bytes(loaded.tensors.at("x"), at::full({}, true, at::kBool));
  expect_same_bytes(loaded.tensors.at("y"), at::tensor({2, -1}, at::kShort).view({2, 1}));
}

TEST_F(TensorFile, NoTensorsAtAll) {
  save_tensors(folder_ / "t", {});
  EXPECT_TRUE(load_tensors(folder_ / "t").tensors.empty());
}

TEST_F(TensorFile, AFileCutAnywhereIsAnError) {
  save_tensors(folder_ / "t", {{"w", at::randn({2, 3})}, {"n", at::ones({3}, at::kByte)}}, {{"step", "12"}});
  const std::string content = read(folder_ / "t");
  for (size_t size = 0; size < content.size(); ++size) {
    write(folder_ / "cut", content.substr(0, size));
    const std::string message = error_of([&] { load_tensors(folder_ / "cut"); });
    EXPECT_EQ(message.find((folder_ / "cut").string() + " is damaged or not a tensor file: "), 0u)
        << size << ": " << message;
  }
  write(folder_ / "cut", content + "x");
  error_of([&] { load_tensors(folder_ / "cut"); });
}

TEST_F(TensorFile, DamagedHeadersLoadOrFailCleanly) {
  save_tensors(folder_ / "t",
               {{"w", at::randn({2, 3})}, {"n", at::ones({3}, at::kBool)}, {"e", at::empty({0})}},
               {{"step", "12"}});
  const std::string content = read(folder_ / "t");
  uint64_t length = 0;
  std::memcpy(&length, content.data(), 8);
  std::mt19937 random(7);
  int failed = 0, loaded = 0;
  for (int i = 0; i < 1000; ++i) {
    std::string damaged = content;
    for (uint32_t flips = 1 + random() % 3; flips > 0; --flips) {
      const size_t at = random() % (8 + length);
      // Mostly a digit or a mark of JSON, which gets past the parser more often than any byte.
      const std::string likely = "0123456789[]{},:\"-.";
      damaged[at] = random() % 2 == 0 ? likely[random() % likely.size()] : static_cast<char>(random());
    }
    write(folder_ / "damaged", damaged);
    try {
      for (const auto& [name, tensor] : load_tensors(folder_ / "damaged").tensors) {
        EXPECT_LE(tensor.nbytes(), damaged.size());
      }
      ++loaded;
    } catch (const Error&) {
      ++failed;
    }
  }
  EXPECT_GT(failed, 0);
  EXPECT_GT(loaded, 0);  // a changed name, for one, is no damage that anyone can see
}

TEST_F(TensorFile, HugeHeaderLengthsAreRefused) {
  for (const uint64_t claimed : {uint64_t{17}, uint64_t{1} << 20, uint64_t{99'999'999}, uint64_t{100'000'001},
                                 uint64_t{1} << 40, uint64_t{1} << 63, ~uint64_t{0}, ~uint64_t{0} - 7}) {
    std::string content(24, ' ');
    std::memcpy(content.data(), &claimed, 8);
    write(folder_ / "t", content);
    const std::string message = error_of([&] { load_tensors(folder_ / "t"); });
    EXPECT_NE(message.find("its header claims " + std::to_string(claimed) + " bytes"), std::string::npos)
        << message;
  }
}

struct BadHeader {
  const char* header;
  size_t data_bytes;
  const char* says;
};

TEST_F(TensorFile, MalformedHeadersAreNamed) {
  const BadHeader cases[] = {
      {"", 0, "its header is no JSON object"},
      {"[1]", 0, "its header is no JSON object"},
      {"{\"a\":", 0, "its header is no valid JSON"},
      {"{\"\xff\":1}", 0, "its header is no valid JSON"},
      {R"({"a":1})", 0, R"(its tensor "a" lacks dtype, shape or data_offsets)"},
      {R"({"a":{"dtype":"F32","shape":[1]}})", 4, R"(its tensor "a" lacks dtype, shape or data_offsets)"},
      {R"({"a\u001b[2J":1})", 0, R"(its tensor "a\u001b[2J" lacks)"},
      {R"({"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}})", 1, R"(has the dtype "F8_E4M3")"},
      {R"({"a":{"dtype":5,"shape":[1],"data_offsets":[0,1]}})", 1, "has the dtype 5"},
      {R"({"a":{"dtype":"U8","shape":1,"data_offsets":[0,1]}})", 1, "a shape that is no list of sizes"},
      {R"({"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}})", 1, "a shape that is no list of sizes"},
      {R"({"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}})", 1, "a shape that is no list of sizes"},
      {R"({"a":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,1]}})", 1,
       "a shape that is no list of sizes"},
      {R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0,
       "a shape too large for any memory"},
      {R"({"a":{"dtype":"F32","shape":[0,4611686018427387904,4],"data_offsets":[0,0]}})", 0,
       "a shape too large for any memory"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4,
       "needs 8 bytes for its shape but has 4"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}})", 1, "data_offsets that are no range"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}})", 1, "data_offsets that are no range"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[-1,0]}})", 1, "data_offsets that are no range"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[5,6]}})", 1, R"("a" overlaps or leaves a gap)"},
      {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
       3, R"("b" overlaps or leaves a gap)"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
       3, R"("b" overlaps or leaves a gap)"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
       1, R"(its header names "a" twice)"},
      {R"({"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}})", 3,
       "its tensors take 9 bytes but 3 follow its header"},
      {R"({"a":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1]}})", 1, "holds bytes other than 0 and 1"},
      {R"({"__metadata__":{"a":1}})", 0, R"(its metadata "a" are no string)"},
      {R"({"__metadata__":[]})", 0, "its metadata are no object"},
  };
  for (const BadHeader& bad : cases) {
    write(folder_ / "t", with_length(bad.header) + std::string(bad.data_bytes, '\2'));
    const std::string message = error_of([&] { load_tensors(folder_ / "t"); });
    EXPECT_NE(message.find(bad.says), std::string::npos) << bad.header << "\n" << message;
  }
}

TEST_F(TensorFile, LongNamesDoNotFloodTheMessage) {
  write(folder_ / "t", with_length("{\"" + std::string(100000, 'n') + "\":1}"));
  EXPECT_LT(error_of([&] { load_tensors(folder_ / "t"); }).size(), folder_.string().size() + 250);
}

TEST_F(TensorFile, DeepNestingIsNoStackOverflow) {
  write(folder_ / "t", with_length("{\"a\":" + std::string(500000, '[') + std::string(500000, ']') + "}"));
  EXPECT_NE(error_of([&] { load_tensors(folder_ / "t"); }).find("lacks dtype"), std::string::npos);
}

TEST_F(TensorFile, WhatIsNoFileIsNamed) {
  EXPECT_EQ(error_of([&] { load_tensors(folder_ / "none"); }),
            "cannot read " + (folder_ / "none").string() + ": No such file or directory");
  EXPECT_EQ(error_of([&] { load_tensors(folder_); }),
            folder_.string() + " is not a tensor file: it is no regular file");
  ASSERT_EQ(mkfifo((folder_ / "pipe").c_str(), 0600), 0);
  EXPECT_EQ(error_of([&] { load_tensors(folder_ / "pipe"); }),
            (folder_ / "pipe").string() + " is not a tensor file: it is no regular file");
}

TEST_F(TensorFile, WhatCannotBeSavedLeavesTheOldFile) {
  save_tensors(folder_ / "t", {{"w", at::ones({2})}});
  const std::string before = read(folder_ / "t");
  const auto fails_with = [&](const std::map<std::string, at::Tensor>& tensors, const std::string& says) {
    const std::string message = error_of([&] { save_tensors(folder_ / "t", tensors); });
    EXPECT_NE(message.find(says), std::string::npos) << message;
  };
  fails_with({{"c", at::ones({2}, at::kComplexFloat)}},
             "the tensor 'c' is ComplexFloat, expected a dense tensor");
  fails_with({{"s", at::ones({2}).to_sparse()}}, "the tensor 's' is Float, expected a dense tensor");
  fails_with({{"u", at::Tensor()}}, "the tensor 'u' is undefined");
  fails_with({{"__metadata__", at::ones({2})}}, "has a name that the layout keeps for itself");
  fails_with({{"\xff", at::ones({2})}}, "not valid UTF-8");
  {
    const SizeLimit limit(1000);
    fails_with({{"big", at::ones({1000})}}, "cannot write " + (folder_ / "t").string() + ": File too large");
  }
  EXPECT_EQ(read(folder_ / "t"), before);
  EXPECT_EQ(names_in(folder_), std::set<std::string>{"t"});
}

TEST_F(RunFolderTest, CreateWriteOpenRead) {
  const fs::path path = folder_ / "runs" / "first";
  const RunFolder run = RunFolder::create(path, false);
  EXPECT_EQ(run.path(), path);
  run.write_json("config.json", {{"seed", 1}, {"attention", "curve:m=4"}});
  const RunFolder opened = RunFolder::open(path);
  EXPECT_EQ(opened.path(), path);
  EXPECT_EQ(opened.read_json("config.json").dump(), R"({"seed":1,"attention":"curve:m=4"})");
  EXPECT_EQ(read(path / "config.json"), "{\n  \"seed\": 1,\n  \"attention\": \"curve:m=4\"\n}\n");
}

TEST_F(RunFolderTest, ARunIsNotOverwritten) {
  {
    const RunFolder run = RunFolder::create(folder_ / "run", false);
    run.write_json("config.json", {{"seed", 1}});
    run.append_metrics({{"step", 1}});
  }
  EXPECT_EQ(error_of([&] { RunFolder::create(folder_ / "run", false); }),
            (folder_ / "run").string() + " already holds a run: choose another --out or pass --resume");
  const RunFolder resumed = RunFolder::create(folder_ / "run", true);
  EXPECT_EQ(resumed.read_json("config.json")["seed"], 1);
  // A folder with other things in it is no run.
  write(folder_ / "notes", "");
  RunFolder::create(folder_, false);
}

TEST_F(RunFolderTest, OneTrainingAtATime) {
  const fs::path path = folder_ / "run";
  std::optional<RunFolder> run = RunFolder::create(path, false);
  run->write_json("config.json", {{"seed", 1}});
  run->write_json("memory.json", {{"kept_bytes", 1}});
  const RunFolder copy = *run;
  run.reset();
  for (const bool resume : {false, true}) {
    EXPECT_EQ(error_of([&] { RunFolder::create(path, resume); }),
              "another training is writing to " + path.string() +
                  ": wait until it has ended, or choose another --out");
  }
  EXPECT_TRUE(fs::exists(path / "memory.json"));
  EXPECT_EQ(RunFolder::open(path).read_json("config.json")["seed"], 1);
}

TEST_F(RunFolderTest, ADeadTrainingKeepsNobodyOut) {
  write(folder_ / ".lock", "");
  {
    const RunFolder run = RunFolder::create(folder_, false);
  }
  EXPECT_TRUE(names_in(folder_).empty());
}

TEST_F(RunFolderTest, ARunThatDidNoStepIsBegunAnew) {
  const fs::path path = folder_ / "run";
  {
    const RunFolder run = RunFolder::create(path, false);
    for (const char* name : {"config.json", "memory.json", "plan.json", "other.json"})
      run.write_json(name, {{"seed", 1}});
  }
  const RunFolder run = RunFolder::open(path);
  EXPECT_FALSE(RunFolder::is_taken(run.path()));
  RunFolder::create(run.path(), true);
  EXPECT_TRUE(fs::exists(run.path() / "plan.json"));
  RunFolder::create(run.path(), false);
  EXPECT_FALSE(fs::exists(run.path() / "memory.json") || fs::exists(run.path() / "plan.json"));
  EXPECT_TRUE(fs::exists(run.path() / "other.json"));
  for (const char* name : {"checkpoint", "checkpoint.old", "best"}) {
    fs::create_directory(run.path() / name);
    EXPECT_TRUE(RunFolder::is_taken(run.path())) << name;
    fs::remove(run.path() / name);
  }
}

TEST_F(RunFolderTest, WhatIsMissingOrWrongIsNamed) {
  EXPECT_EQ(error_of([&] { RunFolder::open(folder_ / "none"); }),
            "cannot open the run folder " + (folder_ / "none").string() + ": No such file or directory");
  EXPECT_EQ(error_of([&] { RunFolder::open(folder_); }),
            folder_.string() + " is not a run folder: it holds no config.json");
  write(folder_ / "file", "");
  EXPECT_EQ(error_of([&] { RunFolder::open(folder_ / "file"); }),
            (folder_ / "file").string() + " is a file, not a run folder");
  EXPECT_EQ(error_of([&] { RunFolder::create(folder_ / "file", false); }),
            (folder_ / "file").string() + " is a file, not a folder: choose another --out");
  EXPECT_EQ(error_of([&] { RunFolder::create(folder_ / "file" / "run", false); }),
            "cannot make the folder " + (folder_ / "file" / "run").string() + ": Not a directory");
  const RunFolder run = RunFolder::create(folder_ / "run", false);
  EXPECT_EQ(error_of([&] { run.read_json("summary.json"); }),
            "the run folder " + run.path().string() + " holds no summary.json");
  write(run.path() / "summary.json", "{\"a\": 1");
  EXPECT_EQ(error_of([&] { run.read_json("summary.json"); }),
            (run.path() / "summary.json").string() + " is damaged: it is not valid JSON");
  EXPECT_EQ(error_of([&] { run.write_json("config.json", {{"path", "\xff"}}); }),
            "cannot write " + (run.path() / "config.json").string() +
                ": it would hold text that is not valid UTF-8");
}

TEST_F(RunFolderTest, MetricsAreAppendedAndDropped) {
  const RunFolder run = RunFolder::create(folder_, false);
  run.drop_metrics_after(3);  // nothing there yet
  EXPECT_EQ(names_in(folder_), std::set<std::string>{".lock"});
  for (int step = 1; step <= 5; ++step) run.append_metrics({{"step", step}, {"loss", 1.0 / step}});
  run.append_metrics({{"note", "no step"}});
  const std::string all = read(folder_ / "metrics.jsonl");
  EXPECT_EQ(all.substr(0, all.find('\n')), R"({"step":1,"loss":1.0})");
  run.drop_metrics_after(5);
  EXPECT_EQ(read(folder_ / "metrics.jsonl"), all);
  run.drop_metrics_after(2);
  EXPECT_EQ(read(folder_ / "metrics.jsonl"),
            "{\"step\":1,\"loss\":1.0}\n{\"step\":2,\"loss\":0.5}\n{\"note\":\"no step\"}\n");
  run.append_metrics({{"step", 3}});
  run.drop_metrics_after(0);
  EXPECT_EQ(read(folder_ / "metrics.jsonl"), "{\"note\":\"no step\"}\n");
  EXPECT_EQ(names_in(folder_), (std::set<std::string>{".lock", "metrics.jsonl"}));
}

TEST_F(RunFolderTest, ATornLastLineIsDropped) {
  const RunFolder run = RunFolder::create(folder_, false);
  const std::string whole = "{\"step\":1}\n{\"step\":2}\n";
  const std::vector<std::string> torn_ends = {"{\"st", "{\"step\":3}", "{\"st\n", std::string("\0\0\0\n", 4),
                                              "{\"step\":3}\n{"};
  for (const std::string& torn : torn_ends) {
    write(folder_ / "metrics.jsonl", whole + torn);
    run.drop_metrics_after(2);
    EXPECT_EQ(read(folder_ / "metrics.jsonl"), whole) << torn;
  }
  write(folder_ / "metrics.jsonl", "{\"step\":1}\noops\n{\"step\":2}\n");
  EXPECT_EQ(error_of([&] { run.drop_metrics_after(9); }),
            (folder_ / "metrics.jsonl").string() +
                ", line 2, is not a JSON object: remove that line, or start anew with another --out");
}

TEST_F(RunFolderTest, AFullDiskLeavesWholeMetricsLines) {
  const RunFolder run = RunFolder::create(folder_, false);
  run.append_metrics({{"step", 1}});
  const std::string before = read(folder_ / "metrics.jsonl");
  {
    const SizeLimit limit(before.size() + 5);
    EXPECT_EQ(error_of([&] { run.append_metrics({{"step", 2}}); }),
              "cannot write " + (folder_ / "metrics.jsonl").string() + ": File too large");
  }
  EXPECT_EQ(read(folder_ / "metrics.jsonl"), before);
}

void save_checkpoint(const fs::path& directory, const std::string& content) {
  replace_directory_atomically(directory, [&](const fs::path& at) {
    write(at / "model", content);
    fs::create_directory(at / "parts");
    write(at / "parts" / "optimizer", content);
  });
}

TEST_F(ReplaceDirectory, ReplacesWhole) {
  const fs::path directory = folder_ / "checkpoint";
  save_checkpoint(directory, "first");
  EXPECT_EQ(read(directory / "parts" / "optimizer"), "first");
  write(directory / "only in the first", "");
  save_checkpoint(directory.string() + "/", "second");
  EXPECT_EQ(names_in(directory), (std::set<std::string>{"model", "parts"}));
  EXPECT_EQ(read(directory / "model"), "second");
  EXPECT_EQ(names_in(folder_), std::set<std::string>{"checkpoint"});
}

TEST_F(ReplaceDirectory, AFailureWhileWritingLeavesThePreviousOne) {
  const fs::path directory = folder_ / "checkpoint";
  save_checkpoint(directory, "first");
  const auto fails = [&] {
    replace_directory_atomically(directory, [](const fs::path& at) {
      write(at / "model", "half");
      throw std::logic_error("no");
    });
  };
  EXPECT_THROW(fails(), std::logic_error);
  std::string message;
  {
    const SizeLimit limit(1000);
    message = error_of([&] {
      replace_directory_atomically(
          directory, [](const fs::path& at) { save_tensors(at / "model", {{"big", at::ones({1000})}}); });
    });
  }
  EXPECT_NE(message.find("File too large"), std::string::npos);
  EXPECT_EQ(read(directory / "model"), "first");
  EXPECT_EQ(names_in(folder_), std::set<std::string>{"checkpoint"});
}

// What a kill leaves: before the first rename, between the two, after the second.
TEST_F(ReplaceDirectory, InterruptedWhileWriting) {
  const fs::path directory = folder_ / "checkpoint";
  save_checkpoint(directory, "first");
  fs::create_directory(folder_ / "checkpoint.tmp");
  write(folder_ / "checkpoint.tmp" / "leftover", "half");
  EXPECT_FALSE(recover_directory(directory));
  EXPECT_EQ(read(directory / "model"), "first");
  save_checkpoint(directory, "second");
  EXPECT_EQ(names_in(directory), (std::set<std::string>{"model", "parts"}));
  EXPECT_EQ(names_in(folder_), std::set<std::string>{"checkpoint"});
}

TEST_F(ReplaceDirectory, InterruptedBetweenTheRenames) {
  const fs::path directory = folder_ / "checkpoint";
  save_checkpoint(directory, "first");
  fs::rename(directory, folder_ / "checkpoint.old");
  fs::create_directory(folder_ / "checkpoint.tmp");
  write(folder_ / "checkpoint.tmp" / "model", "second");
  EXPECT_TRUE(recover_directory(directory));
  EXPECT_FALSE(recover_directory(directory));
  EXPECT_EQ(read(directory / "model"), "first");

  fs::rename(directory, folder_ / "checkpoint.old");
  save_checkpoint(directory, "third");
  EXPECT_EQ(read(directory / "model"), "third");
  EXPECT_EQ(names_in(folder_), std::set<std::string>{"checkpoint"});
}

TEST_F(ReplaceDirectory, InterruptedBeforeTheOldOneWasRemoved) {
  const fs::path directory = folder_ / "checkpoint";
  save_checkpoint(directory, "second");
  fs::create_directory(folder_ / "checkpoint.old");
  write(folder_ / "checkpoint.old" / "model", "first");
  EXPECT_FALSE(recover_directory(directory));
  EXPECT_EQ(read(directory / "model"), "second");
  save_checkpoint(directory, "third");
  EXPECT_EQ(read(directory / "model"), "third");
  EXPECT_EQ(names_in(folder_), std::set<std::string>{"checkpoint"});
}

TEST_F(ReplaceDirectory, NothingToRecover) {
  EXPECT_FALSE(recover_directory(folder_ / "checkpoint"));
  fs::create_directory(folder_ / "checkpoint.tmp");  // of a first save: may be a part
  EXPECT_FALSE(recover_directory(folder_ / "checkpoint"));
  EXPECT_FALSE(fs::exists(folder_ / "checkpoint"));
}

TEST_F(ReplaceDirectory, OpeningARunRecovers) {
  RunFolder::create(folder_ / "run", false).write_json("config.json", {{"seed", 1}});
  const RunFolder run = RunFolder::open(folder_ / "run");
  for (const bool resume : {false, true}) {
    save_checkpoint(run.path() / "checkpoint", "first");
    fs::rename(run.path() / "checkpoint", run.path() / "checkpoint.old");
    resume ? RunFolder::create(run.path(), true) : RunFolder::open(run.path());
    EXPECT_EQ(read(run.path() / "checkpoint" / "model"), "first");
  }
}

TEST_F(ReplaceDirectory, AReaderWaitsForASwapThatIsUnderWay) {
  const fs::path directory = folder_ / "checkpoint";
  save_checkpoint(directory, "first");
  const int lock = open(folder_.c_str(), O_RDONLY | O_DIRECTORY);
  ASSERT_EQ(flock(lock, LOCK_EX), 0);
  fs::rename(directory, folder_ / "checkpoint.old");
  bool recovered = true;
  std::thread reader([&] { recovered = recover_directory(directory); });
  // A reader that did not wait would most likely rename within this time.
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  fs::create_directory(directory);
  write(directory / "model", "second");
  close(lock);
  reader.join();
  EXPECT_FALSE(recovered);
  EXPECT_EQ(read(directory / "model"), "second");
}

TEST_F(ReplaceDirectory, SaysWhyItCannotWrite) {
  write(folder_ / "file", "");
  const std::string message = error_of(
      [&] { replace_directory_atomically(folder_ / "file" / "checkpoint", [](const fs::path&) {}); });
  EXPECT_EQ(message, "cannot write " + (folder_ / "file" / "checkpoint").string() + ": Not a directory");
}

TEST_F(Events, AFullDiskIsAnErrorAndTheNextFlushGoesOn) {
  fs::path file;
  {
    EventWriter writer(folder_);
    file = folder_ / *names_in(folder_).begin();
    const auto header = fs::file_size(file);
    for (int step = 0; step < 10; ++step) writer.scalar("loss", step, step);
    {
      const SizeLimit limit(header + 100);
      EXPECT_EQ(error_of([&] { writer.flush(); }), "cannot write " + file.string() + ": File too large");
      EXPECT_EQ(fs::file_size(file), header + 100);
    }
  }
  // Framing tells that no byte was lost or written twice.
  const std::string content = read(file);
  size_t position = 0;
  int records = 0;
  for (; position + 8 <= content.size(); ++records) {
    uint64_t length = 0;
    std::memcpy(&length, content.data() + position, 8);
    ASSERT_LT(length, 100u);
    position += length + 16;
  }
  EXPECT_EQ(position, content.size());
  EXPECT_EQ(records, 11);
}

TEST_F(Events, TwoWritersAtOnceTakeTwoFiles) {
  const EventWriter first(folder_ / "events"), second(folder_ / "events");
  EXPECT_EQ(names_in(folder_ / "events").size(), 2u);
}

class InterruptTest : public ::testing::Test {
 protected:
  // The runner of the tests may have left them ignored.
  void SetUp() override {
    for (const int signal : {SIGINT, SIGTERM}) std::signal(signal, SIG_DFL);
  }
};

TEST_F(InterruptTest, ASignalSetsTheFlag) {
  for (const auto& [signal, code] : {std::pair(SIGINT, 130), std::pair(SIGTERM, 143)}) {
    const Interrupt interrupt;
    EXPECT_FALSE(Interrupt::requested());
    EXPECT_EQ(Interrupt::exit_code(), 0);
    raise(signal);
    EXPECT_TRUE(Interrupt::requested());
    EXPECT_EQ(Interrupt::exit_code(), code);
  }
  EXPECT_TRUE(Interrupt::requested());  // main() asks once the run is over
}

TEST_F(InterruptTest, ThePreviousHandlersComeBackAndIgnoredStaysIgnored) {
  static int calls = 0;
  std::signal(SIGTERM, [](int) { ++calls; });
  std::signal(SIGINT, SIG_IGN);
  {
    const Interrupt interrupt;
    raise(SIGINT);
    EXPECT_FALSE(Interrupt::requested());
    raise(SIGTERM);
    EXPECT_TRUE(Interrupt::requested());
    EXPECT_EQ(calls, 0);
  }
  raise(SIGTERM);
  EXPECT_EQ(calls, 1);
  SetUp();
}

TEST_F(InterruptTest, TheSecondSignalEndsTheProcess) {
  for (const int second : {SIGINT, SIGTERM}) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      const Interrupt interrupt;
      raise(SIGINT);
      if (!Interrupt::requested()) _exit(1);
      raise(second);
      _exit(2);
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status)) << "exit status " << WEXITSTATUS(status);
    EXPECT_EQ(WTERMSIG(status), second);
  }
}

TEST(Format, Bytes) {
  const std::pair<int64_t, const char*> cases[] = {{0, "0 B"},
                                                   {999, "999 B"},
                                                   {1000, "1.0 kB"},
                                                   {45'100'000, "45.1 MB"},
                                                   {999'949, "999.9 kB"},
                                                   {999'951, "1.0 MB"},
                                                   {616'000'000, "616.0 MB"},
                                                   {1'184'000'000, "1.2 GB"},
                                                   {-1500, "-1.5 kB"},
                                                   {-5, "-5 B"},
                                                   {std::numeric_limits<int64_t>::max(), "9.2 EB"}};
  for (const auto& [bytes, text] : cases) EXPECT_EQ(format_bytes(bytes), text);
}

TEST(Format, Duration) {
  const std::pair<double, const char*> cases[] = {{0, "0.0 s"},
                                                  {3.26, "3.3 s"},
                                                  {9.96, "10 s"},
                                                  {59.4, "59 s"},
                                                  {59.6, "1 min 0 s"},
                                                  {200, "3 min 20 s"},
                                                  {3599.6, "1 h 0 min"},
                                                  {3 * 3600 + 125, "3 h 2 min"},
                                                  {86399, "1 d 0 h"},
                                                  {86400 * 3 + 3600, "3 d 1 h"},
                                                  {-1, "?"},
                                                  {std::nan(""), "?"},
                                                  {std::numeric_limits<double>::infinity(), "?"}};
  for (const auto& [seconds, text] : cases) EXPECT_EQ(format_duration(seconds), text) << seconds;
}

TEST(ProgressLine, Plain) {
  EXPECT_EQ(progress_line("train", 1234, 2700, {"loss 3.21", "12.3k tokens/s"}, 200, 0),
            "train 45 % 1234/2700, loss 3.21, 12.3k tokens/s, 3 min 20 s left");
  EXPECT_EQ(progress_line("read", 7, 0, {}, -1, 0), "read 7");
  EXPECT_EQ(progress_line("train", 2699, 2700, {}, -1, 0), "train 99 % 2699/2700");
  EXPECT_EQ(progress_line("train", 9, 3, {}, -1, 0), "train 100 % 9/3");
}

TEST(ProgressLine, FitsEveryWidth) {
  const std::vector<std::string> fields = {"Verlust für 3.21", "12.3k tokens/s", "kept 45.1 MB"};
  EXPECT_EQ(progress_line("train", 50, 100, fields, 20, 120),
            "train [############............] 50 % 50/100  Verlust für 3.21  12.3k tokens/s  kept 45.1 MB  "
            "20 s left");
  EXPECT_EQ(progress_line("train", 50, 100, fields, 20, 90),
            "train [#####......] 50 % 50/100  Verlust für 3.21  12.3k tokens/s  kept 45.1 MB  20 s left");
  EXPECT_EQ(progress_line("train", 50, 100, fields, 20, 80),
            "train 50 % 50/100  Verlust für 3.21  12.3k tokens/s  kept 45.1 MB  20 s left");
  EXPECT_EQ(progress_line("train", 50, 100, fields, 20, 60),
            "train 50 % 50/100  Verlust für 3.21  20 s left");
  EXPECT_EQ(progress_line("train", 50, 100, fields, 20, 20), "train 50 % 50/100  2");
  for (int64_t width = 1; width < 200; ++width) {
    const std::string line = progress_line("über", 50, 100, fields, 20, width);
    int64_t characters = 0;
    for (const char c : line) characters += (static_cast<uint8_t>(c) & 0xc0) != 0x80;
    EXPECT_LE(characters, width) << line;
    EXPECT_GT(characters, 0);
  }
}

// Standard error, as seen by who reads the other end while `function` runs.
template <typename Function>
std::string seen_on(int reading, int writing, const Function& function) {
  const int before = dup(STDERR_FILENO);
  dup2(writing, STDERR_FILENO);
  close(writing);
  function();
  dup2(before, STDERR_FILENO);
  close(before);
  fcntl(reading, F_SETFL, O_NONBLOCK);  // all that was written is in the buffer by now
  std::string seen;
  char buffer[4096];
  for (ssize_t count; (count = ::read(reading, buffer, sizeof buffer)) > 0;) {
    seen.append(buffer, static_cast<size_t>(count));
  }
  close(reading);
  return seen;
}

template <typename Function>
std::string seen_on_terminal(const Function& function, uint16_t width = 60) {
  winsize size = {};
  size.ws_col = width;
  size.ws_row = 24;
  int master = -1, terminal = -1;
  EXPECT_EQ(openpty(&master, &terminal, nullptr, nullptr, &size), 0);
  return seen_on(master, terminal, function);
}

template <typename Function>
std::string seen_on_pipe(const Function& function) {
  int ends[2] = {-1, -1};
  EXPECT_EQ(pipe(ends), 0);
  return seen_on(ends[0], ends[1], function);
}

class ProgressTest : public ::testing::Test {
 protected:
  void SetUp() override {
    setenv("TERM", "xterm", 1);
    unsetenv("NO_COLOR");
  }
};

TEST_F(ProgressTest, ATerminalIsRedrawn) {
  const std::string seen = seen_on_terminal([] {
    Progress progress("train", 4);
    progress.update(1, {"loss 9"});
    progress.update(4, {"loss 3"});  // the last step is always drawn
    progress.update(4, {"loss 2"});
  });
  EXPECT_EQ(seen,
            "\rtrain [######..................] 25 % 1/4  loss 9\033[K"
            "\rtrain [########################] 100 % 4/4  loss 3\033[K"
            "\r\033[K");
}

TEST_F(ProgressTest, ClearedOnceAndDrawnAgainAtOnce) {
  const std::string seen = seen_on_terminal(
      [] {
        Progress progress("read", 0);
        progress.clear();
        progress.update(1, {});
        progress.clear();
        progress.clear();
        progress.update(2, {"a field too long to fit"});
      },
      20);
  EXPECT_EQ(seen, "\rread 1\033[K\r\033[K\rread 2\033[K\r\033[K");
}

TEST_F(ProgressTest, AFastLoopIsNotDrawnAtEachStep) {
  const std::string seen = seen_on_terminal([] {
    Progress progress("train", 0);
    const auto start = std::chrono::steady_clock::now();
    for (int step = 0; std::chrono::steady_clock::now() - start < std::chrono::milliseconds(20); ++step) {
      progress.update(step, {});
    }
  });
  // Redraws are 100 ms apart however slow this machine is: the loop's updates all begin within 20 ms.
  EXPECT_LE(std::count(seen.begin(), seen.end(), '\r'), 3) << seen;
  EXPECT_GE(std::count(seen.begin(), seen.end(), '\r'), 2) << seen;
}

TEST_F(ProgressTest, ElsewherePlainLinesForEachTenth) {
  const std::string seen = seen_on_pipe([] {
    Progress progress("train", 1000);
    for (int step = 1; step <= 1000; ++step) progress.update(step, {});
  });
  std::istringstream lines(seen);
  int count = 0;
  std::string line, last;
  for (; std::getline(lines, line); last = line) {
    ++count;
    EXPECT_EQ(line.find("train "), 0u) << line;
  }
  EXPECT_EQ(seen.find_first_of("\r\033"), std::string::npos);
  EXPECT_GE(count, 11);
  EXPECT_LE(count, 13);
  EXPECT_EQ(last, "train 100 % 1000/1000");
}

TEST_F(ProgressTest, NoColorAndDumbTerminalsGetPlainLines) {
  const auto draw = [] { Progress("train", 4).update(2, {"loss 3"}); };
  const std::string plain = "train 50 % 2/4, loss 3\r\n";  // the terminal's own end of line
  setenv("NO_COLOR", "1", 1);
  EXPECT_EQ(seen_on_terminal(draw), plain);
  setenv("NO_COLOR", "", 1);
  EXPECT_NE(seen_on_terminal(draw), plain);
  setenv("TERM", "dumb", 1);
  EXPECT_EQ(seen_on_terminal(draw), plain);
  unsetenv("TERM");
  EXPECT_EQ(seen_on_terminal(draw), plain);
}

TEST_F(ProgressTest, QuietWritesNothing) {
  const auto draw = [] { Progress("train", 4, true).update(2, {"loss 3"}); };
  EXPECT_EQ(seen_on_terminal(draw), "");
  EXPECT_EQ(seen_on_pipe(draw), "");
}

}  // namespace
}  // namespace remnant::app
