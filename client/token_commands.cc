// generate and score: what a model over tokens makes of a prompt, and of a given text.
#include <atomic>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "client/command.h"
#include "client/interrupt.h"
#include "model/base/status_macros.h"

namespace deltanet {
namespace {

constexpr int64_t kMaxTop = 64;  // Of the protocol.

absl::StatusOr<std::string> ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text(std::istreambuf_iterator<char>(file), {});
  if (!file) return absl::NotFoundError(absl::StrCat("cannot read ", path));
  return text;
}

absl::StatusOr<std::vector<int64_t>> ReadIds(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadText(path));
  std::vector<int64_t> ids;
  for (const absl::string_view part : absl::StrSplit(text, absl::ByAnyChar(" ,\t\r\n"), absl::SkipEmpty())) {
    if (!absl::SimpleAtoi(part, &ids.emplace_back()) || ids.back() < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, " has '", part, "' as id ", ids.size(), ", want an integer of at least 0"));
    }
  }
  return ids;
}

using Prompt = std::variant<std::vector<int64_t>, std::string>;

// What goes in, as a text or as ids, and the session that takes it in.
struct PromptFlags {
  ServerFlags server;
  std::string model;
  std::string text_flag;  // Its name.
  std::string text;
  std::string text_file;
  std::vector<int64_t> ids;
  std::string ids_file;
  std::string session_id;
  bool create_session = false;
  std::optional<int64_t> expected_position;
  absl::Duration timeout = absl::InfiniteDuration();

  explicit PromptFlags(std::string text_flag) : text_flag(std::move(text_flag)) {}

  void AddTo(FlagSet* flags) {
    server.AddTo(flags);
    AddModelFlag(flags, &model);
    flags->Add(text_flag, "TEXT", "a text, for a model with a tokenizer", &text);
    flags->Add(text_flag + "-file", "FILE",
               "a file with the text, taken as it is: a last newline belongs to it", &text_file);
    flags->Add("ids", "N[,N...]", "ids instead of a text", 0, &ids);
    flags->Add("ids-file", "FILE", "a text file with ids; spaces, commas or newlines between them",
               &ids_file);
    flags->Add("session", "ID", "continue this session instead of beginning from nothing", &session_id);
    flags->Add("create-session", "make the session; without --session the server chooses its id",
               &create_session);
    flags->Add("expected-position", "N", "refuse unless the session has taken in exactly N tokens", 0,
               &expected_position);
    flags->Add("timeout", "TIME", "give up after this long, like 500ms or 10s", &timeout);
  }

  absl::Status Check(const FlagSet& flags, bool required) const {
    std::vector<std::string> given;
    for (const std::string& name :
         {text_flag, text_flag + "-file", std::string("ids"), std::string("ids-file")}) {
      if (flags.given(name)) given.push_back("--" + name);
    }
    if (given.size() > 1) {
      return absl::InvalidArgumentError(absl::StrCat(absl::StrJoin(given, " and "), " exclude each other"));
    }
    if (given.empty() && required) {
      return absl::InvalidArgumentError(
          absl::StrCat("--", text_flag, ", --", text_flag, "-file, --ids or --ids-file is missing"));
    }
    if (expected_position && !session()) {
      return absl::InvalidArgumentError("--expected-position wants --session");
    }
    return absl::OkStatus();
  }

  std::optional<SessionChoice> session() const {
    if (session_id.empty() && !create_session) return std::nullopt;
    return SessionChoice{session_id, create_session};
  }

  // Without a text, ids, be they none.
  absl::StatusOr<Prompt> Read() const {
    if (!text_file.empty()) {
      ASSIGN_OR_RETURN(std::string read, ReadText(text_file));
      return Prompt(std::move(read));
    }
    if (!text.empty()) return Prompt(text);
    if (ids_file.empty()) return Prompt(ids);
    ASSIGN_OR_RETURN(std::vector<int64_t> read, ReadIds(ids_file));
    return Prompt(std::move(read));
  }
};

// "104 -0.2500, 105 -0.5000"
std::string TopText(const int64_t* ids, const float* log_probs, size_t count) {
  std::string text;
  for (size_t i = 0; i < count; ++i) {
    absl::StrAppendFormat(&text, "%s%d %.4f", i == 0 ? "" : ", ", ids[i], log_probs[i]);
  }
  return text;
}

