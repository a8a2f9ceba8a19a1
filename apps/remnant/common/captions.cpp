#include "captions.h"

#include "captions_lexicon.h"
#include "error.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <initializer_list>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace remnant::app {
namespace {

using namespace captions;

constexpr int64_t min_pairs = 3;  // one for each split
constexpr int64_t max_pairs = 500000;
constexpr int size_order = 1, age_order = 3, colour_order = 4;  // of Adjective::order
constexpr size_t min_words = 5, max_words = 25;

/// SplitMix64 and draws that do not depend on the standard library's distributions.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t below(uint64_t n) { return ((next() >> 32) * n) >> 32; }
  bool percent(uint64_t p) { return below(100) < p; }

  template <typename T>
  const T& of(const std::vector<T>& items) {
    return items[below(items.size())];
  }

  /// An index, by weight.
  size_t weighted(std::initializer_list<uint64_t> weights) {
    uint64_t total = 0;
    for (uint64_t weight : weights) total += weight;
    uint64_t left = below(total);
    size_t index = 0;
    for (uint64_t weight : weights) {
      if (left < weight) break;
      left -= weight;
      ++index;
    }
    return index;
  }

 private:
  uint64_t next() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  uint64_t state_;
};

/// The non-empty parts with a space between.
std::string words(std::initializer_list<std::string_view> parts) {
  std::string text;
  for (std::string_view part : parts) {
    if (part.empty()) continue;
    if (!text.empty()) text += ' ';
    text += part;
  }
  return text;
}

// ---------------------------------------------------------------- inflection

enum class Case { nominative, accusative, dative, genitive };

enum class Article {
  none,
  indefinite,
  definite,
  negative,
  possessive,
  number,
  several,
  many,
  some,
  all,
  both,
  demonstrative
};

/// What verbs, pronouns and possessives agree with.
struct Agreement {
  Gender gender = Gender::masculine;
  bool plural = false;
  char pronoun = 't';       ///< he, she, it, they
  bool collective = false;  ///< eine Gruppe ... ist; but "their"
  bool human = true;
  bool child = false;  ///< has no children
};

struct Text {
  std::string german, english;
};

/// A row of declension: gender (or plural, 3) by case.
using Endings = std::array<std::array<const char*, 4>, 4>;

constexpr Endings strong_endings = {
    {{"er", "en", "em", "en"}, {"e", "e", "er", "er"}, {"es", "es", "em", "en"}, {"e", "e", "en", "er"}}};
constexpr Endings weak_endings = {
    {{"e", "en", "en", "en"}, {"e", "e", "en", "en"}, {"e", "e", "en", "en"}, {"en", "en", "en", "en"}}};
constexpr Endings mixed_endings = {
    {{"er", "en", "en", "en"}, {"e", "e", "en", "en"}, {"es", "es", "en", "en"}, {"en", "en", "en", "en"}}};
constexpr Endings definite_articles = {{{"der", "den", "dem", "des"},
                                        {"die", "die", "der", "der"},
                                        {"das", "das", "dem", "des"},
                                        {"die", "die", "den", "der"}}};
constexpr Endings ein_endings = {
    {{"", "en", "em", "es"}, {"e", "e", "er", "er"}, {"", "", "em", "es"}, {"e", "e", "en", "er"}}};
constexpr Endings dieser_endings = {
    {{"er", "en", "em", "es"}, {"e", "e", "er", "er"}, {"es", "es", "em", "es"}, {"e", "e", "en", "er"}}};
constexpr Endings relative_pronouns = {{{"der", "den", "dem", "dessen"},
                                        {"die", "die", "der", "deren"},
                                        {"das", "das", "dem", "dessen"},
                                        {"die", "die", "denen", "deren"}}};

const char* decline(const Endings& endings, Gender gender, bool plural, Case in) {
  return endings[plural ? 3 : static_cast<size_t>(gender)][static_cast<size_t>(in)];
}

std::string possessive_stem(const Agreement& owner) {
  return owner.plural || owner.gender == Gender::feminine ? "ihr" : "sein";
}

std::string english_possessive(const Agreement& owner) {
  if (owner.plural || owner.collective) return "their";
  return owner.pronoun == 'h' ? "his" : owner.pronoun == 's' ? "her" : "its";
}

std::string german_pronoun(const Agreement& of, Case in) {
  if (of.plural || of.gender == Gender::feminine) return "sie";
  if (of.gender == Gender::neuter) return "es";
  return in == Case::accusative ? "ihn" : "er";
}

std::string english_pronoun(const Agreement& of, Case in) {
  const bool subject = in == Case::nominative;
  if (of.plural) return subject ? "they" : "them";
  if (of.pronoun == 'h') return subject ? "he" : "him";
  if (of.pronoun == 's') return subject ? "she" : "her";
  return "it";
}

/// -s or -es of the genitive: the longer form after a sibilant and in native monosyllables.
std::string genitive(const Noun& noun) {
  const std::string& word = noun.singular;
  if (noun.plural == word + "se") return word + "ses";  // Bus, Busse, Busses
  for (std::string_view sibilant : {"s", "ß", "z", "x", "sch"})
    if (word.ends_with(sibilant)) return word + "es";
  if (noun.plural.ends_with("s")) return word + "s";
  size_t syllables = 0;
  bool in_vowels = false;
  for (size_t i = 0; i < word.size(); ++i) {
    // An umlaut is two bytes, the first 0xC3; ß was handled above or is no vowel in mid-word.
    const bool umlaut = static_cast<unsigned char>(word[i]) == 0xC3 && word.substr(i, 2) != "ß";
    const bool vowel = umlaut || std::string_view("aeiouAEIOU").find(word[i]) != std::string_view::npos;
    if (vowel && !in_vowels) ++syllables;
    in_vowels = vowel;
    if (umlaut) ++i;
  }
  return word + (syllables == 1 && !in_vowels ? "es" : "s");
}

struct Phrase {
  const Noun* noun = nullptr;
  Article article = Article::indefinite;
  bool plural = false;
  std::vector<const Adjective*> adjectives = {};
  size_t count = 0;      ///< index of the number
  Agreement owner = {};  ///< whose, for possessives
  Text after = {};       ///< attributes that follow: phrases, relative clauses
  bool any = false;      ///< English: "not ... any" or "no" rather than "not a"

  Agreement agreement() const {
    return {noun->gender,
            plural,
            plural ? 't' : noun->pronoun,
            noun->has("collective") && !plural,
            noun->domain == person || noun->has("collective"),
            noun->has("young") || noun->has("infant")};
  }
  bool definite() const {
    return article == Article::definite || article == Article::possessive || article == Article::both ||
           article == Article::demonstrative || article == Article::all;
  }
};

std::string noun_form(const Phrase& phrase, Case in, const char* adjective_ending) {
  const Noun& noun = *phrase.noun;
  if (noun.adjectival) return noun.singular + adjective_ending;
  if (phrase.plural) {
    const bool add = in == Case::dative && !noun.plural.ends_with("n") && !noun.plural.ends_with("s");
    return add ? noun.plural + "n" : noun.plural;
  }
  if (!noun.oblique.empty()) return in == Case::nominative ? noun.singular : noun.singular + noun.oblique;
  if (in == Case::genitive && noun.gender != Gender::feminine) return genitive(noun);
  return noun.singular;
}

std::string german(const Phrase& phrase, Case in) {
  const Gender gender = phrase.noun->gender;
  const auto with = [&](const char* stem, const Endings& endings) {
    return std::string(stem) + decline(endings, gender, phrase.plural, in);
  };
  std::string article;
  const Endings* endings = &strong_endings;
  switch (phrase.article) {
    case Article::none:
      break;
    case Article::indefinite:
      if (!phrase.plural) {
        article = with("ein", ein_endings);
        endings = &mixed_endings;
      }
      break;
    case Article::negative:
      article = with("kein", ein_endings);
      endings = &mixed_endings;
      break;
    case Article::possessive:
      article = with(possessive_stem(phrase.owner).c_str(), ein_endings);
      endings = &mixed_endings;
      break;
    case Article::definite:
      article = decline(definite_articles, gender, phrase.plural, in);
      endings = &weak_endings;
      break;
    case Article::both:
      article = decline(definite_articles, gender, true, in) + std::string(" beiden");
      endings = &weak_endings;
      break;
    case Article::all:
      article = with("all", dieser_endings);
      endings = &weak_endings;
      break;
    case Article::demonstrative:
      article = with("dies", dieser_endings);
      endings = &weak_endings;
      break;
    case Article::number:
      article = Lexicon::instance().numbers[phrase.count].german;
      break;
    case Article::several:
      article = with("mehrer", strong_endings);
      break;
    case Article::many:
      article = with("viel", strong_endings);
      break;
    case Article::some:
      article = with("einig", strong_endings);
      break;
  }
  const char* ending = decline(*endings, gender, phrase.plural, in);
  std::string text = article;
  for (const Adjective* adjective : phrase.adjectives)
    text = words({text, adjective->stem + std::string(adjective->invariant ? "" : ending)});
  return words({text, noun_form(phrase, in, ending), phrase.after.german});
}

