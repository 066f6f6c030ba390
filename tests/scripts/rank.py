#!/usr/bin/env python3
"""Writes two small rerankers of random weights, an encoder and a decoder, and what llama.cpp says of some pairs, for tests/rank.rs.

    pip install gguf numpy
    rank.py RANK            the committed files: tests/data/rank; RANK is the program of llama_rank.cpp

Both have the vocabulary of tests/data/unigram.gguf. The encoder has the tensors and keys of a BAAI/bge-reranker, the decoder
those of a Qwen3-Reranker, whose two labels are "yes" and "no". llama.cpp computes BERT's GELU by its tanh form and to half
precision, so scores of the encoder are also computed here, in double precision.
"""

import argparse
import json
import math
import pathlib
import subprocess

import gguf
import numpy as np

DATA = pathlib.Path(__file__).resolve().parents[1] / "data"
OUT = DATA / "rank"
PAIRS = [
    ["Who may use the Work?", "You may use the Work."],
    ["Who may use the Work?", "the names of others"],
    ["Who may use the Work?", ""],
    ["{braces", "a {file} in braces"],
    ["a", "the License " * 20],
]
TEMPLATE = "Rate { judge }: {query}\nWork: {document}\nScore"
DIM, HEADS, HIDDEN, LAYERS, CONTEXT = 32, 2, 48, 2, 192


def vocabulary(writer):
    """The vocabulary, with the tokens of XLM-R around texts."""
    reader = gguf.GGUFReader(DATA / "unigram.gguf")
    field = {name: field.contents() for name, field in reader.fields.items()}
    tokens = field["tokenizer.ggml.tokens"] + ["<s>", "</s></s>"]
    writer.add_tokenizer_model("t5")
    writer.add_token_list(tokens)
    writer.add_token_scores(list(field["tokenizer.ggml.scores"]) + [0.0, 0.0])
    writer.add_token_types(list(field["tokenizer.ggml.token_type"]) + [3, 3])
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_sep_token_id(len(tokens) - 1)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    writer.add_add_sep_token(True)
    for name in ["add_space_prefix", "remove_extra_whitespaces"]:
        if f"tokenizer.ggml.{name}" in field:
            writer.add_bool(f"tokenizer.ggml.{name}", bool(field[f"tokenizer.ggml.{name}"]))
    if "tokenizer.ggml.precompiled_charsmap" in field:
        writer.add_precompiled_charsmap(bytes(field["tokenizer.ggml.precompiled_charsmap"]))
    return len(tokens)


class Writer:
    def __init__(self, name, arch, seed):
        self.path, self.rng, self.tensors = OUT / f"{name}.gguf", np.random.default_rng(seed), {}
        self.w = gguf.GGUFWriter(self.path, arch)
        self.w.add_name(f"random {name}")
        self.w.add_context_length(CONTEXT)
        self.w.add_embedding_length(DIM)
        self.w.add_block_count(LAYERS)
        self.w.add_feed_forward_length(HIDDEN)
        self.w.add_head_count(HEADS)
        self.w.add_pooling_type(gguf.PoolingType.RANK)
        self.vocab = vocabulary(self.w)

    def add(self, name, values):
        self.tensors[name] = values.astype(np.float32)
        self.w.add_tensor(name, self.tensors[name])

    def tensor(self, name, *shape):
        self.add(name, self.rng.normal(size=shape) * 0.4)

    def linear(self, name, rows, cols, bias=True):
        self.tensor(f"{name}.weight", rows, cols)
        if bias:
            self.tensor(f"{name}.bias", rows)

    def norm(self, name, cols, bias=True):
        self.add(f"{name}.weight", 1 + 0.2 * self.rng.normal(size=cols))
        if bias:
            self.tensor(f"{name}.bias", cols)

    def close(self):
        self.w.write_header_to_file()
        self.w.write_kv_data_to_file()
        self.w.write_tensors_to_file()
        self.w.close()
        return self