std::string Quoted(const std::string& text) {
  return nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

// One line; what a response does not say is not in it.
std::string JsonLine(const Generated& response, bool with_log_probs, bool with_seed) {
  nlohmann::ordered_json json;
  if (!response.session_id.empty()) json["session_id"] = response.session_id;
  json["tokens"] = nlohmann::ordered_json::array();
  for (const TokenResult& token : response.tokens) {
    nlohmann::ordered_json& made = json["tokens"].emplace_back();
    made["id"] = token.id;
    if (!with_log_probs) continue;
    made["log_prob"] = token.log_prob;
    made["top_ids"] = token.top_ids;
    made["top_log_probs"] = token.top_log_probs;
  }
  json["text"] = response.text;
  if (with_seed) json["seed"] = response.seed;
  if (response.finish_reason != FinishReason::kNone) {
    json["finish_reason"] = std::string(FinishReasonName(response.finish_reason));
    if (!response.matched_stop.empty()) json["matched_stop"] = response.matched_stop;
    json["usage"] = {
        {"prompt_tokens", response.prompt_tokens},
        {"generated_tokens", response.generated_tokens},
        {"time_to_first_token_ms", absl::ToDoubleMilliseconds(response.time_to_first_token)},
    };
    if (!response.session_id.empty()) json["committed_position"] = response.committed_position;
    json["timing_ms"] = {{"queued", absl::ToDoubleMilliseconds(response.queued)},
                         {"computing", absl::ToDoubleMilliseconds(response.computing)}};
  }
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

class GenerateCommand : public Command {
 public:
  void AddFlags(FlagSet* flags) override {
    prompt_.AddTo(flags);
    flags->Add("max-tokens", "N", "generate at most so many; 0: the server's default", 0, &max_tokens_);
    flags->Add("temperature", "X", "how freely to choose; 0: the most likely token, always", &temperature_);
    flags->Add("top-k", "N", "choose among the N most likely; 0: among all", 0, &top_k_);
    flags->Add("top-p", "X",
               "choose among the most likely that have together this probability, more than 0 and at most 1",
               &top_p_);
    flags->Add("seed", "N", "of the choice; left out, the server takes one and says it", &seed_);
    flags->AddRepeated("stop", "TEXT", "end before this text; repeat it for more", &stop_);
    flags->Add("stop-ids", "N[,N...]", "end with one of these ids", 0, &stop_ids_);
    flags->Add("ignore-eos", "go on behind the model's own end-of-sequence ids", &ignore_eos_);
    flags->Add("top-log-probs", "N",
               "a line for each token: its log-probability and the N (0 to 64) most likely in its place", 0,
               &top_log_probs_);
    flags->Add("json", "a line of JSON for each response", &json_);
  }

  absl::Status CheckFlags(const FlagSet& flags) const override {
    RETURN_IF_ERROR(prompt_.Check(flags, /*required=*/false));
    if (top_k_ > std::numeric_limits<int32_t>::max()) {
      return absl::InvalidArgumentError(
          absl::StrCat("--top-k is ", top_k_, ", want at most ", std::numeric_limits<int32_t>::max()));
    }
    if (!(top_p_ > 0 && top_p_ <= 1)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--top-p is ", top_p_, ", want more than 0 and at most 1"));
    }
    if (top_log_probs_.value_or(0) > kMaxTop) {
      return absl::InvalidArgumentError(
          absl::StrCat("--top-log-probs is ", *top_log_probs_, ", want at most ", kMaxTop));
    }
    return absl::OkStatus();
  }

  absl::Status Run(const Output& output) override {
    ASSIGN_OR_RETURN(const GenerateOptions options, Options());
    ASSIGN_OR_RETURN(const Client client, prompt_.server.Connect());
    // Connects, so that the time to the first token is none of that.
    ASSIGN_OR_RETURN(const ModelInfo model, client.GetModel(prompt_.model));
    Course course;
    std::atomic<bool> interrupted{false};
    course.start = absl::Now();
    const std::unique_ptr<GenerationStream> generation = client.OpenGeneration(options);
    absl::Status status;
    {
      const InterruptHandler handler([&] {
        interrupted = true;
        generation->Cancel();
      });
      Generated response;
      while (generation->Read(&response)) {
        Show(response, model.has_tokenizer, course, output);
        if (!output.out) generation->Cancel();
        course.Add(std::move(response));
      }
      status = generation->Finish();
    }
    if (course.tokens > 0 && !json_ && !top_log_probs_) output.out << "\n" << std::flush;
    if (!output.out) return absl::AbortedError("the output cannot be written");
    if (interrupted && !status.ok()) {
      return absl::CancelledError(absl::StrCat("interrupted after ", course.tokens, " tokens",
                                               options.session ? "; the session stands where it was" : ""));
    }
    RETURN_IF_ERROR(status);
    Summarize(course, output);
    return absl::OkStatus();
  }

 private:
  // What has come so far.
  struct Course {
    absl::Time start, first, last;  // Of the call; when the first and the last tokens came.
    int64_t responses = 0;
    int64_t tokens = 0;
    int64_t first_tokens = 0;  // That came together.
    uint64_t seed = 0;
    Generated ending;  // The last response.

    void Add(Generated response) {
      if (responses++ == 0) seed = response.seed;
      if (const int64_t count = static_cast<int64_t>(response.tokens.size()); count > 0) {
        last = absl::Now();
        if (tokens == 0) {
          first = last;
          first_tokens = count;
        }
        tokens += count;
      }
      ending = std::move(response);
    }
  };

  absl::StatusOr<GenerateOptions> Options() const {
    GenerateOptions options;
    options.model = prompt_.model;
    options.session = prompt_.session();
    ASSIGN_OR_RETURN(options.prompt, prompt_.Read());
    options.sampling.temperature = static_cast<float>(temperature_);
    options.sampling.top_k = static_cast<int32_t>(top_k_);
    options.sampling.top_p = static_cast<float>(top_p_);
    options.sampling.seed = seed_;
    options.max_tokens = max_tokens_;
    options.stop_ids = stop_ids_;
    options.ignore_eos = ignore_eos_;
    options.stop = stop_;
    if (top_log_probs_) options.top_log_probs = static_cast<int32_t>(*top_log_probs_);
    options.expected_position = prompt_.expected_position;
    options.timeout = prompt_.timeout;
    return options;
  }

  // `course`: before the response.
  void Show(const Generated& response, bool has_text, const Course& course, const Output& output) const {
    if (json_) {
      output.out << JsonLine(response, top_log_probs_.has_value(), course.responses == 0 && temperature_ > 0)
                 << "\n";
    } else if (top_log_probs_) {
      for (const TokenResult& token : response.tokens) {
        output.out << absl::StrFormat("%8d %10.4f", token.id, token.log_prob);
        if (!token.top_ids.empty()) {
          output.out << "  of "
                     << TopText(token.top_ids.data(), token.top_log_probs.data(), token.top_ids.size());
        }
        if (has_text && &token == &response.tokens.back()) output.out << "  " << Quoted(response.text);
        output.out << "\n";
      }
    } else if (has_text) {
      output.out << response.text;
    } else {
      bool first = course.tokens == 0;
      for (const TokenResult& token : response.tokens) {
        output.out << (std::exchange(first, false) ? "" : " ") << token.id;
      }
    }
    output.out << std::flush;
  }

  void Summarize(const Course& course, const Output& output) const {
    const Generated& ending = course.ending;
    output.err << absl::StrFormat("finished by %s: prompt %d tokens, generated %d\n",
                                  FinishReasonName(ending.finish_reason), ending.prompt_tokens,
                                  ending.generated_tokens);
    if (course.tokens > 0) {
      output.err << absl::StrFormat("first token after %.3f ms",
                                    absl::ToDoubleMilliseconds(course.first - course.start));
      if (course.tokens > course.first_tokens) {
        output.err << absl::StrFormat(", then %.1f tokens/s",
                                      static_cast<double>(course.tokens - course.first_tokens) /
                                          absl::ToDoubleSeconds(course.last - course.first));
      }
      output.err << "\n";
    }
    if (temperature_ > 0) output.err << "seed " << course.seed << "\n";
    if (!ending.session_id.empty()) {
      output.err << "session " << ending.session_id << " at " << ending.committed_position << "\n";
    }
  }

  PromptFlags prompt_{"prompt"};
  int64_t max_tokens_ = 0;
  double temperature_ = 0;
  int64_t top_k_ = 0;
  double top_p_ = 1;
  std::optional<uint64_t> seed_;
  std::vector<std::string> stop_;
  std::vector<int64_t> stop_ids_;
  bool ignore_eos_ = false;
  std::optional<int64_t> top_log_probs_;
  bool json_ = false;
};

class ScoreCommand : public Command {
 public:
  void AddFlags(FlagSet* flags) override {
    prompt_.AddTo(flags);
    flags->Add("top", "N",
               "also say what the model expected in each token's place: the N (1 to 64) most likely", 1,
               &top_);
  }

  absl::Status CheckFlags(const FlagSet& flags) const override {
    RETURN_IF_ERROR(prompt_.Check(flags, /*required=*/true));
    if (top_.value_or(0) > kMaxTop) {
      return absl::InvalidArgumentError(absl::StrCat("--top is ", *top_, ", want at most ", kMaxTop));
    }
    return absl::OkStatus();
  }

  absl::Status Run(const Output& output) override {
    ASSIGN_OR_RETURN(const Prompt prompt, prompt_.Read());
    ASSIGN_OR_RETURN(const Client client, prompt_.server.Connect());
    ASSIGN_OR_RETURN(const std::vector<int64_t> ids, Ids(client, prompt));
    ForwardOptions options;
    options.model = prompt_.model;
    options.session = prompt_.session();
    options.expected_position = prompt_.expected_position;
    options.timeout = prompt_.timeout;
    ASSIGN_OR_RETURN(const ForwardResult scores,
                     client.Score(ids, static_cast<int32_t>(top_.value_or(0)), options));
    if (scores.log_probs.size() > ids.size()) {
      return absl::DataLossError(absl::StrCat("malformed response: ", scores.log_probs.size(),
                                              " log-probabilities for ", ids.size(), " ids"));
    }
    Show(scores, ids, output);
    return absl::OkStatus();
  }

 private:
  // A fresh sequence's text begins as Generate has it.
  absl::StatusOr<std::vector<int64_t>> Ids(const Client& client, const Prompt& prompt) const {
    if (const auto* const ids = std::get_if<std::vector<int64_t>>(&prompt)) return *ids;
    bool add_bos = false;
    if (prompt_.session_id.empty() || prompt_.create_session) {
      ASSIGN_OR_RETURN(const ModelInfo model, client.GetModel(prompt_.model));
      add_bos = model.bos_id.has_value();
    }
    return client.Tokenize(prompt_.model, std::get<std::string>(prompt), add_bos);
  }

  void Show(const ForwardResult& scores, const std::vector<int64_t>& ids, const Output& output) const {
    const size_t count = scores.log_probs.size(), k = scores.top.k;
    const int64_t* const scored = ids.data() + (ids.size() - count);
    double total = 0;
    output.out << absl::StrFormat("%8s %8s %10s\n", "POSITION", "ID", "LOG-PROB");
    for (size_t i = 0; i < count; ++i) {
      total += scores.log_probs[i];
      output.out << absl::StrFormat("%8d %8d %10.4f", scores.output_position + static_cast<int64_t>(i),
                                    scored[i], scores.log_probs[i]);
      if ((i + 1) * k <= scores.top.ids.size() && k > 0) {
        output.out << "  of " << TopText(&scores.top.ids[i * k], &scores.top.log_probs[i * k], k);
      }
      output.out << "\n";
    }
    output.out << absl::StrFormat("total %.4f of %d tokens", total, count);
    if (count > 0) {
      const double mean = total / static_cast<double>(count);
      output.out << absl::StrFormat(", %.4f a token: perplexity %.6g", mean, std::exp(-mean));
    }
    output.out << "\n";
    if (!scores.session_id.empty()) {
      output.out << "session " << scores.session_id << " at " << scores.committed_position << "\n";
    }
  }

  PromptFlags prompt_{"text"};
  std::optional<int64_t> top_;
};

}  // namespace

std::unique_ptr<Command> NewGenerateCommand() { return std::make_unique<GenerateCommand>(); }
std::unique_ptr<Command> NewScoreCommand() { return std::make_unique<ScoreCommand>(); }

}  // namespace deltanet
