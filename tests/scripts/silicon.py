#!/usr/bin/env python3
"""Measured kernels of GPUs, from the wheel aiconfigurator-core 0.12.0 (pip install pyarrow pandas; pip download --no-deps).

    silicon.py WHEEL            rewrites the extracts in backends/sim/tests/data/silicon: some points of each shape, at random, and
                                in chips/ some of each chip
    silicon.py WHEEL --all DIR  writes all points, for `halite calibrate --fit`
"""

import argparse
import io
import pathlib
import zipfile

import pandas as pd

OUT = pathlib.Path(__file__).resolve().parents[2] / "backends/sim/tests/data/silicon"
ROOT = "aiconfigurator_core/systems/data/"
CUTLASS = "moe_torch_flow_cutlass"
H100 = "h100_sxm/{}/trtllm/1.3.0rc20/{}_perf.parquet"
H100_VLLM = "h100_sxm/{}/vllm/0.24.0/{}_perf.parquet"
H100_SGLANG = "h100_sxm/{}/sglang/0.5.14/{}_perf.parquet"
A100 = "a100_sxm/{}/vllm/0.14.0/{}_perf.parquet"
A100_TRTLLM = "a100_sxm/{}/trtllm/1.0.0/{}_perf.parquet"
A100_SGLANG = "a100_sxm/{}/sglang/0.5.10/{}_perf.parquet"
# Name, op, file, formats of activations and weights, and the rows of the file.
SETS = [
    ("h100-matmul", "matmul", H100, "bf16", "bf16", {"gemm_dtype": "bfloat16"}),
    ("h100-fp8", "matmul", H100, "fp8_e4m3", "fp8_e4m3", {"gemm_dtype": "fp8"}),
    ("h100-fp8-vllm", "matmul", H100_VLLM, "fp8_e4m3", "fp8_e4m3", {"gemm_dtype": "fp8"}),
    ("h100-fp8-block", "matmul", H100, "fp8_e4m3", "fp8_e4m3", {"gemm_dtype": "fp8_block"}),
    (
        "h100-w8a16",
        "matmul",
        "h100_sxm/{}/sglang/0.5.6.post2/{}_perf.parquet",
        "bf16",
        "int8",
        {"gemm_dtype": "int8_wo"},
    ),
    ("a100-matmul", "matmul", A100, "bf16", "bf16", {"gemm_dtype": "bfloat16"}),
    ("a100-int8", "matmul", A100_TRTLLM, "int8", "int8", {"gemm_dtype": "sq"}),
    ("a100-w8a16", "matmul", A100_TRTLLM, "bf16", "int8", {"gemm_dtype": "int8_wo"}),
    ("a100-w4a16", "matmul", A100_TRTLLM, "bf16", "int4", {"gemm_dtype": "int4_wo"}),
    ("h100-attention", "attention", H100_VLLM, "bf16", "bf16", {"kernel_source": "vllm_flash_attn_fa3"}),
    ("h100-attention-fp8", "attention", H100_VLLM, "bf16", "fp8_e4m3", {"kernel_source": "vllm_flash_attn_fa3"}),
    ("h100-attention-sglang", "attention", H100_SGLANG, "bf16", "bf16", {"kernel_source": "fa3"}),
    ("h100-attention-trtllm", "attention", H100, "bf16", "bf16", {}),
    ("a100-attention", "attention", A100, "bf16", "bf16", {}),
    ("a100-attention-sglang", "attention", A100_SGLANG, "bf16", "bf16", {}),
    ("h100-prefill", "prefill", H100_VLLM, "bf16", "bf16", {"kernel_source": "vllm_flash_attn_fa3"}),
    ("h100-prefill-sglang", "prefill", H100_SGLANG, "bf16", "bf16", {"kernel_source": "fa3"}),
    ("h100-prefill-trtllm", "prefill", H100, "bf16", "bf16", {}),
    ("a100-prefill", "prefill", A100, "bf16", "bf16", {}),
    ("a100-prefill-sglang", "prefill", A100_SGLANG, "bf16", "bf16", {}),
    ("h100-experts", "experts", H100, "bf16", "bf16", {"moe_dtype": "bfloat16", "kernel_source": CUTLASS}),
    ("h100-experts-vllm", "experts", H100_VLLM, "bf16", "bf16", {"moe_dtype": "bfloat16"}),
    ("h100-experts-fp8", "experts", H100, "fp8_e4m3", "fp8_e4m3", {"moe_dtype": "fp8", "kernel_source": CUTLASS}),
    ("h100-experts-mxfp4", "experts", H100_VLLM, "bf16", "mxfp4", {"moe_dtype": "w4a16_mxfp4"}),
    ("a100-experts", "experts", A100_SGLANG, "bf16", "bf16", {"moe_dtype": "bfloat16"}),
    ("a100-experts-w4a16", "experts", A100_SGLANG, "bf16", "int4", {"moe_dtype": "int4_wo"}),
]
FILES = {
    "matmul": ("gemm", "gemm"),
    "attention": ("attention", "generation_attention"),
    "prefill": ("attention", "context_attention"),
    "experts": ("moe", "moe"),
}
# What the extracts hold; the other sets are for `--all`.
EXTRACTS = {"h100-matmul": 4, "a100-matmul": 4, "h100-attention": 18}
# Chips beside each other: the folder, and the stack of each op. Kernels are those that the stack chose, if several are named.
TRTLLM, VLLM, SGLANG = "trtllm/1.3.0rc20", "vllm/0.24.0", "sglang/0.5.14"
CHIPS = {
    "a100": ("a100_sxm", "trtllm/1.0.0", "sglang/0.5.10", "sglang/0.5.10"),
    "h100": ("h100_sxm", TRTLLM, VLLM, VLLM),
    "h200": ("h200_sxm", TRTLLM, VLLM, VLLM),
    "b200": ("b200_sxm", TRTLLM, VLLM, VLLM),
    "l40s": ("l40s", TRTLLM, VLLM, VLLM),
    "rtx-pro-6000": ("rtx_pro_6000_server", TRTLLM, VLLM, VLLM),
    "b60": ("b60", "vllm/0.26.0", "vllm/0.26.0", None),
}
# Op, place of its stack in a row of `CHIPS`, format, and the rows of the file.
CHIP_SETS = [
    ("matmul", 1, "bf16", {"gemm_dtype": "bfloat16"}),
    ("matmul", 1, "fp8_e4m3", {"gemm_dtype": "fp8"}),
    ("attention", 2, "bf16", {}),
    ("prefill", 2, "bf16", {}),
    ("experts", 3, "bf16", {"moe_dtype": "bfloat16"}),
]
# Chips that multiply 8-bit floats by unpacking them.
WITHOUT_FP8 = ["a100", "b60"]
CHIP_POINTS = 90


