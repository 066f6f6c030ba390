from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import halite

PROMPT = "Once upon a time"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_greedy_text_is_that_of_the_command(session: halite.Session) -> None:
    generation = session.generate(PROMPT, max_tokens=48)
    assert generation.text.startswith(", I have been able to give up my mind to the other.")
    assert generation.finish == "length" and len(generation.tokens) == 48 and str(generation) == generation.text
    assert generation.decode_tokens == 47 and generation.decode_seconds > 0
    command = os.environ.get("HALITE_COMMAND")
    if command is not None:
        command_line = [command, "run", PROMPT, "-n", "48", "--temp", "0", "--quiet"]
        ran = subprocess.run(command_line, capture_output=True, text=True, check=True)
        assert ran.stdout == PROMPT + generation.text + "\n"


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 7}, {"stop": [" any such"]}, {"lookup": 4}])
def test_a_stream_is_the_generation(session: halite.Session, options: halite._GenerateOptions) -> None:
    options["max_tokens"] = 32
    whole = session.generate(PROMPT, **options)
    stream = session.stream(PROMPT, **options)
    assert stream.generation.finish is None
    pieces = list(stream)
    assert len(pieces) > 5 and "".join(pieces) == whole.text == stream.generation.text
    assert stream.generation.tokens == whole.tokens and stream.generation.finish == whole.finish
    assert list(stream) == []


def test_sampling_follows_its_seed(session: halite.Session) -> None:
    texts = {
        session.generate(PROMPT, max_tokens=8, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed).text
        for seed in (1, 2, 3, 1)
    }
    assert len(texts) == 3
    plain = session.generate(PROMPT, max_tokens=48).text
    penalised = session.generate(PROMPT, max_tokens=48, repeat_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.5)
    assert penalised.text != plain


def test_output_is_held_to_rules(session: halite.Session) -> None:
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"], "additionalProperties": False}
    for given in (schema, json.dumps(schema)):
        text = session.generate(PROMPT, json_schema=given, max_tokens=40).text
        assert isinstance(json.loads(text)["yes"], bool)
    assert re.fullmatch("[a-f]{3,5}", session.generate(PROMPT, regex="[a-f]{3,5}", max_tokens=20).text)
    assert session.generate(PROMPT, grammar='root ::= "yes" | "no"', max_tokens=20).text in ("yes", "no")
    with pytest.raises(halite.Malformed, match="constraint"):
        session.generate(PROMPT, regex="(")
    with pytest.raises(halite.InvalidArgument, match="choose one"):
        session.generate(PROMPT, regex="a", grammar='root ::= "a"')


def test_chats(session: halite.Session) -> None:
    model = session.model
    messages = [{"role": "user", "content": "How do you do?"}]
    tokens = model.chat_prompt(messages, template=TEMPLATE)
    assert model.tokenizer.decode(tokens).strip() == "user: How do you do?\nassistant:"
    sequence = session.add()
    answer = session.chat(messages, template=TEMPLATE, sequence=sequence, max_tokens=12)
    assert answer.text == session.generate(tokens, max_tokens=12, show_special=True).text
    messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "Why?"}]
    assert session.chat(messages, template=TEMPLATE, sequence=sequence, max_tokens=12).reused_tokens >= len(tokens)
    with pytest.raises(halite.Unsupported, match="no chat template"):
        session.chat(messages)
    with pytest.raises(halite.InvalidArgument, match="no `content`"):
        session.chat([{"role": "user"}], template=TEMPLATE)
    with pytest.raises(halite.Malformed, match="chat template"):
        model.chat_prompt(messages, template="{{ raise_exception('no') }}")


def test_steps_give_the_same_bits_each_time(session: halite.Session) -> None:
    tokens = session.model.tokenizer.encode(PROMPT)
    a, b = session.add(), session.add()
    logits = session.step([(a, tokens, "all")])
    assert logits.dtype == np.float32 and logits.shape == (len(tokens), len(session.model.tokenizer))
    kept = logits.copy()
    again = session.prefill(b, tokens)
    assert again.shape == (1, logits.shape[1]) and np.array_equal(again[0].view(np.uint32), logits[-1].view(np.uint32))
    # The array is the caller's: later steps leave it alone.
    best = session.arg_max([(a, [5]), (b, np.array([5]))])
    assert best.dtype == np.uint32 and best[0] == best[1] and np.array_equal(logits, kept)
    assert a.tokens == b.tokens == [*tokens, 5] and len(a) == len(tokens) + 1
    fork = a.fork()
    ids, top = session.top_k([(a, [7]), (fork, [7])])
    assert ids.shape == top.shape == (2, 256) and np.array_equal(top[0], top[1])
    b.truncate(len(tokens) + 1)
    assert np.array_equal(np.sort(session.step([(b, [7])])[0])[::-1][:256], top[0])
    assert session.step([(a, [3], "none")]).shape == (0, logits.shape[1])


def test_threads_and_backends_do_not_change_bits(model: halite.Model) -> None:
    tokens = model.tokenizer.encode(PROMPT)
    rows = []
    for backend in ("cpu:threads=1", halite.Backend("cpu", threads=2), "reference", "sim:maia-100"):
        with halite.Session(model, backend, context=64) as session:
            rows.append(session.prefill(session.add(), tokens).view(np.uint32))
    assert all(np.array_equal(rows[0], row) for row in rows)


