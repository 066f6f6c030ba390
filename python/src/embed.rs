//! Texts to vectors.

use std::sync::{Arc, Mutex};

use halite::EmbedOptions;
use halite::backend::Cancel;
use halite::model::Pooling;
use numpy::{PyArray1, PyArray2};
use pyo3::prelude::*;

use crate::backend::BackendArgument;
use crate::error::{Failure, Fallible};
use crate::model::{Model, pooling_name};
use crate::work::{closed, lock, work};

const EMBEDDER: &str = "embedder";

/// An encoder on a backend. Opening it reserves all its memory. One thread at a time may use it. `pooling` is
/// "mean", "cls", "last" or "none", a vector for each token; None: the model's, which of a reranker is "rank".
/// `truncate` cuts texts that are too long, which are errors otherwise.
#[pyclass(module = "halite", frozen)]
pub struct Embedder {
    state: Mutex<Option<halite::Embedder>>,
    tokenizer: Arc<halite::Tokenizer>,
    cancel: Cancel,
    pooling: &'static str,
    dimension: usize,
    max_text_tokens: u32,
}

fn pooling(name: &str) -> Fallible<Pooling> {
    let all = [Pooling::Mean, Pooling::Cls, Pooling::Last, Pooling::None];
    let found = all.into_iter().find(|&pooling| pooling_name(pooling) == name);
    found.ok_or_else(|| Failure::argument("pooling", "mean, cls, last or none", halite::error::escaped(name)))
}

#[pymethods]
impl Embedder {
    #[new]
    #[pyo3(
        signature = (
            model, backend = BackendArgument::Name("cpu".into()), *, batch = 512, pooling = None, normalize = true,
            truncate = false, memory = None
        ),
        text_signature = "(model, backend='cpu', *, batch=512, pooling=None, normalize=True, truncate=False, memory=None)"
    )]
    #[allow(clippy::too_many_arguments, reason = "they are keywords")]
    fn new(
        py: Python<'_>,
        model: &Bound<'_, Model>,
        backend: BackendArgument<'_>,
        batch: u32,
        pooling: Option<&str>,
        normalize: bool,
        truncate: bool,
        memory: Option<u64>,
    ) -> PyResult<Embedder> {
        let backend = backend.open(py)?;
        let model = model.get();
        let options = EmbedOptions::default()
            .batch(batch)
            .pooling(pooling.map(self::pooling).transpose()?)
            .normalize(normalize)
            .truncate(truncate)
            .memory(memory.or(model.memory));
        let (embedder, tokenizer) = work(py, None, || {
            Ok((halite::Embedder::new(&model.model, &backend, &options)?, model.tokenizer()?))
        })?;
        Ok(Embedder {
            cancel: embedder.cancel_handle(),
            pooling: pooling_name(embedder.pooling()),
            dimension: embedder.dimension(),
            max_text_tokens: embedder.max_text_tokens(),
            state: Mutex::new(Some(embedder)),
            tokenizer,
        })
    }

    /// Returns an array with a row for each text, or with the pooling "none" for each token of each text.
    fn embed<'py>(&self, py: Python<'py>, texts: Vec<String>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let mut locked = lock(EMBEDDER, &self.state)?;
        let embedder = locked.as_mut().ok_or_else(|| closed(EMBEDDER))?;
        let vectors = work(py, Some(&self.cancel), || Ok(embedder.embed(&self.tokenizer, &texts)?))?;
        if vectors.is_empty() {
            return Ok(PyArray2::zeros(py, [0, self.dimension], false));
        }
        Ok(PyArray2::from_vec2(py, &vectors).map_err(|e| Failure::argument("vectors", "one length", e))?)
    }

    /// Returns an array with the score of each document for a query, by a reranker: higher is better.
    fn rank<'py>(
        &self,
        py: Python<'py>,
        query: &str,
        documents: Vec<String>,
    ) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let mut locked = lock(EMBEDDER, &self.state)?;
        let embedder = locked.as_mut().ok_or_else(|| closed(EMBEDDER))?;
        let scores =
            work(py, Some(&self.cancel), || Ok(embedder.rank(&self.tokenizer, query, &documents)?))?;
        Ok(PyArray1::from_vec(py, scores))
    }

    /// Elements of a vector.
    #[getter]
    fn dimension(&self) -> usize {
        self.dimension
    }

    /// Most tokens of a text.
    #[getter]
    fn max_text_tokens(&self) -> u32 {
        self.max_text_tokens
    }

    /// How the vectors of a text's tokens become one.
    #[getter]
    fn pooling(&self) -> &'static str {
        self.pooling
    }

    /// Stops the work within one op: it raises `Cancelled`. It holds for later work, too, until `reset`.
    fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Takes back `cancel`.
    fn reset(&self) {
        self.cancel.reset();
    }

    /// Closes the embedder and frees its memory. Closing it twice is no error.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let state = lock(EMBEDDER, &self.state)?.take();
        py.detach(|| drop(state));
        Ok(())
    }

    fn __enter__(this: Py<Embedder>) -> Py<Embedder> {
        this
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        _class: &Bound<'_, PyAny>,
        _error: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        self.close(py)
    }
}
