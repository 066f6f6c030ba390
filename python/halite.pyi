"""Language models on CPUs, GPUs and custom accelerators."""

import os
from collections.abc import Iterable, Mapping, Sequence as _Many
from types import TracebackType
from typing import Any, Final, Literal, Optional, TypedDict, Union, final, overload

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self, Unpack

__version__: Final[str]

_Path = Union[str, os.PathLike[str]]
_Outputs = Literal["last", "all", "none"]
_Tokens = Union[_Many[int], NDArray[np.integer[Any]]]
_Run = Union[tuple[Sequence, _Tokens], tuple[Sequence, _Tokens, _Outputs]]

class Error(Exception):
    """An error of Halite: all others are of this class."""

class OutOfMemory(Error, MemoryError):
    """Memory, or a limit on it, does not suffice."""

class Unsupported(Error, NotImplementedError):
    """The model, or an op of it on this backend, is not supported."""

class InvalidArgument(Error, ValueError):
    """An argument is wrong."""

class Malformed(Error, ValueError):
    """A file, a template, a grammar or a saved sequence is malformed, or does not fit the model."""

class FileError(Error, OSError):
    """A file cannot be read or written."""

class ContextFull(Error):
    """The sequences do not fit in the session's memory."""

class Cancelled(Error):
    """Another thread cancelled the work."""

class Busy(Error):
    """Another thread uses the object."""

class Closed(Error):
    """The object is closed."""

class InternalError(Error, RuntimeError):
    """Halite has an error in its code. Sessions that it met are closed."""

class _SessionOptions(TypedDict, total=False):
    """The sizes of a session; None stands for the default."""

    context: Optional[int]
    """Positions of the KV cache, which all sequences share. Default: the model's, at most 4096."""
    batch: Optional[int]
    """Most tokens of a step. Default: 512."""
    outputs: Optional[int]
    """Most outputs (rows of logits) of a step. Default: 1."""
    sequences: Optional[int]
    """Sequences for which sliding-window layers reserve memory. Default: 1."""
    rewind: Optional[int]
    """Positions that `truncate` can always undo in sliding-window layers. Default: 64."""
    memory: Optional[int]
    """Most bytes of the whole process. Weights that do not fit are read from the file in each step."""
    spill: Optional[_Path]
    """A folder on a drive for a KV cache that takes much of `memory`."""
    kv_format: Optional[str]
    """Format of the KV cache, such as "q8_0". Default: "f16"."""

class _GenerateOptions(TypedDict, total=False):
    """The options of a generation; None stands for the default, which is greedy."""

    max_tokens: Optional[int]
    """Most tokens to generate. Default: 128."""
    temperature: Optional[float]
    """Divides the logits. Default: 0, which takes the most likely token."""
    top_k: Optional[int]
    """Keeps so many of the most likely tokens; 0: all. Default: 40."""
    top_p: Optional[float]
    """Keeps the most likely tokens whose probabilities add up to this; 1: all. Default: 0.95."""
    min_p: Optional[float]
    """Drops tokens less likely than this times the most likely one; 0: none. Default: 0.05."""
    repeat_penalty: Optional[float]
    """Divides positive and multiplies negative logits of recent tokens. Default: 1, which is off."""
    frequency_penalty: Optional[float]
    """Subtracted for each time that a token is recent. Default: 0."""
    presence_penalty: Optional[float]
    """Subtracted if a token is recent. Default: 0."""
    penalty_window: Optional[int]
    """Tokens that are recent. Default: 64."""
    seed: Optional[int]
    """Seed of the random draws. Default: 0."""
    stop: Optional[Union[str, _Many[str]]]
    """Texts that end the generation, which leaves them out."""
    json_schema: Optional[Union[str, Mapping[str, Any]]]
    """Holds the text to JSON of this schema."""
    regex: Optional[str]
    """Holds the text to a regular expression, which matches all of it."""
    grammar: Optional[str]
    """Holds the text to a grammar in GBNF or in llguidance's variant of Lark."""
    parse_special: Optional[bool]
    """Read control tokens in a prompt that is a text."""
    ignore_end: Optional[bool]
    """Go on after end-of-text tokens."""
    show_special: Optional[bool]
    """Show control tokens in the text."""
    lookup: Optional[int]
    """Drafts up to so many tokens by looking them up in the text; the session needs more outputs than that."""

class _Footprint(TypedDict):
    """Bytes of memory."""

    weights: int
    kv: int
    scratch: int
    io: int

