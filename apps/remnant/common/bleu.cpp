#include "bleu.h"

#include "error.h"

#include <unicode/locid.h>
#include <unicode/unistr.h>
#include <unicode/utf8.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <string_view>
#include <unordered_map>

namespace remnant::app {
namespace {

constexpr size_t max_order = 4;

using Ngram = std::array<int32_t, max_order>;

// What Python's str.split() separates at, since that defines the words sacreBLEU counts: Unicode's
// white space and also the four ASCII information separators.
bool is_python_space(UChar32 c) {
  return (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
         c == 0x3000;
}

std::vector<std::string_view> split_at_spaces(std::string_view text) {
  std::vector<std::string_view> words;
  const auto size = static_cast<int32_t>(text.size());
  int32_t word_start = 0;
  for (int32_t i = 0; i < size;) {
    const int32_t start = i;
    UChar32 c = 0;
    U8_NEXT(text.data(), i, size, c);
    if (!is_python_space(c)) continue;
    if (start > word_start) words.push_back(text.substr(word_start, start - word_start));
    word_start = i;
  }
  if (size > word_start) words.push_back(text.substr(word_start));
  return words;
}

// The tokenizer removes "-\n", so a final newline must go before it sees the line.
std::string_view without_trailing_space(std::string_view text) {
  int32_t end = static_cast<int32_t>(text.size());
  while (end > 0) {
    int32_t i = end;
    UChar32 c = 0;
    U8_PREV(text.data(), 0, i, c);
    if (!is_python_space(c)) break;
    end = i;
  }
  return text.substr(0, end);
}

std::string lower_case(const std::string& text) {
  std::string lower;
  icu::UnicodeString::fromUTF8(text).toLower(icu::Locale::getRoot()).toUTF8String(lower);
  return lower;
}

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_period_or_comma(char c) { return c == '.' || c == ','; }

// ASCII punctuation and symbols except the apostrophe, period, comma and hyphen.
bool is_symbol(char c) {
  return (c >= '!' && c <= '&') || (c >= '(' && c <= '+') || c == '/' || (c >= ':' && c <= '@') ||
         (c >= '[' && c <= '`') || (c >= '{' && c <= '~');
}

// Rewrites every pair of neighbouring bytes that `matches`, left to right without overlap, as
// "first second" with the spaces asked for around and between. Working on bytes is safe in UTF-8:
// every byte the rules name is ASCII, and the others only ever count as "not a digit".
template <typename Matches>
std::string space_out(const std::string& text, Matches matches, const char* before, const char* after) {
  std::string result;
  result.reserve(text.size() + text.size() / 4);
  for (size_t i = 0; i < text.size(); ++i) {
    if (i + 1 < text.size() && matches(text[i], text[i + 1])) {
      result += before;
      result += text[i];
      result += ' ';
      result += text[++i];
      result += after;
    } else {
      result += text[i];
    }
  }
  return result;
}

// The rules of NIST's mteval-v13a for Western languages.
std::string tokenize_13a(std::string_view sentence) {
  std::string line(sentence);
  replace_all(line, "<skipped>", "");
  replace_all(line, "-\n", "");
  replace_all(line, "\n", " ");
  replace_all(line, "&quot;", "\"");
  replace_all(line, "&amp;", "&");
  replace_all(line, "&lt;", "<");
  replace_all(line, "&gt;", ">");

  // The spaces at the ends give the rules below a neighbour at the first and last character.
  std::string spaced = " ";
  for (const char c : line) {
    if (is_symbol(c)) {
      spaced += ' ';
      spaced += c;
      spaced += ' ';
    } else {
      spaced += c;
    }
  }
  spaced += ' ';

  spaced = space_out(spaced, [](char a, char b) { return !is_digit(a) && is_period_or_comma(b); }, "", " ");
  spaced = space_out(spaced, [](char a, char b) { return is_period_or_comma(a) && !is_digit(b); }, " ", "");
  return space_out(spaced, [](char a, char b) { return is_digit(a) && b == '-'; }, "", " ");
}

class WordNumbers {
 public:
  std::vector<int32_t> encode(const std::string& sentence, BleuTokenizer tokenizer, bool lowercase) {
    const std::string text = lowercase ? lower_case(sentence) : sentence;
    std::string tokens(without_trailing_space(text));
    if (tokenizer == BleuTokenizer::mteval_13a) tokens = tokenize_13a(tokens);
    std::vector<int32_t> numbers;
    for (const std::string_view word : split_at_spaces(tokens)) {
      numbers.push_back(
          numbers_.try_emplace(std::string(word), static_cast<int32_t>(numbers_.size())).first->second);
    }
    return numbers;
  }

 private:
  std::unordered_map<std::string, int32_t> numbers_;
};

std::vector<Ngram> sorted_ngrams(const std::vector<int32_t>& words, size_t order) {
  std::vector<Ngram> ngrams;
  for (size_t i = 0; i + order <= words.size(); ++i) {
    Ngram ngram;
    ngram.fill(-1);
    std::copy_n(words.begin() + static_cast<std::ptrdiff_t>(i), order, ngram.begin());
    ngrams.push_back(ngram);
  }
  std::sort(ngrams.begin(), ngrams.end());
  return ngrams;
}

}  // namespace

Bleu corpus_bleu(const std::vector<std::string>& hypotheses, const std::vector<std::string>& references,
                 BleuTokenizer tokenizer, bool lowercase) {
  if (hypotheses.size() != references.size()) {
    throw Error("BLEU needs one reference for each hypothesis, got " + std::to_string(hypotheses.size()) +
                " hypotheses and " + std::to_string(references.size()) + " references");
  }

  Bleu bleu;
  bleu.signature = std::string("BLEU|nrefs:1|case:") + (lowercase ? "lc" : "mixed") +
                   "|eff:no|tok:" + (tokenizer == BleuTokenizer::mteval_13a ? "13a" : "none") + "|smooth:exp";

  std::array<int64_t, max_order> correct{}, total{};
  WordNumbers numbers;
  std::vector<Ngram> common;
  for (size_t i = 0; i < hypotheses.size(); ++i) {
    const std::vector<int32_t> hypothesis = numbers.encode(hypotheses[i], tokenizer, lowercase);
    const std::vector<int32_t> reference = numbers.encode(references[i], tokenizer, lowercase);
    bleu.hypothesis_length += static_cast<int64_t>(hypothesis.size());
    bleu.reference_length += static_cast<int64_t>(reference.size());
    for (size_t order = 1; order <= max_order; ++order) {
      const std::vector<Ngram> ours = sorted_ngrams(hypothesis, order);
      const std::vector<Ngram> theirs = sorted_ngrams(reference, order);
      // The intersection of multisets keeps each n-gram as often as the rarer side: BLEU's clipping.
      common.clear();
      std::set_intersection(ours.begin(), ours.end(), theirs.begin(), theirs.end(),
                            std::back_inserter(common));
      correct[order - 1] += static_cast<int64_t>(common.size());
      total[order - 1] += static_cast<int64_t>(ours.size());
    }
  }

  if (bleu.hypothesis_length < bleu.reference_length) {
    bleu.brevity_penalty = bleu.hypothesis_length == 0
                               ? 0.0
                               : std::exp(1.0 - static_cast<double>(bleu.reference_length) /
                                                    static_cast<double>(bleu.hypothesis_length));
  }
  // Smoothing is for missing longer n-grams; without any common word the score is zero.
  if (correct[0] == 0) return bleu;

  double smoothing = 1;
  double log_sum = 0;
  for (size_t n = 0; n < max_order; ++n) {
    // No sentence has n + 1 words: a precision of zero, which makes the geometric mean zero.
    if (total[n] == 0) return bleu;
    const auto count = static_cast<double>(total[n]);
    if (correct[n] == 0) {
      smoothing *= 2;
      bleu.precisions[n] = 100.0 / (smoothing * count);
    } else {
      bleu.precisions[n] = 100.0 * static_cast<double>(correct[n]) / count;
    }
    log_sum += std::log(bleu.precisions[n]);
  }
  bleu.score = bleu.brevity_penalty * std::exp(log_sum / static_cast<double>(max_order));
  return bleu;
}

}  // namespace remnant::app
