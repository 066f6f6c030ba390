#!/usr/bin/env python3
"""Halite against llama.cpp on the same files, threads and tests, in turns; see benches/README.md."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path


def numbers(text):
    return [int(part) for part in text.split(",")]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path, metavar="FILE", help="GGUF files")
    parser.add_argument("--llama-bench", required=True, metavar="PATH", help="llama.cpp's llama-bench")
    parser.add_argument("--halite", default="target/release/halite", metavar="PATH", help="default: %(default)s")
    parser.add_argument("-p", "--prompt", default="512", metavar="N,…", help="prompt lengths (default: %(default)s)")
    parser.add_argument("-n", "--generate", default="64", metavar="N,…", help="tokens to generate (default: %(default)s)")
    parser.add_argument("-d", "--depth", default="0", metavar="N,…", help="tokens in the cache (default: %(default)s)")
    parser.add_argument("-t", "--threads", default="1,2", metavar="N,…", help="default: %(default)s")
    parser.add_argument("-r", "--repetitions", type=int, default=2, metavar="N", help="in each round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("-o", "--out", type=Path, default=Path("target/compare.json"), metavar="FILE", help="raw numbers (default: %(default)s)")
    return parser.parse_args()


def contestants(args):
    """Name, command line, and how a result of its JSON is read: (prompt, generated, depth, tokens per second of each repetition)."""
    llama = lambda row: (row["n_prompt"], row["n_gen"], row["n_depth"], row["samples_ts"])

    def halite(row):
        prompt, generated = row["prompt_tokens"], row["generated_tokens"]
        return prompt, generated, row["depth"], [(prompt + generated) / s for s in row["seconds"]]

    return [
        ("llama.cpp, flash attention", [args.llama_bench, "-fa", "1"], llama),
        ("llama.cpp", [args.llama_bench, "-fa", "0"], llama),
        ("halite", [args.halite, "bench", "--no-roofline"], halite),
    ]


def run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit code {result.returncode}\n{result.stderr}")
    return json.loads(result.stdout)


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def measure(args):
    """One record for each result of each process."""
    records = []
    everyone = contestants(args)
    for turn in range(args.rounds):
        # Nobody is always first, so that a machine that warms up or is busy for a while treats all alike.
        first = turn % len(everyone)
        for model in args.models:
            for threads in numbers(args.threads):
                for name, command, read in everyone[first:] + everyone[:first]:
                    command = command + ["-m", str(model), "-t", str(threads), "-p", args.prompt, "-n", args.generate]
                    command += ["-d", args.depth, "-r", str(args.repetitions), "-o", "json"]
                    print(f"round {turn + 1} of {args.rounds}: {name}, {model.name}, {threads} threads", file=sys.stderr)
                    load = os.getloadavg()[0]
                    for row in run(command):
                        prompt, generated, depth, speeds = read(row)
                        test = f"pp{prompt}" if prompt else f"tg{generated}"
                        test += f" @ d{depth}" if depth else ""
                        records.append({
                            "round": turn, "model": model.name, "threads": threads, "test": test, "name": name,
                            "load_before": load, "tokens_per_s": speeds,
                        })
    return records


def table(records):
    speeds = {}
    for r in records:
        case = speeds.setdefault((r["model"], r["test"], r["threads"]), {})
        case.setdefault(r["name"], []).extend(r["tokens_per_s"])
    shown = lambda values: f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
    lines = [
        "| model | test | threads | llama.cpp, tokens/s | flash attention | Halite, tokens/s | ratio |",
        "| :---- | :--- | ------: | ------------------: | :-------------: | ---------------: | ----: |",
    ]
    for (model, test, threads), case in sorted(speeds.items()):
        halite = case.pop("halite")
        best, other = max(case.items(), key=lambda item: statistics.median(item[1]))
        ratio = statistics.median(halite) / statistics.median(other)
        flash = "on" if "flash" in best else "off"
        lines.append(f"| {model} | {test} | {threads} | {shown(other)} | {flash} | {shown(halite)} | {ratio:.2f} |")
    return "\n".join(lines)


def main():
    args = arguments()
    records = measure(args)
    report = {"cpu": cpu_name(), "cores": os.cpu_count(), "rounds": args.rounds, "results": records}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
