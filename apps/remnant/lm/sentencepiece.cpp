#include "lm/sentencepiece.h"

#include "common/error.h"
#include "common/run_folder.h"

#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <charconv>
#include <string>
#include <unordered_map>
#include <utility>

namespace remnant::app::lm {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFile = "tokens.model";
/// What the library writes for a space.
constexpr std::string_view kSpace = "\xe2\x96\x81";

void check(const sentencepiece::util::Status& status, const std::string& what) {
  if (status.ok()) return;
  const std::string reason = status.ToString();
  throw Error(what + ": " + reason.substr(0, reason.find('\n')));
}

/// Calls visit(line, whether a line break follows) for every line.
template <typename Visit>
void each_line(std::string_view text, const Visit& visit) {
  while (!text.empty()) {
    const size_t end = text.find('\n');
    visit(text.substr(0, end), end != std::string_view::npos);
    text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
  }
}

class Lines final : public sentencepiece::SentenceIterator {
 public:
  explicit Lines(std::string_view text) {
    each_line(text, [&](std::string_view line, bool) {
      if (!line.empty()) lines_.emplace_back(line);
    });
  }
  bool done() const override { return next_ == lines_.size(); }
  void Next() override { ++next_; }
  const std::string& value() const override { return lines_[next_]; }
  sentencepiece::util::Status status() const override { return {}; }

 private:
  std::vector<std::string> lines_;
  size_t next_ = 0;
};

class SubWords final : public Tokenizer {
 public:
  explicit SubWords(std::string model) : model_(std::move(model)) {
    check(processor_.LoadFromSerializedProto(model_), "cannot read the sub-words");
    line_break_ = processor_.PieceToId("<0x0A>");
    if (!processor_.IsByte(line_break_))
      throw Error("the sub-words are not those of this program: they lack bytes");
  }

  int64_t size() const override { return processor_.GetPieceSize(); }

  std::vector<int32_t> encode(std::string_view text) const override {
    if (text.find(kSpace) != std::string_view::npos) {
      throw Error("the text holds the character U+2581, which sub-words use for spaces: use --tokens bytes");
    }
    std::vector<int32_t> tokens;
    each_line(text, [&](std::string_view line, bool ended) {
      std::vector<int> ids;
      check(processor_.Encode({line.data(), line.size()}, &ids), "cannot split the text into sub-words");
      tokens.insert(tokens.end(), ids.begin(), ids.end());
      if (ended) tokens.push_back(line_break_);
    });
    return tokens;
  }

  std::string decode(int64_t token) const override {
    const auto id = static_cast<int>(token);
    const std::string& piece = processor_.IdToPiece(id);
    if (processor_.IsByte(id)) {  // "<0x0A>"
      unsigned byte = 0;
      std::from_chars(piece.data() + 3, piece.data() + 5, byte, 16);
      return std::string(1, static_cast<char>(byte));
    }
    if (processor_.IsUnknown(id)) return "\xef\xbf\xbd";
    std::string text = piece;
    for (size_t at = text.find(kSpace); at != std::string::npos; at = text.find(kSpace, at)) {
      text.replace(at, kSpace.size(), " ");
    }
    return text;
  }

  std::string name() const override { return "sub-word"; }

  void save(const fs::path& run) const override { write_file_atomically(run / kFile, model_); }

 private:
  std::string model_;
  sentencepiece::SentencePieceProcessor processor_;
  int line_break_ = 0;
};

}  // namespace

std::unique_ptr<Tokenizer> make_sentencepiece(int64_t vocabulary, std::string_view text) {
  Lines lines(text);
  std::string model;
  // Lossless: spaces stay as they are, and what has no sub-word is spelt in bytes.
  check(sentencepiece::SentencePieceTrainer::Train({{"vocab_size", std::to_string(vocabulary)},
                                                    {"hard_vocab_limit", "false"},
                                                    {"byte_fallback", "true"},
                                                    {"normalization_rule_name", "identity"},
                                                    {"add_dummy_prefix", "false"},
                                                    {"remove_extra_whitespaces", "false"},
                                                    {"bos_id", "-1"},
                                                    {"eos_id", "-1"},
                                                    {"max_sentence_length", "1000000000"},
                                                    {"num_threads", "1"},
                                                    {"minloglevel", "2"}},
                                                   &lines, &model),
        "cannot learn sub-words from the text");
  return std::make_unique<SubWords>(std::move(model));
}

std::unique_ptr<Tokenizer> load_sentencepiece(const fs::path& run) {
  return std::make_unique<SubWords>(read_file(run / kFile));
}

}  // namespace remnant::app::lm
