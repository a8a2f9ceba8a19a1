#include "common/text.h"

#include "common/error.h"

#include <gtest/gtest.h>
#include <unistd.h>
#include <zlib.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <thread>

namespace remnant::app {
namespace {

namespace fs = std::filesystem;
using Words = std::vector<std::string>;

class Text : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "remnant_text_XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    dir_ = pattern;
  }
  void TearDown() override { fs::remove_all(dir_); }

  fs::path write(const std::string& name, const std::string& content) const {
    std::ofstream(dir_ / name, std::ios::binary) << content;
    return dir_ / name;
  }

  static std::string gzip(const std::string& content) {
    z_stream stream{};
    EXPECT_EQ(deflateInit2(&stream, 9, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY), Z_OK);
    std::string packed(deflateBound(&stream, content.size()) + 32, '\0');
    stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(content.data()));
    stream.avail_in = static_cast<uInt>(content.size());
    stream.next_out = reinterpret_cast<Bytef*>(packed.data());
    stream.avail_out = static_cast<uInt>(packed.size());
    EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
    packed.resize(stream.total_out);
    deflateEnd(&stream);
    return packed;
  }

  // The message of the Error that `action` throws.
  template <typename Action>
  static std::string message(Action action) {
    try {
      action();
    } catch (const Error& error) {
      return error.what();
    }
    ADD_FAILURE() << "no error";
    return "";
  }

  fs::path dir_;
};

void expect_parts(const std::string& message, const std::vector<std::string>& parts) {
  for (const std::string& part : parts) {
    EXPECT_NE(message.find(part), std::string::npos) << "no \"" << part << "\" in: " << message;
  }
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
}

using ReadLines = Text;

TEST_F(ReadLines, TakesPlainText) {
  EXPECT_EQ(read_lines(write("a", "one\ntwo\n")), (Words{"one", "two"}));
  EXPECT_EQ(read_lines(write("b", "one\n\n  two ")), (Words{"one", "", "  two "}));
  EXPECT_EQ(read_lines(write("c", "")), Words{});
  EXPECT_EQ(read_lines(write("d", "\n")), Words{""});
}

TEST_F(ReadLines, RemovesByteOrderMarkAndCarriageReturns) {
  EXPECT_EQ(read_lines(write("a", "\xef\xbb\xbfgrün\r\nblau\r\n")), (Words{"grün", "blau"}));
}

TEST_F(ReadLines, RecognisesGzipByContent) {
  std::string text;
  for (int64_t i = 0; i < 100000; ++i) text += std::to_string(i * i) + " Männer\n";
  const Words plain = read_lines(write("plain.gz", text));
  EXPECT_EQ(plain.size(), 100000u);
  EXPECT_EQ(read_lines(write("packed", gzip(text))), plain);
}

TEST_F(ReadLines, JoinsGzipMembersAndSkipsZeroPadding) {
  const std::string content = gzip("one\n") + gzip("two\n") + std::string(100, '\0');
  EXPECT_EQ(read_lines(write("a", content)), (Words{"one", "two"}));
}

TEST_F(ReadLines, RefusesEveryTruncationOfGzip) {
  const std::string packed = gzip("Zwei junge Männer sind im Freien.\nMehrere Männer bedienen etwas.\n");
  // One byte is not yet gzip's mark; from two on the file is recognised.
  for (size_t length = 2; length < packed.size(); ++length) {
    const fs::path file = write("cut.gz", packed.substr(0, length));
    expect_parts(message([&] { read_lines(file); }), {"cut.gz", "truncated gzip"});
  }
}

TEST_F(ReadLines, RefusesDamagedGzip) {
  const std::string packed = gzip("Zwei junge Männer sind im Freien.\n");
  std::string wrong_crc = packed;
  wrong_crc[packed.size() - 8] ^= 1;
  expect_parts(message([&] { read_lines(write("crc.gz", wrong_crc)); }), {"crc.gz", "damaged gzip"});
  std::string wrong_length = packed;
  wrong_length[packed.size() - 1] ^= 1;
  expect_parts(message([&] { read_lines(write("length.gz", wrong_length)); }), {"length.gz", "damaged gzip"});
  expect_parts(message([&] { read_lines(write("tail.gz", packed + "more")); }), {"tail.gz", "damaged gzip"});
}

TEST_F(ReadLines, NamesTheLineOfInvalidUtf8) {
  // A Latin-1 letter, a cut sequence, an overlong form, a surrogate, beyond the last code point.
  for (const char* bad : {"M\xe4nner", "caf\xc3", "\xc0\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80"}) {
    const fs::path file = write("bad.de", "gut\nsch\xc3\xb6n\n" + std::string(bad) + "\nEnde\n");
    expect_parts(message([&] { read_lines(file); }), {"line 3", "bad.de", "UTF-8"});
  }
}

