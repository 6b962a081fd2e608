// bench: how many tokens a second a server gives many sessions at once, and how soon.
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/command.h"
#include "client/generate_bench.h"
#include "client/load_generator.h"
#include "client/sequences.h"
#include "model/base/status_macros.h"

namespace deltanet {
namespace {

class BenchCommand : public Command {
 public:
  void AddFlags(FlagSet* flags) override {
    shared_.server.AddTo(flags);
    AddModelFlag(flags, &model_);
    flags->Add("sessions", "N",
               "sessions at a time, each on a stream of its own; with --unary, calls at a time", 1,
               &sessions_);
    flags->Add("chunk", "N", "tokens a message", 1, &chunk_);
    flags->Add("duration", "TIME", "how long to send; 10s if --count is not given either", &duration_);
    flags->Add("count", "N", "messages to send in all", 1, &count_);
    flags->Add(
        "rate", "R",
        "messages a second in all, sent at their time whether answers come or not, with latencies "
        "from that time "
        "(open loop); 0: each session sends when it is answered (closed loop); with --generate, requests "
        "a second at random times (a Poisson process)",
        &shared_.rate);
    flags->Add("connections", "N", "TCP connections, with a thread each; at most --sessions or --concurrency",
               1, &shared_.connections);
    flags->Add("unary", "stateless Forward calls instead of streams", &unary_);
    flags->Add("batch", "N", "sequences a call, with --unary", 1, &batch_);
    flags->Add("json", "FILE", "write the result there too", &shared_.json);
    generate_.AddTo(flags);
  }

  absl::Status CheckFlags(const FlagSet& flags) const override {
    RETURN_IF_ERROR(generate_.Check(flags, shared_));
    if (generate_.wanted()) return absl::OkStatus();
    if (shared_.connections > sessions_) {
      return absl::InvalidArgumentError(
          absl::StrCat("--connections is ", shared_.connections, ", want at most --sessions ", sessions_));
    }
    if (flags.given("batch") && !unary_) return absl::InvalidArgumentError("--batch wants --unary");
    return absl::OkStatus();
  }

  absl::Status Run(const Output& output) override {
    ASSIGN_OR_RETURN(const Client client, shared_.server.Connect());
    ASSIGN_OR_RETURN(const std::string server_version, client.ServerVersion());
    ASSIGN_OR_RETURN(const ModelInfo model, client.GetModel(model_));
    if (generate_.wanted()) return generate_.Run(shared_, model, server_version, output);
    LoadOptions options;
    options.server = shared_.server.server;
    options.client = shared_.server.options();
    options.model = model.name;
    options.sessions = sessions_;
    options.connections = shared_.connections;
    options.unary = unary_;
    options.input = RandomInput(model);
    options.count = count_;
    options.duration = duration_ == absl::InfiniteDuration() && !count_ ? absl::Seconds(10) : duration_;
    if (shared_.rate > 0) options.rate = shared_.rate;

    LoadProgress before;
    ASSIGN_OR_RETURN(const LoadReport report, GenerateLoad(options, [&](const LoadProgress& now) {
                       const double seconds = absl::ToDoubleSeconds(now.elapsed - before.elapsed);
                       const double rate = static_cast<double>(now.answered - before.answered) / seconds;
                       output.err << absl::StrFormat("%6.1f s  %10.0f chunks/s  %12.0f tokens/s  %d errors\n",
                                                     absl::ToDoubleSeconds(now.elapsed), rate,
                                                     rate * static_cast<double>(ChunkTokens()), now.errors)
                                  << std::flush;
                       before = now;
                     }));
    if (report.answered == 0) {
      return absl::UnavailableError(
          absl::StrCat("no answers in the time given; errors: ", report.errors, " ", report.first_error));
    }
    Print(report, output);
    if (!shared_.json.empty()) RETURN_IF_ERROR(WriteJson(report, model, server_version));
    return absl::OkStatus();
  }

 private:
  int64_t ChunkTokens() const { return batch_ * chunk_; }

