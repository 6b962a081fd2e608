#include "server/tokenizer.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <fstream>
#include <limits>
#include <optional>
#include <queue>
#include <sstream>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "deltanet/tokenizer/sentencepiece.pb.h"
#include "model/base/status_macros.h"

namespace deltanet {
namespace {

using tokenizer::NormalizerSpec;
using tokenizer::Piece;
using tokenizer::TrainerSpec;

constexpr char kReplacement[] = "\xEF\xBF\xBD";  // U+FFFD
constexpr char kSpace[] = "\xE2\x96\x81";        // U+2581, which stands for a space in pieces.
constexpr size_t kSpaceBytes = sizeof(kSpace) - 1;

// A character that no piece has scores so much below the worst piece.
constexpr float kUnknownPenalty = 10;

bool IsTrail(char c) { return (static_cast<unsigned char>(c) & 0xC0) == 0x80; }

// Length of the character that begins with this byte, as the byte alone says.
size_t LengthByLead(char c) {
  const unsigned char lead = static_cast<unsigned char>(c);
  if (lead < 0xC0) return 1;
  return lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
}

// Of well-formed text, the length of the first character.
size_t CharacterLength(std::string_view text) { return std::min(text.size(), LengthByLead(text[0])); }

// Where the first byte is that is not UTF-8, if there is one.
std::optional<size_t> FindInvalid(absl::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const int length = Utf8Length(text.substr(i));
    if (length <= 0) return i;
    i += length;
  }
  return std::nullopt;
}

// Strings in order, to find those that a text begins with.
class PrefixTable {
 public:
  // `words` outlive this.
  void Add(std::string_view word, int id) { words_.emplace_back(word, id); }
  void Finish() { std::sort(words_.begin(), words_.end()); }

  // Calls found(length, id) for each word that `text` begins with, the shorter ones first.
  template <typename Found>
  void ForEachPrefix(std::string_view text, Found found) const {
    auto begin = words_.begin(), end = words_.end();
    for (size_t depth = 0; depth < text.size() && begin != end; ++depth) {
      // Of those that agree so far, the ones that go on with the next byte.
      const unsigned char next = static_cast<unsigned char>(text[depth]);
      begin = std::partition_point(begin, end, [&](const auto& word) {
        return word.first.size() <= depth || static_cast<unsigned char>(word.first[depth]) < next;
      });
      end = std::partition_point(begin, end, [&](const auto& word) {
        return static_cast<unsigned char>(word.first[depth]) == next;
      });
      if (begin != end && begin->first.size() == depth + 1) found(depth + 1, begin->second);
    }
  }

  // The length of the longest such word; 0: none.
  size_t LongestPrefix(std::string_view text) const {
    size_t longest = 0;
    ForEachPrefix(text, [&](size_t length, int) { longest = length; });
    return longest;
  }

  bool empty() const { return words_.empty(); }

 private:
  std::vector<std::pair<std::string_view, int>> words_;
};

// The replacements of a normalizer: which strings become which. The file has them as the size in bytes of a
// double-array trie (Aoe, 1989) in 32 bits, the trie in units of 32 bits, and the strings, each ended by a
// zero. All little-endian. Reads nothing outside of itself, whatever the file says.
class Replacements {
 public:
  absl::Status Read(const std::string& content) {
    if (content.empty()) return absl::OkStatus();
    uint32_t trie_bytes = 0;
    if (content.size() < sizeof(trie_bytes)) return Bad(content.size());
    std::memcpy(&trie_bytes, content.data(), sizeof(trie_bytes));
    if (trie_bytes % sizeof(uint32_t) != 0 || trie_bytes > content.size() - sizeof(trie_bytes)) {
      return Bad(content.size());
    }
    units_.resize(trie_bytes / sizeof(uint32_t));
    std::memcpy(units_.data(), content.data() + sizeof(trie_bytes), trie_bytes);
    strings_ = content.substr(sizeof(trie_bytes) + trie_bytes);
    if (units_.empty() || strings_.empty() || strings_.back() != '\0') return Bad(content.size());
    return absl::OkStatus();
  }

  // The longest string that `text` begins with and that is replaced, and what by.
  std::optional<std::pair<size_t, std::string_view>> Find(std::string_view text) const {
    std::optional<std::pair<size_t, std::string_view>> found;
    if (units_.empty()) return found;
    size_t node = Offset(units_[0]);
    for (size_t i = 0; i < text.size(); ++i) {
      const unsigned char label = static_cast<unsigned char>(text[i]);
      node ^= label;
      if (node >= units_.size() || Label(units_[node]) != label) break;
      const uint32_t unit = units_[node];
      node ^= Offset(unit);
      if (!HasLeaf(unit)) continue;
      if (node >= units_.size()) break;
      const size_t place = units_[node] & 0x7FFFFFFF;
      if (place >= strings_.size()) break;
      found.emplace(i + 1, std::string_view(strings_.data() + place));
    }
    return found;
  }

