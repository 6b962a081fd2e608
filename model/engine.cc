// The engine: runs every family's layers over a ragged batch (weights.h has the equations).
//
// Bytes a token and layer, float32, d wide, K = V = d/H: the mixer's two products read 3d + d and write 3d +
// d floats, the operators between them about 12 d; weights (10 d^2) are read once a step, a row's state (2 d
// d/H) once a row. FLOPs a token and layer: 20 d^2 in products (6 f d more with a feed-forward of width f)
// and 6 d d/H in the delta rule.
//
// On a GPU, `delta_net` in bfloat16 (f wide feed-forward): a layer is 8 launches where rows have few tokens, four
// products and between them the mixer, the feed-forward's norm, the gated unit, and the next layer's norm: the second
// and the fourth product add to the residual stream themselves. It is 5 where there are few tokens in all and the
// products do the rest but the mixer (FusedGemm, on Hopper), each beginning to read its weights while the one before
// it ends; 11 where rows are long and the mixer is the convolution, its tails, the delta rule and the output norm.
// Between the products move, a token: convolution 12 d, delta rule 8 d, output norm 4 d, the two norms 6 d each (the
// residual stream is float32), gated unit 6 f bytes: 108 KB for d = 2048, f = 5632, in 24 layers and 16,384 tokens
// 42 GB, 10 ms at 4.3 TB/s, beside 51 ms of products at 790 TFLOP/s (710 where the device is warm: they take all the
// power that it has, and the more so, the less time is between them). Of many tokens, on Hopper, the gated
// unit is made with its product: a launch less, and 74 KB instead of 108. A step of single tokens reads the weights once
// (2.6 GB, 0.61 ms) and reads and writes each session's state (50 MB, 12 us).
//
// A step with few tokens is bound by the host, which has 120 to 300 launches to make. So where the device has graphs,
// steps whose rows have one token each (generation, streams fed token by token) are launched as one: everything
// between the input's copy and the outputs', sampling included, is captured when the model has been loaded, once for
// each of a few numbers of rows, for outputs that are handed over and for such that are read out, and for each
// staging, whose memory a graph has its data in. A step takes the next larger number, and the rows that it lacks
// are padding (ops/rows.h), which reads and writes no slot. Steps whose rows have some more tokens, but all as many
// (streams of chunks), are captured when they come for the second time in a row, and the last of these are kept. All
// other steps launch operator by operator.
#include <algorithm>
#include <compare>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "model/base/checkpoint.h"
#include "model/base/config.h"
#include "model/base/round_up.h"
#include "model/base/status_macros.h"
#include "model/device.h"
#include "model/model.h"
#include "model/ops/carry.h"
#include "model/ops/conv_qkv.h"
#include "model/ops/delta_net_mixer.h"
#include "model/ops/delta_rule.h"
#include "model/ops/delta_rule_plan.h"
#include "model/ops/elementwise.h"
#include "model/ops/gemm.h"
#include "model/ops/output_norm.h"
#include "model/ops/readout.h"
#include "model/ops/rms_norm.h"
#include "model/ops/rows.h"
#include "model/ops/short_conv.h"
#include "model/torch_guard.h"
#include "model/torch_parallel.h"
#include "model/weights.h"

namespace deltanet {
namespace {

constexpr int64_t kAlignment = 16;     // Floats of a slot's parts.
constexpr int64_t kRowAlignment = 64;  // Elements of a token's row: whole lines of memory.
static_assert(kMaxTop == kMaxTopTokens, "as many as a row may want, a readout gives");
static_assert(kFewTokens == kDeltaRuleFewTokens,
              "cuts leave rows to the kernel that the message would have gone to");

// A model over tokens without look-ahead can score and generate.
bool Generates(const ModelConfig& config) {
  return config.takes_tokens() && config.lookahead_per_layer() == 0;
}

int64_t QkvWidth(const Weights& weights) {
  return weights.heads * (2 * weights.key_dim + weights.value_dim);
}

// The place of what a layer's convolution remembers, in floats.
int64_t TailFloats(const Weights& weights) {
  if (weights.mixer == MixerKind::kComposed) return (kConvTaps - 1) * weights.config.d_model;
  const int64_t inputs = std::max<int64_t>(0, weights.conv_taps - 1) * QkvWidth(weights);
  return RoundUp(inputs * DTypeBytes(weights.dtype), 4) / 4;
}

// Where a slot keeps what: for each layer S [H, K, V], then the convolution's tail; after them, in models that
// generate, what is carried [d] (ops/carry.h) and the sampled id, an int32.
struct SlotLayout {
  explicit SlotLayout(const Weights& weights)
      : tail_offset(RoundUp(weights.heads * weights.key_dim * weights.value_dim, kAlignment)),
        layer_stride(tail_offset + RoundUp(TailFloats(weights), kAlignment)),
        carried_offset(layer_stride * weights.config.num_layers),
        sampled_offset(carried_offset +
                       (Generates(weights.config) ? RoundUp(weights.config.d_model, kAlignment) : 0)),
        slot_stride(sampled_offset + (Generates(weights.config) ? kAlignment : 0)) {}

  int64_t tail_offset;  // Floats, as the rest.
  int64_t layer_stride;
  int64_t carried_offset;
  int64_t sampled_offset;
  int64_t slot_stride;
};

// Logits take the place of a large step's tokens times the vocabulary: they are bounded.
constexpr int64_t kLogitsBytes = int64_t{64} << 20;

int64_t MaxLogits(const Weights& weights, const ModelOptions& options) {
  const int64_t fit = kLogitsBytes / (weights.head.outputs * DTypeBytes(DType::kFloat32));
  return std::clamp(fit, std::min(kMinStepTokens, options.max_step_tokens), options.max_step_tokens);
}

// Rows of what a product reads or writes, of which it has to compute `rows`.
int64_t ProductRows(int64_t rows, const ModelOptions& options) {
  return GemmRows(rows, options.deterministic, options.device);
}

// Whether the delta rule may split long rows, so that their bits depend on the rows beside them.
bool Splits(const ModelOptions& options) { return !options.deterministic; }

// Lays out buffers one behind the other; as they are by default, at multiples of the 256 bytes that cuBLAS
// looks at when it chooses a kernel, which must not depend on the staging that a step happens to have.
class Layout {
 public:
  explicit Layout(int64_t alignment = 256) : alignment_(alignment) {}
  int64_t Take(int64_t elements, DType dtype) { return TakeBytes(elements * DTypeBytes(dtype)); }
  int64_t TakeBytes(int64_t bytes) {
    const int64_t begin = bytes_;
    bytes_ += RoundUp(bytes, alignment_);
    return begin;
  }
  int64_t bytes() const { return bytes_; }

 private:
  const int64_t alignment_;
  int64_t bytes_ = 0;
};

// Whether every layer is of those that FusedGemm makes up, save for the sizes and the device.
bool LayersFuse(const Weights& weights, const ModelOptions& options) {
  if (weights.dtype != DType::kBFloat16 || weights.mixer != MixerKind::kShortConv ||
      weights.config.lookahead_per_layer() > 0 || options.deterministic) {
    return false;
  }
  return std::all_of(weights.layers.begin(), weights.layers.end(), [](const LayerWeights& layer) {
    return layer.pre_norm != nullptr && layer.post_norm == nullptr && layer.has_ff && layer.ff_norm != nullptr &&
           layer.post_ff_norm == nullptr && layer.qkv.bias == nullptr && layer.out.bias == nullptr &&
           layer.ff_in.bias == nullptr && layer.ff_out.bias == nullptr;
  });
}

// Intermediate results of one step, on the device; one after another the steps use the same. Named by
// content; T is the dtype of the weights' matrices. Sizes are those of the largest step.
struct Workspace {
  Workspace(const Weights& weights, const ModelOptions& options, int64_t chunk_blocks) {
    const int64_t tokens = ProductRows(options.max_step_tokens, options);
    const int64_t d = weights.config.d_model;
    const int64_t value_width = weights.heads * weights.value_dim;
    const bool composed = weights.mixer == MixerKind::kComposed, fuses = LayersFuse(weights, options);
    const DType t = weights.dtype;
    int64_t ff = 0;
    for (const LayerWeights& layer : weights.layers) ff = std::max(ff, layer.ff_out.inputs);
    z_stride = RoundUp(weights.layers[0].qkv.outputs, kRowAlignment);
    qkv_stride = composed ? z_stride : RoundUp(QkvWidth(weights) + weights.heads, kRowAlignment);
    logits_rows = Generates(weights.config) ? MaxLogits(weights, options) : 0;
    const int64_t logits_floats = ProductRows(logits_rows, options) * weights.head.outputs;
    const int64_t states =
        Splits(options) && chunk_blocks > 0
            ? MaxSegmentStates(options.max_step_tokens, weights.heads, weights.value_dim, chunk_blocks)
            : 0;
    Layout layout;
    const int64_t at[] = {layout.Take(composed ? tokens * d : 0, DType::kFloat32),
                          layout.Take(composed ? tokens * kConvTaps * d : 0, t),
                          layout.Take(tokens * z_stride, t),
                          layout.Take(composed ? 0 : tokens * qkv_stride, t),
                          layout.Take(tokens * value_width, t),
                          layout.Take(tokens * std::max(d, value_width), t),
                          layout.Take(fuses ? tokens * d : 0, t),
                          layout.Take(tokens * 2 * ff, t),
                          layout.Take(tokens * ff, t),
                          layout.Take(logits_floats, DType::kFloat32),
                          layout.Take(fuses ? tokens * SquaresWidth(d) : 0, DType::kFloat32),
                          layout.Take(states * weights.key_dim * value_width, DType::kFloat32)};
    buffer = DeviceBuffer(options.device, layout.bytes());
    centre = reinterpret_cast<float*>(buffer.data() + at[0]);
    taps = buffer.data() + at[1];
    z = buffer.data() + at[2];
    qkv = composed ? z : buffer.data() + at[3];
    mixed = buffer.data() + at[4];
    normed = buffer.data() + at[5];
    product = buffer.data() + at[6];
    ff_in = buffer.data() + at[7];
    ff_gated = buffer.data() + at[8];
    logits = reinterpret_cast<float*>(buffer.data() + at[9]);
    squares = reinterpret_cast<float*>(buffer.data() + at[10]);
    segment_states = reinterpret_cast<float*>(buffer.data() + at[11]);
  }

