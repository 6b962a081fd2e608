#include "client/flags.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "model/base/check.h"
#include "model/base/status_macros.h"

namespace deltanet {
namespace {

absl::Status Unwanted(absl::string_view value, absl::string_view want) {
  return absl::InvalidArgumentError(absl::StrCat("is '", value, "', want ", want));
}

absl::StatusOr<int64_t> ParseInteger(absl::string_view text, int64_t min) {
  int64_t value;
  if (!absl::SimpleAtoi(text, &value) || value < min) {
    return Unwanted(text, absl::StrCat("an integer of at least ", min));
  }
  return value;
}

}  // namespace

FlagSet::FlagSet(std::string command, std::string summary)
    : command_(std::move(command)), summary_(std::move(summary)) {}

void FlagSet::AddFlag(const std::string& name, const std::string& value_name, const std::string& help,
                      const std::string& default_text, std::function<absl::Status(const std::string&)> set) {
  DELTANET_CHECK(Find(name) == nullptr, "two flags of one name");
  flags_.push_back({name, value_name, help, default_text, std::move(set)});
}

void FlagSet::Add(const std::string& name, const std::string& value_name, const std::string& help,
                  std::string* value) {
  AddFlag(name, value_name, help, *value, [value](const std::string& text) {
    *value = text;
    return absl::OkStatus();
  });
}

void FlagSet::AddChoice(const std::string& name, const std::vector<std::string>& choices,
                        const std::string& help, std::string* value) {
  AddFlag(name, absl::StrJoin(choices, "|"), help, *value, [choices, value](const std::string& text) {
    if (std::find(choices.begin(), choices.end(), text) == choices.end()) {
      return Unwanted(text, absl::StrJoin(choices, " or "));
    }
    *value = text;
    return absl::OkStatus();
  });
}

void FlagSet::Add(const std::string& name, const std::string& value_name, const std::string& help,
                  int64_t min, int64_t* value) {
  AddFlag(name, value_name, help, absl::StrCat(*value),
          [min, value](const std::string& text) -> absl::Status {
            ASSIGN_OR_RETURN(*value, ParseInteger(text, min));
            return absl::OkStatus();
          });
}

void FlagSet::Add(const std::string& name, const std::string& value_name, const std::string& help,
                  int64_t min, std::optional<int64_t>* value) {
  AddFlag(name, value_name, help, "", [min, value](const std::string& text) -> absl::Status {
    ASSIGN_OR_RETURN(*value, ParseInteger(text, min));
    return absl::OkStatus();
  });
}

void FlagSet::Add(const std::string& name, const std::string& value_name, const std::string& help,
                  std::optional<uint64_t>* value) {
  AddFlag(name, value_name, help, "", [value](const std::string& text) {
    uint64_t parsed;
    if (!absl::SimpleAtoi(text, &parsed)) return Unwanted(text, "an integer of at least 0 and below 2^64");
    *value = parsed;
    return absl::OkStatus();
  });
}

void FlagSet::AddRepeated(const std::string& name, const std::string& value_name, const std::string& help,
                          std::vector<std::string>* values) {
  AddFlag(name, value_name, help, "", [values](const std::string& text) {
    values->push_back(text);
    return absl::OkStatus();
  });
  flags_.back().repeated = true;
}

void FlagSet::Add(const std::string& name, const std::string& value_name, const std::string& help,
                  int64_t min, std::vector<int64_t>* value) {
  AddFlag(name, value_name, help, absl::StrJoin(*value, ","),
          [min, value](const std::string& text) -> absl::Status {
            std::vector<int64_t> parsed;
            for (const absl::string_view part : absl::StrSplit(text, ',')) {
              const absl::StatusOr<int64_t> number = ParseInteger(part, min);
              if (!number.ok()) {
                return Unwanted(text, absl::StrCat("integers of at least ", min, " with commas between"));
              }
              parsed.push_back(*number);
            }
            *value = std::move(parsed);
            return absl::OkStatus();
          });
}

void FlagSet::Add(const std::string& name, const std::string& value_name, const std::string& help,
                  double* value) {
  AddFlag(name, value_name, help, absl::StrCat(*value), [value](const std::string& text) {
    double parsed;
    if (!absl::SimpleAtod(text, &parsed) || !std::isfinite(parsed) || parsed < 0) {
      return Unwanted(text, "a number of at least 0");
    }
    *value = parsed;
    return absl::OkStatus();
  });
}

void FlagSet::Add(const std::string& name, const std::string& value_name, const std::string& help,
                  absl::Duration* value) {
  const std::string default_text = *value == absl::InfiniteDuration() ? "none" : absl::FormatDuration(*value);
  AddFlag(name, value_name, help, default_text, [value](const std::string& text) {
    absl::Duration parsed;
    if (!absl::ParseDuration(text, &parsed) || parsed <= absl::ZeroDuration()) {
      return Unwanted(text, "a time with its unit, like 500ms, 10s or 1h30m, of more than 0");
    }
    *value = parsed;
    return absl::OkStatus();
  });
}

void FlagSet::Add(const std::string& name, const std::string& help, DType* value) {
  AddFlag(name, "DTYPE", help, std::string(DTypeName(*value)), [value](const std::string& text) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      if (DTypeName(dtype) == text) {
        *value = dtype;
        return absl::OkStatus();
      }
    }
    return Unwanted(text, "float32, float16 or bfloat16");
  });
}

