#include "server/service_context.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "model/base/status_macros.h"
#include "proto/wire.h"
#include "server/log.h"

namespace deltanet {

uint64_t ActiveCalls::Add(const std::shared_ptr<Drainable>& drainable) {
  bool draining = false;
  uint64_t call = 0;
  {
    MutexLock lock(&mu_);
    call = next_++;
    calls_.emplace(call, drainable);
    draining = draining_;
  }
  if (draining && drainable != nullptr) drainable->Drain();
  return call;
}

void ActiveCalls::Remove(uint64_t call) {
  MutexLock lock(&mu_);
  calls_.erase(call);
  if (calls_.empty()) none_.NotifyAll();
}

void ActiveCalls::StartDraining() {
  std::vector<std::shared_ptr<Drainable>> drainables;
  {
    MutexLock lock(&mu_);
    if (draining_) return;
    draining_ = true;
    for (const auto& [call, drainable] : calls_) drainables.push_back(drainable.lock());
  }
  for (const std::shared_ptr<Drainable>& drainable : drainables) {
    if (drainable != nullptr) drainable->Drain();
  }
}

bool ActiveCalls::WaitUntilNone(Clock* clock, absl::Time deadline) {
  MutexLock lock(&mu_);
  while (!calls_.empty()) {
    if (clock->Now() >= deadline) return false;
    clock->WaitUntil(&none_, &mu_, deadline);
  }
  return true;
}

absl::StatusOr<int> ServiceContext::FindModel(const std::string& name) const {
  if (name.empty() && model_names.size() == 1) return 0;
  if (name.empty()) {
    return InvalidRequest(absl::StrCat("model is empty, want one of ", absl::StrJoin(model_names, ", ")));
  }
  const auto found = std::lower_bound(model_names.begin(), model_names.end(), name);
  if (found != model_names.end() && *found == name) return static_cast<int>(found - model_names.begin());
  return MakeError(absl::StatusCode::kNotFound, reason::kModelNotFound,
                   absl::StrCat("model is \"", name, "\", want one of ", absl::StrJoin(model_names, ", ")));
}

absl::StatusOr<const Tokenizer*> ServiceContext::FindTokenizer(int model) const {
  const ModelTokenizer& found = tokenizers[model];
  if (found.tokenizer != nullptr) return found.tokenizer;
  return MakeError(absl::StatusCode::kFailedPrecondition, reason::kNoTokenizer, found.why_not);
}

absl::StatusOr<std::vector<int64_t>> ServiceContext::Tokenize(int model, const std::string& text,
                                                              TextPlace place) const {
  ASSIGN_OR_RETURN(const Tokenizer* tokenizer, FindTokenizer(model));
  RETURN_IF_ERROR(CheckText(text, request_limits));
  absl::StatusOr<std::vector<int64_t>> ids = tokenizer->Encode(text, place);
  if (!ids.ok()) return InvalidRequest(ids.status().message());
  RETURN_IF_ERROR(CheckIds("text's id", *ids, batcher->description(model).vocab_size));
  return ids;
}

std::string PeerOf(const grpc::CallbackServerContext& call) {
  if (const auto context = call.auth_context(); context != nullptr && context->IsPeerAuthenticated()) {
    std::string identity = "certificate";
    for (const grpc::string_ref& part : context->GetPeerIdentity()) {
      absl::StrAppend(&identity, ":", absl::string_view(part.data(), part.size()));
    }
    return identity;
  }
  const std::string peer = call.peer();  // "ipv4:10.0.0.1:1234"
  return peer.substr(0, peer.rfind(':'));
}

absl::Time CallDeadline(const grpc::CallbackServerContext& call) {
  const auto deadline = call.deadline();
  return deadline == decltype(deadline)::max() ? absl::InfiniteFuture() : absl::FromChrono(deadline);
}

void LogIfInternal(absl::string_view method, const std::string& request_id, const absl::Status& status) {
  if (status.code() != absl::StatusCode::kInternal) return;
  const std::string reason = ErrorReason(status);
  Log(LogLevel::kError, "request_failed",
      {{"method", method},
       {"request_id", request_id},
       {"reason", reason},
       {"message", absl::string_view(status.message().data(), status.message().size())}});
}

}  // namespace deltanet
