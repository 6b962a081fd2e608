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

// As Hugging Face writes it, with every key that is honoured away from its default.
constexpr char kDeltaNet[] =
    R"({"architectures":["DeltaNetForCausalLM"],"model_type":"delta_net","attn":null,"attn_mode":"chunk",)"
    R"("hidden_size":96,"num_hidden_layers":3,"num_heads":3,"vocab_size":500,"expand_k":0.5,"expand_v":2,)"
    R"("use_gate":true,"use_beta":false,"use_short_conv":true,"conv_size":3,"conv_bias":true,)"
    R"("qk_norm":"sum","qk_activation":"elu","allow_neg_eigval":true,"norm_eps":1e-05,)"
    R"("intermediate_size":100,"hidden_ratio":null,"hidden_act":"swish","tie_word_embeddings":true,)"
    R"("bos_token_id":7,"eos_token_id":[9,8,9],"id2label":{"0":"LABEL_0","1":[{"deep":[1]}]},)"
    R"("pruned_heads":{},"torch_dtype":"bfloat16","transformers_version":"4.51.3"})";

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
  EXPECT_EQ(a.expand_k, b.expand_k);
  EXPECT_EQ(a.expand_v, b.expand_v);
  EXPECT_EQ(a.use_gate, b.use_gate);
  EXPECT_EQ(a.use_beta, b.use_beta);
  EXPECT_EQ(a.use_short_conv, b.use_short_conv);
  EXPECT_EQ(a.conv_bias, b.conv_bias);
  EXPECT_EQ(a.allow_neg_eigval, b.allow_neg_eigval);
  EXPECT_EQ(a.tie_word_embeddings, b.tie_word_embeddings);
  EXPECT_EQ(a.conv_size, b.conv_size);
  EXPECT_EQ(a.qk_norm, b.qk_norm);
  EXPECT_EQ(a.qk_activation, b.qk_activation);
  EXPECT_EQ(a.norm_eps, b.norm_eps);
  EXPECT_EQ(a.bos_id, b.bos_id);
  EXPECT_EQ(a.eos_ids, b.eos_ids);
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

TEST(ParseModelConfigTest, DeltaNet) {
  const ModelConfig config = MustParse(kDeltaNet);
  EXPECT_EQ(config.family, Family::kDeltaNet);
  EXPECT_EQ(config.d_model, 96);
  EXPECT_EQ(config.num_layers, 3);
  EXPECT_EQ(config.num_heads, 3);
  EXPECT_EQ(config.vocab_size, 500);
  EXPECT_EQ(config.key_width(), 48);
  EXPECT_EQ(config.value_width(), 192);
  EXPECT_TRUE(config.use_gate);
  EXPECT_FALSE(config.use_beta);
  EXPECT_TRUE(config.use_short_conv);
  EXPECT_EQ(config.conv_size, 3);
  EXPECT_TRUE(config.conv_bias);
  EXPECT_EQ(config.qk_norm, "sum");
  EXPECT_EQ(config.qk_activation, "elu");
  EXPECT_TRUE(config.allow_neg_eigval);
  EXPECT_EQ(config.norm_eps, 1e-5);
  EXPECT_EQ(config.ff_hidden_dim, 100);
  EXPECT_TRUE(config.tie_word_embeddings);
  EXPECT_EQ(config.bos_id, 7);
  EXPECT_EQ(config.eos_ids, (std::vector<int64_t>{9, 8}));
  EXPECT_TRUE(config.takes_tokens());
  EXPECT_EQ(config.lookahead_per_layer(), 0);
}

