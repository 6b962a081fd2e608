#include "server/session_store.h"

#include <sys/random.h>

#include <algorithm>
#include <cerrno>
#include <list>
#include <map>
#include <set>
#include <unordered_map>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "model/base/check.h"
#include "model/base/mutex.h"
#include "model/base/status_macros.h"
#include "proto/wire.h"

namespace deltanet {
namespace {

constexpr size_t kMaxIdLength = 128;

bool IsIdCharacter(char c) {
  return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == ':' || c == '-';
}

absl::Status InvalidRequest(absl::string_view message) {
  return MakeError(absl::StatusCode::kInvalidArgument, reason::kInvalidRequest, message);
}

absl::Status CheckId(const std::string& id) {
  if (id.size() > kMaxIdLength) {
    return InvalidRequest(
        absl::StrCat("session id has ", id.size(), " characters, want at most ", kMaxIdLength));
  }
  for (const char c : id) {
    if (!IsIdCharacter(c)) {
      return InvalidRequest(absl::StrCat("session id \"", absl::CHexEscape(id), "\" has the character \"",
                                         absl::CHexEscape(absl::string_view(&c, 1)),
                                         "\", want only A-Z a-z 0-9 . _ : -"));
    }
  }
  return absl::OkStatus();
}

// 128 bits from the operating system, in hex.
std::string RandomId() {
  char bits[16];
  size_t filled = 0;
  while (filled < sizeof(bits)) {
    const ssize_t got = getrandom(bits + filled, sizeof(bits) - filled, 0);
    DELTANET_CHECK(got > 0 || errno == EINTR, "getrandom(2) failed");
    if (got > 0) filled += static_cast<size_t>(got);
  }
  return absl::BytesToHexString(absl::string_view(bits, sizeof(bits)));
}

// The last ids that sessions had, and how those ended. Bounded: the oldest is forgotten first.
class Tombstones {
 public:
  enum class Cause { kExpired, kEnded };

  explicit Tombstones(int64_t limit) : limit_(limit) {}

  void Add(const std::string& id, Cause cause) {
    Remove(id);
    order_.push_back(id);
    by_id_[id] = {cause, std::prev(order_.end())};
    if (static_cast<int64_t>(order_.size()) > limit_) Remove(std::string(order_.front()));
  }

  void Remove(const std::string& id) {
    const auto found = by_id_.find(id);
    if (found == by_id_.end()) return;
    order_.erase(found->second.place);
    by_id_.erase(found);
  }

  // NOT_FOUND, with what is known of the id.
  absl::Status Error(const std::string& id) const {
    const auto found = by_id_.find(id);
    if (found == by_id_.end()) {
      return MakeError(absl::StatusCode::kNotFound, reason::kSessionNotFound,
                       absl::StrCat("no session \"", absl::CHexEscape(id), "\""));
    }
    if (found->second.cause == Cause::kExpired) {
      return MakeError(
          absl::StatusCode::kNotFound, reason::kSessionExpired,
          absl::StrCat("session \"", id, "\" was idle for longer than its time-to-live and has expired"));
    }
    return MakeError(absl::StatusCode::kNotFound, reason::kSessionEnded,
                     absl::StrCat("session \"", id, "\" has ended"));
  }

 private:
  struct Entry {
    Cause cause;
    std::list<std::string>::iterator place;
  };

  const int64_t limit_;
  std::list<std::string> order_;  // Oldest first.
  std::unordered_map<std::string, Entry> by_id_;
};

}  // namespace

class SessionStore::Impl {
 public:
  Impl(const SessionStoreOptions& options, Batcher* batcher, Clock* clock)
      : options_(options), batcher_(batcher), clock_(clock), tombstones_(options.remembered_expired) {}

  ~Impl() {
    MutexLock lock(&mu_);
    for (const auto& [id, entry] : named_) batcher_->Close(entry.session->lane);
    for (const auto& [session, entry] : own_) batcher_->Close(session->lane);
  }

  AttachmentId NewAttachment() {
    MutexLock lock(&mu_);
    return ++last_attachment_;
  }

