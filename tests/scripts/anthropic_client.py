"""Anthropic's client against a server whose address is the first argument. Prints rows of the table in docs/clients.md."""
import sys

import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1].removesuffix("/v1"), api_key="none", max_retries=0)


def row(call, result):
    print(f"| anthropic {anthropic.__version__} | {call} | {result} |")


chat = {"model": "chat", "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 16}
# The client has no argument for it.
chat["extra_body"] = {"temperature": 0}
answer = client.messages.create(**chat, system="Be brief.")
text = answer.content[0].text
assert text and answer.usage.output_tokens == 16 and answer.stop_reason == "max_tokens"
with client.messages.stream(**chat, system="Be brief.") as stream:
    assert "".join(stream.text_stream) == text
    assert stream.get_final_message().usage.output_tokens == 16
row("messages.create, and as a stream", "the same text, 16 tokens")

count = client.messages.count_tokens(model="chat", messages=chat["messages"], system="Be brief.").input_tokens
assert count == answer.usage.input_tokens + answer.usage.cache_read_input_tokens
row("messages.count_tokens", f"{count}, as in the usage of the answer")

city = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"], "additionalProperties": False}
tools = {"tools": [{"name": "weather", "description": "The weather of a city.", "input_schema": city}]}
asked = chat | tools | {"max_tokens": 100, "tool_choice": {"type": "any"}}
answer = client.messages.create(**asked)
use = answer.content[0]
assert answer.stop_reason == "tool_use" and use.name == "weather" and "city" in use.input
with client.messages.stream(**asked) as stream:
    assert stream.get_final_message().content[0].input == use.input
result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "rain"}]}
blocks = [block.model_dump() for block in answer.content]
after = client.messages.create(**chat | tools | {"messages": [*chat["messages"], {"role": "assistant", "content": blocks}, result]})
assert after.content
row("tools: a call, the same as a stream, and its result", "parses")

for wrong, kind in [({"model": "x"}, anthropic.NotFoundError), ({"extra_body": {"temperature": 9}}, anthropic.BadRequestError)]:
    try:
        client.messages.create(**chat | wrong)
    except kind as error:
        assert error.body["type"] == "error"
    else:
        raise AssertionError(f"no {kind.__name__}")
row("errors", "NotFoundError, BadRequestError")
