#!/usr/bin/env python3
"""Writes small vocabularies of byte-pair encoding, and one of PLaMo's kind, and the ids that llama.cpp gives to texts, which
tests/tokenizers.rs reads.

    pip install gguf
    bpe.py PROGRAM                    PROGRAM is llama_ids.cpp's

Two vocabularies, tests/data/bpe/bytes.gguf and text.gguf, spell words byte by byte and as they are. Their merges cross the borders of
words, so ids show where a pre-tokenizer splits a text. There is a file of ids for each pre-tokenizer, one line for each of the first
texts of tests/data/unicode/texts.json. A line is `-` where llama.cpp is known not to do what a model was published with (left_out),
and where its tables of characters are older than Unicode 16.
"""

import argparse
import collections
import json
import pathlib
import re
import subprocess
import tempfile
import unicodedata

import gguf

from unicode import RECENT

DATA = pathlib.Path(__file__).resolve().parents[1] / "data"
TEXTS = 250
MERGES = 1200
LONGEST = 64
# Written out, because the random texts have few of them.
MORE = ["", "Hello  WORLD's tokenIZER, it'LL be 12345.\n\n", "\n\n\n", " \n \n", "a/b //\n\r\n/x", "x = {y: [1234567, -8]};\t\t// done",
        "क्षि हिन्दी e\u0301tude", *(" " * n + "x" + " " * n for n in (2, 3, 4, 5, 8, 9, 16, 17, 513, 514)), "नमस्ते。你好，世界、テスト한국어…(a|b)", "\u00a0\u3000 \u2581 <0x0A>"]
KINDS = ["qwen35", "exaone-moe", "minicpm5", "laguna", "youtu", "kimi-k2", "bloom", "viking", "minimax-m2", "jais-2"]
CASED = ["youtu", "kimi-k2", "minimax-m2"]


def left_out(kind, text):
    """Where words are split at changes of case, llama.cpp knows the case of ASCII letters only, and takes marks for no letters."""
    unknown = lambda c: not c.isascii() and (c.lower() != c.upper() or unicodedata.category(c).startswith("M"))
    return kind in CASED and any(map(unknown, text))


def byte_chars():
    """GPT-2's printable characters for bytes."""
    itself = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    others = (chr(0x100 + i) for i in range(256))
    return [chr(b) if b in itself else next(others) for b in range(256)]


def merges(words, count):
    """The most frequent pairs, one after the other, as in Sennrich et al. (2016)."""
    words, found = [list(word) for word in words], []
    for _ in range(count):
        pairs = collections.Counter(pair for word in words for pair in zip(word, word[1:]) if len("".join(pair)) <= LONGEST)
        pair = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if pairs[pair] < 2:
            break
        found.append(pair)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == pair:
                    word[i:i + 2] = ["".join(pair)]
                i += 1
    return found


def write(path, model, pre, tokens, kinds, pairs, scores=None):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if scores:
        writer.add_token_scores(scores)
    else:
        writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_bos_token_id(tokens.index("<bos>"))
    writer.add_eos_token_id(tokens.index("<eos>"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=pathlib.Path)
    program = parser.parse_args().program
    out = DATA / "bpe"
    out.mkdir(exist_ok=True)
    texts = MORE + json.loads((DATA / "unicode/texts.json").read_text())[:TEXTS]
    special = ["<bos>", "<eos>"]

    def ids(kind, path):
        run = subprocess.run([program, path], input="".join(text.encode().hex() + "\n" for text in texts), capture_output=True,
                             text=True, check=True)
        known = [not any(first <= ord(c) < end for c in text for first, end in RECENT) and not left_out(kind, text) for text in texts]
        lines = [line if known else "-" for line, known in zip(run.stdout.split("\n"), known)]
        (out / f"{kind}.ids").write_text("".join(line + "\n" for line in lines))

    (out / "texts.json").write_text("[" + ",\n".join(map(json.dumps, texts)) + "]\n")
    chars = byte_chars()
    pairs = merges(["".join(chars[b] for b in text.encode()) for text in texts], MERGES)
    tokens = special + chars + ["".join(pair) for pair in pairs]
    tokens = list(dict.fromkeys(tokens))
    kinds = [3 if token in special else 1 for token in tokens]
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            path = pathlib.Path(folder, "bytes.gguf")
            write(path, "gpt2", kind, tokens, kinds, pairs)
            ids(kind, path)
    write(out / "bytes.gguf", "gpt2", KINDS[0], tokens, kinds, pairs)

    # Few characters have tokens, so some are spelled as bytes. Runs of line ends are tokens that no merge makes.
    spaced = [line.replace(" ", "\u2581") for text in texts for line in text.split("\n")]
    counts = collections.Counter("".join(spaced))
    known = sorted(c for c in counts if counts[c] > 1 or c.isascii())
    pairs = merges([part for line in spaced for part in re.split(f"[^{re.escape(''.join(known))}]", line)], MERGES // 2)
    all_bytes = [f"<0x{b:02X}>" for b in range(256)]
    tokens = special + all_bytes + ["\n", "\n\n", "\n\n\n"] + known + ["".join(pair) for pair in pairs]
    tokens = list(dict.fromkeys(tokens))
    kinds = [3 if token in special else 6 if token in all_bytes else 1 for token in tokens]
    write(out / "text.gguf", "gemma4", None, tokens, kinds, pairs)
    ids("gemma4", out / "text.gguf")

    # PLaMo's scores are log-probabilities; here, some are equal, so that the longer token is chosen.
    pieces = known + ["".join(pair) for pair in merges(texts, MERGES // 2)]
    tokens = list(dict.fromkeys(["<unk>", *special, "<pad>", *all_bytes, *pieces]))
    kinds = [2 if token == "<unk>" else 3 if token in special + ["<pad>"] else 6 if token in all_bytes else 1 for token in tokens]
    scores = [-8.0 - (0.25 * (at % 7) if kind == 1 else 0.0) for at, kind in enumerate(kinds)]
    write(out / "plamo2.gguf", "plamo2", None, tokens, kinds, [], scores)
    ids("plamo2", out / "plamo2.gguf")


if __name__ == "__main__":
    main()
