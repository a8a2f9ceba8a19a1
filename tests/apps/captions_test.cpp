#include "common/captions.h"

#include "common/error.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace remnant::app {
namespace {

const Captions& corpus() {
  static const Captions captions = generate_captions(20000, 1);
  return captions;
}

std::vector<const ParallelText*> splits(const Captions& captions) {
  return {&captions.train, &captions.validation, &captions.test};
}

/// Words, and commas and periods as words of their own.
std::vector<std::string> split_words(const std::string& sentence) {
  std::vector<std::string> words(1);
  for (char c : sentence) {
    if (c == ' ' || c == ',' || c == '.') {
      if (!words.back().empty()) words.emplace_back();
      if (c == ' ') continue;
      words.back() = c;
      words.emplace_back();
    } else {
      words.back() += c;
    }
  }
  if (words.back().empty()) words.pop_back();
  return words;
}

std::string lowered(std::string word) {
  if (!word.empty() && word[0] >= 'A' && word[0] <= 'Z') word[0] = static_cast<char>(word[0] - 'A' + 'a');
  return word;
}

/// 64-bit FNV-1a of all sentences in order.
uint64_t fingerprint(const Captions& captions) {
  uint64_t hash = 14695981039346656037u;
  const auto add = [&](const std::string& text) {
    for (unsigned char c : text) hash = (hash ^ c) * 1099511628211u;
    hash = (hash ^ '\n') * 1099511628211u;
  };
  for (const ParallelText* split : splits(captions)) {
    for (const std::string& sentence : split->source) add(sentence);
    for (const std::string& sentence : split->target) add(sentence);
  }
  return hash;
}

bool valid_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const auto byte = [&](size_t at) { return at < text.size() ? static_cast<unsigned char>(text[at]) : 0u; };
    if (byte(i) < 0x80) {
      i += 1;
    } else if (byte(i) >= 0xC2 && byte(i) < 0xE0 && (byte(i + 1) & 0xC0) == 0x80) {
      i += 2;  // German needs no more than two bytes a letter
    } else {
      return false;
    }
  }
  return true;
}

TEST(Captions, SplitsHaveTheirSizes) {
  EXPECT_EQ(corpus().train.source.size(), 19000u);
  EXPECT_EQ(corpus().validation.source.size(), 500u);
  EXPECT_EQ(corpus().test.source.size(), 500u);
  for (const ParallelText* split : splits(corpus())) EXPECT_EQ(split->source.size(), split->target.size());
  const Captions smallest = generate_captions(3);
  EXPECT_EQ(smallest.train.source.size(), 1u);
  EXPECT_EQ(smallest.validation.source.size(), 1u);
  EXPECT_EQ(smallest.test.source.size(), 1u);
  const Captions odd = generate_captions(997);
  EXPECT_EQ(odd.train.source.size() + odd.validation.source.size() + odd.test.source.size(), 997u);
}

TEST(Captions, RefusesNumbersOutOfRange) {
  for (int64_t pairs : {int64_t{-5}, int64_t{0}, int64_t{2}, int64_t{500001}, INT64_MAX, INT64_MIN}) {
    EXPECT_THROW(generate_captions(pairs), Error) << pairs;
  }
  try {
    generate_captions(0);
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("500000"), std::string::npos) << error.what();
  }
}

TEST(Captions, DependsOnNothingButTheSeed) {
  const Captions once = generate_captions(2000, 7);
  EXPECT_EQ(fingerprint(once), fingerprint(generate_captions(2000, 7)));
  EXPECT_NE(fingerprint(once), fingerprint(generate_captions(2000, 8)));
  // The same on every platform; changes only with the grammar or its words.
  EXPECT_EQ(fingerprint(once), 13921812448182379714u);
}

TEST(Captions, EverySentenceAppearsOnce) {
  std::unordered_set<std::string> german, english;
  for (const ParallelText* split : splits(corpus())) {
    for (size_t i = 0; i < split->source.size(); ++i) {
      EXPECT_TRUE(german.insert(lowered(split->source[i])).second) << split->source[i];
      EXPECT_TRUE(english.insert(lowered(split->target[i])).second) << split->target[i];
    }
  }
}