  absl::StatusOr<std::shared_ptr<const Session>> Create(int model, const std::string& id,
                                                        absl::Duration idle_ttl, AttachmentId attachment,
                                                        const std::string& peer) {
    RETURN_IF_ERROR(CheckId(id));
    if (idle_ttl < absl::ZeroDuration() || idle_ttl > options_.max_idle_ttl) {
      return InvalidRequest(absl::StrCat("idle_ttl is ", absl::FormatDuration(idle_ttl), ", want 0 to ",
                                         absl::FormatDuration(options_.max_idle_ttl)));
    }
    MutexLock lock(&mu_);
    Named entry;
    entry.last_used = clock_->Now();
    entry.idle_ttl = idle_ttl == absl::ZeroDuration() ? options_.default_idle_ttl : idle_ttl;
    entry.attachment = attachment;
    if (const auto found = FindLiveLocked(id); found != named_.end()) {
      return MakeError(absl::StatusCode::kAlreadyExists, reason::kSessionExists,
                       absl::StrCat("session \"", id, "\" exists already"),
                       PositionOf(*found->second.session));
    }
    RETURN_IF_ERROR(AdmitLocked(model, peer));
    auto session = std::make_shared<Session>();
    session->peer = peer;
    session->id = id;
    while (session->id.empty() || named_.count(session->id) > 0) session->id = RandomId();
    session->model = model;
    session->lane = batcher_->OpenLane(model);
    entry.session = session;
    tombstones_.Remove(session->id);
    if (attachment != kNotAttached) attached_[attachment].named.insert(session->id);
    named_.emplace(session->id, std::move(entry));
    CountLocked(*session);
    return std::shared_ptr<const Session>(std::move(session));
  }

  absl::StatusOr<std::shared_ptr<const Session>> CreateOwn(int model, AttachmentId attachment,
                                                           const std::string& peer) {
    DELTANET_CHECK(attachment != kNotAttached, "a session of a stream's own needs the stream");
    MutexLock lock(&mu_);
    RETURN_IF_ERROR(AdmitLocked(model, peer));
    auto session = std::make_shared<Session>();
    session->peer = peer;
    session->model = model;
    session->lane = batcher_->OpenLane(model);
    own_.emplace(session.get(), Own{session, attachment});
    attached_[attachment].own.insert(session.get());
    CountLocked(*session);
    return std::shared_ptr<const Session>(std::move(session));
  }

  absl::StatusOr<std::shared_ptr<const Session>> Find(int model, const std::string& id,
                                                      AttachmentId attachment) {
    MutexLock lock(&mu_);
    const auto found = FindLiveLocked(id);
    if (found == named_.end()) return tombstones_.Error(id);
    Named& entry = found->second;
    if (model != -1 && entry.session->model != model) {
      return MakeError(absl::StatusCode::kFailedPrecondition, reason::kSessionModel,
                       absl::StrCat("session \"", id, "\" belongs to another model"),
                       PositionOf(*entry.session));
    }
    if (entry.attachment != kNotAttached && entry.attachment != attachment) {
      return MakeError(absl::StatusCode::kAborted, reason::kSessionAttached,
                       absl::StrCat("session \"", id, "\" is attached to another stream"),
                       PositionOf(*entry.session));
    }
    entry.last_used = clock_->Now();
    if (attachment != kNotAttached && entry.attachment == kNotAttached) {
      entry.attachment = attachment;
      attached_[attachment].named.insert(id);
    }
    return entry.session;
  }

  void Touch(const Session& session) {
    MutexLock lock(&mu_);
    const auto found = named_.find(session.id);
    if (found != named_.end() && found->second.session.get() == &session) {
      found->second.last_used = clock_->Now();
    }
  }

  void End(const Session& session) {
    MutexLock lock(&mu_);
    if (const auto own = own_.find(&session); own != own_.end()) {
      if (const auto stream = attached_.find(own->second.attachment); stream != attached_.end()) {
        stream->second.own.erase(&session);
        ForgetIfEmptyLocked(stream);
      }
      EndOwnLocked(own);
      return;
    }
    const auto named = named_.find(session.id);
    if (named != named_.end() && named->second.session.get() == &session) {
      EndNamedLocked(named, Tombstones::Cause::kEnded);
    }
  }

  absl::StatusOr<int64_t> EndByName(const std::string& id) {
    MutexLock lock(&mu_);
    const auto found = FindLiveLocked(id);
    if (found == named_.end()) return tombstones_.Error(id);
    const std::shared_ptr<Lane> lane = found->second.session->lane;
    EndNamedLocked(found, Tombstones::Cause::kEnded);
    return batcher_->committed_position(lane);  // A closed lane commits nothing more.
  }

