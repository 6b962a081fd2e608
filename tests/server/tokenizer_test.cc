#include "server/tokenizer.h"

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "deltanet/tokenizer/sentencepiece.pb.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace deltanet {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

const std::string kFolder = absl::StrCat(DELTANET_TESTDATA, "/tokenizer");

std::unique_ptr<Tokenizer> Load(const std::string& name) {
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Load(kFolder + "/" + name);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return *std::move(tokenizer);
}

struct Case {
  std::string model;
  bool encode;
  std::string text;
  std::vector<int64_t> ids;
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  std::ifstream file(kFolder + "/cases.txt");
  std::string model, kind, text, ids;
  while (file >> model >> kind >> text >> ids) {
    Case one{model, kind == "encode", text == "-" ? "" : absl::HexStringToBytes(text), {}};
    for (const absl::string_view id : absl::StrSplit(ids, ',')) {
      int64_t value = 0;
      if (absl::SimpleAtoi(id, &value)) one.ids.push_back(value);
    }
    cases.push_back(std::move(one));
  }
  return cases;
}

std::string InPieces(const Tokenizer& tokenizer, const std::vector<int64_t>& ids, TextPlace place) {
  TextDecoder decoder(&tokenizer, place);
  std::string joined;
  for (const int64_t id : ids) {
    std::string text;
    decoder.Append(id, &text);
    for (size_t i = 0; i < text.size();) {
      const int length = Utf8Length(absl::string_view(text).substr(i));
      EXPECT_GT(length, 0) << "half a character: " << absl::CHexEscape(text);
      if (length <= 0) break;
      i += length;
    }
    joined += text;
  }
  decoder.Finish(&joined);
  return joined;
}

TEST(TokenizerTest, AgreesWithSentencePiece) {
  std::map<std::string, std::unique_ptr<Tokenizer>> tokenizers;
  std::map<std::string, int> count;
  for (const Case& one : Cases()) {
    auto& tokenizer = tokenizers[one.model];
    if (tokenizer == nullptr) tokenizer = Load(one.model);
    ++count[one.model];
    if (one.encode) {
      const auto ids = tokenizer->Encode(one.text, TextPlace::kBegins);
      ASSERT_TRUE(ids.ok()) << ids.status();
      EXPECT_EQ(*ids, one.ids) << one.model << ": \"" << absl::CHexEscape(one.text) << "\"";
    } else {
      EXPECT_EQ(tokenizer->Decode(one.ids).value(), one.text)
          << one.model << ": " << ::testing::PrintToString(one.ids);
      EXPECT_EQ(InPieces(*tokenizer, one.ids, TextPlace::kBegins), one.text) << one.model;
    }
  }
  for (const char* name : {"bpe", "bpe_bytes", "unigram", "unigram_bytes"})
    EXPECT_GT(count[name], 100) << name;
}

TEST(TokenizerTest, ATextMayComeInPartsOfWhichEachGoesOn) {
  const auto tokenizer = Load("bpe_bytes");
  const std::vector<std::string> parts = {"the state", " of the session", "\nkeeps  on", "é 日"};
  std::vector<int64_t> ids;
  std::string whole;
  for (const std::string& part : parts) {
    const auto more = tokenizer->Encode(part, ids.empty() ? TextPlace::kBegins : TextPlace::kGoesOn);
    ASSERT_TRUE(more.ok());
    ids.insert(ids.end(), more->begin(), more->end());
    whole += part;
  }
  EXPECT_EQ(tokenizer->Decode(ids).value(), whole);
}

