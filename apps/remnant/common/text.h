#pragma once

#include <cstdint>
#include <filesystem>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace remnant::app {

/// Whether `text` is well-formed UTF-8.
bool is_utf8(std::string_view text);
/// Code points of well-formed UTF-8.
int64_t characters(std::string_view text);
/// `text` with U+FFFD for what is not UTF-8 and for control characters other than tabs and line ends.
std::string printable_utf8(std::string_view text);

/// 64-bit FNV-1a of the bytes, as hexadecimal digits.
std::string fingerprint(std::string_view bytes);

/// The bytes of a plain or gzip file (recognised by content, not by name). Throws Error: missing or
/// unreadable file, truncated gzip.
std::string read_unpacked(const std::filesystem::path& file);
/// The same as text, without a byte-order mark. Throws Error: invalid UTF-8 too (with the line number).
std::string read_text(const std::filesystem::path& file);
/// Its lines; "\r\n" ends a line like "\n".
std::vector<std::string> read_lines(const std::filesystem::path& file);
/// The same, but one line in a thousand may be damaged: what is not UTF-8 in it becomes U+FFFD. Adds the
/// number of such lines to `repaired`.
std::vector<std::string> read_damaged_lines(const std::filesystem::path& file, int64_t& repaired);
/// The files of a folder. Throws Error when it cannot be read.
std::set<std::string> file_names(const std::filesystem::path& folder);
/// "the folder holds a, b"
std::string folder_listing(const std::set<std::string>& names);
/// True when tokenize() would find something in UTF-8 `text`.
bool has_word(std::string_view text);

struct ParallelText {
  std::vector<std::string> source, target;  ///< aligned sentences
  int64_t skipped_empty = 0;                ///< pairs dropped because a side had no word
};

/// Reads `DIR/SPLIT.LANG` or else `.gz` for both languages (`train`, `val`, `test_2016_flickr`; "test" is
/// found by the prefix `test` when it is unambiguous, `val` also as `valid` or `dev`). Throws Error
/// with one sentence on missing files (lists what is there), unequal line counts, an empty corpus.
ParallelText read_parallel(const std::filesystem::path& dir, const std::string& split,
                           const std::string& source_language, const std::string& target_language);

/// Lower-cased words and punctuation marks of a sentence, by ICU's word boundaries.
/// `locale` such as "de" or "en" (used for lower-casing and word boundaries). White space, control and
/// formatting characters on their own are dropped; nothing else is. ICU's boundaries make a hyphen a
/// word of its own ("t", "-", "shirt": compounds share the vocabulary entries of their parts) and keep
/// an apostrophe or decimal point inside a word ("don't", "man's", "3.5").
std::vector<std::string> tokenize(std::string_view sentence, const std::string& locale);

/// Words with a space between.
std::string join_words(const std::vector<std::string>& words);

/// Joins words to readable text: no space before ".,!?;:)" and so on, quotes, hyphens and apostrophes
/// attached, first letter as given.
std::string detokenize(const std::vector<std::string>& words);

/// Words to numbers. Ids 0..3 are <unk>, <pad>, <s>, </s>.
class Vocabulary {
 public:
  static constexpr int64_t unknown = 0, padding = 1, begin = 2, end = 3;
  Vocabulary() = default;
  /// Words seen at least `min_frequency` times, most frequent first, ties in byte order.
  /// At most `max_words` of them, 0: no limit.
  static Vocabulary build(const std::vector<std::vector<std::string>>& sentences, int64_t min_frequency,
                          int64_t max_words = 0);
  int64_t size() const { return static_cast<int64_t>(words_.size()); }
  int64_t id(const std::string& word) const;  ///< `unknown` when absent
  const std::string& word(int64_t id) const;  ///< throws Error when out of range
  /// <s> words </s>
  std::vector<int64_t> encode(const std::vector<std::string>& words) const;
  /// Up to the first </s>; special symbols left out, <unk> kept as written.
  std::vector<std::string> decode(const std::vector<int64_t>& ids) const;
  /// One word a line, UTF-8, written atomically.
  void save(const std::filesystem::path& file) const;
  static Vocabulary load(const std::filesystem::path& file);
  bool operator==(const Vocabulary&) const;

 private:
  std::vector<std::string> words_;
  std::unordered_map<std::string, int64_t> ids_;
};

}  // namespace remnant::app