TEST(ParseModelConfigTest, DeltaNetDefaultsAreFlas) {
  const ModelConfig config = MustParse(R"({"model_type":"delta_net"})");
  EXPECT_EQ(config.d_model, 2048);
  EXPECT_EQ(config.num_layers, 24);
  EXPECT_EQ(config.num_heads, 16);
  EXPECT_EQ(config.vocab_size, 32000);
  EXPECT_EQ(config.key_width(), 2048);
  EXPECT_EQ(config.value_width(), 2048);
  EXPECT_FALSE(config.use_gate);
  EXPECT_TRUE(config.use_beta);
  EXPECT_TRUE(config.use_short_conv);
  EXPECT_EQ(config.conv_size, 4);
  EXPECT_FALSE(config.conv_bias);
  EXPECT_EQ(config.qk_norm, "l2");
  EXPECT_EQ(config.qk_activation, "silu");
  EXPECT_FALSE(config.allow_neg_eigval);
  EXPECT_EQ(config.norm_eps, 1e-6);
  EXPECT_EQ(config.ff_hidden_dim, 5632);  // int(2048 * 4 * 2 / 3) = 5461, up to a multiple of 256.
  EXPECT_FALSE(config.tie_word_embeddings);
  EXPECT_EQ(config.bos_id, 1);
  EXPECT_EQ(config.eos_ids, std::vector<int64_t>{2});
}

TEST(ParseModelConfigTest, DeltaNetIntermediateSizeFollowsFlasRule) {
  const auto hidden = [](absl::string_view keys) {
    return MustParse(absl::StrCat(R"({"model_type":"delta_net","num_heads":1,)", keys, "}")).ff_hidden_dim;
  };
  EXPECT_EQ(hidden(R"("hidden_size":64)"), 256);                        // 170
  EXPECT_EQ(hidden(R"("hidden_size":96,"hidden_ratio":4)"), 256);       // 256 itself
  EXPECT_EQ(hidden(R"("hidden_size":97,"hidden_ratio":4)"), 512);       // 258
  EXPECT_EQ(hidden(R"("hidden_size":1024,"hidden_ratio":2.5)"), 1792);  // 1706
  EXPECT_EQ(hidden(R"("hidden_size":64,"hidden_ratio":null,"intermediate_size":null)"), 256);
  EXPECT_EQ(hidden(R"("hidden_size":64,"hidden_ratio":9,"intermediate_size":77)"), 77);
}

TEST(ParseModelConfigTest, DeltaNetTokenIds) {
  const auto parse = [](absl::string_view keys) {
    return MustParse(absl::StrCat(R"({"model_type":"delta_net","vocab_size":10)", keys, "}"));
  };
  EXPECT_EQ(parse(R"(,"bos_token_id":null,"eos_token_id":null)").bos_id, std::nullopt);
  EXPECT_TRUE(parse(R"(,"bos_token_id":null,"eos_token_id":null)").eos_ids.empty());
  EXPECT_TRUE(parse(R"(,"eos_token_id":[])").eos_ids.empty());
  EXPECT_EQ(parse(R"(,"eos_token_id":[0,9])").eos_ids, (std::vector<int64_t>{0, 9}));
  EXPECT_EQ(parse(R"(,"pad_token_id":-1)").bos_id, 1);  // Not ours to judge.
  // FLA's defaults are none where the vocabulary does not have them.
  const ModelConfig tiny = MustParse(R"({"model_type":"delta_net","vocab_size":2})");
  EXPECT_EQ(tiny.bos_id, 1);
  EXPECT_TRUE(tiny.eos_ids.empty());
}

// What Hugging Face writes beside what counts is taken in any form.
TEST(ParseModelConfigTest, DeltaNetInertKeysMayHoldAnything) {
  for (const char* key : {"attn_mode", "use_output_norm", "fuse_norm", "torch_dtype", "dtype", "id2label",
                          "_name_or_path", "auto_map", "top_p"}) {
    for (const char* value : {"null", "true", "-1", "0.5", "\"x\"", "[1,[2]]", "{\"a\":{}}"}) {
      ExpectEqual(MustParse(absl::StrCat(R"({"model_type":"delta_net",")", key, "\":", value, "}")),
                  MustParse(R"({"model_type":"delta_net"})"));
    }
  }
}