TEST(TokenizerTest, ATextThatGoesOnKeepsItsFirstSpace) {
  for (const char* name : {"bpe_bytes", "unigram", "bpe"}) {
    const auto tokenizer = Load(name);
    const std::vector<int64_t> ids = tokenizer->Encode("the state", TextPlace::kBegins).value();
    EXPECT_EQ(InPieces(*tokenizer, ids, TextPlace::kBegins), "the state");
    EXPECT_EQ(InPieces(*tokenizer, ids, TextPlace::kGoesOn), " the state");
    const std::vector<int64_t> bare = tokenizer->Encode("the state", TextPlace::kGoesOn).value();
    EXPECT_EQ(InPieces(*tokenizer, bare, TextPlace::kGoesOn), "the state");
    const std::vector<int64_t> spaced = tokenizer->Encode(" the state", TextPlace::kGoesOn).value();
    EXPECT_EQ(spaced, ids);
  }
}

TEST(TokenizerTest, CharactersOfSeveralTokensComeWhole) {
  const auto tokenizer = Load("bpe_bytes");
  const std::vector<int64_t> ids = tokenizer->Encode("Ж🙂", TextPlace::kGoesOn).value();
  ASSERT_EQ(ids.size(), 6u);  // No piece has them: their bytes.
  TextDecoder decoder(tokenizer.get(), TextPlace::kGoesOn);
  std::vector<std::string> given(6);
  for (size_t i = 0; i < 6; ++i) decoder.Append(ids[i], &given[i]);
  EXPECT_THAT(given, ElementsAre("", "Ж", "", "", "", "🙂"));
  std::string rest;
  decoder.Append(ids[2], &rest);
  decoder.Append(ids[3], &rest);
  EXPECT_EQ(rest, "");
  decoder.Finish(&rest);
  EXPECT_EQ(rest, "\uFFFD\uFFFD");
}

TEST(TokenizerTest, TextThatIsNotUtf8IsRefusedWithItsPlace) {
  const auto tokenizer = Load("bpe_bytes");
  for (const std::string& bad :
       {std::string("\xFF"), std::string("\xC0\x80"), std::string("\xED\xA0\x80"), std::string("\xE2\x96"),
        std::string("\xF4\x90\x80\x80"), std::string("\x80")}) {
    const absl::Status status = tokenizer->Encode("good " + bad, TextPlace::kBegins).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr("from byte 5 on")) << absl::CHexEscape(bad);
  }
}

TEST(TokenizerTest, IdsOutOfRange) {
  const auto tokenizer = Load("unigram");
  const int64_t size = tokenizer->size();
  EXPECT_EQ(size, 197);
  EXPECT_THAT(std::string(tokenizer->Decode({1, size}).status().message()),
              HasSubstr("id number 1 is 197, want 0 to 196"));
  EXPECT_EQ(tokenizer->Decode({-1}).status().code(), absl::StatusCode::kInvalidArgument);
  // While it generates, a model may say an id that its tokenizer does not have.
  EXPECT_EQ(InPieces(*tokenizer, {size + 7}, TextPlace::kGoesOn), tokenizer->Decode({0}).value());
}

