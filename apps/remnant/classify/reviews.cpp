#include "classify/reviews.h"

#include <algorithm>
#include <array>
#include <random>
#include <span>
#include <string_view>
#include <unordered_set>
#include <utility>

namespace remnant::app::classify {
namespace {

using Words = std::span<const char* const>;

constexpr const char* kGood[] = {"wonderful", "gripping",   "clever", "moving",
                                 "brilliant", "charming",   "funny",  "beautiful",
                                 "elegant",   "convincing", "superb", "delightful"};
constexpr const char* kBad[] = {"boring", "clumsy", "dull",     "predictable", "tedious",   "shallow",
                                "awful",  "silly",  "careless", "annoying",    "pointless", "lifeless"};
constexpr const char* kAspects[] = {"the acting",   "the plot",       "the ending",    "the music",
                                    "the dialogue", "the camera",     "the story",     "the script",
                                    "the opening",  "the whole film", "the last hour", "the editing"};
constexpr const char* kNames[] = {"Anna",  "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo",
                                  "Irene", "Jonas", "Karla", "Leon",  "Maria", "Nils",  "Olga",  "Peter"};
constexpr const char* kRoles[] = {"a baker",     "a detective", "a teacher",   "a pilot",
                                  "a nurse",     "a violinist", "a fisherman", "a mechanic",
                                  "a librarian", "a farmer",    "a judge",     "a waiter"};
constexpr const char* kPlaces[] = {
    "a small town by the sea", "Lisbon", "a village in the mountains", "Vienna", "an old hotel",   "Montreal",
    "a railway station",       "Oslo",   "a suburb of Chicago",        "Naples", "a quiet island", "Prague"};
constexpr const char* kTimes[] = {"in the winter of 1952", "one summer",       "after the war",
                                  "in the near future",    "on a rainy night", "in 1978",
                                  "before Christmas",      "during a strike"};
constexpr const char* kEvents[] = {"finds a letter in a drawer",     "loses the keys to the house",
                                   "misses the last train",          "inherits a bicycle shop",
                                   "meets a friend from school",     "is asked to sell the garden",
                                   "hears a voice on the telephone", "has to repair a boat",
                                   "buys a painting at a market",    "moves in with a cousin"};
constexpr const char* kDays[] = {"Monday", "Tuesday",  "Wednesday", "Thursday",
                                 "Friday", "Saturday", "Sunday"};
constexpr const char* kCompany[] = {"my sister",   "two friends", "my neighbour",
                                    "a colleague", "my parents",  "nobody"};

std::string with_article(const std::string& word) {
  return (std::string_view("aeiou").find(word[0]) == std::string_view::npos ? "a " : "an ") + word;
}

/// One review's random choices.
class Writer {
 public:
  explicit Writer(std::mt19937_64& random) : random_(random) {}

  std::string review(bool positive) {
    const uint64_t opinions = 2 + below(3), length = 5 + below(6);
    std::vector<bool> is_opinion(length, false);
    for (uint64_t i = 0; i < opinions; ++i) is_opinion[below(length)] = true;
    std::string text;
    for (const bool opinion_here : is_opinion) {
      std::string sentence = opinion_here ? opinion(positive) : fact();
      if (sentence[0] >= 'a' && sentence[0] <= 'z') sentence[0] = static_cast<char>(sentence[0] - 'a' + 'A');
      if (!text.empty()) text += ' ';
      text += sentence;
    }
    return text;
  }

 private:
  uint64_t below(uint64_t count) { return random_() % count; }
  std::string one_of(Words words) { return words[below(words.size())]; }

  std::string opinion(bool positive) {
    const std::string said = one_of(positive ? kGood : kBad), opposite = one_of(positive ? kBad : kGood);
    const std::string aspect = one_of(kAspects);
    if (below(4) == 0) {
      switch (below(3)) {
        case 0:
          return aspect + " is not " + opposite + " at all.";
        case 1:
          return "nobody would call " + aspect + " " + opposite + ".";
        default:
          return "I do not think that " + aspect + " is " + opposite + ".";
      }
    }
    switch (below(6)) {
      case 0:
        return aspect + " is " + said + ".";
      case 1:
        return "I found " + aspect + " " + said + ".";
      case 2:
        return "this is " + with_article(said) + " film.";
      case 3:
        return "most of all " + aspect + " is " + said + ".";
      case 4:
        return "friends had told me that " + aspect + " was " + opposite + ", but it is " + said + ".";
      default:
        return "I must say that " + aspect + " is really " + said + ".";
    }
  }

  std::string fact() {
    switch (below(11)) {
      case 0:
        return "the story begins in " + one_of(kPlaces) + " " + one_of(kTimes) + ".";
      case 1:
        return one_of(kNames) + " is " + one_of(kRoles) + " who " + one_of(kEvents) + ".";
      case 2:
        return one_of(kNames) + " does not know that " + one_of(kNames) + " is " + one_of(kRoles) + ".";
      case 3:
        return "I saw it on a " + one_of(kDays) + " with " + one_of(kCompany) + ".";
      case 4:
        return "the film lasts " + std::to_string(80 + below(80)) + " minutes.";
      case 5:
        return one_of(kTimes) + " " + one_of(kNames) + " " + one_of(kEvents) + ".";
      case 6:
        return "it was not shown in " + one_of(kPlaces) + " before " + one_of(kDays) + ".";
      case 7:
        return "then " + one_of(kNames) + " and " + one_of(kNames) + " travel to " + one_of(kPlaces) + ".";
      case 8:
        return "nobody tells " + one_of(kNames) + " why " + one_of(kNames) + " " + one_of(kEvents) + ".";
      case 9:
        return "half of the scenes were filmed in " + one_of(kPlaces) + ".";
      default:
        return one_of(kNames) + " also plays " + one_of(kRoles) + " from " + one_of(kPlaces) + ".";
    }
  }

  std::mt19937_64& random_;
};

}  // namespace

std::vector<Review> generate_reviews(int64_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<Review> reviews;
  std::unordered_set<std::string> seen;
  for (int64_t i = 0; i < count; ++i) {
    const bool positive = i % 2 == 1;
    std::string text = Writer(random).review(positive);
    while (!seen.insert(text).second) text = Writer(random).review(positive);
    reviews.push_back({positive ? "positive" : "negative", std::move(text)});
  }
  return reviews;
}

}  // namespace remnant::app::classify
