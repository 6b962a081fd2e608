#include "server/session_store.h"

#include <cctype>
#include <cstdint>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/wire.h"
#include "server/executor.h"
#include "tests/server/scheduling_test_util.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/fake_model.h"

namespace deltanet {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr absl::Duration kTick = absl::Nanoseconds(1);
constexpr absl::Duration kDefaultTtl = absl::Minutes(10);

using Found = absl::StatusOr<std::shared_ptr<const Session>>;

void ExpectError(const absl::Status& status, absl::StatusCode code, const char* reason) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_EQ(ErrorReason(status), reason) << status;
}

// Two models with room for 3 sessions each.
class SessionStoreTest : public ::testing::Test {
 protected:
  SessionStoreTest() {
    for (FakeModel& model : models_) batcher_.AddModel(&model, 2);
    stream_ = store_.NewAttachment();
    other_stream_ = store_.NewAttachment();
  }

  Found TryCreate(const std::string& id, absl::Duration ttl = absl::ZeroDuration()) {
    return store_.Create(0, id, ttl, kNotAttached);
  }
  std::shared_ptr<const Session> Create(const std::string& id, absl::Duration ttl = absl::ZeroDuration()) {
    return TryCreate(id, ttl).value();
  }

  // Takes in `tokens` tokens.
  void Feed(const Session& session, int64_t tokens) {
    const Call call(&batcher_, session.model, session.lane, RandomInput(1, tokens));
    while (batcher_.RunOnce()) {
    }
    ASSERT_TRUE(call.status().ok()) << call.status();
  }

  FakeClock clock_;
  FakeModel models_[2] = {FakeModel({.num_slots = 5}), FakeModel({.num_slots = 5})};
  Batcher batcher_{{}, &clock_, nullptr};
  SessionStore store_{
      {.default_idle_ttl = kDefaultTtl, .max_idle_ttl = absl::Hours(1), .remembered_expired = 3},
      &batcher_,
      &clock_};
  AttachmentId stream_, other_stream_;
};

TEST_F(SessionStoreTest, AttachmentsAreDistinctAndNeverNone) {
  EXPECT_NE(stream_, kNotAttached);
  EXPECT_NE(other_stream_, kNotAttached);
  EXPECT_NE(stream_, other_stream_);
}

TEST_F(SessionStoreTest, ANamedSessionIsFoundAgain) {
  const std::shared_ptr<const Session> created = Create("Chat-1.a_b:c");
  EXPECT_EQ(created->id, "Chat-1.a_b:c");
  EXPECT_EQ(created->model, 0);
  const Found found = store_.Find(0, "Chat-1.a_b:c", kNotAttached);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(*found, created);
  EXPECT_TRUE(store_.Find(-1, "Chat-1.a_b:c", kNotAttached).ok());
  EXPECT_EQ(store_.sessions(0), 1);
  EXPECT_EQ(store_.sessions_free(0), 2);
  EXPECT_EQ(store_.sessions(1), 0);
}

TEST_F(SessionStoreTest, IdsOfOurOwnAreLongHexAndDiffer) {
  std::set<std::string> ids;
  for (int i = 0; i < 100; ++i) {
    const std::shared_ptr<const Session> created = Create("");
    const std::string id = created->id;
    EXPECT_EQ(id.size(), 32u);
    for (const char c : id) EXPECT_TRUE(std::isxdigit(c)) << id;
    EXPECT_TRUE(store_.Find(0, id, kNotAttached).ok());
    ids.insert(id);
    store_.End(*created);
  }
  EXPECT_EQ(ids.size(), 100u);
}

TEST_F(SessionStoreTest, IdsOfTheClientAreChecked) {
  EXPECT_TRUE(TryCreate(std::string(128, 'x')).ok());
  const absl::Status too_long = TryCreate(std::string(129, 'x')).status();
  ExpectError(too_long, absl::StatusCode::kInvalidArgument, reason::kInvalidRequest);
  EXPECT_THAT(std::string(too_long.message()), HasSubstr("129 characters, want at most 128"));
  for (const std::string& id :
       std::vector<std::string>{"a b", "a/b", "a\n", "\xC3\xA9", "a\"", std::string("a\0b", 3)}) {
    ExpectError(TryCreate(id).status(), absl::StatusCode::kInvalidArgument, reason::kInvalidRequest);
  }
}

