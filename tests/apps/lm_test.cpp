#include "lm/data.h"
#include "lm/generate.h"
#include "lm/model.h"
#include "lm/tokens.h"
#include "lm/train.h"

#include "common/error.h"
#include "common/text.h"

#include <gtest/gtest.h>
#include <torch/utils.h>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <string>
#include <vector>

namespace remnant::app::lm {
namespace {

using at::Tensor;

constexpr int64_t kWords = 29, kContext = 12;

LanguageModel small_model(double dropout = 0.0) {
  torch::manual_seed(7);
  LanguageModel model(EncoderOptions{.words = kWords,
                                     .positions = kContext,
                                     .hidden = 16,
                                     .layers = 2,
                                     .heads = 4,
                                     .feed_forward = 24,
                                     .dropout = dropout});
  // Untrained, all tokens are nearly as likely, and the last one, whose embedding is the output's weight,
  // most of all: larger weights in the layers make the model say different things.
  const at::NoGradGuard no_grad;
  for (auto& item : model->named_parameters()) {
    if (item.value().dim() > 1) item.value().mul_(item.key().find("layers") == std::string::npos ? 10 : 60);
  }
  return model;
}

TokenText made_up_text(int64_t predicted) {
  TokenText text;
  for (int64_t i = 0; i <= predicted; ++i)
    text.tokens.push_back(static_cast<int32_t>((i * i + 3 * i) % kWords));
  text.bytes = text.characters = predicted;
  return text;
}

TEST(LanguageModel, LaterTokensDoNotChangeEarlierLogits) {
  const at::NoGradGuard no_grad;
  LanguageModel model = small_model();
  model->eval();
  const Tensor ids = at::randint(0, kWords, {3, 8}, at::kLong);
  const Tensor before = model->forward(ids);
  for (int64_t changed = 1; changed < 8; ++changed) {
    Tensor other = ids.clone();
    other.select(1, changed).add_(1).remainder_(kWords);
    const Tensor after = model->forward(other);
    EXPECT_TRUE(at::allclose(before.slice(1, 0, changed), after.slice(1, 0, changed), 1e-5, 1e-6)) << changed;
    EXPECT_FALSE(at::allclose(before.select(1, changed), after.select(1, changed), 1e-5, 1e-6)) << changed;
  }
}

TEST(LanguageModel, LossIsThatOfItsLogits) {
  const at::NoGradGuard no_grad;
  LanguageModel model = small_model();
  model->eval();
  const Tensor ids = at::randint(0, kWords, {2, 9}, at::kLong),
               next = at::randint(0, kWords, {2, 9}, at::kLong);
  const Tensor log_p = at::log_softmax(model->forward(ids).to(at::kDouble), -1);
  const double expected = -log_p.gather(2, next.unsqueeze(2)).sum().item<double>();
  EXPECT_NEAR(model->loss(ids, next).item<double>(), expected, 1e-4 * expected);
}

TEST(LanguageModel, TheOutputSharesTheEmbeddingsWeights) {
  LanguageModel model = small_model();
  int64_t matrices = 0;
  for (const auto& item : model->named_parameters()) matrices += item.value().size(0) == kWords;
  EXPECT_EQ(matrices, 1);
}

TEST(LanguageModel, TooLongSequenceIsRefused) {
  LanguageModel model = small_model();
  EXPECT_THROW(model->forward(at::randint(0, kWords, {1, kContext + 1}, at::kLong)), c10::Error);
}

/// The most likely continuation by whole forward passes, with generate's rule for a full context.
std::vector<int64_t> uncached(LanguageModelImpl& model, std::vector<int64_t> window, int64_t length) {
  const at::NoGradGuard no_grad;
  std::vector<int64_t> tokens;
  for (int64_t i = 0; i < length; ++i) {
    if (window.size() > kContext) window.erase(window.begin(), window.end() - kContext / 2);
    const Tensor logits = model.forward(at::tensor(window).unsqueeze(0));
    tokens.push_back(logits[0][-1].argmax().item<int64_t>());
    window.push_back(tokens.back());
  }
  return tokens;
}

std::vector<int64_t> generated(LanguageModelImpl& model, const std::vector<int64_t>& prompt,
                               const Sampling& sampling) {
  std::vector<int64_t> tokens;
  generate(model, prompt, sampling, [&](int64_t token) { tokens.push_back(token); });
  return tokens;
}

TEST(Generation, CachedEqualsUncachedAlsoPastTheContext) {
  LanguageModel model = small_model();
  model->eval();
  for (const std::vector<int64_t>& prompt :
       {std::vector<int64_t>{5}, {3, 1, 4, 1, 5}, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}}) {
    const auto tokens = generated(*model, prompt, {.length = 40, .temperature = 0});
    EXPECT_EQ(tokens, uncached(*model, prompt, 40)) << prompt.size();
    EXPECT_GT(std::set<int64_t>(tokens.begin(), tokens.end()).size(), 2u) << "a model that says one thing";
  }
}

TEST(Generation, SeedsDecideAndTopKRestricts) {
  LanguageModel model = small_model();
  model->eval();
  const std::vector<int64_t> prompt{2, 7};
  const Sampling sampling{.length = 30, .temperature = 3, .seed = 4};
  Sampling other = sampling;
  other.seed = 5;
  EXPECT_EQ(generated(*model, prompt, sampling), generated(*model, prompt, sampling));
  EXPECT_NE(generated(*model, prompt, sampling), generated(*model, prompt, other));
  Sampling one = sampling;
  one.top_k = 1;
  EXPECT_EQ(generated(*model, prompt, one), uncached(*model, prompt, 30));
}

TEST(Generation, DrawsByProbability) {
  LanguageModel model = small_model();
  model->eval();
  const std::vector<int64_t> prompt{2, 7};
  const at::NoGradGuard no_grad;
  const Tensor logits = model->forward(at::tensor(prompt).unsqueeze(0))[0][-1].to(at::kDouble);
  const Tensor p = (logits / 2).softmax(-1);
  std::vector<double> share(kWords, 0);
  constexpr int64_t kDraws = 500;
  for (int64_t seed = 0; seed < kDraws; ++seed) {
    const auto token =
        generated(*model, prompt, {.length = 1, .temperature = 2, .seed = static_cast<uint64_t>(seed)});
    share[token[0]] += 1.0 / kDraws;
  }
  for (int64_t i = 0; i < kWords; ++i) {
    const double expected = p[i].item<double>();
    EXPECT_NEAR(share[i], expected, 5 * std::sqrt(expected / kDraws) + 1e-3) << i;
  }
}

TEST(Generation, OutputsThatAreNotFiniteAreAnError) {
  LanguageModel model = small_model();
  model->eval();
  const at::NoGradGuard no_grad;
  model->parameters()[0].fill_(std::numeric_limits<float>::quiet_NaN());
  EXPECT_THROW(generated(*model, {1}, {.length = 1}), Error);
}

TEST(TextData, PartsFollowEachOtherAndCutBetweenCharacters) {
  std::string text;
  for (int i = 0; i < 500; ++i) text += i % 3 == 0 ? "ü" : i % 3 == 1 ? "€" : "a";
  for (size_t length = 100; length < 160; ++length) {
    std::string_view cut = std::string_view(text).substr(0, length);
    while (!is_utf8(cut)) cut.remove_suffix(1);
    const TextParts parts = split_text(cut);
    EXPECT_EQ(std::string(parts.train) + std::string(parts.validation) + std::string(parts.test), cut);
    for (const std::string_view part : {parts.train, parts.validation, parts.test}) {
      EXPECT_TRUE(is_utf8(part) && !part.empty()) << length;
    }
    EXPECT_NEAR(static_cast<double>(parts.train.size()), 0.9 * static_cast<double>(cut.size()), 3);
  }
}

TEST(TextData, EveryTokenButTheContextIsPredictedOnce) {
  const std::string text = "Größe und Maß: " + std::string(200, 'x');
  const auto tokenizer = make_tokenizer({}, text);
  const Splits splits = tokenize_parts(split_text(text), *tokenizer);
  std::string again;
  for (const TokenText* part : {&splits.train, &splits.validation, &splits.test}) {
    EXPECT_EQ(part->predicted(), part->bytes);
    for (size_t i = 1; i < part->tokens.size(); ++i) again += tokenizer->decode(part->tokens[i]);
  }
  EXPECT_EQ(again, text);
  EXPECT_EQ(splits.train.characters, characters(text.substr(0, splits.train.bytes)));
  EXPECT_LT(splits.train.characters, splits.train.bytes);
  EXPECT_EQ(splits.validation.tokens.front(), splits.train.tokens.back());
  EXPECT_EQ(splits.train.tokens.front(), '\n');
}

TEST(TextData, TrainingWindowsDoNotOverlapAndDependOnSeedAndEpoch) {
  const TokenText text = made_up_text(103);
  const auto starts = [&](uint64_t seed, int64_t epoch) {
    std::vector<int64_t> found;
    for (const Window& window : training_windows(text, 10, seed, epoch)) found.push_back(window.start);
    return found;
  };
  std::set<int64_t> offsets;
  for (int64_t epoch = 0; epoch < 20; ++epoch) {
    std::vector<int64_t> sorted = starts(1, epoch);
    std::sort(sorted.begin(), sorted.end());
    offsets.insert(sorted.front());
    for (size_t i = 0; i < sorted.size(); ++i)
      EXPECT_EQ(sorted[i], sorted.front() + 10 * static_cast<int64_t>(i));
    EXPECT_LT(sorted.front(), 10);
    EXPECT_LE(sorted.back() + 10, 103);
    EXPECT_GT(sorted.back() + 20, 103) << "a window more would fit";
  }
  EXPECT_GT(offsets.size(), 5u);
  EXPECT_EQ(starts(5, 2), starts(5, 2));
  EXPECT_NE(starts(5, 2), starts(5, 3));
  EXPECT_NE(starts(5, 2), starts(6, 2));
  EXPECT_EQ(training_windows(made_up_text(10), 10, 1, 0).size(), 1u);
}

TEST(TextData, ScoresDoNotDependOnTheBatchSize) {
  LanguageModel model = small_model(0.3);
  const TokenText text = made_up_text(101);
  const TextScores one = evaluate(*model, text, kContext, 1), many = evaluate(*model, text, kContext, 64);
  EXPECT_NEAR(one.bits, many.bits, 1e-3);
  EXPECT_EQ(many.bits, evaluate(*model, text, kContext, 64).bits);
  double bits = 0;
  const at::NoGradGuard no_grad;
  for (int64_t start = 0; start < 101; start += kContext) {
    const auto begin = text.tokens.begin() + start;
    const auto end = text.tokens.begin() + std::min<int64_t>(start + kContext, 101);
    const Tensor ids = at::tensor(std::vector<int64_t>(begin, end)).unsqueeze(0);
    const Tensor next = at::tensor(std::vector<int64_t>(begin + 1, end + 1));
    const Tensor log_p = at::log_softmax(model->forward(ids)[0].to(at::kDouble), -1);
    bits -= log_p.gather(1, next.unsqueeze(1)).sum().item<double>() / std::log(2.0);
  }
  EXPECT_NEAR(one.bits, bits, 1e-3);
  EXPECT_NEAR(one.bits_per_character(), bits / 101, 1e-5);
}

TEST(TextData, GeneratedTextIsAFunctionOfItsSizeInParagraphs) {
  const std::string text = generate_text(200);
  EXPECT_EQ(text, generate_text(200));
  EXPECT_TRUE(is_utf8(text) && text.ends_with(".\n"));
  EXPECT_EQ(std::count(text.begin(), text.end(), '.'), 200);
  EXPECT_NE(text.find(".\n\n"), std::string::npos);
  EXPECT_EQ(text.find("\n\n\n"), std::string::npos);
}

TEST(LanguageModelOptions, MistakesAreUsageErrors) {
  TrainOptions good;
  good.data = "generated";
  EXPECT_NO_THROW(checked(good));
  const auto refused = [&](const auto& change) {
    TrainOptions bad = good;
    change(bad);
    EXPECT_THROW(checked(bad), UsageError);
  };
  refused([](TrainOptions& o) { o.context = kLongestContext + 1; });
  refused([](TrainOptions& o) { o.context = 0; });
  refused([](TrainOptions& o) { o.tokens = "letters"; });
  refused([](TrainOptions& o) { o.tokens = "sentencepiece:vocabulary=many"; });
  refused([](TrainOptions& o) { o.tokens = "sentencepiece:vocabulary=20"; });
  refused([](TrainOptions& o) { o.heads = 3; });
  refused([](TrainOptions& o) { o.attention = "curve:m=0"; });
}

}  // namespace
}  // namespace remnant::app::lm
