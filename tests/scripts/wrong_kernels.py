#!/usr/bin/env python3
"""Measures which wrong kernels `halite certify` finds.

    wrong_kernels.py target/release/halite                      all of them, at the levels smoke and full
    wrong_kernels.py target/release/halite --only attend-       those whose names contain a text
    wrong_kernels.py target/release/halite --level smoke,full,soak --json found.json --jobs 8

Each wrong kernel is examples/chip-c/chip.c with a mistake from wrong_kernels.toml, built by the Makefile beside chip.c.
Levels contain each other, so a kernel that one level finds is not run at the next, unless with --every-level; its cell
then is `(yes)`. The table shows the first failing case, behaviour or model of the first level that finds the kernel.

It fails if chip.c itself is not certified, if a mistake does not fit chip.c any more, or if the level full does not
find a kernel that has no excuse.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import tomllib

MISTAKES = pathlib.Path(__file__).with_suffix(".toml")
ROOT = pathlib.Path(__file__).resolve().parents[2]
CHIP = ROOT / "examples" / "chip-c"
# The levels, and the seconds after which a check is taken to hang.
LEVELS = {"smoke": 300, "full": 1800, "soak": 10800}


def changed(text, mistake):
    """The text of chip.c with a mistake."""
    changes = [(mistake["old"], mistake["new"], mistake.get("count", 1))]
    changes += [(old, new, 1) for old, new in mistake.get("also", [])]
    for old, new, count in changes:
        found = text.count(old)
        if found != count:
            sys.exit(f"{mistake['name']}: expected this text {count} times in chip.c, found {found} times:\n{old}")
        text = text.replace(old, new)
    return text


def build(folder, text):
    """Builds a plug-in in a folder."""
    (folder / "chip.c").write_text(text)
    command = ["make", "-s", "-f", CHIP / "Makefile", f"HALITE={ROOT / 'include'}", "libchip.so"]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if made.returncode != 0:
        sys.exit(f"{folder.name} does not build:\n{made.stderr}")
    return folder / "libchip.so"


def first_fault(certificate):
    """What a certificate says is wrong, in the order of its lists."""
    for case in certificate["cases"]:
        if case["outcome"] in ("fail", "unexpected pass"):
            return case["name"]
    for row in certificate["behaviours"]:
        if row["verdict"] == "broken":
            return f"{row['behaviour']}: {row['with']}"
    for model in certificate["models"]:
        if model["outcome"] == "fail":
            return f"model {model['name']}"
    return "no certificate"


def certify(halite, plugin, level):
    """What `halite certify` finds; None if the plug-in is certified."""
    out = plugin.parent / level
    command = [halite, "certify", "--backend", f"plugin:{plugin}", "--level", level, "-o", out]
    try:
        ran = subprocess.run(command, capture_output=True, timeout=LEVELS[level])
    except subprocess.TimeoutExpired:
        return f"no end within {LEVELS[level]} s"
    if ran.returncode == 0:
        return None
    if ran.returncode < 0:
        return f"the process ends by {signal.Signals(-ran.returncode).name}"
    try:
        return first_fault(json.loads((out / "certificate.json").read_text()))
    except FileNotFoundError:
        return "no certificate: " + ran.stderr.decode(errors="replace").strip()[-200:]


def measure(halite, plugin, levels, every_level):
    """For each level that ran: what it found, and its seconds."""
    results = {}
    for level in levels:
        start = time.monotonic()
        found = certify(halite, plugin, level)
        results[level] = {"found": found, "seconds": round(time.monotonic() - start, 1)}
        if found and not every_level:
            break
    return results


def is_found(results, level):
    """Whether a level finds a kernel: by itself, or because a level that it contains does."""
    contained = list(LEVELS)[: list(LEVELS).index(level) + 1]
    return any(results.get(one, {}).get("found") for one in contained)


def cell(results, level):
    if level in results:
        return "yes" if results[level]["found"] else "**no**"
    return "(yes)"


def row(mistake, results, levels):
    found = [result["found"] for result in results.values() if result["found"]]
    by = found[0] if found else mistake.get("excuse", "")
    cells = [mistake["name"], mistake["op"], mistake["wrong"], *(cell(results, level) for level in levels), by]
    return "| " + " | ".join(cells) + " |"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("halite", type=pathlib.Path, help="the program")
    parser.add_argument("--level", default="smoke,full", help="levels, comma-separated (default: smoke,full)")
    parser.add_argument("--every-level", action="store_true", help="also run the levels above one that finds a kernel")
    parser.add_argument("--only", default="", metavar="NAME", help="only kernels whose names contain this")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the results as JSON")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="checks at the same time")
    given = parser.parse_args()
    given.halite = given.halite.resolve()
    given.level = given.level.split(",")
    if not set(given.level) <= set(LEVELS):
        parser.error(f"levels are {', '.join(LEVELS)}")
    given.level.sort(key=list(LEVELS).index)
    return given


def main():
    given = arguments()
    start = time.monotonic()
    right = (CHIP / "chip.c").read_text()
    mistakes = tomllib.loads(MISTAKES.read_text())["kernel"]
    names = [mistake["name"] for mistake in mistakes]
    if len(set(names)) < len(names):
        sys.exit("two kernels have one name")
    # Every mistake is tried, so that one that does not fit any more is noticed whatever runs.
    texts = [changed(right, mistake) for mistake in mistakes]
    chosen = [(m, text) for m, text in zip(mistakes, texts) if given.only in m["name"]]
    rows = []
    with tempfile.TemporaryDirectory() as temporary, concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        def run(name, text):
            folder = pathlib.Path(temporary) / name
            folder.mkdir()
            return measure(given.halite, build(folder, text), given.level, given.every_level)

        try:
            unchanged = pool.submit(run, "chip-c", right)
            pending = [(mistake, pool.submit(run, mistake["name"], text)) for mistake, text in chosen]
            for level, result in unchanged.result().items():
                if result["found"]:
                    sys.exit(f"chip.c itself is not certified at level {level}: {result['found']}")
            print("| kernel | op | what is wrong |", " | ".join(given.level), "| found by |")
            print("|---" * (4 + len(given.level)) + "|")
            for mistake, future in pending:
                results = future.result()
                print(row(mistake, results, given.level), flush=True)
                rows.append({key: mistake.get(key) for key in ("name", "op", "wrong", "excuse")} | {"levels": results})
        finally:
            pool.shutdown(cancel_futures=True)
    print()
    for level in given.level:
        count = sum(is_found(row["levels"], level) for row in rows)
        print(f"{level}: {count} of {len(rows)} found")
    print(f"{time.monotonic() - start:.0f} s")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    missed = [row for row in rows if "full" in given.level and not is_found(row["levels"], "full")]
    excused = [row["name"] for row in missed if row["excuse"]]
    if excused:
        print("missed with an excuse:", ", ".join(excused))
    unexpected = [row["name"] for row in missed if not row["excuse"]]
    if unexpected:
        sys.exit(f"not found at level full: {', '.join(unexpected)}")


if __name__ == "__main__":
    main()
