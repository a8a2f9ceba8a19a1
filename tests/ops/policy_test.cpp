#include <remnant/policy.h>

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

namespace remnant {
namespace {

std::string error_of(const std::string& text) {
  try {
    Policy::parse(text);
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

TEST(Policy, WrittenFormRoundTrips) {
  for (const Policy& policy :
       {Policy::exact(), Policy::recompute(), Policy::curve(4), Policy::curve(20, true), Policy::quantized(2),
        Policy::quantized(8), Policy::sampled(), Policy::sampled(7), Policy::top(), Policy::top(7)}) {
    EXPECT_EQ(Policy::parse(policy.str()), policy) << policy.str();
  }
  EXPECT_EQ(Policy::curve(4).str(), "curve:m=4");
  EXPECT_EQ(Policy::curve(4, true).str(), "curve:m=4,paper_text");
  EXPECT_EQ(Policy::quantized(4).str(), "quantized:bits=4");
  EXPECT_EQ(Policy::sampled(64).str(), "sampled:m=64");
  EXPECT_EQ(Policy::parse("curve"), Policy::curve(5));
  EXPECT_EQ(Policy::parse("sampled"), Policy::sampled(128));
  EXPECT_EQ(Policy::top(64).str(), "top:m=64");
  EXPECT_EQ(Policy::parse("top"), Policy::top(32));
}

TEST(Policy, MistakesNameTheNearest) {
  EXPECT_NE(error_of("recomputed").find("did you mean 'recompute'"), std::string::npos);
  EXPECT_NE(error_of("curv:m=4").find("did you mean 'curve'"), std::string::npos);
  EXPECT_NE(error_of("quantized:bit=4").find("did you mean 'bits'"), std::string::npos);
  EXPECT_NE(error_of("quantized:bits=3").find("must be 2, 4 or 8, got 3"), std::string::npos);
  EXPECT_NE(error_of("curve:m=0").find("at least 1, got 0"), std::string::npos);
  EXPECT_NE(error_of("sample:m=4").find("did you mean 'sampled'"), std::string::npos);
  EXPECT_NE(error_of("sampled:m=0").find("policy sampled: m must be at least 1, got 0"), std::string::npos);
  EXPECT_NE(error_of("top:m=0").find("policy top: m must be at least 1, got 0"), std::string::npos);
  EXPECT_NE(error_of("sampled:n=4").find("did you mean 'm'"), std::string::npos);
  EXPECT_NE(error_of("nothing").find("sampled:m=128"), std::string::npos);
  EXPECT_NE(error_of("curve:m=four").find("whole number, got 'four'"), std::string::npos);
  EXPECT_NE(error_of("curve:m").find("needs a value"), std::string::npos);
  EXPECT_NE(error_of("curve:paper_text=1").find("takes no value"), std::string::npos);
}

TEST(Policy, RefusesWhatDoesNotParse) {
  for (const char* text : {"", ":", "exact:", "exact:m=1", "curve:", "curve:m=4,", "curve:m=", "curve:m=4x",
                           "curve:bits=4", "quantized:m=4", "sampled:", "sampled:m=4,paper_text",
                           "sampled:bits=4", "top:", "top:bits=4", "EXACT", "curve:m=99999999999999999999"}) {
    EXPECT_NE(error_of(text), "") << text;
  }
}

}  // namespace
}  // namespace remnant
