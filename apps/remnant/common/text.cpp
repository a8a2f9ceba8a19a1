#include "text.h"

#include "error.h"
#include "run_folder.h"

#include <unicode/brkiter.h>
#include <unicode/locid.h>
#include <unicode/uchar.h>
#include <unicode/unistr.h>
#include <unicode/utf8.h>
#include <zlib.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>

namespace remnant::app {
namespace fs = std::filesystem;
namespace {

constexpr std::array<const char*, 4> special_words = {"<unk>", "<pad>", "<s>", "</s>"};

std::string quoted(const fs::path& file) { return "'" + file.string() + "'"; }

std::string joined(const std::set<std::string>& names) {
  std::string list;
  for (const std::string& name : names) list += (list.empty() ? "" : ", ") + name;
  return list;
}

// ---- Files ----

std::string read_bytes(const fs::path& file) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> stream(std::fopen(file.c_str(), "rb"), &std::fclose);
  if (!stream) throw Error("cannot open " + quoted(file) + ": " + std::strerror(errno));
  std::string content;
  std::vector<char> buffer(size_t{1} << 18);
  while (const size_t count = std::fread(buffer.data(), 1, buffer.size(), stream.get())) {
    content.append(buffer.data(), count);
  }
  if (std::ferror(stream.get())) throw Error("cannot read " + quoted(file) + ": " + std::strerror(errno));
  return content;
}

bool is_gzip(const std::string& content) {
  return content.size() >= 2 && content[0] == '\x1f' && content[1] == '\x8b';
}

// One or more gzip members, as `cat a.gz b.gz` makes them; zlib checks each one's length and CRC.
std::string gunzip(const std::string& packed, const fs::path& file) {
  z_stream stream{};
  constexpr int gzip_only = 15 + 16;
  if (inflateInit2(&stream, gzip_only) != Z_OK) throw Error("cannot unpack " + quoted(file) + ": no memory");
  const std::unique_ptr<z_stream, int (*)(z_stream*)> cleanup(&stream, &inflateEnd);

  std::string content;
  std::vector<char> buffer(size_t{1} << 18);
  size_t given = 0;
  while (true) {
    if (stream.avail_in == 0) {
      // zlib counts in 32 bits.
      const size_t portion = std::min<size_t>(packed.size() - given, size_t{1} << 30);
      stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(packed.data())) + given;
      stream.avail_in = static_cast<uInt>(portion);
      given += portion;
    }
    stream.next_out = reinterpret_cast<Bytef*>(buffer.data());
    stream.avail_out = static_cast<uInt>(buffer.size());
    const int status = inflate(&stream, Z_NO_FLUSH);
    content.append(buffer.data(), buffer.size() - stream.avail_out);
    if (status == Z_STREAM_END) {
      const size_t used = given - stream.avail_in;
      // Some writers pad with zeros up to a block size.
      if (packed.find_first_not_of('\0', used) == std::string::npos) return content;
      inflateReset(&stream);
    } else if (status == Z_BUF_ERROR) {
      throw Error(quoted(file) + " is a truncated gzip file (" + std::to_string(packed.size()) +
                  " bytes); copy or download it again");
    } else if (status != Z_OK) {
      throw Error(quoted(file) + " is a damaged gzip file (" +
                  (stream.msg ? stream.msg : "it cannot be unpacked") + "); copy or download it again");
    }
  }
}

// White space, control and formatting characters. Code points that this ICU does not know yet (new
// emoji, say) are text.
bool is_blank(UChar32 c) { return (U_GET_GC_MASK(c) & (U_GC_Z_MASK | U_GC_CC_MASK | U_GC_CF_MASK)) != 0; }

std::string unpacked_bytes(const fs::path& file) {
  std::string content = read_unpacked(file);
  if (content.starts_with("\xef\xbb\xbf")) content.erase(0, 3);
  return content;
}

std::vector<std::string_view> lines_of(std::string_view rest) {
  std::vector<std::string_view> lines;
  while (!rest.empty()) {
    const size_t newline = rest.find('\n');
    std::string_view line = rest.substr(0, newline);
    rest.remove_prefix(newline == std::string_view::npos ? rest.size() : newline + 1);
    if (line.ends_with('\r')) line.remove_suffix(1);
    lines.push_back(line);
  }
  return lines;
}

