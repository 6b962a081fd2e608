// A server of the protocol in a few lines, for the client's tests, with one model. "sum" is over values: its
// output at position t is the sum of the inputs at 0 to t + kLookahead. "letters" is over kVocab ids: it
// expects one letter after each prefix, by the sum and the number of its ids, and gives an id the less
// probability the further it lies behind that one; its text has a character an id. Sessions really continue
// and streams really lag, so that a client that mixes up chunks, sessions or positions shows.
#ifndef DELTANET_TESTS_CLIENT_FAKE_SERVICE_H_
#define DELTANET_TESTS_CLIENT_FAKE_SERVICE_H_

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "deltanet/v1/deltanet.grpc.pb.h"
#include "model/base/mutex.h"

namespace deltanet {

class FakeService final : public v1::DeltaNetService::Service {
 public:
  static constexpr int64_t kWidth = 2;
  static constexpr int64_t kLookahead = 1;
  // Inputs whose first value is this are refused; the session stays where it is and is out of step.
  static constexpr float kBadValue = 666;

  static constexpr int64_t kVocab = 128;
  static constexpr int64_t kBos = 1;  // Has no character.
  static constexpr int64_t kEos = 2;  // Nor has this. Expected after each kEosEvery ids.
  static constexpr int64_t kEosEvery = 50;
  static constexpr uint64_t kSeed = 77;  // Where a request leaves it to the server.
  static constexpr int64_t kMaxTokens = 100;

  enum class Model { kSum, kLetters, kLettersWithoutTokenizer };

  // Listens on a free port of the loopback.
  explicit FakeService(Model model = Model::kSum);
  ~FakeService() override;

  const std::string& address() const { return address_; }
  grpc::HealthCheckServiceInterface* health() { return server_->GetHealthCheckService(); }

  // What a request with this id does instead of being answered: waits for Release or the end of the call.
  static constexpr char kHold[] = "hold";
  // What a stream does with this id: it ends at once with UNAVAILABLE (DRAINING).
  static constexpr char kBreak[] = "break";
  // Generate does both after its first token, also where its text ends so; cancelled, it waits no longer.
  void Release();
  // Each `every`th call of Generate is refused with UNAVAILABLE (QUEUE_FULL).
  void RefuseGenerate(int every);
  // From now on each call of Generate is held after its first token.
  void HoldGenerate();
  // Generate makes at most so many tokens, whatever it is asked for.
  void CutGenerate(int64_t max_tokens);
  // Blocks until so many held requests have arrived.
  void AwaitHeld(int count);

  // The user agent of the last Forward.
  std::string user_agent();
  // Whether a held stream has been cancelled; blocks until one was.
  void AwaitCancelled();
  // The calls of Generate so far, in the order of their arrival.
  struct GenerateCall {
    std::string peer;
    int64_t prompt_tokens = 0;
    int64_t max_tokens = 0;
    bool ignore_eos = false;
  };
  std::vector<GenerateCall> generate_calls();
  // The most calls of Generate that were under way at one time.
  int most_generating();

  // What the letters' model gives `id` after `before`, and the letter that it expects there.
  static float LogProb(const std::vector<int64_t>& before, int64_t id);
  static int64_t Expected(const std::vector<int64_t>& before);

 private:
  struct FakeSession {
    std::vector<float> inputs;  // [T, kWidth]
    int64_t given = 0;          // Outputs.
    std::vector<int64_t> ids;   // The letters' [T].
    bool out_of_step = false;

    int64_t position() const {
      return static_cast<int64_t>(inputs.size()) / kWidth + static_cast<int64_t>(ids.size());
    }
  };
  // What a message of a session came to.
  struct Advanced {
    v1::Tensor output;
    int64_t output_position = 0;
    v1::TopTokens top;
    std::vector<float> log_probs;
  };

  grpc::Status Forward(grpc::ServerContext* context, const v1::ForwardRequest* request,
                       v1::ForwardResponse* response) override;
  grpc::Status StreamForward(
      grpc::ServerContext* context,
      grpc::ServerReaderWriter<v1::StreamForwardResponse, v1::StreamForwardRequest>* stream) override;
  grpc::Status Generate(grpc::ServerContext* context, const v1::GenerateRequest* request,
                        grpc::ServerWriter<v1::GenerateResponse>* writer) override;
  grpc::Status Tokenize(grpc::ServerContext* context, const v1::TokenizeRequest* request,
                        v1::TokenizeResponse* response) override;
  grpc::Status Detokenize(grpc::ServerContext* context, const v1::DetokenizeRequest* request,
                          v1::DetokenizeResponse* response) override;
  grpc::Status GetModel(grpc::ServerContext* context, const v1::GetModelRequest* request,
                        v1::GetModelResponse* response) override;
  grpc::Status ListModels(grpc::ServerContext* context, const v1::ListModelsRequest* request,
                          v1::ListModelsResponse* response) override;
  grpc::Status EndSession(grpc::ServerContext* context, const v1::EndSessionRequest* request,
                          v1::EndSessionResponse* response) override;
  grpc::Status ListSessions(grpc::ServerContext* context, const v1::ListSessionsRequest* request,
                            v1::ListSessionsResponse* response) override;

  // Applies a chunk to a session and makes its output. `Request`: of Forward or StreamForward.
  template <typename Request>
  absl::Status Advance(const Request& request, FakeSession* session, Advanced* advanced) const;
  absl::Status AdvanceSum(const v1::Tensor& input, bool end_of_sequence, FakeSession* session,
                          Advanced* advanced) const;
  void AdvanceLetters(const v1::Tensor& input, const v1::OutputOptions& options, FakeSession* session,
                      Advanced* advanced) const;
  // Generate on a session's copy.
  grpc::Status Continue(const v1::GenerateRequest& request, const std::string& session_id, bool hold,
                        FakeSession* session, grpc::ServerContext* context,
                        grpc::ServerWriter<v1::GenerateResponse>* writer);
  std::vector<int64_t> ToIds(const std::string& text, bool add_bos) const;
  absl::StatusOr<FakeSession*> FindLocked(const v1::SessionRef& ref, std::string* id)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Hold(const grpc::ServerContext* until_cancelled);

  const Model model_;
  std::string address_;
  std::unique_ptr<grpc::Server> server_;

  Mutex mu_;
  CondVar changed_;
  std::map<std::string, FakeSession> sessions_ ABSL_GUARDED_BY(mu_);
  int next_id_ ABSL_GUARDED_BY(mu_) = 1;
  int held_ ABSL_GUARDED_BY(mu_) = 0;
  bool released_ ABSL_GUARDED_BY(mu_) = false;
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  std::string user_agent_ ABSL_GUARDED_BY(mu_);
  int refuse_every_ ABSL_GUARDED_BY(mu_) = 0;
  bool hold_generate_ ABSL_GUARDED_BY(mu_) = false;
  int64_t cut_ ABSL_GUARDED_BY(mu_) = kMaxTokens;
  std::vector<GenerateCall> generate_calls_ ABSL_GUARDED_BY(mu_);
  int generating_ ABSL_GUARDED_BY(mu_) = 0;
  int most_generating_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace deltanet

#endif  // DELTANET_TESTS_CLIENT_FAKE_SERVICE_H_
