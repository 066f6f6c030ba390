"""Halite on a Ray cluster: each replica starts a server of its own, one on each node, and passes requests and streams through to it.

    HALITE=/usr/local/bin/halite serve run --app-dir examples ray_serve:app min_servers=1 max_servers=8

Then http://127.0.0.1:8000/v1 is an address for clients of OpenAI. HALITE_ARGS are arguments of `halite serve`, such as `-c halite.toml`. With
HALITE_SERVER, the address of a server that runs on each node already, replicas start none. Nodes get these variables with `ray start`."""
import os
import shlex
import shutil
import subprocess
import sys
import threading

import aiohttp
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

# Headers of requests and answers that are not of the connection.
KEPT = {"authorization", "content-type", "retry-after", "x-request-id"}


def start():
    """Starts a server. Returns its process and its address."""
    command = [os.environ.get("HALITE", "halite"), "serve", "--listen", "127.0.0.1:0", *shlex.split(os.environ.get("HALITE_ARGS", ""))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        print(line, end="", file=sys.stderr)
        if " at http://" in line:
            # The pipe must not fill.
            threading.Thread(target=shutil.copyfileobj, args=(process.stderr, sys.stderr), daemon=True).start()
            return process, line.split(" at ")[1].strip().removesuffix("/v1")
    raise RuntimeError(f"halite ended with {process.wait()}")


# A server runs 16 requests at once, and others wait in it. More of them wait here, where another replica may take them.
@serve.deployment(max_ongoing_requests=32, max_replicas_per_node=1, health_check_period_s=5, graceful_shutdown_timeout_s=30)
class Halite:
    async def __init__(self):
        self.server = os.environ.get("HALITE_SERVER")
        self.process = None
        if not self.server:
            self.process, self.server = start()
        self.node = ray.get_runtime_context().get_node_id()
        self.client = aiohttp.ClientSession(self.server, timeout=aiohttp.ClientTimeout(total=None))

    async def check_health(self):
        """Ray replaces a replica whose server has ended."""
        async with self.client.get("/health/live") as answer:
            answer.raise_for_status()

    async def __call__(self, request: Request):
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        headers = {name: value for name, value in request.headers.items() if name in KEPT}
        try:
            answer = await self.client.request(request.method, target, data=await request.body(), headers=headers)
        except aiohttp.ClientConnectionError:
            # Clients try again, and find another replica, or the one that Ray puts in the place of this.
            error = {"message": "the server has ended", "type": "server_error", "param": None, "code": None}
            return JSONResponse({"error": error}, 503, {"retry-after": "1"})

        async def pieces():
            # The server's request ends with this one.
            async with answer:
                async for piece in answer.content.iter_any():
                    yield piece

        headers = {name: value for name, value in answer.headers.items() if name.lower() in KEPT}
        return StreamingResponse(pieces(), answer.status, headers | {"x-ray-node": self.node})

    def __del__(self):
        if getattr(self, "process", None):
            self.process.terminate()


def app(options):
    scaling = {
        "min_replicas": int(options.get("min_servers", 1)),
        "max_replicas": int(options.get("max_servers", 8)),
        # Requests that run or wait, for each replica.
        "target_ongoing_requests": 12,
    }
    actor = {"num_cpus": float(options.get("cpus", 1))}
    return Halite.options(autoscaling_config=scaling, ray_actor_options=actor).bind()