  void Detach(AttachmentId attachment) {
    MutexLock lock(&mu_);
    const auto stream = attached_.find(attachment);
    if (stream == attached_.end()) return;
    const absl::Time now = clock_->Now();
    for (const Session* session : stream->second.own) EndOwnLocked(own_.find(session));
    for (const std::string& id : stream->second.named) {
      Named& entry = named_.find(id)->second;
      entry.attachment = kNotAttached;
      entry.last_used = now;  // So that its client has the time-to-live to come back.
    }
    attached_.erase(stream);
  }

  int64_t ExpireIdle() {
    MutexLock lock(&mu_);
    return ExpireIdleLocked();
  }

  int64_t expired() const {
    MutexLock lock(&mu_);
    return expired_;
  }

  int64_t sessions(int model) const {
    MutexLock lock(&mu_);
    return InUseLocked(model);
  }

  int64_t sessions_free(int model) const {
    MutexLock lock(&mu_);
    return batcher_->max_sessions(model) - InUseLocked(model);
  }

  std::vector<SessionSnapshot> List(int model, const std::string& after, int64_t limit) const {
    std::vector<SessionSnapshot> snapshots;
    MutexLock lock(&mu_);
    const absl::Time now = clock_->Now();
    for (auto it = named_.upper_bound(after);
         it != named_.end() && static_cast<int64_t>(snapshots.size()) < limit; ++it) {
      const Named& entry = it->second;
      if (model != -1 && entry.session->model != model) continue;
      if (ExpiredLocked(entry, now)) continue;
      SessionSnapshot snapshot;
      snapshot.id = it->first;
      snapshot.model = entry.session->model;
      snapshot.committed_position = batcher_->committed_position(entry.session->lane);
      snapshot.attached = entry.attachment != kNotAttached;
      snapshot.idle = now - entry.last_used;
      snapshot.idle_ttl = entry.idle_ttl;
      snapshots.push_back(std::move(snapshot));
    }
    return snapshots;
  }

 private:
  struct Named {
    std::shared_ptr<const Session> session;
    absl::Time last_used;
    absl::Duration idle_ttl;
    AttachmentId attachment = kNotAttached;
  };
  struct Own {
    std::shared_ptr<const Session> session;
    AttachmentId attachment = kNotAttached;
  };
  // What a stream holds.
  struct Attached {
    std::set<const Session*> own;
    std::set<std::string> named;
  };

  std::map<std::string, std::string> PositionOf(const Session& session) const {
    return {{"committed_position", absl::StrCat(batcher_->committed_position(session.lane))}};
  }

  int64_t InUseLocked(int model) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const auto found = in_use_.find(model);
    return found == in_use_.end() ? 0 : found->second;
  }