class _Estimate(TypedDict):
    """What `estimate` predicts."""

    profile: str
    first_token_s: float
    step_s: float
    seconds: float
    step_interval_s: Optional[tuple[float, float]]
    chips: int
    layout: dict[str, int]
    exchange_fraction: float
    repeated: list[str]
    tokens_per_s: float
    joules_per_token: Optional[float]
    joules_per_token_by: Optional[dict[str, float]]
    usd_per_million_tokens: Optional[float]
    need_bytes: int
    have_bytes: int
    fits: bool
    error: Optional[float]
    unmeasured: list[str]
    busy: dict[str, float]
    rests_on: dict[str, float]
    sensitivities: dict[str, float]

@final
class Model:
    """A GGUF file (the first one of a split model), or without a path the built-in model, a small one that
    continues English prose. `memory` is the limit on the process, in bytes, for sessions of this model: the
    file is not mapped then. `lora` has adapters: paths, or pairs of a path and a scale."""

    def __new__(
        cls,
        path: Optional[_Path] = None,
        *,
        memory: Optional[int] = None,
        lora: Optional[_Many[Union[_Path, tuple[_Path, float]]]] = None,
    ) -> Self: ...
    @staticmethod
    def from_bytes(data: bytes, *, name: str = "the model in memory") -> Model:
        """Opens a GGUF file in memory, which is copied. The name appears in messages."""
    @property
    def name(self) -> str:
        """The name in the file."""
    @property
    def architecture(self) -> str:
        """Its architecture, such as "llama"."""
    @property
    def warnings(self) -> list[str]:
        """Warnings about the file."""
    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""
    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Its hyper-parameters, under the names of their GGUF keys."""
    def metadata(self) -> dict[str, Any]:
        """Reads the file's metadata. Arrays, such as a vocabulary, become lists."""
    def chat_prompt(
        self,
        messages: Iterable[Mapping[str, str]],
        *,
        template: Optional[str] = None,
        trusted: bool = False,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Returns the tokens of a chat's prompt, by the chat template of the file or another one. Messages are
        dictionaries with `role` and `content`. Control tokens in a content are plain text, unless it is
        `trusted`. `add_generation_prompt` opens the answer."""
    def footprint(self, backend: Union[str, Backend] = "cpu", **options: Unpack[_SessionOptions]) -> _Footprint:
        """Returns the bytes of memory that a session with these options would need, and reads no weights. Within a
        limit, `streamed` are weights that stay in the file, `stream` is the memory for reading them, and `spilled`
        is the part of the KV cache that is kept in a file."""

@final
class Tokenizer:
    """Text to tokens and back, by the vocabulary of a model."""

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Returns the tokens of a text. `add_special` adds the begin- and end-of-text tokens that the
        vocabulary defines; `parse_special` reads control tokens in the text, which only a trusted text should
        contain."""
    def decode(self, tokens: _Tokens, *, special: bool = False) -> str:
        """Returns the text of tokens; with `special`, control tokens are shown."""
    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes of a token, which need not be whole characters."""
    def is_end(self, token: int) -> bool:
        """Whether a token ends a text."""
    def quote(self, text: str) -> str:
        """Quotes a text, so that `parse_special` reads no control tokens in it."""
    @property
    def bos(self) -> Optional[int]:
        """The begin-of-text token."""
    @property
    def eos(self) -> Optional[int]:
        """The end-of-text token."""
    @property
    def warnings(self) -> list[str]:
        """Warnings about the vocabulary."""
    def __len__(self) -> int: ...

@final
class Backend:
    """A device that runs models, opened by its name, as in "cpu", "cpu:threads=2", "sim:maia-100" and
    "plugin:FILE". Options are keywords, with underscores for dashes. What the device lacks runs on the one
    named by `fill_gaps`."""

    def __new__(
        cls, name: str = "cpu", *, fill_gaps: Optional[str] = None, **options: Union[str, int, bool, _Path]
    ) -> Self: ...
    @property
    def name(self) -> str:
        """Its name."""
    @property
    def device(self) -> str:
        """Its device, for people."""
    @property
    def contract(self) -> str:
        """What it promises about results: "exact", the same bits as the reference, or less."""
    @property
    def memory_bytes(self) -> Optional[int]:
        """Bytes of memory for weights and caches; None: no limit."""

@final
class Device:
    """A device of this machine that a backend can open."""

    @property
    def name(self) -> str:
        """The name that opens it."""
    @property
    def device(self) -> str:
        """Its description, for people."""
    @property
    def memory_bytes(self) -> Optional[int]:
        """Bytes of its memory, if they are known and limited."""
    @property
    def contract(self) -> Optional[str]:
        """What it promises about results, if that does not depend on options."""
    @property
    def facts(self) -> list[tuple[str, str]]:
        """More facts, for people."""

@final
class Session:
    """A model on a backend, with its sequences and their KV cache. Opening it reserves all its memory. One
    thread at a time may use it. In a `with` statement it is closed at the end."""

    def __new__(
        cls, model: Model, backend: Union[str, Backend] = "cpu", **options: Unpack[_SessionOptions]
    ) -> Self: ...
    @property
    def model(self) -> Model:
        """The model."""
    @property
    def context(self) -> int:
        """Positions of the KV cache, which all sequences share."""
    @property
    def batch(self) -> int:
        """Most tokens of a step."""
    @property
    def outputs(self) -> int:
        """Most outputs of a step."""
    def add(self) -> Sequence:
        """Adds an empty sequence."""
    def restore(self, saved: Union[bytes, _Path]) -> Sequence:
        """Adds a sequence that `Sequence.save` saved: its bytes, or the path of a file. Only from sources that
        you trust to decide what the model says."""
    def step(self, runs: Iterable[_Run]) -> NDArray[np.float32]:
        """Runs one step, in which each run continues its sequence, and returns the logits: a row for each
        output. A run is a tuple of a sequence and tokens, and perhaps "last", "all" or "none": which tokens
        have outputs. On an error, no sequence changes."""
    def arg_max(self, runs: Iterable[_Run]) -> NDArray[np.uint32]:
        """As `step`, and returns the most likely token of each output."""
    def top_k(self, runs: Iterable[_Run]) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
        """As `step`, and returns the 256 most likely tokens of each output and their logits."""
    def prefill(self, sequence: Sequence, tokens: _Tokens) -> NDArray[np.float32]:
        """Runs tokens of a sequence in as many steps as they need, and returns the last one's logits as one
        row."""
    def generate(
        self,
        prompt: Union[str, _Tokens],
        *,
        sequence: Optional[Sequence] = None,
        **options: Unpack[_GenerateOptions],
    ) -> Generation:
        """Generates text after a prompt, a text or tokens. With a sequence, it keeps the common prefix of the
        sequence and the prompt, and the sequence then holds the text."""
    def stream(
        self,
        prompt: Union[str, _Tokens],
        *,
        sequence: Optional[Sequence] = None,
        **options: Unpack[_GenerateOptions],
    ) -> Stream:
        """As `generate`, but returns an iterator of pieces of the text, each of whole characters."""
    def chat(
        self,
        messages: Iterable[Mapping[str, str]],
        *,
        template: Optional[str] = None,
        trusted: bool = False,
        sequence: Optional[Sequence] = None,
        **options: Unpack[_GenerateOptions],
    ) -> Generation:
        """Answers a chat by the model's template, or another one. Messages are dictionaries with `role` and
        `content`. With a sequence, the next turn runs only what is new."""
    def cancel(self) -> None:
        """Stops the work of the session within one op: steps raise `Cancelled`, generations end. It holds for
        later work, too, until `reset`. Any thread may call it at any time."""
    def reset(self) -> None:
        """Takes back `cancel`."""
    def close(self) -> None:
        """Closes the session and frees its memory. Closing it twice is no error."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        _class: Optional[type[BaseException]],
        _error: Optional[BaseException],
        _traceback: Optional[TracebackType],
    ) -> None: ...

