#include "translate/data.h"

#include "common/captions.h"
#include "common/error.h"

#include <algorithm>
#include <utility>

namespace remnant::app::translate {
namespace {

Corpus captions_corpus(const CorpusSource& from) {
  const bool german_first = from.source_language == "de" && from.target_language == "en";
  const bool english_first = from.source_language == "en" && from.target_language == "de";
  if (!german_first && !english_first) {
    throw UsageError(
        "the captions corpus is German-English: --source and --target should be de and en, got " +
        from.source_language + " and " + from.target_language);
  }
  Captions captions = generate_captions(from.pairs);
  if (english_first) {
    for (ParallelText* text : {&captions.train, &captions.validation, &captions.test}) {
      std::swap(text->source, text->target);
    }
  }
  return {std::move(captions.train), std::move(captions.validation), std::move(captions.test)};
}

}  // namespace

Corpus load_corpus(const CorpusSource& from) {
  if (from.data == "captions") return captions_corpus(from);
  const auto read = [&](const std::string& split) {
    return read_parallel(from.data, split, from.source_language, from.target_language);
  };
  return {read("train"), read("val"), read("test")};
}

ParallelText load_split(const CorpusSource& from, const std::string& split) {
  const std::vector<std::string> names{"train", "val", "test"};
  if (std::find(names.begin(), names.end(), split) == names.end()) {
    throw UsageError("--split should be train, val or test, got '" + split + "'");
  }
  if (from.data != "captions")
    return read_parallel(from.data, split, from.source_language, from.target_language);
  Corpus corpus = captions_corpus(from);
  return std::move(split == "train" ? corpus.train : split == "val" ? corpus.validation : corpus.test);
}

std::vector<std::vector<std::string>> tokenize_all(const std::vector<std::string>& sentences,
                                                   const std::string& locale) {
  std::vector<std::vector<std::string>> words;
  words.reserve(sentences.size());
  for (const std::string& sentence : sentences) words.push_back(tokenize(sentence, locale));
  return words;
}

Encoded encode_all(const std::vector<std::vector<std::string>>& sentences, const Vocabulary& vocabulary,
                   int64_t max_length) {
  Encoded encoded;
  encoded.sentences.reserve(sentences.size());
  for (const std::vector<std::string>& words : sentences) {
    std::vector<int64_t> ids = vocabulary.encode(words);
    encoded.words += static_cast<int64_t>(words.size());
    encoded.unknown += std::count(ids.begin(), ids.end(), Vocabulary::unknown);
    if (static_cast<int64_t>(ids.size()) > max_length) {
      ids.resize(max_length);
      ids.back() = Vocabulary::end;
      ++encoded.truncated;
    }
    encoded.sentences.push_back(std::move(ids));
  }
  return encoded;
}

Pairs encode_pairs(const ParallelText& text, const std::vector<std::vector<std::string>>& source_words,
                   const std::vector<std::vector<std::string>>& target_words,
                   const Vocabulary& source_vocabulary, const Vocabulary& target_vocabulary,
                   int64_t max_length) {
  Encoded source = encode_all(source_words, source_vocabulary, max_length);
  Encoded target = encode_all(target_words, target_vocabulary, max_length);
  Pairs pairs;
  pairs.truncated = source.truncated + target.truncated;
  pairs.source = std::move(source.sentences);
  pairs.target = std::move(target.sentences);
  pairs.source_text = text.source;
  pairs.target_text = text.target;
  pairs.target_words.reserve(target_words.size());
  for (const std::vector<std::string>& words : target_words) pairs.target_words.push_back(join_words(words));
  return pairs;
}

Batch make_batch(const Pairs& pairs, const std::vector<int64_t>& rows) {
  Batch batch;
  batch.source = pad(pairs.source, rows);
  batch.source_padding = padding_of(batch.source);
  batch.target = pad(pairs.target, rows);
  for (const int64_t row : rows) {
    batch.source_tokens += static_cast<int64_t>(pairs.source[row].size());
    batch.predicted += static_cast<int64_t>(pairs.target[row].size()) - 1;
  }
  return batch;
}

std::array<std::vector<Batch>, 2> halves(const std::vector<Batch>& batches) {
  std::array<std::vector<Batch>, 2> parts;
  for (size_t i = 0; i < batches.size(); ++i) {
    for (size_t first = 0; first < 2; ++first) {
      // Batches take turns in which half gets their first sentence, and with it the odd one.
      std::vector<Batch>& part = parts[(i + first) % 2];
      const auto start = static_cast<int64_t>(first);
      Batch half;
      half.source = batches[i].source.slice(0, start, std::nullopt, 2).contiguous();
      half.target = batches[i].target.slice(0, start, std::nullopt, 2).contiguous();
      if (half.source.size(0) == 0) continue;
      half.source_padding = padding_of(half.source);
      half.source_tokens = half.source.ne(Vocabulary::padding).sum().item<int64_t>();
      half.predicted = half.target.slice(1, 1).ne(Vocabulary::padding).sum().item<int64_t>();
      part.push_back(std::move(half));
    }
  }
  return parts;
}

std::vector<std::vector<int64_t>> batches_by_length(const Pairs& pairs, int64_t batch_size, uint64_t seed,
                                                    int64_t epoch) {
  std::vector<int64_t> lengths(pairs.size());
  for (int64_t i = 0; i < pairs.size(); ++i) {
    lengths[i] = static_cast<int64_t>(pairs.source[i].size() + pairs.target[i].size());
  }
  return app::batches_by_length(lengths, batch_size, seed, epoch);
}

double evicted_share(const Pairs& pairs, int64_t m) {
  const auto evicted = [m](int64_t keys) { return std::max<int64_t>(0, keys - 2 * m); };
  double gone = 0, all = 0;
  for (int64_t i = 0; i < pairs.size(); ++i) {
    const int64_t source = static_cast<int64_t>(pairs.source[i].size());
    const int64_t target = static_cast<int64_t>(pairs.target[i].size()) - 1;
    gone += static_cast<double>((source + target) * evicted(source));
    all += static_cast<double>((source + target) * source);
    for (int64_t keys = 1; keys <= target; ++keys) {
      gone += static_cast<double>(evicted(keys));
      all += static_cast<double>(keys);
    }
  }
  return all > 0 ? gone / all : 0;
}

}  // namespace remnant::app::translate