std::string english_indefinite(std::string_view next) {
  if (next.starts_with("uni")) return "a";
  return std::string_view("aeiou").find(next[0]) == std::string_view::npos ? "a" : "an";
}

std::string english(const Phrase& phrase) {
  const Noun& noun = *phrase.noun;
  std::string core;
  for (const Adjective* adjective : phrase.adjectives) core = words({core, adjective->english});
  core = words({core, phrase.plural ? noun.english_plural : noun.english});
  const bool countless = phrase.plural || noun.mass || noun.plural_in_english;
  std::string article;
  switch (phrase.article) {
    case Article::none:
      break;
    case Article::indefinite:
      if (!countless) article = english_indefinite(core);
      break;
    case Article::negative:
      article = phrase.any ? "no" : countless ? "any" : english_indefinite(core);
      break;
    case Article::possessive:
      article = english_possessive(phrase.owner);
      break;
    case Article::definite:
      article = "the";
      break;
    case Article::both:
      article = "both";
      break;
    case Article::all:
      article = "all the";
      break;
    case Article::demonstrative:
      article = phrase.plural || noun.plural_in_english ? "these" : "this";
      break;
    case Article::number:
      article = Lexicon::instance().numbers[phrase.count].english;
      break;
    case Article::several:
      article = "several";
      break;
    case Article::many:
      article = "many";
      break;
    case Article::some:
      article = "some";
      break;
  }
  return words({article, core, phrase.after.english});
}

/// Preposition and noun phrase, contracted where German does: im, ins, am, ans, zum, zur, vom.
std::string with_preposition(const std::string& preposition, const Phrase& phrase, Case in) {
  const std::string rest = german(phrase, in);
  if (phrase.article == Article::definite && !phrase.plural) {
    static const std::array<std::array<std::string_view, 3>, 7> contractions = {{{"in", "dem ", "im"},
                                                                                 {"in", "das ", "ins"},
                                                                                 {"an", "dem ", "am"},
                                                                                 {"an", "das ", "ans"},
                                                                                 {"zu", "dem ", "zum"},
                                                                                 {"zu", "der ", "zur"},
                                                                                 {"von", "dem ", "vom"}}};
    for (const auto& [full, article, contracted] : contractions)
      if (preposition == full && rest.starts_with(article))
        return words({contracted, std::string_view(rest).substr(article.size())});
  }
  return words({preposition, rest});
}

// ---------------------------------------------------------------- clauses

/// Who acts, already in words.
struct Subject {
  Text text;  ///< nominative
  Agreement agreement;
};

/// A verb phrase in parts, so that one phrase serves every German word order.
struct VerbPhrase {
  // German, in the order of the middle field.
  std::string finite, infinitive, particle;
  bool reflexive = false;
  bool about_a_place = false;  ///< crossing a street, tidying up a room: happens nowhere else
  std::string known_object, time, negation, adverb, place, object, complement;
  std::string tail;   ///< infinitive or participle that ends the main clause
  std::string after;  ///< a clause that follows everything
  // English.
  std::string auxiliary, early_adverb, head, base, rest, late_adverb, english_place, english_time,
      english_after;

  std::string middle() const {
    return words({known_object, time, negation, adverb, place, object, complement});
  }
  std::string pronoun() const { return reflexive ? "sich" : ""; }

  std::string main(const std::string& subject) const {
    return words({subject, finite, pronoun(), middle(), particle, tail, after});
  }
  /// After something else in first place.
  std::string inverted(const std::string& subject) const {
    return words({finite, pronoun(), subject, middle(), particle, tail, after});
  }
  /// With the verb last. A noun follows "sich", a pronoun precedes it.
  std::string last(const std::string& subject, bool subject_is_pronoun) const {
    const std::string first = subject_is_pronoun ? words({subject, pronoun()}) : words({pronoun(), subject});
    return words({first, middle(), tail, particle + finite, after});
  }
  std::string with_zu() const {
    const std::string verb = particle.empty() ? "zu " + infinitive : particle + "zu" + infinitive;
    return words({pronoun(), middle(), verb});
  }
  std::string with_modal() const { return words({pronoun(), middle(), particle + infinitive}); }

  std::string english_tail() const {
    return words({rest, late_adverb, english_place, english_time, english_after});
  }
  std::string english() const { return words({auxiliary, without_auxiliary()}); }
  std::string without_auxiliary() const {
    return words({negation.empty() ? "" : "not", early_adverb, head, english_tail()});
  }
  std::string to_infinitive() const { return words({"to", base, english_tail()}); }
};

class Generator {
 public:
  explicit Generator(uint64_t seed) : random_(seed), lexicon_(Lexicon::instance()) {}

  /// A sentence pair; `novel` tells whether it has a combination of words reserved for held-out splits.
  Text sentence(bool& novel);

 private:
  // Words and what goes together.
  const std::vector<const Noun*>& pool(const std::string& tags);
  const Noun* noun(const std::string& tags) { return random_.of(pool(tags)); }
  const Noun* noun_for(const std::string& tags, const Agreement& owner);
  void note(std::string_view first, std::string_view second);
  void describe(Phrase& phrase, uint64_t percent_one, uint64_t percent_two);

  // Noun phrases.
  Phrase object(const Noun* noun, const Agreement* owner);
  Phrase object_of(const Verb& verb, const Agreement& owner);
  Phrase definite_or_indefinite(const Noun* noun, uint64_t percent_definite);
  Text outfit(const Phrase& person);
  Phrase person_or_animal(bool human);
  Subject subject_of(const Phrase& phrase) {
    return {{german(phrase, Case::nominative), english(phrase)}, phrase.agreement()};
  }
  Subject simple_subject(bool human);
  Subject subject();
  Subject kin_of(const Agreement& owner);

  // Adverbials.
  Text location();
  Text location_of(const VerbPhrase& phrase);
  Text time();
  Text at(const std::string& preposition, const Noun* noun, Case in, const std::string& english_preposition);
  Text on(const Noun* place);
  Text near();

  // Verb phrases.
  VerbPhrase begin(const Verb& verb, const Agreement& subject);
  void add_adverb(VerbPhrase& phrase, const Verb& verb, bool late, uint64_t percent,
                  const Agreement& subject);
  void set_object(VerbPhrase& phrase, const Phrase& object);
  void set_place(VerbPhrase& phrase, const Text& place) {
    phrase.place = place.german, phrase.english_place = place.english;
  }
  void set_time(VerbPhrase& phrase, const Text& time) {
    phrase.time = time.german, phrase.english_time = time.english;
  }
  VerbPhrase intransitive(const Agreement& subject);
  VerbPhrase bare(const Agreement& subject);
  VerbPhrase transitive(const Agreement& subject, bool negated = false);
  VerbPhrase part_of_whole(const Agreement& subject);
  VerbPhrase wearing(const Agreement& subject, bool negated = false);
  VerbPhrase dative(const Agreement& subject);
  VerbPhrase ditransitive(const Agreement& subject);
  VerbPhrase position(const Agreement& subject);
  VerbPhrase motion(const Agreement& subject);
  VerbPhrase caused_motion(const Agreement& subject);
  VerbPhrase prepositional(const Agreement& subject);
  VerbPhrase body_care(const Agreement& subject);
  VerbPhrase trying(const Agreement& subject);
  VerbPhrase wanting(const Agreement& subject);
  VerbPhrase action(const Agreement& subject);
  void add_extras(VerbPhrase& phrase, uint64_t percent_place, uint64_t percent_time);
  Text goal(bool human);

  // Sentences.
  Text statement();
  Text fronted();
  Text relative_subject();
  Text during();
  Text during_first();
  Text reason();
  Text that_clause();
  Text coordinated();
  Text pronoun_object();
  Text contrast();
  Text existential();
  Text comparison();
  Text negated();
  Text purpose();
  Text passive();
  Text relative_object();
  Text relative_preposition();
  Text relative_genitive();
  Text fragment();
  Text genitive_subject();
  Text partitive();

