#!/usr/bin/env python3
"""Checksums of the logits of model files on exact backends, to show that a change leaves all bits as they were.

    tests/scripts/bits.py HALITE [FILE…] >before      (without files: the built-in model)
    tests/scripts/bits.py HALITE [FILE…] | diff before -

A line is a SHA-256, a backend and a file. `--backends` chooses from cpu, reference and sim:NAME; large files are left out on all
but the CPU.
"""
import argparse
import hashlib
import os
import subprocess
import tempfile

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("halite", help="the binary")
parser.add_argument("files", nargs="*", help="GGUF files")
parser.add_argument("--backends", default="cpu,reference,sim:maia-100")
parser.add_argument("--slow-limit-mib", type=int, default=16, help="largest file for backends other than the CPU")
args = parser.parse_args()

tokens = ",".join(str((7 * i + 1) % 100) for i in range(20))
with tempfile.TemporaryDirectory() as folder:
    for file in args.files or [None]:
        size = os.path.getsize(file) if file else 0
        for backend in args.backends.split(","):
            if backend != "cpu" and size > args.slow_limit_mib << 20:
                continue
            out = os.path.join(folder, "logits")
            command = [args.halite, "logits", "--tokens", tokens, "-o", out, "--backend", backend]
            run = subprocess.run(command + (["-m", file] if file else []), capture_output=True, text=True)
            if run.returncode != 0:
                digest = run.stderr.strip().splitlines()[-1:]
            else:
                with open(out, "rb") as logits:
                    digest = hashlib.sha256(logits.read()).hexdigest()
                os.remove(out)
            print(digest, backend, os.path.basename(file) if file else "built-in", flush=True)