TEST(TokenizerTest, AFolderWithoutOneSaysWhatItHas) {
  const std::string folder = ::testing::TempDir() + "/no_tokenizer";
  std::filesystem::create_directories(folder);
  std::filesystem::remove(folder + "/tokenizer.json");
  const absl::Status nothing = Tokenizer::Load(folder).status();
  EXPECT_EQ(nothing.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(nothing.message(), "the model's directory has no tokenizer.model");
  std::ofstream(folder + "/tokenizer.json") << "{}";
  const absl::Status json = Tokenizer::Load(folder).status();
  EXPECT_EQ(json.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(json.message()), HasSubstr("tokenizer.json"));
  std::ofstream(folder + "/tokenizer.model") << "not one";
  const absl::Status bad = Tokenizer::Load(folder).status();
  EXPECT_EQ(bad.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(bad.message()),
              HasSubstr(folder + "/tokenizer.model: it is not a SentencePiece model"));
  std::filesystem::remove_all(folder);
}

// A model of a few pieces, and what a test changes in it.
tokenizer::SentencePieceModel SmallModel() {
  tokenizer::SentencePieceModel model;
  const auto add = [&](const char* text, tokenizer::Piece::Kind kind) {
    tokenizer::Piece* piece = model.add_pieces();
    piece->set_text(text);
    piece->set_kind(kind);
  };
  add("<unk>", tokenizer::Piece::UNKNOWN);
  add("<s>", tokenizer::Piece::CONTROL);
  add("a", tokenizer::Piece::NORMAL);
  return model;
}

std::string ErrorOf(const tokenizer::SentencePieceModel& model) {
  const auto tokenizer = Tokenizer::Parse(model.SerializeAsString());
  EXPECT_EQ(tokenizer.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(tokenizer.status().message());
}

TEST(TokenizerTest, WhatIsNotReadIsRefusedByName) {
  EXPECT_TRUE(Tokenizer::Parse(SmallModel().SerializeAsString()).ok());
  auto model = SmallModel();
  model.mutable_trainer()->set_model(tokenizer::TrainerSpec::WORD);
  EXPECT_THAT(ErrorOf(model), HasSubstr("type is WORD, want UNIGRAM or BPE"));
  model = SmallModel();
  model.mutable_trainer()->set_space_as_suffix(true);
  EXPECT_THAT(ErrorOf(model), HasSubstr("treat_whitespace_as_suffix"));
  model = SmallModel();
  model.mutable_denormalizer()->set_replacements("x");
  EXPECT_THAT(ErrorOf(model), HasSubstr("denormalizer"));
  model = SmallModel();
  model.mutable_trainer()->set_byte_fallback(true);
  EXPECT_THAT(ErrorOf(model), HasSubstr("no piece for the byte 0"));
  model = SmallModel();
  model.mutable_pieces(0)->set_kind(tokenizer::Piece::NORMAL);
  EXPECT_THAT(ErrorOf(model), HasSubstr("no piece of the kind UNKNOWN"));
  model = SmallModel();
  model.mutable_pieces(1)->set_kind(tokenizer::Piece::UNKNOWN);
  EXPECT_THAT(ErrorOf(model), HasSubstr("piece 1 \"<s>\" is of the kind UNKNOWN, and so is 0"));
  model = SmallModel();
  *model.add_pieces() = model.pieces(2);
  EXPECT_THAT(ErrorOf(model), HasSubstr("piece 3 \"a\" is there twice"));
  model = SmallModel();
  model.mutable_pieces(1)->set_kind(tokenizer::Piece::BYTE);
  EXPECT_THAT(ErrorOf(model), HasSubstr("want a name like <0x0A>"));
  model = SmallModel();
  model.mutable_normalizer()->set_replacements(std::string("\x08\0\0\0abcd", 8));
  EXPECT_THAT(ErrorOf(model), HasSubstr("replacements, 8 bytes"));
}

TEST(TokenizerTest, SpoiltFilesAreRefusedOrRead) {
  std::mt19937 random(1);
  for (const char* name : {"bpe", "bpe_bytes"}) {
    std::ifstream file(absl::StrCat(kFolder, "/", name, "/tokenizer.model"), std::ios::binary);
    const std::string good((std::istreambuf_iterator<char>(file)), {});
    for (int i = 0; i < 500; ++i) {
      std::string spoilt = good;
      for (int k = 0; k < 4; ++k) spoilt[random() % spoilt.size()] = static_cast<char>(random());
      if (i % 5 == 0) spoilt.resize(random() % spoilt.size());
      const auto tokenizer = Tokenizer::Parse(spoilt);
      if (!tokenizer.ok()) continue;
      const auto ids = (*tokenizer)->Encode("the ﬁrst state é ① \n <sep> Ж", TextPlace::kBegins);
      ASSERT_TRUE(ids.ok());
      EXPECT_TRUE((*tokenizer)->Decode(*ids).ok());
    }
  }
}

}  // namespace
}  // namespace deltanet