[[noreturn]] void throw_not_utf8(const fs::path& file, int64_t line) {
  throw Error("line " + std::to_string(line) + " of " + quoted(file) +
              " is not valid UTF-8; convert the file to UTF-8 (for example with iconv)");
}

icu::UnicodeString unicode(std::string_view text) {
  return icu::UnicodeString::fromUTF8(icu::StringPiece(text.data(), static_cast<int32_t>(text.size())));
}

/// With U+FFFD for what is not UTF-8.
std::string repaired_utf8(std::string_view text) {
  std::string repaired;
  return unicode(text).toUTF8String(repaired);
}

// ---- A corpus folder ----

// `stem.language`, or else its gzip form.
std::optional<std::string> find_side(const std::set<std::string>& names, const std::string& stem,
                                     const std::string& language) {
  for (const char* ending : {"", ".gz"}) {
    const std::string name = stem + "." + language + ending;
    if (names.count(name)) return name;
  }
  return std::nullopt;
}

// Stems that begin with "test" and exist in both languages.
std::set<std::string> test_stems(const std::set<std::string>& names, const std::string& source,
                                 const std::string& target) {
  std::set<std::string> stems;
  for (const std::string& name : names) {
    if (!name.starts_with("test")) continue;
    for (const std::string& ending : {"." + source, "." + source + ".gz"}) {
      if (!name.ends_with(ending)) continue;
      const std::string stem = name.substr(0, name.size() - ending.size());
      if (find_side(names, stem, target)) stems.insert(stem);
    }
  }
  return stems;
}

std::pair<fs::path, fs::path> find_pair(const fs::path& dir, const std::string& split,
                                        const std::string& source, const std::string& target) {
  const std::set<std::string> names = file_names(dir);
  std::vector<std::string> stems = {split};
  if (split == "val") stems = {"val", "valid", "dev"};
  for (const std::string& stem : stems) {
    const auto source_name = find_side(names, stem, source), target_name = find_side(names, stem, target);
    if (source_name && target_name) return {dir / *source_name, dir / *target_name};
  }
  if (split == "test") {
    const std::set<std::string> found = test_stems(names, source, target);
    if (found.size() > 1) {
      throw Error("the split 'test' could be any of " + joined(found) + " in " + quoted(dir) +
                  "; name the one you mean");
    }
    if (found.size() == 1) {
      return {dir / *find_side(names, *found.begin(), source),
              dir / *find_side(names, *found.begin(), target)};
    }
  }

  std::string missing;
  for (const std::string& language : {source, target}) {
    if (find_side(names, split, language)) continue;
    if (!missing.empty()) missing += " and ";
    missing += "'" + split + "." + language + "' (or .gz)";
    if (source == target) break;
  }
  throw Error("no " + missing + " in " + quoted(dir) + "; " + folder_listing(names));
}

// ---- Words ----

// Making a break iterator loads ICU's rules, far slower than splitting a sentence with it.
struct WordBreaker {
  icu::Locale locale;
  icu::UnicodeString text;  // the iterator points into it, so it lives as long
  std::unique_ptr<icu::BreakIterator> boundaries;
};

WordBreaker& word_breaker(const std::string& locale) {
  thread_local std::map<std::string, WordBreaker> breakers;
  const auto found = breakers.find(locale);
  if (found != breakers.end()) return found->second;

  WordBreaker breaker;
  breaker.locale = icu::Locale::createCanonical(locale.c_str());
  UErrorCode status = U_ZERO_ERROR;
  breaker.boundaries.reset(icu::BreakIterator::createWordInstance(breaker.locale, status));
  if (U_FAILURE(status) || !breaker.boundaries) {
    throw Error("cannot find word boundaries for the language '" + locale + "': " + u_errorName(status));
  }
  return breakers.emplace(locale, std::move(breaker)).first->second;
}

bool is_one_of(std::string_view word, std::initializer_list<std::string_view> set) {
  return std::find(set.begin(), set.end(), word) != set.end();
}

