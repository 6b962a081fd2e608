// Strict reading of the small, shallow JSON of this project's files, by events: nothing is built from the
// text but what a handler keeps, nesting costs nothing, and repeated keys are seen. Included in .cc files
// only.
#ifndef DELTANET_MODEL_BASE_JSON_HANDLER_H_
#define DELTANET_MODEL_BASE_JSON_HANDLER_H_

#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace deltanet {

// `text` as it can stand in a message: quoted, escaped, cut to a bearable length.
inline std::string Quoted(absl::string_view text) {
  constexpr size_t kLimit = 100;
  return absl::StrCat("'", absl::CHexEscape(text.substr(0, kLimit)), text.size() > kLimit ? "...'" : "'");
}

// Refuses everything: a subclass overrides the events that it accepts. Each event returns false to stop the
// parse.
class JsonHandler : public nlohmann::json_sax<nlohmann::json> {
 public:
  // Parses all of `text`. INVALID_ARGUMENT if it is not JSON in UTF-8, or the handler's own error.
  absl::Status Parse(absl::string_view text) {
    nlohmann::json::sax_parse(text.begin(), text.end(), this);
    return status_;
  }

  bool null() override { return Unexpected("null"); }
  bool boolean(bool value) override { return Unexpected(value ? "true" : "false"); }
  bool number_integer(number_integer_t value) override { return Unexpected(absl::StrCat(value)); }
  bool number_unsigned(number_unsigned_t value) override { return Unexpected(absl::StrCat(value)); }
  bool number_float(number_float_t, const string_t& text) override { return Unexpected(text); }
  bool string(string_t& value) override { return Unexpected(Quoted(value)); }
  bool binary(binary_t&) override { return Unexpected("binary data"); }
  bool start_object(std::size_t) override { return Unexpected("an object"); }
  bool key(string_t& name) override { return Unexpected(absl::StrCat("the key ", Quoted(name))); }
  bool end_object() override { return Unexpected("the end of an object"); }
  bool start_array(std::size_t) override { return Unexpected("an array"); }
  bool end_array() override { return Unexpected("the end of an array"); }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::json::exception& error) override {
    // Numbers beyond a double's range are the one error that is not about syntax. The parser's own message
    // would quote the input unescaped.
    const bool range = dynamic_cast<const nlohmann::json::out_of_range*>(&error) != nullptr;
    return Fail(absl::StrCat(range ? "number out of range" : "not valid JSON", " at byte ", position));
  }

 protected:
  // `found` is something that has no place here. Calls Fail with what was wanted instead.
  virtual bool Unexpected(absl::string_view found) = 0;

  bool Fail(absl::string_view message) {
    status_ = absl::InvalidArgumentError(message);
    return false;
  }

 private:
  absl::Status status_;
};

}  // namespace deltanet

#endif  // DELTANET_MODEL_BASE_JSON_HANDLER_H_
