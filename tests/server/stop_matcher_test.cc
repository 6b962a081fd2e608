#include "server/stop_matcher.h"

#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace deltanet {
namespace {

using ::testing::ElementsAre;

struct Outcome {
  std::string text;
  std::optional<size_t> stop;
  bool operator==(const Outcome&) const = default;
};

std::ostream& operator<<(std::ostream& out, const Outcome& outcome) {
  return out << "\"" << outcome.text << "\", stop " << (outcome.stop ? static_cast<int>(*outcome.stop) : -1);
}

// Looks at every end: the first at which a stop string is complete, the longest one there.
Outcome Naive(const std::string& text, const std::vector<std::string>& stops) {
  for (size_t end = 1; end <= text.size(); ++end) {
    std::optional<size_t> found;
    for (size_t s = 0; s < stops.size(); ++s) {
      if (absl::EndsWith(text.substr(0, end), stops[s]) &&
          (!found || stops[s].size() > stops[*found].size())) {
        found = s;
      }
    }
    if (found) return {text.substr(0, end - stops[*found].size()), found};
  }
  return {text, std::nullopt};
}

// The longest end of `text` that a stop string begins with.
std::string CouldBegin(const std::string& text, const std::vector<std::string>& stops) {
  for (size_t begin = 0; begin < text.size(); ++begin) {
    for (const std::string& stop : stops) {
      if (absl::StartsWith(stop, text.substr(begin))) return text.substr(begin);
    }
  }
  return "";
}

// `cuts`: bit i says that a new piece begins before byte i + 1.
Outcome InPieces(const std::string& text, const std::vector<std::string>& stops, uint32_t cuts) {
  StopMatcher matcher(stops);
  Outcome outcome;
  size_t begin = 0;
  for (size_t end = 1; end <= text.size(); ++end) {
    if (end < text.size() && (cuts >> (end - 1) & 1) == 0) continue;
    outcome.stop = matcher.Append(text.substr(begin, end - begin), &outcome.text);
    if (outcome.stop) return outcome;
    // All that can be sent has been, and no more.
    EXPECT_EQ(outcome.text + CouldBegin(text.substr(0, end), stops), text.substr(0, end));
    begin = end;
  }
  matcher.Finish(&outcome.text);
  return outcome;
}

TEST(StopMatcherTest, AgreesWithANaiveSearchInEverySplit) {
  std::mt19937 random(3);
  const auto word = [&](size_t most) {
    std::string text(1 + random() % most, 'a');
    for (char& c : text) c = static_cast<char>('a' + random() % 2);  // So that prefixes overlap.
    return text;
  };
  int found = 0;
  for (int i = 0; i < 600; ++i) {
    std::vector<std::string> stops(1 + random() % 3);
    for (std::string& stop : stops) stop = word(5) + (random() % 2 == 0 ? "c" : "");
    std::string text = word(9);
    if (random() % 2 == 0) text.insert(random() % text.size(), 1, 'c');
    const Outcome expected = Naive(text, stops);
    found += expected.stop.has_value();
    for (uint32_t cuts = 0; cuts < uint32_t{1} << (text.size() - 1); ++cuts) {
      ASSERT_EQ(InPieces(text, stops, cuts), expected) << text << ", " << ::testing::PrintToString(stops);
    }
  }
  EXPECT_GT(found, 100);
  EXPECT_LT(found, 500);
}

TEST(StopMatcherTest, LongTextsInRandomPieces) {
  std::mt19937 random(4);
  const std::vector<std::string> stops = {"abababac", "</s>", "aabaaab\n"};
  for (int i = 0; i < 200; ++i) {
    std::string text;
    while (text.size() < 300)
      text += std::vector<const char*>{"ab", "aab", "</", "s", ">", "aaab"}[random() % 6];
    if (i % 2 == 0) text += "aabaaab\nand more";
    const Outcome expected = Naive(text, stops);
    StopMatcher matcher(stops);
    Outcome outcome;
    for (size_t begin = 0; begin < text.size() && !outcome.stop;) {
      const size_t size = random() % 7;
      outcome.stop = matcher.Append(absl::string_view(text).substr(begin, size), &outcome.text);
      begin += size;
    }
    if (!outcome.stop) matcher.Finish(&outcome.text);
    ASSERT_EQ(outcome, expected);
  }
}

TEST(StopMatcherTest, HoldsBackOnlyWhatCouldBeAStart) {
  StopMatcher matcher({"\n\nQ:", "END"});
  std::vector<std::string> given(6);
  matcher.Append("one\n", &given[0]);
  matcher.Append("two\n\n", &given[1]);
  matcher.Append("Q", &given[2]);
  matcher.Append("E", &given[3]);
  matcher.Append("N.", &given[4]);
  EXPECT_EQ(matcher.Append("\n\nQ: what", &given[5]), 0u);
  EXPECT_THAT(given, ElementsAre("one", "\ntwo", "", "\n\nQ", "EN.", ""));
}

TEST(StopMatcherTest, CharactersStayWhole) {
  StopMatcher matcher({"é!"});  // é and è begin with the same byte.
  std::string text;
  EXPECT_FALSE(matcher.Append("è", &text).has_value());
  EXPECT_EQ(text, "è");
  EXPECT_FALSE(matcher.Append("é", &text).has_value());
  EXPECT_EQ(text, "è");
  EXPECT_EQ(matcher.Append("!", &text), 0u);
  EXPECT_EQ(text, "è");
}

TEST(StopMatcherTest, WithoutStringsEverythingPasses) {
  StopMatcher matcher({});
  std::string text;
  EXPECT_FALSE(matcher.Append("all of it", &text).has_value());
  EXPECT_EQ(text, "all of it");
}

}  // namespace
}  // namespace deltanet
