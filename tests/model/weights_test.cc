// Weights as they get from the files to the device: whatever the files' form and dtype, and what is said of
// files that cannot be.
#include "model/weights.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "model/base/checkpoint.h"
#include "model/device.h"
#include "model/upload.h"
#include "tests/model/engine_modes.h"
#include "tests/testing/random_model.h"

namespace deltanet {
namespace {

struct HostTensor {
  Shape shape;
  DType dtype = DType::kFloat32;
  std::vector<char> data;
};
using Tensors = std::map<std::string, HostTensor>;

Tensors ReadTensors(const std::string& directory) {
  Tensors tensors;
  const auto file = Checkpoint::Open(directory);
  EXPECT_TRUE(file.ok()) << file.status();
  for (const auto& [name, entry] : file->entries()) {
    HostTensor& tensor = tensors[name] = {entry.shape, entry.dtype, std::vector<char>(entry.bytes)};
    EXPECT_TRUE(file->Read(entry, tensor.data.data()).ok());
  }
  return tensors;
}

void WriteTensors(const std::string& path, const Tensors& tensors) {
  std::vector<std::pair<std::string, TensorView>> views;
  for (const auto& [name, tensor] : tensors) {
    views.emplace_back(name, TensorView{tensor.data.data(), tensor.shape, tensor.dtype, Device{}});
  }
  ASSERT_TRUE(WriteSafetensors(path, views).ok());
}

ModelConfig SmallDeltaNet() {
  ModelConfig config;
  config.family = Family::kDeltaNet;
  config.d_model = 24;
  config.num_layers = 2;
  config.num_heads = 3;
  config.vocab_size = 50;
  config.ff_hidden_dim = 20;
  config.expand_k = 2;
  config.use_gate = true;
  config.conv_bias = true;
  return config;
}

absl::StatusOr<Weights> Load(
    const std::string& directory, const Mode& mode = Modes().front(),
    LoadObserver observer = [](int64_t, int64_t) {}) {
  absl::StatusOr<ModelConfig> config = ReadModelConfig(directory);
  EXPECT_TRUE(config.ok()) << config.status();
  const absl::StatusOr<Checkpoint> file = Checkpoint::Open(directory);
  EXPECT_TRUE(file.ok()) << file.status();
  EXPECT_TRUE(ResolveFromFile(file->entries(), &*config).ok());
  const absl::Status status = CheckTensors(file->entries(), ExpectedTensors(*config));
  EXPECT_TRUE(status.ok()) << status;
  return LoadWeights(*config, *file, mode.device, mode.dtype, observer);
}

// `count` elements of `dtype` on a device, as doubles.
std::vector<double> Download(const void* from, DType dtype, int64_t count, const Device& device) {
  std::vector<char> raw(count * DTypeBytes(dtype));
  DeviceStream stream(device);
  stream.Copy(raw.data(), from, static_cast<int64_t>(raw.size()));
  stream.Synchronize();
  std::vector<double> values(count);
  ConvertElements(raw.data(), dtype, values.data(), DType::kFloat64, count);
  return values;
}

class WeightsTest : public testing::TestWithParam<Mode> {
 protected:
  void SetUp() override { SKIP_WITHOUT_DEVICE(GetParam()); }