  int64_t z_stride, qkv_stride, logits_rows;
  float* centre;   // [N, d] The residual stream one token earlier, for centred convolutions.
  void* taps;      // [N, 3, d] T
  void* z;         // [N, z_stride] T: projected q, k, v, beta, output gate.
  void* qkv;       // [N, qkv_stride] T: what the delta rule takes: q, k, v, beta. z itself, if composed.
  void* mixed;     // [N, HV] T: what the delta rule gives.
  void* normed;    // [N, d or HV] T: a norm's result on its way into a product.
  void* product;   // [N, d] T: in fused layers what the next product takes: the residual stream, times the scale of
                   // the norm before it.
  void* ff_in;     // [N, 2f] T
  void* ff_gated;  // [N, f] T
  float* logits;   // [logits_rows, vocabulary] For readouts, a block of them at a time.
  float* squares;  // [N, SquaresWidth(d)] In fused layers, of the residual stream.
  float* segment_states;  // [states, H, K, V] Between the segments of long rows (ops/delta_rule_plan.h).
  DeviceBuffer buffer;
};

// What the host knows of a step, which decides what is launched for it.
struct StepShape {
  int64_t rows = 0, tokens = 0;
  int64_t shortest = 0, longest = 0;  // Tokens of a row.
  int64_t outputs = 0;                // Handed over,
  int64_t reads = 0;                  // and read out.
  bool in_place = false;              // Whether a row writes the slot that it reads.

  auto operator<=>(const StepShape&) const = default;
};

// Repeated steps (of rows with as many tokens each) of more tokens than this gain nothing from being a graph:
// the device is bound by its power then, and 16,384 tokens of the 1.3B model, one kernel close behind the
// other, took 2 to 4 % longer.
constexpr int64_t kMostRepeatedTokens = 4096;
constexpr int64_t kMostRepeated = 32;  // Graphs of them that a staging keeps.

// Numbers of rows to which steps are padded: each at most twice, from 8 on at most one and a half times the one
// before, so that there are few (14 up to 256).
std::vector<int64_t> Buckets(const ModelOptions& options) {
  const int64_t most = std::min(options.max_step_rows, options.max_step_tokens);
  std::vector<int64_t> buckets;
  for (int64_t power = 1; power < most; power *= 2) {
    buckets.push_back(power);
    if (power >= 8 && power + power / 2 < most) buckets.push_back(power + power / 2);
  }
  buckets.push_back(most);
  return buckets;
}

// One step's own memory: what Prepare fills, on the host and, copied, on the device, and what Wait reads. On
// the CPU the two sides are the same memory.
struct Staging {
  Staging(const Weights& weights, const ModelOptions& options, int64_t chunk_blocks)
      : copied(options.device), computed(options.device), answered(options.device) {
    const int64_t tokens = options.max_step_tokens, rows = options.max_step_rows;
    const ModelConfig& config = weights.config;
    Layout layout;
    const int64_t positions = Generates(config) ? tokens + rows : 0;
    const int64_t values = config.takes_tokens() ? MaxLogits(weights, options) : tokens;
    const int64_t x_at =
        layout.Take(std::max(tokens + rows, ProductRows(tokens, options)) * config.d_model, DType::kFloat32);
    const int64_t ids_at = layout.Take(config.takes_tokens() ? tokens : 0, DType::kInt64);
    const int64_t long_rows = std::min(rows, tokens / (kDeltaRuleFewTokens + 1));
    const int64_t plan_size =
        chunk_blocks > 0 ? MaxChunkPlanSize(long_rows, weights.heads, weights.value_dim, chunk_blocks) : 0;
    const StepShape largest{.rows = rows, .tokens = tokens, .outputs = values, .reads = positions};
    const int64_t rows_at =
        layout.TakeBytes(RowsLayout(largest).plan_at + plan_size * static_cast<int64_t>(sizeof(int32_t)));
    const int64_t output_width = weights.head.matrix != nullptr ? weights.head.outputs : config.d_model;
    const int64_t output_at = layout.Take(ProductRows(values, options) * output_width, DType::kFloat32);
    const int64_t read_at[] = {layout.TakeBytes(positions * sizeof(int32_t)),
                               layout.TakeBytes(positions * sizeof(float)),
                               layout.TakeBytes(positions * kMaxTopTokens * sizeof(int32_t)),
                               layout.TakeBytes(positions * kMaxTopTokens * sizeof(float))};
    on_device = DeviceBuffer(options.device, layout.bytes());
    if (options.device.type != DeviceType::kCpu)
      on_host = DeviceBuffer::HostFor(options.device, layout.bytes());
    const auto side = [&](char* base) {
      Side s;
      s.x = reinterpret_cast<float*>(base + x_at);
      s.ids = reinterpret_cast<int64_t*>(base + ids_at);
      s.rows = base + rows_at;
      s.output = reinterpret_cast<float*>(base + output_at);
      s.read_ids = reinterpret_cast<int32_t*>(base + read_at[0]);
      s.log_probs = reinterpret_cast<float*>(base + read_at[1]);
      s.top_ids = reinterpret_cast<int32_t*>(base + read_at[2]);
      s.top_log_probs = reinterpret_cast<float*>(base + read_at[3]);
      return s;
    };
    device = side(on_device.data());
    host = options.device.type != DeviceType::kCpu ? side(on_host.data()) : device;
  }

  // Makes the next step one of this shape. Where it has its rows' numbers depends on the shape alone.
  void Begin(const StepShape& next) {
    shape = next;
    step_rows.clear();
    outputs = reads = 0;
    wants_top = false;
    chunks = {};
    graph = nullptr;
    captures = false;
    const RowsLayout layout(shape);
    host.Place(layout);
    device.Place(layout);
    host.offsets[0] = 0;
  }
  // Of what is copied to the device behind `rows`.
  int64_t rows_bytes() const {
    return RowsLayout(shape).plan_at + chunks.size * static_cast<int64_t>(sizeof(int32_t));
  }

  // Where a step's numbers are, in bytes from Side::rows: close together, so that they are one short copy.
  struct RowsLayout {
    explicit RowsLayout(const StepShape& shape) {
      Layout layout(64);
      offsets = layout.TakeBytes((shape.rows + 1) * sizeof(int32_t));
      base_slot = layout.TakeBytes(shape.rows * sizeof(int32_t));
      work_slot = layout.TakeBytes(shape.rows * sizeof(int32_t));
      fresh = layout.TakeBytes(shape.rows * sizeof(uint8_t));
      position = layout.TakeBytes(shape.rows * sizeof(int64_t));
      end = layout.TakeBytes(shape.rows * sizeof(int64_t));
      token_row = layout.TakeBytes(shape.tokens * sizeof(int32_t));
      gather = layout.TakeBytes(shape.outputs * sizeof(int32_t));
      nonfinite = layout.TakeBytes(shape.rows * sizeof(int32_t));
      read_gather = layout.TakeBytes(shape.reads * sizeof(int32_t));
      requests = layout.TakeBytes(shape.reads * sizeof(ReadoutRequest));
      plan_at = layout.bytes();
    }
    int64_t offsets, base_slot, work_slot, fresh, position, end, token_row, gather, nonfinite, read_gather, requests;
    int64_t plan_at;  // To the end.
  };