def test_golden_logits(golden: Path) -> None:
    families = json.loads((golden / "families" / "manifest.json").read_text())
    (row,) = (row for row in families if row["model"] == "llama3.gguf")
    want = np.fromfile(golden / "families" / row["logits"], dtype=np.float32).reshape(row["shape"])
    tokens = row["tokens"]
    with halite.Session(halite.Model(golden / "families" / row["model"]), context=128, outputs=len(tokens)) as session:
        got = session.step([(session.add(), tokens, "all")])[row["positions"]]
        with pytest.raises(halite.Unsupported, match="no vocabulary"):
            session.generate([1, 2])
    assert got.shape == want.shape and np.mean((got - want) ** 2) / np.mean(want**2) < 1e-3


def test_sequences_go_when_nobody_holds_them(model: halite.Model) -> None:
    session = halite.Session(model, context=64)
    # Each takes all of the session's memory.
    tokens = [5] * session.context
    for _ in range(3):
        session.prefill(session.add(), tokens)
    sequence = session.add()
    session.prefill(sequence, tokens)
    with pytest.raises(halite.ContextFull):
        session.generate(PROMPT)
    with pytest.raises(halite.ContextFull):
        session.step([(sequence, [5])])
    sequence.remove()
    assert session.generate(PROMPT, max_tokens=4).finish == "length"
    with pytest.raises(halite.InvalidArgument, match="removed"):
        len(sequence)


def test_a_stream_can_be_left(session: halite.Session) -> None:
    # Together they need more than the session's memory.
    for _ in range(8):
        stream = session.stream(PROMPT * 20, max_tokens=300)
        next(stream)
        stream.close()
        assert list(stream) == [] and stream.generation.text and stream.generation.finish is None


def test_a_stream_notices_changes_of_its_sequence(session: halite.Session) -> None:
    sequence, other = session.add(), session.add()
    stream = session.stream(PROMPT, sequence=sequence)
    next(stream)
    # Other sequences may run between its steps.
    session.step([(other, [5])])
    next(stream)
    session.step([(sequence, [5])])
    with pytest.raises(halite.InvalidArgument, match="a change by another call"):
        next(stream)
    assert list(stream) == []


def test_a_sequence_is_saved_and_restored(session: halite.Session, tmp_path: Path) -> None:
    sequence = session.add()
    session.prefill(sequence, session.model.tokenizer.encode(PROMPT))
    saved = sequence.save()
    path = tmp_path / "sequence.kv"
    assert sequence.save(path) is None and path.read_bytes() == saved
    restored = [session.restore(source) for source in (saved, path, str(path))]
    rows = [session.step([(s, [5])]) for s in (sequence, *restored)]
    assert all(np.array_equal(rows[0], row) for row in rows)
    with pytest.raises(halite.Malformed, match="saved sequence"):
        session.restore(saved[:-1])
    (tmp_path / "precious").write_text("text")
    with pytest.raises(halite.FileError, match="not written"):
        sequence.save(tmp_path / "precious")


def test_wrong_arguments(session: halite.Session, model: halite.Model) -> None:
    sequence = session.add()
    wrong: list[tuple[object, str]] = [
        ([(sequence, [])], "at least one token"),
        ([(sequence, [1 << 30])], "token id"),
        ([(sequence, [1]), (sequence, [1])], "one run per sequence"),
        ([(sequence, [1], "some")], "last, all or none"),
        ([], "1 to 64 runs"),
    ]
    for runs, message in wrong:
        with pytest.raises(halite.InvalidArgument, match=message):
            session.step(runs)  # type: ignore[arg-type]
    with halite.Session(model, context=64) as other:
        with pytest.raises(halite.InvalidArgument, match="another session"):
            session.step([(other.add(), [1])])
    with pytest.raises(halite.InvalidArgument, match="temperature"):
        session.generate(PROMPT, temperature=-1)
    with pytest.raises(halite.InvalidArgument, match="max_tokens"):
        session.generate(PROMPT, max_tokens=-1)
    with pytest.raises(TypeError, match="temperatur"):
        session.generate(PROMPT, temperatur=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="seed"):
        session.generate(PROMPT, seed="one")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="contxt"):
        halite.Session(model, contxt=1)  # type: ignore[call-arg]
    with pytest.raises(halite.InvalidArgument, match="kv_format"):
        halite.Session(model, kv_format="f8")
    with pytest.raises(halite.InvalidArgument, match="lookup"):
        session.generate(PROMPT, lookup=8)


def test_what_is_closed_stays_closed(model: halite.Model) -> None:
    with halite.Session(model, context=64) as session:
        sequence = session.add()
        stream = session.stream(PROMPT)
        next(stream)
    session.close()
    uses: list[Callable[[], object]] = [session.add, sequence.fork, lambda: sequence.tokens, sequence.save, lambda: next(stream)]
    uses += [lambda: session.generate(PROMPT), lambda: session.step([(sequence, [1])])]
    for use in uses:
        with pytest.raises(halite.Closed, match="session: it is closed"):
            use()