  std::vector<double> Matrix(const Linear& linear) const {
    return Download(linear.matrix, GetParam().dtype, linear.inputs * linear.outputs, GetParam().device);
  }
  std::vector<double> Floats(const float* from, int64_t count) const {
    return Download(from, DType::kFloat32, count, GetParam().device);
  }
  // Tensors of the file, one behind the other, rounded as a matrix is.
  std::vector<double> Rounded(const Tensors& tensors, const std::vector<std::string>& names,
                              DType dtype) const {
    std::vector<double> all;
    for (const std::string& name : names) {
      const HostTensor& tensor = tensors.at(name);
      const int64_t count = NumElements(tensor.shape);
      std::vector<char> rounded(count * DTypeBytes(dtype));
      ConvertElements(tensor.data.data(), tensor.dtype, rounded.data(), dtype, count);
      std::vector<double> values(count);
      ConvertElements(rounded.data(), dtype, values.data(), DType::kFloat64, count);
      all.insert(all.end(), values.begin(), values.end());
    }
    return all;
  }
};
INSTANTIATE_TEST_SUITE_P(Modes, WeightsTest, testing::ValuesIn(Modes()),
                         [](const auto& info) { return info.param.name; });

// What is larger than the ring, and no multiple of a piece.
TEST_P(WeightsTest, UploadsPieceByPiece) {
  const int64_t count = 5 * Uploader::kPieceBytes + 12345;
  const auto value = [](int64_t at) { return static_cast<char>(at * 2654435761u >> 13); };
  const DeviceBuffer target(GetParam().device, count);
  std::vector<std::pair<int64_t, int64_t>> pieces;
  {
    Uploader uploader(GetParam().device);
    const auto fill = [&](int64_t offset, int64_t bytes, char* piece) {
      pieces.emplace_back(offset, bytes);
      for (int64_t i = 0; i < bytes; ++i) piece[i] = value(offset + i);
      return absl::OkStatus();
    };
    ASSERT_TRUE(uploader.Write(target.data(), count, fill).ok());
    uploader.Finish();
  }
  ASSERT_EQ(pieces.size(), 6u);
  EXPECT_EQ(pieces[1], std::pair(Uploader::kPieceBytes, Uploader::kPieceBytes));
  EXPECT_EQ(pieces[5], std::pair(5 * Uploader::kPieceBytes, int64_t{12345}));
  std::vector<char> back(count);
  DeviceStream stream(GetParam().device);
  stream.Copy(back.data(), target.data(), count);
  stream.Synchronize();
  for (int64_t i = 0; i < count; ++i) ASSERT_EQ(back[i], value(i)) << i;
}

TEST_P(WeightsTest, UploadStopsAtTheFirstError) {
  const DeviceBuffer target(GetParam().device, 3 * Uploader::kPieceBytes);
  Uploader uploader(GetParam().device);
  int calls = 0;
  const absl::Status status = uploader.Write(target.data(), target.bytes(), [&](int64_t, int64_t, char*) {
    return ++calls == 2 ? absl::DataLossError("gone") : absl::OkStatus();
  });
  EXPECT_EQ(status.message(), "gone");
  EXPECT_EQ(calls, 2);
}

TEST_P(WeightsTest, DeltaNetIsStackedAndTransposed) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    SCOPED_TRACE(std::string(DTypeName(dtype)));
    const std::string directory = WriteRandomModel(SmallDeltaNet(), 5, dtype);
    const Tensors tensors = ReadTensors(directory);
    const auto loaded = Load(directory, GetParam());
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    const Weights& weights = *loaded;
    EXPECT_EQ(weights.mixer, MixerKind::kShortConv);
    EXPECT_EQ(weights.heads, 3);
    EXPECT_EQ(weights.key_dim, 16);
    EXPECT_EQ(weights.value_dim, 8);
    EXPECT_EQ(weights.scale, 0.25f);
    EXPECT_EQ(weights.epsilon.after, 0.0f);
    EXPECT_EQ(weights.epsilon.inside, 1e-6f);
    EXPECT_TRUE(weights.norm_per_head);
    EXPECT_TRUE(weights.has_output_gate);
    const LayerWeights& layer = weights.layers[1];
    const std::string attn = "model.layers.1.attn.", mlp = "model.layers.1.mlp.";
    const DType t = GetParam().dtype;
    EXPECT_EQ(layer.qkv.outputs, 48 + 48 + 24 + 3 + 24);
    EXPECT_EQ(layer.qkv.inputs, 24);
    EXPECT_EQ(Matrix(layer.qkv),
              Rounded(tensors,
                      {attn + "q_proj.weight", attn + "k_proj.weight", attn + "v_proj.weight",
                       attn + "b_proj.weight", attn + "g_proj.weight"},
                      t));
    EXPECT_EQ(Matrix(layer.ff_in), Rounded(tensors, {mlp + "gate_proj.weight", mlp + "up_proj.weight"}, t));
    EXPECT_EQ(Matrix(layer.ff_out), Rounded(tensors, {mlp + "down_proj.weight"}, t));
    EXPECT_EQ(Matrix(weights.head), Rounded(tensors, {"lm_head.weight"}, t));
    EXPECT_EQ(Download(weights.embedding, t, 50 * 24, GetParam().device),
              Rounded(tensors, {"model.embeddings.weight"}, t));
    EXPECT_EQ(Floats(layer.out_norm, 8), Rounded(tensors, {attn + "o_norm.weight"}, DType::kFloat32));