  struct Side {
    void Place(const RowsLayout& at) {
      offsets = reinterpret_cast<int32_t*>(rows + at.offsets);
      base_slot = reinterpret_cast<int32_t*>(rows + at.base_slot);
      work_slot = reinterpret_cast<int32_t*>(rows + at.work_slot);
      fresh = reinterpret_cast<uint8_t*>(rows + at.fresh);
      position = reinterpret_cast<int64_t*>(rows + at.position);
      end = reinterpret_cast<int64_t*>(rows + at.end);
      token_row = reinterpret_cast<int32_t*>(rows + at.token_row);
      gather = reinterpret_cast<int32_t*>(rows + at.gather);
      nonfinite = reinterpret_cast<int32_t*>(rows + at.nonfinite);
      read_gather = reinterpret_cast<int32_t*>(rows + at.read_gather);
      requests = reinterpret_cast<ReadoutRequest*>(rows + at.requests);
      plan = reinterpret_cast<int32_t*>(rows + at.plan_at);
    }

    float* x;            // [N + R, d] The input, then the residual stream; behind it what the rows carry.
    int64_t* ids;        // [N], for models over tokens.
    char* rows;          // The start of the following, up to `plan`: copied as one, placed for each step anew.
    int32_t* offsets;    // [R+1]
    int32_t* base_slot;  // [R]
    int32_t* work_slot;  // [R]
    uint8_t* fresh;      // [R]
    int64_t* position;   // [R]
    int64_t* end;        // [R]
    int32_t* token_row;  // [N]
    int32_t* gather;     // [N'] (outputs) Rows of x whose output is handed over, in order.
    int32_t* nonfinite;  // [R] Zero before the step.
    int32_t* read_gather;      // [P] (reads) Rows of x that are read out, in order.
    ReadoutRequest* requests;  // [P]
    int32_t* plan;             // Of the delta rule's long rows (ops/delta_rule_plan.h).
    float* output;             // [N', output_width]
    int32_t* read_ids;         // [P]
    float* log_probs;          // [P]
    int32_t* top_ids;          // [P, kMaxTopTokens]
    float* top_log_probs;      // [P, kMaxTopTokens]
  };
  Side host, device;
  DeviceBuffer on_host, on_device;
  DeviceEvent copied, computed, answered;  // Input on the device; output computed; output on the host.

  enum class State { kIdle, kPrepared, kLaunched };
  State state = State::kIdle;
  StepTicket ticket = 0;
  // The step as it was asked for,
  std::vector<StepRow> step_rows;
  int64_t outputs = 0;
  int64_t reads = 0;
  bool wants_top = false;
  StepShape shape;  // and as it runs, with padding.
  ChunkPlan chunks;                    // With its numbers on the host.
  const DeviceGraph* graph = nullptr;  // That runs it; null: operator by operator.
  bool captures = false;               // It is captured before it is launched.

  struct Captured {
    DeviceGraph graph;
    StepTicket used;  // Last; of those that stay, which were captured when the model was loaded, kStays.
  };
  static constexpr StepTicket kStays = std::numeric_limits<StepTicket>::max();
  std::map<StepShape, Captured> graphs;
  int64_t repeated = 0;  // Of the graphs, those that do not stay.
  StepShape before;      // Of the last step without a graph that might have had one.
};

// Which outputs a row gives.
struct RowOutputs {
  RowOutputs(const StepRow& row, int64_t lookahead)
      : carried(row.output_begin < 0),
        begin(std::max(std::max<int64_t>(0, row.output_begin),
                       row.tokens - OutputTokens(row.position, row.tokens, lookahead))),
        end(std::max(begin, std::min(row.output_end, row.tokens))) {}
  int64_t count() const { return (carried ? 1 : 0) + end - begin; }

  bool carried;  // Of the token before the row.
  int64_t begin, end;  // Of these tokens of the row.
};

class Engine final : public Model {
 public:
  Engine(Weights weights, const ModelOptions& options)
      : weights_(std::move(weights)),
        layout_(weights_),
        layers_fuse_(LayersFuse(weights_, options)),
        threads_(options.cpu_threads),
        chunk_blocks_(DeltaRuleChunkBlocks(options.device, weights_.dtype, weights_.key_dim, weights_.value_dim)),
        splits_(Splits(options)),
        workspace_(weights_, options, chunk_blocks_),
        copy_in_(options.device),
        compute_(options.device),
        copy_out_(options.device) {
    const ModelConfig& config = weights_.config;
    description_.family = std::string(FamilyName(config.family));
    description_.takes_tokens = config.takes_tokens();
    description_.input_width = config.takes_tokens() ? 1 : config.d_model;
    description_.output_width = config.takes_tokens() ? config.vocab_size : config.d_model;
    description_.vocab_size = config.vocab_size;
    description_.generates = Generates(config);
    description_.bos_id = config.bos_id;
    description_.eos_ids = config.eos_ids;
    description_.lookahead = config.num_layers * config.lookahead_per_layer();
    description_.parameters = weights_.parameters;
    description_.dtype = weights_.dtype;
    description_.deterministic = options.deterministic;
    description_.device = options.device;
    description_.session_bytes = layout_.slot_stride * static_cast<int64_t>(sizeof(float));
    description_.weight_bytes = weights_.arena.bytes();
    description_.max_step_tokens = options.max_step_tokens;
    description_.max_step_rows = options.max_step_rows;
    if (config.takes_tokens()) description_.max_step_logits = MaxLogits(weights_, options);
    description_.max_steps_in_flight = options.device.type == DeviceType::kCpu ? 1 : 2;
    for (int i = 0; i < description_.max_steps_in_flight; ++i) staging_.emplace_back(weights_, options, chunk_blocks_);
    captures_ = options.one_token_steps == OneTokenSteps::kGraphs && DeviceGraph::Supported(options.device);
    if (captures_ || options.one_token_steps == OneTokenSteps::kPadded) buckets_ = Buckets(options);
  }

  // Runs the largest step over two slots of its own: what LibTorch and CUDA allocate, load or choose on first
  // use is there afterwards, and counts as used memory.
  absl::Status WarmUp() {
    if (description_.deterministic && description_.device.type != DeviceType::kCpu) {
      RETURN_IF_ERROR(CheckProducts());
    }
    AllocatePool(2);
    const int64_t tokens = description_.max_step_tokens;
    const int64_t outputs = description_.takes_tokens ? description_.max_step_logits : tokens;
    const std::vector<char> input(tokens * description_.input_width * sizeof(int64_t));  // Zeros, or ids 0.
    std::vector<float> output(outputs * description_.output_width);
    int64_t id = 0;
    float log_prob = 0;
    StepRow row;
    row.work_slot = 0;
    row.fresh = true;
    row.tokens = tokens;
    row.input = input.data();
    row.input_dtype = description_.takes_tokens ? DType::kInt64 : DType::kFloat32;
    row.output = output.data();
    row.output_begin = tokens - outputs;
    StepRow sampling = row;
    sampling.work_slot = 1;
    sampling.tokens = 1;
    sampling.output_begin = 0;
    sampling.readout = ReadoutKind::kSample;
    sampling.sampling.temperature = 1.0f;
    sampling.ids = &id;
    sampling.log_probs = &log_prob;
    std::vector<StepRow> rows = {row};
    if (description_.generates && description_.max_step_rows > 1) {
      --rows[0].tokens;
      rows[0].output_begin = std::max<int64_t>(0, rows[0].output_begin);
      rows.push_back(sampling);
    }
    ASSIGN_OR_RETURN(const StepTicket ticket, Prepare(rows));
    RETURN_IF_ERROR(Launch(ticket));
    ASSIGN_OR_RETURN(const StepResult result, Wait(ticket));
    return result.rows[0];
  }

  // Gives the engine its slots, before the first step, when it is known what memory is left.
  void AllocatePool(int64_t num_slots) {
    pool_ = DeviceBuffer(description_.device, num_slots * description_.session_bytes);
    written_by_.assign(num_slots, -1);
    description_.num_slots = num_slots;
  }

