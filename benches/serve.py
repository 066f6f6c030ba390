#!/usr/bin/env python3
"""Loads a server with OpenAI's interface, and prints a row for each number of clients, or what came of a trace.

    benches/serve.py [--address HOST:PORT] [--model NAME] [--clients 1,4,16] [--requests N] [--tokens N] [--prompt-words N]
                     [--long-words N]
    benches/serve.py --trace FILE [--address HOST:PORT] [--model NAME] [--csv FILE]

With --long-words, one more client sends prompts of so many words meanwhile, for two tokens each. It is not in the row's times; the last
column has the number of its prompts and their mean time.

Each client sends one request after another, a stream of greedy text after a prompt of its own. Times are of the client: to the first piece
of text, and between pieces.

With --trace, requests are sent when they arrive by a file that `halite estimate --load` reads too, and the rows are those that it prints.
Prompts have exactly so many tokens; those of a group begin with the same `prefix_tokens`. Answers go on to their length. The server must
have `/tokenize`, as Halite's has. --csv writes the requests with their times, as `halite estimate` does. Of a server that guesses tokens, a
piece has several, and the times are between pieces."""
import argparse
import asyncio
import csv
import json
import random
import time
from itertools import count


async def post(options, path, body):
    """Sends a request. Returns its connection, at the body of the answer."""
    body = json.dumps(body).encode()
    host, port = options.address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"{status.decode().strip()}: {(await reader.read()).decode()}")
    return reader, writer


async def generate(options, prompt, tokens):
    """Asks for an answer of so many tokens. Returns the times of its pieces, the start first, and its usage."""
    body = {"model": options.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True,
            "ignore_eos": True, "stream_options": {"include_usage": True}}
    times = [time.perf_counter()]
    reader, writer = await post(options, "/v1/completions", body)
    usage = None
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if event.get("choices") and event["choices"][0]["text"]:
            times.append(time.perf_counter())
        usage = event.get("usage") or usage
    if len(times) == 1:
        # Its tokens have no text.
        times.append(time.perf_counter())
    writer.close()
    return times, usage


def words_of(seed, count):
    """A text of so many words."""
    draw = random.Random(seed)
    return " ".join(f"word{draw.randrange(997)}" for _ in range(count))


async def request(options, number, prompt_words, tokens):
    """Sends a request with a prompt of its own."""
    return await generate(options, words_of(number, prompt_words), tokens)


