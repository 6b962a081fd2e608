#include "server/metrics.h"

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/wire.h"

namespace deltanet {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

TEST(Metrics, EachFeedShowsInItsSeries) {
  Metrics metrics({"a", "b"}, "1.2.3");
  metrics.OnRequestDone(Method::kForward, absl::OkStatus());
  metrics.OnRequestDone(Method::kEndSession,
                        MakeError(absl::StatusCode::kNotFound, reason::kSessionNotFound, "x"));
  metrics.OnRequestDone(Method::kForward, absl::InternalError("without a reason"));
  metrics.OnLatency(Method::kForward, absl::Milliseconds(3));
  metrics.OnStreamMessage(MakeError(absl::StatusCode::kDeadlineExceeded, reason::kDeadline, "late"));
  metrics.OnStep({.model = 1,
                  .rows = 3,
                  .tokens = 100,
                  .form = absl::Microseconds(5),
                  .prepare = absl::Microseconds(50),
                  .compute = absl::Seconds(20)});
  WorkResult result;
  result.queued = absl::Microseconds(100);
  result.computing = absl::Milliseconds(2);
  metrics.OnWorkDone(0, result);
  for (const char* why : {reason::kCancelled, reason::kDeadline, reason::kNonFinite, reason::kSessionEnded,
                          reason::kPositionMismatch, reason::kInternal}) {
    result.status = MakeError(absl::StatusCode::kInternal, why, "x");
    metrics.OnWorkDone(1, result);
  }
  metrics.OnFirstStreamOutput(absl::Milliseconds(2));
  metrics.OnNextStreamOutput(absl::Milliseconds(20));
  metrics.OnRequestDone(Method::kDetokenize,
                        MakeError(absl::StatusCode::kFailedPrecondition, reason::kNoTokenizer, "x"));
  metrics.OnToken(0, /*first=*/true, absl::Milliseconds(2));
  metrics.OnToken(0, /*first=*/false, absl::Microseconds(400));
  metrics.OnToken(0, /*first=*/false, absl::Microseconds(600));
  metrics.OnGenerationDone(0, GenerationEnd::kStopText, 30);
  metrics.OnGenerationDone(0, GenerationEnd::kError, 0);
  metrics.OnStall();
  metrics.OnDeviceLost(absl::DataLossError("x"));
  MetricsSnapshot snapshot{{{1, 2, 3, 4, 5, 6, 21, 22}, {5, 6, 7, 8, 9, 10}}, 9, 10};
  snapshot.sessions_expired = 11;
  snapshot.draining = true;
  snapshot.batch_thread_progress = absl::FromUnixSeconds(12);
  snapshot.batch_thread_busy = absl::Seconds(13);
  snapshot.started = absl::FromUnixSeconds(14);
  snapshot.process = {.cpu_seconds = 15.5, .resident_bytes = 16, .open_fds = 17, .threads = 18};
  const std::string text = metrics.Text(snapshot);
  for (const char* sample : {
           "deltanet_requests_total{code=\"OK\",method=\"Forward\"} 1",
           "deltanet_requests_total{code=\"INTERNAL\",method=\"Forward\"} 1",
           "deltanet_requests_total{code=\"NOT_FOUND\",method=\"EndSession\"} 1",
           "deltanet_requests_total{code=\"UNAUTHENTICATED\",method=\"ListSessions\"} 0",
           "deltanet_stream_messages_total{code=\"DEADLINE_EXCEEDED\"} 1",
           "deltanet_errors_total{reason=\"SESSION_NOT_FOUND\"} 1",
           "deltanet_errors_total{reason=\"DEADLINE\"} 1",
           "deltanet_errors_total{reason=\"OTHER\"} 1",
           "deltanet_request_duration_seconds_bucket{method=\"Forward\",le=\"0.0025\"} 0",
           "deltanet_request_duration_seconds_bucket{method=\"Forward\",le=\"0.005\"} 1",
           "deltanet_work_queued_seconds_bucket{model=\"a\",le=\"0.0001\"} 1",
           "deltanet_work_compute_seconds_count{model=\"a\"} 1",
           "deltanet_step_prepare_seconds_count{model=\"b\"} 1",
           "deltanet_step_compute_seconds_bucket{model=\"b\",le=\"10\"} 0",
           "deltanet_step_compute_seconds_bucket{model=\"b\",le=\"+Inf\"} 1",
           "deltanet_step_tokens_sum{model=\"b\"} 100",
           "deltanet_step_rows_bucket{model=\"b\",le=\"4\"} 1",
           "deltanet_tokens_total{model=\"b\"} 100",
           "deltanet_tokens_total{model=\"a\"} 0",
           "deltanet_sessions{model=\"a\"} 1",
           "deltanet_sessions_free{model=\"a\"} 2",
           "deltanet_slots_free{model=\"b\"} 7",
           "deltanet_session_bytes{model=\"b\"} 8",
           "deltanet_works_total{model=\"a\",outcome=\"OK\"} 1",
           "deltanet_works_total{model=\"b\",outcome=\"OK\"} 0",
           "deltanet_works_total{model=\"b\",outcome=\"CANCELLED\"} 1",
           "deltanet_works_total{model=\"b\",outcome=\"DEADLINE\"} 1",
           "deltanet_works_total{model=\"b\",outcome=\"NON_FINITE\"} 1",
           "deltanet_works_total{model=\"b\",outcome=\"SESSION_ENDED\"} 1",
           "deltanet_works_total{model=\"b\",outcome=\"OTHER\"} 2",
           "deltanet_step_form_seconds_bucket{model=\"b\",le=\"0.0001\"} 1",
           "deltanet_stream_first_output_seconds_bucket{le=\"0.0025\"} 1",
           "deltanet_stream_output_interval_seconds_bucket{le=\"0.025\"} 1",
           "deltanet_requests_total{code=\"FAILED_PRECONDITION\",method=\"Detokenize\"} 1",
           "deltanet_requests_total{code=\"OK\",method=\"Generate\"} 0",
           "deltanet_errors_total{reason=\"NO_TOKENIZER\"} 1",
           "deltanet_errors_total{reason=\"NOT_GENERATIVE\"} 0",
           "deltanet_time_to_first_token_seconds_bucket{model=\"a\",le=\"0.001\"} 0",
           "deltanet_time_to_first_token_seconds_bucket{model=\"a\",le=\"0.0025\"} 1",
           "deltanet_time_to_first_token_seconds_bucket{model=\"a\",le=\"60\"} 1",
           "deltanet_time_per_output_token_seconds_bucket{model=\"a\",le=\"0.0005\"} 1",
           "deltanet_time_per_output_token_seconds_bucket{model=\"a\",le=\"2\"} 2",
           "deltanet_prompt_tokens_total{model=\"a\"} 30",
           "deltanet_generated_tokens_total{model=\"a\"} 3",
           "deltanet_generated_tokens_total{model=\"b\"} 0",
           "deltanet_generations_finished_total{model=\"a\",reason=\"stop_text\"} 1",
           "deltanet_generations_finished_total{model=\"a\",reason=\"error\"} 1",
           "deltanet_generations_finished_total{model=\"a\",reason=\"length\"} 0",
           "deltanet_generations_finished_total{model=\"b\",reason=\"stop_id\"} 0",
           "deltanet_generations_finished_total{model=\"b\",reason=\"cancelled\"} 0",
           "deltanet_generations_running{model=\"a\"} 21",
           "deltanet_generations_waiting{model=\"a\"} 22",
           "deltanet_generations_running{model=\"b\"} 0",
           "deltanet_slots{model=\"a\"} 5",
           "deltanet_state_bytes{model=\"a\"} 20",
           "deltanet_model_bytes{model=\"b\"} 10",
           "deltanet_sessions_expired_total 11",
           "deltanet_draining 1",
           "deltanet_device_lost 1",
           "deltanet_batch_thread_heartbeat_timestamp_seconds 12",
           "deltanet_batch_thread_busy_seconds 13",
           "deltanet_batch_thread_stalls_total 1",
           "process_start_time_seconds 14",
           "# TYPE process_cpu_seconds_total counter\nprocess_cpu_seconds_total 15.5",
           "process_resident_memory_bytes 16",
           "process_open_fds 17",
           "process_threads 18",
           "deltanet_queued_works 9",
           "deltanet_queued_tokens 10",
           "deltanet_build_info{version=\"1.2.3\"} 1",
           "# TYPE deltanet_sessions gauge",
           "# HELP deltanet_tokens_total ",
       }) {
    EXPECT_THAT(text, HasSubstr(sample));
  }
}

TEST(Metrics, TheDevicesMemoryIsThereWhereItHasItsOwn) {
  Metrics metrics({"a"}, "1.2.3");
  MetricsSnapshot snapshot{{{}}};
  EXPECT_THAT(metrics.Text(snapshot), Not(HasSubstr("device_memory")));
  snapshot.device_memory = DeviceMemory{.total_bytes = 100, .free_bytes = 30};
  const std::string text = metrics.Text(snapshot);
  EXPECT_THAT(text, HasSubstr("# TYPE deltanet_device_memory_bytes gauge\n"));
  EXPECT_THAT(text, HasSubstr("\ndeltanet_device_memory_bytes 100\n"));
  EXPECT_THAT(text, HasSubstr("deltanet_device_memory_free_bytes 30\n"));
}

}  // namespace
}  // namespace deltanet