TEST_F(SessionStoreTest, ATimeToLiveIsBounded) {
  EXPECT_TRUE(TryCreate("a", absl::Hours(1)).ok());
  ExpectError(TryCreate("b", absl::Hours(1) + kTick).status(), absl::StatusCode::kInvalidArgument,
              reason::kInvalidRequest);
  ExpectError(TryCreate("c", -kTick).status(), absl::StatusCode::kInvalidArgument, reason::kInvalidRequest);
}

TEST_F(SessionStoreTest, AnIdInUseIsNotMadeAgain) {
  const std::shared_ptr<const Session> created = Create("a");
  Feed(*created, 7);
  const absl::Status again = store_.Create(1, "a", absl::ZeroDuration(), stream_).status();
  ExpectError(again, absl::StatusCode::kAlreadyExists, reason::kSessionExists);
  EXPECT_EQ(ErrorMetadata(again, "committed_position"), "7");
}

TEST_F(SessionStoreTest, UnknownEndedAndExpiredAreToldApart) {
  Create("ended");
  EXPECT_EQ(*store_.EndByName("ended"), 0);
  Create("expired");
  clock_.Advance(kDefaultTtl + kTick);
  for (int i = 0; i < 2; ++i) {
    ExpectError(store_.Find(0, "never", kNotAttached).status(), absl::StatusCode::kNotFound,
                reason::kSessionNotFound);
    ExpectError(store_.Find(0, "ended", kNotAttached).status(), absl::StatusCode::kNotFound,
                reason::kSessionEnded);
    ExpectError(store_.Find(0, "expired", kNotAttached).status(), absl::StatusCode::kNotFound,
                reason::kSessionExpired);
  }
  ExpectError(store_.EndByName("never").status(), absl::StatusCode::kNotFound, reason::kSessionNotFound);
  ExpectError(store_.EndByName("ended").status(), absl::StatusCode::kNotFound, reason::kSessionEnded);
  ExpectError(store_.EndByName("expired").status(), absl::StatusCode::kNotFound, reason::kSessionExpired);
  EXPECT_EQ(store_.sessions(0), 0);
}

TEST_F(SessionStoreTest, AnIdCanBeUsedAgainAfterItsEnd) {
  const std::shared_ptr<const Session> first = Create("a");
  Feed(*first, 3);
  store_.EndByName("a").value();
  const std::shared_ptr<const Session> second = Create("a");
  EXPECT_EQ(batcher_.committed_position(second->lane), 0);
  store_.End(*first);  // Long gone: does not touch the second.
  EXPECT_TRUE(store_.Find(0, "a", kNotAttached).ok());
}

TEST_F(SessionStoreTest, OnlyTheLastEndedIdsAreRemembered) {
  for (int i = 0; i < 4; ++i) {
    Create(absl::StrCat(i));
    store_.EndByName(absl::StrCat(i)).value();
  }
  // Used and ended again: now the last of all.
  Create("1");
  store_.EndByName("1").value();
  Create("4");
  store_.EndByName("4").value();
  const auto why = [&](const std::string& id) {
    return ErrorReason(store_.Find(0, id, kNotAttached).status());
  };
  EXPECT_EQ(why("0"), reason::kSessionNotFound);
  EXPECT_EQ(why("1"), reason::kSessionEnded);
  EXPECT_EQ(why("2"), reason::kSessionNotFound);
  EXPECT_EQ(why("3"), reason::kSessionEnded);
  EXPECT_EQ(why("4"), reason::kSessionEnded);
}

TEST_F(SessionStoreTest, ASessionBelongsToItsModel) {
  const std::shared_ptr<const Session> created = Create("a");
  Feed(*created, 7);
  const absl::Status status = store_.Find(1, "a", kNotAttached).status();
  ExpectError(status, absl::StatusCode::kFailedPrecondition, reason::kSessionModel);
  EXPECT_EQ(ErrorMetadata(status, "committed_position"), "7");
}

