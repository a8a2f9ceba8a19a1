#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace remnant::app::lm {

/// What the model reads and predicts: every byte of the text, or sub-words. Lossless.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  virtual int64_t size() const = 0;
  virtual std::vector<int32_t> encode(std::string_view text) const = 0;
  /// The bytes of one token.
  virtual std::string decode(int64_t token) const = 0;
  /// What a token is called: "byte", "sub-word".
  virtual std::string name() const = 0;
  /// Writes what load_tokenizer needs into the run's folder.
  virtual void save(const std::filesystem::path& run) const = 0;
};

/// What --tokens says.
struct TokenKind {
  bool sentencepiece = false;
  int64_t vocabulary = 256;
};

/// Reads "bytes" or "sentencepiece:vocabulary=N". Throws UsageError.
TokenKind parse_tokens(const std::string& text);

/// Learns sub-words from `text`; bytes need nothing. Throws Error.
std::unique_ptr<Tokenizer> make_tokenizer(const TokenKind& kind, std::string_view text);

/// The tokenizer of a run. Throws Error on a missing or damaged file.
std::unique_ptr<Tokenizer> load_tokenizer(const TokenKind& kind, const std::filesystem::path& run);

}  // namespace remnant::app::lm