TEST(Captions, SentencesAreWellFormed) {
  for (const ParallelText* split : splits(corpus())) {
    for (const auto* side : {&split->source, &split->target}) {
      for (const std::string& sentence : *side) {
        ASSERT_TRUE(valid_utf8(sentence)) << sentence;
        ASSERT_EQ(sentence.find("  "), std::string::npos) << sentence;
        ASSERT_EQ(sentence.find(" ,"), std::string::npos) << sentence;
        ASSERT_EQ(sentence.find(",,"), std::string::npos) << sentence;
        ASSERT_EQ(sentence.find(",."), std::string::npos) << sentence;
        ASSERT_EQ(sentence.find('.'), sentence.size() - 1) << sentence;
        // A capital: ASCII, or an umlaut (0xC3 and less than 0x9F).
        const unsigned char first = static_cast<unsigned char>(sentence[0]);
        ASSERT_TRUE((first >= 'A' && first <= 'Z') ||
                    (first == 0xC3 && static_cast<unsigned char>(sentence[1]) < 0x9F))
            << sentence;
        size_t words = 0;
        for (const std::string& word : split_words(sentence)) words += word != "," && word != ".";
        ASSERT_GE(words, 5u) << sentence;
        ASSERT_LE(words, 25u) << sentence;
      }
    }
  }
}

TEST(Captions, LengthsAreLikeCaptions) {
  double german = 0, english = 0;
  for (const std::string& sentence : corpus().train.source) german += split_words(sentence).size();
  for (const std::string& sentence : corpus().train.target) english += split_words(sentence).size();
  const double n = corpus().train.source.size();
  EXPECT_GT(german / n, 10);
  EXPECT_LT(german / n, 15);
  EXPECT_GT(english / n, 10);
  EXPECT_LT(english / n, 15);
}

TEST(Captions, TrainingHasTheWordsOfTheTest) {
  const auto check = [](const std::vector<std::string>& train, const std::vector<std::string>& test,
                        size_t fewest, size_t most) {
    std::unordered_map<std::string, int> counts;
    for (const std::string& sentence : train)
      for (const std::string& word : split_words(sentence)) ++counts[lowered(word)];
    EXPECT_GT(counts.size(), fewest);
    EXPECT_LT(counts.size(), most);
    size_t known = 0, total = 0;
    for (const std::string& sentence : test) {
      for (const std::string& word : split_words(sentence)) {
        const auto found = counts.find(lowered(word));
        known += found != counts.end() && found->second >= 2;
        ++total;
      }
    }
    EXPECT_GT(static_cast<double>(known) / static_cast<double>(total), 0.99);
  };
  check(corpus().train.source, corpus().test.source, 1200, 4000);
  check(corpus().train.target, corpus().test.target, 700, 3000);
}

/// Frequent adjectives with frequent nouns: all combinations would be in training, were none kept out.
TEST(Captions, HeldOutSplitsHaveNewCombinations) {
  const std::set<std::string> nouns = {"man", "woman", "boy", "girl", "child"};
  const std::set<std::string> adjectives = {
      "happy",  "sad",    "cheerful", "friendly", "tired", "laughing", "smiling", "serious", "elegant",
      "strong", "hungry", "wet",      "curious",  "thin",  "blond",    "little",  "tall"};
  const auto combinations = [&](const ParallelText& split) {
    std::set<std::pair<std::string, std::string>> found;
    for (const std::string& sentence : split.target) {
      const std::vector<std::string> words = split_words(sentence);
      for (size_t i = 1; i < words.size(); ++i)
        if (adjectives.count(words[i - 1]) && nouns.count(words[i])) found.emplace(words[i - 1], words[i]);
    }
    return found;
  };
  const auto trained = combinations(corpus().train);
  EXPECT_GT(trained.size(), 60u);
  size_t novel = 0;
  for (const auto& combination : combinations(corpus().test)) novel += !trained.count(combination);
  EXPECT_GE(novel, 3u);
}

struct Phenomenon {
  const char* what;
  const char* german;   ///< a part of the sentence
  const char* english;  ///< of its translation
  int least;
};