  Random random_;
  const Lexicon& lexicon_;
  std::unordered_map<std::string, std::vector<const Noun*>> pools_;
  bool novel_ = false;
};

const std::vector<const Noun*>& Generator::pool(const std::string& tags) {
  auto [found, inserted] = pools_.try_emplace(tags);
  if (inserted) found->second = lexicon_.with(tags);
  return found->second;
}

/// Leaves out what does not become children: sons and daughters, beer and wine.
const Noun* Generator::noun_for(const std::string& tags, const Agreement& owner) {
  const Noun* chosen = noun(tags);
  while (owner.child && (chosen->has("offspring") || chosen->has("adults"))) chosen = noun(tags);
  return chosen;
}

/// One combination in ten, by a hash of its words, is kept out of training.
void Generator::note(std::string_view first, std::string_view second) {
  uint64_t hash = 14695981039346656037u;
  for (std::string_view part : {first, std::string_view(" "), second})
    for (char c : part) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
  if ((hash >> 20) % 10 == 0) novel_ = true;
}

void Generator::describe(Phrase& phrase, uint64_t percent_one, uint64_t percent_two) {
  if (!random_.percent(percent_one)) return;
  std::vector<const Adjective*> fitting;
  for (const Adjective& adjective : lexicon_.adjectives)
    if (adjective.domains & phrase.noun->domain) fitting.push_back(&adjective);
  if (phrase.noun->mass) std::erase_if(fitting, [](const Adjective* a) { return a->order == size_order; });
  // Children are young anyway.
  if (phrase.noun->has("young"))
    std::erase_if(fitting, [](const Adjective* a) { return a->order == age_order; });
  // Most clothes are told by their plain colour: one that things have too.
  if (phrase.noun->domain == clothing && random_.percent(50))
    std::erase_if(fitting,
                  [](const Adjective* a) { return a->order != colour_order || !(a->domains & thing); });
  if (fitting.empty()) return;
  const Adjective* first = random_.of(fitting);
  note(first->stem, phrase.noun->singular);
  phrase.adjectives.push_back(first);
  if (!random_.percent(percent_two)) return;
  std::erase_if(fitting, [&](const Adjective* a) { return a->order == first->order; });
  if (fitting.empty()) return;
  const Adjective* second = random_.of(fitting);
  note(second->stem, phrase.noun->singular);
  phrase.adjectives.insert(second->order < first->order ? phrase.adjectives.begin() : phrase.adjectives.end(),
                           second);
}

Phrase Generator::definite_or_indefinite(const Noun* noun, uint64_t percent_definite) {
  Phrase phrase{noun};
  if (random_.percent(percent_definite)) phrase.article = Article::definite;
  describe(phrase, 30, 15);
  return phrase;
}

Phrase Generator::object(const Noun* noun, const Agreement* owner) {
  Phrase phrase{noun};
  if (noun->mass) {
    phrase.article = random_.percent(20) ? Article::definite : Article::none;
    describe(phrase, 40, 0);
    return phrase;
  }
  const bool countable = !noun->plural.empty();
  const bool owned = owner && noun->domain != building && noun->domain != outdoor && noun->domain != place &&
                     (noun->domain != person || noun->has("kin"));
  const bool only_owned = noun->has("kin") && !noun->has("human");
  if (owned && (only_owned || random_.percent(noun->has("kin") ? 92 : 14))) {
    phrase.article = Article::possessive;
    phrase.owner = *owner;
    phrase.plural = countable && random_.percent(15);
  } else if (countable && random_.percent(26)) {
    phrase.plural = true;
    constexpr std::array<Article, 5> plurals = {Article::number, Article::indefinite, Article::definite,
                                                Article::several, Article::some};
    phrase.article = plurals[random_.weighted({40, 25, 15, 10, 10})];
    phrase.count = random_.weighted({50, 25, 8, 6, 3, 2, 2, 2, 2});
  } else {
    phrase.article = random_.percent(30) ? Article::definite : Article::indefinite;
    if (random_.percent(3)) phrase.article = Article::demonstrative;
  }
  describe(phrase, 42, 15);
  return phrase;
}

Phrase Generator::object_of(const Verb& verb, const Agreement& owner) {
  const std::vector<const Noun*>& candidates = pool(verb.objects);
  const Noun* chosen = noun_for(verb.objects, owner);
  // A verb with few objects would lose too many of them.
  if (candidates.size() >= 6) note(words({verb.infinitive, verb.particle}), chosen->singular);
  return object(chosen, &owner);
}

/// What someone wears, as an attribute: in einem roten Hemd, mit langen Haaren.
Text Generator::outfit(const Phrase& person) {
  const Agreement wearer = person.agreement();
  const bool hair_described =
      std::any_of(person.adjectives.begin(), person.adjectives.end(), [](const Adjective* adjective) {
        return (adjective->domains & hair) || std::string_view(adjective->stem).ends_with("haarig");
      });
  const size_t kind = random_.weighted({50, 25, hair_described ? 0u : 25u});
  if (kind == 2) {
    std::vector<const Adjective*> fitting;
    for (const Adjective& adjective : lexicon_.adjectives)
      if (adjective.domains & hair) fitting.push_back(&adjective);
    if (wearer.pronoun == 'h' && !wearer.child && random_.percent(30)) {
      const Adjective* a = random_.of(fitting);
      return {words({"mit einem", a->stem + std::string("en"), "Bart"}),
              words({"with a", a->english, "beard"})};
    }
    const Adjective* a = random_.of(fitting);
    return {words({"mit", a->stem + std::string("en"), "Haaren"}), words({"with", a->english, "hair"})};
  }
  const bool dress = kind == 0 && wearer.pronoun == 's' && random_.percent(40);
  Phrase clothes{noun(kind == 0 ? (dress ? "insideshe" : "inside") : "with")};
  // The commonest garments come first in the lexicon.
  if (!dress && random_.percent(40)) clothes.noun = pool(kind == 0 ? "inside" : "with")[random_.below(3)];
  clothes.plural = wearer.plural && !clothes.noun->plural.empty();
  describe(clothes, 75, 10);
  return {words({kind == 0 ? "in" : "mit", german(clothes, Case::dative)}),
          words({kind == 0 ? "in" : "with", english(clothes)})};
}

Phrase Generator::person_or_animal(bool human) {
  Phrase phrase{noun(human ? (random_.percent(45) ? "human" : "young") : "animal")};
  // The commonest captions are of men, women, children.
  if (human && random_.percent(45)) phrase.noun = pool("human")[random_.below(5)];
  switch (random_.weighted({50, 16, 13, 7, 3, 2, 2, 2, 2, 2, 1})) {
    case 0:
      break;
    case 1:
      phrase.article = Article::definite;
      break;
    case 2:
      phrase.article = Article::number;
      phrase.count = random_.weighted({50, 24, 9, 7, 3, 2, 2, 2, 2});
      phrase.plural = true;
      break;
    case 3:
      phrase.plural = true;
      break;
    case 4:
      phrase.article = Article::definite;
      phrase.plural = true;
      break;
    case 5:
      phrase.article = Article::several;
      phrase.plural = true;
      break;
    case 6:
      phrase.article = Article::many;
      phrase.plural = true;
      break;
    case 7:
      phrase.article = Article::some;
      phrase.plural = true;
      break;
    case 8:
      phrase.article = Article::demonstrative;
      break;
    case 9:
      phrase.article = Article::both;
      phrase.plural = true;
      break;
    default:
      phrase.article = Article::all;
      phrase.plural = true;
      break;
  }
  describe(phrase, 45, 15);
  return phrase;
}

Subject Generator::simple_subject(bool human) { return subject_of(person_or_animal(human)); }

Subject Generator::kin_of(const Agreement& owner) {
  Phrase phrase{noun_for("kin", owner), Article::possessive};
  phrase.owner = owner;
  phrase.plural = random_.percent(15);
  describe(phrase, 25, 0);
  return subject_of(phrase);
}