  // Captures the graphs, if there are to be any: when the pool is there, for they point into it.
  absl::Status CaptureGraphs() {
    if (!captures_) return absl::OkStatus();
    return Checked(CatchTorch("capturing a step", [&]() -> absl::Status {
      SetTorchThreads(threads_);
      const DeviceStream::Current current(compute_);
      const int64_t free_before = FreeDeviceBytes(description_.device);
      for (Staging& s : staging_) {
        for (const int64_t bucket : buckets_) {
          for (const bool reads : {false, true}) {
            if (!CanPad(bucket, reads)) continue;
            s.Begin(Padded(bucket, reads));
            FillPadding(&s);
            CopyIn(&s);
            compute_.Await(s.copied);
            // On first use kernels are loaded and products take their workspace, which nothing may do while it is
            // captured. All rows are padding: no slot is touched.
            RETURN_IF_ERROR(Compute(s));
            compute_.Synchronize();
            ASSIGN_OR_RETURN(DeviceGraph graph, compute_.Capture([&] { return Compute(s); }));
            s.graphs.emplace(s.shape, Staging::Captured{std::move(graph), Staging::kStays});
            ++description_.graphs;
          }
        }
      }
      compute_.Synchronize();
      description_.graph_bytes = free_before - FreeDeviceBytes(description_.device);
      captures_repeated_ = true;
      return absl::OkStatus();
    }));
  }

  const ModelDescription& description() const override { return description_; }

  absl::StatusOr<StepTicket> Prepare(absl::Span<const StepRow> rows) override {
    Staging& s = staging_[(last_ticket_ + 1) % staging_.size()];
    if (s.state != Staging::State::kIdle) {
      return absl::FailedPreconditionError(
          absl::StrCat(staging_.size(), " steps are under way, want one to be waited for first"));
    }
    RETURN_IF_ERROR(Validate(rows));
    const StepShape shape = ShapeOf(rows);
    const bool reads_out = description_.generates && shape.outputs == 0;
    const std::optional<int64_t> bucket = BucketOf(shape, reads_out);
    s.Begin(bucket.has_value() ? Padded(*bucket, reads_out) : shape);
    s.step_rows.assign(rows.begin(), rows.end());
    const int64_t carried_at = bucket.value_or(shape.tokens);  // Of row 0, in x: behind all tokens.
    const int64_t d = weights_.config.d_model;
    int64_t tokens = 0;
    for (size_t r = 0; r < rows.size(); ++r) {
      const StepRow& row = rows[r];
      const int64_t first = tokens;
      tokens += row.tokens;
      s.host.offsets[r + 1] = static_cast<int32_t>(tokens);
      s.host.base_slot[r] = row.base_slot;
      s.host.work_slot[r] = row.work_slot;
      s.host.fresh[r] = row.fresh ? 1 : 0;
      s.host.position[r] = row.position;
      s.host.end[r] = row.end;
      s.host.nonfinite[r] = 0;
      std::fill_n(s.host.token_row + first, row.tokens, static_cast<int32_t>(r));
      const int64_t real = RealTokens(row);
      if (row.feed_sampled) {
        s.host.ids[first] = kSampledId;
      } else if (description_.takes_tokens) {
        if (real > 0) std::memcpy(s.host.ids + first, row.input, real * sizeof(int64_t));
        std::fill_n(s.host.ids + first + real, row.tokens - real, int64_t{0});
      } else {
        ConvertElements(row.input, row.input_dtype, s.host.x + first * d, DType::kFloat32, real * d);
        std::fill_n(s.host.x + (first + real) * d, (row.tokens - real) * d, 0.0f);
      }
      const RowOutputs wanted(row, description_.lookahead);
      if (row.readout == ReadoutKind::kValues) {
        if (wanted.carried) s.host.gather[s.outputs++] = static_cast<int32_t>(carried_at + r);
        for (int64_t i = wanted.begin; i < wanted.end; ++i) {
          s.host.gather[s.outputs++] = static_cast<int32_t>(first + i);
        }
      } else {
        s.wants_top = s.wants_top || row.top > 0;
        for (int64_t p = 0; p < wanted.count(); ++p) {
          const int64_t token = wanted.begin + p - (wanted.carried ? 1 : 0);
          s.host.read_gather[s.reads] =
              static_cast<int32_t>(wanted.carried && p == 0 ? carried_at + r : first + token);
          s.host.requests[s.reads++] = RequestOf(row, p);
        }
      }
    }
    if (chunk_blocks_ > 0) {
      s.chunks = PlanChunks({s.host.offsets, rows.size() + 1}, weights_.heads, weights_.value_dim, chunk_blocks_,
                            splits_, s.host.plan);
    }
    if (bucket.has_value()) FillPadding(&s);
    FindGraph(&s);
    RETURN_IF_ERROR(Checked(CatchTorch("copying a step's input", [&] {
      CopyIn(&s);
      return absl::OkStatus();
    })));
    s.state = Staging::State::kPrepared;
    s.ticket = ++last_ticket_;
    return s.ticket;
  }

  absl::Status Launch(StepTicket ticket) override {
    Staging& s = staging_[ticket % staging_.size()];
    if (s.state != Staging::State::kPrepared || s.ticket != ticket) return WrongTicket(ticket);
    const absl::Status status = Checked(CatchTorch("step", [&] { return Run(&s); }));
    s.state = status.ok() ? Staging::State::kLaunched : Staging::State::kIdle;
    return status;
  }

  absl::StatusOr<StepResult> Wait(StepTicket ticket) override {
    Staging& s = staging_[ticket % staging_.size()];
    if (s.state != Staging::State::kLaunched || s.ticket != ticket) return WrongTicket(ticket);
    s.state = Staging::State::kIdle;
    RETURN_IF_ERROR(Checked(CatchTorch("waiting for a step", [&] {
      s.answered.Synchronize();
      return absl::OkStatus();
    })));
    StepResult result;
    result.as_graph = s.graph != nullptr;
    const float* output = s.host.output;
    int64_t read = 0;
    for (size_t r = 0; r < s.step_rows.size(); ++r) {
      const StepRow& row = s.step_rows[r];
      const int64_t wanted = RowOutputs(row, description_.lookahead).count();
      bool finite = s.host.nonfinite[r] == 0;
      if (row.readout == ReadoutKind::kValues) {
        const int64_t values = wanted * description_.output_width;
        finite = finite && AllFinite(output, DType::kFloat32, values);
        if (finite) ConvertElements(output, DType::kFloat32, row.output, row.output_dtype, values);
        output += values;
      } else {
        finite = finite && AllFinite(s.host.log_probs + read, DType::kFloat32, wanted);
        if (finite) HandOverReadout(s.host, row, read, wanted);
        read += wanted;
      }
      result.rows.push_back(
          finite ? absl::OkStatus()
                 : absl::InternalError("the session's state or output became infinite or NaN"));
    }
    return result;
  }

 private:
  // After a failure: whether it was the device's end.
  absl::Status Checked(absl::Status status) const {
    if (status.ok()) return status;
    const absl::Status alive = CheckAlive(description_.device);
    return alive.ok() ? status : alive;
  }

  // Of the rows alone, without padding.
  StepShape ShapeOf(absl::Span<const StepRow> rows) const {
    StepShape shape;
    shape.rows = static_cast<int64_t>(rows.size());
    if (shape.rows > 0) shape.shortest = INT64_MAX;
    for (const StepRow& row : rows) {
      shape.tokens += row.tokens;
      shape.shortest = std::min(shape.shortest, row.tokens);
      shape.longest = std::max(shape.longest, row.tokens);
      shape.in_place = shape.in_place || (!row.fresh && row.base_slot == row.work_slot);
      (row.readout == ReadoutKind::kValues ? shape.outputs : shape.reads) +=
          RowOutputs(row, description_.lookahead).count();
    }
    return shape;
  }

  // Whether as many outputs as there are rows can be read out, or else handed over.
  bool CanPad(int64_t rows, bool reads_out) const {
    if (reads_out) return description_.generates;
    return !description_.takes_tokens || rows <= description_.max_step_logits;
  }

  // The number of rows to which a step is padded, if it is: where each of its rows has one token.
  std::optional<int64_t> BucketOf(const StepShape& shape, bool reads_out) const {
    if (shape.shortest != 1 || shape.longest != 1 || (shape.outputs > 0 && shape.reads > 0)) return std::nullopt;
    const auto bucket = std::lower_bound(buckets_.begin(), buckets_.end(),
                                         std::max({shape.rows, shape.outputs, shape.reads}));
    if (bucket == buckets_.end() || !CanPad(*bucket, reads_out)) return std::nullopt;
    return *bucket;
  }

  // A step of `bucket` rows of one token and as many outputs, which are read out or else handed over.
  static StepShape Padded(int64_t bucket, bool reads_out) {
    return {bucket, bucket, 1, 1, reads_out ? 0 : bucket, reads_out ? bucket : 0, /*in_place=*/true};
  }