TEST_F(ReadLines, RefusesWhatIsNotAFile) {
  expect_parts(message([&] { read_lines(dir_ / "absent"); }), {"absent", "No such file"});
  expect_parts(message([&] { read_lines(dir_); }), {dir_.string(), "directory"});
}

using ReadParallel = Text;

TEST_F(ReadParallel, PairsLinesOfPlainAndPackedFiles) {
  write("train.de", "Ein Mann\nZwei Hunde\n");
  write("train.en.gz", gzip("A man\nTwo dogs\n"));
  const ParallelText text = read_parallel(dir_, "train", "de", "en");
  EXPECT_EQ(text.source, (Words{"Ein Mann", "Zwei Hunde"}));
  EXPECT_EQ(text.target, (Words{"A man", "Two dogs"}));
  EXPECT_EQ(text.skipped_empty, 0);
  EXPECT_EQ(read_parallel(dir_, "train", "en", "de").source, text.target);
}

TEST_F(ReadParallel, DropsAndCountsEmptySides) {
  write("train.de", "eins\n\nzwei\n \t\u00a0\u200b\nvier\n");
  write("train.en", "one\ntwo\n\nthree\nfour\n");
  const ParallelText text = read_parallel(dir_, "train", "de", "en");
  EXPECT_EQ(text.source, (Words{"eins", "vier"}));
  EXPECT_EQ(text.target, (Words{"one", "four"}));
  EXPECT_EQ(text.skipped_empty, 3);
}

TEST_F(ReadParallel, FindsOtherNamesOfSplits) {
  for (const char* name : {"valid", "dev"}) {
    write(name + std::string(".de"), std::string(name) + "\n");
    write(name + std::string(".en"), "x\n");
    EXPECT_EQ(read_parallel(dir_, "val", "de", "en").source, Words{name});
    fs::remove(dir_ / (name + std::string(".de")));
  }
  write("test_2016_flickr.de.gz", gzip("eins\n"));
  write("test_2016_flickr.en.gz", gzip("one\n"));
  write("test_other.de", "only one language\n");
  EXPECT_EQ(read_parallel(dir_, "test", "de", "en").source, Words{"eins"});
  EXPECT_EQ(read_parallel(dir_, "test_2016_flickr", "de", "en").source, Words{"eins"});

  write("test_2017.de", "zwei\n");
  write("test_2017.en", "two\n");
  expect_parts(message([&] { read_parallel(dir_, "test", "de", "en"); }), {"test_2016_flickr, test_2017"});

  write("test.de", "drei\n");
  write("test.en", "three\n");
  EXPECT_EQ(read_parallel(dir_, "test", "de", "en").source, Words{"drei"});
}

TEST_F(ReadParallel, ListsWhatIsThereWhenAFileIsMissing) {
  write("train.de", "eins\n");
  write("train.fr", "un\n");
  const std::string missing = message([&] { read_parallel(dir_, "train", "de", "en"); });
  expect_parts(missing, {"'train.en'", dir_.string(), "train.de, train.fr"});
  EXPECT_EQ(missing.find("'train.de'"), std::string::npos) << missing;
  expect_parts(message([&] { read_parallel(dir_, "test", "cs", "en"); }), {"'test.cs'", "'test.en'"});
  expect_parts(message([&] { read_parallel(dir_ / "nowhere", "train", "de", "en"); }), {"nowhere"});
}

TEST_F(ReadParallel, RefusesUnequalAndEmptyCorpora) {
  write("train.de", "eins\nzwei\ndrei\n");
  write("train.en", "one\ntwo\n");
  expect_parts(message([&] { read_parallel(dir_, "train", "de", "en"); }),
               {"train.de", "3 lines", "train.en", "has 2"});
  write("val.de", "\n\n");
  write("val.en", "one\n\n");
  expect_parts(message([&] { read_parallel(dir_, "val", "de", "en"); }), {"val.de", "no sentence pair"});
}

TEST_F(ReadParallel, ReadsMulti30k) {
  const char* folder = std::getenv("REMNANT_DATA");
  const fs::path data =
      (folder ? fs::path(folder) : fs::path(REMNANT_PROJECT_DIR).parent_path() / "shared" / "data") /
      "multi30k";
  if (!fs::exists(data)) GTEST_SKIP() << data << " is not there";
  const ParallelText text = read_parallel(data, "test", "de", "en");
  EXPECT_EQ(text.source.size() + text.skipped_empty, 1000u);
  for (size_t i = 0; i < text.target.size(); ++i) {
    EXPECT_FALSE(tokenize(text.source[i], "de").empty());
    EXPECT_FALSE(tokenize(text.target[i], "en").empty());
  }
}

