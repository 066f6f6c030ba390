//! Text embeddings with an encoder (Reimers & Gurevych 2019), or with a decoder whose file has a pooling (Wang et al. 2024).
//! Scores of rerankers are vectors, too: see [`rank`](crate::rank).

use std::ops::Range;
use std::sync::Arc;

use halite_kernels::float::DefaultFloats;
use halite_kernels::formats::Format;

use crate::backend::{Backend, Cancel, Limits, Span, Step, check_support};
use crate::error::{Error, Result};
use crate::loaded::{Ceiling, Footprint, Loaded};
use crate::memory::zeroed;
use crate::model::{Model, Pooling, ProgramOptions};
use crate::passes;
use crate::program::{PAGE_POSITIONS, Program, State, StateKind};
use crate::session::MAX_RUNS;
use crate::tokenizer::{EncodeOptions, Tokenizer};

/// Key of the maximum tokens of a text, special ones included, if below the model's positions:
/// sentence-transformers' `max_seq_length`. It is Halite's own key, because GGUF has none.
pub(crate) const MAX_TEXT_TOKENS: &str = "halite.embedding.max_text_tokens";

/// The sizes and options of an embedder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct EmbedOptions {
    /// Maximum tokens of a step, and so of a text. A step runs as many texts as fit.
    pub batch: u32,
    /// Pooling of token vectors; `None`: the model's.
    pub pooling: Option<Pooling>,
    /// Whether to normalise vectors to unit length; never those of [`Pooling::Rank`].
    pub normalize: bool,
    /// Whether to truncate texts that are too long; otherwise they are errors.
    pub truncate: bool,
    /// Maximum bytes of the process, as [`SessionOptions::memory`](crate::SessionOptions::memory).
    pub memory: Option<u64>,
}

impl Default for EmbedOptions {
    fn default() -> Self {
        EmbedOptions { batch: 512, pooling: None, normalize: true, truncate: false, memory: None }
    }
}

crate::setters!(EmbedOptions {
    batch: u32,
    pooling: impl Into<Option<Pooling>>,
    normalize: bool,
    truncate: bool,
    memory: impl Into<Option<u64>>,
});

/// An encoder on a backend, ready to run. [`Embedder::new`] reserves all device memory.
pub struct Embedder {
    loaded: Loaded,
    segments: Vec<Range<usize>>,
    pooling: Pooling,
    /// Whether tokens see only earlier ones.
    causal: bool,
    dimension: usize,
    options: EmbedOptions,
    max_text_tokens: u32,
    cancel: Cancel,
}

impl std::fmt::Debug for Embedder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Embedder")
            .field("model", &self.loaded.model.name())
            .field("backend", &self.loaded.backend.caps().name)
            .field("pooling", &self.pooling)
            .finish_non_exhaustive()
    }
}

/// The program of an encoder, its limits, and the pages of its cache: keys and values live for one step only.
fn planned(model: &Model, batch: u32) -> Result<(Program, Limits, u64)> {
    let h = model.hparams();
    // A smaller format gains nothing.
    let program = model.program(ProgramOptions { kv_format: Format::F32 }, h.context_length)?;
    // Only sessions clear them between texts.
    if program.states.iter().any(|state| state.kind == StateKind::Recurrent) {
        return Err(Error::Model(format!(
            "family {}: recurrent layers give no vectors of texts",
            h.architecture
        )));
    }
    let tokens = batch.max(1);
    let pages = u64::from(tokens / PAGE_POSITIONS) + MAX_RUNS as u64;
    Ok((program, Limits { tokens, outputs: tokens }, pages))
}

/// Returns the memory that an [`Embedder`] with these options would need on a backend. Reads no weights.
///
/// # Errors
/// As [`crate::session::footprint`].
pub fn footprint(model: &Model, backend: &dyn Backend, options: &EmbedOptions) -> Result<Footprint> {
    let (program, limits, pages) = planned(model, options.batch)?;
    let program = passes::for_backend(&program, backend.caps());
    check_support(backend, &program)?;
    Ok(Footprint::of(&program, backend, limits, |_| pages))
}

/// Cuts a text that has more tokens. The last one stays: it may end texts.
pub fn shorten(text: &mut Vec<u32>, max_tokens: usize) {
    if let Some(&last) = text.last().filter(|_| text.len() > max_tokens) {
        text.truncate(max_tokens.saturating_sub(1));
        text.push(last);
    }
}

