from __future__ import annotations

import os
import signal
import threading
import time

import pytest

import halite

PROMPT = "Once upon a time"


@pytest.fixture
def slow(model: halite.Model) -> halite.Session:
    """A session whose generations take seconds."""
    return halite.Session(model, "reference", context=4096)


def long_prompt(model: halite.Model) -> list[int]:
    return (model.tokenizer.encode(PROMPT) * 1000)[:4000]


def interrupt_soon() -> threading.Thread:
    def interrupt() -> None:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    return thread


@pytest.mark.parametrize("how", ["generate", "stream", "prefill"])
def test_ctrl_c_stops_within_an_op(slow: halite.Session, how: str) -> None:
    sequence, prompt = slow.add(), long_prompt(slow.model)
    start = time.monotonic()
    thread = interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        if how == "generate":
            slow.generate(prompt, sequence=sequence)
        elif how == "stream":
            list(slow.stream(prompt, sequence=sequence))
        else:
            slow.prefill(sequence, prompt)
    assert time.monotonic() - start < 5
    thread.join()
    # The session goes on.
    assert slow.generate(PROMPT, max_tokens=2).finish == "length"


def test_other_threads_run_meanwhile(slow: halite.Session) -> None:
    thread = threading.Thread(target=lambda: slow.generate(long_prompt(slow.model)))
    thread.start()
    for _ in range(100):
        time.sleep(0.001)
    assert thread.is_alive()
    slow.cancel()
    thread.join()


def test_a_busy_session_is_an_error_and_can_be_cancelled(slow: halite.Session) -> None:
    ended: list[object] = []

    def work() -> None:
        ended.append(slow.generate(long_prompt(slow.model)).finish)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.3)
    for use in (slow.add, slow.close, lambda: slow.generate(PROMPT)):
        with pytest.raises(halite.Busy, match="another thread uses it"):
            use()
    slow.cancel()
    thread.join(10)
    assert ended == ["cancelled"]
    # It holds until it is taken back.
    with pytest.raises(halite.Cancelled):
        slow.step([(slow.add(), [5])])
    slow.reset()
    assert slow.step([(slow.add(), [5])]).shape[0] == 1


def test_sessions_of_a_model_run_at_once(model: halite.Model) -> None:
    texts: list[str] = []

    def work() -> None:
        with halite.Session(model, "cpu:threads=1", context=128) as session:
            texts.append("".join(session.stream(PROMPT, max_tokens=24)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 4 and len(set(texts)) == 1


def test_a_handler_that_does_not_raise_does_not_stop(slow: halite.Session) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        timer = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        timer.start()
        assert slow.generate(PROMPT, max_tokens=8).finish == "length"
        timer.join()
        assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)