  int64_t OfPeerLocked(const std::string& peer) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const auto found = of_peer_.find(peer);
    return found == of_peer_.end() ? 0 : found->second;
  }

  absl::Status AdmitLocked(int model, const std::string& peer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const int64_t limit = batcher_->max_sessions(model);
    const int64_t peer_limit = options_.max_per_peer > 0 ? options_.max_per_peer : INT64_MAX;
    if (InUseLocked(model) >= limit || OfPeerLocked(peer) >= peer_limit) ExpireIdleLocked();
    if (InUseLocked(model) >= limit) {
      return MakeError(absl::StatusCode::kResourceExhausted, reason::kSessionsFull,
                       absl::StrCat("all ", limit, " sessions of the model are in use"));
    }
    if (OfPeerLocked(peer) >= peer_limit) {
      return MakeError(absl::StatusCode::kResourceExhausted, reason::kSessionsFull,
                       absl::StrCat("this client has ", OfPeerLocked(peer), " sessions, its limit is ",
                                    options_.max_per_peer));
    }
    return absl::OkStatus();
  }

  void CountLocked(const Session& session) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    ++in_use_[session.model];
    ++of_peer_[session.peer];
  }
  void UncountLocked(const Session& session) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    --in_use_[session.model];
    const auto found = of_peer_.find(session.peer);
    if (--found->second == 0) of_peer_.erase(found);
  }

  bool ExpiredLocked(const Named& entry, absl::Time now) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return entry.attachment == kNotAttached && now - entry.last_used > entry.idle_ttl &&
           batcher_->pending(entry.session->lane) == 0;
  }

  // The session, unless it has expired: then it ends now.
  std::map<std::string, Named>::iterator FindLiveLocked(const std::string& id)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const auto found = named_.find(id);
    if (found == named_.end() || !ExpiredLocked(found->second, clock_->Now())) return found;
    EndNamedLocked(found, Tombstones::Cause::kExpired);
    return named_.end();
  }

  int64_t ExpireIdleLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const absl::Time now = clock_->Now();
    int64_t expired = 0;
    for (auto it = named_.begin(); it != named_.end();) {
      if (ExpiredLocked(it->second, now)) {
        it = EndNamedLocked(it, Tombstones::Cause::kExpired);
        ++expired;
      } else {
        ++it;
      }
    }
    return expired;
  }

  // Closes the lane before the session stops counting, so that the next one finds its slot free.
  std::map<std::string, Named>::iterator EndNamedLocked(std::map<std::string, Named>::iterator it,
                                                        Tombstones::Cause cause)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const Named& entry = it->second;
    if (const auto stream = attached_.find(entry.attachment); stream != attached_.end()) {
      stream->second.named.erase(it->first);
      ForgetIfEmptyLocked(stream);
    }
    batcher_->Close(entry.session->lane);
    UncountLocked(*entry.session);
    tombstones_.Add(it->first, cause);
    if (cause == Tombstones::Cause::kExpired) ++expired_;
    return named_.erase(it);
  }

  void EndOwnLocked(std::unordered_map<const Session*, Own>::iterator it) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    batcher_->Close(it->first->lane);
    UncountLocked(*it->first);
    own_.erase(it);
  }

  void ForgetIfEmptyLocked(std::unordered_map<AttachmentId, Attached>::iterator stream)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (stream->second.own.empty() && stream->second.named.empty()) attached_.erase(stream);
  }

  const SessionStoreOptions options_;
  Batcher* const batcher_;
  Clock* const clock_;

  mutable Mutex
      mu_;  // Held while the batcher is asked something: it never calls back under a lock of its own.
  AttachmentId last_attachment_ ABSL_GUARDED_BY(mu_) = kNotAttached;
  std::map<std::string, Named> named_ ABSL_GUARDED_BY(mu_);
  std::unordered_map<const Session*, Own> own_ ABSL_GUARDED_BY(mu_);
  std::unordered_map<AttachmentId, Attached> attached_ ABSL_GUARDED_BY(mu_);
  std::unordered_map<int, int64_t> in_use_ ABSL_GUARDED_BY(mu_);           // By model.
  std::unordered_map<std::string, int64_t> of_peer_ ABSL_GUARDED_BY(mu_);  // By peer; none is 0.
  Tombstones tombstones_ ABSL_GUARDED_BY(mu_);
  int64_t expired_ ABSL_GUARDED_BY(mu_) = 0;
};

SessionStore::SessionStore(const SessionStoreOptions& options, Batcher* batcher, Clock* clock)
    : impl_(std::make_unique<Impl>(options, batcher, clock)) {}
SessionStore::~SessionStore() = default;

AttachmentId SessionStore::NewAttachment() { return impl_->NewAttachment(); }
absl::StatusOr<std::shared_ptr<const Session>> SessionStore::Create(int model, const std::string& id,
                                                                    absl::Duration idle_ttl,
                                                                    AttachmentId attachment,
                                                                    const std::string& peer) {
  return impl_->Create(model, id, idle_ttl, attachment, peer);
}
absl::StatusOr<std::shared_ptr<const Session>> SessionStore::CreateOwn(int model, AttachmentId attachment,
                                                                       const std::string& peer) {
  return impl_->CreateOwn(model, attachment, peer);
}
absl::StatusOr<std::shared_ptr<const Session>> SessionStore::Find(int model, const std::string& id,
                                                                  AttachmentId attachment) {
  return impl_->Find(model, id, attachment);
}
void SessionStore::Touch(const Session& session) { impl_->Touch(session); }
void SessionStore::End(const Session& session) { impl_->End(session); }
absl::StatusOr<int64_t> SessionStore::EndByName(const std::string& id) { return impl_->EndByName(id); }
void SessionStore::Detach(AttachmentId attachment) { impl_->Detach(attachment); }
int64_t SessionStore::ExpireIdle() { return impl_->ExpireIdle(); }
int64_t SessionStore::expired() const { return impl_->expired(); }
int64_t SessionStore::sessions(int model) const { return impl_->sessions(model); }
int64_t SessionStore::sessions_free(int model) const { return impl_->sessions_free(model); }
std::vector<SessionSnapshot> SessionStore::List(int model, const std::string& after, int64_t limit) const {
  return impl_->List(model, after, limit);
}

}  // namespace deltanet