Subject Generator::subject() {
  const bool human = !random_.percent(18);
  const size_t kind = random_.weighted({84, 9, 7});
  if (!human || kind == 0) {
    Phrase phrase = person_or_animal(human);
    if (human && random_.percent(36)) phrase.after = outfit(phrase);
    return subject_of(phrase);
  }
  if (kind == 1) {
    const std::string people = "human|young|infant";
    const Noun* one = noun(people);
    const Noun* other = noun(people);
    while (other == one) other = noun(people);
    const Subject first = subject_of(definite_or_indefinite(one, 30));
    const Subject second =
        random_.percent(35) ? kin_of(first.agreement) : subject_of(definite_or_indefinite(other, 30));
    return {{words({first.text.german, "und", second.text.german}),
             words({first.text.english, "and", second.text.english})},
            {Gender::masculine, true, 't', false, true, true}};
  }
  if (random_.percent(50)) {
    Phrase members{noun("human|young")};
    members.plural = true;
    describe(members, 45, 0);
    const bool small = random_.percent(40);
    return {{words({small ? "eine kleine Gruppe von" : "eine Gruppe von", german(members, Case::dative)}),
             words({small ? "a small group of" : "a group of", english(members)})},
            {Gender::feminine, false, 't', true, true}};
  }
  return subject_of(definite_or_indefinite(noun("collective"), 40));
}

Text Generator::at(const std::string& preposition, const Noun* noun, Case in,
                   const std::string& english_preposition) {
  const Phrase phrase = definite_or_indefinite(noun, 55);
  return {with_preposition(preposition, phrase, in), words({english_preposition, english(phrase)})};
}

Text Generator::on(const Noun* place) {
  return at("auf", place, Case::dative, place->has("en-at") ? "at" : place->has("en-in") ? "in" : "on");
}

/// Beside something large.
Text Generator::near() {
  const Noun* landmark = noun("mark");
  switch (random_.weighted({40, 25, 35})) {
    case 0:
      return at("vor", landmark, Case::dative, "in front of");
    case 1:
      return at("hinter", landmark, Case::dative, "behind");
    default:
      return at("neben", landmark, Case::dative, "next to");
  }
}

Text Generator::location() {
  switch (random_.weighted({40, 28, 14, 18})) {
    case 0:
      return at("in", noun("in"), Case::dative, "in");
    case 1:
      return on(noun("auf"));
    case 2: {
      const Noun* where = noun("an");
      return at("an", where, Case::dative, where->has("en-by") ? "by" : "at");
    }
    default:
      return near();
  }
}

/// Where it makes sense: no fishing in a kitchen.
Text Generator::location_of(const VerbPhrase& phrase) {
  const auto any_of = [](const std::string& word, std::initializer_list<std::string_view> list) {
    return std::find(list.begin(), list.end(), word) != list.end();
  };
  if (any_of(phrase.infinitive, {"angeln", "zelten", "baden", "sonnen"})) {
    const Noun* where = noun("waterside");
    return at("an", where, Case::dative, where->has("en-by") ? "by" : "at");
  }
  if (any_of(phrase.complement, {"Fußball", "Basketball", "Tennis", "Volleyball", "Hockey", "Fahrrad", "Ski",
                                 "Skateboard", "Schlittschuh", "spazieren"}))
    return random_.percent(50) ? on(noun("ground_outside")) : at("in", noun("outdoor"), Case::dative, "in");
  return location();
}

Text Generator::time() {
  if (random_.percent(20)) {
    const Fixed& adjective = random_.of(lexicon_.day_adjectives);
    const Fixed& day = random_.of(lexicon_.days);
    return {words({"an einem", adjective.german, day.german}),
            words({"on a", adjective.english, day.english})};
  }
  const Fixed& when = random_.percent(25) ? random_.of(lexicon_.occasions) : random_.of(lexicon_.times);
  return {when.german, when.english};
}

VerbPhrase Generator::begin(const Verb& verb, const Agreement& subject) {
  VerbPhrase phrase;
  phrase.finite = subject.plural ? verb.infinitive : verb.third;
  phrase.infinitive = verb.infinitive;
  phrase.particle = verb.particle;
  phrase.reflexive = verb.reflexive;
  phrase.auxiliary = subject.plural ? "are" : "is";
  phrase.head = verb.gerund;
  phrase.base = verb.base;
  return phrase;
}

/// `late`: the English adverb follows the verb (no object there), else it precedes it.
void Generator::add_adverb(VerbPhrase& phrase, const Verb& verb, bool late, uint64_t percent,
                           const Agreement& subject) {
  const std::string_view letters = verb.adverbs;
  if (letters.empty() || !random_.percent(percent)) return;
  const char letter = letters[random_.below(letters.size())];
  if (letter == 't' && !subject.plural) return;
  if (letter == 'a' && (subject.plural || subject.collective)) return;
  for (const Adverb& adverb : lexicon_.adverbs) {
    if (adverb.letter != letter) continue;
    phrase.adverb = adverb.german;
    (late ? phrase.late_adverb : phrase.early_adverb) = adverb.english;
  }
}

/// A known object comes early in the German clause, a new one late.
void Generator::set_object(VerbPhrase& phrase, const Phrase& object) {
  (object.definite() ? phrase.known_object : phrase.object) = german(object, Case::accusative);
  phrase.rest = english(object);
}

VerbPhrase Generator::intransitive(const Agreement& subject) {
  const bool mutual = subject.plural && subject.human && random_.percent(20);
  const std::vector<Verb>& verbs = mutual          ? lexicon_.reciprocal
                                   : subject.human ? lexicon_.intransitive
                                                   : lexicon_.animal_intransitive;
  const Verb* verb = &random_.of(verbs);
  const auto for_adults = [](std::string_view infinitive) {
    return infinitive == "rauchen" || infinitive == "küssen";
  };
  while (subject.child && for_adults(verb->infinitive)) verb = &random_.of(verbs);
  VerbPhrase phrase = begin(*verb, subject);
  add_adverb(phrase, *verb, true, mutual ? 25 : 35, subject);
  return phrase;
}

VerbPhrase Generator::bare(const Agreement& subject) {
  const BareComplement& bare = random_.of(lexicon_.bare);
  VerbPhrase phrase = begin({bare.third, bare.infinitive, "", bare.gerund, bare.base}, subject);
  phrase.complement = bare.complement;
  return phrase;
}

VerbPhrase Generator::transitive(const Agreement& subject, bool negated) {
  const Verb& verb = random_.of(subject.human ? lexicon_.transitive : lexicon_.animal_transitive);
  VerbPhrase phrase = begin(verb, subject);
  Phrase object = object_of(verb, subject);
  if (negated) {
    if (object.article == Article::definite || object.article == Article::possessive) {
      phrase.negation = "nicht";
    } else {
      object.article = Article::negative;
      phrase.auxiliary += " not";
    }
  } else {
    add_adverb(phrase, verb, false, 15, subject);
  }
  set_object(phrase, object);
  phrase.about_a_place = object.noun->domain & (place | room | building | outdoor);
  return phrase;
}

/// repariert das Dach einer alten Scheune
VerbPhrase Generator::part_of_whole(const Agreement& subject) {
  const Whole& relation = lexicon_.wholes[random_.weighted({70, 15, 15})];
  Phrase part{noun(relation.part), Article::definite};
  part.plural = random_.percent(25) && part.noun->singular != "Dach" && part.noun->singular != "Motor";
  const Phrase whole = definite_or_indefinite(noun(relation.whole), 50);
  part.after = {german(whole, Case::genitive), words({"of", english(whole)})};
  std::vector<const Verb*> verbs;
  for (const Verb& verb : lexicon_.transitive) {
    const std::vector<const Noun*>& fitting = pool(verb.objects);
    if (std::find(fitting.begin(), fitting.end(), part.noun) != fitting.end()) verbs.push_back(&verb);
  }
  VerbPhrase phrase = begin(*random_.of(verbs), subject);
  set_object(phrase, part);
  return phrase;
}

/// trägt ein rotes Hemd und eine schwarze Hose
VerbPhrase Generator::wearing(const Agreement& subject, bool negated) {
  VerbPhrase phrase = begin({"trägt", "tragen", "", "wearing", "wear"}, subject);
  const auto garment = [&](const std::string& tags) {
    Phrase clothes{noun(tags)};
    clothes.plural = clothes.noun->has("wearmany") || (subject.plural && !clothes.noun->plural.empty());
    if (negated) clothes.article = Article::negative;
    describe(clothes, negated ? 25 : 80, 10);
    return clothes;
  };
  const Phrase first = garment(negated                  ? "with|wearmany"
                               : subject.pronoun == 's' ? "inside|insideshe"
                                                        : "inside");
  phrase.object = german(first, Case::accusative);
  phrase.rest = english(first);
  if (negated) {
    phrase.auxiliary += " not";
  } else if (random_.percent(55)) {
    const Phrase second = garment("with|wearmany");
    phrase.object = words({phrase.object, "und", german(second, Case::accusative)});
    phrase.rest = words({phrase.rest, "and", english(second)});
  }
  return phrase;
}