 private:
  static absl::Status Bad(size_t bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("the normalizer's replacements, ", bytes, " bytes, are not well-formed"));
  }
  static bool HasLeaf(uint32_t unit) { return (unit >> 8 & 1) != 0; }
  static uint32_t Label(uint32_t unit) { return unit & 0x800000FF; }
  static size_t Offset(uint32_t unit) { return size_t{unit >> 10} << ((unit & 0x200) >> 6); }

  std::vector<uint32_t> units_;
  std::string strings_;
};

}  // namespace

int Utf8Length(absl::string_view text) {
  if (text.empty()) return 0;
  const unsigned char lead = static_cast<unsigned char>(text[0]);
  if (lead < 0x80) return 1;
  if (lead < 0xC2 || lead > 0xF4) return -1;
  const size_t length = LengthByLead(text[0]);
  for (size_t i = 1; i < length; ++i) {
    if (i == text.size()) return 0;
    const unsigned char byte = static_cast<unsigned char>(text[i]);
    // Not longer than it need be, no surrogate, not above U+10FFFF.
    const bool off = i == 1 && ((lead == 0xE0 && byte < 0xA0) || (lead == 0xED && byte > 0x9F) ||
                                (lead == 0xF0 && byte < 0x90) || (lead == 0xF4 && byte > 0x8F));
    if (!IsTrail(text[i]) || off) return -1;
  }
  return static_cast<int>(length);
}

class Tokenizer::Impl {
 public:
  absl::Status Read(const std::string& content) {
    tokenizer::SentencePieceModel model;
    if (!model.ParseFromString(content) || model.pieces().empty()) {
      return absl::InvalidArgumentError("it is not a SentencePiece model");
    }
    RETURN_IF_ERROR(ReadSpecs(model));
    pieces_.assign(model.pieces().begin(), model.pieces().end());
    for (size_t id = 0; id < pieces_.size(); ++id) RETURN_IF_ERROR(ReadPiece(static_cast<int>(id)));
    if (unknown_ < 0) return absl::InvalidArgumentError("it has no piece of the kind UNKNOWN");
    if (byte_fallback_) {
      for (int byte = 0; byte < 256; ++byte) {
        if (byte_ids_[byte] < 0) {
          return absl::InvalidArgumentError(
              absl::StrCat("it has byte_fallback and no piece for the byte ", byte, ", want all 256"));
        }
      }
    }
    table_.Finish();
    user_defined_.Finish();
    return absl::OkStatus();
  }

  int64_t size() const { return static_cast<int64_t>(pieces_.size()); }

  std::vector<int64_t> Encode(std::string_view text, TextPlace place) const {
    const std::string normalized = Normalize(text, place);
    std::vector<Segment> segments = bpe_ ? Merge(normalized) : BestPath(normalized);
    std::vector<int64_t> ids;
    bool after_unknown = false;
    for (const Segment& segment : segments) {
      const bool unknown = segment.id == unknown_;
      if (unknown && byte_fallback_) {
        for (const char c : segment.text) ids.push_back(byte_ids_[static_cast<unsigned char>(c)]);
      } else if (!unknown || !after_unknown) {  // A run of unknown pieces is one.
        ids.push_back(segment.id);
      }
      after_unknown = unknown && !byte_fallback_;
    }
    return ids;
  }

  // What a piece shows in a text; of one that begins with a space, that space first.
  struct Shown {
    std::string text;
    bool begins_with_space = false;
    int byte = -1;       // It is this byte of a character.
    bool plain = false;  // Not a control piece and not the unknown one.
  };
  const Shown& shown(int64_t id) const {
    return shown_[id >= 0 && id < size() ? static_cast<size_t>(id) : static_cast<size_t>(unknown_)];
  }
  bool drops_leading_space() const { return begin_with_space_ || collapse_spaces_; }
  bool drops_all_leading_spaces() const { return collapse_spaces_; }

 private:
  // A part of the normalized text, and its piece.
  struct Segment {
    std::string_view text;
    int id;
  };