  // What the step's shape has beyond its rows.
  void FillPadding(Staging* s) {
    const Staging::Side& host = s->host;
    const int64_t bucket = s->shape.rows;
    const int64_t d = weights_.config.d_model;
    for (int64_t r = static_cast<int64_t>(s->step_rows.size()); r < bucket; ++r) {
      host.offsets[r + 1] = static_cast<int32_t>(r + 1);
      host.base_slot[r] = host.work_slot[r] = -1;
      host.fresh[r] = 1;
      host.position[r] = 0;
      host.end[r] = INT64_MAX;
      host.nonfinite[r] = 0;
      host.token_row[r] = static_cast<int32_t>(r);
      if (description_.takes_tokens) {
        host.ids[r] = 0;
      } else {
        std::fill_n(host.x + r * d, d, 0.0f);
      }
    }
    // What nobody has asked for is made of the first token.
    std::fill(host.gather + s->outputs, host.gather + std::max(s->outputs, s->shape.outputs), 0);
    std::fill(host.read_gather + s->reads, host.read_gather + std::max(s->reads, s->shape.reads), 0);
    std::fill(host.requests + s->reads, host.requests + std::max(s->reads, s->shape.reads), ReadoutRequest());
  }

  // The step's graph, or whether it is to have one. Of rows that all have as many tokens, the shape tells their
  // lengths, on which depends what the delta rule launches.
  void FindGraph(Staging* s) const {
    if (const auto found = s->graphs.find(s->shape); found != s->graphs.end()) {
      s->graph = &found->second.graph;
      if (found->second.used != Staging::kStays) found->second.used = last_ticket_ + 1;
    } else if (captures_repeated_ && s->shape.shortest == s->shape.longest && s->shape.tokens > 0 &&
               s->shape.tokens <= kMostRepeatedTokens) {
      s->captures = s->shape == s->before;
      s->before = s->shape;
    }
  }

  // Captures the step, in the place of the graph that has not been used for the longest time if there are too
  // many. The staging is this step's, so none of its graphs runs. If it cannot be captured, no step is any more,
  // and this one shows itself whether it is the device that is at fault.
  void CaptureRepeated(Staging* s) {
    DeviceGraph graph;
    const absl::Status status = CatchTorch("capturing a step", [&]() -> absl::Status {
      ASSIGN_OR_RETURN(graph, compute_.Capture([&] { return Compute(*s); }));
      return absl::OkStatus();
    });
    if (!status.ok()) {
      captures_repeated_ = false;
      return;
    }
    if (s->repeated == kMostRepeated) {
      const auto earlier = [](const auto& one, const auto& other) { return one.second.used < other.second.used; };
      s->graphs.erase(std::min_element(s->graphs.begin(), s->graphs.end(), earlier));
      --s->repeated;
    }
    s->graph = &s->graphs.emplace(s->shape, Staging::Captured{std::move(graph), s->ticket}).first->second.graph;
    ++s->repeated;
  }

  void CopyIn(Staging* s) {
    if (description_.takes_tokens) {
      copy_in_.Copy(s->device.ids, s->host.ids, s->shape.tokens * sizeof(int64_t));
    } else {
      copy_in_.Copy(s->device.x, s->host.x, s->shape.tokens * weights_.config.d_model * sizeof(float));
    }
    copy_in_.Copy(s->device.rows, s->host.rows, s->rows_bytes());
    copy_in_.Record(&s->copied);
  }

  static int64_t RealTokens(const StepRow& row) {
    return std::clamp<int64_t>(row.end - row.position, 0, row.tokens);
  }

  // What is asked for the output number p of those that the row wants.
  static ReadoutRequest RequestOf(const StepRow& row, int64_t p) {
    ReadoutRequest request;
    request.top = row.top;
    if (row.readout == ReadoutKind::kScore) {
      int64_t target;
      std::memcpy(&target, static_cast<const char*>(row.targets) + p * sizeof(target), sizeof(target));
      request.target = static_cast<int32_t>(target);
    }
    if (row.readout == ReadoutKind::kSample) {
      request.sample = 1;
      request.sampled_slot = row.work_slot;
      request.temperature = row.sampling.temperature;
      request.top_k = row.sampling.top_k;
      request.top_p = row.sampling.top_p;
      request.seed = row.sampling.seed;
      request.counter = row.position + row.tokens;
    }
    return request;
  }

  // Readouts [first, first + count) to where the row wants them.
  static void HandOverReadout(const Staging::Side& side, const StepRow& row, int64_t first, int64_t count) {
    for (int64_t p = 0; p < count; ++p) {
      if (row.ids != nullptr) row.ids[p] = side.read_ids[first + p];
      if (row.log_probs != nullptr) row.log_probs[p] = side.log_probs[first + p];
      const int64_t from = (first + p) * kMaxTopTokens;
      for (int64_t k = 0; k < row.top; ++k) {
        row.top_ids[p * row.top + k] = side.top_ids[from + k];
        row.top_log_probs[p * row.top + k] = side.top_log_probs[from + k];
      }
    }
  }

  absl::Status WrongTicket(StepTicket ticket) const {
    return absl::FailedPreconditionError(absl::StrCat("ticket ", ticket, " is not the step under way"));
  }

  absl::Status Validate(absl::Span<const StepRow> rows) {
    if (static_cast<int64_t>(rows.size()) > description_.max_step_rows) {
      return absl::InvalidArgumentError(
          absl::StrCat("step has ", rows.size(), " rows, at most ", description_.max_step_rows, " fit"));
    }
    ++validation_;
    int64_t tokens = 0, values = 0;
    for (const StepRow& row : rows) {
      if (row.work_slot < 0 || row.work_slot >= description_.num_slots ||
          (!row.fresh && (row.base_slot < 0 || row.base_slot >= description_.num_slots))) {
        return absl::InvalidArgumentError(absl::StrCat("row has base slot ", row.base_slot, " and work slot ",
                                                       row.work_slot, ", want 0 to ",
                                                       description_.num_slots - 1));
      }
      if (row.tokens < 0 || row.position < 0 || row.end < 0) {
        return absl::InvalidArgumentError(absl::StrCat("row has ", row.tokens, " tokens at position ",
                                                       row.position, " of a sequence of ", row.end,
                                                       ", want none below 0"));
      }
      RETURN_IF_ERROR(ValidateReadout(row));
      const bool wants_ids = description_.takes_tokens;
      if (RealTokens(row) > 0 && !row.feed_sampled && (row.input_dtype == DType::kInt64) != wants_ids) {
        return absl::InvalidArgumentError(absl::StrCat("row has input of ", DTypeName(row.input_dtype),
                                                       ", want ",
                                                       wants_ids ? "int64" : "a floating-point type"));
      }
      if (row.output_dtype == DType::kInt64) {
        return absl::InvalidArgumentError("row wants output of int64, want a floating-point type");
      }
      if (written_by_[row.work_slot] == validation_) {
        return absl::InvalidArgumentError(absl::StrCat("two rows write slot ", row.work_slot));
      }
      written_by_[row.work_slot] = validation_;
      tokens += row.tokens;
      if (row.readout == ReadoutKind::kValues) values += RowOutputs(row, description_.lookahead).count();
    }
    for (const StepRow& row : rows) {
      if (!row.fresh && row.base_slot != row.work_slot && written_by_[row.base_slot] == validation_) {
        return absl::InvalidArgumentError(
            absl::StrCat("one row reads slot ", row.base_slot, ", another writes it"));
      }
    }
    if (tokens > description_.max_step_tokens) {
      return absl::InvalidArgumentError(
          absl::StrCat("step has ", tokens, " tokens, at most ", description_.max_step_tokens, " fit"));
    }
    if (description_.takes_tokens && values > description_.max_step_logits) {
      return absl::InvalidArgumentError(absl::StrCat("step wants the logits of ", values, " tokens, at most ",
                                                     description_.max_step_logits, " fit"));
    }
    return absl::OkStatus();
  }

  absl::Status ValidateReadout(const StepRow& row) const {
    const bool needs_generation =
        row.readout != ReadoutKind::kValues || row.feed_sampled || row.output_begin < 0;
    if (needs_generation && !description_.generates) {
      return absl::InvalidArgumentError("row scores, samples or feeds what was sampled, the model does not generate");
    }
    if (row.feed_sampled && (row.tokens != 1 || row.fresh)) {
      return absl::InvalidArgumentError(absl::StrCat("row of ", row.tokens, row.fresh ? " fresh" : "",
                                                     " tokens feeds what was sampled, want 1 and a base slot"));
    }
    if (row.output_begin < -1 || (row.output_begin < 0 && row.fresh)) {
      return absl::InvalidArgumentError(
          absl::StrCat("row wants outputs from token ", row.output_begin, row.fresh ? " of a fresh sequence" : "",
                       ", want at least 0, or -1 with a base slot"));
    }
    if (row.top < 0 || row.top > kMaxTop) {
      return absl::InvalidArgumentError(absl::StrCat("row wants ", row.top, " ids, want 0 to ", kMaxTop));
    }
    const int64_t wanted = RowOutputs(row, description_.lookahead).count();
    if (row.readout == ReadoutKind::kSample && wanted != 1) {
      return absl::InvalidArgumentError(absl::StrCat("row samples from ", wanted, " outputs, want 1"));
    }
    return absl::OkStatus();
  }