impl Embedder {
    /// Builds the program, loads the weights and reserves all memory.
    ///
    /// # Errors
    /// [`Error::Model`] for a model that is not an encoder, without a pooling, or with a classification head and another
    /// pooling than [`Pooling::Rank`], or the reverse; otherwise as
    /// [`crate::session::Session::new`].
    pub fn new(model: &Arc<Model>, backend: &Arc<dyn Backend>, options: &EmbedOptions) -> Result<Embedder> {
        Embedder::with_progress(model, backend, options, &mut |_| {})
    }

    /// As [`Embedder::new`]. Calls `progress` with the weight bytes loaded so far.
    ///
    /// # Errors
    /// As [`Embedder::new`].
    pub fn with_progress(
        model: &Arc<Model>,
        backend: &Arc<dyn Backend>,
        options: &EmbedOptions,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Embedder> {
        let h = model.hparams();
        let (program, limits, pages) = planned(model, options.batch)?;
        let Some(hidden) = program.outputs.hidden else {
            return Err(Error::Model(format!(
                "family {0} gives logits: expected an encoder, or a file whose key `{0}.pooling_type` makes vectors of them",
                h.architecture
            )));
        };
        let pooling = options.pooling.or(h.pooling_type).ok_or_else(|| {
            Error::Model(format!("key `{}.pooling_type` is missing: choose a pooling", h.architecture))
        })?;
        if (pooling == Pooling::Rank) != (h.pooling_type == Some(Pooling::Rank)) {
            return Err(Error::Model(format!(
                "pooling {pooling:?}: expected the file's, {:?}; rank needs a classification head, which gives no other vectors",
                h.pooling_type
            )));
        }
        let causal = program.states.iter().any(State::is_causal);
        let dimension = program.tensor(hidden).cols as usize;
        let stated = model.gguf().optional_u32(MAX_TEXT_TOKENS)?.unwrap_or(h.context_length).max(1);
        let loaded = Loaded::new(
            model,
            backend,
            &program,
            limits,
            |_| pages,
            Ceiling { memory_bytes: options.memory, spill: None },
            progress,
        )?;
        Ok(Embedder {
            segments: loaded.program.segments_for(&[hidden]),
            loaded,
            pooling,
            causal,
            dimension,
            options: *options,
            max_text_tokens: h.context_length.min(limits.tokens).min(stated),
            cancel: Cancel::default(),
        })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.loaded.model
    }

    /// Pooling of token vectors.
    pub fn pooling(&self) -> Pooling {
        self.pooling
    }

    /// Dimension of the embeddings; of [`Pooling::Rank`] the number of labels.
    pub fn dimension(&self) -> usize {
        self.dimension
    }

    /// Maximum tokens of a text.
    pub fn max_text_tokens(&self) -> u32 {
        self.max_text_tokens
    }

    /// Whether texts that are too long are cut.
    pub(crate) fn truncates(&self) -> bool {
        self.options.truncate
    }

    /// Returns a handle that stops the work from another thread.
    pub fn cancel_handle(&self) -> Cancel {
        self.cancel.clone()
    }

    /// Returns a vector per text, or with [`Pooling::None`] per token of each text, in order.
    ///
    /// Control tokens in a text, such as `[MASK]`, are parsed, as in the published tokenizers. Use
    /// [`Tokenizer::quote`] to prevent this.
    ///
    /// # Errors
    /// As [`Embedder::embed_tokens`].
    pub fn embed(&mut self, tokenizer: &Tokenizer, texts: &[impl AsRef<str>]) -> Result<Vec<Vec<f32>>> {
        let options = EncodeOptions::default().parse_special(true);
        let tokens: Vec<_> = texts.iter().map(|text| tokenizer.encode(text.as_ref(), options)).collect();
        self.embed_tokens(&tokens)
    }

    /// As [`Embedder::embed`], for tokens, the special ones included. A vector does not depend on the other
    /// texts.
    ///
    /// # Errors
    /// [`Error::Argument`] for a text without tokens, with too many tokens (truncation, if enabled, keeps the
    /// last one), or with a token outside the vocabulary; [`Error::Cancelled`], [`Error::FileChanged`], or
    /// errors of the backend.
    pub fn embed_tokens(&mut self, texts: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
        let _floats = DefaultFloats::set();
        let max_text_tokens = self.max_text_tokens as usize;
        let mut fitting = texts.to_vec();
        for (i, text) in fitting.iter_mut().enumerate() {
            if text.is_empty() {
                return Err(Error::argument("text", "at least one token", format!("none in text {i}")));
            }
            if text.len() > max_text_tokens && !self.options.truncate {
                let limit = if self.max_text_tokens == self.options.batch {
                    "the batch"
                } else {
                    "the model's limit"
                };
                let expected = format!("at most {max_text_tokens} tokens, {limit} (or set `truncate`)");
                return Err(Error::argument("text", expected, format!("{} in text {i}", text.len())));
            }
            shorten(text, max_text_tokens);
        }
        let mut vectors = Vec::new();
        let mut rest = &fitting[..];
        while !rest.is_empty() {
            let mut tokens = 0;
            let fits = rest.iter().take(MAX_RUNS).take_while(|text| {
                tokens += text.len();
                tokens <= self.options.batch.max(1) as usize
            });
            let (now, later) = rest.split_at(fits.count());
            self.step(now, &mut vectors)?;
            rest = later;
        }
        Ok(vectors)
    }

    /// Runs texts that fit in one step, and pools their vectors.
    fn step(&mut self, texts: &[Vec<u32>], vectors: &mut Vec<Vec<f32>>) -> Result<()> {
        // The pages of the texts follow each other.
        let mut tables = Vec::new();
        let mut page = 0;
        for text in texts {
            let pages = (text.len() as u32).div_ceil(PAGE_POSITIONS);
            tables.push(vec![(page..page + pages).collect::<Vec<u32>>(); self.loaded.program.windows.len()]);
            page += pages;
        }
        let mut spans = Vec::new();
        let (mut output_tokens, mut first) = (Vec::new(), 0);
        for (text, tables) in texts.iter().zip(&tables) {
            let len = text.len() as u32;
            spans.push(Span { tables, start: 0, len });
            output_tokens.extend(match self.pooling {
                Pooling::None | Pooling::Mean => first..first + len,
                Pooling::Cls => first..first + 1,
                Pooling::Rank if !self.causal => first..first + 1,
                Pooling::Last | Pooling::Rank => first + len - 1..first + len,
            });
            first += len;
        }
        let tokens = texts.concat();
        let step = Step { spans: &spans, tokens: &tokens, outputs: &output_tokens, cancel: &self.cancel };
        self.loaded.run(&step, &self.segments)?;
        let mut rows: Vec<f32> =
            zeroed(output_tokens.len() as u64 * self.dimension() as u64, "the embeddings")?;
        self.loaded.read(self.loaded.program.outputs.hidden, &mut rows)?;
        if let Some(bad) = rows.iter().find(|x| !x.is_finite()) {
            return Err(Error::NotFinite { what: "embeddings", got: bad.to_string() });
        }
        let mut rows = rows.chunks_exact(self.dimension());
        for text in texts {
            match self.pooling {
                Pooling::None => vectors.extend(rows.by_ref().take(text.len()).map(<[f32]>::to_vec)),
                Pooling::Mean => vectors.push(mean(rows.by_ref().take(text.len()), self.dimension())),
                Pooling::Cls | Pooling::Last | Pooling::Rank => {
                    vectors.extend(rows.next().map(<[f32]>::to_vec))
                }
            }
        }
        let new = vectors.len() - if self.pooling == Pooling::None { tokens.len() } else { texts.len() };
        if self.options.normalize && self.pooling != Pooling::Rank {
            vectors[new..].iter_mut().for_each(|vector| normalize(vector));
        }
        Ok(())
    }
}

/// Computes the mean of rows.
fn mean<'a>(rows: impl Iterator<Item = &'a [f32]>, dimension: usize) -> Vec<f32> {
    let (mut sum, mut count) = (vec![0.0f64; dimension], 0.0);
    for row in rows {
        sum.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
        count += 1.0;
    }
    sum.into_iter().map(|sum| (sum / count) as f32).collect()
}

/// Normalises a vector to unit length, unless its length is zero.
fn normalize(vector: &mut [f32]) {
    let length = dot(vector, vector).sqrt();
    if length > 0.0 {
        vector.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// Returns the cosine similarity of two vectors; 0 if one of them is zero.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let lengths = (dot(a, a) * dot(b, b)).sqrt();
    if lengths > 0.0 { dot(a, b) / lengths } else { 0.0 }
}
