// Remembers sessions between requests: which id is which lane of which model, to which stream it is attached,
// and when it may be forgotten.
//
// Called by reactors on gRPC's threads and by the server's janitor thread; owned by the server; the batcher
// and the clock outlive it.
#ifndef DELTANET_SERVER_SESSION_STORE_H_
#define DELTANET_SERVER_SESSION_STORE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "server/batcher.h"
#include "server/clock.h"

namespace deltanet {

struct SessionStoreOptions {
  absl::Duration default_idle_ttl = absl::Minutes(10);
  absl::Duration max_idle_ttl = absl::Hours(24);
  int64_t max_per_peer = 0;            // Sessions of one peer, own ones included, of all models; 0: no limit.
  int64_t remembered_expired = 10000;  // Ids of expired or ended sessions, to tell them from unknown ones.
};

// A stream (or any caller that holds sessions for itself), as far as the store needs to know it: an identity.
using AttachmentId = uint64_t;
inline constexpr AttachmentId kNotAttached = 0;

struct SessionSnapshot {
  std::string id;
  int model = 0;
  int64_t committed_position = 0;
  bool attached = false;
  absl::Duration idle;
  absl::Duration idle_ttl;
};

// One session. Constant after construction, but for what the store keeps.
struct Session {
  std::string id;  // Empty for a stream's own.
  int model = 0;
  std::string peer;  // Whose making it is.
  std::shared_ptr<Lane> lane;
};

// Thread-safe.
class SessionStore {
 public:
  SessionStore(const SessionStoreOptions& options, Batcher* batcher, Clock* clock);
  ~SessionStore();

  // A new identity for a stream. Never kNotAttached, never repeated.
  AttachmentId NewAttachment();

  // Makes a named session, attached to `attachment` if that is a stream. An empty `id` is replaced by 128
  // random bits from the operating system, in hex. `idle_ttl` zero: the default. INVALID_ARGUMENT for an id
  // of other characters or length than the proto allows or a ttl that is negative or above the maximum;
  // ALREADY_EXISTS (SESSION_EXISTS); RESOURCE_EXHAUSTED (SESSIONS_FULL) if the model's max_sessions are in
  // use, or the peer's max_per_peer, expired ones not counted. `peer` is any name for who asks.
  absl::StatusOr<std::shared_ptr<const Session>> Create(int model, const std::string& id,
                                                        absl::Duration idle_ttl, AttachmentId attachment,
                                                        const std::string& peer = "");
  // A session without a name that ends with its stream. RESOURCE_EXHAUSTED as Create.
  absl::StatusOr<std::shared_ptr<const Session>> CreateOwn(int model, AttachmentId attachment,
                                                           const std::string& peer = "");

  // Finds a named session and notes the use; attaches it to `attachment` if that is a stream. NOT_FOUND
  // (SESSION_NOT_FOUND, SESSION_EXPIRED, SESSION_ENDED), FAILED_PRECONDITION (SESSION_MODEL; `model` -1 is
  // any), ABORTED (SESSION_ATTACHED) if it is attached to another stream.
  absl::StatusOr<std::shared_ptr<const Session>> Find(int model, const std::string& id,
                                                      AttachmentId attachment);

  // The idle time of a session starts over (a message of it was answered).
  void Touch(const Session& session);
  // Ends a session: forgets it and closes its lane. Any number of times.
  void End(const Session& session);
  // The same by name; returns its committed position. NOT_FOUND as Find. ABORTED (SESSION_ATTACHED) never: an
  // operator may end what a stream holds.
  absl::StatusOr<int64_t> EndByName(const std::string& id);
  // A stream is gone: its own sessions end, the named ones are free for others.
  void Detach(AttachmentId attachment);

  // Ends the named sessions that are idle (unattached and without unanswered work) for longer than their
  // time-to-live. Returns how many. Called by the janitor and by Create when the model is full.
  int64_t ExpireIdle();

  // How many sessions have expired so far.
  int64_t expired() const;
  // Sessions of a model in use, own ones included.
  int64_t sessions(int model) const;
  int64_t sessions_free(int model) const;

  // At most `limit` named sessions of `model` (-1: any) with id > `after`, in the order of ids.
  std::vector<SessionSnapshot> List(int model, const std::string& after, int64_t limit) const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace deltanet

#endif  // DELTANET_SERVER_SESSION_STORE_H_