TEST(Captions, HaveThePhenomena) {
  const std::vector<Phenomenon> phenomena = {
      {"place in front inverts", "Im ", "In the ", 50},
      {"time in front inverts", "Am Montag ", "On Monday, ", 20},
      {"two-way preposition, place", " im Garten", " in the garden", 20},
      {"two-way preposition, motion", " in den Garten", " into the garden", 2},
      {"contraction ins", " ins ", " into the ", 20},
      {"contraction am", " am See", " by the lake", 10},
      {"contraction zum", " zum ", " to the ", 20},
      {"contraction zur", " zur ", " to the ", 10},
      {"contraction vom", " vom ", " by the ", 10},
      {"acc. place of putting", " auf den Boden", " on the floor", 3},
      {"dat. place of lying", "Auf dem Boden liegt", "There is ", 2},
      {"separable", " hebt ", " picking up ", 20},
      {"separable at the end", " zu.", " is watching ", 5},
      {"separable joined at the end", "aufhebt", " picking up ", 2},
      {"zu inside a separable verb", "anzuziehen", "to put on", 2},
      {"zu infinitive", ", um ", " to ", 100},
      {"verb last after weil", ", weil es regnet.", " because it is raining.", 20},
      {"verb last after während", ", während ", " while ", 200},
      {"verb last after dass", ", dass ", " that ", 200},
      {"relative nominative", ", der ", " who is ", 50},
      {"relative accusative", ", den ", " whom ", 5},
      {"relative dative", ", auf der ", " on which ", 10},
      {"relative genitive", ", deren ", " whose ", 20},
      {"reflexive verb", " lehnt sich ", " is leaning ", 10},
      {"reflexive for a possessive, his", " sich die Hände", " his hands", 3},
      {"reflexive for a possessive, her", " sich die Hände", " her hands", 3},
      {"reflexive for a possessive, their", " sich die Hände", " their hands", 3},
      {"modal", " will ", " wants to ", 50},
      {"passive", " wird ", " being ", 100},
      {"genitive", " des Mannes ", " of the man ", 2},
      {"partitive", "Eine der Frauen ", "One of the women ", 1},
      {"weak noun", " einem Jungen", " a boy", 5},
      {"adjectival noun, mixed", "in Erwachsener", "n adult", 5},
      {"adjectival noun, weak", "er Erwachsene ", " adult ", 2},
      {"dative plural", " mit den ", " with the ", 2},
      {"numbers", "Zwei ", "Two ", 100},
      {"number to ten", "zehn ", "ten ", 5},
      {"group with a singular verb", "Eine Gruppe von ", "A group of ", 50},
      {"conjunction with a plural verb", " und ein ", " are ", 50},
      {"negated object", " keine ", " not ", 50},
      {"negated verb", " nicht", " is not ", 50},
      {"no such thing", " kein", "There is no ", 10},
      {"comparative", " ist größer als ", " is bigger than ", 3},
      {"groß of a person", " ist größer als ", " is taller than ", 3},
      {"possessive his", " seinen ", " his ", 20},
      {"possessive her by a neuter owner", "Mädchen ", " her ", 20},
      {"possessive its", " sein", " its ", 20},
      {"ihr as her", " ihre", " her ", 20},
      {"ihr as their", " ihre", " their ", 20},
      {"object pronoun", " und gibt ihn ", " and giving it to ", 2},
      {"compound", "Fußballspieler ", "soccer player", 20},
      {"compound, feminine", "Fußballspielerin ", "female soccer player ", 10},
      {"clothes", " in einem roten ", " in a red ", 5},
      {"plural only in English", "e Hose", " pants", 20},
      {"no ending", " lila ", " purple ", 20},
      {"stem without e", " dunklen ", " dark ", 10},
      {"mass noun with a strong ending", " kalte", " cold ", 10},
      {"hair", " mit langen Haaren", " with long hair", 5},
      {"trägt as wear", " trägt ", " is wearing ", 50},
      {"trägt as carry", " trägt ", " is carrying ", 50},
      {"fährt as drive", " fährt ", " is driving ", 10},
      {"fährt as ride", " fährt ", " is riding ", 10},
      {"put, upright", " stellt ", " is putting ", 20},
      {"put, flat", " legt ", " is putting ", 20},
      {"Bank to sit on", " auf einer Bank", " on a bench", 5},
      {"Bank to enter", " in einer Bank", " in a bank", 2},
      {"eating by people", " isst ", " is eating ", 20},
      {"eating by animals", " frisst ", " is eating ", 20},
      {"bare object last", " Fußball.", " playing soccer ", 5},
  };
  for (const Phenomenon& phenomenon : phenomena) {
    int count = 0;
    const ParallelText& train = corpus().train;
    for (size_t i = 0; i < train.source.size(); ++i)
      count += train.source[i].find(phenomenon.german) != std::string::npos &&
               train.target[i].find(phenomenon.english) != std::string::npos;
    EXPECT_GE(count, phenomenon.least) << phenomenon.what << ": " << phenomenon.german;
  }
}

