#!/usr/bin/env python3
"""Halite against other programs on the same files, threads and tests, in turns; see benches/README.md."""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HALITE, PACKED = "Halite", "Halite, packed"
CONTEXT_STEP = 256


def numbers(text):
    return [int(part) for part in text.split(",")]


def peer(text):
    name, equals, command = text.partition("=")
    if not equals or not command.strip():
        raise argparse.ArgumentTypeError(f"`{text}`: expected NAME=PROGRAM FLAGS, such as 'llama.cpp=build/bin/llama-bench -fa 1'")
    return name, shlex.split(command)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path, metavar="FILE", help="GGUF files")
    parser.add_argument("--peer", type=peer, action="append", default=[], metavar="NAME=PROGRAM FLAGS", help="a llama-bench or llama-batched-bench program with its flags; may be repeated, two programs of one name share a column")
    parser.add_argument("--halite", default="target/release/halite", metavar="PATH", help="default: %(default)s")
    parser.add_argument("--packed", action="store_true", help="measure Halite on packed files too (`halite pack`, in a temporary folder)")
    parser.add_argument("-p", "--prompt", default="512", metavar="N,…", help="prompt lengths (default: %(default)s)")
    parser.add_argument("-n", "--generate", default="64", metavar="N,…", help="tokens to generate (default: %(default)s)")
    parser.add_argument("-s", "--sequences", default="", metavar="N,…", help="sequences that generate together (default: none; peers need llama-batched-bench)")
    parser.add_argument("-d", "--depth", default="0", metavar="N,…", help="tokens in the cache (default: %(default)s)")
    parser.add_argument("-t", "--threads", default="1,2", metavar="N,…", help="default: %(default)s")
    parser.add_argument("-r", "--repetitions", type=int, default=2, metavar="N", help="in each round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("-o", "--out", type=Path, default=Path("target/compare.json"), metavar="FILE", help="raw numbers (default: %(default)s)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="also draw the ratios (needs matplotlib)")
    return parser.parse_args()


def of_llama_bench(row):
    """Prompt, generated tokens, sequences, depth, tokens per second of each repetition."""
    return row["n_prompt"], row["n_gen"], 1, row.get("n_depth", 0), row["samples_ts"]


def of_batched_bench(row):
    return 0, row["tg"], row["pl"], row["pp"], [row["speed_tg"]]


def of_halite(row):
    prompt, generated, sequences = row["prompt_tokens"], row["generated_tokens"], row["sequences"]
    return prompt, generated, sequences, row["depth"], [(prompt + generated) * sequences / s for s in row["seconds"]]


def single(args):
    """Flags of llama-bench and Halite for tests of one sequence."""
    flags = ["-p", args.prompt, "-n", args.generate, "-r", str(args.repetitions), "-o", "json"]
    # Not every program knows of depths.
    return flags + ([] if args.depth == "0" else ["-d", args.depth])


def batch_depths(args):
    """Depths of batches: llama-batched-bench needs a prompt."""
    return [max(1, depth) for depth in numbers(args.depth)]


def batches_of_halite(args):
    depths = ",".join(map(str, batch_depths(args)))
    return ["-p", "0", "-n", args.generate, "-s", args.sequences, "-d", depths, "-r", str(args.repetitions), "-o", "json"]