  GemmArgs ProductWith(const Linear& linear, DType c_dtype) const {
    GemmArgs gemm;
    gemm.dtype = weights_.dtype;
    gemm.c_dtype = c_dtype;
    gemm.n = linear.outputs;
    gemm.k = linear.inputs;
    gemm.b = linear.matrix;
    gemm.ldb = linear.inputs;
    gemm.fixed_order = description_.deterministic;
    return gemm;
  }

  // For AddProduct.
  GemmArgs AddingProductWith(const Linear& linear) const {
    GemmArgs gemm = ProductWith(linear, DType::kFloat32);
    gemm.accumulate = true;
    return gemm;
  }

  GemmArgs ProductOf(int64_t m, const void* a, const Linear& linear, DType c_dtype, void* c, int64_t ldc) const {
    GemmArgs gemm = ProductWith(linear, c_dtype);
    gemm.m = m;
    gemm.a = a;
    gemm.lda = linear.inputs;
    gemm.c = c;
    gemm.ldc = ldc;
    return gemm;
  }

  absl::Status Multiply(int64_t m, const void* a, const Linear& linear, DType c_dtype, void* c, int64_t ldc,
                        const OpContext& context) {
    return Gemm(ProductOf(m, a, linear, c_dtype, c, ldc), context);
  }

  // Whether this device makes all products of this model as they have to be for a deterministic one.
  absl::Status CheckProducts() {
    const DeviceStream::Current current(compute_);
    const OpContext context{description_.device, TorchParallelFor, compute_.handle()};
    for (const LayerWeights& layer : weights_.layers) {
      for (const Linear* linear : {&layer.qkv, &layer.ff_in}) {
        if (linear->matrix == nullptr) continue;
        RETURN_IF_ERROR(CheckFixedOrder(ProductWith(*linear, weights_.dtype), context));
      }
      for (const Linear* linear : {&layer.out, &layer.ff_out}) {
        if (linear->matrix == nullptr) continue;
        RETURN_IF_ERROR(CheckFixedOrder(AddingProductWith(*linear), context));
      }
    }
    if (weights_.head.matrix == nullptr) return absl::OkStatus();
    return CheckFixedOrder(ProductWith(weights_.head, DType::kFloat32), context);
  }

  SlotView SlotParts(int64_t offset) const { return {pool_.as<float>(), layout_.slot_stride, offset}; }
  SlotView Slots(int64_t layer, int64_t offset) const {
    return SlotParts(layer * layout_.layer_stride + offset);
  }

  // z, and in its place what the delta rule takes, by convolutions composed into the product.
  absl::Status ComposedFront(int64_t index, const RaggedRows& rows, float* x, const OpContext& context) {
    const LayerWeights& layer = weights_.layers[index];
    const int64_t look = weights_.config.lookahead_per_layer();
    const DType t = weights_.dtype;
    Workspace& w = workspace_;

    GatherTapsArgs taps;
    taps.width = weights_.config.d_model;
    taps.lag = index * look;
    taps.x = x;
    taps.norm_scale = layer.pre_norm;
    taps.tail = Slots(index, layout_.tail_offset);
    taps.dtype = t;
    taps.taps = w.taps;
    taps.centre = look > 0 ? w.centre : nullptr;
    RETURN_IF_ERROR(GatherTaps(rows, taps, context));
    RETURN_IF_ERROR(Multiply(rows.tokens, w.taps, layer.qkv, t, w.z, w.z_stride, context));

    ConvQkvActivationArgs qkv;
    qkv.heads = weights_.heads;
    qkv.key_dim = weights_.key_dim;
    qkv.value_dim = weights_.value_dim;
    qkv.activation = weights_.activation;
    qkv.lag = taps.lag;
    qkv.centre_tap = kConvTaps - 1 - look;
    qkv.dtype = t;
    qkv.z = w.z;
    qkv.z_stride = w.z_stride;
    qkv.bias = layer.qkv.bias;
    qkv.tap_bias = layer.tap_bias;
    return ConvQkvActivation(rows, qkv, context);
  }

  // The scale of the norm that layer `index` finds in w.normed, made with the addition before it; null if there
  // is no such layer, or if it norms the taps that it gathers.
  const float* NormBefore(int64_t index) const {
    if (weights_.mixer == MixerKind::kComposed || index == weights_.config.num_layers) return nullptr;
    return weights_.layers[index].pre_norm;
  }

  ShortConvQkvArgs ShortConvOf(int64_t index) const {
    const LayerWeights& layer = weights_.layers[index];
    const Workspace& w = workspace_;
    ShortConvQkvArgs conv;
    conv.heads = weights_.heads;
    conv.key_dim = weights_.key_dim;
    conv.value_dim = weights_.value_dim;
    conv.activation = weights_.qk_activation;
    conv.norm = weights_.qk_norm;
    conv.has_beta = weights_.has_beta;
    conv.beta_scale = weights_.beta_scale;
    conv.taps = weights_.conv_taps;
    conv.dtype = weights_.dtype;
    conv.z = w.z;
    conv.z_stride = w.z_stride;
    conv.weight = layer.conv_weight;
    conv.bias = layer.conv_bias;
    conv.tail = Slots(index, layout_.tail_offset);
    conv.out = w.qkv;
    conv.out_stride = w.qkv_stride;
    return conv;
  }

  DeltaRuleArgs DeltaRuleOf(int64_t index, int32_t* nonfinite) const {
    const Workspace& w = workspace_;
    const int64_t qk_width = weights_.heads * weights_.key_dim;
    const auto part = [&](int64_t offset) {
      return static_cast<const char*>(w.qkv) + offset * DTypeBytes(weights_.dtype);
    };
    DeltaRuleArgs rule;
    rule.heads = weights_.heads;
    rule.key_dim = weights_.key_dim;
    rule.value_dim = weights_.value_dim;
    rule.dtype = weights_.dtype;
    rule.q = part(0);
    rule.k = part(qk_width);
    rule.v = part(2 * qk_width);
    rule.beta = part(QkvWidth(weights_));
    rule.token_stride = w.qkv_stride;
    rule.scale = weights_.scale;
    rule.state = Slots(index, 0);
    if (weights_.dtype == DType::kBFloat16) {
      rule.out_bfloat16 = w.mixed;
    } else {
      rule.out = static_cast<float*>(w.mixed);
    }
    rule.nonfinite = nonfinite;
    rule.segment_states = w.segment_states;
    return rule;
  }

  // Of what the delta rule gives, n tokens, for the product behind it.
  OutputNormArgs OutputNormOf(int64_t n, const LayerWeights& layer) const {
    const Workspace& w = workspace_;
    OutputNormArgs norm;
    norm.rows = n;
    norm.groups = weights_.norm_per_head ? weights_.heads : 1;
    norm.width = weights_.norm_per_head ? weights_.value_dim : weights_.heads * weights_.value_dim;
    norm.dtype = weights_.dtype;
    norm.x = w.mixed;
    norm.scale = layer.out_norm;
    norm.epsilon = weights_.epsilon;
    if (weights_.has_output_gate) {
      norm.gate = static_cast<const char*>(w.z) +
                  (QkvWidth(weights_) + (weights_.has_beta ? weights_.heads : 0)) * DTypeBytes(weights_.dtype);
      norm.gate_stride = w.z_stride;
    }
    norm.out = w.normed;
    return norm;
  }

  // One layer; the residual stream `x` [N, d] in place, and w.normed from what is before the layer to what is
  // before the next (NormBefore).
  absl::Status RunLayer(int64_t index, const RaggedRows& rows, float* x, int32_t* nonfinite,
                        const OpContext& context) {
    const LayerWeights& layer = weights_.layers[index];
    const int64_t d = weights_.config.d_model;
    const int64_t n = rows.tokens;
    const int64_t look = weights_.config.lookahead_per_layer();
    const DType t = weights_.dtype;
    Workspace& w = workspace_;
    if (weights_.mixer == MixerKind::kComposed) {
      RETURN_IF_ERROR(ComposedFront(index, rows, x, context));
      RETURN_IF_ERROR(DeltaRule(rows, DeltaRuleOf(index, nonfinite), context));
      RETURN_IF_ERROR(OutputNorm(OutputNormOf(n, layer), context));
    } else {
      RETURN_IF_ERROR(Multiply(n, w.normed, layer.qkv, t, w.z, w.z_stride, context));
      RETURN_IF_ERROR(DeltaNetMixer(
          rows, {ShortConvOf(index), DeltaRuleOf(index, nonfinite), OutputNormOf(n, layer)}, context));
    }
    // x = post_norm(res + m), and with it the norm that the feed-forward or the next layer wants.
    float* const residual = look > 0 ? w.centre : x;
    RETURN_IF_ERROR(AddProduct(n, w.normed, layer.out, residual, context));
    RETURN_IF_ERROR(NormAfter(n, residual, layer.out, layer.post_norm,
                              layer.has_ff ? layer.ff_norm : NormBefore(index + 1), x, context));
    if (!layer.has_ff) return absl::OkStatus();

    const void* ff_from = w.normed;
    if (layer.ff_norm == nullptr) {
      ff_from = x;
      if (t != DType::kFloat32) {  // A product takes operands of one dtype.
        AddRmsNormArgs round;
        round.rows = n;
        round.width = d;
        round.x = x;
        round.normed_dtype = t;
        round.normed = w.normed;
        RETURN_IF_ERROR(AddRmsNorm(round, context));
        ff_from = w.normed;
      }
    }
    RETURN_IF_ERROR(GatedProduct(n, ff_from, layer, context));
    RETURN_IF_ERROR(AddProduct(n, w.ff_gated, layer.ff_out, x, context));
    return NormAfter(n, x, layer.ff_out, layer.post_ff_norm, NormBefore(index + 1), x, context);
  }

