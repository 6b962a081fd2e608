#include "model/base/config.h"

#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <random>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/model/base/mutate.h"
#include "tests/model/base/unprivileged.h"

namespace deltanet {
namespace {

using testing::HasSubstr;
using testing::Not;

constexpr char kTransformerDeltaNet[] =
    R"({"model_type":"transformer_deltanet","d_model":64,"chunk_size":4,"num_layers":6})";
constexpr char kTransformerBlock[] =
    R"({"model_type":"transformer_block","d_model":64,"chunk_size":16,"ff_hidden_dim":128,"conv_padding":"causal"})";
constexpr char kDeltaNetModel[] =
    R"({"model_type":"deltanet_model","vocab_size":1000,"dim":128,"depth":2,"num_heads":4,"mlp_ratio":2.7,)"
    R"("chunk_size":8,"conv_padding":"centered"})";

ModelConfig MustParse(absl::string_view json) {
  const absl::StatusOr<ModelConfig> config = ParseModelConfig(json);
  EXPECT_TRUE(config.ok()) << config.status();
  return config.value_or(ModelConfig());
}

void ExpectEqual(const ModelConfig& a, const ModelConfig& b) {
  EXPECT_EQ(a.family, b.family);
  EXPECT_EQ(a.d_model, b.d_model);
  EXPECT_EQ(a.chunk_size, b.chunk_size);
  EXPECT_EQ(a.num_layers, b.num_layers);
  EXPECT_EQ(a.num_heads, b.num_heads);
  EXPECT_EQ(a.ff_hidden_dim, b.ff_hidden_dim);
  EXPECT_EQ(a.vocab_size, b.vocab_size);
  EXPECT_EQ(a.mlp_ratio, b.mlp_ratio);
  EXPECT_EQ(a.conv_padding, b.conv_padding);
}

TEST(ParseModelConfigTest, TransformerDeltaNet) {
  const ModelConfig config = MustParse(kTransformerDeltaNet);
  EXPECT_EQ(config.family, Family::kTransformerDeltaNet);
  EXPECT_EQ(config.d_model, 64);
  EXPECT_EQ(config.chunk_size, 4);
  EXPECT_EQ(config.num_layers, 6);
  EXPECT_EQ(config.num_heads, 1);
  EXPECT_EQ(config.conv_padding, ConvPadding::kCentered);  // Absent: as the author's code.
  EXPECT_EQ(config.lookahead_per_layer(), 1);
  EXPECT_FALSE(config.takes_tokens());
}

TEST(ParseModelConfigTest, TransformerBlock) {
  const ModelConfig config = MustParse(kTransformerBlock);
  EXPECT_EQ(config.family, Family::kTransformerBlock);
  EXPECT_EQ(config.d_model, 64);
  EXPECT_EQ(config.chunk_size, 16);
  EXPECT_EQ(config.num_layers, 1);
  EXPECT_EQ(config.ff_hidden_dim, 128);
  EXPECT_EQ(config.conv_padding, ConvPadding::kCausal);
  EXPECT_EQ(config.lookahead_per_layer(), 0);
}

TEST(ParseModelConfigTest, DeltaNetModel) {
  const ModelConfig config = MustParse(kDeltaNetModel);
  EXPECT_EQ(config.family, Family::kDeltaNetModel);
  EXPECT_EQ(config.vocab_size, 1000);
  EXPECT_EQ(config.d_model, 128);
  EXPECT_EQ(config.num_layers, 2);
  EXPECT_EQ(config.num_heads, 4);
  EXPECT_EQ(config.chunk_size, 8);
  EXPECT_EQ(config.mlp_ratio, 2.7);
  EXPECT_EQ(config.ff_hidden_dim, 345);  // int(345.6)
  EXPECT_TRUE(config.takes_tokens());
}

TEST(ParseModelConfigTest, Defaults) {
  const ModelConfig simple = MustParse(R"({"d_model":1,"model_type":"transformer_deltanet"})");
  EXPECT_EQ(simple.num_layers, 1);
  EXPECT_EQ(simple.chunk_size, 64);
  const ModelConfig language =
      MustParse(R"({"model_type":"deltanet_model","vocab_size":10,"dim":24,"depth":3})");
  EXPECT_EQ(language.num_heads, 8);
  EXPECT_EQ(language.mlp_ratio, 4.0);
  EXPECT_EQ(language.ff_hidden_dim, 96);
  EXPECT_EQ(language.chunk_size, 64);
  // An integer is a number too.
  EXPECT_EQ(MustParse(absl::StrReplaceAll(kDeltaNetModel, {{"2.7", "3"}})).ff_hidden_dim, 384);
}

TEST(ParseModelConfigTest, SizesAtTheirBounds) {
  const auto with_width = [](absl::string_view width) {
    return ParseModelConfig(
        absl::StrCat("{\"model_type\":\"transformer_deltanet\",\"d_model\":", width, "}"));
  };
  EXPECT_TRUE(with_width("1").ok());
  EXPECT_TRUE(with_width("1048576").ok());
  for (const char* width : {"0", "-1", "1048577", "9223372036854775807", "18446744073709551615", "64.0",
                            "6e1", "\"64\"", "null", "true", "[64]", "{}"}) {
    EXPECT_EQ(with_width(width).status().code(), absl::StatusCode::kInvalidArgument) << width;
  }
}

TEST(ParseModelConfigTest, RoundTrip) {
  for (const char* json : {kTransformerDeltaNet, kTransformerBlock, kDeltaNetModel}) {
    const ModelConfig config = MustParse(json);
    ExpectEqual(MustParse(ModelConfigJson(config)), config);
  }
  EXPECT_EQ(ModelConfigJson(MustParse(kTransformerDeltaNet)),
            "{\n  \"model_type\": \"transformer_deltanet\",\n  \"d_model\": 64,\n  \"chunk_size\": 4,\n"
            "  \"num_layers\": 6,\n  \"conv_padding\": \"centered\"\n}\n");
}

struct BadConfig {
  const char* name;
  std::string json;
  const char* message;
};
class BadConfigTest : public testing::TestWithParam<BadConfig> {};

TEST_P(BadConfigTest, IsRefused) {
  const auto config = ParseModelConfig(GetParam().json);
  EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(config.status().message()), HasSubstr(GetParam().message));
}

// A configuration with `from` replaced.
std::string With(absl::string_view json, absl::string_view from, absl::string_view to) {
  return absl::StrReplaceAll(json, {{from, to}});
}

INSTANTIATE_TEST_SUITE_P(
    Configs, BadConfigTest,
    testing::Values(
        BadConfig{"Empty", "", "not valid JSON at byte"},
        BadConfig{"Cut", "{\"model_type\"", "not valid JSON at byte"},
        BadConfig{"NotUtf8", "{\"\xff\":1}", "not valid JSON at byte"},
        BadConfig{"NumberOutOfRange", R"({"mlp_ratio":1e999})", "number out of range at byte"},
        BadConfig{"Array", "[]", "found an array, want an object"},
        BadConfig{"Number", "7", "found 7, want an object"},
        BadConfig{"NestedArrays", std::string(1000000, '['), "found an array, want an object"},
        BadConfig{"NestedObjects", R"({"a":)" + std::string(1000000, '{'),
                  "'a' is an object, want a number or a string"},
        BadConfig{
            "NoModelType", R"({"d_model":64})",
            "'model_type' is missing, want 'transformer_deltanet', 'transformer_block', 'deltanet_model'"},
        BadConfig{"UnknownModelType", R"({"model_type":"llama","d_model":64})",
                  "'model_type' is 'llama', want"},
        BadConfig{"ModelTypeNumber", R"({"model_type":3})", "'model_type' is 3, want"},
        BadConfig{"UnknownKey", With(kTransformerDeltaNet, "chunk_size", "chunk_sise"),
                  "unknown key 'chunk_sise' for model_type 'transformer_deltanet', want any of"},
        BadConfig{"OtherFamilysKey", With(kTransformerBlock, "chunk_size", "num_layers"),
                  "unknown key 'num_layers'"},
        BadConfig{"MlpRatioElsewhere", With(kTransformerDeltaNet, "chunk_size", "mlp_ratio"),
                  "unknown key 'mlp_ratio'"},
        BadConfig{"RepeatedKey", With(kTransformerDeltaNet, "num_layers", "d_model"),
                  "'d_model' appears twice"},
        BadConfig{"MissingWidth", R"({"model_type":"transformer_deltanet"})",
                  "'d_model' is missing, want an integer from 1 to 1048576"},
        BadConfig{"MissingHidden", R"({"model_type":"transformer_block","d_model":64})",
                  "'ff_hidden_dim' is missing"},
        BadConfig{"MissingVocabulary", With(kDeltaNetModel, "\"vocab_size\":1000,", ""),
                  "'vocab_size' is missing"},
        BadConfig{"MissingDim", With(kDeltaNetModel, "\"dim\":128,", ""), "'dim' is missing"},
        BadConfig{"MissingDepth", With(kDeltaNetModel, "\"depth\":2,", ""), "'depth' is missing"},
        BadConfig{"WidthString", With(kTransformerDeltaNet, "64", "\"64\""),
                  "'d_model' is '64', want an integer from 1 to 1048576"},
        BadConfig{"WidthReal", With(kTransformerDeltaNet, "64", "64.5"),
                  "'d_model' is 64.5, want an integer"},
        BadConfig{"WidthNull", With(kTransformerDeltaNet, "64", "null"), "'d_model' is null"},
        BadConfig{"WidthArray", With(kTransformerDeltaNet, "64", "[64]"), "'d_model' is an array"},
        BadConfig{"WidthZero", With(kTransformerDeltaNet, "64", "0"), "'d_model' is 0"},
        BadConfig{"ChunkNegative", With(kTransformerDeltaNet, ":4,", ":-4,"), "'chunk_size' is -4"},
        BadConfig{"TooManyLayers", With(kTransformerDeltaNet, ":6", ":4097"),
                  "'num_layers' is 4097, want an integer from 1 to 4096"},
        BadConfig{"TooDeep", With(kDeltaNetModel, "\"depth\":2", "\"depth\":1048576"), "'depth' is 1048576"},
        BadConfig{"HeadsZero", With(kDeltaNetModel, "\"num_heads\":4", "\"num_heads\":0"),
                  "'num_heads' is 0"},
        BadConfig{"RatioString", With(kDeltaNetModel, "2.7", "\"x\""), "'mlp_ratio' is 'x', want a number"},
        BadConfig{"RatioZero", With(kDeltaNetModel, "2.7", "0"),
                  "'mlp_ratio' is 0, which makes 0 hidden units"},
        BadConfig{"RatioNegative", With(kDeltaNetModel, "2.7", "-1.5"), "'mlp_ratio' is -1.5"},
        BadConfig{"RatioHuge", With(kDeltaNetModel, "2.7", "1e300"), "'mlp_ratio' is 1e+300"},
        BadConfig{"PaddingUnknown", With(kTransformerBlock, "causal", "left"),
                  "'conv_padding' is 'left', want 'centered' or 'causal'"},
        BadConfig{"PaddingNumber", With(kTransformerBlock, "\"causal\"", "1"), "'conv_padding' is 1, want"}),
    [](const auto& info) { return info.param.name; });

TEST(ParseModelConfigTest, SurvivesMutations) {
  std::mt19937 random(5);
  for (const std::string valid : {kTransformerDeltaNet, kTransformerBlock, kDeltaNetModel}) {
    int accepted = 0, refused = 0;
    for (int i = 0; i < 5000; ++i) {
      const std::string json = Mutate(valid, valid.size(), &random);
      const auto config = ParseModelConfig(json);
      if (config.ok()) {
        ++accepted;
        ASSERT_GE(config->d_model, 1) << json;
        ASSERT_LE(config->d_model, 1 << 20) << json;
        ExpectEqual(MustParse(ModelConfigJson(*config)), *config);
      } else {
        ++refused;
        ASSERT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument) << json;
      }
    }
    EXPECT_GT(accepted, 20);
    EXPECT_GT(refused, 1000);
  }
}

