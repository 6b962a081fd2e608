// Where the outputs of a request's work go: into its response, a ForwardResponse or a StreamForwardResponse,
// which have the same fields for them.
//
// Called by the request's reactor, in this order: MakeRoomForOutput and PointToOutput before its work is
// submitted, and when all of it is done, TrimOutput.
#ifndef DELTANET_SERVER_WORK_OUTPUT_H_
#define DELTANET_SERVER_WORK_OUTPUT_H_

#include <cstdint>

#include "deltanet/v1/deltanet.pb.h"
#include "model/base/tensor_view.h"
#include "proto/wire.h"
#include "server/batcher.h"
#include "server/request_validation.h"

namespace deltanet {

// Makes room for the most that all sequences of `input` can give.
template <typename Response>
void MakeRoomForOutput(const CheckedInput& input, Response* response) {
  const int rows = static_cast<int>(input.batch * input.output_rows);
  if (input.readout == ReadoutKind::kValues) {
    response->mutable_output()->mutable_data()->resize(static_cast<size_t>(input.batch * input.output_bytes));
  }
  if (input.readout == ReadoutKind::kScore) response->mutable_log_probs()->Resize(rows, 0);
  if (input.top > 0) {
    v1::TopTokens* top = response->mutable_top();
    top->set_k(input.top);
    top->mutable_ids()->Resize(rows * input.top, 0);
    top->mutable_log_probs()->Resize(rows * input.top, 0);
  }
}

// Points the work of the sequence of that number to its part of the response.
template <typename Response>
void PointToOutput(const CheckedInput& input, int64_t sequence, Response* response, Work* work) {
  const int64_t first = sequence * input.output_rows;
  work->output_dtype = input.output_dtype;
  work->readout = input.readout;
  work->last_only = input.last_only;
  work->top = input.top;
  if (input.readout == ReadoutKind::kValues) {
    work->output = response->mutable_output()->mutable_data()->data() + sequence * input.output_bytes;
  }
  if (input.readout == ReadoutKind::kScore)
    work->log_probs = response->mutable_log_probs()->mutable_data() + first;
  if (input.top > 0) {
    work->top_ids = response->mutable_top()->mutable_ids()->mutable_data() + first * input.top;
    work->top_log_probs = response->mutable_top()->mutable_log_probs()->mutable_data() + first * input.top;
  }
}

// Each sequence has given `rows`: less than there was room for only where there is one sequence. `width` is
// that of values.
template <typename Response>
void TrimOutput(const CheckedInput& input, int64_t rows, int64_t width, Response* response) {
  const int all = static_cast<int>(input.batch * rows);
  if (input.readout == ReadoutKind::kValues) {
    v1::Tensor* output = response->mutable_output();
    output->set_dtype(ToProtoDType(input.output_dtype));
    if (input.batched) output->add_shape(input.batch);
    output->add_shape(rows);
    output->add_shape(width);
    output->mutable_data()->resize(static_cast<size_t>(all * width * DTypeBytes(input.output_dtype)));
  }
  if (input.readout == ReadoutKind::kScore) response->mutable_log_probs()->Truncate(all);
  if (input.top > 0) {
    response->mutable_top()->mutable_ids()->Truncate(all * input.top);
    response->mutable_top()->mutable_log_probs()->Truncate(all * input.top);
  }
}

}  // namespace deltanet

#endif  // DELTANET_SERVER_WORK_OUTPUT_H_