  // w.ff_gated = the gated unit of a times the layer's matrix, [n, f].
  absl::Status GatedProduct(int64_t n, const void* a, const LayerWeights& layer, const OpContext& context) {
    const int64_t f = layer.ff_out.inputs;
    const Workspace& w = workspace_;
    FusedGemmArgs fused;
    fused.gemm = ProductOf(n, a, layer.ff_in, weights_.dtype, w.ff_gated, f);
    fused.then = FusedGemmArgs::Then::kGate;
    fused.gate = layer.gate;
    if (layer.ff_in.bias == nullptr && FusedGemmTakes(fused, context)) return FusedGemm(fused, context);
    RETURN_IF_ERROR(Multiply(n, a, layer.ff_in, weights_.dtype, w.ff_in, 2 * f, context));
    GatedUnitArgs gate;
    gate.kind = layer.gate;
    gate.rows = n;
    gate.width = f;
    gate.dtype = weights_.dtype;
    gate.x = w.ff_in;
    gate.bias = layer.ff_in.bias;
    gate.out = w.ff_gated;
    return GatedUnit(gate, context);
  }

  // x += a times the matrix, [n, d].
  absl::Status AddProduct(int64_t n, const void* a, const Linear& linear, float* x,
                          const OpContext& context) {
    GemmArgs gemm = AddingProductWith(linear);
    gemm.m = n;
    gemm.a = a;
    gemm.lda = linear.inputs;
    gemm.c = x;
    gemm.ldc = linear.outputs;
    return Gemm(gemm, context);
  }

  // What follows AddProduct to `from`: the bias, into x; then either post_norm, in place, or next_norm into
  // w.normed, or neither, where they are null.
  absl::Status NormAfter(int64_t n, const float* from, const Linear& linear, const float* post_norm,
                         const float* next_norm, float* x, const OpContext& context) {
    AddRmsNormArgs norm;
    norm.rows = n;
    norm.width = weights_.config.d_model;
    norm.x = from;
    norm.bias = linear.bias;
    norm.epsilon = weights_.epsilon;
    if (post_norm != nullptr) {
      norm.scale = post_norm;
      norm.normed = x;
      return AddRmsNorm(norm, context);
    }
    if (from != x || linear.bias != nullptr) norm.sum = x;
    if (next_norm != nullptr) {
      norm.scale = next_norm;
      norm.normed_dtype = weights_.dtype;
      norm.normed = workspace_.normed;
    }
    if (norm.sum == nullptr && norm.normed == nullptr) return absl::OkStatus();
    return AddRmsNorm(norm, context);
  }

  // The products of one layer over n tokens, with all that is around them but the mixer (the sums stay in float32 for
  // longer than in RunLayer).
  struct FusedLayer {
    FusedGemmArgs qkv, out, ff_in, ff_out;
  };
  FusedLayer FusedLayerOf(int64_t index, int64_t n, float* x) const {
    const LayerWeights& layer = weights_.layers[index];
    const Workspace& w = workspace_;
    const auto product = [&](const Linear& linear, const void* a, void* c, int64_t ldc) {
      FusedGemmArgs fused;
      fused.gemm = ProductOf(n, a, linear, weights_.dtype, c, ldc);
      fused.epsilon = weights_.epsilon;
      return fused;
    };
    const auto add = [&](FusedGemmArgs* fused, const float* scale_of_next) {
      fused->then = FusedGemmArgs::Then::kAdd;
      fused->x = x;
      fused->scale = scale_of_next;
      fused->x_squares = w.squares;
    };
    FusedLayer fused;
    // The first layer's norm is an operator of its own.
    fused.qkv = product(layer.qkv, index == 0 ? w.normed : w.product, w.z, w.z_stride);
    if (index > 0) fused.qkv.squares = w.squares;
    fused.out = product(layer.out, w.normed, w.product, layer.out.outputs);
    add(&fused.out, layer.ff_norm);
    fused.ff_in = product(layer.ff_in, w.product, w.ff_gated, layer.ff_out.inputs);
    fused.ff_in.squares = w.squares;
    fused.ff_in.then = FusedGemmArgs::Then::kGate;
    fused.ff_in.gate = layer.gate;
    fused.ff_out = product(layer.ff_out, w.ff_gated, w.product, layer.ff_out.outputs);
    add(&fused.ff_out, NormBefore(index + 1));
    return fused;
  }

  bool Fuses(int64_t n, float* x, const OpContext& context) const {
    if (!layers_fuse_) return false;
    const FusedLayer layer = FusedLayerOf(0, n, x);  // The others have its sizes.
    return FusedGemmTakes(layer.qkv, context) && FusedGemmTakes(layer.out, context) &&
           FusedGemmTakes(layer.ff_in, context) && FusedGemmTakes(layer.ff_out, context);
  }

  // Does what RunLayer does.
  absl::Status RunFusedLayer(int64_t index, const RaggedRows& rows, float* x, int32_t* nonfinite,
                             const OpContext& context) {
    const FusedLayer layer = FusedLayerOf(index, rows.tokens, x);
    RETURN_IF_ERROR(FusedGemm(layer.qkv, context));
    RETURN_IF_ERROR(DeltaNetMixer(rows,
                                  {ShortConvOf(index), DeltaRuleOf(index, nonfinite),
                                   OutputNormOf(rows.tokens, weights_.layers[index])},
                                  context));
    RETURN_IF_ERROR(FusedGemm(layer.out, context));
    RETURN_IF_ERROR(FusedGemm(layer.ff_in, context));
    return FusedGemm(layer.ff_out, context);
  }

  absl::Status Run(Staging* s) {
    SetTorchThreads(threads_);
    const DeviceStream::Current current(compute_);
    compute_.Await(s->copied);
    if (s->captures && captures_repeated_) CaptureRepeated(s);
    if (s->graph != nullptr) {
      compute_.Launch(*s->graph);
    } else {
      RETURN_IF_ERROR(Compute(*s));
    }
    compute_.Record(&s->computed);
    copy_out_.Await(s->computed);
    const auto copy_out = [&](auto* to, const auto* from, int64_t elements) {
      copy_out_.Copy(to, from, elements * static_cast<int64_t>(sizeof(*to)));
    };
    copy_out(s->host.output, s->device.output, s->outputs * description_.output_width);
    copy_out(s->host.nonfinite, s->device.nonfinite, static_cast<int64_t>(s->step_rows.size()));
    copy_out(s->host.read_ids, s->device.read_ids, s->reads);
    copy_out(s->host.log_probs, s->device.log_probs, s->reads);
    if (s->wants_top) {
      copy_out(s->host.top_ids, s->device.top_ids, s->reads * kMaxTopTokens);
      copy_out(s->host.top_log_probs, s->device.top_log_probs, s->reads * kMaxTopTokens);
    }
    copy_out_.Record(&s->answered);
    return absl::OkStatus();
  }