VerbPhrase Generator::dative(const Agreement& subject) {
  const Verb& verb = random_.of(lexicon_.dative);
  VerbPhrase phrase = begin(verb, subject);
  const Phrase receiver = object_of(verb, subject);
  (receiver.definite() ? phrase.known_object : phrase.object) = german(receiver, Case::dative);
  phrase.rest = english(receiver);
  add_adverb(phrase, verb, false, 25, subject);
  return phrase;
}

VerbPhrase Generator::ditransitive(const Agreement& subject) {
  const Verb& verb = random_.of(lexicon_.ditransitive);
  VerbPhrase phrase = begin(verb, subject);
  const Phrase receiver = object(noun_for("human|kin|young", subject), &subject);
  const Phrase gift = object_of(verb, subject);
  (receiver.definite() ? phrase.known_object : phrase.object) = german(receiver, Case::dative);
  std::string& last = receiver.definite() && gift.definite() ? phrase.known_object : phrase.object;
  last = words({last, german(gift, Case::accusative)});
  // English needs "to" where the verb does not take two objects.
  const bool with_to = *verb.particle != '\0';
  phrase.rest =
      with_to ? words({english(gift), "to", english(receiver)}) : words({english(receiver), english(gift)});
  return phrase;
}

VerbPhrase Generator::position(const Agreement& subject) {
  const Verb* chosen = &random_.of(lexicon_.position);
  while (!subject.human && std::string_view(chosen->objects) == "kneel")
    chosen = &random_.of(lexicon_.position);
  const Verb& verb = *chosen;
  VerbPhrase phrase = begin(verb, subject);
  const std::string_view posture = verb.objects;
  const bool own = random_.percent(50);  // a place that only this posture has
  Text where;
  if (posture == "sit" && own)
    where = random_.percent(80) ? at("auf", noun("seat|sitauf"), Case::dative, "on")
                                : at("an", noun("desk"), Case::dative, "at");
  else if (posture == "lie" && own)
    where =
        random_.percent(80) ? at("auf", noun("bed"), Case::dative, "on") : Text{"im Gras", "in the grass"};
  else if (posture == "stand" && random_.percent(8))
    where = {"in einer langen Schlange", "in a long line"};
  else if (posture == "stand" && own)
    where = near();
  else
    where = location();
  add_adverb(phrase, verb, true, 15, subject);
  set_place(phrase, where);
  return phrase;
}

/// Where a movement ends: in, auf, hinter with accusative; zu; nach Hause.
Text Generator::goal(bool human) {
  switch (random_.weighted({40, 25, 10, 20, human ? 5u : 0u})) {
    case 0:
      return at("in", noun("in"), Case::accusative, "into");
    case 1: {
      const Noun* to = noun("auf");
      return at("auf", to, Case::accusative, to->has("en-at") ? "to" : to->has("en-in") ? "into" : "onto");
    }
    case 2:
      return at("unter", noun("surface"), Case::accusative, "under");
    case 3:
      return at("zu", noun("mark|an"), Case::dative, "to");
    default:
      return {"nach Hause", "home"};
  }
}

VerbPhrase Generator::motion(const Agreement& subject) {
  const Verb& verb = random_.of(lexicon_.motion);
  VerbPhrase phrase = begin(verb, subject);
  add_adverb(phrase, verb, true, 25, subject);
  const Text to = goal(subject.human);
  phrase.complement = to.german;
  phrase.english_place = to.english;
  return phrase;
}

VerbPhrase Generator::caused_motion(const Agreement& subject) {
  const Verb& verb = random_.of(lexicon_.caused_motion);
  VerbPhrase phrase = begin(verb, subject);
  set_object(phrase, object_of(verb, subject));
  add_adverb(phrase, verb, false, 15, subject);
  const std::string_view what = verb.objects;
  Text to;
  if (what == "hung")
    to = at("an", noun("inwall"), Case::accusative, "on");
  else if (what == "thing")
    to = at("in", noun("in"), Case::accusative, "into");
  else if (what == "thrown")
    to = random_.percent(50) ? at("in", noun("swim|box"), Case::accusative, "into")
                             : at("über", noun("over"), Case::accusative, "over");
  else if (random_.percent(75))
    to = at("auf", noun("surface|ground"), Case::accusative, "on");
  else
    to = what == "flat" ? at("in", noun("box"), Case::accusative, "in")
                        : at("neben", noun("surface"), Case::accusative, "next to");
  phrase.complement = to.german;
  phrase.english_place = to.english;
  return phrase;
}

VerbPhrase Generator::prepositional(const Agreement& subject) {
  const PrepositionalVerb* chosen = &random_.of(lexicon_.prepositional);
  while (!subject.human && !chosen->for_animals) chosen = &random_.of(lexicon_.prepositional);
  const Verb& verb = chosen->verb;
  VerbPhrase phrase = begin(verb, subject);
  Phrase target = object_of(verb, subject);
  // "sitting down on seven stools" and the like read badly.
  if (target.noun->domain != person && target.noun->domain != animal && target.plural) {
    target.plural = false;
    target.article = Article::indefinite;
  }
  phrase.complement =
      with_preposition(chosen->preposition, target, chosen->dative ? Case::dative : Case::accusative);
  phrase.rest = words({chosen->english_preposition, english(target)});
  add_adverb(phrase, verb, false, 20, subject);
  const std::string_view preposition = chosen->preposition;
  const bool stays = preposition == "mit" || std::string_view(verb.base) == "wait";
  if (stays && random_.percent(40)) set_place(phrase, location());
  return phrase;
}

/// wäscht sich die Hände
VerbPhrase Generator::body_care(const Agreement& subject) {
  const Verb& verb = random_.of(lexicon_.body);
  VerbPhrase phrase = begin(verb, subject);
  phrase.reflexive = true;
  const std::string_view pair = verb.objects;
  const size_t equals = pair.find('=');
  phrase.known_object = pair.substr(0, equals);
  std::string_view part = pair.substr(equals + 1);
  if (part == "face" && (subject.plural || subject.collective)) part = "faces";
  phrase.rest = words({english_possessive(subject), part});
  return phrase;
}

/// versucht, einen Ball zu fangen
VerbPhrase Generator::trying(const Agreement& subject) {
  VerbPhrase phrase = begin({"versucht", "versuchen", "", "trying", "try"}, subject);
  const VerbPhrase attempt = !subject.human        ? transitive(subject)
                             : random_.percent(70) ? transitive(subject)
                                                   : prepositional(subject);
  phrase.after = ", " + attempt.with_zu();
  phrase.rest = words({"to", attempt.early_adverb, attempt.base, attempt.english_tail()});
  return phrase;
}

/// will ein Buch lesen
VerbPhrase Generator::wanting(const Agreement& subject) {
  const VerbPhrase wish = !subject.human        ? transitive(subject)
                          : random_.percent(60) ? transitive(subject)
                          : random_.percent(50) ? bare(subject)
                                                : prepositional(subject);
  VerbPhrase phrase;
  phrase.finite = subject.plural ? "wollen" : "will";
  phrase.tail = wish.with_modal();
  phrase.auxiliary = subject.plural ? "want" : "wants";
  phrase.head = words({"to", wish.early_adverb, wish.base});
  phrase.rest = wish.english_tail();
  return phrase;
}

void Generator::add_extras(VerbPhrase& phrase, uint64_t percent_place, uint64_t percent_time) {
  if (phrase.place.empty() && phrase.complement.empty() && !phrase.about_a_place &&
      random_.percent(percent_place))
    set_place(phrase, location_of(phrase));
  if (phrase.time.empty() && random_.percent(percent_time)) set_time(phrase, time());
}

/// Any verb phrase in the progressive.
VerbPhrase Generator::action(const Agreement& subject) {
  if (!subject.human) {
    switch (random_.weighted({25, 15, 15, 25, 20})) {
      case 0: {
        VerbPhrase phrase = intransitive(subject);
        add_extras(phrase, 45, 0);
        return phrase;
      }
      case 1:
        return position(subject);
      case 2:
        return motion(subject);
      case 3:
        return transitive(subject);
      default:
        return prepositional(subject);
    }
  }
  switch (random_.weighted({16, 11, 25, 7, 7, 11, 8, 7, 14, 4, 3, 3})) {
    case 0: {
      VerbPhrase phrase = intransitive(subject);
      add_extras(phrase, 60, 0);
      return phrase;
    }
    case 1: {
      VerbPhrase phrase = bare(subject);
      if (random_.percent(55) && phrase.complement != "schwimmen") set_place(phrase, location_of(phrase));
      return phrase;
    }
    case 2: {
      VerbPhrase phrase = transitive(subject);
      add_extras(phrase, 38, 0);
      return phrase;
    }
    case 3:
      return dative(subject);
    case 4:
      return ditransitive(subject);
    case 5:
      return position(subject);
    case 6:
      return motion(subject);
    case 7:
      return caused_motion(subject);
    case 8:
      return prepositional(subject);
    case 9:
      return body_care(subject);
    case 10:
      return wearing(subject);
    default:
      return part_of_whole(subject);
  }
}