/// Articles that a singular noun of a gender may follow, and the ending of an adjective between.
const std::map<std::string, std::string>& adjective_endings(char gender) {
  static const std::map<std::string, std::string> masculine = {
      {"ein", "er"},    {"einen", "en"}, {"einem", "en"}, {"eines", "en"},  {"der", "e"},    {"den", "en"},
      {"dem", "en"},    {"des", "en"},   {"kein", "er"},  {"keinen", "en"}, {"sein", "er"},  {"seinen", "en"},
      {"seinem", "en"}, {"ihr", "er"},   {"ihren", "en"}, {"ihrem", "en"},  {"im", "en"},    {"am", "en"},
      {"zum", "en"},    {"vom", "en"},   {"dieser", "e"}, {"diesen", "en"}, {"diesem", "en"}};
  static const std::map<std::string, std::string> feminine = {
      {"eine", "e"},    {"einer", "en"}, {"die", "e"},    {"der", "en"}, {"keine", "e"}, {"seine", "e"},
      {"seiner", "en"}, {"ihre", "e"},   {"ihrer", "en"}, {"zur", "en"}, {"diese", "e"}, {"dieser", "en"}};
  static const std::map<std::string, std::string> neuter = {
      {"ein", "es"},  {"einem", "en"}, {"eines", "en"},  {"das", "e"},  {"dem", "en"},   {"des", "en"},
      {"kein", "es"}, {"sein", "es"},  {"seinem", "en"}, {"ihr", "es"}, {"ihrem", "en"}, {"im", "en"},
      {"am", "en"},   {"zum", "en"},   {"vom", "en"},    {"ins", "e"},  {"dieses", "e"}, {"diesem", "en"}};
  return gender == 'm' ? masculine : gender == 'f' ? feminine : neuter;
}

/// Nouns whose form tells that they are singular.
const std::map<std::string, char>& singular_nouns() {
  static const std::map<std::string, char> nouns = {{"Mann", 'm'},
                                                    {"Hund", 'm'},
                                                    {"Vogel", 'm'},
                                                    {"Vater", 'm'},
                                                    {"Bruder", 'm'},
                                                    {"Baum", 'm'},
                                                    {"Tisch", 'm'},
                                                    {"Stuhl", 'm'},
                                                    {"Ball", 'm'},
                                                    {"Hut", 'm'},
                                                    {"Mantel", 'm'},
                                                    {"Park", 'm'},
                                                    {"Garten", 'm'},
                                                    {"Wald", 'm'},
                                                    {"Strand", 'm'},
                                                    {"See", 'm'},
                                                    {"Apfel", 'm'},
                                                    {"Zaun", 'm'},
                                                    {"Turm", 'm'},
                                                    {"Schuhladen", 'm'},
                                                    {"Frau", 'f'},
                                                    {"Katze", 'f'},
                                                    {"Mutter", 'f'},
                                                    {"Schwester", 'f'},
                                                    {"Jacke", 'f'},
                                                    {"Bluse", 'f'},
                                                    {"Hose", 'f'},
                                                    {"Mütze", 'f'},
                                                    {"Küche", 'f'},
                                                    {"Straße", 'f'},
                                                    {"Kirche", 'f'},
                                                    {"Schule", 'f'},
                                                    {"Brücke", 'f'},
                                                    {"Wiese", 'f'},
                                                    {"Blume", 'f'},
                                                    {"Vase", 'f'},
                                                    {"Tennisspielerin", 'f'},
                                                    {"Kind", 'n'},
                                                    {"Pferd", 'n'},
                                                    {"Haus", 'n'},
                                                    {"Hemd", 'n'},
                                                    {"Kleid", 'n'},
                                                    {"Auto", 'n'},
                                                    {"Fahrrad", 'n'},
                                                    {"Boot", 'n'},
                                                    {"Buch", 'n'},
                                                    {"Bild", 'n'},
                                                    {"Büro", 'n'},
                                                    {"Dorf", 'n'},
                                                    {"Sofa", 'n'},
                                                    {"Schloss", 'n'},
                                                    {"Abendkleid", 'n'}};
  return nouns;
}

