#!/usr/bin/env python3
"""Writes random texts of all of Unicode, and the ids that other programs give them, which tests/tokenizers.rs reads.

    pip install tokenizers
    unicode.py                                  ids of the folders of convert.py and embed.py, by the library tokenizers
    unicode.py --llama-ids PROGRAM VOCABS       ids of ggml-vocab-*.gguf in a folder, by llama.cpp (llama_ids.cpp)
    unicode.py … --texts 10000 --out FOLDER     more texts, for a test with HALITE_UNICODE=FOLDER

The folder gets texts.json, and for each vocabulary a file of ids, one line a text. A line is `-` where the library changes the text
before its vocabulary sees it (NFC), which GGUF files do not ask for.
"""

import argparse
import json
import pathlib
import random
import subprocess
import unicodedata

from tokenizers import BertWordPieceTokenizer, Tokenizer

DATA = pathlib.Path(__file__).resolve().parents[1] / "data"
FOLDERS = ["gemma2", "llama", "llama-spm", "qwen2", "starcoder2"]
VOCABULARIES = ["bert-bge", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2"]
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

    def encode(tokenizer, nfc):
        for text in texts:
            changed = nfc and unicodedata.normalize("NFC", text) != text
            yield "-" if changed else " ".join(map(str, tokenizer.encode(text, add_special_tokens=False).ids))

    if args.llama_ids:
        program, vocabularies = args.llama_ids
        hexadecimal = "".join(text.encode().hex() + "\n" for text in texts)
        for name in VOCABULARIES:
            path = vocabularies / f"ggml-vocab-{name}.gguf"
            run = subprocess.run([program, path], input=hexadecimal, capture_output=True, text=True, check=True)
            write(f"ggml-vocab-{name}", run.stdout.splitlines())
    else:
        for name in FOLDERS:
            tokenizer = Tokenizer.from_file(str(DATA / "convert" / name / "tokenizer.json"))
            write(name, encode(tokenizer, tokenizer.normalizer.__class__.__name__ == "NFC"))
        write("bert", encode(BertWordPieceTokenizer(str(DATA / "bert/vocab.txt"), lowercase=True), False))


main()
