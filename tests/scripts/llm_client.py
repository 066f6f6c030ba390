"""The command `llm` against a server whose address is the first argument. Prints rows of the table in docs/clients.md."""
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ["LLM_USER_PATH"] = tempfile.mkdtemp()
model = {"model_id": "local", "model_name": "chat", "api_base": sys.argv[1], "supports_schema": True}
# JSON is YAML too.
pathlib.Path(os.environ["LLM_USER_PATH"], "extra-openai-models.yaml").write_text(json.dumps([model]))


def llm(prompt, *options):
    command = [pathlib.Path(sys.executable).with_name("llm"), "-m", "local", "-o", "temperature", "0", prompt, *options]
    return subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=60).stdout


def row(call, result):
    print(f"| llm {importlib.metadata.version('llm')} | {call} | {result} |")


short = ["-o", "max_tokens", "16"]
text = llm("Who are you?", *short)
assert text.strip() and text == llm("Who are you?", *short, "--no-stream")
row("prompt, with and without --no-stream", "the same text")
assert llm("And then?", "-c", *short).strip()
row("-c: a conversation", "a text")
schema = {"type": "object", "properties": {"is_old": {"type": "boolean"}}, "required": ["is_old"], "additionalProperties": False}
assert isinstance(json.loads(llm("Describe her.", "--schema", json.dumps(schema)))["is_old"], bool)
row("--schema", "parses")
