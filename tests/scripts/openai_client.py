"""What programs do with OpenAI's own client, against a server whose address is the first argument: models, completions, chats, streams,
schemas, tools, responses, errors. The models are `austen` and `chat`; with a second argument, an encoder of that name too."""
import json
import sys

import openai
from pydantic import BaseModel

client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
encoder = sys.argv[2] if len(sys.argv) > 2 else None
assert [model.id for model in client.models.list()] == ["austen", "chat"] + [encoder] * bool(encoder)
assert client.models.retrieve("chat").id == "chat"

options = {"model": "austen", "prompt": "Once upon a time", "max_tokens": 16, "temperature": 0}
whole = client.completions.create(**options)
assert whole.usage.completion_tokens == 16 and whole.choices[0].finish_reason == "length"
pieces = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == whole.choices[0].text
assert pieces[-1].usage.completion_tokens == 16
assert len(client.completions.create(**options | {"prompt": ["She", "He"], "n": 2}).choices) == 4

chat = {"model": "chat", "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 16, "temperature": 0}
answer = client.chat.completions.create(**chat).choices[0]
assert answer.message.role == "assistant" and answer.message.content
streamed = client.chat.completions.create(**chat, stream=True)
assert "".join(piece.choices[0].delta.content or "" for piece in streamed) == answer.message.content


class Person(BaseModel):
    name: str
    is_old: bool


person = client.chat.completions.parse(**chat | {"max_tokens": 200}, response_format=Person).choices[0].message
assert isinstance(person.parsed, Person), person


city = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"], "additionalProperties": False}
tool = {"type": "function", "function": {"name": "weather", "parameters": city}}
asked = chat | {"max_tokens": 100, "tools": [tool], "tool_choice": "required"}
answer = client.chat.completions.create(**asked).choices[0]
call = answer.message.tool_calls[0]
assert answer.finish_reason == "tool_calls" and call.function.name == "weather" and "city" in json.loads(call.function.arguments)
pieces = [piece.choices[0].delta.tool_calls for piece in client.chat.completions.create(**asked, stream=True)]
arguments = "".join(piece[0].function.arguments or "" for piece in pieces if piece)
assert arguments == call.function.arguments
history = chat["messages"] + [answer.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
assert client.chat.completions.create(**asked | {"messages": history, "tool_choice": "none"}).choices[0].message.content

plain = {"model": "chat", "input": "Who are you?", "max_output_tokens": 16, "temperature": 0}
response = client.responses.create(**plain)
assert response.output_text and response.usage.output_tokens == 16 and response.status == "incomplete"
events = list(client.responses.create(**plain, stream=True))
assert [events[0].type, events[-1].type] == ["response.created", "response.incomplete"]
assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == response.output_text
flat = {"type": "function", "name": "weather", "parameters": city, "strict": True}
response = client.responses.create(**plain | {"max_output_tokens": 100}, tools=[flat], tool_choice="required", parallel_tool_calls=False)
assert response.output[0].type == "function_call" and "city" in json.loads(response.output[0].arguments)

if encoder:
    # The client asks for base64, and decodes it.
    vectors = client.embeddings.create(model=encoder, input=["a cat sat", "mat"])
    floats = client.embeddings.create(model=encoder, input=["a cat sat", "mat"], encoding_format="float")
    assert len(vectors.data) == 2 and vectors.usage.prompt_tokens > 2
    assert all(abs(a - b) < 1e-6 for a, b in zip(vectors.data[0].embedding, floats.data[0].embedding, strict=True))


def fails(kind, text, call, **arguments):
    try:
        call(**arguments)
    except kind as error:
        assert text in error.message and error.request_id.startswith("req-"), error
    else:
        raise AssertionError(f"no error: {text}")


fails(openai.NotFoundError, "/v1/models", client.completions.create, model="x", prompt="a")
fails(openai.BadRequestError, "weather", client.chat.completions.create, **chat, tools=[tool, tool])
fails(openai.BadRequestError, "keeps no responses", client.responses.create, **plain, previous_response_id="a")
fails(openai.BadRequestError, "no encoder", client.embeddings.create, model="austen", input="a")
fails(openai.BadRequestError, "temperature", client.completions.create, **options | {"temperature": 9})
print("openai", openai.__version__, "ok")
