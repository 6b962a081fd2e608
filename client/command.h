// The commands of deltanet-client.
#ifndef DELTANET_CLIENT_COMMAND_H_
#define DELTANET_CLIENT_COMMAND_H_

#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/client.h"
#include "client/flags.h"

namespace deltanet {

// Where a command writes: results and complaints.
struct Output {
  std::ostream& out;
  std::ostream& err;
};

// One command: made, given its flags, run once.
class Command {
 public:
  virtual ~Command() = default;

  virtual void AddFlags(FlagSet* flags) = 0;
  // What is wrong with flags that are each right alone.
  virtual absl::Status CheckFlags(const FlagSet& /*flags*/) const { return absl::OkStatus(); }
  virtual absl::Status Run(const Output& output) = 0;
};

std::unique_ptr<Command> NewForwardCommand();
std::unique_ptr<Command> NewStreamCommand();
std::unique_ptr<Command> NewGenerateCommand();
std::unique_ptr<Command> NewScoreCommand();
std::unique_ptr<Command> NewBenchCommand();
std::unique_ptr<Command> NewCompareCommand();
std::unique_ptr<Command> NewMakeInputCommand();
std::unique_ptr<Command> NewMakeModelCommand();
std::unique_ptr<Command> NewModelsCommand();
std::unique_ptr<Command> NewSessionsCommand();
std::unique_ptr<Command> NewEndSessionCommand();
std::unique_ptr<Command> NewHealthCommand();

// The flags of every command that talks to a server.
struct ServerFlags {
  std::string server = "localhost:50051";
  TlsOptions tls;

  void AddTo(FlagSet* flags);
  ClientOptions options() const;
  absl::StatusOr<Client> Connect() const { return Client::Connect(server, options()); }
};
void AddModelFlag(FlagSet* flags, std::string* model);

// deltanet-client ARGUMENTS... : the whole program but its name. Returns the exit status: 0, 1 where the
// command failed, 2 where the command line is wrong.
int RunClient(const std::vector<std::string>& arguments, const Output& output);

}  // namespace deltanet

#endif  // DELTANET_CLIENT_COMMAND_H_
