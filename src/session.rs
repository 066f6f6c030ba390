//! Sessions: a model on a backend, its sequences and their KV cache.

#[cfg(feature = "save")]
mod save;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use crate::backend::{
    Backend, Buffer, Cancel, Limits, NO_PAGE, Span, Step, Timing, check_support, first_page, upload,
};
use crate::error::{Error, Result};
pub use crate::loaded::Footprint;
use crate::loaded::{Ceiling, Loaded};
use crate::memory::{grow, reserved, zeroed};
use crate::model::{Model, Pooling, ProgramOptions, TOP_K};
use crate::passes;
use crate::program::{Dim, NOT_FINITE, Outputs, PAGE_POSITIONS, Program, Slot, State, TensorId};
use crate::sampler::check_logits;
use crate::weights::Weights;

/// Names of memory in errors.
const OUTPUTS: &str = "a step's outputs";
const SEQUENCES: &str = "a sequence's tokens and page tables";

/// The part of a limit on memory that working memory may take before steps get smaller.
const WORKING_SHARE: u64 = 8;
/// Minimum tokens of steps that get smaller: they still read each weight for many tokens.
const MIN_BATCH: u32 = 32;

/// Maximum runs of one step.
pub const MAX_RUNS: usize = 64;

/// The sizes and options of a session.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct SessionOptions {
    /// Maximum positions of a sequence; `None`: the model's context length, at most 4096.
    pub context: Option<u32>,
    /// Positions of the KV cache, which all sequences share, page by page; `None`, or less than `context`: as many as
    /// `context`.
    pub cache_positions: Option<u32>,
    /// Maximum tokens of a step. Longer prompts take several steps, with the same result.
    pub batch: u32,
    /// Maximum outputs (rows of logits) of a step.
    pub outputs: u32,
    /// Sequences for which sliding-window and recurrent layers reserve memory. Other layers reserve memory for `cache_positions`,
    /// which any number of sequences share.
    pub sequences: u32,
    /// Positions that [`Session::truncate`] can always undo; windows keep this many extra. The positions of
    /// the last step can always be undone. A recurrent layer keeps a state for each [`PAGE_POSITIONS`] of them.
    pub rewind: u32,
    /// Options of the program.
    pub program: ProgramOptions,
    /// Names of tensors to make readable after each step; see [`Session::tap`].
    pub taps: Vec<String>,
    /// Maximum bytes of the whole process: what it has in use when the session is made, weights, KV cache,
    /// working memory. Weights that fit are read into memory, and the CPU streams the others from the file in
    /// each step. A smaller `batch` is used if working memory would take much of it. `None`: weights are
    /// mapped, and the system keeps the pages for which it has room.
    pub memory: Option<u64>,
    /// A folder on a drive. Within `memory`, a KV cache that takes too much of it is kept in a file there, which
    /// has no name and is gone with the process. Without a folder, such a cache is an error.
    pub spill: Option<PathBuf>,
}

impl Default for SessionOptions {
    fn default() -> Self {
        SessionOptions {
            context: None,
            cache_positions: None,
            batch: 512,
            outputs: 1,
            sequences: 1,
            rewind: PAGE_POSITIONS,
            program: ProgramOptions::default(),
            taps: Vec::new(),
            memory: None,
            spill: None,
        }
    }
}

crate::setters!(SessionOptions {
    context: impl Into<Option<u32>>,
    cache_positions: impl Into<Option<u32>>,
    batch: u32,
    outputs: u32,
    sequences: u32,
    rewind: u32,
    program: ProgramOptions,
    taps: Vec<String>,
    memory: impl Into<Option<u64>>,
    spill: impl Into<Option<PathBuf>>,
});

impl SessionOptions {
    /// Returns the positions that a session on this model would reserve.
    pub fn positions(&self, model: &Model) -> u32 {
        self.context.unwrap_or_else(|| model.hparams().context_length.min(4096))
    }

    /// Returns the positions that all sequences share, of which one has at most `positions`.
    fn shared(&self, positions: u32) -> u32 {
        self.cache_positions.unwrap_or(positions).max(positions)
    }

    fn limits(&self, positions: u32) -> Limits {
        let tokens = self.batch.clamp(1, self.shared(positions).max(1));
        Limits { tokens, outputs: self.outputs.clamp(1, tokens) }
    }

    /// Lowers the tokens of a step until its working memory is a small part of the limit.
    fn fitted(&self, program: &Program, backend: &dyn Backend, positions: u32) -> SessionOptions {
        let mut options = self.clone();
        let Some(limit) = self.memory else { return options };
        let program = passes::for_backend(program, backend.caps());
        let working = |options: &SessionOptions| {
            let pages = |window| options.pages(&program, window, positions);
            let needed = Footprint::of(&program, backend, options.limits(positions), pages);
            needed.working_bytes() - needed.kv_bytes
        };
        while options.batch > MIN_BATCH.max(options.outputs) && working(&options) > limit / WORKING_SHARE {
            options.batch = (options.batch / 2).max(MIN_BATCH);
        }
        options
    }

