// Text to ids and back by a model's tokenizer.model, a file of SentencePiece (Kudo and Richardson,
// arXiv:1808.06226) of the types unigram and BPE.
//
// The file is read here and not by SentencePiece's own library: Debian's is built with a Protobuf of its own,
// whose symbols take the place of those of the Protobuf that gRPC needs, and a program with both dies at its
// start. What comes out is the same: tests/testdata/tokenizer says how that is checked.
#ifndef DELTANET_SERVER_TOKENIZER_H_
#define DELTANET_SERVER_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace deltanet {

// Whether a text begins, or goes on where another has ended.
enum class TextPlace { kBegins, kGoesOn };

// Constant after construction, and so thread-safe.
class Tokenizer {
 public:
  // Reads DIRECTORY/tokenizer.model. NOT_FOUND if it is not there (the message is for clients: it does not
  // name the directory); INVALID_ARGUMENT, naming the file, if it is no such file or of a kind that is not
  // read.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& directory);
  // The content of such a file. INVALID_ARGUMENT.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Parse(const std::string& content);

  ~Tokenizer();

  // Ids are in [0, size()).
  int64_t size() const;

  // Ids of a text, without special ones. A text that goes on keeps its leading spaces and gets none in front,
  // as SentencePiece gives to a text that begins. INVALID_ARGUMENT, naming the place, if `text` is not UTF-8.
  absl::StatusOr<std::vector<int64_t>> Encode(absl::string_view text, TextPlace place) const;

  // The text of ids: always UTF-8, bytes that form no character become U+FFFD. INVALID_ARGUMENT, naming the
  // id, if one is out of range.
  absl::StatusOr<std::string> Decode(absl::Span<const int64_t> ids) const;

 private:
  friend class TextDecoder;
  class Impl;
  explicit Tokenizer(std::unique_ptr<const Impl> impl);

  const std::unique_ptr<const Impl> impl_;
};

// Decodes ids one by one: all that it gives, joined, is what Decode gives of all ids where the text begins.
// Thread-compatible. The tokenizer outlives it.
class TextDecoder {
 public:
  // Where the text goes on, the space of a leading piece is kept.
  TextDecoder(const Tokenizer* tokenizer, TextPlace place);

  // Appends to `text` what is complete with `id`: whole characters. An id out of range is decoded as an
  // unknown piece. Its cost is that of the text.
  void Append(int64_t id, std::string* text);
  // The end: bytes that wait for the rest of their character become U+FFFD.
  void Finish(std::string* text);

 private:
  // Moves characters from pending_ to `text`; with `all`, all of it.
  void TakeCharacters(bool all, std::string* text);
  void Give(absl::string_view characters, std::string* text);

  const Tokenizer::Impl* tokenizer_;
  bool at_start_;               // A leading space is not part of the text.
  bool dropped_space_ = false;  // By the piece before.
  bool gave_text_ = false;
  std::string pending_;  // Bytes that could be the start of a character: at most 3.
};

// How many bytes the first character of `text` has. 0: `text` is empty, or ends within what could be one; -1:
// it begins with no character of UTF-8.
int Utf8Length(absl::string_view text);

}  // namespace deltanet

#endif  // DELTANET_SERVER_TOKENIZER_H_
