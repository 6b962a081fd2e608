// bench --generate: how many tokens a second a server generates for many requests at once, and how soon.
#ifndef DELTANET_CLIENT_GENERATE_BENCH_H_
#define DELTANET_CLIENT_GENERATE_BENCH_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "client/client.h"
#include "client/command.h"
#include "client/flags.h"
#include "client/generate_load.h"

namespace deltanet {

class GenerateBench {
 public:
  // Of `bench`, beside which these go with --generate alone.
  struct SharedFlags {
    ServerFlags server;
    double rate = 0;
    int64_t connections = 1;
    std::string json;
  };

  void AddTo(FlagSet* flags);
  bool wanted() const { return wanted_; }
  // Also that none of these is given without --generate.
  absl::Status Check(const FlagSet& flags, const SharedFlags& shared) const;
  absl::Status Run(const SharedFlags& shared, const ModelInfo& model, const std::string& server_version,
                   const Output& output) const;

 private:
  absl::StatusOr<GenerateLoadOptions> Options(const SharedFlags& shared, const ModelInfo& model) const;
  absl::Status WriteJson(const SharedFlags& shared, const GenerateLoadOptions& options,
                         const ModelInfo& model, const std::string& server_version,
                         const GenerateLoadReport& report) const;

  bool wanted_ = false;
  int64_t concurrency_ = 1;
  std::optional<int64_t> requests_;
  double seconds_ = 0;
  std::string prompt_tokens_ = "128";
  std::string output_tokens_ = "128";
  std::optional<int64_t> warm_up_;
  double temperature_ = 0;
  int64_t seed_ = 1;
};

}  // namespace deltanet

#endif  // DELTANET_CLIENT_GENERATE_BENCH_H_
