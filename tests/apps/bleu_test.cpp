#include "common/bleu.h"

#include "common/error.h"

#include <gtest/gtest.h>

#include <cmath>

namespace remnant::app {
namespace {

using Sentences = std::vector<std::string>;

Bleu words(const Sentences& hypotheses, const Sentences& references) {
  return corpus_bleu(hypotheses, references, BleuTokenizer::none, false);
}

// The words that the 13a tokenizer makes of `sentence` are `expected`'s: everything matches.
void expect_tokens(const std::string& sentence, const std::string& expected) {
  const std::string padding = " a b c d";  // so that the longer n-grams exist
  const Bleu bleu = corpus_bleu({sentence + padding}, {expected + padding}, BleuTokenizer::mteval_13a, false);
  const Bleu plain = words({expected}, {expected});
  EXPECT_NEAR(bleu.score, 100, 1e-9) << sentence;
  EXPECT_EQ(bleu.hypothesis_length, plain.hypothesis_length + 4) << sentence;
}

TEST(Bleu, EqualTextScoresAHundred) {
  const Bleu bleu = words({"a man rides a red bike", "two dogs play in snow"},
                          {"a man rides a red bike", "two dogs play in snow"});
  EXPECT_NEAR(bleu.score, 100, 1e-9);
  EXPECT_EQ(bleu.brevity_penalty, 1);
  EXPECT_EQ(bleu.hypothesis_length, 11);
  EXPECT_EQ(bleu.reference_length, 11);
}

TEST(Bleu, ClipsRepeatedWords) {
  // "the" counts twice, as often as the reference has it; no longer n-gram matches.
  const Bleu bleu = words({"the the the the the the the"}, {"the cat is on the mat"});
  EXPECT_NEAR(bleu.precisions[0], 100.0 * 2 / 7, 1e-12);
  EXPECT_NEAR(bleu.precisions[1], 100.0 / (2 * 6), 1e-12);
  EXPECT_NEAR(bleu.precisions[2], 100.0 / (4 * 5), 1e-12);
  EXPECT_NEAR(bleu.precisions[3], 100.0 / (8 * 4), 1e-12);
  const double product = bleu.precisions[0] * bleu.precisions[1] * bleu.precisions[2] * bleu.precisions[3];
  EXPECT_NEAR(bleu.score, std::pow(product, 0.25), 1e-9);
}

TEST(Bleu, CountsOverTheCorpusNotTheSentence) {
  // 1-grams 4 of 8, 2-grams 3 of 6, 3-grams 2 of 4, 4-grams 1 of 2: each precision is a half.
  const Bleu bleu = words({"a b c d", "p q r s"}, {"a b c d", "t u v w"});
  for (const double precision : bleu.precisions) EXPECT_NEAR(precision, 50, 1e-12);
  EXPECT_NEAR(bleu.score, 50, 1e-9);
}

TEST(Bleu, PenalisesShortHypotheses) {
  const Bleu bleu = words({"a b c d e"}, {"a b c d e f g h i j"});
  EXPECT_NEAR(bleu.brevity_penalty, std::exp(1.0 - 10.0 / 5.0), 1e-12);
  EXPECT_NEAR(bleu.score, 100 * std::exp(-1.0), 1e-9);
  EXPECT_EQ(words({"a b c d e f g h i j"}, {"a b c d e"}).brevity_penalty, 1);
}

TEST(Bleu, HasNoScoreWithoutCommonOrLongEnoughText) {
  EXPECT_EQ(words({""}, {"a b c d"}).score, 0);
  EXPECT_EQ(words({""}, {"a b c d"}).brevity_penalty, 0);
  EXPECT_EQ(words({"a b c d"}, {"e f g h"}).score, 0);
  EXPECT_EQ(words({"a b c"}, {"a b c"}).score, 0);
  EXPECT_EQ(words({}, {}).score, 0);
  // An empty line among others only costs length.
  EXPECT_GT(words({"", "a b c d"}, {"x", "a b c d"}).score, 0);
}

TEST(Bleu, TokenizesLikeMteval13a) {
  expect_tokens("Hello, world!", "Hello , world !");
  expect_tokens("It costs 1,000.50 euros.", "It costs 1,000.50 euros .");
  expect_tokens("5-year-old well-known", "5 - year-old well-known");
  expect_tokens("a man's (old) \"hat\"", "a man's ( old ) \" hat \"");
  expect_tokens("x &amp; y &lt;b&gt; &quot;q&quot;", "x & y < b > \" q \"");
  expect_tokens("and/or #1 50% a_b", "and / or # 1 50 % a _ b");
  expect_tokens("wait...", "wait . . .");
  expect_tokens("Straße, über.", "Straße , über .");
  expect_tokens("a <skipped> b", "a b");
  expect_tokens("a\u00a0b\u3000c", "a b c");
}

TEST(Bleu, TokenizerNoneLeavesPunctuationAttached) {
  EXPECT_EQ(words({"Hello, world!"}, {"x"}).hypothesis_length, 2);
  EXPECT_EQ(corpus_bleu({"Hello, world!"}, {"x"}, BleuTokenizer::mteval_13a, false).hypothesis_length, 4);
}

TEST(Bleu, LowercasesAllOfUnicode) {
  // A sigma at the end of a word has a form of its own, and the capital sharp s has a small one.
  const Sentences capitals = {"EIN GROẞER ÄRMEL ΟΔΟΣ"}, small = {"ein großer ärmel οδο\u03c2"};
  EXPECT_EQ(corpus_bleu(capitals, small, BleuTokenizer::none, false).score, 0);
  EXPECT_NEAR(corpus_bleu(capitals, small, BleuTokenizer::none, true).score, 100, 1e-9);
}

TEST(Bleu, NamesItsSettings) {
  EXPECT_EQ(corpus_bleu({"a"}, {"a"}, BleuTokenizer::mteval_13a, true).signature,
            "BLEU|nrefs:1|case:lc|eff:no|tok:13a|smooth:exp");
  EXPECT_EQ(corpus_bleu({"a"}, {"a"}, BleuTokenizer::none, false).signature,
            "BLEU|nrefs:1|case:mixed|eff:no|tok:none|smooth:exp");
}

TEST(Bleu, RefusesUnequalSizes) {
  try {
    words({"a", "b"}, {"a"});
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "BLEU needs one reference for each hypothesis, got 2 hypotheses and 1 references");
  }
}

}  // namespace
}  // namespace remnant::app