// ---------------------------------------------------------------- sentences

Text Generator::statement() {
  const Subject who = subject();
  VerbPhrase what;
  switch (random_.weighted({72, 10, 9, 9})) {
    case 0:
      what = action(who.agreement);
      break;
    case 1:
      what = who.agreement.human ? wearing(who.agreement) : action(who.agreement);
      break;
    case 2:
      what = trying(who.agreement);
      break;
    default:
      what = wanting(who.agreement);
      break;
  }
  if (what.after.empty() && what.tail.empty()) add_extras(what, 0, 30);
  return {what.main(who.text.german), words({who.text.english, what.english()})};
}

Text Generator::fronted() {
  const Subject who = subject();
  if (random_.percent(45)) {
    const VerbPhrase what = !who.agreement.human  ? intransitive(who.agreement)
                            : random_.percent(35) ? intransitive(who.agreement)
                            : random_.percent(35) ? bare(who.agreement)
                            : random_.percent(80) ? transitive(who.agreement)
                                                  : body_care(who.agreement);
    if (what.about_a_place) return {};
    const Text where = location_of(what);
    return {words({where.german, what.inverted(who.text.german)}),
            words({where.english, ",", who.text.english, what.english()})};
  }
  const Text when = time();
  const VerbPhrase what = action(who.agreement);
  return {words({when.german, what.inverted(who.text.german)}),
          words({when.english, ",", who.text.english, what.english()})};
}

Text Generator::relative_subject() {
  const bool human = !random_.percent(20);
  Phrase phrase = person_or_animal(human);
  const Agreement agreement = phrase.agreement();
  const VerbPhrase inner = human && random_.percent(30) ? wearing(agreement) : action(agreement);
  const std::string pronoun =
      decline(relative_pronouns, agreement.gender, agreement.plural, Case::nominative);
  phrase.after = {words({",", inner.last(pronoun, true), ","}),
                  words({human ? "who" : "that", inner.english()})};
  const Subject who = subject_of(phrase);
  const VerbPhrase what = action(agreement);
  if (what.infinitive == inner.infinitive) return {};
  return {what.main(who.text.german), words({who.text.english, what.english()})};
}

Text Generator::during() {
  const Subject who = subject();
  const VerbPhrase what = action(who.agreement);
  const std::string start = words({what.main(who.text.german), ", während"});
  const std::string english_start = words({who.text.english, what.english(), "while"});
  if (!who.agreement.collective && random_.percent(30)) {
    const VerbPhrase inner =
        random_.percent(60) && who.agreement.human ? bare(who.agreement) : intransitive(who.agreement);
    return {words({start, inner.last(german_pronoun(who.agreement, Case::nominative), true)}),
            words({english_start, english_pronoun(who.agreement, Case::nominative), inner.english()})};
  }
  const Subject other = who.agreement.human && random_.percent(35) ? kin_of(who.agreement)
                                                                   : simple_subject(random_.percent(75));
  const VerbPhrase inner = random_.percent(60) ? intransitive(other.agreement) : action(other.agreement);
  return {words({start, inner.last(other.text.german, false)}),
          words({english_start, other.text.english, inner.english()})};
}

Text Generator::during_first() {
  const Subject first = simple_subject(random_.percent(80));
  const VerbPhrase inner = action(first.agreement);
  const Subject second =
      first.agreement.human && random_.percent(50) ? kin_of(first.agreement) : simple_subject(true);
  const VerbPhrase outer = action(second.agreement);
  return {words({"während", inner.last(first.text.german, false), ",", outer.inverted(second.text.german)}),
          words({"while", first.text.english, inner.english(), ",", second.text.english, outer.english()})};
}

Text Generator::reason() {
  const Subject who = subject();
  const VerbPhrase what = action(who.agreement);
  const bool can_refer = !who.agreement.collective;
  Text why;
  if (!can_refer || random_.percent(35)) {
    const Fixed& weather = random_.of(lexicon_.weather_clauses);
    why = {weather.german, weather.english};
  } else {
    const std::string pronoun = german_pronoun(who.agreement, Case::nominative);
    const std::string english = english_pronoun(who.agreement, Case::nominative);
    if (random_.percent(70)) {
      const Fixed& state = random_.of(lexicon_.states);
      why = {words({pronoun, state.german, who.agreement.plural ? "sind" : "ist"}),
             words({english, who.agreement.plural ? "are" : "is", state.english})};
    } else {
      const VerbPhrase inner = random_.percent(50) ? wanting(who.agreement) : prepositional(who.agreement);
      why = {inner.last(pronoun, true), words({english, inner.english()})};
    }
  }
  return {words({what.main(who.text.german), ", weil", why.german}),
          words({who.text.english, what.english(), "because", why.english})};
}

Text Generator::that_clause() {
  const Subject who = simple_subject(true);
  const Verb& verb = random_.of(lexicon_.stative);
  const Subject other = simple_subject(random_.percent(65));
  const VerbPhrase inner = action(other.agreement);
  const bool plural = who.agreement.plural;
  return {words({who.text.german, plural ? verb.infinitive : verb.third, ", dass",
                 inner.last(other.text.german, false)}),
          words({who.text.english, plural ? verb.base : verb.gerund, "that", other.text.english,
                 inner.english()})};
}

Text Generator::coordinated() {
  const Subject who = subject();
  const VerbPhrase first = action(who.agreement);
  const VerbPhrase second = random_.percent(40) ? intransitive(who.agreement) : action(who.agreement);
  if (first.infinitive == second.infinitive) return {};
  return {words({first.main(who.text.german), "und", second.main("")}),
          words({who.text.english, first.english(), "and", second.without_auxiliary()})};
}

/// hebt einen Ball auf und gibt ihn einem Kind
Text Generator::pronoun_object() {
  const Subject who = subject();
  if (!who.agreement.human) return {};
  static const std::vector<Verb> firsts = {{"hebt", "heben", "auf", "picking up", "pick up"},
                                           {"kauft", "kaufen", "", "buying", "buy"},
                                           {"nimmt", "nehmen", "", "taking", "take"},
                                           {"holt", "holen", "", "fetching", "fetch"}};
  const Phrase thing = object(noun("thing"), nullptr);
  const Agreement reference = thing.agreement();
  VerbPhrase first = begin(random_.of(firsts), who.agreement);
  set_object(first, thing);
  const std::string it = german_pronoun(reference, Case::accusative);
  const std::string english_it = english_pronoun(reference, Case::accusative);
  VerbPhrase second;
  if (random_.percent(60)) {
    static const std::vector<Verb> gives = {{"gibt", "geben", "", "giving", "give"},
                                            {"zeigt", "zeigen", "", "showing", "show"},
                                            {"bringt", "bringen", "", "bringing", "bring"},
                                            {"schenkt", "schenken", "", "presenting", "present"}};
    second = begin(random_.of(gives), who.agreement);
    const Phrase receiver = object(noun_for("human|kin|young", who.agreement), &who.agreement);
    second.known_object = words({it, german(receiver, Case::dative)});
    second.rest = words({english_it, "to", english(receiver)});
  } else {
    second = begin({"trägt", "tragen", "", "carrying", "carry"}, who.agreement);
    const Text to = at("in", noun("in"), Case::accusative, "into");
    second.known_object = words({it, to.german});
    second.rest = words({english_it, to.english});
  }
  return {words({first.main(who.text.german), "und", second.main("")}),
          words({who.text.english, first.english(), "and", second.without_auxiliary()})};
}

Text Generator::contrast() {
  const Subject first = simple_subject(true);
  const VerbPhrase what = action(first.agreement);
  const Subject second = random_.percent(50) ? kin_of(first.agreement) : simple_subject(random_.percent(70));
  const VerbPhrase other = action(second.agreement);
  const bool but = random_.percent(60);
  return {words({what.main(first.text.german), but ? ", aber" : ", und", other.main(second.text.german)}),
          words({first.text.english, what.english(), but ? ", but" : ", and", second.text.english,
                 other.english()})};
}

