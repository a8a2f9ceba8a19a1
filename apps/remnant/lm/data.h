#pragma once

#include "lm/tokens.h"

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace remnant::app::lm {

/// Where the text comes from.
struct TextSource {
  std::string data;           ///< a file, or "generated"
  int64_t sentences = 20000;  ///< of the generated text
};

/// Throws Error on a file that is missing, damaged, not UTF-8, or empty.
std::string load_text(const TextSource& from);
/// The same, and on one that is too short to split.
std::string load_text_to_split(const TextSource& from);

/// English descriptions of everyday scenes in paragraphs, from the grammar of the captions corpus; a function
/// of the number of sentences alone.
std::string generate_text(int64_t sentences);

/// The text's parts by position: the first 90 % for training, 5 % each for validation and test. Cut between
/// characters.
struct TextParts {
  std::string_view train, validation, test;
};
TextParts split_text(std::string_view text);

/// One part as tokens, all of which are predicted but the first: the last token of the part before, or a line
/// break where there is none.
struct TokenText {
  std::vector<int32_t> tokens;
  int64_t bytes = 0, characters = 0;  ///< of what is predicted
  int64_t predicted() const { return static_cast<int64_t>(tokens.size()) - 1; }
};

/// A whole text.
TokenText tokenize_text(std::string_view text, const Tokenizer& tokenizer);

struct Splits {
  TokenText train, validation, test;
};
Splits tokenize_parts(const TextParts& parts, const Tokenizer& tokenizer);

/// Consecutive tokens: `length` inputs from `start` on predict the tokens one place further.
struct Window {
  int64_t start = 0, length = 0;
};

/// Windows of `context` tokens that cover the text once, from a place in the first `context` tokens on that
/// differs from epoch to epoch, in random order; a function of seed and epoch alone. Tokens before the first
/// window and behind the last are left out.
std::vector<Window> training_windows(const TokenText& text, int64_t context, uint64_t seed, int64_t epoch);

/// Windows that predict every token once, in order; the last may be shorter.
std::vector<Window> evaluation_windows(const TokenText& text, int64_t context);

/// Inputs and what follows each, [windows, length], int64; all windows of one length.
std::pair<at::Tensor, at::Tensor> window_tensors(const TokenText& text, const std::vector<Window>& windows);

}  // namespace remnant::app::lm
