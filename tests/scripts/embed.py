#!/usr/bin/env python3
"""Writes a tiny BERT of random weights as a folder of safetensors, and what it makes of some texts in double precision, which
tests/embed.rs reads; or the vectors of a published model.

    pip install numpy safetensors tokenizers
    embed.py                                    the committed files: tests/data/bert
    embed.py --model FOLDER --out FILE.json     the vectors of a model, to set beside those of
                                                halite convert FOLDER model.gguf --format f32
                                                halite embed -m model.gguf --file TEXTS
    embed.py --model FOLDER --check FILE.json   how far what `halite embed` printed is off

The forward pass is BERT's (Devlin et al. 2019) with mean pooling (Reimers & Gurevych 2019); token ids are those of the package
`tokenizers`.
"""

import argparse
import json
import math
import pathlib

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import BertWordPieceTokenizer

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "data/bert"
TEXTS = [
    "a cat sat", "the dog sat on the mat", "", "Cats, dogs & mats!", "unknown xyzzy words", "Café — the cat's mat",
    "the " * 70 + "end", "mat",
]
WORDS = "the a cat dog sat on mat end cafe and ##s ##t ' , . ! & — x ##y ##z w ##o ##r ##d".split()


def erf(x):
    return np.vectorize(math.erf)(x)


def norm(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Bert:
    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        self.w = {k: v.astype(np.float64) for k, v in load_file(folder / "model.safetensors").items()}
        self.tokenizer = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True)
        about = folder / "sentence_bert_config.json"
        if about.exists():
            self.tokenizer.enable_truncation(json.loads(about.read_text())["max_seq_length"])

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, name, x):
        return norm(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], self.config["layer_norm_eps"])

    def hidden(self, ids):
        w, heads = self.w, self.config["num_attention_heads"]
        x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)]
        x = self.norm("embeddings.LayerNorm", x + w["embeddings.token_type_embeddings.weight"][0])
        for layer in range(self.config["num_hidden_layers"]):
            at = f"encoder.layer.{layer}"
            q, k, v = (
                self.linear(f"{at}.attention.self.{part}", x).reshape(len(ids), heads, -1).swapaxes(0, 1)
                for part in ["query", "key", "value"]
            )
            shares = softmax(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]))
            y = self.linear(f"{at}.attention.output.dense", (shares @ v).swapaxes(0, 1).reshape(x.shape))
            x = self.norm(f"{at}.attention.output.LayerNorm", x + y)
            y = self.linear(f"{at}.intermediate.dense", x)
            y = self.linear(f"{at}.output.dense", y * 0.5 * (1 + erf(y / math.sqrt(2))))
            x = self.norm(f"{at}.output.LayerNorm", x + y)
        return x

    def embed(self, text):
        ids = self.tokenizer.encode(text).ids
        mean = self.hidden(np.array(ids)).mean(0)
        return ids, mean / np.linalg.norm(mean)


def write_random(folder):
    rng = np.random.default_rng(1)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    hidden, wide, positions = 32, 64, 80
    config = {
        "model_type": "bert", "_name_or_path": "random BERT", "hidden_act": "gelu", "hidden_size": hidden,
        "intermediate_size": wide, "layer_norm_eps": 1e-12, "max_position_embeddings": positions,
        "num_attention_heads": 4, "num_hidden_layers": 2, "position_embedding_type": "absolute", "type_vocab_size": 2,
        "vocab_size": len(vocab),
    }
    shapes = {
        "embeddings.word_embeddings.weight": (len(vocab), hidden),
        "embeddings.position_embeddings.weight": (positions, hidden),
        "embeddings.token_type_embeddings.weight": (2, hidden),
        "embeddings.LayerNorm.weight": (hidden,), "embeddings.LayerNorm.bias": (hidden,),
    }
    for layer in range(2):
        linears = {
            "attention.self.query": (hidden, hidden), "attention.self.key": (hidden, hidden),
            "attention.self.value": (hidden, hidden), "attention.output.dense": (hidden, hidden),
            "intermediate.dense": (wide, hidden), "output.dense": (hidden, wide),
        }
        for name in ["attention.output.LayerNorm", "output.LayerNorm"]:
            shapes[f"encoder.layer.{layer}.{name}.weight"] = shapes[f"encoder.layer.{layer}.{name}.bias"] = (hidden,)
        for name, shape in linears.items():
            shapes[f"encoder.layer.{layer}.{name}.weight"] = shape
            shapes[f"encoder.layer.{layer}.{name}.bias"] = shape[:1]
    # Large enough that attention is far from even.
    weights = {
        name: (rng.normal(size=shape) * (0.3 if len(shape) == 2 else 0.1)
               + ("LayerNorm.weight" in name)).astype(np.float32)
        for name, shape in shapes.items()
    }
    weights["embeddings.position_ids"] = np.arange(positions)[None]
    weights["pooler.dense.bias"] = np.zeros(hidden, np.float32)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true, "strip_accents": null}\n')
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(
        '{"pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true}\n')
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--texts", type=pathlib.Path)
    parser.add_argument("--check", type=pathlib.Path)
    args = parser.parse_args()
    if not args.model:
        FOLDER.mkdir(parents=True, exist_ok=True)
        write_random(FOLDER)
    model = Bert(args.model or FOLDER)
    if args.check:
        got = json.loads(args.check.read_text())
        pairs = [(model.embed(text)[1], np.array(v)) for text, v in zip(got["texts"], got["embeddings"])]
        print("largest difference", max(abs(a - b).max() for a, b in pairs))
        print("smallest cosine", min(a @ b / np.linalg.norm(b) for a, b in pairs))
        return
    texts = args.texts.read_text().splitlines() if args.texts else TEXTS
    lines = []
    for text in texts:
        ids, vector = model.embed(text)
        lines.append(json.dumps({"text": text, "ids": ids, "vector": [round(x, 9) for x in vector.tolist()]}))
    (args.out or FOLDER / "expected.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