TEST(Tokenize, SplitsWordsAndPunctuation) {
  EXPECT_EQ(tokenize("Ein Mann, zwei Hunde.", "de"), (Words{"ein", "mann", ",", "zwei", "hunde", "."}));
  EXPECT_EQ(tokenize("  \"Wait...\"\t(now)!?", "en"),
            (Words{"\"", "wait", ".", ".", ".", "\"", "(", "now", ")", "!", "?"}));
  EXPECT_EQ(tokenize("„Straße“ – 1,000 3.5", "de"), (Words{"„", "straße", "“", "–", "1,000", "3.5"}));
}

TEST(Tokenize, SplitsHyphensAndKeepsApostrophes) {
  EXPECT_EQ(tokenize("T-shirts", "en"), (Words{"t", "-", "shirts"}));
  EXPECT_EQ(tokenize("a man's dog doesn't", "en"), (Words{"a", "man's", "dog", "doesn't"}));
  EXPECT_EQ(tokenize("kids' toys", "en"), (Words{"kids", "'", "toys"}));
}

TEST(Tokenize, LowersByLocale) {
  EXPECT_EQ(tokenize("ÄRMEL GROẞ ÉTÉ", "de"), (Words{"ärmel", "groß", "été"}));
  EXPECT_EQ(tokenize("ISTANBUL", "tr"), (Words{"ıstanbul"}));
  EXPECT_EQ(tokenize("ISTANBUL", "en"), (Words{"istanbul"}));
}

TEST(Tokenize, DropsBlanksOnly) {
  EXPECT_EQ(tokenize("", "en"), Words{});
  EXPECT_EQ(tokenize(" \t\u00a0\u3000\u200b\ufeff\x01", "en"), Words{});
  EXPECT_EQ(tokenize("a\u00a0b\u2028c", "en"), (Words{"a", "b", "c"}));
  // A combining mark that follows a space shares the space's piece.
  EXPECT_EQ(tokenize("a \u0308b", "en"), (Words{"a", "\u0308", "b"}));
  // Outside the basic plane, and a code point that no version of Unicode has assigned.
  EXPECT_EQ(tokenize("😀 \U000e0fff", "en"), (Words{"😀", "\U000e0fff"}));
}

TEST(Tokenize, WorksInThreads) {
  const std::string sentence = "Two dogs' toys, one T-shirt.";
  const Words expected = tokenize(sentence, "en");
  std::vector<std::thread> threads;
  std::vector<int> wrong(4, 0);
  for (size_t t = 0; t < wrong.size(); ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i) wrong[t] += tokenize(sentence, i % 2 ? "en" : "de") != expected;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(4, 0));
}

TEST(Detokenize, RestoresText) {
  for (const char* sentence : {
           "a man, two dogs; and a cat!?",
           "a \"red\" t-shirt (old) on a man's back.",
           "ein „rotes“ t-shirt – im freien: 50% 3.5 1,000",
           "the “red” one and the \"blue\" one...",
           "obst- und gemüsestand an der u-bahn",
           "a black-and-white dog",
           "the kids' toys",
           "rock 'n' roll",
           "trink-, ess- oder spielplatz",
           "they're in the 80's",
           "at 3:30 and/or $5 #7",
           "[a] {b} «c» d",
       }) {
    EXPECT_EQ(detokenize(tokenize(sentence, "en")), sentence);
  }
}

TEST(Detokenize, KeepsWordsAsGiven) {
  EXPECT_EQ(detokenize({}), "");
  EXPECT_EQ(detokenize({"."}), ".");
  EXPECT_EQ(detokenize({"Ein", "Mann", "<unk>", "."}), "Ein Mann <unk>.");
  EXPECT_EQ(detokenize({"he", "said", "\""}), "he said\"");
  EXPECT_EQ(detokenize({"it", "'s"}), "it's");
  EXPECT_EQ(detokenize(tokenize("they 're", "en")), "they're");
}

TEST(Vocabulary, OrdersByFrequencyThenBytes) {
  const std::vector<Words> sentences = {{"b", "a", "zebra", "ä"}, {"b", "a", "ä", "once"}, {"b", "zebra"}};
  const Vocabulary vocabulary = Vocabulary::build(sentences, 2);
  ASSERT_EQ(vocabulary.size(), 8);
  Words words;
  for (int64_t id = 0; id < vocabulary.size(); ++id) {
    words.push_back(vocabulary.word(id));
    EXPECT_EQ(vocabulary.id(vocabulary.word(id)), id);
  }
  EXPECT_EQ(words, (Words{"<unk>", "<pad>", "<s>", "</s>", "b", "a", "zebra", "ä"}));
  EXPECT_EQ(vocabulary.id("once"), Vocabulary::unknown);
  EXPECT_EQ(Vocabulary::build(sentences, 1).size(), 9);
  EXPECT_EQ(Vocabulary::build({}, 1).size(), 4);
}