  absl::Status ReadSpecs(const tokenizer::SentencePieceModel& model) {
    const TrainerSpec& trainer = model.trainer();
    if (trainer.model() != TrainerSpec::UNIGRAM && trainer.model() != TrainerSpec::BPE) {
      return absl::InvalidArgumentError(
          absl::StrCat("its type is ", TrainerSpec::Model_Name(trainer.model()), ", want UNIGRAM or BPE"));
    }
    if (trainer.space_as_suffix()) {
      return absl::InvalidArgumentError("it has treat_whitespace_as_suffix, want it without");
    }
    if (!model.denormalizer().replacements().empty()) {
      return absl::InvalidArgumentError("it has a denormalizer, want it without");
    }
    bpe_ = trainer.model() == TrainerSpec::BPE;
    byte_fallback_ = trainer.byte_fallback();
    unknown_surface_ = trainer.unknown_surface();
    begin_with_space_ = model.normalizer().begin_with_space();
    collapse_spaces_ = model.normalizer().collapse_spaces();
    space_ = model.normalizer().escape_spaces() ? kSpace : " ";
    return replacements_.Read(model.normalizer().replacements());
  }

  absl::Status ReadPiece(int id) {
    const Piece& piece = pieces_[id];
    const std::string& text = piece.text();
    const auto bad = [&](absl::string_view what) {
      return absl::InvalidArgumentError(
          absl::StrCat("its piece ", id, " \"", absl::CHexEscape(text), "\" ", what));
    };
    if (text.empty() || FindInvalid(text).has_value()) return bad("is empty or not UTF-8");
    Shown shown;
    switch (piece.kind()) {
      case Piece::UNKNOWN:
        if (unknown_ >= 0) return bad(absl::StrCat("is of the kind UNKNOWN, and so is ", unknown_));
        unknown_ = id;
        shown.text = unknown_surface_;
        break;
      case Piece::CONTROL:
        break;
      case Piece::BYTE: {
        absl::string_view hex = text;
        if (!absl::ConsumePrefix(&hex, "<0x") || !absl::ConsumeSuffix(&hex, ">") || hex.size() != 2 ||
            !absl::SimpleHexAtoi(hex, &shown.byte)) {
          return bad("is of the kind BYTE, want a name like <0x0A>");
        }
        byte_ids_[shown.byte] = id;
        break;
      }
      default:
        if (!ids_.emplace(text, id).second) return bad("is there twice");
        table_.Add(text, id);
        if (piece.kind() == Piece::USER_DEFINED) user_defined_.Add(text, id);
        if (piece.kind() == Piece::NORMAL) {
          least_score_ = std::min(least_score_, piece.score());
          most_score_ = std::max(most_score_, piece.score());
        }
        shown.text = absl::StrReplaceAll(text, {{kSpace, " "}});
        shown.begins_with_space = absl::StartsWith(text, kSpace);
        shown.plain = true;
    }
    shown_.push_back(std::move(shown));
    return absl::OkStatus();
  }

  bool IsUnused(int id) const { return pieces_[id].kind() == Piece::UNUSED; }
  bool IsUserDefined(int id) const { return pieces_[id].kind() == Piece::USER_DEFINED; }

  // The beginning of `text` that is normalized as one, and what it becomes.
  std::pair<size_t, std::string_view> NormalizePrefix(std::string_view text) const {
    if (const size_t length = user_defined_.LongestPrefix(text); length > 0) {
      return {length, text.substr(0, length)};
    }
    if (const auto found = replacements_.Find(text); found.has_value()) return *found;
    const size_t length = CharacterLength(text);
    return {length, text.substr(0, length)};
  }

  std::string Normalize(std::string_view text, TextPlace place) const {
    const bool begins = place == TextPlace::kBegins;
    std::string normalized;
    if (begins && collapse_spaces_) {
      while (!text.empty()) {
        const auto [length, becomes] = NormalizePrefix(text);
        if (becomes != " ") break;
        text.remove_prefix(length);
      }
    }
    if (text.empty()) return normalized;
    normalized.reserve(text.size() * 3 / 2 + kSpaceBytes);
    if (begins && begin_with_space_) normalized += space_;
    bool after_space = begins && collapse_spaces_;
    while (!text.empty()) {
      auto [length, becomes] = NormalizePrefix(text);
      while (after_space && !becomes.empty() && becomes.front() == ' ') becomes.remove_prefix(1);
      for (const char c : becomes) {
        if (c == ' ') {
          normalized += space_;
        } else {
          normalized += c;
        }
      }
      if (!becomes.empty()) after_space = collapse_spaces_ && becomes.back() == ' ';
      text.remove_prefix(length);
    }
    if (collapse_spaces_) {
      while (absl::EndsWith(normalized, space_)) normalized.resize(normalized.size() - space_.size());
    }
    return normalized;
  }

