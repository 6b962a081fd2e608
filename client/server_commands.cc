// models, sessions, end-session and health: what an operator asks a server.
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "client/command.h"
#include "model/base/status_macros.h"

namespace deltanet {
namespace {

std::string DTypeNames(const std::vector<DType>& dtypes) {
  return absl::StrJoin(dtypes, ", ",
                       [](std::string* out, DType dtype) { absl::StrAppend(out, DTypeName(dtype)); });
}

std::string Describe(const ModelInfo& model) {
  std::string text;
  const auto line = [&text](const char* name, const std::string& value) {
    absl::StrAppendFormat(&text, "  %-18s %s\n", name, value);
  };
  absl::StrAppend(&text, model.name, "\n");
  line("family", model.family);
  line("input", model.vocab_size > 0
                    ? absl::StrCat("ids in [0,", model.vocab_size, "): ", DTypeNames(model.input_dtypes))
                    : absl::StrCat("values [T,", model.input_width, "]: ", DTypeNames(model.input_dtypes)));
  line("output", absl::StrCat("values [T,", model.output_width, "]: ", DTypeNames(model.output_dtypes)));
  line("parameters", absl::StrCat(model.parameters));
  line("computes in", absl::StrCat(DTypeName(model.compute_dtype), " on ", model.device,
                                   model.deterministic ? ", deterministic" : ""));
  line("look-ahead", absl::StrCat(model.lookahead, model.lookahead == 1 ? " token" : " tokens"));
  if (model.generates) {
    line("generates", absl::StrCat("at most ", model.max_generated_tokens, " tokens a call, ",
                                   model.has_tokenizer ? "from text or ids" : "from ids"));
    if (model.bos_id) line("a text begins with", absl::StrCat(*model.bos_id));
    if (!model.eos_ids.empty()) line("a text ends with", absl::StrJoin(model.eos_ids, " or "));
  }
  line("bytes per session", absl::StrCat(model.bytes_per_session));
  line("sessions", absl::StrCat(model.sessions, " in use, ", model.sessions_free, " free"));
  line("largest response", absl::StrCat(model.max_response_bytes, " bytes"));
  return text;
}

class ModelsCommand : public Command {
 public:
  void AddFlags(FlagSet* flags) override { server_.AddTo(flags); }

  absl::Status Run(const Output& output) override {
    ASSIGN_OR_RETURN(const Client client, server_.Connect());
    ASSIGN_OR_RETURN(const std::vector<ModelInfo> models, client.ListModels());
    for (const ModelInfo& model : models) output.out << Describe(model);
    return absl::OkStatus();
  }

 private:
  ServerFlags server_;
};

class SessionsCommand : public Command {
 public:
  void AddFlags(FlagSet* flags) override {
    server_.AddTo(flags);
    flags->Add("model", "NAME", "only sessions of this model", &model_);
  }

  absl::Status Run(const Output& output) override {
    ASSIGN_OR_RETURN(const Client client, server_.Connect());
    ASSIGN_OR_RETURN(const std::vector<SessionInfo> sessions, client.ListSessions(model_));
    output.out << absl::StrFormat("%-32s %-16s %12s %-10s %10s %10s\n", "ID", "MODEL", "POSITION", "ATTACHED",
                                  "IDLE", "IDLE-TTL");
    for (const SessionInfo& session : sessions) {
      output.out << absl::StrFormat("%-32s %-16s %12d %-10s %10s %10s\n", session.id, session.model,
                                    session.committed_position, session.attached ? "yes" : "no",
                                    absl::FormatDuration(absl::Trunc(session.idle, absl::Milliseconds(1))),
                                    absl::FormatDuration(session.idle_ttl));
    }
    return absl::OkStatus();
  }

 private:
  ServerFlags server_;
  std::string model_;
};

class EndSessionCommand : public Command {
 public:
  void AddFlags(FlagSet* flags) override {
    server_.AddTo(flags);
    flags->AddPositional("ID", "the session", &id_);
  }

  absl::Status Run(const Output& output) override {
    ASSIGN_OR_RETURN(const Client client, server_.Connect());
    ASSIGN_OR_RETURN(const int64_t position, client.EndSession(id_));
    output.out << "session " << id_ << " ended at " << position << "\n";
    return absl::OkStatus();
  }

 private:
  ServerFlags server_;
  std::string id_;
};

class HealthCommand : public Command {
 public:
  void AddFlags(FlagSet* flags) override {
    server_.AddTo(flags);
    flags->Add("service", "NAME", "a model's name; left out, the server as a whole", &service_);
  }

  absl::Status Run(const Output& output) override {
    ASSIGN_OR_RETURN(const Client client, server_.Connect());
    ASSIGN_OR_RETURN(const HealthStatus health, client.CheckHealth(service_));
    if (health == HealthStatus::kServing) {
      output.out << "SERVING\n";
      return absl::OkStatus();
    }
    return absl::UnavailableError(health == HealthStatus::kNotServing ? "NOT_SERVING" : "UNKNOWN");
  }

 private:
  ServerFlags server_;
  std::string service_;
};

}  // namespace

std::unique_ptr<Command> NewModelsCommand() { return std::make_unique<ModelsCommand>(); }
std::unique_ptr<Command> NewSessionsCommand() { return std::make_unique<SessionsCommand>(); }
std::unique_ptr<Command> NewEndSessionCommand() { return std::make_unique<EndSessionCommand>(); }
std::unique_ptr<Command> NewHealthCommand() { return std::make_unique<HealthCommand>(); }

}  // namespace deltanet
