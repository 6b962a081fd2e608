// A problem of the delta rule on a GPU.
#ifndef DELTANET_TESTS_MODEL_OPS_DELTA_RULE_ON_DEVICE_H_
#define DELTANET_TESTS_MODEL_OPS_DELTA_RULE_ON_DEVICE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "gtest/gtest.h"
#include "model/ops/delta_rule.h"
#include "tests/model/ops/cuda_test_util.h"
#include "tests/model/ops/delta_rule_problem.h"

namespace deltanet {

// The problem's arrays on the device, its inputs held in `dtype`, its outputs in `out_dtype`.
class DeltaRuleOnDevice {
 public:
  DeltaRuleOnDevice(DeltaRuleProblem* problem, DType dtype, bool aligned, DType out_dtype = DType::kFloat32)
      : problem_(problem),
        dtype_(dtype),
        out_dtype_(out_dtype),
        mirror_(aligned),
        inputs_(mirror_.Copy(problem->inputs(), dtype)),
        pool_(mirror_.Map(&problem->pool())),
        out_(mirror_.Map(&problem->out(), out_dtype)),
        nonfinite_(mirror_.Map(&problem->nonfinite())) {}

  // A step over `ragged`, whose token 0 is token n of the problem.
  void Step(const Ragged& ragged, int64_t n) {
    DeltaRuleArgs args = problem_->Args(n);
    const auto on_device = [&](const void* host) {
      const int64_t element = static_cast<const float*>(host) - problem_->inputs().data();
      return inputs_ + element * DTypeBytes(dtype_);
    };
    args.dtype = dtype_;
    args.q = on_device(args.q);
    args.k = on_device(args.k);
    args.v = on_device(args.v);
    args.beta = on_device(args.beta);
    args.state.pool = pool_;
    char* const out = out_ + (args.out - problem_->out().data()) * DTypeBytes(out_dtype_);
    args.out = reinterpret_cast<float*>(out);
    if (out_dtype_ == DType::kBFloat16) args.out_bfloat16 = out;
    args.nonfinite = nonfinite_;
    const RaggedRows rows = mirror_.Rows(ragged, dtype_, args.heads, args.key_dim, args.value_dim);
    if (rows.chunks.split_rows > 0) {
      const int64_t blocks = DeltaRuleChunkBlocks(kDevice, dtype_, args.key_dim, args.value_dim);
      const int64_t states = MaxSegmentStates(rows.tokens, args.heads, args.value_dim, blocks);
      segment_states_.push_back(std::make_unique<Guarded>(states * problem_->StateSize()));
      args.segment_states = mirror_.Map(segment_states_.back().get());
    }
    const absl::Status status = DeltaRule(rows, args, mirror_.context());
    ASSERT_TRUE(status.ok()) << status;
  }
  void Finish() {
    mirror_.Finish();
    EXPECT_TRUE(problem_->out().GuardsIntact());
    EXPECT_TRUE(problem_->pool().GuardsIntact());
    for (const auto& states : segment_states_) EXPECT_TRUE(states->GuardsIntact());
  }

 private:
  DeltaRuleProblem* const problem_;
  const DType dtype_, out_dtype_;
  Mirror mirror_;
  const char* const inputs_;
  float* const pool_;
  char* const out_;
  int32_t* const nonfinite_;
  std::vector<std::unique_ptr<Guarded>> segment_states_;  // Of each step that splits rows.
};

}  // namespace deltanet

#endif  // DELTANET_TESTS_MODEL_OPS_DELTA_RULE_ON_DEVICE_H_
