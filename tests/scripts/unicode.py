#!/usr/bin/env python3
"""Writes random texts of all of Unicode, and the ids that other programs give them, which tests/tokenizers.rs reads.

    pip install tokenizers gguf
    unicode.py                                  ids of the folders of convert.py and embed.py, by the library tokenizers
    unicode.py --llama-ids PROGRAM VOCABS       ids of ggml-vocab-*.gguf in a folder, by llama.cpp (llama_ids.cpp), and where they
                                                are word pieces by the library
    unicode.py … --texts 10000 --out FOLDER     more texts, for a test with HALITE_UNICODE=FOLDER

The folder gets texts.json, and for each vocabulary a file of ids, one line a text. A line is `-` where the library changes the text
before its vocabulary sees it (NFC), which GGUF files do not ask for, where the tables of characters of either program are older than
Unicode 16, and where llama.cpp is known not to do what a model was published with (LEFT_OUT).
"""

import argparse
import json
import pathlib
import random
import subprocess
import unicodedata

import gguf
from tokenizers import BertWordPieceTokenizer, Tokenizer

DATA = pathlib.Path(__file__).resolve().parents[1] / "data"
FOLDERS = ["gemma2", "gemma4", "llama", "llama-spm", "qwen2", "qwen3_5", "starcoder2"]
VOCABULARIES = ["deepseek-llm", "falcon", "gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2"]
# Characters for which llama.cpp's ids are not those of the library tokenizers: any since Unicode 15.1; four-byte characters for whose
# first byte the vocabulary has no token, left out before or after merging; and a space that is punctuation too.
RECENT = [(0x2ffc, 0x3000), (0x105c0, 0x10600), (0x10d40, 0x10d90), (0x10ec2, 0x10f00), (0x11380, 0x11400), (0x116d0, 0x11700),
          (0x11bc0, 0x11c00), (0x13460, 0x14400), (0x16100, 0x16140), (0x16d40, 0x16d80), (0x1cc00, 0x1cf00), (0x1e5d0, 0x1e600),
          (0x2ebf0, 0x2ee60)]
LEFT_OUT = {"falcon": [(0x40000, 0x100000)], "deepseek-llm": [(0x3000, 0x3001)]}
# Blocks of which a text often has several characters in a row.
BLOCKS = [(0x20, 0x7f), (0xa0, 0x250), (0x300, 0x370), (0x370, 0x590), (0x5d0, 0x700), (0x900, 0xe80), (0x1e00, 0x2200),
          (0x3000, 0x3100), (0x4e00, 0xa000), (0xac00, 0xd7a4), (0xf900, 0x10000), (0x1f300, 0x1fb00)]
PARTS = [" ", "  ", "\n", "\r\n", "\t", "the", "ing", "I'm", "'LL", "2024", "3.14", "!?", "_x", "e\u0301", "\u00a0", "\u200d", "\ufe0f", "\u3000"]


def character(rng, first, end):
    while True:
        c = chr(rng.randrange(first, end))
        # SentencePiece's space cannot be told from a space.
        if not 0xd800 <= ord(c) < 0xe000 and c not in "\u2581\0":
            return c


def text(rng):
    out = []
    for _ in range(rng.randint(1, 5)):
        kind = rng.random()
        if kind < 0.35:
            out.append(rng.choice(PARTS))
        elif kind < 0.85:
            block = rng.choice(BLOCKS)
            out += [character(rng, *block) for _ in range(rng.randint(1, 4))]
        else:
            out.append(character(rng, 1, 0x110000))
    return "".join(out)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, default=DATA / "unicode")
    parser.add_argument("--llama-ids", nargs=2, type=pathlib.Path, metavar=("PROGRAM", "VOCABS"))
    args = parser.parse_args()
    rng = random.Random(args.seed)
    texts = [text(rng) for _ in range(args.texts)]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "texts.json").write_text("[" + ",\n".join(map(json.dumps, texts)) + "]\n")

    def write(name, lines):
        (args.out / f"{name}.ids").write_text("".join(line + "\n" for line in lines))

    def changed(text):
        return unicodedata.normalize("NFC", text) != text

    def is_recent(text):
        return any(unicodedata.category(c) != "Cn" and unicodedata.ucd_3_2_0.category(c) == "Cn" for c in text)

    def encode(tokenizer, left_out):
        for text in texts:
            yield "-" if left_out(text) else " ".join(map(str, tokenizer.encode(text, add_special_tokens=False).ids))

    def word_pieces(tokens):
        return encode(BertWordPieceTokenizer({token: i for i, token in enumerate(tokens)}, lowercase=True), is_recent)

    if args.llama_ids:
        program, vocabularies = args.llama_ids
        hexadecimal = "".join(text.encode().hex() + "\n" for text in texts)
        for name in VOCABULARIES:
            path = vocabularies / f"ggml-vocab-{name}.gguf"
            run = subprocess.run([program, path], input=hexadecimal, capture_output=True, text=True, check=True)
            left_out = RECENT + LEFT_OUT.get(name, [])
            known = [not any(first <= ord(c) < end for c in text for first, end in left_out) for text in texts]
            write(f"ggml-vocab-{name}", [ids if known else "-" for ids, known in zip(run.stdout.splitlines(), known)])
        tokens = gguf.GGUFReader(vocabularies / "ggml-vocab-bert-bge.gguf").get_field("tokenizer.ggml.tokens").contents()
        pieces = [t[1:] if t.startswith("\u2581") else t if t.startswith("[") and len(t) > 1 else "##" + t for t in tokens]
        write("ggml-vocab-bert-bge", word_pieces(pieces))
    else:
        for name in FOLDERS:
            tokenizer = Tokenizer.from_file(str(DATA / "convert" / name / "tokenizer.json"))
            nfc = tokenizer.normalizer.__class__.__name__ == "NFC"
            write(name, encode(tokenizer, changed if nfc else lambda _: False))
        write("bert", word_pieces((DATA / "bert/vocab.txt").read_text().splitlines()))


if __name__ == "__main__":
    main()