  // Unigram: the segmentation with the largest sum of scores, by Viterbi's algorithm. Sums are rounded to
  // float32 as SentencePiece's are, so that equals are decided alike.
  std::vector<Segment> BestPath(std::string_view text) const {
    struct Node {  // The best path that ends here, and its last piece.
      float score = 0;
      int id = -1;
      size_t begin = std::string_view::npos;
    };
    std::vector<Node> nodes(text.size() + 1);
    const float unknown_score = least_score_ - kUnknownPenalty;
    for (size_t begin = 0; begin < text.size();) {
      const float till_here = nodes[begin].score;
      const size_t character = CharacterLength(text.substr(begin));
      bool has_character = false;
      const auto offer = [&](size_t length, int id, double score) {
        Node& node = nodes[begin + length];
        if (node.begin == std::string_view::npos || score > node.score) {
          node = {static_cast<float>(score), id, begin};
        }
      };
      table_.ForEachPrefix(text.substr(begin), [&](size_t length, int id) {
        if (IsUnused(id)) return;
        if (IsUserDefined(id)) {
          offer(length, id, static_cast<float>(length) * most_score_ - 0.1 + till_here);
        } else {
          offer(length, id, static_cast<double>(pieces_[id].score()) + till_here);
        }
        has_character = has_character || length == character;
      });
      if (!has_character) offer(character, unknown_, unknown_score + till_here);
      begin += character;
    }
    std::vector<Segment> segments;
    for (size_t end = text.size(); end > 0; end = nodes[end].begin) {
      segments.push_back({text.substr(nodes[end].begin, end - nodes[end].begin), nodes[end].id});
    }
    std::reverse(segments.begin(), segments.end());
    return segments;
  }

  // BPE: of neighbours that together are a piece, those with the best score are joined, the leftmost of
  // equals first, until none are left.
  std::vector<Segment> Merge(std::string_view text) const {
    struct Symbol {
      std::string_view text;  // Empty: joined to the one before.
      int before, after;
      bool fixed;  // User-defined: joins nothing.
    };
    std::vector<Symbol> symbols;
    for (size_t begin = 0; begin < text.size();) {
      const std::string_view rest = text.substr(begin);
      const size_t fixed = user_defined_.LongestPrefix(rest);
      const size_t length = fixed > 0 ? fixed : CharacterLength(rest);
      const int index = static_cast<int>(symbols.size());
      symbols.push_back({rest.substr(0, length), index - 1, index + 1, fixed > 0});
      begin += length;
    }
    const int count = static_cast<int>(symbols.size());

    struct Pair {
      int left, right;
      float score;
      size_t bytes;  // Of both, when it was found.
      bool operator<(const Pair& other) const {
        return score < other.score || (score == other.score && left > other.left);
      }
    };
    std::priority_queue<Pair> pairs;
    // What unused pieces were joined of: they are taken apart again.
    std::unordered_map<std::string_view, std::pair<std::string_view, std::string_view>> unused;
    const auto find = [&](int left, int right) {
      if (left < 0 || right >= count || symbols[left].fixed || symbols[right].fixed) return;
      const std::string_view a = symbols[left].text, b = symbols[right].text;
      const std::string_view joined(a.data(), a.size() + b.size());
      const auto piece = ids_.find(joined);
      if (piece == ids_.end()) return;
      pairs.push({left, right, pieces_[piece->second].score(), joined.size()});
      if (IsUnused(piece->second)) unused[joined] = {a, b};
    };
    for (int i = 1; i < count; ++i) find(i - 1, i);
    while (!pairs.empty()) {
      const Pair pair = pairs.top();
      pairs.pop();
      Symbol& left = symbols[pair.left];
      Symbol& right = symbols[pair.right];
      // One of them may have been joined to another meanwhile.
      if (left.text.empty() || right.text.empty() || left.text.size() + right.text.size() != pair.bytes) {
        continue;
      }
      left.text = std::string_view(left.text.data(), pair.bytes);
      left.after = right.after;
      if (right.after < count) symbols[right.after].before = pair.left;
      right.text = {};
      find(left.before, pair.left);
      find(pair.left, left.after);
    }

    std::vector<Segment> segments;
    std::vector<std::string_view> stack;
    for (int i = 0; i < count; i = symbols[i].after) {
      stack.push_back(symbols[i].text);
      while (!stack.empty()) {
        const std::string_view part = stack.back();
        stack.pop_back();
        const auto piece = ids_.find(part);
        const int id = piece == ids_.end() ? unknown_ : piece->second;
        const auto apart = unused.find(part);
        if (!IsUnused(id) || apart == unused.end()) {
          segments.push_back({part, id});
        } else {
          stack.push_back(apart->second.second);
          stack.push_back(apart->second.first);
        }
      }
    }
    return segments;
  }

