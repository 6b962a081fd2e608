// The flags of one command of a command-line program: parsing, checking and --help.
#ifndef DELTANET_CLIENT_FLAGS_H_
#define DELTANET_CLIENT_FLAGS_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "model/base/tensor_view.h"

namespace deltanet {

// Each Add binds `--name VALUE` (or `--name=VALUE`) to a variable that outlives this; what it holds then is
// the default that help shows, where `help` does not say one. Names come without their dashes. Not
// thread-safe.
class FlagSet {
 public:
  // `command` is what the user types before the flags.
  FlagSet(std::string command, std::string summary);

  void Add(const std::string& name, const std::string& value_name, const std::string& help,
           std::string* value);
  // One of `choices`.
  void AddChoice(const std::string& name, const std::vector<std::string>& choices, const std::string& help,
                 std::string* value);
  // An integer of at least `min`.
  void Add(const std::string& name, const std::string& value_name, const std::string& help, int64_t min,
           int64_t* value);
  void Add(const std::string& name, const std::string& value_name, const std::string& help, int64_t min,
           std::optional<int64_t>* value);
  // An integer in [0, 2^64).
  void Add(const std::string& name, const std::string& value_name, const std::string& help,
           std::optional<uint64_t>* value);
  // Integers of at least `min`, with commas between: at least one.
  void Add(const std::string& name, const std::string& value_name, const std::string& help, int64_t min,
           std::vector<int64_t>* value);
  // A finite number of at least 0.
  void Add(const std::string& name, const std::string& value_name, const std::string& help, double* value);
  // "10s", "1.5ms", "1h30m": more than zero.
  void Add(const std::string& name, const std::string& value_name, const std::string& help,
           absl::Duration* value);
  // A floating dtype that models speak: float32, float16 or bfloat16.
  void Add(const std::string& name, const std::string& help, DType* value);
  // May be given any number of times, each with one more value; it has none before.
  void AddRepeated(const std::string& name, const std::string& value_name, const std::string& help,
                   std::vector<std::string>* values);
  // A flag without a value: true if given.
  void Add(const std::string& name, const std::string& help, bool* value);
  // The one argument without dashes; it must be given.
  void AddPositional(const std::string& value_name, const std::string& help, std::string* value);
  // A flag, added before, that must be given.
  void Require(const std::string& name);

  // INVALID_ARGUMENT for an unknown, repeated or missing flag, a missing or a wrong value; the message names
  // the flag, the value and what is wanted. With --help among the arguments, nothing else is looked at.
  absl::Status Parse(const std::vector<std::string>& arguments);

  bool help_wanted() const { return help_wanted_; }
  bool given(const std::string& name) const;
  // What --help prints.
  std::string Help() const;

 private:
  struct Flag {
    std::string name;
    std::string value_name;  // Empty: takes no value.
    std::string help;
    std::string default_text;  // Empty: none to show.
    std::function<absl::Status(const std::string& value)> set;
    bool required = false;
    bool repeated = false;  // May be given more than once.
    bool given = false;
  };
  void AddFlag(const std::string& name, const std::string& value_name, const std::string& help,
               const std::string& default_text, std::function<absl::Status(const std::string&)> set);
  Flag* Find(const std::string& name);

  const std::string command_;
  const std::string summary_;
  std::vector<Flag> flags_;
  std::optional<Flag> positional_;
  bool help_wanted_ = false;
};

}  // namespace deltanet

#endif  // DELTANET_CLIENT_FLAGS_H_