void FlagSet::Add(const std::string& name, const std::string& help, bool* value) {
  AddFlag(name, "", help, "", [value](const std::string&) {
    *value = true;
    return absl::OkStatus();
  });
}

void FlagSet::AddPositional(const std::string& value_name, const std::string& help, std::string* value) {
  DELTANET_CHECK(!positional_, "two positional arguments");
  positional_ = Flag{"", value_name, help, "", [value](const std::string& text) {
                       *value = text;
                       return absl::OkStatus();
                     }};
  positional_->required = true;
}

void FlagSet::Require(const std::string& name) {
  Flag* const flag = Find(name);
  DELTANET_CHECK(flag != nullptr, "an unknown flag is required");
  flag->required = true;
}

FlagSet::Flag* FlagSet::Find(const std::string& name) {
  const auto found =
      std::find_if(flags_.begin(), flags_.end(), [&name](const Flag& flag) { return flag.name == name; });
  return found == flags_.end() ? nullptr : &*found;
}

bool FlagSet::given(const std::string& name) const {
  return std::any_of(flags_.begin(), flags_.end(),
                     [&name](const Flag& flag) { return flag.given && flag.name == name; });
}

absl::Status FlagSet::Parse(const std::vector<std::string>& arguments) {
  if (std::find(arguments.begin(), arguments.end(), "--help") != arguments.end()) {
    help_wanted_ = true;
    return absl::OkStatus();
  }
  for (size_t i = 0; i < arguments.size(); ++i) {
    absl::string_view argument = arguments[i];
    if (!absl::ConsumePrefix(&argument, "--")) {
      if (!positional_ || positional_->given) {
        return absl::InvalidArgumentError(absl::StrCat("unexpected argument '", argument, "'; see --help"));
      }
      positional_->given = true;
      RETURN_IF_ERROR(positional_->set(std::string(argument)));
      continue;
    }
    const std::pair<std::string, std::string> parts = absl::StrSplit(argument, absl::MaxSplits('=', 1));
    const bool has_value = parts.first.size() < argument.size();
    Flag* const flag = Find(parts.first);
    if (flag == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("unknown flag --", parts.first, "; see --help"));
    }
    if (flag->given && !flag->repeated)
      return absl::InvalidArgumentError(absl::StrCat("--", flag->name, " is given twice"));
    flag->given = true;
    std::string value = parts.second;
    if (flag->value_name.empty() && has_value) {
      return absl::InvalidArgumentError(
          absl::StrCat("--", flag->name, " takes no value, found '", value, "'"));
    }
    if (!flag->value_name.empty() && !has_value) {
      if (i + 1 == arguments.size()) {
        return absl::InvalidArgumentError(
            absl::StrCat("--", flag->name, " wants a value: ", flag->value_name));
      }
      value = arguments[++i];
    }
    if (const absl::Status status = flag->set(value); !status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("--", flag->name, " ", status.message()));
    }
  }
  for (const Flag& flag : flags_) {
    if (flag.required && !flag.given) {
      return absl::InvalidArgumentError(absl::StrCat("--", flag.name, " ", flag.value_name, " is missing"));
    }
  }
  if (positional_ && !positional_->given) {
    return absl::InvalidArgumentError(absl::StrCat(positional_->value_name, " is missing"));
  }
  return absl::OkStatus();
}

std::string FlagSet::Help() const {
  std::string text = absl::StrCat("Usage: ", command_);
  for (const Flag& flag : flags_) {
    if (flag.required) absl::StrAppend(&text, " --", flag.name, " ", flag.value_name);
  }
  absl::StrAppend(&text, " [flags]");
  if (positional_) absl::StrAppend(&text, " ", positional_->value_name);
  absl::StrAppend(&text, "\n\n", summary_, "\n\n");
  const auto append = [&text](const std::string& left, const Flag& flag) {
    absl::StrAppend(&text, "  ", left, "\n      ", flag.help);
    if (flag.required) {
      absl::StrAppend(&text, " (required)");
    } else if (!flag.default_text.empty()) {
      absl::StrAppend(&text, " (default ", flag.default_text, ")");
    }
    absl::StrAppend(&text, "\n");
  };
  if (positional_) append(positional_->value_name, *positional_);
  for (const Flag& flag : flags_) {
    append(absl::StrCat("--", flag.name, flag.value_name.empty() ? "" : " ", flag.value_name), flag);
  }
  return text;
}

}  // namespace deltanet