def matmul(table):
    return table[["m", "n", "k"]], ["n", "k"]


def heads(table):
    return {"heads": table.num_heads, "kv_heads": table.num_key_value_heads, "head_dim": table.head_dim}


def attention(table):
    # The new token attends to itself too.
    points = {"batch": table.batch_size, **heads(table), "kv_len": table.step + 1}
    return pd.DataFrame(points), ["heads", "kv_heads", "head_dim"]


def prefill(table):
    tokens, start = table.isl, table.step
    seen = tokens * start + tokens * (tokens + 1) // 2
    points = {"batch": table.batch_size, **heads(table), "tokens": tokens, "kv_len": start + tokens, "seen": seen}
    return pd.DataFrame(points), ["heads", "kv_heads", "head_dim"]


def experts(table):
    # Balanced: as many experts as possible are chosen, each as often as the others.
    rows = table.num_tokens * table.topk
    used = rows.clip(upper=table.num_experts)
    hidden = table.inter_size // table.moe_tp_size
    points = {"experts": used, "rows": rows, "columns": table.hidden_size, "hidden": hidden}
    return pd.DataFrame(points), ["columns", "hidden"]


def chosen(table, op, weights, rows):
    if op in ("attention", "prefill"):
        rows = {"attn_dtype": "bfloat16", "kv_cache_dtype": "fp8" if weights != "bf16" else "bfloat16", **rows}
        if "window_size" in table:
            rows["window_size"] = 0
    if op == "experts":
        rows = {"distribution": "balanced", "moe_ep_size": 1, **rows}
        # These models have no gate: two matrices an expert, not three.
        table = table[(table.topk < 16) & (table.hidden_size != 2688)]
    for column, value in rows.items():
        table = table[table[column] == value]
    points, shape = globals()[op](table)
    points["seconds"] = table.latency * 1e-3
    return points.drop_duplicates(points.columns[:-1]), shape


