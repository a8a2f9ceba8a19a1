#include "lm/tokens.h"

#include "common/error.h"
#include "lm/sentencepiece.h"

#include <charconv>

namespace remnant::app::lm {
namespace {

class Bytes final : public Tokenizer {
 public:
  int64_t size() const override { return 256; }
  std::vector<int32_t> encode(std::string_view text) const override {
    std::vector<int32_t> tokens;
    tokens.reserve(text.size());
    for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
    return tokens;
  }
  std::string decode(int64_t token) const override { return std::string(1, static_cast<char>(token)); }
  std::string name() const override { return "byte"; }
  void save(const std::filesystem::path&) const override {}
};

}  // namespace

TokenKind parse_tokens(const std::string& text) {
  if (text == "bytes") return {};
  constexpr std::string_view start = "sentencepiece:vocabulary=";
  if (text.starts_with(start)) {
    TokenKind kind{.sentencepiece = true, .vocabulary = 0};
    const char* const last = text.data() + text.size();
    const auto [end, error] = std::from_chars(text.data() + start.size(), last, kind.vocabulary);
    if (error == std::errc() && end == last && kind.vocabulary >= 300 && kind.vocabulary <= 1000000) {
      return kind;
    }
    throw UsageError("--tokens " + text +
                     ": the vocabulary should be a number from 300 to 1000000 (every byte is a part of it)");
  }
  throw UsageError("--tokens should be bytes or sentencepiece:vocabulary=N, got '" + text + "'");
}

std::unique_ptr<Tokenizer> make_tokenizer(const TokenKind& kind, std::string_view text) {
  if (kind.sentencepiece) return make_sentencepiece(kind.vocabulary, text);
  return std::make_unique<Bytes>();
}

std::unique_ptr<Tokenizer> load_tokenizer(const TokenKind& kind, const std::filesystem::path& run) {
  if (kind.sentencepiece) return load_sentencepiece(run);
  return std::make_unique<Bytes>();
}

}  // namespace remnant::app::lm