def encoder():
    w = Writer("encoder", "bert", 1)
    w.w.add_causal_attention(False)
    w.w.add_layer_norm_eps(1e-5)
    w.w.add_token_type_count(1)
    w.tensor("token_embd.weight", w.vocab, DIM)
    w.tensor("token_types.weight", 1, DIM)
    w.tensor("position_embd.weight", CONTEXT, DIM)
    w.norm("token_embd_norm", DIM)
    for layer in range(LAYERS):
        at = f"blk.{layer}"
        for part in ["q", "k", "v", "output"]:
            w.linear(f"{at}.attn_{part}", DIM, DIM)
        w.norm(f"{at}.attn_output_norm", DIM)
        w.linear(f"{at}.ffn_up", HIDDEN, DIM)
        w.linear(f"{at}.ffn_down", DIM, HIDDEN)
        w.norm(f"{at}.layer_output_norm", DIM)
    w.linear("cls", DIM, DIM)
    w.linear("cls.output", 1, DIM)
    return w.close()


def decoder():
    w, head = Writer("decoder", "qwen3", 2), 16
    w.w.add_head_count_kv(1)
    w.w.add_key_length(head)
    w.w.add_value_length(head)
    w.w.add_layer_norm_rms_eps(1e-6)
    w.w.add_rope_freq_base(1e6)
    w.w.add_classifier_output_labels(["yes", "no"])
    w.w.add_string("tokenizer.chat_template.rerank", TEMPLATE)
    w.tensor("token_embd.weight", w.vocab, DIM)
    for layer in range(LAYERS):
        at = f"blk.{layer}"
        w.norm(f"{at}.attn_norm", DIM, bias=False)
        w.linear(f"{at}.attn_q", HEADS * head, DIM, bias=False)
        w.linear(f"{at}.attn_k", head, DIM, bias=False)
        w.linear(f"{at}.attn_v", head, DIM, bias=False)
        w.norm(f"{at}.attn_q_norm", head, bias=False)
        w.norm(f"{at}.attn_k_norm", head, bias=False)
        w.linear(f"{at}.attn_output", DIM, HEADS * head, bias=False)
        w.norm(f"{at}.ffn_norm", DIM, bias=False)
        for part in ["gate", "up"]:
            w.linear(f"{at}.ffn_{part}", HIDDEN, DIM, bias=False)
        w.linear(f"{at}.ffn_down", DIM, HIDDEN, bias=False)
    w.norm("output_norm", DIM, bias=False)
    w.tensor("cls.output.weight", 2, DIM)
    return w.close()


def score_of_encoder(tensors, tokens):
    w = {name: values.astype(np.float64) for name, values in tensors.items()}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["token_embd.weight"][tokens] + w["position_embd.weight"][: len(tokens)] + w["token_types.weight"][0]
    x = norm("token_embd_norm", x)
    for layer in range(LAYERS):
        at = f"blk.{layer}"
        q, k, v = (linear(f"{at}.attn_{part}", x).reshape(len(tokens), HEADS, -1).swapaxes(0, 1) for part in "qkv")
        shares = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]))
        shares /= shares.sum(-1, keepdims=True)
        x = norm(f"{at}.attn_output_norm", x + linear(f"{at}.attn_output", (shares @ v).swapaxes(0, 1).reshape(x.shape)))
        y = linear(f"{at}.ffn_up", x)
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        x = norm(f"{at}.layer_output_norm", x + linear(f"{at}.ffn_down", y))
    return float(linear("cls.output", np.tanh(linear("cls", x[0])))[0])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("rank", type=pathlib.Path)
    args = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    expected = {}
    for model in [encoder(), decoder()]:
        rows = []
        for query, document in PAIRS:
            run = subprocess.run([args.rank, model.path, query, document], check=True, capture_output=True, text=True)
            score, *tokens = run.stdout.split()
            row = {"query": query, "document": document, "score": float(score), "tokens": list(map(int, tokens))}
            if model.path.stem == "encoder":
                row["exact"] = score_of_encoder(model.tensors, row["tokens"])
            rows.append(row)
        expected[model.path.stem] = rows
    (OUT / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


main()
