#!/usr/bin/env python3
"""Loads a server with OpenAI's interface, and prints a row for each number of clients.

    benches/serve.py [--address HOST:PORT] [--model NAME] [--clients 1,4,16] [--requests N] [--tokens N] [--prompt-words N]
                     [--long-words N]

With --long-words, one more client sends prompts of so many words meanwhile, for two tokens each. It is not in the row's times; the last
column has the number of its prompts and their mean time.

Each client sends one request after another, a stream of greedy text after a prompt of its own. Times are of the client: to the first piece
of text, and between pieces."""
import argparse
import asyncio
import json
import random
import time
from itertools import count


async def request(options, number, prompt_words, tokens):
    """Sends a request. Returns the times of its pieces, the start first, and its usage."""
    draw = random.Random(number)
    words = " ".join(f"word{draw.randrange(997)}" for _ in range(prompt_words))
    body = {"model": options.model, "prompt": words, "max_tokens": tokens, "temperature": 0, "stream": True,
            "ignore_eos": True, "stream_options": {"include_usage": True}}
    body = json.dumps(body).encode()
    host, port = options.address.rsplit(":", 1)
    times = [time.perf_counter()]
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"{status.decode().strip()}: {(await reader.read()).decode()}")
    usage = None
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if event.get("choices") and event["choices"][0]["text"]:
            times.append(time.perf_counter())
        usage = event.get("usage") or usage
    writer.close()
    return times, usage


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="127.0.0.1:8080")
    parser.add_argument("--model", default="")
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt-words", type=int, default=32)
    parser.add_argument("--long-words", type=int, default=0)
    options = parser.parse_args()
    # Prompts that no earlier run had: servers keep them.
    options.first = random.randrange(1 << 40)
    long = " long prompts |" if options.long_words else ""
    print(f"| clients | requests | requests/s | tokens/s | first p50 ms | p95 | p99 | between p50 ms | p95 | p99 |{long}")
    print("|---" * (11 if long else 10) + "|")
    for clients in options.clients.split(","):
        asyncio.run(load(options, int(clients)))


if __name__ == "__main__":
    main()