bool starts_with_digit(std::string_view word) { return !word.empty() && word[0] >= '0' && word[0] <= '9'; }

bool ends_with_digit(std::string_view word) {
  return !word.empty() && word.back() >= '0' && word.back() <= '9';
}

}  // namespace

bool is_utf8(std::string_view text) {
  const char* bytes = text.data();
  for (size_t i = 0; i < text.size();) {
    if (static_cast<unsigned char>(bytes[i]) < 0x80) {
      ++i;
      continue;
    }
    UChar32 c = 0;
    U8_NEXT(bytes, i, text.size(), c);
    if (c < 0) return false;
  }
  return true;
}

int64_t characters(std::string_view text) {
  return std::count_if(text.begin(), text.end(),
                       [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; });
}

std::string printable_utf8(std::string_view text) {
  const icu::UnicodeString read = unicode(text);
  icu::UnicodeString shown;
  for (int32_t i = 0; i < read.length(); i = read.moveIndex32(i, 1)) {
    const UChar32 c = read.char32At(i);
    const bool control = u_charType(c) == U_CONTROL_CHAR && c != '\t' && c != '\n' && c != '\r';
    shown.append(control ? UChar32{0xfffd} : c);
  }
  std::string result;
  return shown.toUTF8String(result);
}

std::string fingerprint(std::string_view bytes) {
  uint64_t hash = 14695981039346656037u;
  for (const char c : bytes) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

std::string read_unpacked(const fs::path& file) {
  std::string content = read_bytes(file);
  return is_gzip(content) ? gunzip(content, file) : content;
}

std::string read_text(const fs::path& file) {
  std::string content = unpacked_bytes(file);
  if (is_utf8(content)) return content;
  int64_t line = 1;
  for (const std::string_view each : lines_of(content)) {
    if (!is_utf8(each)) break;
    ++line;
  }
  throw_not_utf8(file, line);
}

std::vector<std::string> read_lines(const fs::path& file) {
  const std::string content = read_text(file);
  const std::vector<std::string_view> lines = lines_of(content);
  return {lines.begin(), lines.end()};
}

std::vector<std::string> read_damaged_lines(const fs::path& file, int64_t& repaired) {
  constexpr int64_t kSound = 1000;
  const std::string content = unpacked_bytes(file);
  const std::vector<std::string_view> found = lines_of(content);
  std::vector<std::string> lines;
  int64_t allowed = static_cast<int64_t>(found.size()) / kSound;
  for (const std::string_view line : found) {
    if (is_utf8(line)) {
      lines.emplace_back(line);
      continue;
    }
    if (allowed-- == 0) throw_not_utf8(file, static_cast<int64_t>(lines.size()) + 1);
    lines.push_back(repaired_utf8(line));
    ++repaired;
  }
  return lines;
}

bool has_word(std::string_view sentence) {
  for (size_t i = 0; i < sentence.size();) {
    UChar32 c = 0;
    U8_NEXT(sentence.data(), i, sentence.size(), c);
    if (c < 0 || !is_blank(c)) return true;
  }
  return false;
}

std::set<std::string> file_names(const fs::path& dir) {
  std::error_code error;
  std::set<std::string> names;
  for (fs::directory_iterator entry(dir, error), last; !error && entry != last; entry.increment(error)) {
    std::error_code ignored;  // a broken link is simply not a file
    if (entry->is_regular_file(ignored)) names.insert(entry->path().filename().string());
  }
  if (error) throw Error("cannot read the data folder " + quoted(dir) + ": " + error.message());
  return names;
}

std::string folder_listing(const std::set<std::string>& names) {
  return names.empty() ? "the folder holds no files" : "the folder holds " + joined(names);
}

ParallelText read_parallel(const fs::path& dir, const std::string& split, const std::string& source_language,
                           const std::string& target_language) {
  const auto [source_file, target_file] = find_pair(dir, split, source_language, target_language);
  std::vector<std::string> source = read_lines(source_file), target = read_lines(target_file);
  if (source.size() != target.size()) {
    throw Error(quoted(source_file) + " has " + std::to_string(source.size()) + " lines but " +
                quoted(target_file) + " has " + std::to_string(target.size()) +
                "; line i of one must be the translation of line i of the other");
  }

  ParallelText text;
  for (size_t i = 0; i < source.size(); ++i) {
    if (has_word(source[i]) && has_word(target[i])) {
      text.source.push_back(std::move(source[i]));
      text.target.push_back(std::move(target[i]));
    } else {
      ++text.skipped_empty;
    }
  }
  if (text.source.empty()) {
    throw Error(quoted(source_file) + " and " + quoted(target_file) + " hold no sentence pair (" +
                std::to_string(text.skipped_empty) + " lines, each empty on at least one side)");
  }
  return text;
}

std::vector<std::string> tokenize(std::string_view sentence, const std::string& locale) {
  WordBreaker& breaker = word_breaker(locale);
  icu::UnicodeString& text = breaker.text;
  text = unicode(sentence);
  text.toLower(breaker.locale);
  breaker.boundaries->setText(text);

  std::vector<std::string> words;
  int32_t start = breaker.boundaries->first();
  for (int32_t end = breaker.boundaries->next(); end != icu::BreakIterator::DONE;
       start = end, end = breaker.boundaries->next()) {
    // A combining mark after a space belongs to the space's piece; the mark is text, the space is not.
    while (start < end && is_blank(text.char32At(start))) start = text.moveIndex32(start, 1);
    if (start < end) text.tempSubStringBetween(start, end).toUTF8String(words.emplace_back());
  }
  return words;
}

std::string join_words(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) {
    if (!text.empty()) text += ' ';
    text += word;
  }
  return text;
}