    /// Returns the pages to reserve for each state of a window.
    fn pages(&self, program: &Program, window: Option<u32>, positions: u32) -> u64 {
        let of = |positions: u64| positions.div_ceil(PAGE_POSITIONS.into());
        let all = of(self.shared(positions).into());
        let sequences = u64::from(self.sequences.max(1));
        let is_recurrent = program.is_recurrent(window);
        let Some(window) = window else { return all };
        // A sequence may begin and end in the middle of a page.
        let each = of(u64::from(window) + u64::from(self.rewind)) + 2;
        if is_recurrent {
            // Of the pages that a step adds, it has those that it keeps, which are as few as before; and a checkpoint.
            return all.saturating_add(sequences).min(sequences.saturating_mul(each + 1));
        }
        let added = of(self.limits(positions).tokens.into());
        all.min(each.saturating_mul(sequences) + added)
    }
}

/// Returns the memory that a session with these options would need on a backend. Reads no weights.
///
/// # Errors
/// [`Error::Model`] or [`Error::Program`] if the model has no program, [`Error::Unsupported`] if the backend
/// lacks ops of it.
pub fn footprint(model: &Model, backend: &dyn Backend, options: &SessionOptions) -> Result<Footprint> {
    let positions = options.positions(model);
    let program = model.program(options.program, positions)?;
    let options = options.fitted(&program, backend, positions);
    let program = passes::for_backend(&program, backend.caps());
    check_support(backend, &program)?;
    let limits = options.limits(positions);
    let needed =
        Footprint::of(&program, backend, limits, |window| options.pages(&program, window, positions));
    let ceiling = Ceiling { memory_bytes: options.memory, spill: options.spill.as_deref() };
    needed.within(&program, backend, ceiling)
}

/// Returns the last position, at most `len`, after which a table has a recurrent state at the end of a page.
fn last_state(table: &[u32], len: u32) -> u32 {
    let whole = table.get(..(len / PAGE_POSITIONS) as usize).unwrap_or(table);
    whole.iter().rposition(|&page| page != NO_PAGE).map_or(0, |page| (page as u32 + 1) * PAGE_POSITIONS)
}

/// Checks the logits of each output: rows of `cols`.
fn check_rows(logits: &[f32], cols: usize) -> Result<()> {
    logits.chunks_exact(cols.max(1)).enumerate().try_for_each(|(row, logits)| {
        check_logits(logits.iter().copied())
            .map_err(|got| Error::NotFinite { what: "logits", got: format!("{got} in output {row}") })
    })
}

/// A sequence of a [`Session`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SequenceId(u32);

/// Which tokens of a run have outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum OutputTokens {
    /// None; the run only fills the KV cache.
    None,
    /// The last token.
    Last,
    /// Every token.
    All,
}

/// Consecutive tokens of one sequence in a step.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Run<'a> {
    /// The sequence that the tokens continue.
    pub sequence: SequenceId,
    /// At least one token.
    pub tokens: &'a [u32],
    /// Which tokens have outputs.
    pub outputs: OutputTokens,
}

impl<'a> Run<'a> {
    /// Continues a sequence with tokens; the last one has outputs.
    pub const fn new(sequence: SequenceId, tokens: &'a [u32]) -> Run<'a> {
        Run { sequence, tokens, outputs: OutputTokens::Last }
    }

    /// Sets `outputs`.
    #[must_use]
    pub const fn outputs(mut self, outputs: OutputTokens) -> Run<'a> {
        self.outputs = outputs;
        self
    }
}

/// The result that a step computes for its outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum OutputKind {
    /// Logits; see [`Session::logits`].
    Logits,
    /// Only the most likely tokens; see [`Session::arg_max`].
    ArgMax,
    /// Only the [`TOP_K`] most likely tokens and their logits; see [`Session::top_k`].
    TopK,
}

/// The segments that steps run.
struct Segments {
    /// For steps that only fill the KV cache.
    nothing: Vec<Range<usize>>,
    logits: Vec<Range<usize>>,
    arg_max: Vec<Range<usize>>,
    top: Vec<Range<usize>>,
}

impl Segments {
    fn of(program: &Program) -> Segments {
        let Outputs { logits, arg_max, top, .. } = program.outputs;
        let of = |ids: &[Option<TensorId>]| {
            program.segments_for(&ids.iter().copied().flatten().collect::<Vec<_>>())
        };
        Segments {
            nothing: of(&[]),
            logits: of(&[logits]),
            arg_max: of(&[arg_max]),
            top: of(&top.map_or([None; 2], |top| top.map(Some))),
        }
    }
}

struct Sequence {
    /// For each KV group, the pages in order; in a group with a window, [`NO_PAGE`] for pages before the
    /// window.
    tables: Vec<Vec<u32>>,
    /// The tokens so far.
    tokens: Vec<u32>,
    /// Positions of which the pages hold the results. Fewer than tokens if a recurrent state in the middle of a page was
    /// lost: the next step computes the others again.
    done: u32,
    /// A recurrent state in the middle of a page, before a step that is likely to be undone: its position, and its page.
    checkpoint: Option<(u32, u32)>,
    live: bool,
}

impl Sequence {
    /// Reserves room in tables and tokens for `positions` positions.
    fn reserve(&mut self, positions: u32) -> Result<()> {
        let pages = u64::from(positions.div_ceil(PAGE_POSITIONS));
        self.tables.iter_mut().try_for_each(|table| grow(table, pages, SEQUENCES))?;
        grow(&mut self.tokens, positions.into(), SEQUENCES)
    }

    fn len(&self) -> u32 {
        self.tokens.len() as u32
    }
}