TEST(ParseModelConfigTest, DeltaNetKeysThatMustBeOff) {
  for (const char* key :
       {"attn", "attnres_block_size", "quantization_config", "pruned_heads", "is_encoder_decoder",
        "add_cross_attention", "norm_first", "share_conv_kernel", "use_rope"}) {
    const auto parse = [key](absl::string_view value) {
      return ParseModelConfig(absl::StrCat(R"({"model_type":"delta_net",")", key, "\":", value, "}"))
          .status();
    };
    for (const char* off : {"null", "false", "{}", "[]"}) EXPECT_TRUE(parse(off).ok()) << key << off;
    for (const char* on : {"true", "1", "0", "\"x\"", "[0]", R"({"layers":[1]})"}) {
      const absl::Status status = parse(on);
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << key << on;
      EXPECT_THAT(std::string(status.message()), HasSubstr(absl::StrCat("'", key, "' is "))) << on;
      EXPECT_THAT(std::string(status.message()), HasSubstr("want null: ")) << on;
    }
  }
}

TEST(MergeGenerationConfigTest, ItsIdsHaveTheLastWord) {
  const ModelConfig config = MustParse(kDeltaNet);
  ModelConfig merged = config;
  ASSERT_TRUE(
      MergeGenerationConfig(R"({"eos_token_id":[3,4],"temperature":0.6,"other":{"a":[]}})", &merged).ok());
  EXPECT_EQ(merged.bos_id, 7);
  EXPECT_EQ(merged.eos_ids, (std::vector<int64_t>{3, 4}));
  ASSERT_TRUE(MergeGenerationConfig(R"({"bos_token_id":null,"eos_token_id":5})", &merged).ok());
  EXPECT_EQ(merged.bos_id, std::nullopt);
  EXPECT_EQ(merged.eos_ids, std::vector<int64_t>{5});
  for (const char* bad : {"", "[]", "3", R"({"eos_token_id":500})", R"({"eos_token_id":["a"]})",
                          R"({"bos_token_id":1,"eos_token_id":true})", R"({"bos_token_id":-1})"}) {
    ModelConfig kept = config;
    EXPECT_EQ(MergeGenerationConfig(bad, &kept).code(), absl::StatusCode::kInvalidArgument) << bad;
    ExpectEqual(kept, config);
  }
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
  for (const char* json : {kTransformerDeltaNet, kTransformerBlock, kDeltaNetModel, kDeltaNet}) {
    const ModelConfig config = MustParse(json);
    ExpectEqual(MustParse(ModelConfigJson(config)), config);
  }
  // Ids: none, one, several.
  ModelConfig config = MustParse(kDeltaNet);
  config.bos_id.reset();
  for (const std::vector<int64_t>& ids : std::vector<std::vector<int64_t>>{{}, {3}, {3, 4}}) {
    config.eos_ids = ids;
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
        BadConfig{"NestedArraysWithin", R"({"a":)" + std::string(1000000, '['), "not valid JSON at byte"},
        BadConfig{"NestedObjects",
                  [] {
                    std::string json;
                    for (int i = 0; i < 200000; ++i) json += R"({"a":)";
                    return json;
                  }(),
                  "not valid JSON at byte"},
        BadConfig{"NoModelType", R"({"d_model":64})",
                  "'model_type' is missing, want 'transformer_deltanet', 'transformer_block', "
                  "'deltanet_model', 'delta_net'"},
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
        BadConfig{"WidthObject", With(kTransformerDeltaNet, "64", R"({"a":64})"),
                  "'d_model' is an object, want an integer"},
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
        BadConfig{"PaddingNumber", With(kTransformerBlock, "\"causal\"", "1"), "'conv_padding' is 1, want"},
        BadConfig{"RatioNull", With(kDeltaNetModel, "2.7", "null"), "'mlp_ratio' is null, want a number"},
        BadConfig{
            "DeltaNetUnknownKey", With(kDeltaNet, "conv_size", "conv_sise"),
            "unknown key 'conv_sise' for model_type 'delta_net': it could change what the model computes"},
        BadConfig{"DeltaNetHybrid", With(kDeltaNet, "\"attn\":null", R"("attn":{"layers":[1]})"),
                  "'attn' is an object, want null: layers of softmax attention (hybrids) cannot be served"},
        BadConfig{"DeltaNetHeads", With(kDeltaNet, "\"num_heads\":3", "\"num_heads\":5"),
                  "'expand_k' is 0.5, which makes 48 channels of 'hidden_size' 96, want a multiple of "
                  "'num_heads' 5"},
        BadConfig{"DeltaNetValueHeads", With(kDeltaNet, "\"expand_v\":2", "\"expand_v\":1.02"),
                  "'expand_v' is 1.02, which makes 97"},
        BadConfig{"DeltaNetNoChannels", With(kDeltaNet, "0.5", "0"),
                  "'expand_k' is 0, which makes 0 channels"},
        BadConfig{"DeltaNetExpandHuge", With(kDeltaNet, "0.5", "1e300"), "'expand_k' is 1e+300"},
        BadConfig{"DeltaNetExpandString", With(kDeltaNet, "0.5", "\"x\""),
                  "'expand_k' is 'x', want a number"},
        BadConfig{"DeltaNetSwitchNumber", With(kDeltaNet, "\"use_gate\":true", "\"use_gate\":1"),
                  "'use_gate' is 1, want true or false"},
        BadConfig{"DeltaNetConvLong", With(kDeltaNet, "\"conv_size\":3", "\"conv_size\":9"),
                  "'conv_size' is 9, want an integer from 1 to 8"},
        BadConfig{"DeltaNetNorm", With(kDeltaNet, "\"sum\"", "\"l1\""),
                  "'qk_norm' is 'l1', want 'l2', 'sum'"},
        BadConfig{"DeltaNetActivation", With(kDeltaNet, "\"elu\"", "\"gelu\""),
                  "'qk_activation' is 'gelu', want 'silu', 'relu', 'elu', 'identity'"},
        BadConfig{"DeltaNetHiddenAct", With(kDeltaNet, "swish", "powlu"),
                  "'hidden_act' is 'powlu', want 'swish', 'silu'"},
        BadConfig{"DeltaNetEpsilon", With(kDeltaNet, "1e-05", "-1e-05"), "'norm_eps' is -1e-05, want"},
        BadConfig{"DeltaNetIntermediate", With(kDeltaNet, ":100", ":0"),
                  "'intermediate_size' is 0, want an integer from 1 to 1048576"},
        BadConfig{"DeltaNetRatio", R"({"model_type":"delta_net","hidden_ratio":0})",
                  "'hidden_ratio' is 0, which makes 0 hidden units"},
        BadConfig{"DeltaNetBos", With(kDeltaNet, ":7", ":500"),
                  "'bos_token_id' is 500, want an integer from 0 to 499 or null"},
        BadConfig{"DeltaNetEosList", With(kDeltaNet, "[9,8,9]", "[9,-1]"),
                  "'eos_token_id' has -1, want an integer from 0 to 499"},
        BadConfig{"DeltaNetEosNested", With(kDeltaNet, "[9,8,9]", "[[9]]"),
                  "'eos_token_id' is an array, want"},
        BadConfig{"DeltaNetEosString", With(kDeltaNet, "[9,8,9]", "\"</s>\""),
                  "'eos_token_id' is '</s>', want"}),
    [](const auto& info) { return info.param.name; });

