#include "classify/data.h"
#include "classify/model.h"
#include "classify/reviews.h"
#include "classify/train.h"

#include "common/batches.h"
#include "common/error.h"
#include "files.h"

#include <gtest/gtest.h>
#include <torch/utils.h>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/log_softmax.h>

#include <algorithm>
#include <filesystem>
#include <set>
#include <string>
#include <vector>

namespace remnant::app::classify {
namespace {

using at::Tensor;
namespace fs = std::filesystem;

constexpr int64_t kWords = 31, kLabels = 3;

Classifier small_model(double dropout = 0.0) {
  torch::manual_seed(7);
  return Classifier(EncoderOptions{.words = kWords,
                                   .positions = 20,
                                   .hidden = 16,
                                   .layers = 2,
                                   .heads = 4,
                                   .feed_forward = 24,
                                   .dropout = dropout},
                    kLabels);
}

Examples made_up_examples(int64_t count) {
  Examples examples;
  for (int64_t i = 0; i < count; ++i) {
    std::vector<int64_t> ids;
    for (int64_t j = 0; j < 1 + (i * 5) % 9; ++j) ids.push_back(4 + (i * 7 + j * 5) % (kWords - 4));
    examples.texts.push_back(ids);
    examples.labels.push_back(i % kLabels);
  }
  return examples;
}

std::vector<int64_t> first_rows(int64_t count) {
  std::vector<int64_t> rows(count);
  for (int64_t i = 0; i < count; ++i) rows[i] = i;
  return rows;
}

class ClassifyFiles : public Files {
 protected:
  static std::string numbered(int64_t count) {
    std::string lines;
    for (int64_t i = 0; i < count; ++i)
      lines += std::to_string(i % 2) + "\ttext number " + std::to_string(i) + "\n";
    return lines;
  }
};

TEST(ClassifyModel, PaddingDoesNotChangeALabel) {
  const at::NoGradGuard no_grad;
  Classifier model = small_model();
  model->eval();
  const Examples examples = made_up_examples(7);
  const Batch together = make_batch(examples, first_rows(7));
  ASSERT_TRUE(together.padding.defined());
  const Tensor logits = model->forward(together.ids, together.padding);
  for (int64_t i = 0; i < 7; ++i) {
    const Batch alone = make_batch(examples, {i});
    EXPECT_FALSE(alone.padding.defined());
    EXPECT_TRUE(at::allclose(logits[i], model->forward(alone.ids, alone.padding)[0], 1e-4, 1e-5)) << i;
  }
}

TEST(ClassifyModel, EveryWordReachesTheLabel) {
  const at::NoGradGuard no_grad;
  Classifier model = small_model();
  model->eval();
  const Examples examples = made_up_examples(3);
  const Batch batch = make_batch(examples, {1});
  const Tensor before = model->forward(batch.ids, batch.padding);
  for (int64_t i = 0; i < batch.ids.size(1); ++i) {
    Tensor other = batch.ids.clone();
    other[0][i] = 4 + (other[0][i].item<int64_t>() + 1) % (kWords - 4);
    EXPECT_FALSE(at::allclose(before, model->forward(other, batch.padding), 1e-6, 1e-7)) << i;
  }
}

TEST(ClassifyModel, ScoresAreThoseOfTheLogits) {
  Classifier model = small_model(0.3);
  const Examples examples = made_up_examples(23);
  const Scores scores = evaluate(*model, examples, kLabels, 4);
  const at::NoGradGuard no_grad;
  double loss = 0;
  int64_t right = 0;
  std::vector<std::vector<int64_t>> confusion(kLabels, std::vector<int64_t>(kLabels, 0));
  for (int64_t i = 0; i < examples.size(); ++i) {
    const Batch batch = make_batch(examples, {i});
    const Tensor log_p = at::log_softmax(model->forward(batch.ids, batch.padding).to(at::kDouble), -1)[0];
    const int64_t label = examples.labels[i], given = log_p.argmax().item<int64_t>();
    loss -= log_p[label].item<double>() / static_cast<double>(examples.size());
    right += label == given;
    ++confusion[label][given];
    EXPECT_NEAR(model->loss(batch.ids, batch.padding, batch.labels).item<double>(),
                -log_p[label].item<double>(), 1e-4);
  }
  EXPECT_NEAR(scores.loss, loss, 1e-4);
  EXPECT_EQ(scores.confusion, confusion);
  EXPECT_DOUBLE_EQ(scores.accuracy(), static_cast<double>(right) / 23);
  EXPECT_EQ(evaluate(*model, examples, kLabels, 4).loss, scores.loss);
}

TEST_F(ClassifyFiles, TabsSpacesAndEmptyLines) {
  const LabelledTexts tabs = read_labelled(write("a.tsv", "good one\ta text\r\n\nbad\tb\tc\nbad\t  \n"));
  EXPECT_EQ(tabs.labels, (std::vector<std::string>{"good one", "bad"}));
  EXPECT_EQ(tabs.texts, (std::vector<std::string>{"a text", "b\tc"}));
  EXPECT_EQ(tabs.lines, (std::vector<int64_t>{1, 3}));
  EXPECT_EQ(tabs.skipped_empty, 2);
  const LabelledTexts spaces = read_labelled(write("a.txt", "3 how far ?\n1\twhat\n"));
  EXPECT_EQ(spaces.labels, (std::vector<std::string>{"3", "1"}));
  EXPECT_EQ(spaces.texts, (std::vector<std::string>{"how far ?", "what"}));
}

TEST_F(ClassifyFiles, MistakesAreNamed) {
  EXPECT_NE(message([&] { read_labelled(write("a.tsv", "1\ta\n0 b\n")); }).find("line 2"), std::string::npos);
  EXPECT_NE(message([&] { read_labelled(write("a.tsv", "\ta\n")); }).find("line 1"), std::string::npos);
  EXPECT_NE(message([&] { read_labelled(write("a.txt", "alone\n")); }).find("a tab or space"),
            std::string::npos);
  EXPECT_NE(message([&] { read_labelled(write("a.tsv", "\n")); }).find("holds no labelled text"),
            std::string::npos);
  EXPECT_NE(message([&] { read_labelled(write("a.tsv", numbered(50) + "1\t\xff\n")); }).find("line 51"),
            std::string::npos);
  EXPECT_NE(message([&] { load_corpus({write("a.tsv", numbered(19)).string()}); }).find("at least 20"),
            std::string::npos);
  EXPECT_NE(message([&] { labels_of(read_labelled(write("a.tsv", "1\ta\n1\tb\n"))); }).find("two labels"),
            std::string::npos);
  EXPECT_NE(message([&] { load_corpus({dir_.string()}); }).find("the folder holds a.tsv, a.txt"),
            std::string::npos);
}

TEST_F(ClassifyFiles, OneDamagedLineInAThousandIsRepaired) {
  const LabelledTexts texts = read_labelled(write("a.tsv", numbered(999) + "1\tsister\xf1"
                                                                           "city\n"));
  EXPECT_EQ(texts.repaired, 1);
  EXPECT_EQ(texts.texts.back(),
            "sister\xef\xbf\xbd"
            "city");
  EXPECT_THROW(read_labelled(write("a.tsv", numbered(998) + "1\tsister\xf1"
                                                            "city\n")),
               Error);
  EXPECT_THROW(read_labelled(write("a.tsv", numbered(998) + "1\t\xf1\n0\t\xf2\n")), Error);
}

TEST_F(ClassifyFiles, WhatIsMissingIsHeldOut) {
  write("train.tsv", numbered(100));
  const Corpus none = load_corpus({dir_.string()});
  EXPECT_TRUE(none.held_out_validation && none.held_out_test);
  EXPECT_EQ(none.test.size(), 10);
  EXPECT_EQ(none.validation.size(), 9);
  EXPECT_EQ(none.train.size(), 81);
  std::multiset<std::string> seen;
  for (const LabelledTexts* part : {&none.train, &none.validation, &none.test}) {
    seen.insert(part->texts.begin(), part->texts.end());
  }
  const LabelledTexts all = read_labelled(dir_ / "train.tsv");
  EXPECT_EQ(seen, std::multiset<std::string>(all.texts.begin(), all.texts.end()));
  EXPECT_EQ(none.test.texts, load_corpus({dir_.string()}).test.texts);

  write("dev.txt", numbered(7));
  write("test.tsv", numbered(5));
  const Corpus both = load_corpus({dir_.string()});
  EXPECT_FALSE(both.held_out_validation || both.held_out_test);
  EXPECT_EQ(both.train.size(), 100);
  EXPECT_EQ(both.validation.size(), 7);
  EXPECT_EQ(both.test.size(), 5);
}

TEST(ClassifyData, LabelsAreInOrder) {
  EXPECT_EQ(labels_of({{"10", "9", "-1", "9"}, {}, {}, {}}), (std::vector<std::string>{"-1", "9", "10"}));
  EXPECT_EQ(labels_of({{"b", "10", "9"}, {}, {}, {}}), (std::vector<std::string>{"10", "9", "b"}));
  std::vector<std::string> many;
  for (int i = 0; i < 2000; ++i) many.push_back("label " + std::to_string(i));
  EXPECT_THROW(labels_of({many, {}, {}, {}}), Error);
}

TEST(ClassifyData, LongTextsLoseTheirEndAndForeignLabelsAreRefused) {
  const LabelledTexts texts{{"x", "y"}, {"a b c d", "a z"}, {1, 2}, "file"};
  const auto words = words_of(texts.texts, "en");
  const Vocabulary vocabulary = Vocabulary::build({{"a", "b", "c", "d"}}, 1);
  const Examples examples = encode(texts, words, vocabulary, {"x", "y"}, 3);
  EXPECT_EQ(examples.texts[0],
            (std::vector<int64_t>{vocabulary.id("a"), vocabulary.id("b"), vocabulary.id("c")}));
  EXPECT_EQ(examples.texts[1], (std::vector<int64_t>{vocabulary.id("a"), Vocabulary::unknown}));
  EXPECT_EQ(examples.labels, (std::vector<int64_t>{0, 1}));
  EXPECT_EQ(examples.truncated, 1);
  EXPECT_EQ(examples.unknown, 1);
  try {
    encode(texts, words, vocabulary, {"x", "z"}, 3);
    FAIL() << "a label that no training text has";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("line 2 of 'file' has the label y"), std::string::npos)
        << error.what();
  }
}

TEST(ClassifyData, MostFrequentWordsAreKept) {
  const Vocabulary vocabulary = Vocabulary::build({{"b", "a", "c", "b", "a", "b"}}, 1, 2);
  EXPECT_EQ(vocabulary.size(), 4 + 2);
  EXPECT_NE(vocabulary.id("b"), Vocabulary::unknown);
  EXPECT_NE(vocabulary.id("a"), Vocabulary::unknown);
  EXPECT_EQ(vocabulary.id("c"), Vocabulary::unknown);
}

TEST(Reviews, AreBalancedDifferentAndAFunctionOfTheSeed) {
  const std::vector<Review> reviews = generate_reviews(400);
  std::set<std::string> texts;
  int64_t positive = 0, negated = 0;
  for (const Review& review : reviews) {
    texts.insert(review.text);
    positive += review.label == "positive";
    negated += review.text.find("at all.") != std::string::npos;
  }
  EXPECT_EQ(texts.size(), 400u);
  EXPECT_EQ(positive, 200);
  EXPECT_GT(negated, 20);
  const std::vector<Review> again = generate_reviews(400), other = generate_reviews(400, 2);
  EXPECT_TRUE(std::equal(reviews.begin(), reviews.end(), again.begin(),
                         [](const Review& a, const Review& b) { return a.text == b.text; }));
  EXPECT_NE(reviews[0].text, other[0].text);
}

TEST(Reviews, WhatIsSaidPlainlyAgreesWithTheLabel) {
  for (const Review& review : generate_reviews(400)) {
    const bool positive = review.label == "positive";
    for (const char* good :
         {"is really wonderful.", "is really clever.", "is not boring at all.", "is not dull at all."}) {
      if (review.text.find(good) != std::string::npos) {
        EXPECT_TRUE(positive) << review.text;
      }
    }
    for (const char* bad :
         {"is really boring.", "is really dull.", "is not wonderful at all.", "is not clever at all."}) {
      if (review.text.find(bad) != std::string::npos) {
        EXPECT_FALSE(positive) << review.text;
      }
    }
  }
}

TEST(ClassifyOptions, MistakesAreUsageErrors) {
  TrainOptions good;
  good.data = "generated";
  EXPECT_NO_THROW(checked(good));
  const auto refused = [&](const auto& change) {
    TrainOptions bad = good;
    change(bad);
    EXPECT_THROW(checked(bad), UsageError);
  };
  refused([](TrainOptions& o) { o.max_length = 8193; });
  refused([](TrainOptions& o) { o.max_words = 0; });
  refused([](TrainOptions& o) { o.texts = 3; });
  refused([](TrainOptions& o) { o.heads = 3; });
  refused([](TrainOptions& o) { o.precision = "fp16"; });
}

}  // namespace
}  // namespace remnant::app::classify
