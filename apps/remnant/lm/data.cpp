#include "lm/data.h"

#include "common/batches.h"
#include "common/captions.h"
#include "common/error.h"
#include "common/text.h"

#include <ATen/ops/empty.h>

#include <algorithm>

namespace remnant::app::lm {
namespace {

/// Below that a part may be empty.
constexpr size_t kShortest = 100;

size_t character_boundary(std::string_view text, size_t position) {
  while (position < text.size() && (static_cast<unsigned char>(text[position]) & 0xc0) == 0x80) ++position;
  return position;
}

TokenText tokenize_part(std::string_view text, int32_t before, const Tokenizer& tokenizer) {
  TokenText part{tokenizer.encode(text), static_cast<int64_t>(text.size()), characters(text)};
  part.tokens.insert(part.tokens.begin(), before);
  return part;
}

}  // namespace

std::string generate_text(int64_t sentences) {
  constexpr uint64_t kSeed = 1, kShortestParagraph = 3, kParagraphs = 5;
  Captions captions = generate_captions(sentences, kSeed);
  std::mt19937_64 random(kSeed);
  std::string text;
  uint64_t left = 0;
  for (const ParallelText* split : {&captions.train, &captions.validation, &captions.test}) {
    for (const std::string& sentence : split->target) {
      if (left == 0) {
        if (!text.empty()) text += "\n\n";
        left = kShortestParagraph + random() % kParagraphs;
      } else {
        text += ' ';
      }
      text += sentence;
      --left;
    }
  }
  return text + "\n";
}

std::string load_text(const TextSource& from) {
  if (from.data == "generated") return generate_text(from.sentences);
  std::string text = read_text(from.data);
  if (text.empty()) throw Error("'" + from.data + "' holds 0 bytes of text, expected at least 1");
  return text;
}

std::string load_text_to_split(const TextSource& from) {
  std::string text = load_text(from);
  if (text.size() < kShortest) {
    throw Error("'" + from.data + "' holds " + std::to_string(text.size()) +
                " bytes of text, expected at least " + std::to_string(kShortest) +
                ": they are split into training, validation and test");
  }
  return text;
}

TextParts split_text(std::string_view text) {
  const size_t first = character_boundary(text, text.size() / 100 * 90 + text.size() % 100 * 90 / 100);
  const size_t second = character_boundary(text, text.size() / 100 * 95 + text.size() % 100 * 95 / 100);
  return {text.substr(0, first), text.substr(first, second - first), text.substr(second)};
}

TokenText tokenize_text(std::string_view text, const Tokenizer& tokenizer) {
  return tokenize_part(text, tokenizer.encode("\n").back(), tokenizer);
}

Splits tokenize_parts(const TextParts& parts, const Tokenizer& tokenizer) {
  Splits splits;
  splits.train = tokenize_text(parts.train, tokenizer);
  splits.validation = tokenize_part(parts.validation, splits.train.tokens.back(), tokenizer);
  splits.test = tokenize_part(parts.test, splits.validation.tokens.back(), tokenizer);
  return splits;
}

std::vector<Window> training_windows(const TokenText& text, int64_t context, uint64_t seed, int64_t epoch) {
  std::mt19937_64 random = epoch_random(seed, epoch);
  const int64_t places = std::min(context, text.predicted() - context + 1);
  const auto first = static_cast<int64_t>(random() % static_cast<uint64_t>(places));
  std::vector<Window> windows;
  for (int64_t start = first; start + context <= text.predicted(); start += context) {
    windows.push_back({start, context});
  }
  shuffle(windows, random);
  return windows;
}

std::vector<Window> evaluation_windows(const TokenText& text, int64_t context) {
  std::vector<Window> windows;
  for (int64_t start = 0; start < text.predicted(); start += context) {
    windows.push_back({start, std::min(context, text.predicted() - start)});
  }
  return windows;
}

std::pair<at::Tensor, at::Tensor> window_tensors(const TokenText& text, const std::vector<Window>& windows) {
  const std::vector<int64_t> shape{static_cast<int64_t>(windows.size()), windows.front().length};
  at::Tensor inputs = at::empty(shape, at::kLong), next = at::empty(shape, at::kLong);
  auto* input = inputs.mutable_data_ptr<int64_t>();
  auto* target = next.mutable_data_ptr<int64_t>();
  for (const Window& window : windows) {
    const auto begin = text.tokens.begin() + window.start;
    input = std::copy(begin, begin + window.length, input);
    target = std::copy(begin + 1, begin + window.length + 1, target);
  }
  return {inputs, next};
}

}  // namespace remnant::app::lm