def percentile(values, percent):
    """The value below which so many per cent are, in milliseconds."""
    values = sorted(values)
    return 1000 * values[min(len(values) - 1, len(values) * percent // 100)] if values else float("nan")


async def load(options, clients):
    """Runs all requests with so many clients, and prints a row."""
    left = iter(range(options.first, options.first + max(options.requests, clients)))
    results = []

    async def client():
        for number in left:
            results.append(await request(options, number, options.prompt_words, options.tokens))

    async def long_client():
        for number in count(options.first + 100_000):
            times, _ = await request(options, number, options.long_words, 2)
            long_times.append(times[-1] - times[0])

    long_times = []
    beside = asyncio.create_task(long_client()) if options.long_words else None
    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - start
    if beside:
        beside.cancel()
    options.first += len(results)
    tokens = sum(usage["completion_tokens"] for _, usage in results)
    first = [times[1] - times[0] for times, _ in results if len(times) > 1]
    between = [b - a for times, _ in results for a, b in zip(times[1:], times[2:])]
    cells = [clients, len(results), f"{len(results) / seconds:.2f}", f"{tokens / seconds:.1f}"]
    cells += [f"{percentile(values, percent):.0f}" for values in (first, between) for percent in (50, 95, 99)]
    if long_times:
        cells.append(f"{len(long_times)}, {sum(long_times) / len(long_times):.1f} s each")
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def read_trace(path):
    """The requests of a trace in the order of arrival: arrival, tokens of the prompt and of the answer, shared tokens and their group."""
    with open(path) as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    named = ["arrival_s", "prompt_tokens", "generated_tokens"]
    if not rows or any(name not in rows[0] for name in named):
        raise SystemExit(f"{path}: expected a CSV file with rows and the columns {', '.join(named)}")
    requests = []
    for number, row in enumerate(rows, 1):
        try:
            counts = [int(row[name]) for name in named[1:]] + [int(row.get("prefix_tokens") or 0)]
            requests.append((float(row[named[0]]), *counts, row.get("prefix_group") or ""))
        except (TypeError, ValueError):
            raise SystemExit(f"{path}, request {number}: expected an arrival and whole numbers of tokens, got {dict(row)}") from None
    return sorted(requests, key=lambda row: row[0])


async def replay(options):
    """Sends the requests of a trace when they arrive, and prints what came of them."""
    trace = read_trace(options.trace)

    async def tokens_of(seed, count):
        """So many tokens of a text, which has a token for each word at least."""
        text = {"model": options.model, "content": words_of(seed, count)}
        reader, _ = await post(options, "/tokenize", text)
        _, answer = (await reader.read()).split(b"\r\n\r\n", 1)
        return json.loads(answer)["tokens"][:count]

    prompts = []
    for number, (_, tokens, _, shared, group) in enumerate(trace):
        beginning = await tokens_of(f"{options.first} {group}", shared) if shared else []
        prompts.append(beginning + await tokens_of(options.first + number, tokens - shared))
    start = time.perf_counter()

    async def one(row, tokens):
        await asyncio.sleep(start + row[0] - time.perf_counter())
        return await generate(options, tokens, row[2])

    results = await asyncio.gather(*map(one, trace, prompts))
    for row, (_, usage) in zip(trace, results):
        got = usage["prompt_tokens"], usage["completion_tokens"]
        if got != (row[1], row[2]):
            raise SystemExit(f"expected {row[1]} tokens of a prompt and {row[2]} of its answer, got {got}")
    late = [times[0] - start - row[0] for row, (times, _) in zip(trace, results)]
    # A request waits from its arrival on, whenever the client came round to it.
    arrivals = [start + row[0] for row in trace]
    first = [times[1] - arrival for (times, _), arrival in zip(results, arrivals)]
    total = [times[-1] - arrival for (times, _), arrival in zip(results, arrivals)]
    between = [b - a for times, _ in results for a, b in zip(times[1:], times[2:])]
    seconds = max(times[-1] for times, _ in results) - min(arrivals)
    three = lambda values: " / ".join(f"{percentile(values, percent):.1f} ms" for percent in (50, 90, 99))
    tokens = sum(row[2] for row in trace)
    reused = sum((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0) for _, usage in results)
    rows = [("p50 / p90 / p99", "measured"), ("to first token", three(first)), ("between tokens", three(between)),
            ("to last token", three(total)), ("requests/s", f"{len(trace) / seconds:.3f}"),
            ("output tokens/s", f"{tokens / seconds:.1f}"),
            ("prompt tokens reused", f"{100 * reused / sum(row[1] for row in trace):.1f} %"),
            ("tokens a piece of text", f"{tokens / sum(len(times) - 1 for times, _ in results):.3f}"),
            ("sent late by at most", f"{1000 * max(late):.1f} ms")]
    for name, value in rows:
        print(f"{name:24}{value:>40}")
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            out = csv.writer(file)
            out.writerow(["arrival_s", "prompt_tokens", "generated_tokens", "first_token_s", "end_s"])
            for row, (times, _) in zip(trace, results):
                out.writerow([*row[:3], times[1] - start, times[-1] - start])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="127.0.0.1:8080")
    parser.add_argument("--model", default="")
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt-words", type=int, default=32)
    parser.add_argument("--long-words", type=int, default=0)
    parser.add_argument("--trace", default="")
    parser.add_argument("--csv", default="")
    options = parser.parse_args()
    # Prompts that no earlier run had: servers keep them.
    options.first = random.randrange(1 << 40)
    if options.trace:
        return asyncio.run(replay(options))
    long = " long prompts |" if options.long_words else ""
    print(f"| clients | requests | requests/s | tokens/s | first p50 ms | p95 | p99 | between p50 ms | p95 | p99 |{long}")
    print("|---" * (11 if long else 10) + "|")
    for clients in options.clients.split(","):
        asyncio.run(load(options, int(clients)))


if __name__ == "__main__":
    main()