std::string detokenize(const std::vector<std::string>& words) {
  std::string text;
  bool attach = true;  // no space before the next word
  bool in_quotes = false, in_single_quotes = false;
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    const bool first = i == 0, last = i + 1 == words.size();
    const std::string_view previous = first ? std::string_view() : words[i - 1];
    const std::string_view next = last ? std::string_view() : words[i + 1];
    bool to_left = false, to_right = false;

    if (is_one_of(word, {".", ",", ";", "!", "?", "…", "%", ")", "]", "}"})) {
      to_left = true;
    } else if (is_one_of(word, {"(", "[", "{", "¿", "¡", "#"})) {
      to_right = true;
    } else if (is_one_of(word, {"$", "£", "€"})) {
      to_right = starts_with_digit(next);
    } else if (word == ":") {
      to_left = true;
      to_right = ends_with_digit(previous) && starts_with_digit(next);
    } else if (word == "/") {
      to_left = to_right = true;
    } else if (word == "-") {
      // "T-Shirt", but "Obst- und Gemüsestand"; "black-and-white" has its second hyphen.
      const bool shares_ending =
          is_one_of(next, {"und", "oder", "and", "or"}) && (i + 2 >= words.size() || words[i + 2] != "-");
      to_left = true;
      to_right = !shares_ending;
    } else if (is_one_of(word, {"\"", "„", "“", "”", "«", "»"})) {
      // The same mark opens in one language and closes in another („so“, “so”), hence the state.
      const bool opens = word == "„" || (!in_quotes && word != "”" && !last);
      in_quotes = opens;
      (opens ? to_right : to_left) = true;
    } else if (is_one_of(word, {"'", "’"}) && !in_single_quotes &&
               is_one_of(next, {"s", "re", "ve", "ll", "d", "m"})) {
      // "they 're" and "the 80's" come apart at the apostrophe.
      to_left = to_right = true;
    } else if (is_one_of(word, {"'", "’", "‘", "‚", "`"})) {
      // Without a partner it is an apostrophe: "the boys' team".
      const bool has_partner =
          std::find(words.begin() + static_cast<std::ptrdiff_t>(i) + 1, words.end(), word) != words.end();
      const bool opens =
          !in_single_quotes && (is_one_of(word, {"‚", "‘"}) || (is_one_of(word, {"'", "`"}) && has_partner));
      in_single_quotes = opens;
      (opens ? to_right : to_left) = true;
    } else if (is_one_of(word, {"'s", "'re", "'ve", "'ll", "'d", "'m", "n't"})) {
      to_left = true;
    }

    if (!attach && !to_left && !text.empty()) text += ' ';
    text += word;
    attach = to_right;
  }
  return text;
}