/// Auf dem Tisch steht eine Vase: there is a vase on the table.
Text Generator::existential() {
  struct Kind {
    const char *things, *places, *preposition, *english_preposition, *singular, *plural;
  };
  static const std::vector<Kind> kinds = {
      {"upright", "surface|ground", "auf", "on", "steht", "stehen"},
      {"flat", "surface|ground|seat", "auf", "on", "liegt", "liegen"},
      {"flat", "surface", "unter", "under", "liegt", "liegen"},
      {"flat|food", "box", "in", "in", "liegt", "liegen"},
      {"hung", "inwall", "an", "on", "hängt", "hängen"},
      {"upright", "inwall|desk", "neben", "next to", "steht", "stehen"},
      {"outside|machine|wheels", "whole", "vor", "in front of", "steht", "stehen"},
      {"outside|machine|wheels", "whole", "hinter", "behind", "steht", "stehen"},
      {"outside", "outdoor", "in", "in", "steht", "stehen"}};
  const Kind& kind = random_.of(kinds);
  const Text where = at(kind.preposition, noun(kind.places), Case::dative, kind.english_preposition);
  Phrase thing = object(noun(kind.things), nullptr);
  if (thing.definite()) thing.article = thing.plural ? Article::number : Article::indefinite;
  if (random_.percent(10)) {
    thing.article = Article::negative;
    thing.any = true;
  }
  std::string german_text =
      words({where.german, thing.plural ? kind.plural : kind.singular, german(thing, Case::nominative)});
  std::string english_text = words({thing.plural ? "there are" : "there is", english(thing), where.english});
  if (random_.percent(25)) {
    const Fixed& clause = random_.of(lexicon_.weather_clauses);
    const bool while_so = random_.percent(60);
    german_text = words({german_text, while_so ? ", während" : ", obwohl", clause.german});
    english_text = words({english_text, while_so ? "while" : "although", clause.english});
  }
  return {german_text, english_text};
}

Text Generator::comparison() {
  const Comparison& comparison = random_.of(lexicon_.comparisons);
  std::vector<const Noun*> nouns;
  for (const Noun& candidate : lexicon_.nouns())
    if ((candidate.domain & comparison.domains) && !candidate.plural.empty() && !candidate.has("owner"))
      nouns.push_back(&candidate);
  const Noun* first = random_.of(nouns);
  std::erase_if(nouns, [&](const Noun* n) { return n->domain != first->domain || n == first; });
  const auto side = [&](const Noun* noun, const Agreement* owner) {
    Phrase phrase{noun, Article::definite};
    phrase.plural = random_.percent(20);
    if (owner && noun->has("kin")) {
      phrase.article = Article::possessive;
      phrase.owner = *owner;
    } else if (random_.percent(20)) {
      phrase.article = Article::demonstrative;
    }
    describe(phrase, 40, 0);
    return phrase;
  };
  const Phrase left = side(first, nullptr);
  const Agreement agreement = left.agreement();
  const Phrase right = side(random_.of(nouns), agreement.human ? &agreement : nullptr);
  const std::string is = left.plural ? "sind" : "ist", english_is = left.plural ? "are" : "is";
  const std::string a = german(left, Case::nominative), b = german(right, Case::nominative);
  const std::string c = english(left), d = english(right);
  switch (random_.weighted({60, 20, 20})) {
    case 0:
      return {words({a, is, comparison.comparative, "als", b}),
              words({c, english_is, comparison.english_comparative, "than", d})};
    case 1:
      return {words({a, is, "so", comparison.positive, "wie", b}),
              words({c, english_is, "as", comparison.english_positive, "as", d})};
    default:
      return {words({a, is, "nicht so", comparison.positive, "wie", b}),
              words({c, english_is, "not as", comparison.english_positive, "as", d})};
  }
}

Text Generator::negated() {
  const Subject who = subject();
  VerbPhrase what;
  switch (random_.weighted({35, 45, who.agreement.human ? 20u : 0u})) {
    case 0:
      what = intransitive(who.agreement);
      what.adverb.clear();
      what.late_adverb.clear();
      what.negation = "nicht";
      add_extras(what, 60, 20);
      break;
    case 1:
      what = transitive(who.agreement, true);
      break;
    default:
      what = wearing(who.agreement, true);
      break;
  }
  if (random_.percent(30)) {
    const Fixed& weather = random_.of(lexicon_.weather_clauses);
    what.after = words({", weil", weather.german});
    what.english_after = words({"because", weather.english});
  }
  return {what.main(who.text.german), words({who.text.english, what.english()})};
}

/// geht in einen Laden, um Brot zu kaufen
Text Generator::purpose() {
  const Subject who = subject();
  if (!who.agreement.human) return {};
  const VerbPhrase what = random_.percent(55) ? motion(who.agreement) : position(who.agreement);
  const VerbPhrase aim = random_.percent(70) ? transitive(who.agreement) : bare(who.agreement);
  return {words({what.main(who.text.german), ", um", aim.with_zu()}),
          words({who.text.english, what.english(), "to", aim.early_adverb, aim.base, aim.english_tail()})};
}

/// Ein Auto wird von einem Mann gewaschen.
Text Generator::passive() {
  const bool human = !random_.percent(15);
  const std::vector<Verb>& verbs = human ? lexicon_.transitive : lexicon_.animal_transitive;
  const Verb* verb = &random_.of(verbs);
  while (*verb->participle == '\0') verb = &random_.of(verbs);
  Phrase agent = person_or_animal(human);
  if (human && random_.percent(25)) agent.after = outfit(agent);
  const Phrase patient = object_of(*verb, agent.agreement());
  if (patient.article == Article::possessive) return {};
  VerbPhrase what;
  what.finite = patient.plural ? "werden" : "wird";
  what.complement = with_preposition("von", agent, Case::dative);
  what.tail = verb->participle;
  what.auxiliary = patient.plural || patient.noun->plural_in_english ? "are" : "is";
  what.head = words({"being", verb->english_participle});
  what.rest = words({"by", english(agent)});
  if (!(patient.noun->domain & (place | room | building | outdoor)) && random_.percent(30))
    set_place(what, location());
  if (random_.percent(25)) set_time(what, time());
  return {what.main(german(patient, Case::nominative)), words({english(patient), what.english()})};
}

/// Ein Hund, den ein Mädchen streichelt, schläft.
Text Generator::relative_object() {
  static const std::vector<Verb> of_animals = {
      {"streichelt", "streicheln", "", "petting", "pet"},
      {"füttert", "füttern", "", "feeding", "feed"},
      {"beobachtet", "beobachten", "", "observing", "observe"},
      {"fotografiert", "fotografieren", "", "photographing", "photograph"},
      {"sucht", "suchen", "", "looking for", "look for"}};
  static const std::vector<Verb> of_people = {{"umarmt", "umarmen", "", "hugging", "hug"},
                                              {"begrüßt", "begrüßen", "", "greeting", "greet"},
                                              {"beobachtet", "beobachten", "", "observing", "observe"},
                                              {"ruft", "rufen", "an", "calling", "call"},
                                              {"holt", "holen", "ab", "picking up", "pick up"}};
  static const std::vector<Verb> of_things = {
      {"sucht", "suchen", "", "looking for", "look for"},
      {"beobachtet", "beobachten", "", "observing", "observe"},
      {"verkauft", "verkaufen", "", "selling", "sell"},
      {"kauft", "kaufen", "", "buying", "buy"},
      {"fotografiert", "fotografieren", "", "photographing", "photograph"}};
  const size_t kind = random_.weighted({35, 35, 30});
  const Phrase actor_phrase = person_or_animal(true);
  const Subject actor = subject_of(actor_phrase);
  Phrase phrase = kind == 2 ? object(noun("upright|flat"), nullptr) : person_or_animal(kind == 1);
  const Agreement agreement = phrase.agreement();
  // "Das Kind, das das Mädchen umarmt": nothing would tell who is hugging whom.
  const bool same_pronoun = agreement.plural || agreement.gender != Gender::masculine;
  if (kind != 2 && same_pronoun && agreement.plural == actor.agreement.plural &&
      german(actor_phrase, Case::accusative) == actor.text.german)
    return {};
  const VerbPhrase inner = begin(random_.of(kind == 0   ? of_animals
                                            : kind == 1 ? of_people
                                                        : of_things),
                                 actor.agreement);
  const std::string pronoun =
      decline(relative_pronouns, agreement.gender, agreement.plural, Case::accusative);
  phrase.after = {words({",", pronoun, inner.last(actor.text.german, false), ","}),
                  words({kind == 1 ? "whom" : "that", actor.text.english, inner.english()})};
  VerbPhrase outer;
  if (kind == 2) {
    const bool stands = phrase.noun->has("upright");
    outer = begin(
        {stands ? "steht" : "liegt", stands ? "stehen" : "liegen", "", stands ? "standing" : "lying", ""},
        agreement);
    set_place(outer, at("auf", noun("surface|ground"), Case::dative, "on"));
  } else {
    outer = action(agreement);
  }
  const Subject who = subject_of(phrase);
  return {outer.main(who.text.german), words({who.text.english, outer.english()})};
}

