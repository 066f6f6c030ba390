"""LiteLLM against a server whose address is the first argument; the second is the name of an encoder. Prints rows of the table in
docs/clients.md."""
import importlib.metadata
import json
import os
import sys

# Its table of prices is a part of the package: nothing is fetched.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm

address, encoder = sys.argv[1:]
litellm.suppress_debug_info = True
server = {"api_base": address, "api_key": "none", "num_retries": 0}


def row(call, result):
    print(f"| litellm {importlib.metadata.version('litellm')} | {call} | {result} |")


chat = server | {"model": "openai/chat", "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 16, "temperature": 0}
answer = litellm.completion(**chat)
text = answer.choices[0].message.content
assert text and answer.usage.completion_tokens == 16 and answer.choices[0].finish_reason == "length"
pieces = list(litellm.completion(**chat, stream=True, stream_options={"include_usage": True}))
assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == text
assert pieces[-1].usage.completion_tokens == 16
row("chat, and as a stream with usage", "the same text, 16 tokens")

city = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"], "additionalProperties": False}
tool = {"type": "function", "function": {"name": "weather", "parameters": city}}
asked = chat | {"max_tokens": 100, "tools": [tool], "tool_choice": "required"}
call = litellm.completion(**asked).choices[0].message.tool_calls[0]
assert call.function.name == "weather" and "city" in json.loads(call.function.arguments)
built = litellm.stream_chunk_builder(list(litellm.completion(**asked, stream=True)))
assert built.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
row("tools: a call, the same as a stream", "parses")

vectors = litellm.embedding(**server, model=f"openai/{encoder}", input=["a cat sat", "mat"]).data
assert len(vectors) == 2 and len(vectors[0]["embedding"]) == len(vectors[1]["embedding"])
row("embeddings", f"2 vectors of {len(vectors[0]['embedding'])}")

for wrong, kind in [({"model": "openai/x"}, litellm.NotFoundError), ({"temperature": 9}, litellm.BadRequestError)]:
    try:
        litellm.completion(**chat | wrong)
    except kind:
        pass
    else:
        raise AssertionError(f"no {kind.__name__}")
row("errors", "NotFoundError, BadRequestError")