def exchanges(wheel, folder):
    """Exchanges between chips: NCCL's rings, and TensorRT-LLM's sums, which may be direct. Values have two bytes."""
    for chip, nccl, trtllm in [("h100", "2.29.2", "1.3.0rc20"), ("a100", "2.27.3", "1.0.0")]:
        root = f"{ROOT}{chip}_sxm/comm/"
        read = lambda path: pd.read_parquet(io.BytesIO(wheel.read(root + path)))
        rings = read(f"nccl/{nccl}/nccl_perf.parquet")
        rings = rings[rings.nccl_dtype == "half"].replace({"op_name": {"alltoall": "all_to_all"}})
        sums = read(f"trtllm/{trtllm}/custom_allreduce_perf.parquet").assign(op_name="direct_all_reduce")
        table = pd.concat([rings, sums])
        table = table[table.num_gpus <= 8]
        points = pd.DataFrame({"op": table.op_name, "chips": table.num_gpus, "bytes": 2 * table.message_size})
        points["seconds"] = (table.latency * 1e-3).map("{:.4e}".format)
        with open(folder / f"{chip}-exchanges.csv", "w") as file:
            file.write(f"# From aiconfigurator-core 0.12.0, NCCL {nccl} and TensorRT-LLM {trtllm}\n")
            points.sort_values(["op", "chips", "bytes"]).to_csv(file, index=False)
        print(f"{chip}-exchanges", len(points), "points")


def chips(wheel):
    """Some points of each chip, in a file each: for the errors on chips that constants were not fitted to."""
    (OUT / "chips").mkdir(exist_ok=True)
    for name, (folder, *stacks) in CHIPS.items():
        parts, paths = [], []
        for op, place, dtype, rows in CHIP_SETS:
            stack = stacks[place - 1]
            if stack is None or (dtype != "bf16" and name in WITHOUT_FP8):
                continue
            family, file = FILES[op]
            path = f"{folder}/{family}/{stack}/{file}_perf.parquet"
            table = pd.read_parquet(io.BytesIO(wheel.read(ROOT + path)))
            points, _ = chosen(table, op, dtype, rows)
            points = points.sample(CHIP_POINTS, random_state=1).sort_values(list(points.columns[:-1]))
            points.insert(0, "op", op)
            parts.append(points.assign(activations=dtype, weights=dtype))
            if path not in paths:
                paths.append(path)
        points = pd.concat(parts)
        points = points[[c for c in points if c != "seconds"] + ["seconds"]]
        numbers = points.select_dtypes("number").columns.drop("seconds")
        points[numbers] = points[numbers].astype("Int64")
        points["seconds"] = points.seconds.map("{:.4e}".format)
        with open(OUT / "chips" / f"{name}.csv", "w") as file:
            file.write("".join(f"# From aiconfigurator-core 0.12.0, {path}; see ../README.md.\n" for path in paths))
            points.to_csv(file, index=False)
        print(name, points.groupby(["op", "weights"]).size().to_dict())


def write(folder, name, op, path, formats, points, shape):
    points = points.sort_values(list(points.columns[:-1]))
    points.insert(0, "op", op)
    for column, dtype in zip(["activations", "weights"], formats):
        points.insert(len(points.columns) - 1, column, dtype)
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
    for name, op, path, activations, weights, rows in SETS:
        if not arguments.all and name not in EXTRACTS:
            continue
        path = path.format(*FILES[op])
        table = pd.read_parquet(io.BytesIO(wheel.read(ROOT + path)))
        points, shape = chosen(table, op, weights, rows)
        if not arguments.all:
            points = points.groupby(shape).sample(EXTRACTS[name], random_state=1)
        write(arguments.all or OUT, name, op, path, (activations, weights), points, shape)
    if arguments.all:
        exchanges(wheel, arguments.all)
    else:
        chips(wheel)


if __name__ == "__main__":
    main()
