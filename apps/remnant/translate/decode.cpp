#include "translate/decode.h"

#include "common/run_folder.h"

#include <ATen/core/Reduction.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/topk.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

namespace remnant::app::translate {
namespace {

using at::Tensor;

constexpr float kNever = -std::numeric_limits<float>::infinity();

struct Hypothesis {
  std::vector<int64_t> ids;
  float score = 0;  ///< log-probability
  int64_t row = 0;  ///< row of the previous step's batch that it continues
};

/// A sentence whose translation is not complete.
struct Open {
  int64_t index = 0;  ///< in the caller's batch
  std::vector<Hypothesis> live;
};

struct Finished {
  std::vector<int64_t> ids;
  float score = kNever;  ///< log-probability a word
  int64_t count = 0;

  void offer(const std::vector<int64_t>& candidate, float log_probability, int64_t words) {
    ++count;
    const float normalised = log_probability / static_cast<float>(words);
    if (count > 1 && normalised <= score) return;
    ids = candidate;
    score = normalised;
  }
};

void select(nn::KeyValueCache& cache, const Tensor& rows) {
  cache.key = cache.key.index_select(0, rows);
  cache.value = cache.value.index_select(0, rows);
}

}  // namespace

std::vector<std::vector<int64_t>> translate_batch(TransformerImpl& model, const Tensor& source,
                                                  const Tensor& padding, int64_t beam) {
  const at::NoGradGuard no_grad;
  const int64_t sentences = source.size(0), words = model.options().target_words;
  // Twice as long as the source and some is more than any translation needs; an untrained model
  // would otherwise run to the last position every time.
  const int64_t limit = std::min(model.options().max_length, 2 * source.size(1) + 20);
  const int64_t candidates = std::min(2 * beam, beam * words);

  Tensor memory = model.encode(source, padding), mask = padding;
  if (beam > 1) {
    memory = memory.repeat_interleave(beam, 0);
    if (mask.defined()) mask = mask.repeat_interleave(beam, 0);
  }
  std::vector<nn::DecoderCache> caches;
  std::vector<Finished> finished(sentences);
  std::vector<Open> open(sentences);
  std::vector<int64_t> tokens(sentences * beam, Vocabulary::begin);
  // All beams start alike: only the first may go on, or they would stay copies of one another.
  std::vector<float> scores(sentences * beam, kNever);
  for (int64_t i = 0; i < sentences; ++i) {
    open[i] = {i, std::vector<Hypothesis>(beam)};
    scores[i * beam] = 0;
  }

  for (int64_t position = 0; position < limit && !open.empty(); ++position) {
    const Tensor logits = model.decode_next(at::tensor(tokens), position, memory, mask, caches);
    const Tensor total = at::log_softmax(logits, -1) + at::tensor(scores).unsqueeze(1);
    const int64_t rows = static_cast<int64_t>(open.size());
    const auto [values, places] = at::topk(total.view({rows, beam * words}), candidates, 1);
    const auto value = values.accessor<float, 2>();
    const auto place = places.accessor<int64_t, 2>();

    std::vector<Open> still_open;
    for (int64_t i = 0; i < rows; ++i) {
      Open& sentence = open[i];
      Finished& done = finished[sentence.index];
      std::vector<Hypothesis> next;
      for (int64_t c = 0; c < candidates && static_cast<int64_t>(next.size()) < beam; ++c) {
        if (value[i][c] == kNever) break;
        const int64_t parent = place[i][c] / words, word = place[i][c] % words;
        if (word == Vocabulary::end) {
          // An end below the best `beam` is not a better translation than those that go on.
          if (c < beam) done.offer(sentence.live[parent].ids, value[i][c], position + 1);
          continue;
        }
        Hypothesis hypothesis{sentence.live[parent].ids, value[i][c], i * beam + parent};
        hypothesis.ids.push_back(word);
        next.push_back(std::move(hypothesis));
      }
      if (done.count >= beam) continue;
      while (static_cast<int64_t>(next.size()) < beam) {
        next.push_back({{Vocabulary::end}, kNever, i * beam});
      }
      sentence.live = std::move(next);
      still_open.push_back(std::move(sentence));
    }

    std::vector<int64_t> parents;
    tokens.clear();
    scores.clear();
    for (const Open& sentence : still_open) {
      for (const Hypothesis& hypothesis : sentence.live) {
        parents.push_back(hypothesis.row);
        tokens.push_back(hypothesis.ids.back());
        scores.push_back(hypothesis.score);
      }
    }
    const bool fewer = still_open.size() < open.size();
    open = std::move(still_open);
    if (open.empty()) break;
    const bool moved = fewer || !std::is_sorted(parents.begin(), parents.end()) ||
                       std::adjacent_find(parents.begin(), parents.end()) != parents.end();
    if (!moved) continue;
    const Tensor order = at::tensor(parents);
    for (nn::DecoderCache& cache : caches) {
      select(cache.self, order);
      // The beams of one sentence share their source, so this changes only as sentences leave.
      if (fewer) select(cache.cross, order);
    }
    if (fewer) {
      memory = memory.index_select(0, order);
      if (mask.defined()) mask = mask.index_select(0, order);
    }
  }

  for (const Open& sentence : open) {
    for (const Hypothesis& hypothesis : sentence.live) {
      finished[sentence.index].offer(hypothesis.ids, hypothesis.score, limit);
    }
  }
  std::vector<std::vector<int64_t>> translations;
  translations.reserve(finished.size());
  for (Finished& done : finished) translations.push_back(std::move(done.ids));
  return translations;
}

std::vector<std::vector<std::string>> translate(TransformerImpl& model,
                                                const std::vector<std::vector<int64_t>>& sentences,
                                                const Vocabulary& target_vocabulary, int64_t beam,
                                                int64_t batch_size) {
  std::vector<std::vector<std::string>> translations(sentences.size());
  for (const std::vector<int64_t>& rows : sorted_batches(sentences, batch_size)) {
    stop_if_interrupted();
    const Tensor source = pad(sentences, rows);
    const auto ids = translate_batch(model, source, padding_of(source), beam);
    for (size_t i = 0; i < rows.size(); ++i) translations[rows[i]] = target_vocabulary.decode(ids[i]);
  }
  return translations;
}

double perplexity(TransformerImpl& model, const Pairs& pairs, int64_t batch_size) {
  const at::NoGradGuard no_grad;
  double total = 0;
  int64_t predicted = 0;
  for (const std::vector<int64_t>& rows : sorted_batches(pairs.target, batch_size)) {
    stop_if_interrupted();
    const Batch batch = make_batch(pairs, rows);
    const Tensor logits =
        model.forward(batch.source, batch.source_padding, batch.target.slice(1, 0, batch.target.size(1) - 1));
    total += at::cross_entropy_loss(logits.flatten(0, 1), batch.target.slice(1, 1).flatten(), {},
                                    at::Reduction::Sum, Vocabulary::padding)
                 .item<double>();
    predicted += batch.predicted;
  }
  return std::exp(total / static_cast<double>(std::max<int64_t>(predicted, 1)));
}

Scores evaluate(TransformerImpl& model, const Pairs& pairs, const Vocabulary& target_vocabulary, int64_t beam,
                int64_t batch_size) {
  model.eval();
  Scores scores;
  scores.perplexity = perplexity(model, pairs, batch_size);
  std::vector<std::string> words, text;
  for (const auto& translation : translate(model, pairs.source, target_vocabulary, beam, batch_size)) {
    words.push_back(join_words(translation));
    text.push_back(detokenize(translation));
  }
  scores.tokens = corpus_bleu(words, pairs.target_words, BleuTokenizer::none, true);
  scores.detokenised = corpus_bleu(text, pairs.target_text, BleuTokenizer::mteval_13a, true);
  return scores;
}

}  // namespace remnant::app::translate