    const std::vector<double> taps = Floats(layer.conv_weight, 4 * 120);
    const std::vector<double> k = Rounded(tensors, {attn + "k_conv1d.weight"}, DType::kFloat32);
    for (int64_t c = 0; c < 48; ++c) {
      for (int64_t j = 0; j < 4; ++j) ASSERT_EQ(taps[j * 120 + 48 + c], k[c * 4 + j]) << c << " " << j;
    }
    EXPECT_EQ(Floats(layer.conv_bias, 120),
              Rounded(tensors, {attn + "q_conv1d.bias", attn + "k_conv1d.bias", attn + "v_conv1d.bias"},
                      DType::kFloat32));
    int64_t parameters = 0;
    for (const auto& [name, tensor] : tensors) parameters += NumElements(tensor.shape);
    EXPECT_EQ(weights.parameters, parameters);
  }
}

// Tensors larger than a piece, converted and not; in bfloat16 the first product's outputs are a multiple
// of 64.
TEST_P(WeightsTest, LargeMatrices) {
  ModelConfig config = SmallDeltaNet();
  config.d_model = 768;
  config.num_layers = 1;
  config.vocab_size = 6001;
  config.tie_word_embeddings = true;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const std::string directory = WriteRandomModel(config, 6, dtype);
    const Tensors tensors = ReadTensors(directory);
    const auto weights = Load(directory, GetParam());
    ASSERT_TRUE(weights.ok()) << weights.status();
    EXPECT_EQ(weights->head.matrix, weights->embedding);
    EXPECT_EQ(weights->head.outputs, 6001);
    EXPECT_TRUE(Matrix(weights->head) == Rounded(tensors, {"model.embeddings.weight"}, GetParam().dtype));
    const std::string attn = "model.layers.0.attn.";
    std::vector<double> qkv = Rounded(tensors,
                                      {attn + "q_proj.weight", attn + "k_proj.weight", attn + "v_proj.weight",
                                       attn + "b_proj.weight", attn + "g_proj.weight"},
                                      GetParam().dtype);
    EXPECT_EQ(qkv.size(), 4611 * 768);
    if (GetParam().dtype == DType::kBFloat16) qkv.resize(4672 * 768);
    EXPECT_TRUE(Matrix(weights->layers[0].qkv) == qkv);
  }
}

TEST(LoadWeightsTest, SeveralFilesAreOne) {
  const std::string directory = WriteRandomModel(SmallDeltaNet(), 7);
  const auto whole = Load(directory);
  ASSERT_TRUE(whole.ok()) << whole.status();
  std::vector<Tensors> shards(3);
  std::map<std::string, std::string> index;
  for (const auto& [name, tensor] : ReadTensors(directory)) {
    const size_t shard = index.size() % shards.size();
    shards[shard][name] = tensor;
    index[name] = absl::StrCat("part", shard);
  }
  for (size_t i = 0; i < shards.size(); ++i) WriteTensors(absl::StrCat(directory, "/part", i), shards[i]);
  std::filesystem::remove(directory + "/model.safetensors");
  std::ofstream(directory + "/model.safetensors.index.json") << CheckpointIndexJson(index, 0);
  const auto sharded = Load(directory);
  ASSERT_TRUE(sharded.ok()) << sharded.status();
  EXPECT_EQ(sharded->parameters, whole->parameters);
  for (size_t l = 0; l < 2; ++l) {
    const Linear &a = whole->layers[l].qkv, &b = sharded->layers[l].qkv;
    EXPECT_EQ(std::memcmp(a.matrix, b.matrix, a.inputs * a.outputs * 4), 0);
  }
}

