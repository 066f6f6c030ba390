from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import halite

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"

# A process that starts in the background may ignore Ctrl-C, and Python leaves that as it is.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def model() -> halite.Model:
    """The built-in model."""
    return halite.Model()


@pytest.fixture
def session(model: halite.Model) -> Iterator[halite.Session]:
    with halite.Session(model, "cpu:threads=2", context=512, outputs=8) as session:
        yield session


@pytest.fixture(scope="session")
def encoder() -> str:
    """The path of a small encoder, which `.ci/python` writes."""
    path = os.environ.get("HALITE_ENCODER")
    if path is None:
        pytest.skip("HALITE_ENCODER names no file")
    return path


@pytest.fixture(scope="session")
def golden() -> Path:
    if not GOLDEN.is_dir():
        pytest.skip("no golden files beside the checkout")
    return GOLDEN