bool is_capital(const std::string& word) {
  const unsigned char first = static_cast<unsigned char>(word[0]);
  return (first >= 'A' && first <= 'Z') || (first == 0xC3 && static_cast<unsigned char>(word[1]) < 0x9F);
}

TEST(Captions, ArticlesAndAdjectivesAgreeWithTheNoun) {
  static const std::set<std::string> articles = {
      "ein",    "eine",   "einen", "einem", "einer",  "eines",  "der",    "die",    "das",
      "den",    "dem",    "des",   "kein",  "keine",  "keinen", "sein",   "seine",  "seinen",
      "seinem", "seiner", "ihr",   "ihre",  "ihren",  "ihrem",  "ihrer",  "im",     "am",
      "zum",    "zur",    "vom",   "ins",   "dieser", "diese",  "dieses", "diesen", "diesem"};
  size_t plain = 0, with_adjective = 0;
  std::set<std::string> seen;
  for (const ParallelText* split : splits(corpus())) {
    for (const std::string& sentence : split->source) {
      const std::vector<std::string> words = split_words(sentence);
      for (size_t i = 1; i < words.size(); ++i) {
        const auto noun = singular_nouns().find(words[i]);
        if (noun == singular_nouns().end()) continue;
        size_t first = i;
        while (first > 1 && !articles.count(lowered(words[first - 1])) && !is_capital(words[first - 1]) &&
               i - first < 2)
          --first;
        const std::string article = lowered(words[first - 1]);
        if (!articles.count(article)) continue;              // "dessen kleiner Hund"
        if (first > 1 && words[first - 2] == ",") continue;  // "eine Frau, die Fahrrad fährt"
        const auto& table = adjective_endings(noun->second);
        const auto rule = table.find(article);
        ASSERT_NE(rule, table.end()) << article << " ... " << words[i] << ": " << sentence;
        ++plain;
        for (size_t j = first; j < i; ++j) {
          const std::string& adjective = words[j];
          if (adjective == "rosa" || adjective == "lila") continue;
          const std::string& ending = rule->second;
          ASSERT_TRUE(adjective.ends_with(ending)) << adjective << " " << words[i] << ": " << sentence;
          ++with_adjective;
          seen.insert(article + "-" + ending + noun->second);
        }
      }
    }
  }
  EXPECT_GT(plain, 5000u);
  EXPECT_GT(with_adjective, 2000u);
  EXPECT_GT(seen.size(), 35u);
}

TEST(Captions, HaveNoImpossibleSequence) {
  const std::vector<const char*> impossible = {"ein rote ",
                                               "ein kleine ",
                                               "dem rot ",
                                               "eine roter ",
                                               "der kleine Mädchen",
                                               "das Frau ",
                                               "die Mann ",
                                               "den Mädchen mit einen",
                                               " mit die ",
                                               " mit den Mann",
                                               " mit einen ",
                                               " mit eine ",
                                               " von einen ",
                                               " von die ",
                                               " durch dem ",
                                               " durch einem ",
                                               " durch der ",
                                               " über dem ",
                                               " zu dem ",
                                               " zu der ",
                                               " in dem ",
                                               " in das ",
                                               " an dem ",
                                               " an das ",
                                               " sich sich ",
                                               "weil sich er ",
                                               "weil sich sie ",
                                               " ein Kinder ",
                                               " zwei Kind ",
                                               " drei Hund ",
                                               " des Mann ",
                                               " eines Kind ",
                                               "Jungens",
                                               " einem Junge ",
                                               " einen Junge ",
                                               "Jungenn",
                                               "hohe hoh",
                                               "rosae",
                                               "lilaen",
                                               "dunkelen",
                                               "teueren",
                                               " zu aus",
                                               " zu auf",
                                               "zuan",
                                               " nicht kein",
                                               "Buses",
                                               " sein Frau ",
                                               " ihr Schwester "};
  const std::vector<const char*> english = {
      " a apple", " a old ", " a empty ",   " a elegant ", " a umbrella", " an man ",   " an red ",
      "childs",   "mans ",   "womans ",     " a pants",    " an uniform", " two pants", " is are ",
      " are is ", "peoples", " a children", " mouses ",    " not not "};
  for (const ParallelText* split : splits(corpus())) {
    for (const std::string& sentence : split->source) {
      // "in dem" is right before a verb of a relative clause.
      const bool relative =
          sentence.find(", in dem ") != std::string::npos || sentence.find(", in das ") != std::string::npos;
      for (const char* wrong : impossible) {
        if (relative && std::string_view(wrong).starts_with(" in d")) continue;
        ASSERT_EQ(sentence.find(wrong), std::string::npos) << wrong << ": " << sentence;
      }
    }
    for (const std::string& sentence : split->target)
      for (const char* wrong : english)
        ASSERT_EQ(sentence.find(wrong), std::string::npos) << wrong << ": " << sentence;
  }
}

