#pragma once

// The words that captions.cpp composes sentences from. Private to the caption generator.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace remnant::app::captions {

enum class Gender { masculine, feminine, neuter };

/// What a noun denotes; decides which adjectives may go with it, and how they are translated.
enum Domain : uint32_t {
  person = 1,
  animal = 2,
  clothing = 4,
  thing = 8,
  vehicle = 16,
  food = 32,
  drink = 64,
  place = 128,
  building = 256,
  furniture = 512,
  hair = 1024,
  outdoor = 2048,
  room = 4096,
  no_domain = 0,
};

struct Noun {
  Gender gender;
  std::string singular, plural;
  std::string english, english_plural;
  uint32_t domain;
  std::vector<std::string> tags;
  std::string oblique;             ///< n-declension: "n" or "en" in every case but the nominative
  bool adjectival = false;         ///< declined like an adjective; `singular` is then the stem
  bool mass = false;               ///< no article, no plural
  bool plural_in_english = false;  ///< eine Hose: pants
  char pronoun = 'i';              ///< he, she, it by first letter

  bool has(std::string_view tag) const;
};

struct Adjective {
  const char* stem;  ///< what an ending is added to: "dunkl" of "dunkel"
  const char* english;
  uint32_t domains;
  int order;  ///< place in a row of adjectives, alike in both languages: size, age, colour
  bool invariant = false;
};

struct Comparison {
  const char* comparative;
  const char* positive;
  const char* english_comparative;
  const char* english_positive;
  uint32_t domains;
};

/// A verb of one frame (see captions.cpp). `objects` names noun tags, "a|b" for either.
struct Verb {
  const char* third;       ///< third person singular, without the separable part
  const char* infinitive;  ///< likewise; equals the third person plural
  const char* particle;    ///< separable part or ""
  const char* gerund;
  const char* base;
  const char* objects = "";
  const char* adverbs = "";     ///< letters of the manner adverbs that fit
  const char* participle = "";  ///< for the passive; "" if not used there
  const char* english_participle = "";
  bool reflexive = false;
};

/// Verb with a preposition of its own: wartet auf + accusative, "waiting for".
struct PrepositionalVerb {
  Verb verb;
  const char* preposition;
  bool dative;
  const char* english_preposition;  ///< "" if the object follows the verb directly
  bool for_animals;
};

/// Words that are fixed in both languages.
struct Fixed {
  const char* german;
  const char* english;
};

/// The verb's last word is an object without article or an infinitive: spielt ... Fußball.
struct BareComplement {
  const char* third;
  const char* infinitive;
  const char* complement;
  const char* gerund;
  const char* base;
};

struct Adverb {
  char letter;
  const char* german;
  const char* english;
};

struct Whole {
  const char* part;   ///< tag of one noun
  const char* whole;  ///< tag
};

class Lexicon {
 public:
  static const Lexicon& instance();

  const std::vector<Noun>& nouns() const { return nouns_; }
  /// Nouns that have one of the tags in "a|b".
  std::vector<const Noun*> with(std::string_view tags) const;

  std::vector<Adjective> adjectives;
  std::vector<Comparison> comparisons;
  std::vector<Verb> intransitive, animal_intransitive, reciprocal, transitive, animal_transitive, dative,
      ditransitive, position, motion, caused_motion, stative, body;
  std::vector<PrepositionalVerb> prepositional;
  std::vector<BareComplement> bare;
  std::vector<Adverb> adverbs;
  std::vector<Fixed> times, weather_clauses, occasions, states, numbers, day_adjectives, days, predicates;
  std::vector<Whole> wholes;

 private:
  Lexicon();
  void add_nouns();
  void add_compounds();
  void add_adjectives();
  void add_verbs();
  void add_phrases();
  std::vector<Noun> nouns_;
};

}  // namespace remnant::app::captions