TEST_F(SessionStoreTest, OneStreamAtATimeHoldsASession) {
  Create("a");
  EXPECT_TRUE(store_.Find(0, "a", stream_).ok());
  EXPECT_TRUE(store_.Find(0, "a", stream_).ok());
  ExpectError(store_.Find(0, "a", other_stream_).status(), absl::StatusCode::kAborted,
              reason::kSessionAttached);
  ExpectError(store_.Find(0, "a", kNotAttached).status(), absl::StatusCode::kAborted,
              reason::kSessionAttached);
  store_.Detach(stream_);
  EXPECT_TRUE(store_.Find(0, "a", other_stream_).ok());
  ExpectError(store_.Find(0, "a", stream_).status(), absl::StatusCode::kAborted, reason::kSessionAttached);
}

TEST_F(SessionStoreTest, CreateAttaches) {
  ASSERT_TRUE(store_.Create(0, "a", absl::ZeroDuration(), stream_).ok());
  ExpectError(store_.Find(0, "a", other_stream_).status(), absl::StatusCode::kAborted,
              reason::kSessionAttached);
  store_.Detach(stream_);
  EXPECT_TRUE(store_.Find(0, "a", other_stream_).ok());
}

TEST_F(SessionStoreTest, AnOperatorMayEndWhatAStreamHolds) {
  const Found created = store_.Create(0, "a", absl::ZeroDuration(), stream_);
  Feed(**created, 5);
  EXPECT_EQ(*store_.EndByName("a"), 5);
  EXPECT_EQ(batcher_.free_slots(0), 5);
  store_.Detach(stream_);
  EXPECT_EQ(store_.sessions(0), 0);
}

TEST_F(SessionStoreTest, AStreamsOwnSessionsEndWithIt) {
  const Found a = store_.CreateOwn(0, stream_);
  const Found b = store_.CreateOwn(0, stream_);
  const Found c = store_.CreateOwn(0, other_stream_);
  ASSERT_TRUE(a.ok() && b.ok() && c.ok());
  EXPECT_EQ((*a)->id, "");
  Feed(**a, 1);
  Feed(**b, 1);
  Feed(**c, 1);
  EXPECT_EQ(store_.sessions(0), 3);
  EXPECT_EQ(batcher_.free_slots(0), 2);
  store_.End(**a);
  store_.End(**a);
  EXPECT_EQ(store_.sessions(0), 2);
  store_.Detach(stream_);
  store_.Detach(stream_);
  EXPECT_EQ(store_.sessions(0), 1);
  EXPECT_EQ(batcher_.free_slots(0), 4);
  EXPECT_TRUE(store_.List(-1, "", 10).empty());  // They have no names.
}

TEST_F(SessionStoreTest, AFullModelRefusesAndTheOtherDoesNot) {
  for (int i = 0; i < 2; ++i) ASSERT_TRUE(TryCreate(absl::StrCat(i)).ok());
  ASSERT_TRUE(store_.CreateOwn(0, stream_).ok());
  EXPECT_EQ(store_.sessions_free(0), 0);
  ExpectError(TryCreate("x").status(), absl::StatusCode::kResourceExhausted, reason::kSessionsFull);
  ExpectError(store_.CreateOwn(0, stream_).status(), absl::StatusCode::kResourceExhausted,
              reason::kSessionsFull);
  EXPECT_TRUE(store_.CreateOwn(1, stream_).ok());
  EXPECT_EQ(store_.sessions(0), 3);
  store_.EndByName("0").value();
  EXPECT_TRUE(TryCreate("x").ok());
}

TEST_F(SessionStoreTest, APeerHasItsOwnLimit) {
  SessionStore store({.max_per_peer = 2}, &batcher_, &clock_);
  const auto create = [&](const std::string& id, const std::string& peer) {
    return store.Create(0, id, absl::ZeroDuration(), kNotAttached, peer).status();
  };
  EXPECT_TRUE(create("a", "x").ok());
  const AttachmentId stream = store.NewAttachment();
  EXPECT_TRUE(store.CreateOwn(1, stream, "x").ok());
  ExpectError(create("b", "x"), absl::StatusCode::kResourceExhausted, reason::kSessionsFull);
  ExpectError(store.CreateOwn(1, stream, "x").status(), absl::StatusCode::kResourceExhausted,
              reason::kSessionsFull);
  EXPECT_TRUE(create("b", "y").ok());
  store.Detach(stream);
  EXPECT_TRUE(create("c", "x").ok());
  ExpectError(create("d", "x"), absl::StatusCode::kResourceExhausted, reason::kSessionsFull);
  store.EndByName("c").value();
  clock_.Advance(absl::Hours(1));
  EXPECT_TRUE(create("d", "x").ok()) << "what has expired does not count";
  EXPECT_TRUE(create("e", "x").ok());
}

