#include "client/generate_bench.h"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "model/base/status_macros.h"

namespace deltanet {
namespace {

absl::StatusOr<LengthRange> Lengths(const char* flag, const std::string& text) {
  const absl::StatusOr<LengthRange> range = ParseLengthRange(text);
  if (!range.ok()) return absl::InvalidArgumentError(absl::StrCat("--", flag, " ", range.status().message()));
  return range;
}

void PrintTimes(const char* name, const LatencyHistogram& times, const Output& output) {
  output.out << absl::StrFormat("%-22s", name);
  for (const absl::Duration time :
       {times.mean(), times.Percentile(0.5), times.Percentile(0.95), times.Percentile(0.99), times.max()}) {
    output.out << absl::StrFormat(" %10.3f", absl::ToDoubleMilliseconds(time));
  }
  output.out << "\n";
}

nlohmann::ordered_json JsonTimes(const LatencyHistogram& times) {
  return {{"count", times.count()},
          {"mean", absl::ToDoubleMilliseconds(times.mean())},
          {"p50", absl::ToDoubleMilliseconds(times.Percentile(0.5))},
          {"p95", absl::ToDoubleMilliseconds(times.Percentile(0.95))},
          {"p99", absl::ToDoubleMilliseconds(times.Percentile(0.99))},
          {"max", absl::ToDoubleMilliseconds(times.max())}};
}

int64_t CountErrors(const GenerateLoadReport& report) {
  int64_t errors = 0;
  for (const auto& [reason, count] : report.errors) errors += count;
  return errors;
}

void Print(const GenerateLoadReport& report, const Output& output) {
  output.out << absl::StrFormat(
      "throughput: %.2f requests/s, %.1f output tokens/s, %.1f prompt tokens/s (%d requests in %.2f s)\n",
      report.requests_per_second, report.output_tokens_per_second, report.prompt_tokens_per_second,
      report.answered, absl::ToDoubleSeconds(report.elapsed));
  output.out << absl::StrFormat("%-22s %10s %10s %10s %10s %10s\n", "milliseconds", "mean", "p50", "p95",
                                "p99", "max");
  PrintTimes("time to first token", report.first_token, output);
  PrintTimes("time between tokens", report.between_tokens, output);
  PrintTimes("whole request", report.whole, output);
  output.out << absl::StrFormat("in the server, on average: queued %.3f ms, computing %.3f ms\n",
                                absl::ToDoubleMilliseconds(report.mean_queued),
                                absl::ToDoubleMilliseconds(report.mean_computing));
  if (!report.errors.empty()) {
    output.out << "errors: " << CountErrors(report) << " ("
               << absl::StrJoin(report.errors, ", ", absl::PairFormatter(" "))
               << "), the first: " << report.first_error << "\n";
  }
  if (report.unanswered > 0) output.out << "unanswered: " << report.unanswered << "\n";
}

}  // namespace

void GenerateBench::AddTo(FlagSet* flags) {
  flags->Add("generate",
             "generation instead of chunks: each request a prompt of random ids, continued on a stream",
             &wanted_);
  flags->Add("concurrency", "N", "--generate: requests at a time, each followed by the next", 1,
             &concurrency_);
  flags->Add("requests", "N", "--generate: requests in all", 1, &requests_);
  flags->Add("seconds", "X",
             "--generate: begin requests for so long; 0: no limit, or 10 if --requests is not given either",
             &seconds_);
  flags->Add("prompt-tokens", "N|uniform:MIN:MAX", "--generate: length of the prompts", &prompt_tokens_);
  flags->Add("output-tokens", "N|uniform:MIN:MAX",
             "--generate: tokens to generate, whatever they are: end-of-sequence ids do not end it",
             &output_tokens_);
  flags->Add(
      "warm-up", "N",
      "--generate: requests before the measured ones; left out, as many as run at a time, or 1 with --rate",
      0, &warm_up_);
  flags->Add("temperature", "X", "--generate: how freely to choose; 0: the most likely token", &temperature_);
  flags->Add("seed", "N", "--generate: of prompts, lengths, arrivals and choices", 0, &seed_);
}

absl::Status GenerateBench::Check(const FlagSet& flags, const SharedFlags& shared) const {
  const auto given_of = [&flags](const std::vector<const char*>& names) -> std::string {
    const auto found =
        std::find_if(names.begin(), names.end(), [&](const char* name) { return flags.given(name); });
    return found == names.end() ? "" : *found;
  };
  if (!wanted_) {
    const std::string given = given_of({"concurrency", "requests", "seconds", "prompt-tokens",
                                        "output-tokens", "warm-up", "temperature", "seed"});
    if (given.empty()) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("--", given, " wants --generate"));
  }
  if (const std::string given = given_of({"sessions", "chunk", "duration", "count", "unary", "batch"});
      !given.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("--", given, " is not for --generate"));
  }
  if (shared.rate > 0 && flags.given("concurrency")) {
    return absl::InvalidArgumentError("--concurrency and --rate exclude each other");
  }
  if (shared.rate == 0 && shared.connections > concurrency_) {
    return absl::InvalidArgumentError(
        absl::StrCat("--connections is ", shared.connections, ", want at most --concurrency ", concurrency_));
  }
  RETURN_IF_ERROR(Lengths("prompt-tokens", prompt_tokens_).status());
  return Lengths("output-tokens", output_tokens_).status();
}