@final
class Sequence:
    """A sequence of tokens in a session. It is removed when nothing holds it any more."""

    @property
    def tokens(self) -> list[int]:
        """Its tokens."""
    def fork(self) -> Sequence:
        """Copies the sequence. The two share memory until one of them goes on."""
    def truncate(self, length: int) -> None:
        """Truncates the sequence to so many tokens; a longer length changes nothing."""
    def remove(self) -> None:
        """Removes the sequence, and frees its memory for others."""
    @overload
    def save(self, path: None = None) -> bytes: ...
    @overload
    def save(self, path: _Path) -> None:
        """Saves the sequence with its KV cache: to a file, which may replace a saved sequence and nothing else,
        or without a path to the bytes that it returns."""
    def __len__(self) -> int: ...
    def __bool__(self) -> bool: ...

@final
class Generation:
    """What a generation did."""

    @property
    def text(self) -> str:
        """The text after the prompt."""
    @property
    def tokens(self) -> list[int]:
        """The generated tokens, without the end-of-text token."""
    @property
    def prompt_tokens(self) -> list[int]:
        """The prompt's tokens."""
    @property
    def reused_tokens(self) -> int:
        """Tokens of the prompt that the sequence had already."""
    @property
    def finish(self) -> Optional[str]:
        """Why it ended: "end", "length", "stop", "context_full" or "cancelled"; None: it goes on."""
    @property
    def prefill_seconds(self) -> float:
        """Seconds from the first prompt token to the first logits."""
    @property
    def first_token_seconds(self) -> float:
        """Seconds from the call to the first token."""
    @property
    def decode_seconds(self) -> float:
        """Seconds of the steps after the prompt."""
    @property
    def decode_tokens(self) -> int:
        """Tokens that these steps chose."""
    @property
    def decode_steps(self) -> int:
        """The number of these steps."""
    @property
    def device_seconds(self) -> tuple[float, float]:
        """Seconds of the prompt and of the steps after it by the device's own clock."""
    @property
    def drafted(self) -> tuple[int, int]:
        """Drafted tokens, and those that were right."""