TEST_F(SessionStoreTest, ExpiredSessionsMakeRoom) {
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(TryCreate(absl::StrCat(i), absl::Minutes(i + 1)).ok());
  clock_.Advance(absl::Minutes(1));
  ExpectError(TryCreate("x").status(), absl::StatusCode::kResourceExhausted, reason::kSessionsFull);
  clock_.Advance(kTick);
  EXPECT_TRUE(TryCreate("x").ok());
  EXPECT_EQ(store_.sessions(0), 3);
  ExpectError(store_.Find(0, "0", kNotAttached).status(), absl::StatusCode::kNotFound,
              reason::kSessionExpired);
}

TEST_F(SessionStoreTest, IdlenessIsMeasuredToTheTick) {
  Create("a");
  clock_.Advance(kDefaultTtl);
  EXPECT_EQ(store_.ExpireIdle(), 0);
  clock_.Advance(kTick);
  EXPECT_EQ(store_.ExpireIdle(), 1);
  EXPECT_EQ(store_.ExpireIdle(), 0);
  EXPECT_EQ(store_.sessions(0), 0);
}

TEST_F(SessionStoreTest, FindAndTouchStartIdlenessOver) {
  const std::shared_ptr<const Session> a = Create("a");
  clock_.Advance(kDefaultTtl);
  store_.Touch(*a);
  clock_.Advance(kDefaultTtl);
  EXPECT_TRUE(store_.Find(0, "a", kNotAttached).ok());
  clock_.Advance(kDefaultTtl);
  EXPECT_EQ(store_.ExpireIdle(), 0);
  clock_.Advance(kTick);
  // Expired before the janitor has come.
  ExpectError(store_.Find(0, "a", kNotAttached).status(), absl::StatusCode::kNotFound,
              reason::kSessionExpired);
}

TEST_F(SessionStoreTest, AnAttachedSessionIsNotIdleAndItsTimeStartsWhenItIsLeft) {
  Create("a");
  store_.Find(0, "a", stream_).value();
  clock_.Advance(absl::Hours(5));
  EXPECT_EQ(store_.ExpireIdle(), 0);
  store_.Detach(stream_);
  clock_.Advance(kDefaultTtl);
  EXPECT_EQ(store_.ExpireIdle(), 0);
  clock_.Advance(kTick);
  EXPECT_EQ(store_.ExpireIdle(), 1);
}

TEST_F(SessionStoreTest, ASessionWithUnansweredWorkIsNotIdle) {
  const std::shared_ptr<const Session> a = Create("a");
  const Call call(&batcher_, 0, a->lane, RandomInput(1, 2));
  clock_.Advance(absl::Hours(5));
  EXPECT_EQ(store_.ExpireIdle(), 0);
  EXPECT_TRUE(store_.Find(0, "a", kNotAttached).ok());
  while (batcher_.RunOnce()) {
  }
  EXPECT_TRUE(call.status().ok());
}

TEST_F(SessionStoreTest, EndingASessionCancelsItsWork) {
  const std::shared_ptr<const Session> a = Create("a");
  const Call call(&batcher_, 0, a->lane, RandomInput(1, 2));
  store_.End(*a);
  while (batcher_.RunOnce()) {
  }
  ExpectError(call.status(), absl::StatusCode::kCancelled, reason::kSessionEnded);
  EXPECT_EQ(batcher_.free_slots(0), 5);
}

