"""What programs do with OpenAI's own client, against a server whose address is the first argument: models, completions, chats, streams,
schemas, errors. The models are `austen` and `chat`."""
import sys

import openai
from pydantic import BaseModel

client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
assert [model.id for model in client.models.list()] == ["austen", "chat"]
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


def fails(kind, text, call, **arguments):
    try:
        call(**arguments)
    except kind as error:
        assert text in error.message and error.request_id.startswith("req-"), error
    else:
        raise AssertionError(f"no error: {text}")


fails(openai.NotFoundError, "austen, chat", client.completions.create, model="x", prompt="a")
tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
fails(openai.BadRequestError, "tools", client.chat.completions.create, **chat, tools=[tool])
fails(openai.BadRequestError, "temperature", client.completions.create, **options | {"temperature": 9})
print("openai", openai.__version__, "ok")
