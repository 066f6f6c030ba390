"""LangChain's OpenAI package against a server whose address is the first argument; the second is the name of an encoder. Prints rows of
the table in docs/clients.md."""
import importlib.metadata
import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

address, encoder = sys.argv[1:]
server = {"base_url": address, "api_key": "none", "max_retries": 0}


def row(call, result):
    print(f"| langchain-openai {importlib.metadata.version('langchain-openai')} | {call} | {result} |")


def chat(**options):
    return ChatOpenAI(**server, model="chat", temperature=0, **options)


answer = chat(max_tokens=16).invoke("Who are you?")
assert answer.content and answer.usage_metadata["output_tokens"] == 16
pieces = list(chat(max_tokens=16, stream_usage=True).stream("Who are you?"))
assert "".join(piece.content for piece in pieces) == answer.content
assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) == 16
row("ChatOpenAI: invoke, and stream with usage", "the same text, 16 tokens")

texts = chat(max_tokens=8).batch(["Who are you?", "Where is she?"])
assert len(texts) == 2 and all(text.content for text in texts)
row("batch", "2 texts")


@tool
def is_raining(today: bool) -> str:
    """Tells whether it rains."""
    return "yes"


bound = chat(max_tokens=100).bind_tools([is_raining], tool_choice="required", strict=True)
asked = HumanMessage("Does it rain?")
called = bound.invoke([asked])
call = called.tool_calls[0]
assert call["name"] == "is_raining" and isinstance(call["args"]["today"], bool)
whole = None
for piece in bound.stream([asked]):
    whole = piece if whole is None else whole + piece
assert whole.tool_calls[0]["args"] == call["args"]
result = ToolMessage(is_raining.invoke(call["args"]), tool_call_id=call["id"])
assert chat(max_tokens=8).invoke([asked, called, result]).content
row("bind_tools: a call, the same as a stream, its result", "parses")


class Person(BaseModel):
    is_old: bool
    is_tall: bool


for method in ["json_schema", "function_calling"]:
    person = chat(max_tokens=200).with_structured_output(Person, method=method, strict=True).invoke("Describe her.")
    assert isinstance(person, Person), method
row("with_structured_output: json_schema, function_calling", "parses")

response = chat(max_tokens=16, use_responses_api=True).invoke("Who are you?")
assert response.text and response.usage_metadata["output_tokens"] == 16
row("use_responses_api", "16 tokens")

# Without this, it sends the tokens of another model's vocabulary.
embeddings = OpenAIEmbeddings(**server, model=encoder, check_embedding_ctx_length=False)
vectors = embeddings.embed_documents(["a cat sat", "mat"])
assert len(vectors) == 2 and all(abs(a - b) < 1e-6 for a, b in zip(vectors[1], embeddings.embed_query("mat"), strict=True))
row("OpenAIEmbeddings, with check_embedding_ctx_length=False", f"2 vectors of {len(vectors[0])}")