  // From the input on the device to the outputs there: what a graph is made of. What it launches depends on the
  // step's shape alone, and where it finds its data on the staging.
  absl::Status Compute(const Staging& s) {
    const OpContext context{description_.device, TorchParallelFor, compute_.handle()};
    const Staging::Side& side = s.device;
    RaggedRows rows;
    rows.rows = s.shape.rows;
    rows.tokens = s.shape.tokens;
    rows.shortest = s.shape.shortest;
    rows.longest = s.shape.longest;
    rows.offsets = side.offsets;
    rows.token_row = side.token_row;
    rows.base_slot = side.base_slot;
    rows.work_slot = side.work_slot;
    rows.fresh = side.fresh;
    rows.in_place = s.shape.in_place;
    rows.position = side.position;
    rows.end = side.end;
    rows.chunks = s.chunks;
    rows.chunks.numbers = side.plan;
    float* x = side.x;
    const int64_t d = weights_.config.d_model;
    if (description_.takes_tokens) {
      EmbedArgs embed;
      embed.width = d;
      embed.ids = side.ids;
      embed.sampled = SlotParts(layout_.sampled_offset);
      embed.dtype = weights_.dtype;
      embed.table = weights_.embedding;
      embed.out = x;
      RETURN_IF_ERROR(Embed(rows, embed, context));
    }
    if (const float* const scale = NormBefore(0); scale != nullptr) {
      AddRmsNormArgs norm;
      norm.rows = rows.tokens;
      norm.width = d;
      norm.x = x;
      norm.scale = scale;
      norm.epsilon = weights_.epsilon;
      norm.normed_dtype = weights_.dtype;
      norm.normed = workspace_.normed;
      RETURN_IF_ERROR(AddRmsNorm(norm, context));
    }
    const bool fuses = Fuses(rows.tokens, x, context);
    for (int64_t l = 0; l < weights_.config.num_layers; ++l) {
      RETURN_IF_ERROR(fuses ? RunFusedLayer(l, rows, x, side.nonfinite, context)
                            : RunLayer(l, rows, x, side.nonfinite, context));
    }

    if (description_.generates) {
      CarryArgs carry;
      carry.width = d;
      carry.x = x;
      carry.carried = SlotParts(layout_.carried_offset);
      RETURN_IF_ERROR(Carry(rows, carry, context));
    }

    // Only what is wanted goes through the head.
    const bool has_head = weights_.head.matrix != nullptr;
    RETURN_IF_ERROR(
        FinalNorm(x, side.gather, s.shape.outputs, has_head ? workspace_.normed : side.output, context));
    if (has_head) {
      RETURN_IF_ERROR(Multiply(s.shape.outputs, workspace_.normed, weights_.head, DType::kFloat32, side.output,
                               weights_.head.outputs, context));
    }
    const int64_t reads = s.shape.reads;
    for (int64_t begin = 0; begin < reads; begin += workspace_.logits_rows) {
      RETURN_IF_ERROR(ReadOut(side, x, begin, std::min(workspace_.logits_rows, reads - begin), context));
    }
    return absl::OkStatus();
  }

  // Rows `gather` of the residual stream, for the head or, where there is none, as the output.
  absl::Status FinalNorm(const float* x, const int32_t* gather, int64_t count, void* normed,
                         const OpContext& context) {
    AddRmsNormArgs final;
    final.rows = count;
    final.width = weights_.config.d_model;
    final.x = x;
    final.gather = gather;
    final.scale = weights_.final_norm;
    final.epsilon = weights_.epsilon;
    final.normed_dtype = weights_.head.matrix != nullptr ? weights_.dtype : DType::kFloat32;
    final.normed = normed;
    return AddRmsNorm(final, context);
  }

  // Readouts [begin, begin + count).
  absl::Status ReadOut(const Staging::Side& side, const float* x, int64_t begin, int64_t count,
                       const OpContext& context) {
    Workspace& w = workspace_;
    RETURN_IF_ERROR(FinalNorm(x, side.read_gather + begin, count, w.normed, context));
    RETURN_IF_ERROR(
        Multiply(count, w.normed, weights_.head, DType::kFloat32, w.logits, weights_.head.outputs, context));
    ReadoutArgs read;
    read.rows = count;
    read.vocabulary = weights_.head.outputs;
    read.logits = w.logits;
    read.logits_stride = weights_.head.outputs;
    read.requests = side.requests + begin;
    read.sampled = SlotParts(layout_.sampled_offset);
    read.ids = side.read_ids + begin;
    read.log_probs = side.log_probs + begin;
    read.top_ids = side.top_ids + begin * kMaxTopTokens;
    read.top_log_probs = side.top_log_probs + begin * kMaxTopTokens;
    return Readout(read, context);
  }

  // Constant after construction (the description from CaptureGraphs on).
  const Weights weights_;
  const SlotLayout layout_;
  const bool layers_fuse_;
  const int threads_;
  const int64_t chunk_blocks_;  // Of the delta rule's kernel for long rows; 0: there is none.
  const bool splits_;           // Whether such rows may be split: their bits then depend on the others.
  bool captures_ = false;
  std::vector<int64_t> buckets_;  // Ascending; none: nothing is padded.
  ModelDescription description_;

  // Confined to the batch thread.
  bool captures_repeated_ = false;
  Workspace workspace_;
  DeviceBuffer pool_;
  std::vector<int64_t> written_by_;  // A slot's last validation that saw it written.
  int64_t validation_ = 0;
  std::vector<Staging> staging_;  // Ticket n uses number n modulo their count.
  StepTicket last_ticket_ = 0;
  DeviceStream copy_in_, compute_, copy_out_;
};

}  // namespace

namespace {

// Everything but the slots.
absl::StatusOr<std::unique_ptr<Engine>> LoadEngine(const std::string& directory,
                                                   const ModelOptions& options) {
  ASSIGN_OR_RETURN(ModelConfig config, ReadModelConfig(directory));
  ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(directory));
  const auto in_file = [&](const absl::Status& status) {
    return absl::Status(status.code(), absl::StrCat(checkpoint.path(), ": ", status.message()));
  };
  if (const absl::Status status = ResolveFromFile(checkpoint.entries(), &config); !status.ok()) {
    return in_file(status);
  }
  if (const absl::Status status = CheckTensors(checkpoint.entries(), ExpectedTensors(config)); !status.ok()) {
    return in_file(status);
  }
  return CatchTorch(absl::StrCat("loading ", directory), [&]() -> absl::StatusOr<std::unique_ptr<Engine>> {
    SetTorchThreads(options.cpu_threads);
    const auto observer = [&](int64_t bytes, int64_t total_bytes) {
      if (options.on_progress) options.on_progress({directory, bytes, total_bytes});
    };
    ASSIGN_OR_RETURN(Weights weights,
                     LoadWeights(config, checkpoint, options.device, options.dtype, observer));
    auto engine = std::make_unique<Engine>(std::move(weights), options);
    RETURN_IF_ERROR(engine->WarmUp());
    return engine;
  });
}

}  // namespace

absl::StatusOr<std::vector<std::unique_ptr<Model>>> LoadModels(absl::Span<const std::string> directories,
                                                               const ModelOptions& options) {
  RETURN_IF_ERROR(CheckDevice(options.device));
  const bool on_cpu = options.device.type == DeviceType::kCpu;
  if (options.dtype != DType::kFloat32 && (options.dtype != DType::kBFloat16 || on_cpu)) {
    return absl::InvalidArgumentError(absl::StrCat("dtype ", DTypeName(options.dtype), " was asked for on ",
                                                   DeviceName(options.device), ", want float32",
                                                   on_cpu ? "" : " or bfloat16"));
  }
  std::vector<std::unique_ptr<Engine>> engines;
  for (const std::string& directory : directories) {
    ASSIGN_OR_RETURN(engines.emplace_back(), LoadEngine(directory, options));
  }
  return CatchTorch("allocating state slots", [&]() -> absl::StatusOr<std::vector<std::unique_ptr<Model>>> {
    int64_t pool_bytes = options.pool_bytes;
    if (pool_bytes == 0)
      pool_bytes =
          static_cast<int64_t>(options.pool_fraction * static_cast<double>(FreeDeviceBytes(options.device)));
    const int64_t share = pool_bytes / std::max<int64_t>(1, static_cast<int64_t>(engines.size()));
    std::vector<std::unique_ptr<Model>> models;
    for (size_t i = 0; i < engines.size(); ++i) {
      const int64_t slot_bytes = engines[i]->description().session_bytes;
      const int64_t num_slots = std::min(options.max_slots, share / slot_bytes);
      if (num_slots < options.min_slots) {
        return absl::ResourceExhaustedError(
            absl::StrCat(directories[i], ": a state pool of ", share, " bytes holds ", num_slots,
                         " sessions of ", slot_bytes, " bytes, want at least ", options.min_slots,
                         ": give it ", options.min_slots * slot_bytes, " bytes"));
      }
      engines[i]->AllocatePool(num_slots);
    }
    for (std::unique_ptr<Engine>& engine : engines) {
      RETURN_IF_ERROR(engine->CaptureGraphs());
      models.push_back(std::move(engine));
    }
    return models;
  });
}

absl::StatusOr<std::unique_ptr<Model>> LoadModel(const std::string& directory, const ModelOptions& options) {
  ASSIGN_OR_RETURN(std::vector<std::unique_ptr<Model>> models, LoadModels({&directory, 1}, options));
  return std::move(models[0]);
}

}  // namespace deltanet
