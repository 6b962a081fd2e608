// Finds stop strings in a text that comes in pieces, and says how much of it may be sent before it is known
// whether one is there.
#ifndef DELTANET_SERVER_STOP_MATCHER_H_
#define DELTANET_SERVER_STOP_MATCHER_H_

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace deltanet {

// Of several strings the one that is complete first counts, of those that are complete at once the longest:
// so how the text is cut into pieces makes no difference. Whole characters in, whole characters out.
// Thread-compatible.
class StopMatcher {
 public:
  // None of `stops` is empty.
  explicit StopMatcher(std::vector<std::string> stops);

  // Takes the next piece and appends to `text` what is no part of a stop string, whatever comes. The number
  // of the string that the text now has: what is before it has been appended, what follows is dropped, and
  // nothing may be taken any more.
  std::optional<size_t> Append(absl::string_view piece, std::string* text);
  // The end: appends what was held back.
  void Finish(std::string* text);

 private:
  // Knuth, Morris and Pratt's automaton.
  struct Stop {
    std::string text;
    std::vector<size_t> border;  // Of each prefix, the longest proper prefix that it also ends with.
    size_t matched = 0;          // The longest prefix of `text` that the text so far ends with.
  };

  std::vector<Stop> stops_;
  std::string held_;  // The end of the text so far that could be the start of a stop string.
};

}  // namespace deltanet

#endif  // DELTANET_SERVER_STOP_MATCHER_H_
