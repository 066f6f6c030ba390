"""Runs the examples for Ray on a cluster of two nodes, which are processes of this machine. HALITE is the path of the command."""
import concurrent.futures
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

examples = pathlib.Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(examples))
# Workers look for the example there too.
os.environ["PYTHONPATH"] = str(examples)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Else requests go to the node that takes them as long as it has room.
os.environ["RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING"] = "0"
# A busy machine takes longer to start a proxy than Ray waits, which is five seconds.
os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"
port = 8310
address = f"http://127.0.0.1:{port}"

import ray
from ray import serve
from ray.cluster_utils import Cluster

import ray_serve

prompts = [f"{who} {did}" for who in ["She", "He", "They", "Emma"] for did in ["was", "said", "went", "thought", "had", "knew"]]
options = {"max_tokens": 16, "temperature": 0}


def post(body):
    """The text of a completion, and the node that gave it."""
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        node = answer.headers["x-ray-node"]
        if not body.get("stream"):
            return json.load(answer)["choices"][0]["text"], node
        events = [line.removeprefix(b"data: ") for line in answer if line.startswith(b"data: {")]
        assert len(events) > 2
        return "".join(json.loads(event)["choices"][0]["text"] for event in events), node


def parent(process):
    return pathlib.Path("/proc", process, "stat").read_text().rsplit(")", 1)[1].split()[1]


def servers():
    """The processes of servers that workers of Ray have started, each with the process of its node."""
    found = {}
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text().split("\0")
            worker = parent(process.name)
            if command[0] == os.environ["HALITE"] and pathlib.Path("/proc", worker, "cmdline").read_text().startswith("ray::"):
                found[int(process.name)] = parent(worker)
        except OSError:
            # It has ended meanwhile.
            pass
    return found


def until(holds):
    """Waits until something holds. Requests may fail before."""
    end = time.monotonic() + 60
    while True:
        try:
            if holds():
                return
        except urllib.error.HTTPError as error:
            assert error.code == 503, error
        assert time.monotonic() < end
        time.sleep(0.5)


def ask(prompt):
    return post(options | {"prompt": prompt})


# A server takes two of a node's three CPUs, so a node has one.
node = {"num_cpus": 3, "object_store_memory": 100 << 20}
cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
try:
    cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(ray_serve.app({"min_servers": 2, "max_servers": 2, "cpus": 2}))
    pool = concurrent.futures.ThreadPoolExecutor(8)
    plain = list(pool.map(ask, prompts))
    streamed = list(pool.map(lambda prompt: post(options | {"prompt": prompt, "stream": True}), prompts))
    texts = [text for text, _ in plain]
    assert texts == [text for text, _ in streamed]
    assert len({node for _, node in plain + streamed}) == 2
    try:
        post(options | {"prompt": "a", "model": "x"})
    except urllib.error.HTTPError as error:
        assert error.code == 404 and error.headers["x-request-id"] and "no model" in json.load(error)["error"]["message"]
    else:
        raise AssertionError("no error")

    # A client that goes away ends its request.
    body = json.dumps(options | {"prompt": "She", "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
    urllib.request.urlopen(urllib.request.Request(address + "/v1/completions", body, {"content-type": "application/json"})).close()
    until(lambda: 'outcome="cancelled"} 1' in urllib.request.urlopen(address + "/metrics").read().decode())

    # Another replica takes the place of one whose server has ended.
    before = servers()
    assert len(before) == 2
    ended = next(iter(before))
    os.kill(ended, signal.SIGKILL)
    until(lambda: len(servers()) == 2 and ended not in servers())
    until(lambda: len({node for _, node in pool.map(ask, prompts)}) == 2)
    serve.shutdown()
    until(lambda: not servers())
    print("Ray Serve", ray.__version__, "ok: two nodes, streams, clients that go away, a server that ends")

    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        (work / "a.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts[:16]))
        (work / "b.txt").write_text("".join(prompt + "\n" for prompt in prompts[16:]))
        command = [sys.executable, examples / "ray_data.py", work / "a.jsonl", work / "b.txt", "-o", work / "out.jsonl"]
        command += ["--servers", "2", "--cpus", "2", "--batch", "2", "--max-tokens", "16"]
        # Both servers start before the first prompt, on one node each. One can still take every prompt: these are short.
        env = os.environ | {"RAY_ADDRESS": cluster.address, "RAY_DATA_DEFAULT_WAIT_FOR_MIN_ACTORS_S": "60"}
        data = subprocess.Popen(command, env=env)
        until(lambda: len(set(servers().values())) == 2)
        assert data.wait(timeout=200) == 0
        rows = [json.loads(line) for line in (work / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts, rows
    assert [row["text"] for row in rows] == texts
    assert {row["node"] for row in rows} <= {node["NodeID"] for node in ray.nodes()}
    print("Ray Data", ray.__version__, "ok: two nodes, in order")
finally:
    ray.shutdown()
    cluster.shutdown()