TEST_F(SessionStoreTest, ListsPagesInTheOrderOfIds) {
  const std::shared_ptr<const Session> b = Create("b", absl::Minutes(3));
  ASSERT_TRUE(store_.Create(1, "c", absl::ZeroDuration(), stream_).ok());
  Create("a");
  Create("short", absl::Seconds(1));
  Feed(*b, 4);
  clock_.Advance(absl::Seconds(2));
  const auto ids = [](const std::vector<SessionSnapshot>& snapshots) {
    std::vector<std::string> ids;
    for (const SessionSnapshot& snapshot : snapshots) ids.push_back(snapshot.id);
    return ids;
  };
  EXPECT_THAT(ids(store_.List(-1, "", 10)), ElementsAre("a", "b", "c"));  // "short" has expired.
  EXPECT_THAT(ids(store_.List(-1, "", 2)), ElementsAre("a", "b"));
  EXPECT_THAT(ids(store_.List(-1, "b", 2)), ElementsAre("c"));
  EXPECT_THAT(ids(store_.List(0, "", 10)), ElementsAre("a", "b"));
  EXPECT_THAT(ids(store_.List(1, "", 10)), ElementsAre("c"));
  EXPECT_TRUE(store_.List(-1, "c", 10).empty());
  const SessionSnapshot snapshot = store_.List(0, "a", 1)[0];
  EXPECT_EQ(snapshot.model, 0);
  EXPECT_EQ(snapshot.committed_position, 4);
  EXPECT_FALSE(snapshot.attached);
  EXPECT_EQ(snapshot.idle, absl::Seconds(2));
  EXPECT_EQ(snapshot.idle_ttl, absl::Minutes(3));
  EXPECT_TRUE(store_.List(1, "", 1)[0].attached);
}

// Clients on several threads make, use, share, leave and end sessions; at the end nothing is held.
TEST(SessionStoreStressTest, TheAccountsBalance) {
  constexpr int kThreads = 4;
  FakeModel model({.num_slots = 8, .max_step_rows = 4});
  Batcher batcher({}, Clock::Real(), nullptr);
  batcher.AddModel(&model, 3);
  SessionStore store({.max_idle_ttl = absl::Hours(1)}, &batcher, Clock::Real());
  batcher.Start();
  const std::set<std::string> allowed = {
      reason::kSessionNotFound, reason::kSessionExpired, reason::kSessionEnded,    reason::kSessionExists,
      reason::kSessionAttached, reason::kSessionsFull,   reason::kSessionOutOfStep};
  {
    std::vector<Thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back("client", [&, t] {
        std::mt19937 random(t);
        for (int i = 0; i < 300; ++i) {
          const AttachmentId stream = random() % 2 == 0 ? store.NewAttachment() : kNotAttached;
          const std::string id = absl::StrCat("s", random() % 6);
          Found session = random() % 3 == 0
                              ? store.Create(0, id, absl::Microseconds(1 + random() % 1000), stream)
                          : stream != kNotAttached && random() % 3 == 0 ? store.CreateOwn(0, stream)
                                                                        : store.Find(0, id, stream);
          if (session.ok()) {
            CallOptions options;
            options.end_of_sequence = random() % 8 == 0;
            options.then = [&store, session = *session](const WorkResult& result) {
              store.Touch(*session);
              if (result.ended) store.End(*session);
            };
            const Call call(&batcher, 0, (*session)->lane, RandomInput(t, 1 + random() % 100),
                            std::move(options));
            const absl::Status status = call.submitted().ok() ? call.Wait().status : call.submitted();
            if (!status.ok()) {
              EXPECT_EQ(allowed.count(ErrorReason(status)), 1u) << status;
            }
            if (random() % 16 == 0) store.End(**session);
          } else {
            EXPECT_EQ(allowed.count(ErrorReason(session.status())), 1u) << session.status();
          }
          if (random() % 16 == 0) (void)store.EndByName(id);
          if (random() % 16 == 0) store.ExpireIdle();
          store.List(-1, "", 3);
          if (stream != kNotAttached) store.Detach(stream);
        }
      });
    }
  }
  EXPECT_TRUE(batcher.WaitUntilIdle(absl::InfiniteFuture()));
  for (const SessionSnapshot& session : store.List(-1, "", 100)) (void)store.EndByName(session.id);
  for (int i = 0; i < 6; ++i) (void)store.EndByName(absl::StrCat("s", i));
  EXPECT_EQ(store.sessions(0), 0);
  EXPECT_EQ(batcher.free_slots(0), 8);
}

}  // namespace
}  // namespace deltanet