  // The same for every message: what a delta rule costs does not depend on the values.
  Tensor RandomInput(const ModelInfo& model) const {
    std::mt19937_64 random(1);
    Tensor input;
    if (unary_) input.shape.push_back(batch_);
    input.shape.push_back(chunk_);
    const auto append = [&input](const auto& value) {
      input.data.append(reinterpret_cast<const char*>(&value), sizeof(value));
    };
    if (model.vocab_size > 0) {
      input.dtype = DType::kInt64;
      std::uniform_int_distribution<int64_t> uniform(0, model.vocab_size - 1);
      for (int64_t i = NumElements(input.shape); i > 0; --i) append(uniform(random));
    } else {
      input.shape.push_back(model.input_width);
      std::normal_distribution<float> normal;
      for (int64_t i = NumElements(input.shape); i > 0; --i) append(normal(random));
    }
    return input;
  }

  double PerSecond(const LoadReport& report) const {
    return static_cast<double>(report.answered) / absl::ToDoubleSeconds(report.elapsed);
  }

  void Print(const LoadReport& report, const Output& output) const {
    const double rate = PerSecond(report);
    output.out << absl::StrFormat("throughput: %.0f tokens/s, %.0f chunks/s (%d chunks in %.2f s)\n",
                                  rate * static_cast<double>(ChunkTokens()), rate, report.answered,
                                  absl::ToDoubleSeconds(report.elapsed))
               << "latency of a chunk: " << report.latencies.Summary() << "\n"
               << absl::StrFormat("in the server, on average: queued %.3f ms, computing %.3f ms\n",
                                  absl::ToDoubleMilliseconds(report.mean_queued),
                                  absl::ToDoubleMilliseconds(report.mean_computing));
    if (report.errors > 0) {
      output.out << "errors: " << report.errors << ", the first: " << report.first_error << "\n";
    }
    if (report.unanswered > 0) output.out << "unanswered: " << report.unanswered << "\n";
  }

  absl::Status WriteJson(const LoadReport& report, const ModelInfo& model,
                         const std::string& server_version) const {
    const auto milliseconds = [](absl::Duration duration) { return absl::ToDoubleMilliseconds(duration); };
    const nlohmann::ordered_json json = {
        {"server", shared_.server.server},
        {"server_version", server_version},
        {"client_version", std::string(ClientVersion())},
        {"model", model.name},
        {"family", model.family},
        {"device", model.device},
        {"mode", unary_ ? "unary" : "stream"},
        {"loop", shared_.rate > 0 ? "open" : "closed"},
        {"rate", shared_.rate},
        {"sessions", sessions_},
        {"connections", shared_.connections},
        {"batch", batch_},
        {"chunk", chunk_},
        {"seconds", absl::ToDoubleSeconds(report.elapsed)},
        {"chunks", report.answered},
        {"errors", report.errors},
        {"unanswered", report.unanswered},
        {"tokens_per_second", PerSecond(report) * static_cast<double>(ChunkTokens())},
        {"chunks_per_second", PerSecond(report)},
        {"latency_ms",
         {{"mean", milliseconds(report.latencies.mean())},
          {"p50", milliseconds(report.latencies.Percentile(0.5))},
          {"p95", milliseconds(report.latencies.Percentile(0.95))},
          {"p99", milliseconds(report.latencies.Percentile(0.99))},
          {"max", milliseconds(report.latencies.max())}}},
        {"server_mean_ms",
         {{"queued", milliseconds(report.mean_queued)}, {"computing", milliseconds(report.mean_computing)}}},
    };
    std::ofstream file(shared_.json);
    file << json.dump(2) << "\n";
    file.close();
    if (!file) return absl::InternalError(absl::StrCat("cannot write ", shared_.json));
    return absl::OkStatus();
  }

  GenerateBench::SharedFlags shared_;
  GenerateBench generate_;
  std::string model_;
  int64_t sessions_ = 1;
  int64_t chunk_ = 16;
  absl::Duration duration_ = absl::InfiniteDuration();
  std::optional<int64_t> count_;
  bool unary_ = false;
  int64_t batch_ = 1;
};

}  // namespace

std::unique_ptr<Command> NewBenchCommand() { return std::make_unique<BenchCommand>(); }

}  // namespace deltanet