class ReadModelConfigTest : public testing::Test {
 protected:
  ReadModelConfigTest() {
    std::string pattern = testing::TempDir() + "/config_test.XXXXXX";
    directory_ = mkdtemp(pattern.data());
  }
  ~ReadModelConfigTest() override { std::filesystem::remove_all(directory_); }

  void Write(const std::string& json) { std::ofstream(directory_ + "/config.json") << json; }

  std::string directory_;
};

TEST_F(ReadModelConfigTest, ReadsAFile) {
  Write(kTransformerBlock);
  const auto config = ReadModelConfig(directory_);
  ASSERT_TRUE(config.ok()) << config.status();
  ExpectEqual(*config, MustParse(kTransformerBlock));
}

TEST_F(ReadModelConfigTest, ErrorsNameTheFile) {
  const absl::Status absent = ReadModelConfig(directory_).status();
  EXPECT_EQ(absent.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(absent.message()), HasSubstr(directory_ + "/config.json"));
  Write("{}");
  const absl::Status bad = ReadModelConfig(directory_).status();
  EXPECT_EQ(bad.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(bad.message()), HasSubstr(directory_ + "/config.json: 'model_type' is missing"));
}

TEST_F(ReadModelConfigTest, RefusesADirectoryAndAHugeFile) {
  Write(std::string(kTransformerBlock) + std::string(1 << 20, ' '));
  EXPECT_EQ(ReadModelConfig(directory_).status().code(), absl::StatusCode::kInvalidArgument);
  std::filesystem::remove(directory_ + "/config.json");
  std::filesystem::create_directory(directory_ + "/config.json");
  EXPECT_EQ(ReadModelConfig(directory_).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(ReadModelConfigTest, PermissionDenied) {
  Write(kTransformerBlock);
  ASSERT_EQ(chmod((directory_ + "/config.json").c_str(), 0), 0);
  ASSERT_EQ(chmod(directory_.c_str(), 0755), 0);
  absl::Status status;
  {
    const Unprivileged unprivileged;
    status = ReadModelConfig(directory_).status();
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied) << status;
}

// The golden directories hold what real model files do.
class GoldenModelTest : public testing::TestWithParam<const char*> {
 protected:
  std::string directory() const { return absl::StrCat(DELTANET_TESTDATA, "/golden/", GetParam()); }
};

INSTANTIATE_TEST_SUITE_P(Golden, GoldenModelTest,
                         testing::Values("transformer_deltanet", "transformer_deltanet_causal",
                                         "transformer_block", "deltanet_model", "deltanet_model_causal"),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(GoldenModelTest, HoldsTheExpectedTensors) {
  auto config = ReadModelConfig(directory());
  ASSERT_TRUE(config.ok()) << config.status();
  const auto reader = SafetensorsReader::Open(directory() + "/model.safetensors");
  ASSERT_TRUE(reader.ok()) << reader.status();
  ASSERT_TRUE(ResolveHeads(reader->entries(), &*config).ok());
  const absl::Status status = CheckTensors(reader->entries(), ExpectedTensors(*config));
  EXPECT_TRUE(status.ok()) << status;
}

std::map<std::string, SafetensorsEntry> Entries(const ModelConfig& config) {
  std::map<std::string, SafetensorsEntry> entries;
  for (const TensorSpec& spec : ExpectedTensors(config))
    entries[spec.name] = {DType::kFloat32, spec.shape, 0, 0};
  return entries;
}

TEST(ExpectedTensorsTest, NamesAreUniqueAndCountsAreRight) {
  const auto count = [](absl::string_view json) {
    const auto specs = ExpectedTensors(MustParse(json));
    EXPECT_EQ(Entries(MustParse(json)).size(), specs.size());
    return specs.size();
  };
  EXPECT_EQ(count(kTransformerDeltaNet), 6 * 17 + 1u);
  EXPECT_EQ(count(kTransformerBlock), 17 + 6u);
  EXPECT_EQ(count(kDeltaNetModel), 3 + 2 * (17 + 5u));
}

TEST(ResolveHeadsTest, TheFileDecides) {
  ModelConfig config = MustParse(kDeltaNetModel);
  auto entries = Entries(config);
  entries["layers.0.delta_net.beta_linear.weight"].shape = {8, 128};
  ASSERT_TRUE(ResolveHeads(entries, &config).ok());
  EXPECT_EQ(config.num_heads, 8);
}

TEST(ResolveHeadsTest, OtherFamiliesHaveNoneToResolve) {
  ModelConfig config = MustParse(kTransformerDeltaNet);
  ASSERT_TRUE(ResolveHeads({}, &config).ok());
  EXPECT_EQ(config.num_heads, 1);
}

TEST(ResolveHeadsTest, RefusesWhatNamesNoHeads) {
  const ModelConfig config = MustParse(kDeltaNetModel);
  const std::string beta = "layers.0.delta_net.beta_linear.weight";
  const auto resolve = [&](const std::map<std::string, SafetensorsEntry>& entries) {
    ModelConfig changed = config;
    const absl::Status status = ResolveHeads(entries, &changed);
    EXPECT_EQ(changed.num_heads, config.num_heads);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(beta));
    return std::string(status.message());
  };
  auto entries = Entries(config);
  for (const Shape& shape : {Shape{}, Shape{8}, Shape{8, 64}, Shape{8, 128, 1}, Shape{0, 128}}) {
    entries[beta].shape = shape;
    EXPECT_THAT(resolve(entries), HasSubstr(ShapeString(shape) + ", want [heads,128]"));
  }
  entries[beta].shape = {6, 128};
  EXPECT_THAT(resolve(entries), HasSubstr("has 6 rows (heads), want a divisor of the width 128"));
  entries.erase(beta);
  EXPECT_THAT(resolve(entries), HasSubstr("is missing"));
}

TEST(CheckTensorsTest, ListsEverythingThatIsWrong) {
  const ModelConfig config = MustParse(kTransformerDeltaNet);
  const auto expected = ExpectedTensors(config);
  auto entries = Entries(config);
  EXPECT_TRUE(CheckTensors(entries, expected).ok());
  entries["layers.0.q_linear.weight"].dtype = DType::kFloat16;
  entries["layers.0.k_linear.weight"].dtype = DType::kBFloat16;
  EXPECT_TRUE(CheckTensors(entries, expected).ok());

  entries.erase("final_rms_norm.scale");
  entries["surplus"] = {DType::kFloat32, {1}, 0, 4};
  entries["layers.1.v_conv.weight"].shape = {64, 64, 4};
  entries["layers.2.rms_norm.scale"].dtype = DType::kFloat64;
  entries["layers.3.rms_norm.scale"].dtype = DType::kInt64;
  const absl::Status status = CheckTensors(entries, expected);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(),
            "tensors missing: final_rms_norm.scale; extra: 'surplus'; "
            "misshapen: layers.1.v_conv.weight is [64,64,4], want [64,64,3]; "
            "of the wrong dtype: layers.2.rms_norm.scale is float64, want float32, float16 or bfloat16, "
            "layers.3.rms_norm.scale is int64, want float32, float16 or bfloat16");
}

TEST(CheckTensorsTest, ListsAtMostFiveOfEach) {
  const auto expected = ExpectedTensors(MustParse(kTransformerDeltaNet));
  const absl::Status status = CheckTensors({}, expected);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("and 98 more"));
  EXPECT_THAT(std::string(status.message()), Not(HasSubstr("extra")));
}

}  // namespace
}  // namespace deltanet