def batches_of_llama(args):
    depths, lengths, sequences = batch_depths(args), numbers(args.generate), numbers(args.sequences)
    flags = ["-npp", ",".join(map(str, depths)), "-ntg", args.generate, "-npl", args.sequences, "--output-format", "jsonl"]
    # The program rounds the positions of a sequence up, and aborts where its warm-up does not fit.
    positions = -(-(max(depths) + max(lengths)) // CONTEXT_STEP) * CONTEXT_STEP
    return flags + ["-c", str(max(sequences) * positions)]


def contestants(args, packed):
    """Name, command line, reader of a result, and which file it runs for a model."""
    everyone = []
    for name, command in args.peer:
        if "batched" not in Path(command[0]).name:
            everyone.append((name, command + single(args), of_llama_bench, lambda model: model))
        elif args.sequences:
            everyone.append((name, command + batches_of_llama(args), of_batched_bench, lambda model: model))
    halite = [args.halite, "bench", "--no-roofline"]
    for name, file in [(HALITE, lambda model: model)] + [(PACKED, packed.get)] * bool(packed):
        everyone.append((name, halite + single(args), of_halite, file))
        if args.sequences:
            everyone.append((name, halite + batches_of_halite(args), of_halite, file))
    return everyone


def run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{shlex.join(command)}: exit code {result.returncode}\n{result.stderr}")
    # A list, or a line for each result among other lines.
    if result.stdout.startswith("["):
        return json.loads(result.stdout)
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def pack(args, folder):
    packed = {}
    for i, model in enumerate(args.models):
        packed[model] = Path(folder) / f"{i}-{model.name}"
        subprocess.run([args.halite, "pack", str(model), str(packed[model])], check=True, capture_output=True)
    return packed


def measure(args, packed):
    """One record for each result of each process."""
    records = []
    everyone = contestants(args, packed)
    for turn in range(args.rounds):
        # Nobody is always first, so that a machine that warms up or is busy for a while treats all alike.
        first = turn % len(everyone)
        for model in args.models:
            for threads in numbers(args.threads):
                for name, command, read, file in everyone[first:] + everyone[:first]:
                    command = command + ["-m", str(file(model)), "-t", str(threads)]
                    print(f"round {turn + 1} of {args.rounds}: {name}, {model.name}, {threads} threads", file=sys.stderr)
                    load = os.getloadavg()[0]
                    for row in run(command):
                        prompt, generated, sequences, depth, speeds = read(row)
                        test = f"pp{prompt}" if prompt else f"tg{generated}"
                        test += f" x {sequences}" if sequences > 1 else ""
                        test += f" @ d{depth}" if depth else ""
                        records.append({
                            "round": turn, "model": model.name, "threads": threads, "test": test, "name": name,
                            "load_before": load, "tokens_per_s": speeds,
                        })
    return records


def cases(records):
    """For each model, test and number of threads, the tokens per second of each contestant."""
    speeds = {}
    for r in records:
        case = speeds.setdefault((r["model"], r["test"], r["threads"]), {})
        case.setdefault(r["name"], []).extend(r["tokens_per_s"])
    return sorted(speeds.items())


def table(records, peers):
    shown = lambda values: f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
    names = list(dict.fromkeys(r["name"] for r in records))
    names.sort(key=lambda name: (name.startswith(HALITE), name))
    head = ["model", "test", "threads", *(f"{name}, tokens/s" for name in names), *(f"ratio to {name}" for name in peers)]
    lines = ["| " + " | ".join(head) + " |", "| :-- | :-- |" + " --: |" * (len(head) - 2)]
    ratio = lambda case, name: f"{statistics.median(case[HALITE]) / statistics.median(case[name]):.2f}" if name in case else "-"
    for (model, test, threads), case in cases(records):
        cells = [model, test, str(threads), *(shown(case[name]) if name in case else "-" for name in names)]
        lines.append("| " + " | ".join(cells + [ratio(case, name) for name in peers]) + " |")
    return "\n".join(lines)


def plots():
    """matplotlib's pyplot. Asked for before anything is measured, so that no measurement is in vain."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("--svg: needs matplotlib (pip install matplotlib)")
    matplotlib.use("svg")
    from matplotlib import pyplot

    return pyplot


def draw(pyplot, records, peers, path):
    """Bars of Halite's median over each peer's."""
    rows = cases(records)
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.22 * len(rows) * max(1, len(peers))), layout="constrained")
    height = 0.8 / max(1, len(peers))
    for i, name in enumerate(peers):
        ratios = [statistics.median(case[HALITE]) / statistics.median(case[name]) if name in case else 0 for _, case in rows]
        axes.barh([row + i * height for row in range(len(rows))], ratios, height, label=f"to {name}")
    axes.set_yticks(
        [row + (len(peers) - 1) * height / 2 for row in range(len(rows))],
        [f"{model}, {test}, {threads} threads" for (model, test, threads), _ in rows],
    )
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"{HALITE}'s tokens/s over the other's, medians")
    axes.legend()
    figure.savefig(path)


def main():
    args = arguments()
    peers = list(dict.fromkeys(name for name, _ in args.peer))
    pyplot = plots() if args.svg else None
    with tempfile.TemporaryDirectory() as folder:
        packed = pack(args, folder) if args.packed else {}
        records = measure(args, packed)
    report = {"cpu": cpu_name(), "cores": os.cpu_count(), "rounds": args.rounds, "results": records}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(records, peers))
    if pyplot:
        draw(pyplot, records, peers, args.svg)


if __name__ == "__main__":
    main()