/// Die Bank, auf der ein Mann sitzt, ist alt.
Text Generator::relative_preposition() {
  const bool seat = random_.percent(50);
  Phrase phrase{noun(seat ? "seat" : "in"), Article::definite};
  const Agreement agreement = phrase.agreement();
  const Subject who = simple_subject(random_.percent(80));
  VerbPhrase inner;
  if (seat)
    inner = begin({"sitzt", "sitzen", "", "sitting", "sit"}, who.agreement);
  else
    inner = intransitive(who.agreement);
  const Fixed& quality = random_.of(lexicon_.predicates);
  const std::string pronoun = decline(relative_pronouns, agreement.gender, false, Case::dative);
  return {words({german(phrase, Case::nominative), ",", seat ? "auf" : "in", pronoun,
                 inner.last(who.text.german, false), ", ist", quality.german}),
          words({english(phrase), seat ? "on which" : "in which", who.text.english, inner.english(), "is",
                 quality.english})};
}

/// Ein Mann, dessen Hund schläft, liest ein Buch.
Text Generator::relative_genitive() {
  Phrase phrase = person_or_animal(true);
  const Agreement agreement = phrase.agreement();
  Phrase belonging{noun_for(random_.percent(60) ? "kin" : "pet", agreement), Article::none};
  belonging.plural = random_.percent(15);
  describe(belonging, 40, 0);
  const VerbPhrase inner =
      random_.percent(60) ? intransitive(belonging.agreement()) : action(belonging.agreement());
  const std::string pronoun = decline(relative_pronouns, agreement.gender, agreement.plural, Case::genitive);
  phrase.after = {words({",", inner.last(words({pronoun, german(belonging, Case::nominative)}), true), ","}),
                  words({"whose", english(belonging), inner.english()})};
  const Subject who = subject_of(phrase);
  const VerbPhrase what = action(agreement);
  return {what.main(who.text.german), words({who.text.english, what.english()})};
}

Text Generator::fragment() {
  Phrase phrase = person_or_animal(true);
  phrase.after = outfit(phrase);
  const Text where = random_.percent(50) ? location() : at("auf", noun("seat"), Case::dative, "on");
  return {words({german(phrase, Case::nominative), where.german}), words({english(phrase), where.english})};
}

/// Der Bruder des kleinen Mädchens ...
Text Generator::genitive_subject() {
  const bool owner = random_.percent(35);
  Phrase head{noun(owner ? "owner" : "kin"), Article::definite};
  head.plural = !owner && random_.percent(15);
  Phrase of = definite_or_indefinite(noun(owner ? "pet|driven|shop" : "human|young"), 65);
  if (!owner && of.noun->has("kin")) return {};
  of.plural = of.article == Article::definite && random_.percent(25);
  head.after = {german(of, Case::genitive), words({"of", english(of)})};
  const Subject who = subject_of(head);
  VerbPhrase what = action(who.agreement);
  return {what.main(who.text.german), words({who.text.english, what.english()})};
}

/// Einer der Männer ..., zwei der Frauen ...
Text Generator::partitive() {
  Phrase whole{noun(random_.percent(70) ? "human|young" : "animal"), Article::definite};
  whole.plural = true;
  describe(whole, 35, 0);
  Agreement agreement = whole.agreement();
  Text who;
  if (random_.percent(60)) {
    agreement.plural = false;
    agreement.pronoun = whole.noun->pronoun;
    who = {words({std::string("ein") + decline(dieser_endings, whole.noun->gender, false, Case::nominative),
                  german(whole, Case::genitive)}),
           words({"one of", english(whole)})};
  } else {
    const Fixed& number = lexicon_.numbers[random_.below(3)];
    who = {words({number.german, german(whole, Case::genitive)}),
           words({number.english, "of", english(whole)})};
  }
  const VerbPhrase what = action(agreement);
  return {what.main(who.german), words({who.english, what.english()})};
}

/// Commas and the final period, attached; the first letter a capital.
std::string finished(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == ',') {
      while (out.ends_with(' ')) out.pop_back();
      if (out.ends_with(',')) continue;
    }
    out += text[i];
  }
  while (out.ends_with(',') || out.ends_with(' ')) out.pop_back();
  if (out[0] >= 'a' && out[0] <= 'z') out[0] = static_cast<char>(out[0] - 'a' + 'A');
  return out + '.';
}

size_t word_count(const std::string& text) {
  return static_cast<size_t>(std::count(text.begin(), text.end(), ' ')) + 1;
}

Text Generator::sentence(bool& novel) {
  struct Template {
    uint64_t weight;
    Text (Generator::*make)();
  };
  static constexpr std::array<Template, 21> templates = {{{24, &Generator::statement},
                                                          {15, &Generator::fronted},
                                                          {8, &Generator::relative_subject},
                                                          {5, &Generator::during},
                                                          {4, &Generator::during_first},
                                                          {6, &Generator::reason},
                                                          {4, &Generator::that_clause},
                                                          {7, &Generator::coordinated},
                                                          {3, &Generator::pronoun_object},
                                                          {3, &Generator::contrast},
                                                          {7, &Generator::existential},
                                                          {3, &Generator::comparison},
                                                          {4, &Generator::negated},
                                                          {3, &Generator::purpose},
                                                          {5, &Generator::passive},
                                                          {3, &Generator::relative_object},
                                                          {2, &Generator::relative_preposition},
                                                          {2, &Generator::relative_genitive},
                                                          {4, &Generator::fragment},
                                                          {3, &Generator::genitive_subject},
                                                          {2, &Generator::partitive}}};
  static constexpr uint64_t total = [] {
    uint64_t sum = 0;
    for (const Template& t : templates) sum += t.weight;
    return sum;
  }();
  for (;;) {
    novel_ = false;
    uint64_t left = random_.below(total);
    size_t index = 0;
    for (; left >= templates[index].weight; ++index) left -= templates[index].weight;
    Text text = (this->*templates[index].make)();
    if (text.german.empty()) continue;
    text = {finished(text.german), finished(text.english)};
    const auto [fewest, most] = std::minmax({word_count(text.german), word_count(text.english)});
    if (fewest < min_words || most > max_words) continue;
    novel = novel_;
    return text;
  }
}

}  // namespace

Captions generate_captions(int64_t pairs, uint64_t seed) {
  if (pairs < min_pairs || pairs > max_pairs)
    throw Error("cannot generate " + std::to_string(pairs) + " caption pairs: give a number from " +
                std::to_string(min_pairs) + " to " + std::to_string(max_pairs));
  const int64_t held_out = std::max<int64_t>(1, pairs / 40);
  Generator generator(seed);
  std::unordered_set<std::string> seen;
  seen.reserve(static_cast<size_t>(2 * pairs));
  Captions captions;
  // Ends a search that finds nothing new any more.
  int64_t attempts_left = 100 * pairs + 10000;
  const auto fill = [&](ParallelText& split, int64_t count, auto&& wanted) {
    while (static_cast<int64_t>(split.source.size()) < count) {
      if (--attempts_left < 0)
        throw Error("the caption grammar has not enough distinct sentences for " + std::to_string(pairs) +
                    " pairs: ask for fewer");
      bool novel = false;
      Text text = generator.sentence(novel);
      if (!wanted(novel, split.source.size())) continue;
      // Both sides are new, so that no split shares a sentence with another. The prefix keeps a
      // German sentence apart from an English one.
      std::string german = "de:" + text.german, english = "en:" + text.english;
      if (seen.contains(german) || seen.contains(english)) continue;
      seen.insert(std::move(german));
      seen.insert(std::move(english));
      split.source.push_back(std::move(text.german));
      split.target.push_back(std::move(text.english));
    }
  };
  const auto training = [](bool novel, size_t) { return !novel; };
  // Every other held-out sentence has a combination of words that training never shows.
  const auto testing = [](bool novel, size_t index) { return index % 2 == 1 || novel; };
  fill(captions.test, held_out, testing);
  fill(captions.validation, held_out, testing);
  fill(captions.train, pairs - 2 * held_out, training);
  return captions;
}

}  // namespace remnant::app