absl::StatusOr<GenerateLoadOptions> GenerateBench::Options(const SharedFlags& shared,
                                                           const ModelInfo& model) const {
  GenerateLoadOptions options;
  options.server = shared.server.server;
  options.client = shared.server.options();
  options.model = model.name;
  options.vocab_size = model.vocab_size;
  ASSIGN_OR_RETURN(options.prompt_tokens, Lengths("prompt-tokens", prompt_tokens_));
  ASSIGN_OR_RETURN(options.output_tokens, Lengths("output-tokens", output_tokens_));
  if (options.output_tokens.max > model.max_generated_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("--output-tokens is ", output_tokens_, ", want at most ",
                                                   model.max_generated_tokens, ", the server's limit"));
  }
  options.seed = static_cast<uint64_t>(seed_);
  options.sampling.temperature = static_cast<float>(temperature_);
  if (temperature_ > 0) options.sampling.seed = options.seed;
  options.concurrency = concurrency_;
  if (shared.rate > 0) options.rate = shared.rate;
  options.connections = shared.connections;
  options.warm_up = warm_up_.value_or(options.rate ? 1 : concurrency_);
  options.requests = requests_;
  if (seconds_ > 0) {
    options.duration = absl::Seconds(seconds_);
  } else if (!requests_) {
    options.duration = absl::Seconds(10);
  }
  return options;
}

absl::Status GenerateBench::Run(const SharedFlags& shared, const ModelInfo& model,
                                const std::string& server_version, const Output& output) const {
  if (!model.generates) {
    return absl::FailedPreconditionError(absl::StrCat("model '", model.name, "' does not generate"));
  }
  ASSIGN_OR_RETURN(const GenerateLoadOptions options, Options(shared, model));
  GenerateLoadProgress before;
  ASSIGN_OR_RETURN(
      const GenerateLoadReport report, RunGenerateLoad(options, [&](const GenerateLoadProgress& now) {
        output.err << absl::StrFormat("%6.1f s  %6d running  %8d answered  %12.0f tokens/s  %d errors\n",
                                      absl::ToDoubleSeconds(now.elapsed), now.running, now.answered,
                                      static_cast<double>(now.tokens - before.tokens) /
                                          absl::ToDoubleSeconds(now.elapsed - before.elapsed),
                                      now.errors)
                   << std::flush;
        before = now;
      }));
  if (report.answered == 0) {
    return absl::UnavailableError(
        absl::StrCat("no answers in the time given; errors: ", CountErrors(report), " ", report.first_error));
  }
  Print(report, output);
  if (shared.json.empty()) return absl::OkStatus();
  return WriteJson(shared, options, model, server_version, report);
}

absl::Status GenerateBench::WriteJson(const SharedFlags& shared, const GenerateLoadOptions& options,
                                      const ModelInfo& model, const std::string& server_version,
                                      const GenerateLoadReport& report) const {
  const nlohmann::ordered_json json = {
      {"server", options.server},
      {"server_version", server_version},
      {"client_version", std::string(ClientVersion())},
      {"model", model.name},
      {"family", model.family},
      {"device", model.device},
      {"mode", "generate"},
      {"loop", options.rate ? "open" : "closed"},
      {"rate", options.rate.value_or(0)},
      {"concurrency", options.rate ? 0 : options.concurrency},
      {"connections", options.connections},
      {"prompt_tokens", prompt_tokens_},
      {"output_tokens", output_tokens_},
      {"temperature", temperature_},
      {"seed", options.seed},
      {"warm_up", options.warm_up},
      {"seconds", absl::ToDoubleSeconds(report.elapsed)},
      {"requests", report.answered},
      {"errors", CountErrors(report)},
      {"errors_by_reason", report.errors},
      {"unanswered", report.unanswered},
      {"requests_per_second", report.requests_per_second},
      {"prompt_tokens_per_second", report.prompt_tokens_per_second},
      {"output_tokens_per_second", report.output_tokens_per_second},
      {"time_to_first_token_ms", JsonTimes(report.first_token)},
      {"time_between_tokens_ms", JsonTimes(report.between_tokens)},
      {"request_ms", JsonTimes(report.whole)},
      {"server_mean_ms",
       {{"queued", absl::ToDoubleMilliseconds(report.mean_queued)},
        {"computing", absl::ToDoubleMilliseconds(report.mean_computing)}}},
  };
  std::ofstream file(shared.json);
  file << json.dump(2) << "\n";
  file.close();
  if (!file) return absl::InternalError(absl::StrCat("cannot write ", shared.json));
  return absl::OkStatus();
}

}  // namespace deltanet
