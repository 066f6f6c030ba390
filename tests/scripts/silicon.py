#!/usr/bin/env python3
"""Measured kernels of GPUs, from the wheel aiconfigurator-core 0.12.0 (pip install pyarrow pandas; pip download --no-deps).

    silicon.py WHEEL            rewrites the extracts in backends/sim/tests/data/silicon: some points of each shape, at random
    silicon.py WHEEL --all DIR  writes all points, for `halite calibrate --fit`
"""

import argparse
import io
import pathlib
import zipfile

import pandas as pd

OUT = pathlib.Path(__file__).resolve().parents[2] / "backends/sim/tests/data/silicon"
ROOT = "aiconfigurator_core/systems/data/"
MATMUL = {
    "h100-matmul": "h100_sxm/gemm/trtllm/1.3.0rc20/gemm_perf.parquet",
    "a100-matmul": "a100_sxm/gemm/vllm/0.14.0/gemm_perf.parquet",
}
ATTENTION = {
    "h100-attention": ("h100_sxm/attention/vllm/0.24.0/generation_attention_perf.parquet", "vllm_flash_attn_fa3"),
    "h100-attention-sglang": ("h100_sxm/attention/sglang/0.5.14/generation_attention_perf.parquet", "fa3"),
    "h100-attention-trtllm": ("h100_sxm/attention/trtllm/1.3.0rc20/generation_attention_perf.parquet", "torch_flow"),
}
# What the extracts hold; the other sets are for `--all`.
EXTRACTS = {"h100-matmul": 4, "a100-matmul": 4, "h100-attention": 18}


def matmul(table):
    table = table[table.gemm_dtype == "bfloat16"]
    return table[["m", "n", "k"]].assign(seconds=table.latency * 1e-3), ["n", "k"]


def attention(table, kernel):
    table = table[(table.attn_dtype == "bfloat16") & (table.kv_cache_dtype == "bfloat16")]
    table = table[(table.kernel_source == kernel) & (table.window_size == 0)]
    # The new token attends to itself too.
    out = pd.DataFrame(
        {
            "batch": table.batch_size,
            "heads": table.num_heads,
            "kv_heads": table.num_key_value_heads,
            "head_dim": table.head_dim,
            "kv_len": table.step + 1,
            "seconds": table.latency * 1e-3,
        }
    )
    return out.drop_duplicates(out.columns[:-1]), ["heads", "kv_heads", "head_dim"]


def write(folder, name, op, path, points, shape):
    points = points.sort_values(list(points.columns[:-1]))
    points.insert(0, "op", op)
    points.insert(len(points.columns) - 1, "activations", "bf16")
    points.insert(len(points.columns) - 1, "weights", "bf16")
    points["seconds"] = points.seconds.map("{:.4e}".format)
    with open(folder / f"{name}.csv", "w") as file:
        file.write(f"# From aiconfigurator-core 0.12.0, {path}; see README.md.\n")
        points.to_csv(file, index=False)
    print(name, len(points), "points,", points.groupby(shape).ngroups, "shapes")


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("wheel", type=pathlib.Path)
    arguments.add_argument("--all", type=pathlib.Path)
    arguments = arguments.parse_args()
    wheel = zipfile.ZipFile(arguments.wheel)
    read = lambda path: pd.read_parquet(io.BytesIO(wheel.read(ROOT + path)))
    sets = {name: ("matmul", path, matmul(read(path))) for name, path in MATMUL.items()}
    for name, (path, kernel) in ATTENTION.items():
        sets[name] = ("attention", path, attention(read(path), kernel))
    for name, (op, path, (points, shape)) in sets.items():
        if arguments.all:
            write(arguments.all, name, op, path, points, shape)
        elif name in EXTRACTS:
            some = points.groupby(shape).sample(EXTRACTS[name], random_state=1)
            write(OUT, name, op, path, some.copy(), shape)


if __name__ == "__main__":
    main()