TEST(Captions, SubordinateClausesEndWithTheVerb) {
  size_t clauses = 0;
  for (const std::string& sentence : corpus().train.source) {
    if (sentence.find(", dass ") == std::string::npos) continue;
    const std::vector<std::string> words = split_words(sentence);
    const std::string& last = words[words.size() - 2];
    ASSERT_FALSE(is_capital(last)) << sentence;
    ASSERT_TRUE(last.ends_with("t") || last.ends_with("n")) << sentence;
    ++clauses;
  }
  EXPECT_GT(clauses, 200u);
}

/// "das Kind, das das Mädchen umarmt" could mean either; it must always mean that the child hugs.
TEST(Captions, ARelativeClauseThatCouldMeanEitherHasTheSubjectFirst) {
  size_t subject_first = 0;
  for (size_t i = 0; i < corpus().train.source.size(); ++i) {
    const std::string& sentence = corpus().train.source[i];
    for (const char* opening : {", das das ", ", das ein Mädchen ", ", das ein Kind "}) {
      if (sentence.find(opening) == std::string::npos) continue;
      // A plural clause verb after a singular head settles it.
      const size_t comma = sentence.find(',', sentence.find(opening) + 1);
      if (comma != std::string::npos && sentence[comma - 1] == 'n') continue;
      subject_first += corpus().train.target[i].find(" whom ") == std::string::npos;
      EXPECT_EQ(corpus().train.target[i].find(" whom "), std::string::npos) << sentence;
    }
  }
  EXPECT_GE(subject_first, 3u);
}

TEST(Captions, TheVerbFollowsAFrontedPhrase) {
  size_t fronted = 0;
  for (size_t i = 0; i < corpus().train.source.size(); ++i) {
    const std::string& sentence = corpus().train.source[i];
    if (!sentence.starts_with("Am Montag ") && !sentence.starts_with("Im Winter ")) continue;
    const std::string verb = split_words(sentence)[2];
    ASSERT_FALSE(is_capital(verb)) << sentence;
    ASSERT_TRUE(verb.ends_with("t") || verb.ends_with("n")) << sentence;
    ASSERT_NE(verb, "ein") << sentence;
    // In English the subject follows the comma.
    ASSERT_NE(corpus().train.target[i].find(','), std::string::npos);
    ++fronted;
  }
  EXPECT_GT(fronted, 30u);
}

TEST(Captions, NumberAgreesInBothLanguages) {
  size_t checked = 0;
  for (size_t i = 0; i < corpus().train.source.size(); ++i) {
    const std::vector<std::string> german = split_words(corpus().train.source[i]);
    const std::vector<std::string> english = split_words(corpus().train.target[i]);
    static const std::set<std::string> plurals = {"Zwei", "Drei", "Vier", "Mehrere", "Viele", "Einige"};
    // The simplest shape: number, noun, verb.
    if (plurals.count(german[0]) && is_capital(german[1]) && english.size() > 2 && german[2] != "," &&
        !is_capital(german[2])) {
      if (german[2] == "in" || german[2] == "mit" || german[2] == "auf") continue;
      static const std::set<std::string> prepositions = {"im", "am", "an", "vor", "hinter", "neben"};
      if (prepositions.count(german[2])) continue;
      ASSERT_TRUE(german[2].ends_with("n") || german[2] == "sind") << corpus().train.source[i];
      ++checked;
    }
    if (german[0] == "Ein" && german[1] == "Mann" && (german[2] == "trägt" || german[2] == "wartet")) {
      ASSERT_EQ(english[2], "is") << corpus().train.target[i];
      ++checked;
    }
  }
  EXPECT_GT(checked, 200u);
}

}  // namespace
}  // namespace remnant::app