TEST(LoadWeightsTest, GateAndUpMayBeFused) {
  ModelConfig config = SmallDeltaNet();
  const std::string directory = WriteRandomModel(config, 8);
  const auto apart = Load(directory);
  ASSERT_TRUE(apart.ok()) << apart.status();
  Tensors tensors = ReadTensors(directory);
  for (const std::string mlp : {"model.layers.0.mlp.", "model.layers.1.mlp."}) {
    HostTensor& gate = tensors.at(mlp + "gate_proj.weight");
    const HostTensor& up = tensors.at(mlp + "up_proj.weight");
    gate.shape[0] *= 2;
    gate.data.insert(gate.data.end(), up.data.begin(), up.data.end());
    tensors.erase(mlp + "up_proj.weight");
  }
  WriteTensors(directory + "/model.safetensors", tensors);
  const auto fused = Load(directory);
  ASSERT_TRUE(fused.ok()) << fused.status();
  const Linear &a = apart->layers[1].ff_in, &b = fused->layers[1].ff_in;
  ASSERT_EQ(a.outputs, b.outputs);
  EXPECT_EQ(std::memcmp(a.matrix, b.matrix, a.inputs * a.outputs * 4), 0);
}

TEST(LoadWeightsTest, ATiedHeadInTheFileMustBeTheEmbedding) {
  ModelConfig config = SmallDeltaNet();
  config.tie_word_embeddings = true;
  const std::string directory = WriteRandomModel(config, 9);
  const auto without = Load(directory);
  ASSERT_TRUE(without.ok()) << without.status();
  Tensors tensors = ReadTensors(directory);
  tensors["lm_head.weight"] = tensors["model.embeddings.weight"];
  WriteTensors(directory + "/model.safetensors", tensors);
  const auto with = Load(directory);
  ASSERT_TRUE(with.ok()) << with.status();
  EXPECT_EQ(with->parameters, without->parameters);
  EXPECT_EQ(with->arena.bytes(), without->arena.bytes());  // One copy.
  EXPECT_EQ(with->head.matrix, with->embedding);

  tensors["lm_head.weight"].data.back() ^= 1;
  WriteTensors(directory + "/model.safetensors", tensors);
  const absl::Status status = Load(directory).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), directory +
                                  "/model.safetensors: 'tie_word_embeddings' is true, but tensor "
                                  "lm_head.weight differs from model.embeddings.weight, want the "
                                  "same or none");
}

TEST(LoadWeightsTest, ReportsEveryByteOnce) {
  for (const Family family : {Family::kDeltaNet, Family::kDeltaNetModel, Family::kTransformerBlock}) {
    ModelConfig config = SmallDeltaNet();
    config.family = family;
    config.chunk_size = 4;
    config.mlp_ratio = 2;
    config.ff_hidden_dim = 2 * config.d_model;
    if (family == Family::kTransformerBlock) config.num_layers = 1;
    if (family == Family::kTransformerBlock) config.num_heads = 1;
    const std::string directory = WriteRandomModel(config, 10, DType::kBFloat16);
    int64_t want = 0;
    for (const auto& [name, tensor] : ReadTensors(directory))
      want += static_cast<int64_t>(tensor.data.size());
    int64_t last = 0;
    const auto weights = Load(directory, Modes().front(), [&](int64_t bytes, int64_t total) {
      EXPECT_GT(bytes, last);
      EXPECT_EQ(total, want);
      last = bytes;
    });
    ASSERT_TRUE(weights.ok()) << weights.status();
    EXPECT_EQ(last, want);
  }
}

TEST(LoadWeightsTest, AFileThatShrinksIsDataLoss) {
  const std::string directory = WriteRandomModel(SmallDeltaNet(), 11);
  const std::string path = directory + "/model.safetensors";
  ModelConfig config = *ReadModelConfig(directory);
  const auto file = Checkpoint::Open(directory);
  ASSERT_TRUE(file.ok()) << file.status();
  const int64_t size = std::filesystem::file_size(path);
  ASSERT_EQ(truncate(path.c_str(), size - 1), 0);
  const absl::Status status =
      LoadWeights(config, *file, Device{}, DType::kFloat32, [](int64_t, int64_t) {}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_TRUE(absl::StartsWith(status.message(), absl::StrCat(path, ": ends at byte ", size - 1, ", want ")))
      << status;
}

}  // namespace
}  // namespace deltanet