TEST(Vocabulary, EncodesAndDecodes) {
  const Vocabulary vocabulary = Vocabulary::build({{"a", "b", "a"}}, 1);
  const std::vector<int64_t> ids = vocabulary.encode({"b", "new", "a"});
  EXPECT_EQ(ids, (std::vector<int64_t>{2, 5, 0, 4, 3}));
  EXPECT_EQ(vocabulary.decode(ids), (Words{"b", "<unk>", "a"}));
  EXPECT_EQ(vocabulary.decode({2, 4, 1, 1, 5, 3, 4, 4}), (Words{"a", "b"}));
  EXPECT_EQ(vocabulary.encode({}), (std::vector<int64_t>{2, 3}));
}

TEST(Vocabulary, TakesSpecialSymbolsInTextForUnknownWords) {
  const Vocabulary vocabulary = Vocabulary::build({{"</s>", "a", "<pad>", "a", "</s>"}}, 1);
  EXPECT_EQ(vocabulary.size(), 5);
  EXPECT_EQ(vocabulary.encode({"a", "</s>", "a"}), (std::vector<int64_t>{2, 4, 0, 4, 3}));
}

TEST(Vocabulary, RefusesNumbersOutOfRange) {
  const Vocabulary vocabulary = Vocabulary::build({{"a"}}, 1);
  EXPECT_THROW(vocabulary.word(5), Error);
  EXPECT_THROW(vocabulary.word(-1), Error);
  EXPECT_THROW(Vocabulary().word(0), Error);
  EXPECT_THROW(vocabulary.decode({4, 99}), Error);
}

using VocabularyFile = Text;

TEST_F(VocabularyFile, SavesAndLoads) {
  const Vocabulary vocabulary = Vocabulary::build({{"straße", "\"", "a", "😀", "a"}}, 1);
  vocabulary.save(dir_ / "vocabulary.de");
  const Vocabulary loaded = Vocabulary::load(dir_ / "vocabulary.de");
  EXPECT_EQ(loaded, vocabulary);
  EXPECT_EQ(loaded.encode({"straße", "a"}), vocabulary.encode({"straße", "a"}));
  EXPECT_FALSE(loaded == Vocabulary::build({{"a"}}, 1));
}

TEST_F(VocabularyFile, RefusesForeignFiles) {
  expect_parts(message([&] { Vocabulary::load(write("v", "a\nb\n")); }), {"'", "not a vocabulary"});
  expect_parts(message([&] { Vocabulary::load(write("v", "<unk>\n<pad>\n<s>\n</s>\na\n\nb\n")); }),
               {"line 6", "empty"});
  expect_parts(message([&] { Vocabulary::load(write("v", "<unk>\n<pad>\n<s>\n</s>\na\nb\na\n")); }),
               {"line 7", "'a'", "line 5"});
  EXPECT_THROW(Vocabulary::load(dir_ / "absent"), Error);
}

TEST_F(VocabularyFile, RefusesWordsThatALineCannotHold) {
  const Vocabulary vocabulary = Vocabulary::build({{"a\nb"}}, 1);
  EXPECT_THROW(vocabulary.save(dir_ / "v"), Error);
  EXPECT_FALSE(fs::exists(dir_ / "v"));
}

TEST(Nearest, SuggestsSmallSlips) {
  const Words flags = {"--attention", "--epochs", "--batch", "--seed", "--out", "--lr"};
  EXPECT_EQ(nearest("--atention", flags), "--attention");
  EXPECT_EQ(nearest("--attnetion", flags), "--attention");
  EXPECT_EQ(nearest("--epoch", flags), "--epochs");
  EXPECT_EQ(nearest("--ecpohs", flags), "--epochs");
  EXPECT_EQ(nearest("-seed", flags), "--seed");
  EXPECT_EQ(nearest("--SEED", flags), "--seed");
  EXPECT_EQ(nearest("recomptue", {"exact", "recompute", "curve"}), "recompute");
}

TEST(Nearest, IsSilentWhenNothingIsNear) {
  const Words flags = {"--attention", "--epochs", "--seed", "--lr", "-m"};
  EXPECT_EQ(nearest("--frobnicate", flags), "");
  EXPECT_EQ(nearest("--feet", flags), "");
  EXPECT_EQ(nearest("-x", flags), "");
  EXPECT_EQ(nearest("", flags), "");
  EXPECT_EQ(nearest("--seed", {}), "");
}

TEST(Nearest, CountsASwapAsOneSlip) {
  // Two substitutions are too many for a word this short.
  EXPECT_EQ(nearest("baem", {"beam"}), "beam");
  EXPECT_EQ(nearest("bxxm", {"beam"}), "");
  EXPECT_EQ(nearest("abc", {"abd", "acb", "abc"}), "abc");
}

}  // namespace
}  // namespace remnant::app