/// The pages of a KV group.
struct Pool {
    window: Option<u32>,
    /// Whether a page holds a recurrent state.
    is_recurrent: bool,
    free: Vec<u32>,
    /// The number of sequences that use each page.
    uses: Vec<u32>,
}

impl Pool {
    fn new(program: &Program, window: Option<u32>, pages: u64) -> Result<Pool> {
        let mut free = reserved(pages, "the list of free pages")?;
        free.extend((0..pages as u32).rev());
        let is_recurrent = program.is_recurrent(window);
        Ok(Pool { window, is_recurrent, free, uses: zeroed(pages, "the list of used pages")? })
    }

    fn take(&mut self) -> Option<u32> {
        let page = self.free.pop()?;
        self.uses[page as usize] = 1;
        Some(page)
    }

    fn release(&mut self, page: u32) {
        let Some(uses) = self.uses.get_mut(page as usize) else { return };
        *uses -= 1;
        if *uses == 0 {
            self.free.push(page);
        }
    }

    /// Frees a table's pages before the first one that its sequence keeps.
    fn drop_before(&mut self, table: &mut [u32], first: usize) {
        let dropped = table.iter_mut().take(first).filter(|page| **page != NO_PAGE);
        dropped.for_each(|page| self.release(std::mem::replace(page, NO_PAGE)));
    }

    /// Returns the length of a sequence, `len` positions before a step and `end` after it, from which new pages are
    /// kept: a cache needs those of the whole step.
    fn keeps_from(&self, len: u32, end: u32) -> u32 {
        if self.is_recurrent { end } else { len }
    }

    /// Returns the first page that a sequence of `len` positions keeps.
    fn first_kept(&self, len: u32, rewind: u32) -> usize {
        first_page(len, self.window.map(|window| window.saturating_add(rewind)))
    }
}

/// A model on a backend, ready to run. [`Session::new`] reserves all memory; a step allocates nothing.
pub struct Session {
    loaded: Loaded,
    segments: Segments,
    taps: Vec<TensorId>,
    positions: u32,
    /// One per KV group.
    pools: Vec<Pool>,
    sequences: Vec<Sequence>,
    tokens: Vec<u32>,
    /// The tokens of the last step that have outputs, as indices into `tokens`.
    output_tokens: Vec<u32>,
    logits: Vec<f32>,
    arg_max: Vec<u32>,
    top_ids: Vec<u32>,
    top_logits: Vec<f32>,
    cancel: Cancel,
    last: Option<Timing>,
    options: SessionOptions,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("model", &self.loaded.model.name())
            .field("backend", &self.loaded.backend.caps().name)
            .field("positions", &self.positions)
            .finish_non_exhaustive()
    }
}

impl Session {
    /// Builds the program, loads the weights and reserves all memory.
    ///
    /// # Errors
    /// Features that the model lacks, ops that the backend lacks (each by name), or out of memory.
    pub fn new(model: &Arc<Model>, backend: &Arc<dyn Backend>, options: &SessionOptions) -> Result<Session> {
        Session::with_progress(model, backend, options, &mut |_| {})
    }

    /// As [`Session::new`]. Calls `progress` with the weight bytes loaded so far.
    ///
    /// # Errors
    /// As [`Session::new`].
    pub fn with_progress(
        model: &Arc<Model>,
        backend: &Arc<dyn Backend>,
        options: &SessionOptions,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Session> {
        let positions = options.positions(model);
        let program = model.program(options.program, positions)?;
        if program.outputs.logits.is_none() {
            let architecture = &model.hparams().architecture;
            let (what, command) = match model.hparams().pooling_type {
                Some(Pooling::Rank) => ("scores of documents", "rerank"),
                _ => ("embeddings", "embed"),
            };
            return Err(Error::Model(format!(
                "this {architecture} computes {what}, not logits: use `Embedder` or `halite {command}`"
            )));
        }
        let names: Vec<&str> = options.taps.iter().map(String::as_str).collect();
        let (program, found) = passes::expose(&program, &names);
        let mut taps = Vec::new();
        for (name, id) in names.iter().zip(found) {
            let id = id.filter(|&id| matches!(program.tensor(id).slot, Slot::Io(_)));
            taps.push(id.ok_or_else(|| {
                Error::argument("tap", "the name of a tensor of the program", format!("`{name}`"))
            })?);
        }
        let options = &options.fitted(&program, &**backend, positions);
        let limits = options.limits(positions);
        let pages = |window| options.pages(&program, window, positions);
        let ceiling = Ceiling { memory_bytes: options.memory, spill: options.spill.as_deref() };
        let loaded = Loaded::new(model, backend, &program, limits, pages, ceiling, progress)?;
        let vocab = u64::from(model.hparams().vocab_size);
        let rows = u64::from(limits.outputs);
        let k = vocab.min(TOP_K.into());
        Ok(Session {
            segments: Segments::of(&loaded.program),
            taps,
            positions,
            pools: loaded
                .program
                .windows
                .iter()
                .map(|&window| Pool::new(&loaded.program, window, pages(window)))
                .collect::<Result<_>>()?,
            sequences: Vec::new(),
            tokens: reserved(limits.tokens.into(), "a step's tokens")?,
            output_tokens: reserved(rows, OUTPUTS)?,
            logits: zeroed(rows.saturating_mul(vocab), OUTPUTS)?,
            arg_max: zeroed(rows, OUTPUTS)?,
            top_ids: zeroed(rows.saturating_mul(k), OUTPUTS)?,
            top_logits: zeroed(rows.saturating_mul(k), OUTPUTS)?,
            cancel: Cancel::default(),
            last: None,
            options: options.clone(),
            loaded,
        })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.loaded.model
    }

    /// The backend.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.loaded.backend
    }