// ---- Vocabulary ----

Vocabulary Vocabulary::build(const std::vector<std::vector<std::string>>& sentences, int64_t min_frequency,
                             int64_t max_words) {
  std::unordered_map<std::string, int64_t> counts;
  for (const auto& sentence : sentences) {
    for (const std::string& word : sentence) ++counts[word];
  }
  // A word spelled like a special symbol must not take part in what the symbol means.
  for (const char* special : special_words) counts.erase(special);

  std::vector<std::pair<std::string, int64_t>> frequent;
  for (const auto& entry : counts) {
    if (entry.second >= min_frequency) frequent.emplace_back(entry);
  }
  std::sort(frequent.begin(), frequent.end(), [](const auto& a, const auto& b) {
    return a.second != b.second ? a.second > b.second : a.first < b.first;
  });

  if (max_words > 0 && frequent.size() > static_cast<size_t>(max_words)) frequent.resize(max_words);

  Vocabulary vocabulary;
  vocabulary.words_.assign(special_words.begin(), special_words.end());
  for (auto& entry : frequent) vocabulary.words_.push_back(std::move(entry.first));
  for (const std::string& word : vocabulary.words_) vocabulary.ids_.emplace(word, vocabulary.ids_.size());
  return vocabulary;
}

int64_t Vocabulary::id(const std::string& word) const {
  const auto found = ids_.find(word);
  return found == ids_.end() ? unknown : found->second;
}

const std::string& Vocabulary::word(int64_t id) const {
  if (id < 0 || id >= size()) {
    throw Error("word number " + std::to_string(id) + " is outside the vocabulary of " +
                std::to_string(size()) + " words");
  }
  return words_[static_cast<size_t>(id)];
}

std::vector<int64_t> Vocabulary::encode(const std::vector<std::string>& words) const {
  std::vector<int64_t> ids;
  ids.reserve(words.size() + 2);
  ids.push_back(begin);
  for (const std::string& word : words) {
    const int64_t number = id(word);
    // A literal "</s>" in the text would otherwise end the sentence.
    ids.push_back(number > end ? number : unknown);
  }
  ids.push_back(end);
  return ids;
}

std::vector<std::string> Vocabulary::decode(const std::vector<int64_t>& ids) const {
  std::vector<std::string> words;
  for (const int64_t id : ids) {
    if (id == end) break;
    if (id == padding || id == begin) continue;
    words.push_back(word(id));
  }
  return words;
}

void Vocabulary::save(const fs::path& file) const {
  std::string content;
  for (const std::string& word : words_) {
    if (word.empty() || word.find_first_of("\r\n") != std::string::npos) {
      throw Error("cannot write the vocabulary " + quoted(file) + ": a word is empty or holds a line break");
    }
    content += word;
    content += '\n';
  }
  write_file_atomically(file, content);
}

Vocabulary Vocabulary::load(const fs::path& file) {
  Vocabulary vocabulary;
  vocabulary.words_ = read_lines(file);
  const std::vector<std::string>& words = vocabulary.words_;
  if (words.size() < special_words.size() ||
      !std::equal(special_words.begin(), special_words.end(), words.begin())) {
    throw Error(
        quoted(file) +
        " is not a vocabulary: its first four lines must be <unk>, <pad>, <s>, </s>; use the file that "
        "training wrote");
  }
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string line = "line " + std::to_string(i + 1) + " of the vocabulary " + quoted(file);
    if (words[i].empty()) throw Error(line + " is empty; every line must hold one word");
    const auto [earlier, added] = vocabulary.ids_.emplace(words[i], static_cast<int64_t>(i));
    if (!added) {
      throw Error(line + " repeats the word '" + words[i] + "' of line " +
                  std::to_string(earlier->second + 1));
    }
  }
  return vocabulary;
}

bool Vocabulary::operator==(const Vocabulary& other) const { return words_ == other.words_; }

}  // namespace remnant::app
