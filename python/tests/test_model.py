from __future__ import annotations

from pathlib import Path

import pytest

import halite


def test_a_model_tells_what_it_is(model: halite.Model) -> None:
    h = model.hyperparameters
    assert h["architecture"] == model.architecture == "llama"
    assert h["vocab_size"] == len(model.tokenizer)
    metadata = model.metadata()
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == h["block_count"]
    assert len(metadata["tokenizer.ggml.tokens"]) == h["vocab_size"]
    assert isinstance(metadata["llama.attention.layer_norm_rms_epsilon"], float)
    assert "Model(name=" in repr(model)


def test_a_model_opens_from_bytes() -> None:
    path = Path(__file__).parents[2] / "models" / "austen" / "halite-austen.gguf"
    model = halite.Model.from_bytes(path.read_bytes())
    assert model.name == halite.Model(path).name == halite.Model(str(path)).name == halite.Model().name


def test_text_to_tokens_and_back(model: halite.Model) -> None:
    tokenizer = model.tokenizer
    tokens = tokenizer.encode("Once upon a time, Émile said")
    assert tokenizer.decode(tokens).strip() == "Once upon a time, Émile said"
    assert b"".join(tokenizer.token_bytes(t) for t in tokens).decode().strip() == "Once upon a time, Émile said"
    assert tokenizer.encode("Once")[-1:] == tokenizer.encode("Once", add_special=False)[-1:]
    assert tokenizer.eos is not None and tokenizer.is_end(tokenizer.eos)
    with pytest.raises(halite.InvalidArgument, match="token id"):
        tokenizer.decode([1 << 30])


def test_backends_open_by_name() -> None:
    cpu = halite.Backend("cpu", threads=2)
    assert (cpu.name, cpu.contract) == ("cpu", "exact") and "2 threads" in cpu.device
    assert "1 thread" in halite.Backend("cpu:threads=1").device
    names = [device.name for device in halite.devices()]
    assert "cpu" in names and "sim:maia-100" in names
    with pytest.raises(halite.Error, match="expected cpu"):
        halite.Backend("tpu")
    with pytest.raises(halite.Error, match="has no option --colour"):
        halite.Backend("cpu", colour="red")
    with pytest.raises(halite.Error, match="whole number"):
        halite.Backend("cpu:threads=many")


def test_memory_is_known_before_a_session_opens(model: halite.Model) -> None:
    small, large = (model.footprint(context=context) for context in (64, 1024))
    assert small["weights"] == large["weights"] and small["kv"] < large["kv"]
    assert model.footprint(context=1024, kv_format="q8_0")["kv"] < large["kv"]


def test_a_limit_on_memory_is_an_error_of_its_own() -> None:
    with pytest.raises(halite.OutOfMemory, match="out of memory") as caught:
        halite.Session(halite.Model(memory=1 << 20))
    assert isinstance(caught.value, MemoryError) and isinstance(caught.value, halite.Error)


def test_files_that_are_missing_or_wrong(tmp_path: Path) -> None:
    with pytest.raises(halite.FileError, match="nowhere.gguf") as caught:
        halite.Model(tmp_path / "nowhere.gguf")
    assert isinstance(caught.value, OSError)
    (tmp_path / "text.gguf").write_text("no model at all")
    with pytest.raises(halite.Malformed, match="text.gguf") as malformed:
        halite.Model(tmp_path / "text.gguf")
    assert isinstance(malformed.value, ValueError)
    with pytest.raises(halite.FileError):
        halite.Model(lora=[(tmp_path / "no.gguf", 0.5)])
    with pytest.raises(halite.Error):
        halite.Model(lora=[tmp_path / "text.gguf"])


@pytest.mark.parametrize("briefly", [True, False])
def test_a_panic_is_an_exception(briefly: bool, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(halite.InternalError, match="panic: as asked"):
        halite._panic(briefly)  # type: ignore[attr-defined]


def test_scores_of_documents() -> None:
    import numpy as np

    file = Path(__file__).resolve().parents[2] / "tests" / "data" / "rank" / "decoder.gguf"
    with halite.Embedder(halite.Model(file)) as embedder:
        assert (embedder.pooling, embedder.dimension) == ("rank", 2)
        scores = embedder.rank("Who may use the Work?", ["You may use the Work.", "the names of others"])
        # llama.cpp's, as tests/data/rank/expected.json has them.
        assert scores.dtype == np.float32 and np.allclose(scores, [0.777683377, 0.959780276], atol=1e-5)


def test_vectors_of_texts(encoder: str) -> None:
    import numpy as np

    with halite.Embedder(halite.Model(encoder), truncate=True) as embedder:
        vectors = embedder.embed(["a cat", "the mat", "a cat"])
        assert vectors.dtype == np.float32 and vectors.shape == (3, embedder.dimension)
        assert np.array_equal(vectors[0], vectors[2]) and not np.array_equal(vectors[0], vectors[1])
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
        assert embedder.embed([]).shape == (0, embedder.dimension)
        with pytest.raises(halite.Malformed, match="no reranker"):
            embedder.rank("a", ["b"])
        with pytest.raises(TypeError):
            embedder.embed("a text alone")
        embedder.cancel()
        with pytest.raises(halite.Cancelled):
            embedder.embed(["a cat"])
        embedder.reset()
        assert np.array_equal(embedder.embed(["a cat"])[0], vectors[0])
    with pytest.raises(halite.Closed):
        embedder.embed(["a cat"])
    with pytest.raises(halite.InvalidArgument, match="pooling"):
        halite.Embedder(halite.Model(encoder), pooling="max")
    with pytest.raises(halite.Malformed, match="Embedder"):
        halite.Session(halite.Model(encoder))


def test_estimates() -> None:
    estimate = halite.estimate("maia-100", "llama-3-8b", batch=8, prompt=2048, generate=256)
    assert estimate["fits"] and 0 < estimate["step_s"] < estimate["first_token_s"] < estimate["seconds"]
    assert abs(sum(estimate["rests_on"].values()) - 1) < 1e-6
    halite.estimate("maia-100", halite.Model(), prompt=128)
    with pytest.raises(halite.InvalidArgument, match="context"):
        halite.estimate("maia-100", halite.Model(), prompt=2048)
    energy = estimate["joules_per_token_by"]
    assert energy and abs(sum(energy.values()) - (estimate["joules_per_token"] or 0)) < 1e-9
    halves = halite.estimate("maia-100", "llama-3-8b", batch=8, tp=2, cp=2, overlap=True)
    assert halves["chips"] == 4 and halves["layout"]["cp"] == 2
    assert estimate["chips"] == 1 and estimate["exchange_fraction"] == 0
    eight = halite.estimate("maia-100", "llama-3-8b", batch=8, prompt=2048, generate=256, chips=8)
    assert eight["chips"] == 8 and eight["step_s"] < estimate["step_s"]
    pipeline = halite.estimate("maia-100", "llama-3-8b", chips=4, pp=4)
    assert pipeline["layout"] == {"tp": 1, "ep": 1, "cp": 1, "pp": 4, "dp": 1}
    with pytest.raises(halite.InvalidArgument, match="chips"):
        halite.estimate("maia-100", "llama-3-8b", chips=0)
    with pytest.raises(halite.InvalidArgument):
        halite.estimate("maia-100", "llama-3-8b", batch=0)
    with pytest.raises(halite.Error):
        halite.estimate("no-such-chip", "llama-3-8b")


def test_conformance() -> None:
    outcomes = halite.conform(filter="Glu Gelu")
    assert outcomes and all(outcome.result == "pass" and outcome.same_bits for outcome in outcomes)
