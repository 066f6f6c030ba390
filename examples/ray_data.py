#!/usr/bin/env python3
"""Texts after many prompts, on a Ray cluster: each actor of a pool starts a server of its own. Writes a line of JSON for each prompt, in
order.

    HALITE=/usr/local/bin/halite examples/ray_data.py prompts.jsonl -o texts.jsonl --servers 4

Lines of files that end with .jsonl are objects with a `prompt`. Lines of other files are prompts. HALITE_ARGS are arguments of
`halite serve`. Nodes get these variables with `ray start`."""
import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.request

import ray


class Server:
    def __init__(self, options):
        command = [os.environ.get("HALITE", "halite"), "serve", "--listen", "127.0.0.1:0", *shlex.split(os.environ.get("HALITE_ARGS", ""))]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        line = next((line for line in self.process.stderr if " at http://" in line), None)
        if not line:
            raise RuntimeError(f"halite ended with {self.process.wait()}")
        # The pipe must not fill.
        threading.Thread(target=shutil.copyfileobj, args=(self.process.stderr, sys.stderr), daemon=True).start()
        self.address = line.split(" at ")[1].strip()
        self.options = options
        self.node = ray.get_runtime_context().get_node_id()

    def __call__(self, batch):
        body = json.dumps(self.options | {"prompt": list(batch["prompt"]), "temperature": 0}).encode()
        request = urllib.request.Request(f"{self.address}/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            choices = json.load(answer)["choices"]
        batch["text"] = [choice["text"] for choice in sorted(choices, key=lambda choice: choice["index"])]
        batch["node"] = [self.node] * len(choices)
        return batch

    def __del__(self):
        self.process.terminate()


def prompt(row):
    """The prompt of a line."""
    return {"prompt": json.loads(row["text"])["prompt"] if row["path"].endswith(".jsonl") else row["text"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--cpus", type=float, default=1, help="of each server")
    parser.add_argument("--batch", type=int, default=16, help="prompts of a request: at most 16")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--model", help="one of the server's, if it has several")
    options = parser.parse_args()

    ray.init()
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    data = ray.data.read_text(options.files, include_paths=True).map(prompt)
    # Without this, a file is one block, which one server takes.
    data = data.repartition(target_num_rows_per_block=options.batch)
    data = data.map_batches(
        Server,
        fn_constructor_args=[{"model": options.model, "max_tokens": options.max_tokens}],
        batch_size=options.batch,
        compute=ray.data.ActorPoolStrategy(size=options.servers),
        num_cpus=options.cpus,
    )
    with open(options.output, "w") as output:
        for row in data.iter_rows():
            print(json.dumps(row), file=output)


if __name__ == "__main__":
    main()