TEST(ParseModelConfigTest, SurvivesMutations) {
  std::mt19937 random(5);
  for (const std::string valid : {kTransformerDeltaNet, kTransformerBlock, kDeltaNetModel, kDeltaNet}) {
    int accepted = 0, refused = 0;
    for (int i = 0; i < 5000; ++i) {
      const std::string json = Mutate(valid, valid.size(), &random);
      const auto config = ParseModelConfig(json);
      if (config.ok()) {
        ++accepted;
        ASSERT_GE(config->d_model, 1) << json;
        ASSERT_LE(config->d_model, 1 << 20) << json;
        if (config->family == Family::kDeltaNet) {
          ASSERT_GE(config->ff_hidden_dim, 1) << json;
          ASSERT_EQ(config->key_width() % config->num_heads, 0) << json;
          ASSERT_EQ(config->value_width() % config->num_heads, 0) << json;
          for (const int64_t id : config->eos_ids) ASSERT_LT(id, config->vocab_size) << json;
        }
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

TEST_F(ReadModelConfigTest, MergesGenerationConfig) {
  const auto write_generation = [this](const std::string& json) {
    std::ofstream(directory_ + "/generation_config.json") << json;
  };
  write_generation(R"({"eos_token_id":11})");
  Write(kDeltaNet);
  EXPECT_EQ(ReadModelConfig(directory_)->eos_ids, std::vector<int64_t>{11});
  EXPECT_EQ(ReadModelConfig(directory_)->bos_id, 7);
  Write(kDeltaNetModel);
  EXPECT_EQ(ReadModelConfig(directory_)->eos_ids, std::vector<int64_t>{11});
  EXPECT_EQ(ReadModelConfig(directory_)->bos_id, std::nullopt);

  write_generation(R"({"eos_token_id":1000})");
  const absl::Status bad = ReadModelConfig(directory_).status();
  EXPECT_EQ(bad.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(bad.message(),
            directory_ + "/generation_config.json: 'eos_token_id' has 1000, want an integer from 0 to 999");
  write_generation("[");
  EXPECT_THAT(std::string(ReadModelConfig(directory_).status().message()),
              HasSubstr(directory_ + "/generation_config.json: "));
  Write(kTransformerBlock);  // It has no ids.
  EXPECT_TRUE(ReadModelConfig(directory_).ok());
}

TEST_F(ReadModelConfigTest, DoesNotWaitForAPipe) {
  ASSERT_EQ(mkfifo((directory_ + "/config.json").c_str(), 0600), 0);
  EXPECT_EQ(ReadModelConfig(directory_).status().code(), absl::StatusCode::kInvalidArgument);
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
                                         "transformer_block", "deltanet_model", "deltanet_model_causal",
                                         "fla_default", "fla_head128", "fla_fused_mlp", "fla_tied"),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(GoldenModelTest, HoldsTheExpectedTensors) {
  auto config = ReadModelConfig(directory());
  ASSERT_TRUE(config.ok()) << config.status();
  const auto reader = SafetensorsReader::Open(directory() + "/model.safetensors");
  ASSERT_TRUE(reader.ok()) << reader.status();
  ASSERT_TRUE(ResolveFromFile(reader->entries(), &*config).ok());
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
  EXPECT_EQ(count(R"({"model_type":"delta_net"})"), 3 + 24 * (4 + 3 + 2 + 2 + 3u));
  // A gate and biases more, no beta; the head is the embedding.
  EXPECT_EQ(count(kDeltaNet), 2 + 3 * (4 + 6 + 2 + 2 + 3u));
  EXPECT_EQ(count(With(kDeltaNet, "\"use_short_conv\":true", "\"use_short_conv\":false")),
            2 + 3 * (4 + 2 + 2 + 3u));
}

TEST(ExpectedTensorsTest, DeltaNetShapes) {
  const auto entries = Entries(MustParse(kDeltaNet));
  const auto shape = [&](const std::string& name) {
    return ShapeString(entries.at("model.layers.2." + name).shape);
  };
  EXPECT_EQ(shape("attn.q_proj.weight"), "[48,96]");
  EXPECT_EQ(shape("attn.v_proj.weight"), "[192,96]");
  EXPECT_EQ(shape("attn.g_proj.weight"), "[192,96]");
  EXPECT_EQ(shape("attn.o_proj.weight"), "[96,192]");
  EXPECT_EQ(shape("attn.k_conv1d.weight"), "[48,1,3]");
  EXPECT_EQ(shape("attn.v_conv1d.bias"), "[192]");
  EXPECT_EQ(shape("attn.o_norm.weight"), "[64]");
  EXPECT_EQ(shape("mlp.gate_proj.weight"), "[100,96]");
  EXPECT_EQ(shape("mlp.down_proj.weight"), "[96,100]");
}

TEST(ResolveFromFileTest, DeltaNetGateAndUpMayBeFused) {
  ModelConfig config = MustParse(R"({"model_type":"delta_net","num_hidden_layers":2})");
  auto entries = Entries(config);
  ASSERT_TRUE(ResolveFromFile(entries, &config).ok());
  EXPECT_FALSE(config.fused_gate_up);
  for (const std::string layer : {"0", "1"}) {
    entries.erase("model.layers." + layer + ".mlp.up_proj.weight");
    entries["model.layers." + layer + ".mlp.gate_proj.weight"].shape = {2 * 5632, 2048};
  }
  ASSERT_TRUE(ResolveFromFile(entries, &config).ok());
  EXPECT_TRUE(config.fused_gate_up);
  EXPECT_TRUE(CheckTensors(entries, ExpectedTensors(config)).ok());
  // Neither one nor the other: it is up_proj that is missing.
  entries["model.layers.0.mlp.gate_proj.weight"].shape = {5632, 2048};
  ASSERT_TRUE(ResolveFromFile(entries, &config).ok());
  EXPECT_FALSE(config.fused_gate_up);
  EXPECT_THAT(std::string(CheckTensors(entries, ExpectedTensors(config)).message()),
              HasSubstr("missing: model.layers.0.mlp.up_proj.weight"));
}

TEST(ResolveFromFileTest, DeltaNetTiedHeadMayBeThere) {
  ModelConfig config = MustParse(kDeltaNet);
  auto entries = Entries(config);
  EXPECT_EQ(entries.count("lm_head.weight"), 0u);
  entries["lm_head.weight"] = {DType::kFloat32, {500, 96}, 0, 0};
  ASSERT_TRUE(ResolveFromFile(entries, &config).ok());
  EXPECT_TRUE(config.lm_head_beside_tied);
  EXPECT_TRUE(CheckTensors(entries, ExpectedTensors(config)).ok());
}

TEST(ResolveFromFileTest, DeltaNetConvBiasIsDroppedWhereThereIsNone) {
  ModelConfig config = MustParse(kDeltaNet);
  auto entries = Entries(config);
  ASSERT_TRUE(ResolveFromFile(entries, &config).ok());
  EXPECT_TRUE(config.conv_bias);
  entries.erase("model.layers.0.attn.q_conv1d.bias");  // One of many is missing.
  ASSERT_TRUE(ResolveFromFile(entries, &config).ok());
  EXPECT_TRUE(config.conv_bias);
  config.conv_bias = false;
  entries = Entries(config);
  config.conv_bias = true;
  ASSERT_TRUE(ResolveFromFile(entries, &config).ok());
  EXPECT_FALSE(config.conv_bias);
}

TEST(ResolveFromFileTest, TheFileDecides) {
  ModelConfig config = MustParse(kDeltaNetModel);
  auto entries = Entries(config);
  entries["layers.0.delta_net.beta_linear.weight"].shape = {8, 128};
  ASSERT_TRUE(ResolveFromFile(entries, &config).ok());
  EXPECT_EQ(config.num_heads, 8);
}

TEST(ResolveFromFileTest, OtherFamiliesHaveNoneToResolve) {
  ModelConfig config = MustParse(kTransformerDeltaNet);
  ASSERT_TRUE(ResolveFromFile({}, &config).ok());
  EXPECT_EQ(config.num_heads, 1);
}

TEST(ResolveFromFileTest, RefusesWhatNamesNoHeads) {
  const ModelConfig config = MustParse(kDeltaNetModel);
  const std::string beta = "layers.0.delta_net.beta_linear.weight";
  const auto resolve = [&](const std::map<std::string, SafetensorsEntry>& entries) {
    ModelConfig changed = config;
    const absl::Status status = ResolveFromFile(entries, &changed);
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