    /// The prepared program.
    pub fn program(&self) -> &Program {
        &self.loaded.program
    }

    /// Statistics of loading the weights.
    pub fn weights(&self) -> &Weights {
        &self.loaded.weights
    }

    /// Maximum tokens of a step.
    pub fn batch(&self) -> u32 {
        self.loaded.limits.tokens
    }

    /// Maximum outputs of a step.
    pub fn outputs(&self) -> u32 {
        self.loaded.limits.outputs
    }

    /// Maximum positions of a sequence.
    pub fn positions(&self) -> u32 {
        self.positions
    }

    /// Sequences for which layers with windows have memory.
    pub fn sequences(&self) -> u32 {
        self.options.sequences
    }

    /// Whether so many tokens of each sequence find room in the KV cache, copies of shared pages included.
    pub(crate) fn has_room(&self, runs: &[(SequenceId, u32)]) -> Result<bool> {
        for (group, pool) in self.pools.iter().enumerate() {
            let mut need = 0;
            for &(id, more) in runs {
                let sequence = self.get(id)?;
                let (len, table) = (sequence.len(), &sequence.tables[group]);
                // More take several steps, between which a window drops pages.
                let more = if pool.window.is_some() { more.min(self.batch()) } else { more };
                let first =
                    pool.first_kept(pool.keeps_from(len, len.saturating_add(more)), self.options.rewind);
                let end = len.saturating_add(more).div_ceil(PAGE_POSITIONS) as usize;
                let written = (len / PAGE_POSITIONS) as usize..end.min(table.len());
                let is_shared = |page: &&u32| pool.uses.get(**page as usize).is_some_and(|uses| *uses > 1);
                let copied = table.get(written).unwrap_or_default().iter().filter(is_shared).count();
                need += end.saturating_sub(table.len().max(first)) + copied;
            }
            if need > pool.free.len() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Frees pages before the windows of a sequence's next position, as its next step would. The last step can then be undone
    /// only as far as [`SessionOptions::rewind`] says.
    pub(crate) fn trim(&mut self, id: SequenceId) -> Result<()> {
        let len = self.get(id)?.len();
        let tables = &mut self.sequences[id.0 as usize].tables;
        for (table, pool) in tables.iter_mut().zip(&mut self.pools) {
            pool.drop_before(table, pool.first_kept(len, self.options.rewind));
        }
        Ok(())
    }

    /// Returns a handle that stops the session's work from another thread.
    pub fn cancel_handle(&self) -> Cancel {
        self.cancel.clone()
    }

    /// Makes another session's handle stop this session too.
    pub(crate) fn stop_with(&mut self, other: &Session) {
        self.cancel = other.cancel_handle();
    }

    /// Starts an empty sequence.
    pub fn add_sequence(&mut self) -> SequenceId {
        if let Some(i) = self.sequences.iter().position(|s| !s.live) {
            self.sequences[i].live = true;
            return SequenceId(i as u32);
        }
        // Reserve room for all positions, so that no step allocates. If this fails, a later step reports it.
        let pages = self.positions.div_ceil(PAGE_POSITIONS).into();
        let tables = self.pools.iter().map(|_| reserved(pages, SEQUENCES).unwrap_or_default()).collect();
        let tokens = reserved(self.positions.into(), SEQUENCES).unwrap_or_default();
        self.sequences.push(Sequence { tables, tokens, done: 0, checkpoint: None, live: true });
        SequenceId(self.sequences.len() as u32 - 1)
    }

    /// Copies a sequence. The two share pages until one of them writes to a page.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is no such sequence.
    pub fn fork(&mut self, of: SequenceId) -> Result<SequenceId> {
        let len = self.get(of)?.len();
        let new = self.add_sequence();
        let reserved = self.sequences[new.0 as usize].reserve(len);
        if reserved.is_err() {
            self.remove(new)?;
        }
        reserved?;
        self.share(of, new);
        Ok(new)
    }

    /// Copies a sequence's content to an empty sequence.
    fn share(&mut self, from: SequenceId, to: SequenceId) {
        let Sequence { tables, tokens, done, .. } = &self.sequences[from.0 as usize];
        let (tables, tokens, done) = (tables.clone(), tokens.clone(), *done);
        for (table, pool) in tables.iter().zip(&mut self.pools) {
            table.iter().filter(|&&page| page != NO_PAGE).for_each(|&page| pool.uses[page as usize] += 1);
        }
        let sequence = &mut self.sequences[to.0 as usize];
        sequence.tables.iter_mut().zip(tables).for_each(|(table, pages)| table.extend(pages));
        sequence.tokens.extend(tokens);
        sequence.done = done;
    }

    /// Returns the length of a sequence in positions.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is no such sequence.
    pub fn len(&self, id: SequenceId) -> Result<u32> {
        Ok(self.get(id)?.len())
    }

    /// Returns the tokens of a sequence.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is no such sequence.
    pub fn tokens(&self, id: SequenceId) -> Result<&[u32]> {
        Ok(&self.get(id)?.tokens)
    }

    /// Moves the session to another backend, for instance when a device is lost: returns a session with the
    /// same options and sequences, which keep their ids. Their tokens run again there; this session need not
    /// work.
    ///
    /// # Errors
    /// As [`Session::new`] and [`Session::step`].
    pub fn moved_to(&self, backend: &Arc<dyn Backend>) -> Result<Session> {
        let mut new = Session::new(&self.loaded.model, backend, &self.options)?;
        // A sequence shares its longest common prefix with an earlier one again. `shared` has, for each
        // sequence, the earlier sequence and the number of tokens. It gets them before its own tokens run.
        let common =
            |a: &Sequence, b: &Sequence| a.tokens.iter().zip(&b.tokens).take_while(|(a, b)| a == b).count();
        let shared: Vec<(usize, usize)> = (self.sequences.iter().enumerate())
            .map(|(i, sequence)| {
                let earlier = self.sequences[..i].iter().map(|of| common(of, sequence)).enumerate();
                earlier.fold((i, 0), |longest, (of, n)| if n > longest.1 { (of, n) } else { longest })
            })
            .collect();
        self.sequences.iter().for_each(|_| _ = new.add_sequence());
        for (i, sequence) in self.sequences.iter().enumerate() {
            let id = SequenceId(i as u32);
            let branches = shared.iter().enumerate().filter(|(_, (of, n))| *of == i && *n > 0);
            let mut ends: Vec<_> = branches.map(|(to, &(_, n))| (n, Some(SequenceId(to as u32)))).collect();
            ends.push((sequence.tokens.len(), None));
            ends.sort_by_key(|(end, _)| *end);
            let mut done = shared[i].1;
            for (end, branch) in ends {
                for tokens in sequence.tokens[done..end].chunks(self.loaded.limits.tokens as usize) {
                    new.step(&[Run::new(id, tokens).outputs(OutputTokens::None)], OutputKind::Logits)?;
                }
                done = end;
                if let Some(to) = branch {
                    new.share(id, to);
                }
            }
        }
        for (new, old) in new.sequences.iter_mut().zip(&self.sequences) {
            new.live = old.live;
        }
        Ok(new)
    }

    /// Truncates a sequence to `len` positions.
    ///
    /// A layer with a window drops pages before it. A sequence can therefore be truncated to its length
    /// before the last step, by [`SessionOptions::rewind`] positions more, or to 0; other lengths may fail.
    ///
    /// A recurrent layer keeps a few states, at most one in [`PAGE_POSITIONS`]. The next step starts from the last one
    /// that is kept, and computes the tokens after it again.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is no such sequence, or if it dropped pages that position `len` sees. The
    /// sequence then stays unchanged.
    pub fn truncate(&mut self, id: SequenceId, len: u32) -> Result<()> {
        let sequence = self.get(id)?;
        let done = self.resumable(sequence, len);
        if done != 0 && !self.has_window(sequence, done) {
            let expected = format!("0, or a position at most {} before the last step", self.options.rewind);
            return Err(Error::argument(
                "truncated length",
                expected,
                format!("{len} of {}", sequence.len()),
            ));
        }
        let sequence = &mut self.sequences[id.0 as usize];
        sequence.tokens.truncate(len as usize);
        self.keep(id, done);
        Ok(())
    }

    /// Keeps the pages of a sequence's first `done` positions.
    fn keep(&mut self, id: SequenceId, done: u32) {
        if let Some(group) = self.recurrent_group() {
            let (pool, sequence) = (&mut self.pools[group], &mut self.sequences[id.0 as usize]);
            if let Some((position, page)) = sequence.checkpoint.take_if(|(position, _)| *position >= done) {
                // Its page has gone on.
                let place = sequence.tables[group].get_mut((done / PAGE_POSITIONS) as usize);
                let unused = match place.filter(|_| position == done) {
                    Some(place) => std::mem::replace(place, page),
                    None => page,
                };
                pool.release(unused);
            }
        }
        let sequence = &mut self.sequences[id.0 as usize];
        sequence.done = done;
        let keep = done.div_ceil(PAGE_POSITIONS) as usize;
        for (table, pool) in sequence.tables.iter_mut().zip(&mut self.pools) {
            table.drain(keep.min(table.len())..).for_each(|page| pool.release(page));
        }
    }

    /// Returns the last position, at most `len`, of which a sequence has all recurrent states.
    fn resumable(&self, sequence: &Sequence, len: u32) -> u32 {
        let len = len.min(sequence.done);
        let Some(group) = self.recurrent_group().filter(|_| len < sequence.done) else { return len };
        let checkpoint =
            sequence.checkpoint.map(|(position, _)| position).filter(|&position| position <= len);
        last_state(&sequence.tables[group], len).max(checkpoint.unwrap_or(0))
    }

    /// Whether a sequence still has all pages that its position `at` sees.
    fn has_window(&self, sequence: &Sequence, at: u32) -> bool {
        let at = at.min(sequence.done);
        let mut tables = sequence.tables.iter().zip(&self.pools);
        tables.all(|(table, pool)| table.get(pool.first_kept(at, 0)) != Some(&NO_PAGE))
    }

    /// Truncates a sequence to its common prefix with `tokens`, and returns the length. If windows dropped
    /// pages that the next position sees, the length is 0; see [`Session::truncate`]. In a model with recurrent layers,
    /// the length is that of the last state in the prefix that is kept.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is no such sequence.
    pub fn reuse(&mut self, id: SequenceId, tokens: &[u32]) -> Result<usize> {
        let kept = self.reusable(id, tokens)?;
        self.truncate(id, kept as u32)?;
        Ok(kept)
    }

    /// What [`Session::reuse`] would keep.
    pub(crate) fn reusable(&self, id: SequenceId, tokens: &[u32]) -> Result<usize> {
        let sequence = self.get(id)?;
        let same = sequence.tokens.iter().zip(tokens).take_while(|(have, want)| have == want).count();
        let kept = self.resumable(sequence, same as u32);
        Ok(if self.has_window(sequence, kept) { kept as usize } else { 0 })
    }

    /// Bytes of the KV cache that a sequence uses; pages that it shares count too.
    pub(crate) fn held_bytes(&self, id: SequenceId) -> Result<u64> {
        let tables = &self.get(id)?.tables;
        let held = |window| {
            let mut groups = tables.iter().zip(&self.pools);
            let table = groups.find(|(_, pool)| pool.window == window).map(|(table, _)| table);
            table.map_or(0, |table| table.iter().filter(|page| **page != NO_PAGE).count() as u64)
        };
        Ok(self.loaded.program.kv_bytes(held))
    }

    /// Ends a sequence and frees its pages.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is no such sequence.
    pub fn remove(&mut self, id: SequenceId) -> Result<()> {
        self.truncate(id, 0)?;
        self.sequences[id.0 as usize].live = false;
        Ok(())
    }

    fn get(&self, id: SequenceId) -> Result<&Sequence> {
        let sequence = self.sequences.get(id.0 as usize).filter(|s| s.live);
        sequence.ok_or_else(|| Error::argument("sequence", "one of this session", id.0))
    }

    /// Runs one step, in which every run continues its sequence. On an error, no sequence changes.
    ///
    /// # Errors
    /// [`Error::Argument`] for runs that do not fit the session, [`Error::ContextFull`],
    /// [`Error::Cancelled`], [`Error::FileChanged`], [`Error::NotFinite`] if an output is not finite, or
    /// errors of the backend.
    pub fn step(&mut self, runs: &[Run<'_>], kind: OutputKind) -> Result<()> {
        self.collect(runs)?;
        if runs.iter().any(|run| self.lags(run.sequence)) {
            runs.iter().try_for_each(|run| self.catch_up(run.sequence))?;
            self.collect(runs)?;
        }
        if let Err(error) = self.prepare(runs) {
            // Pages that a sequence has got for nothing.
            runs.iter().for_each(|run| self.keep(run.sequence, self.sequences[run.sequence.0 as usize].done));
            return Err(error);
        }
        let ran = self.run(runs, kind);
        for run in runs {
            if ran.is_err() {
                self.forget_unfinished(run.sequence);
                continue;
            }
            let sequence = &mut self.sequences[run.sequence.0 as usize];
            sequence.tokens.extend_from_slice(run.tokens);
            sequence.done = sequence.len();
        }
        ran
    }

    /// Gives every run its pages, and keeps states of those that are likely to be undone.
    fn prepare(&mut self, runs: &[Run<'_>]) -> Result<()> {
        for run in runs {
            self.drop_checkpoint(run.sequence);
            self.make_room(run.sequence, run.tokens.len() as u32)?;
        }
        // Results of several tokens are often those of a draft, of which the end is wrong.
        let drafts = runs.iter().filter(|run| run.outputs == OutputTokens::All && run.tokens.len() > 1);
        drafts.into_iter().try_for_each(|run| self.set_checkpoint(run.sequence))
    }

    /// Forgets what a failed step may have changed: the pages that it added, and the recurrent state of a page which it
    /// continued.
    fn forget_unfinished(&mut self, id: SequenceId) {
        let sequence = &self.sequences[id.0 as usize];
        let len = sequence.len();
        let is_kept = sequence.checkpoint.is_some_and(|(position, _)| position == len);
        let done = match self.recurrent_group() {
            Some(_) if !is_kept => self.resumable(sequence, len / PAGE_POSITIONS * PAGE_POSITIONS),
            _ => len,
        };
        let has_windows = self.has_window(sequence, done);
        self.keep(id, if has_windows { done } else { 0 });
    }

    /// The KV group of recurrent states, if there are any.
    fn recurrent_group(&self) -> Option<usize> {
        self.pools.iter().position(|pool| pool.is_recurrent)
    }

    /// Copies a sequence's recurrent state if a page has it that the next step changes, and if there is a page for it.
    fn set_checkpoint(&mut self, id: SequenceId) -> Result<()> {
        let Some(group) = self.recurrent_group() else { return Ok(()) };
        let sequence = &self.sequences[id.0 as usize];
        let len = sequence.len();
        let changed = sequence.tables[group].get((len / PAGE_POSITIONS) as usize).copied();
        let Some(changed) = changed.filter(|_| !len.is_multiple_of(PAGE_POSITIONS)) else { return Ok(()) };
        let Some(page) = self.pools[group].take() else { return Ok(()) };
        let copied = self.copy_page(group, changed, page);
        match copied {
            Ok(()) => self.sequences[id.0 as usize].checkpoint = Some((len, page)),
            Err(_) => self.pools[group].release(page),
        }
        copied
    }

    fn drop_checkpoint(&mut self, id: SequenceId) {
        let Some(group) = self.recurrent_group() else { return };
        if let Some((_, page)) = self.sequences[id.0 as usize].checkpoint.take() {
            self.pools[group].release(page);
        }
    }

    /// Whether a sequence has tokens whose results are not in its pages.
    fn lags(&self, id: SequenceId) -> bool {
        self.sequences.get(id.0 as usize).is_some_and(|sequence| sequence.done < sequence.len())
    }

    /// Computes a sequence's tokens again whose results are not in its pages.
    fn catch_up(&mut self, id: SequenceId) -> Result<()> {
        let sequence = &mut self.sequences[id.0 as usize];
        let done = sequence.done.min(sequence.len()) as usize;
        let again = sequence.tokens.split_off(done);
        let ran = again.chunks(self.batch() as usize).try_for_each(|tokens| {
            self.step(&[Run::new(id, tokens).outputs(OutputTokens::None)], OutputKind::Logits)
        });
        let tokens = &mut self.sequences[id.0 as usize].tokens;
        // What did not run is still a part of the sequence.
        tokens.extend_from_slice(&again[tokens.len() - done..]);
        ran
    }

    /// Runs one step on pages that have room for it, and reads its results.
    fn run(&mut self, runs: &[Run<'_>], kind: OutputKind) -> Result<()> {
        let mut spans = [Span { tables: &[], start: 0, len: 0 }; MAX_RUNS];
        for (span, run) in spans.iter_mut().zip(runs) {
            let sequence = &self.sequences[run.sequence.0 as usize];
            *span = Span { tables: &sequence.tables, start: sequence.len(), len: run.tokens.len() as u32 };
        }
        let step = Step {
            spans: &spans[..runs.len()],
            tokens: &self.tokens,
            outputs: &self.output_tokens,
            cancel: &self.cancel,
        };
        let segments = match (self.output_tokens.is_empty(), kind) {
            (true, _) => &self.segments.nothing,
            (false, OutputKind::Logits) => &self.segments.logits,
            (false, OutputKind::ArgMax) => &self.segments.arg_max,
            (false, OutputKind::TopK) => &self.segments.top,
        };
        let Outputs { logits: logits_id, arg_max: best_id, top, .. } = self.loaded.program.outputs;
        let timing = self.loaded.run(&step, segments)?;
        self.last = Some(timing);
        match kind {
            OutputKind::TopK => {
                let len = self.output_tokens.len() * self.k();
                let (ids, logits) = (&mut self.top_ids[..len], &mut self.top_logits[..len]);
                self.loaded.read(top.map(|top| top[0]), ids)?;
                self.loaded.read(top.map(|top| top[1]), logits)?;
                // NaN and infinity sort first.
                check_rows(logits, len / self.output_tokens.len().max(1))?;
            }
            OutputKind::Logits => {
                let vocab = self.loaded.model.hparams().vocab_size as usize;
                let logits = &mut self.logits[..self.output_tokens.len() * vocab];
                self.loaded.read(logits_id, logits)?;
                check_rows(logits, vocab)?;
            }
            OutputKind::ArgMax => {
                let arg_max = &mut self.arg_max[..self.output_tokens.len()];
                self.loaded.read(best_id, arg_max)?;
                if let Some(row) = arg_max.iter().position(|&id| id == NOT_FINITE as u32) {
                    let got = format!("no finite largest logit in output {row}");
                    return Err(Error::NotFinite { what: "logits", got });
                }
            }
        }
        Ok(())
    }

    /// Checks the runs, and lists their tokens and outputs.
    fn collect(&mut self, runs: &[Run<'_>]) -> Result<()> {
        self.tokens.clear();
        self.output_tokens.clear();
        let total: usize = runs.iter().map(|r| r.tokens.len()).sum();
        if runs.is_empty() || runs.len() > MAX_RUNS || total > self.loaded.limits.tokens as usize {
            let expected =
                format!("1 to {MAX_RUNS} runs of at most {} tokens in all", self.loaded.limits.tokens);
            return Err(Error::argument("step", expected, format!("{} of {total}", runs.len())));
        }
        let vocab = self.loaded.model.hparams().vocab_size;
        for (i, run) in runs.iter().enumerate() {
            self.get(run.sequence)?;
            if runs[..i].iter().any(|r| r.sequence == run.sequence) {
                return Err(Error::argument("step", "one run per sequence", "two of the same"));
            }
            if run.tokens.is_empty() {
                return Err(Error::argument("run", "at least one token", 0));
            }
            if let Some(&bad) = run.tokens.iter().find(|&&t| t >= vocab) {
                return Err(Error::argument("token id", format!("below {vocab}"), bad));
            }
            let first = self.tokens.len();
            self.tokens.extend_from_slice(run.tokens);
            let range = match run.outputs {
                OutputTokens::None => 0..0,
                OutputTokens::Last => self.tokens.len() - 1..self.tokens.len(),
                OutputTokens::All => first..self.tokens.len(),
            };
            if self.output_tokens.len() + range.len() > self.loaded.limits.outputs as usize {
                let got = self.output_tokens.len() + range.len();
                return Err(Error::argument(
                    "step outputs",
                    format!("at most {}", self.loaded.limits.outputs),
                    got,
                ));
            }
            self.output_tokens.extend(range.map(|i| i as u32));
        }
        Ok(())
    }

    /// Gives a sequence writable pages for `more` positions, and drops pages that its windows no longer need.
    fn make_room(&mut self, id: SequenceId, more: u32) -> Result<()> {
        let end = self.get(id)?.len().saturating_add(more);
        if end > self.positions {
            return Err(Error::ContextFull { need: end.into(), have: self.positions.into() });
        }
        self.sequences[id.0 as usize].reserve(end)?;
        (0..self.pools.len()).try_for_each(|group| self.make_room_in(group, id, end))
    }

    /// The same for one KV group and positions up to `end`.
    fn make_room_in(&mut self, group: usize, id: SequenceId, end: u32) -> Result<()> {
        let (pool, sequence) = (&mut self.pools[group], &mut self.sequences[id.0 as usize]);
        let (len, table) = (sequence.len(), &mut sequence.tables[group]);
        let full = match pool.window {
            _ if pool.is_recurrent => Error::StatesFull { sequences: self.options.sequences },
            None => {
                // What others hold is lacking.
                let have = u64::from(self.options.shared(self.positions));
                let need = end.div_ceil(PAGE_POSITIONS).saturating_sub(table.len() as u32);
                Error::ContextFull { need: have + u64::from(need * PAGE_POSITIONS), have }
            }
            Some(window) => Error::WindowsFull { window, sequences: self.options.sequences },
        };
        let first = pool.first_kept(len, self.options.rewind);
        pool.drop_before(table, first);
        let first = pool.first_kept(pool.keeps_from(len, end), self.options.rewind);
        let need = end.div_ceil(PAGE_POSITIONS) as usize;
        while table.len() < need {
            let page = if table.len() < first { Some(NO_PAGE) } else { pool.take() };
            let Some(page) = page else { return Err(full) };
            table.push(page);
        }
        // Copy a shared page before the first write to it.
        for i in (len / PAGE_POSITIONS) as usize..need {
            let shared = self.sequences[id.0 as usize].tables[group][i];
            if self.pools[group].uses.get(shared as usize).is_some_and(|uses| *uses > 1) {
                let Some(page) = self.pools[group].take() else { return Err(full) };
                self.copy_page(group, shared, page)?;
                self.pools[group].release(shared);
                self.sequences[id.0 as usize].tables[group][i] = page;
            }
        }
        Ok(())
    }

    fn copy_page(&self, group: usize, from: u32, to: u32) -> Result<()> {
        for (state, buffer) in self.states_of(group) {
            let bytes = state.page_bytes();
            let mut content: Vec<u8> = zeroed(bytes, "a copied page")?;
            self.loaded.backend.read(buffer, u64::from(from) * bytes, &mut content)?;
            upload(&*self.loaded.backend, buffer, u64::from(to) * bytes, &content)?;
        }
        Ok(())
    }

    /// The states of a KV group and their buffers.
    fn states_of(&self, group: usize) -> impl Iterator<Item = (&State, &Buffer)> {
        let states = self.loaded.program.states.iter().zip(&self.loaded.states);
        states.filter(move |(state, _)| self.loaded.program.kv_group(state) == group)
    }

    /// The logits of the last step's outputs, row by row, if it ran with [`OutputKind::Logits`].
    pub fn logits(&self) -> &[f32] {
        &self.logits[..self.output_tokens.len() * self.loaded.model.hparams().vocab_size as usize]
    }

    /// The most likely token of each output of the last step, if it ran with [`OutputKind::ArgMax`].
    pub fn arg_max(&self) -> &[u32] {
        &self.arg_max[..self.output_tokens.len()]
    }

    /// Returns the number of most likely tokens per output.
    fn k(&self) -> usize {
        self.loaded.model.hparams().vocab_size.min(TOP_K) as usize
    }

    /// The most likely tokens of each output of the last step and their logits, if it ran with
    /// [`OutputKind::TopK`]: rows of [`TOP_K`] (or the whole vocabulary), most likely first, the lower id
    /// first on ties.
    pub fn top_k(&self) -> (&[u32], &[f32]) {
        let len = self.output_tokens.len() * self.k();
        (&self.top_ids[..len], &self.top_logits[..len])
    }

    /// Reads tap number `n` of the options after a step: its rows, `[tokens or outputs, cols]`.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is no such tap; errors of the backend.
    pub fn tap(&self, n: usize) -> Result<Vec<f32>> {
        let missing = || Error::argument("tap", format!("below {}", self.taps.len()), n);
        let id = *self.taps.get(n).ok_or_else(missing)?;
        let t = self.loaded.program.tensor(id);
        let rows = match t.rows {
            Dim::Tokens => self.tokens.len(),
            Dim::Outputs => self.output_tokens.len(),
            Dim::Fixed(rows) => rows as usize,
        };
        let mut out = zeroed(rows as u64 * u64::from(t.cols), "a tap")?;
        self.loaded.read(Some(id), &mut out)?;
        Ok(out)
    }

    /// The columns of tap number `n` of the options; 0 if there is no such tap.
    #[cfg(feature = "quantize")]
    pub(crate) fn tap_cols(&self, n: usize) -> usize {
        self.taps.get(n).map_or(0, |&id| self.loaded.program.tensor(id).cols as usize)
    }

    /// The time of the last step on the device, and its energy if the device tells it.
    pub fn last_timing(&self) -> Option<Timing> {
        self.last
    }
}
