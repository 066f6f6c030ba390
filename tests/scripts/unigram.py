#!/usr/bin/env python3
"""Writes a small unigram vocabulary and what SentencePiece makes of some texts, which tests/tokenizers.rs reads.

    pip install gguf sentencepiece
    unigram.py                                  the committed files: tests/data/unigram.gguf, .inp and .out
    unigram.py --rules nmt_nfkc --texts 20000 --out FILE.gguf     with a published charsmap, and more texts, for a test
                                                                  with HALITE_UNIGRAM=FILE.gguf

The vocabulary is trained on the Apache licence, with a few replacements of characters (or named rules) and two
user-defined tokens.
"""

import argparse
import io
import pathlib
import random
import tempfile

import gguf
import sentencepiece as spm

ROOT = pathlib.Path(__file__).resolve().parents[2]
SEPARATOR = "\n__ggml_vocab_test__\n"
# Characters in hexadecimal, and what replaces them.
RULES = ["FF21\t41", "FF22\t42", "FB01\t66 69", "2460\t31", "2026\t2E 2E 2E", "9\t20", "A\t20", "D A\t20", "3000\t20",
         "41 30A\tC5", "200B\t", "1F600\t3A 29"]
USER_DEFINED = ["<tag>", "Licensor"]
TEXTS = ["", " ", "   ", "\t", "a", " a", "a ", "  Work  or   Derivative Works ", "Licensor's <tag>licence<tag> <tag>",
         "ＡＢ ﬁle…", "A\u030angstrom \u200b A\u200bB", "你好 世界 你好", "x\r\ny\n\nz\u3000z", "zzzzqqqq\U0001f600", "\u2581 \u2581\u2581a",
         "unknown ☃☃☃ snow☃men"]


def train(rules):
    text = (ROOT / "LICENSE-APACHE").read_text() + "Der größte Äpfel kostet Å. 世界\n" * 4
    with tempfile.TemporaryDirectory() as folder:
        tsv = pathlib.Path(folder, "rules.tsv")
        tsv.write_text("\n".join(RULES) + "\n")
        normalisation = {"normalization_rule_name": rules} if rules else {"normalization_rule_tsv": str(tsv)}
        model = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(text.splitlines()), model_writer=model, model_type="unigram", vocab_size=400,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, user_defined_symbols=USER_DEFINED, hard_vocab_limit=False,
            num_threads=1, minloglevel=2, **normalisation)
    return model.getvalue()


def texts(count):
    rng = random.Random(1)
    parts = ["Work", "Licensor", "<tag>", " ", "  ", "the ", "s", "ing", "ﬁ", "Ａ", "…", "é", "☃", "你", "\n", "A\u030a", "tag>", "<",
             "\u2581", "of", "License", "1", "2.0", "\U0001f600", "(c)"]
    return TEXTS + ["".join(rng.choices(parts, k=rng.randint(1, 20))) for _ in range(count)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rules")
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "tests/data/unigram.gguf")
    args = parser.parse_args()
    serialized = train(args.rules)
    processor = spm.SentencePieceProcessor(model_proto=serialized)
    from sentencepiece import sentencepiece_model_pb2 as pb
    model = pb.ModelProto.FromString(serialized)

    writer = gguf.GGUFWriter(args.out, "t5")
    writer.add_tokenizer_model("t5")
    writer.add_token_list([piece.piece for piece in model.pieces])
    writer.add_token_scores([piece.score for piece in model.pieces])
    writer.add_token_types([piece.type for piece in model.pieces])
    writer.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(model.normalizer_spec.remove_extra_whitespaces)
    writer.add_precompiled_charsmap(model.normalizer_spec.precompiled_charsmap)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    lines = texts(args.texts)
    args.out.with_suffix(".gguf.inp").write_text("".join(line + SEPARATOR for line in lines))
    ids = [" ".join(map(str, processor.encode(line))) for line in lines]
    args.out.with_suffix(".gguf.out").write_text("".join(line + "\n" for line in ids))


main()
