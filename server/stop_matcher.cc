#include "server/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace deltanet {
namespace {

std::vector<size_t> BordersOf(const std::string& text) {
  std::vector<size_t> border(text.size());
  for (size_t i = 1, matched = 0; i < text.size(); ++i) {
    while (matched > 0 && text[matched] != text[i]) matched = border[matched - 1];
    if (text[matched] == text[i]) ++matched;
    border[i] = matched;
  }
  return border;
}

}  // namespace

StopMatcher::StopMatcher(std::vector<std::string> stops) {
  for (std::string& stop : stops) {
    std::vector<size_t> border = BordersOf(stop);
    stops_.push_back({std::move(stop), std::move(border)});
  }
}

std::optional<size_t> StopMatcher::Append(absl::string_view piece, std::string* text) {
  size_t held = held_.size();  // At the end of what is in held_ and the part of `piece` that has been seen.
  held_.append(piece.data(), piece.size());
  const size_t first = held_.size() - piece.size();
  for (size_t i = first; i < held_.size(); ++i) {
    const char c = held_[i];
    std::optional<size_t> found;
    held = 0;
    for (size_t s = 0; s < stops_.size(); ++s) {
      Stop& stop = stops_[s];
      while (stop.matched > 0 && stop.text[stop.matched] != c) stop.matched = stop.border[stop.matched - 1];
      if (stop.text[stop.matched] == c) ++stop.matched;
      if (stop.matched == stop.text.size() &&
          (!found.has_value() || stop.text.size() > stops_[*found].text.size())) {
        found = s;
      }
      held = std::max(held, stop.matched);
    }
    if (found.has_value()) {
      text->append(held_, 0, i + 1 - stops_[*found].text.size());
      held_.clear();
      return found;
    }
  }
  text->append(held_, 0, held_.size() - held);
  held_.erase(0, held_.size() - held);
  return std::nullopt;
}

void StopMatcher::Finish(std::string* text) {
  text->append(held_);
  held_.clear();
}

}  // namespace deltanet