  bool bpe_ = false;
  bool byte_fallback_ = false;
  bool begin_with_space_ = true;
  bool collapse_spaces_ = true;
  std::string space_;
  std::string unknown_surface_;
  Replacements replacements_;
  std::vector<Piece> pieces_;
  std::vector<Shown> shown_;
  std::array<int, 256> byte_ids_ = MakeByteIds();
  int unknown_ = -1;
  float least_score_ = std::numeric_limits<float>::max();
  float most_score_ = std::numeric_limits<float>::lowest();
  // Pieces that can be found in a text, as views of pieces_.
  std::unordered_map<std::string_view, int> ids_;
  PrefixTable table_;
  PrefixTable user_defined_;

  static std::array<int, 256> MakeByteIds() {
    std::array<int, 256> ids;
    ids.fill(-1);
    return ids;
  }
};

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& directory) {
  const std::string path = directory + "/tokenizer.model";
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    const bool json = std::ifstream(directory + "/tokenizer.json").good();
    return absl::NotFoundError(
        absl::StrCat("the model's directory has no tokenizer.model",
                     json ? " (its tokenizer.json is of a kind that is not read)" : ""));
  }
  std::ostringstream content;
  content << file.rdbuf();
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Parse(content.str());
  if (tokenizer.ok()) return tokenizer;
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", tokenizer.status().message()));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Parse(const std::string& content) {
  auto impl = std::make_unique<Impl>();
  RETURN_IF_ERROR(impl->Read(content));
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(impl)));
}

Tokenizer::Tokenizer(std::unique_ptr<const Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

int64_t Tokenizer::size() const { return impl_->size(); }

absl::StatusOr<std::vector<int64_t>> Tokenizer::Encode(absl::string_view text, TextPlace place) const {
  if (const std::optional<size_t> invalid = FindInvalid(text); invalid.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat("text is no UTF-8 from byte ", *invalid, " on (\"",
                                                   absl::CHexEscape(text.substr(*invalid, 4)), "\")"));
  }
  return impl_->Encode(std::string_view(text.data(), text.size()), place);
}

absl::StatusOr<std::string> Tokenizer::Decode(absl::Span<const int64_t> ids) const {
  std::string text;
  TextDecoder decoder(this, TextPlace::kBegins);
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("id number ", i, " is ", ids[i], ", want 0 to ", size() - 1));
    }
    decoder.Append(ids[i], &text);
  }
  decoder.Finish(&text);
  return text;
}

TextDecoder::TextDecoder(const Tokenizer* tokenizer, TextPlace place)
    : tokenizer_(tokenizer->impl_.get()), at_start_(place == TextPlace::kBegins) {}

void TextDecoder::Append(int64_t id, std::string* text) {
  const Tokenizer::Impl::Shown& shown = tokenizer_->shown(id);
  if (shown.byte >= 0) {
    pending_ += static_cast<char>(shown.byte);
    TakeCharacters(/*all=*/false, text);
    return;
  }
  TakeCharacters(/*all=*/true, text);
  if (dropped_space_ || gave_text_) at_start_ = false;
  absl::string_view characters = shown.text;
  dropped_space_ = false;
  if (shown.plain && at_start_ && shown.begins_with_space && tokenizer_->drops_leading_space()) {
    characters.remove_prefix(1);
    dropped_space_ = !tokenizer_->drops_all_leading_spaces();
  }
  Give(characters, text);
}

void TextDecoder::Finish(std::string* text) { TakeCharacters(/*all=*/true, text); }

void TextDecoder::TakeCharacters(bool all, std::string* text) {
  absl::string_view bytes = pending_;
  while (!bytes.empty()) {
    const int length = Utf8Length(bytes);
    if (length == 0 && !all) break;
    Give(length > 0 ? bytes.substr(0, length) : absl::string_view(kReplacement), text);
    bytes.remove_prefix(std::max(length, 1));
  }
  pending_.erase(0, pending_.size() - bytes.size());
}

void TextDecoder::Give(absl::string_view characters, std::string* text) {
  if (characters.empty()) return;
  text->append(characters.data(), characters.size());
  gave_text_ = true;
}

}  // namespace deltanet