@final
class Stream:
    """An iterator of pieces of generated text. `generation` tells what was done so far."""

    def __iter__(self) -> Self: ...
    def __next__(self) -> str: ...
    @property
    def generation(self) -> Generation:
        """What the generation did so far."""
    def close(self) -> None:
        """Ends the generation."""

@final
class Embedder:
    """An encoder on a backend. Opening it reserves all its memory. One thread at a time may use it. `pooling`
    is "mean", "cls", "last" or "none", a vector for each token; None: the model's, which of a reranker is "rank".
    `truncate` cuts texts that are too long, which are errors otherwise."""

    def __new__(
        cls,
        model: Model,
        backend: Union[str, Backend] = "cpu",
        *,
        batch: int = 512,
        pooling: Optional[str] = None,
        normalize: bool = True,
        truncate: bool = False,
        memory: Optional[int] = None,
    ) -> Self: ...
    def embed(self, texts: _Many[str]) -> NDArray[np.float32]:
        """Returns an array with a row for each text, or with the pooling "none" for each token of each text."""
    def rank(self, query: str, documents: _Many[str]) -> NDArray[np.float32]:
        """Returns an array with the score of each document for a query, by a reranker: higher is better."""
    @property
    def dimension(self) -> int:
        """Elements of a vector."""
    @property
    def max_text_tokens(self) -> int:
        """Most tokens of a text."""
    @property
    def pooling(self) -> str:
        """How the vectors of a text's tokens become one."""
    def cancel(self) -> None:
        """Stops the work within one op: it raises `Cancelled`. It holds for later work, too, until `reset`."""
    def reset(self) -> None:
        """Takes back `cancel`."""
    def close(self) -> None:
        """Closes the embedder and frees its memory. Closing it twice is no error."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        _class: Optional[type[BaseException]],
        _error: Optional[BaseException],
        _traceback: Optional[TracebackType],
    ) -> None: ...

@final
class Outcome:
    """The outcome of a case."""

    @property
    def case(self) -> str:
        """The case: op, format, shape, tokens."""
    @property
    def result(self) -> Literal["pass", "fail", "gap"]:
        """"pass", "fail" or "gap": the backend declares that it lacks the op."""
    @property
    def same_bits(self) -> bool:
        """Whether the results are those of the reference, bit for bit."""
    @property
    def detail(self) -> str:
        """What happened, for people."""

def devices() -> list[Device]:
    """Lists the devices of this machine that this build can open, simulated chips included."""

def conform(backend: Union[str, Backend] = "cpu", *, filter: str = "") -> list[Outcome]:
    """Compares a backend with the reference over all cases, or those whose name contains `filter`."""

def estimate(
    profile: str,
    model: Union[Model, _Path],
    *,
    batch: int = 1,
    prompt: int = 512,
    generate: int = 128,
    chunk: int = 512,
    format: str = "q4_0",
    products: Optional[str] = None,
    activations: str = "fp32",
    chips: Optional[int] = None,
    tp: Optional[int] = None,
    ep: Optional[int] = None,
    cp: Optional[int] = None,
    pp: Optional[int] = None,
    dp: Optional[int] = None,
    sums: Literal["divided", "in-order"] = "divided",
    stored: Optional[str] = None,
    overlap: bool = False,
    kv_stored: Optional[str] = None,
    sparse: bool = False,
) -> _Estimate:
    """Predicts time, energy and cost of serving a model on a chip, from shapes alone. `profile` is the name of
    a profile or the path of one; `model` is a model, a path, or a known shape such as "llama-3-8b", whose
    weights are of `format`.

    `tp` chips share each layer, `ep` groups of them hold different experts, `cp` of these groups hold different positions, `pp` stages have consecutive
    layers, and `dp` copies share the batch. With `chips`, what is not given is free, and the quickest layout
    that fits is taken. `stored` is a number format of a simulated chip in which weights lie in memory, `kv_stored` one of the KV
    cache. With `sparse`, a chip with a sparse rate neither stores nor multiplies two of each four weights."""
