"""Makes the tokenizers beside this file and cases.txt, what SentencePiece itself makes of texts and ids with them.

    pip install sentencepiece==0.2.0 && python make.py [TEXTS]

cases.txt has lines `MODEL encode TEXT IDS` and `MODEL decode TEXT IDS`: the text in hex (empty: -), the ids with commas. Of
random texts there are TEXTS a model, 40 in the file that is kept; tokenizer_test passes with 20000 as well.
"""

import io
import pathlib
import random
import sys
import tempfile

import sentencepiece

HERE = pathlib.Path(__file__).parent

WORDS = """state memory matrix token session stream batch step slot model server client reads writes keeps gives the a of and
to in is on one two some every small large empty whole first last next""".split()
OTHERS = ["Der Zustand bleibt, wie er war.", "Größe zählt nicht: 25,1 MiB.", "l'état est déjà là", "Где стоит сессия?",
          "状態は一つだけ。", "记忆 是 矩阵", "الذاكرة", "x = 3 * (y + 1)", "a_b.c(d[0]);", "naïve café"]

# A normalizer of a few rules: code points, and what they become.
RULES = [("ﬁ", "fi"), ("é", "e"), ("e\u0301", "e"), ("\u200b", ""), ("\u00a0", " "), ("\n", " "), ("①", " 1 "), ("ﷺ", "  x  ")]

MODELS = {
    # As language models have it: BPE, every byte has a piece, nothing is normalized.
    "bpe_bytes": dict(model_type="bpe", vocab_size=400, byte_fallback=True, normalization_rule_name="identity",
                      remove_extra_whitespaces=False, character_coverage=0.98),
    # SentencePiece's defaults, small enough for the golden models.
    "unigram": dict(model_type="unigram", vocab_size=200, user_defined_symbols=["<sep>", "==>"]),
    "unigram_bytes": dict(model_type="unigram", vocab_size=420, byte_fallback=True, add_dummy_prefix=False,
                          character_coverage=0.98, normalization_rule_name="identity"),
    "bpe": dict(model_type="bpe", vocab_size=150, user_defined_symbols=["<sep>"], rules=RULES),
}

TEXTS = ["", " ", "a", " a", "a ", "the state of the session", "  two   spaces  ", "unseen: ЖŁ ∑ 日本", "\n\ttabs\n",
         "emoji 🙂🙃", "ﬁ ligature ① Å", "ＦＵＬＬ width", "<sep> and ==> and <s> </s> <unk> <0x41>", "▁ itself ▁",
         "zero\0inside", "the<sep>the", "sessionsessionsession", "....", "aaaaaaaaaaaaaaaa", "e\u0301 combining",
         "\u200bzero width", "\u3000ideographic space", "tail\u00a0", "<sep>", "\u0130stanbul \u1e9e"]


def corpus(rng):
    lines = []
    for _ in range(400):
        line = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(3, 12)))
        lines.append(line[0].upper() + line[1:] + rng.choice([".", "?", "!", ";"]))
    return lines + 5 * OTHERS


def random_text(rng):
    alphabet = ["the", "state", "memory", " ", " ", " ", "  ", "<sep>", "==>", "▁", "é", "e\u0301", "Ж", "日", "本", "🙂",
                "\n", "ﬁ", "①", "a", "b", "t", "s", "ss", "!", "\u00a0", "\u3000", "<0x41>", "</s>", "\u200b", "ﷺ"]
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 20)))


def cases(name, processor, texts, rng, id_lists):
    def line(kind, text, ids):
        return f"{name} {kind} {text.encode().hex() or '-'} {','.join(map(str, ids)) or '-'}\n"

    for text in texts:
        ids = processor.encode(text)
        yield line("encode", text, ids)
        yield line("decode", processor.decode(ids), ids)
    for _ in range(id_lists):  # No text gives most of these: bytes of half a character, leading control pieces.
        ids = [rng.randrange(processor.vocab_size()) for _ in range(rng.randrange(0, 12))]
        yield line("decode", processor.decode(ids), ids)


def codes(text):
    return " ".join(f"{ord(c):X}" for c in text)


def main():
    texts = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    lines = []
    for name, options in MODELS.items():
        rng = random.Random(name)
        model = io.BytesIO()
        rules = tempfile.NamedTemporaryFile("w", suffix=".tsv")
        if "rules" in options:
            rules.write("".join(f"{codes(a)}\t{codes(b)}\n" for a, b in options["rules"]))
            rules.flush()
            options = {key: value for key, value in options.items() if key != "rules"}
            options["normalization_rule_tsv"] = rules.name
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus(rng)), model_writer=model, hard_vocab_limit=False, minloglevel=2,
            num_threads=1, **options)
        (HERE / name).mkdir(exist_ok=True)
        content = model.getvalue().replace(rules.name.encode(), b"x" * len(rules.name))  # Nothing of this machine.
        (HERE / name / "tokenizer.model").write_bytes(content)
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        lines += cases(name, processor, TEXTS + [random_text(rng) for _ in range(texts)], rng, texts)
    (HERE / "cases.txt").write_text("".join(lines))


if __name__ == "__main__":
    main()
