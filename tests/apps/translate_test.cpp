#include "translate/data.h"
#include "translate/decode.h"
#include "translate/model.h"
#include "translate/train.h"

#include "common/error.h"
#include "common/random_state.h"

#include <gtest/gtest.h>
#include <torch/utils.h>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <set>

namespace remnant::app::translate {
namespace {

using at::Tensor;

constexpr int64_t kSourceWords = 31, kTargetWords = 23;
constexpr double kEndBias = 1.0;

Transformer small_model(double dropout = 0.0, const Policy& policy = Policy::recompute()) {
  torch::manual_seed(7);
  ModelOptions options;
  options.source_words = kSourceWords;
  options.target_words = kTargetWords;
  options.hidden = 16;
  options.layers = 2;
  options.heads = 4;
  options.feed_forward = 24;
  options.max_length = 40;
  options.dropout = dropout;
  options.policy = policy;
  return Transformer(options);
}

/// Untrained models say nearly the same after every word: larger weights make translations differ in
/// words and in length.
void make_lively(TransformerImpl& model) {
  const at::NoGradGuard no_grad;
  for (auto& item : model.named_parameters()) {
    if (item.value().dim() > 1) item.value().mul_(1.5);
    if (item.key() == "output.bias") item.value()[Vocabulary::end] += kEndBias;
  }
}

/// Pairs of made-up sentences of differing lengths.
Pairs made_up_pairs(int64_t count) {
  Pairs pairs;
  for (int64_t i = 0; i < count; ++i) {
    const auto sentence = [&](int64_t words, int64_t vocabulary) {
      std::vector<int64_t> ids{Vocabulary::begin};
      for (int64_t j = 0; j < words; ++j) ids.push_back(4 + (i * 7 + j * 5) % (vocabulary - 4));
      ids.push_back(Vocabulary::end);
      return ids;
    };
    pairs.source.push_back(sentence(2 + (i * 5) % 9, kSourceWords));
    pairs.target.push_back(sentence(1 + (i * 3) % 7, kTargetWords));
  }
  return pairs;
}

std::vector<int64_t> first_rows(int64_t count) {
  std::vector<int64_t> rows(count);
  for (int64_t i = 0; i < count; ++i) rows[i] = i;
  return rows;
}

std::map<std::string, Tensor> gradients(TransformerImpl& model, const std::vector<Batch>& batches) {
  model.zero_grad();
  accumulate_gradients(model, batches, false);
  std::map<std::string, Tensor> found;
  for (const auto& item : model.named_parameters()) found[item.key()] = item.value().grad().clone();
  return found;
}

TEST(TranslateModel, LaterTargetWordsDoNotChangeEarlierLogits) {
  const at::NoGradGuard no_grad;
  Transformer model = small_model();
  for (const bool training : {false, true}) {
    model->train(training);
    const Tensor source = at::randint(4, kSourceWords, {3, 7}, at::kLong);
    const Tensor target = at::randint(4, kTargetWords, {3, 8}, at::kLong);
    const Tensor before = model->forward(source, {}, target);
    for (int64_t changed = 1; changed < 8; ++changed) {
      Tensor other = target.clone();
      other.select(1, changed).add_(1).remainder_(kTargetWords);
      const Tensor after = model->forward(source, {}, other);
      EXPECT_TRUE(at::allclose(before.slice(1, 0, changed), after.slice(1, 0, changed), 1e-5, 1e-6))
          << changed;
      EXPECT_FALSE(at::allclose(before.select(1, changed), after.select(1, changed), 1e-5, 1e-6)) << changed;
    }
  }
}

TEST(TranslateModel, PaddingDoesNotChangeRealPositions) {
  const at::NoGradGuard no_grad;
  Transformer model = small_model();
  model->eval();
  const Pairs pairs = made_up_pairs(6);
  const Batch together = make_batch(pairs, first_rows(6));
  ASSERT_TRUE(together.source_padding.defined());
  const Tensor logits = model->forward(together.source, together.source_padding, together.target);
  for (int64_t i = 0; i < 6; ++i) {
    const Batch alone = make_batch(pairs, {i});
    EXPECT_FALSE(alone.source_padding.defined());
    const Tensor expected = model->forward(alone.source, alone.source_padding, alone.target)[0];
    EXPECT_TRUE(at::allclose(logits[i].slice(0, 0, expected.size(0)), expected, 1e-4, 1e-5)) << i;
  }
}

TEST(TranslateModel, LossIsTheMeanOverRealTargetWords) {
  Transformer model = small_model();
  model->train();
  const Pairs pairs = made_up_pairs(5);
  const Batch batch = make_batch(pairs, first_rows(5));
  const StepCost cost = accumulate_gradients(*model, {batch}, false);
  const at::NoGradGuard no_grad;
  const Tensor log_p =
      at::log_softmax(model->forward(batch.source, batch.source_padding, batch.target).to(at::kDouble), -1);
  double total = 0;
  int64_t words = 0;
  for (int64_t i = 0; i < pairs.size(); ++i) {
    for (size_t t = 0; t + 1 < pairs.target[i].size(); ++t) {
      total -= log_p[i][static_cast<int64_t>(t)][pairs.target[i][t + 1]].item<double>();
      ++words;
    }
  }
  EXPECT_EQ(words, batch.predicted);
  EXPECT_NEAR(cost.loss, total / static_cast<double>(words), 1e-4);
  EXPECT_GT(cost.kept_bytes, 0);
  EXPECT_GT(cost.peak_bytes, cost.kept_bytes);
}

TEST(TranslateModel, AttentionProjectionsAreXavierBlockByBlock) {
  Transformer model = small_model();
  int64_t seen = 0;
  for (const auto& item : model->named_parameters()) {
    if (!item.key().ends_with("in_proj_weight")) continue;
    ++seen;
    const double bound = std::sqrt(6.0 / (16 + 16));
    for (const Tensor& block : item.value().chunk(3, 0)) {
      const double largest = block.abs().max().item<double>();
      EXPECT_LE(largest, bound);
      EXPECT_GT(largest, 0.9 * bound);  // 256 draws; the packed matrix' bound would be 0.71 of this
    }
  }
  EXPECT_EQ(seen, 2 + 2 * 2);
}

TEST(TranslateModel, TooLongSentenceIsRefused) {
  Transformer model = small_model();
  EXPECT_THROW(model->encode(at::randint(4, 9, {1, 41}, at::kLong), {}), c10::Error);
}

TEST(TranslateTraining, SeveralBatchesGiveTheGradientOfOneBig) {
  Transformer model = small_model();
  model->train();
  const Pairs pairs = made_up_pairs(9);
  const auto big = gradients(*model, {make_batch(pairs, first_rows(9))});
  const auto split = gradients(
      *model, {make_batch(pairs, {0, 1}), make_batch(pairs, {2, 3, 4, 5, 6}), make_batch(pairs, {7, 8})});
  for (const auto& [name, gradient] : big) {
    EXPECT_TRUE(at::allclose(gradient, split.at(name), 1e-4, 1e-6)) << name;
  }
}

TEST(TranslateTraining, RecomputeGivesTheGradientOfExact) {
  const Pairs pairs = made_up_pairs(9);
  const Batch batch = make_batch(pairs, first_rows(9));
  const auto gradient_of = [&](const Policy& policy) {
    Transformer model = small_model(0.2, policy);
    model->train();
    torch::manual_seed(3);
    return gradients(*model, {batch});
  };
  const auto exact = gradient_of(Policy::exact()), recompute = gradient_of(Policy::recompute());
  for (const auto& [name, gradient] : exact) {
    EXPECT_TRUE(at::allclose(gradient, recompute.at(name), 1e-4, 1e-6)) << name;
  }
}

double squared_norm(const std::map<std::string, Tensor>& gradients) {
  double sum = 0;
  for (const auto& [name, gradient] : gradients)
    sum += gradient.to(at::kDouble).square().sum().item<double>();
  return sum;
}

double squared_distance(const std::map<std::string, Tensor>& a, const std::map<std::string, Tensor>& b) {
  double sum = 0;
  for (const auto& [name, x] : a) {
    sum += (x.to(at::kDouble) - b.at(name).to(at::kDouble)).square().sum().item<double>();
  }
  return sum;
}

/// The gradient of a small model, and what the check says of it.
struct Checked {
  std::map<std::string, Tensor> gradient;
  Fidelity fidelity;
};

Checked checked_gradients(TransformerImpl& model, const std::vector<Batch>& batches) {
  const Tensor before = random_state();
  Checked result{gradients(model, batches), {}};
  result.fidelity = check_gradients(model, batches, false, before);
  return result;
}

TEST(TranslateFidelity, TheErrorIsThatOfTheStepsGradientWithTheStepsDropout) {
  const Pairs pairs = made_up_pairs(9);
  const std::vector<Batch> batches{make_batch(pairs, {0, 1, 2, 3, 4}), make_batch(pairs, {5, 6, 7, 8})};
  for (const double dropout : {0.0, 0.2}) {
    for (const char* policy :
         {"exact", "recompute", "curve:m=1", "quantized:bits=2", "sampled:m=3", "sampled:m=64"}) {
      const std::string text = policy;
      Transformer model = small_model(dropout, Policy::parse(text));
      model->train();
      torch::manual_seed(3);
      const Checked checked = checked_gradients(*model, batches);

      Transformer reference = small_model(dropout, Policy::recompute());
      reference->train();
      torch::manual_seed(3);
      const auto exact = gradients(*reference, batches);
      const double error = std::sqrt(squared_distance(checked.gradient, exact) / squared_norm(exact));
      EXPECT_NEAR(checked.fidelity.gradient_error, error, 1e-3 * error + 1e-6) << text << " " << dropout;
      ASSERT_TRUE(checked.fidelity.added_variance.has_value());
      if (text == "exact" || text == "recompute" || text == "sampled:m=64") {
        EXPECT_LT(checked.fidelity.gradient_error, 1e-5) << text << " " << dropout;
        EXPECT_LT(*checked.fidelity.added_variance, 1e-9) << text << " " << dropout;
      } else {
        EXPECT_GT(checked.fidelity.gradient_error, 1e-3) << text << " " << dropout;
      }
      if (dropout == 0) {
        const auto [first, second] = halves(batches);
        int64_t words = 0, part = 0;
        for (const Batch& batch : batches) words += batch.predicted;
        for (const Batch& batch : first) part += batch.predicted;
        const double share = static_cast<double>(part) / static_cast<double>(words);
        const double variance = share * (1 - share) *
                                squared_distance(gradients(*reference, first), gradients(*reference, second));
        const double expected = squared_distance(checked.gradient, exact) / variance;
        EXPECT_NEAR(*checked.fidelity.added_variance, expected, 1e-3 * expected + 1e-9) << text;
      }
    }
  }
}

TEST(TranslateFidelity, TheCheckChangesNothing) {
  const Pairs pairs = made_up_pairs(9);
  const Batch batch = make_batch(pairs, first_rows(9));
  for (const char* policy : {"recompute", "curve:m=1", "quantized:bits=4", "sampled:m=3"}) {
    Transformer model = small_model(0.2, Policy::parse(policy));
    model->train();
    const Tensor before = random_state();
    const auto gradient = gradients(*model, {batch});
    std::map<std::string, Tensor> held, values;
    for (const auto& item : model->named_parameters()) {
      held[item.key()] = item.value().grad();
      values[item.key()] = item.value().detach().clone();
    }
    const Tensor after = random_state();
    check_gradients(*model, {batch}, false, before);
    EXPECT_TRUE(at::equal(random_state(), after)) << policy;
    for (const auto& item : model->named_parameters()) {
      EXPECT_TRUE(item.value().grad().is_same(held.at(item.key()))) << item.key();
      EXPECT_TRUE(at::equal(item.value().grad(), gradient.at(item.key()))) << item.key();
      EXPECT_TRUE(at::equal(item.value(), values.at(item.key()))) << item.key();
    }
    int64_t layers = 0;
    for (const auto& module : model->modules()) {
      if (const auto* layer = module->as<nn::MultiheadAttentionImpl>()) {
        EXPECT_EQ(layer->options.policy(), Policy::parse(policy));
        ++layers;
      }
    }
    EXPECT_EQ(layers, 2 + 2 * 2);
  }
}

TEST(TranslateFidelity, HalvesEstimateTheVarianceBetweenMinibatches) {
  const Pairs pairs = made_up_pairs(300);
  Transformer model = small_model(0.0, Policy::curve(1));
  model->train();
  Transformer reference = small_model();
  reference->train();
  torch::manual_seed(5);
  constexpr int64_t kBatches = 120;
  std::vector<std::map<std::string, Tensor>> exact;
  std::map<std::string, Tensor> mean;
  double estimate = 0;
  for (int64_t i = 0; i < kBatches; ++i) {
    const Tensor drawn = at::randint(0, pairs.size(), {6}, at::kLong);
    const std::vector<int64_t> rows(drawn.const_data_ptr<int64_t>(), drawn.const_data_ptr<int64_t>() + 6);
    const std::vector<Batch> batches{make_batch(pairs, rows)};
    const Checked checked = checked_gradients(*model, batches);
    exact.push_back(gradients(*reference, batches));
    // The check says error / variance.
    estimate +=
        squared_distance(checked.gradient, exact.back()) / *checked.fidelity.added_variance / kBatches;
    for (const auto& [name, gradient] : exact.back()) {
      mean[name] = i == 0 ? gradient / kBatches : mean[name] + gradient / kBatches;
    }
  }
  double variance = 0;
  for (const auto& gradient : exact) variance += squared_distance(gradient, mean) / (kBatches - 1);
  EXPECT_NEAR(estimate / variance, 1, 0.25);
}

TEST(TranslateFidelity, OneSentenceHasNoVariance) {
  const Pairs pairs = made_up_pairs(3);
  Transformer model = small_model(0.1, Policy::curve(1));
  model->train();
  EXPECT_FALSE(checked_gradients(*model, {make_batch(pairs, {1})}).fidelity.added_variance.has_value());
  // Two batches of one sentence each can be split.
  const std::vector<Batch> two{make_batch(pairs, {1}), make_batch(pairs, {2})};
  EXPECT_TRUE(checked_gradients(*model, two).fidelity.added_variance.has_value());
}

TEST(TranslateData, HalvesHoldEverySentenceOnce) {
  const Pairs pairs = made_up_pairs(9);
  const std::vector<Batch> batches{make_batch(pairs, {0, 1, 2, 3, 4}), make_batch(pairs, {5}),
                                   make_batch(pairs, {6, 7, 8})};
  const auto parts = halves(batches);
  std::multiset<std::vector<int64_t>> seen, expected(pairs.target.begin(), pairs.target.end());
  int64_t tokens = 0, predicted = 0;
  for (const auto& part : parts) {
    int64_t sentences = 0;
    for (const Batch& batch : part) {
      ASSERT_EQ(batch.source.size(0), batch.target.size(0));
      sentences += batch.source.size(0);
      tokens += batch.source_tokens;
      predicted += batch.predicted;
      for (int64_t i = 0; i < batch.target.size(0); ++i) {
        std::vector<int64_t> ids;
        for (int64_t t = 0; t < batch.target.size(1); ++t) {
          const int64_t id = batch.target[i][t].item<int64_t>();
          if (id != Vocabulary::padding) ids.push_back(id);
        }
        seen.insert(ids);
      }
    }
    EXPECT_GE(sentences, 4);
  }
  EXPECT_EQ(seen, expected);
  for (const Batch& batch : batches) {
    tokens -= batch.source_tokens;
    predicted -= batch.predicted;
  }
  EXPECT_EQ(tokens, 0);
  EXPECT_EQ(predicted, 0);
}

TEST(TranslateDecoding, CachedGreedyIsTheArgmaxOfTheWholeForward) {
  const at::NoGradGuard no_grad;
  Transformer model = small_model();
  model->eval();
  make_lively(*model);
  const Pairs pairs = made_up_pairs(8);
  const Tensor source = pad(pairs.source, first_rows(8));
  const auto translations = translate_batch(*model, source, padding_of(source), 1);
  ASSERT_EQ(translations.size(), 8u);
  std::set<size_t> lengths;
  for (int64_t i = 0; i < 8; ++i) {
    const Tensor alone = pad(pairs.source, {i});
    std::vector<int64_t> ids{Vocabulary::begin};
    const size_t limit = std::min<size_t>(40, 2 * source.size(1) + 20);
    while (ids.size() <= limit) {
      const Tensor logits = model->forward(alone, {}, at::tensor(ids).unsqueeze(0));
      const int64_t next = logits[0][-1].argmax().item<int64_t>();
      if (next == Vocabulary::end) break;
      ids.push_back(next);
    }
    ids.erase(ids.begin());
    EXPECT_EQ(translations[i], ids) << i;
    lengths.insert(ids.size());
  }
  EXPECT_GT(lengths.size(), 2u) << "sentences should leave the batch at different steps";
}

/// log-probability a word of a translation; with `ended` the </s> after it counts as one.
double mean_log_probability(TransformerImpl& model, const Tensor& source, const std::vector<int64_t>& ids,
                            bool ended) {
  std::vector<int64_t> input{Vocabulary::begin}, expected = ids;
  input.insert(input.end(), ids.begin(), ids.end());
  if (ended) {
    expected.push_back(Vocabulary::end);
  } else {
    input.pop_back();
  }
  const Tensor log_p = at::log_softmax(model.forward(source, {}, at::tensor(input).unsqueeze(0)), -1)[0];
  double total = 0;
  for (size_t t = 0; t < expected.size(); ++t)
    total += log_p[static_cast<int64_t>(t)][expected[t]].item<double>();
  return total / static_cast<double>(expected.size());
}

TEST(TranslateDecoding, ABeamAsWideAsTheSearchFindsTheBestTranslation) {
  // Four positions and few words: every translation can be tried.
  torch::manual_seed(11);
  ModelOptions options{.source_words = 9,
                       .target_words = 6,
                       .hidden = 8,
                       .layers = 1,
                       .heads = 2,
                       .feed_forward = 8,
                       .max_length = 4,
                       .dropout = 0};
  Transformer model(options);
  model->eval();
  const at::NoGradGuard no_grad;
  const Tensor source = at::tensor(std::vector<int64_t>{2, 5, 3}).unsqueeze(0);
  double best = -1e9;
  std::vector<int64_t> best_ids;
  const std::function<void(std::vector<int64_t>)> visit = [&](const std::vector<int64_t>& ids) {
    const bool full = ids.size() == 4;
    const double score = mean_log_probability(*model, source, ids, !full);
    if (score > best) {
      best = score;
      best_ids = ids;
    }
    if (full) return;
    for (int64_t word = 0; word < 6; ++word) {
      if (word == Vocabulary::end) continue;
      std::vector<int64_t> longer = ids;
      longer.push_back(word);
      visit(longer);
    }
  };
  visit({});
  EXPECT_EQ(translate_batch(*model, source, {}, 1300)[0], best_ids);
}

TEST(TranslateDecoding, BeamOfABatchEqualsBeamOfEachSentence) {
  Transformer model = small_model();
  model->eval();
  make_lively(*model);
  const Pairs pairs = made_up_pairs(6);
  const Tensor source = pad(pairs.source, first_rows(6));
  const auto together = translate_batch(*model, source, padding_of(source), 3);
  // The limit depends on the longest source of the batch; pad the single ones alike.
  for (int64_t i = 0; i < 6; ++i) {
    const Tensor alone = source.slice(0, i, i + 1);
    EXPECT_EQ(translate_batch(*model, alone, padding_of(alone), 3)[0], together[i]) << i;
  }
}

TEST(TranslateData, EveryRowIsInOneBatchAndTheOrderIsAFunctionOfSeedAndEpoch) {
  const Pairs pairs = made_up_pairs(101);
  const auto batches = batches_by_length(pairs, 8, 5, 2);
  std::vector<int64_t> rows;
  for (const auto& batch : batches) {
    EXPECT_LE(batch.size(), 8u);
    rows.insert(rows.end(), batch.begin(), batch.end());
  }
  std::sort(rows.begin(), rows.end());
  EXPECT_EQ(rows, first_rows(101));
  EXPECT_EQ(batches, batches_by_length(pairs, 8, 5, 2));
  EXPECT_NE(batches, batches_by_length(pairs, 8, 5, 3));
  EXPECT_NE(batches, batches_by_length(pairs, 8, 6, 2));
}

TEST(TranslateData, BatchesHoldSimilarLengths) {
  const Pairs pairs = made_up_pairs(400);
  int64_t cells = 0, tokens = 0;
  for (const auto& rows : batches_by_length(pairs, 8, 1, 0)) {
    const Batch batch = make_batch(pairs, rows);
    cells += batch.source.numel();
    tokens += batch.source_tokens;
  }
  int64_t in_order = 0;
  for (int64_t i = 0; i < 400; i += 8) {
    std::vector<int64_t> rows;
    for (int64_t j = i; j < i + 8; ++j) rows.push_back(j);
    in_order += make_batch(pairs, rows).source.numel();
  }
  EXPECT_LT(cells - tokens, (in_order - tokens) * 2 / 3);
}

TEST(TranslateData, LongSentencesLoseTheirEndOnly) {
  const std::vector<std::vector<std::string>> sentences{{"a", "b", "c", "d"}, {"a", "x"}};
  const Vocabulary vocabulary = Vocabulary::build({{"a", "b", "c", "d"}}, 1);
  const Encoded encoded = encode_all(sentences, vocabulary, 4);
  EXPECT_EQ(encoded.truncated, 1);
  EXPECT_EQ(encoded.unknown, 1);
  EXPECT_EQ(encoded.words, 6);
  EXPECT_EQ(encoded.sentences[0], (std::vector<int64_t>{Vocabulary::begin, vocabulary.id("a"),
                                                        vocabulary.id("b"), Vocabulary::end}));
  EXPECT_EQ(encoded.sentences[1], (std::vector<int64_t>{Vocabulary::begin, vocabulary.id("a"),
                                                        Vocabulary::unknown, Vocabulary::end}));
}

TEST(TranslateData, EvictedShareCountsMiddleRanks) {
  Pairs pairs;
  pairs.source = {{2, 9, 9, 3}};  // 4 keys
  pairs.target = {{2, 9, 9, 3}};  // 3 positions in the decoder
  // m = 1: encoder 4 rows and cross 3 rows of 4 keys evict 2 each; causal rows of 1, 2, 3 keys evict 1.
  EXPECT_DOUBLE_EQ(evicted_share(pairs, 1), (4 * 2 + 3 * 2 + 1) / (4 * 4 + 3 * 4 + 6.0));
  EXPECT_DOUBLE_EQ(evicted_share(pairs, 2), 0);
}

TEST(TranslateData, Utf8IsChecked) {
  EXPECT_TRUE(is_utf8("Straße für Mädchen"));
  EXPECT_TRUE(is_utf8(""));
  EXPECT_FALSE(
      is_utf8("Stra\xdf"
              "e"));
  EXPECT_FALSE(is_utf8("\xc3"));
}

TEST(TranslateOptions, MistakesAreUsageErrors) {
  TrainOptions good;
  good.data = "captions";
  EXPECT_NO_THROW(checked(good));
  const auto refused = [&](const auto& change) {
    TrainOptions bad = good;
    change(bad);
    EXPECT_THROW(checked(bad), UsageError);
  };
  refused([](TrainOptions& o) { o.heads = 7; });
  refused([](TrainOptions& o) { o.attention = "curve:m=0"; });
  refused([](TrainOptions& o) { o.precision = "fp8"; });
  refused([](TrainOptions& o) { o.dropout = 1; });
  refused([](TrainOptions& o) { o.batch_size = 0; });
  refused([](TrainOptions& o) { o.fidelity_every = -1; });
  refused([](TrainOptions& o) { o.target = "de"; });
}

TEST(TranslateOptions, ARunMayBeOlderThanAnOptionThatDoesNotShapeItsModel) {
  nlohmann::ordered_json config{{"attention", "exact"}};
  const TrainOptions given;
  visit_options(given, [&](std::string flag, const auto& field, Resume, const char*) {
    std::replace(flag.begin(), flag.end(), '-', '_');
    config[flag] = field;
  });
  config["fidelity_every"] = 3;
  EXPECT_EQ(options_from_json(config).fidelity_every, 3);
  config.erase("fidelity_every");
  EXPECT_EQ(options_from_json(config).fidelity_every, 0);
  config.erase("hidden");
  EXPECT_THROW(options_from_json(config), Error);
}

}  // namespace
}  // namespace remnant::app::translate
