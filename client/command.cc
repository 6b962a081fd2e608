#include "client/command.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "model/base/status_macros.h"
#include "proto/wire.h"

namespace deltanet {
namespace {

constexpr char kProgram[] = "deltanet-client";

struct CommandEntry {
  const char* name;
  const char* summary;
  std::unique_ptr<Command> (*make)();
};

constexpr CommandEntry kCommands[] = {
    {"forward", "Runs sequences in one call: tensor 'input' of one file to tensor 'output' of another.",
     &NewForwardCommand},
    {"stream", "Streams sequences chunk by chunk, joins the output, and measures the chunks' latency.",
     &NewStreamCommand},
    {"generate", "Continues a prompt, or a session, token by token, and shows the text as it comes.",
     &NewGenerateCommand},
    {"score", "Says how likely each token of a text is after those before it, and the text's perplexity.",
     &NewScoreCommand},
    {"bench", "Loads a server with many sessions or generations, and measures throughput and latency.",
     &NewBenchCommand},
    {"models", "Lists the server's models.", &NewModelsCommand},
    {"sessions", "Lists the server's named sessions.", &NewSessionsCommand},
    {"end-session", "Ends a named session.", &NewEndSessionCommand},
    {"health", "Asks whether the server is serving: exit status 0 if so, else 1.", &NewHealthCommand},
    {"make-model", "Writes a random model, to try the service without weights.", &NewMakeModelCommand},
    {"make-input", "Writes random input.", &NewMakeInputCommand},
    {"compare", "Compares the tensor 'output' of two files: exit status 0 if they agree, else 1.",
     &NewCompareCommand},
};

std::string Usage() {
  std::string text = absl::StrCat("Usage: ", kProgram, " COMMAND [flags]\n\nCommands:\n");
  for (const CommandEntry& entry : kCommands) {
    absl::StrAppendFormat(&text, "  %-12s %s\n", entry.name, entry.summary);
  }
  absl::StrAppend(&text, "\n'", kProgram, " COMMAND --help' says a command's flags; '", kProgram,
                  " --version' the version.\n");
  return text;
}

// "NOT_FOUND (SESSION_EXPIRED): session 'a' ... [committed_position 12]"
std::string Describe(const absl::Status& status) {
  const std::string reason = ErrorReason(status), position = ErrorMetadata(status, "committed_position");
  return absl::StrCat(absl::StatusCodeToString(status.code()), reason.empty() ? "" : " (", reason,
                      reason.empty() ? "" : ")", ": ", status.message(),
                      position.empty() ? "" : " [committed_position ", position, position.empty() ? "" : "]");
}

}  // namespace

void ServerFlags::AddTo(FlagSet* flags) {
  flags->Add("server", "HOST:PORT", "address of the server", &server);
  flags->Add("tls-ca", "FILE", "use TLS; roots (PEM) that vouch for the server", &tls.ca);
  flags->Add("tls-cert", "FILE", "use TLS; the client's certificate (PEM), for servers that want one",
             &tls.certificate);
  flags->Add("tls-key", "FILE", "its private key (PEM)", &tls.key);
}

ClientOptions ServerFlags::options() const {
  ClientOptions options;
  if (!tls.ca.empty() || !tls.certificate.empty() || !tls.key.empty()) options.tls = tls;
  return options;
}

void AddModelFlag(FlagSet* flags, std::string* model) {
  flags->Add("model", "NAME", "the model; may be left out where the server has exactly one", model);
}

int RunClient(const std::vector<std::string>& arguments, const Output& output) {
  if (arguments.empty()) {
    output.err << Usage();
    return 2;
  }
  if (arguments[0] == "--help" || arguments[0] == "help") {
    output.out << Usage();
    return 0;
  }
  if (arguments[0] == "--version") {
    output.out << kProgram << " " << ClientVersion() << "\n";
    return 0;
  }
  const auto entry = std::find_if(std::begin(kCommands), std::end(kCommands),
                                  [&](const CommandEntry& command) { return command.name == arguments[0]; });
  if (entry == std::end(kCommands)) {
    output.err << kProgram << ": unknown command '" << arguments[0] << "'; see --help\n";
    return 2;
  }
  const std::string prefix = absl::StrCat(kProgram, " ", entry->name);
  const std::unique_ptr<Command> command = entry->make();
  FlagSet flags(prefix, entry->summary);
  command->AddFlags(&flags);
  absl::Status status = flags.Parse({arguments.begin() + 1, arguments.end()});
  if (flags.help_wanted()) {
    output.out << flags.Help();
    return 0;
  }
  if (status.ok()) status = command->CheckFlags(flags);
  if (!status.ok()) {
    output.err << prefix << ": " << status.message() << "\n";
    return 2;
  }
  status = command->Run(output);
  output.out.flush();
  if (!status.ok()) {
    output.err << prefix << ": " << Describe(status) << "\n";
    return 1;
  }
  return 0;
}

}  // namespace deltanet
