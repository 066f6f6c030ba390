//! The traits that a chip implements.
//!
//! A [`Backend`] owns memory and turns a [`Program`] into a [`Plan`]; a plan runs steps. This module knows no
//! model, and the modules above it know no chip. `template.rs` is a complete backend
//! to copy; `examples/my-chip` is a crate of its own that runs models.

pub mod cpu;
pub mod driver;
pub mod energy;
pub mod host;
pub mod hybrid;
pub mod reference;
pub mod sharded;
pub mod template;

use std::any::Any;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::map::Region;
use crate::program::{Op, PAGE_POSITIONS, Program, Sight, StateId, TensorId};
use energy::Energy;

/// A backend's guarantee about its results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Contract {
    /// Always bit-identical to the reference.
    Exact,
    /// Close to the reference; conformance defines the bounds.
    Close,
    /// Computed in the device's own number formats; conformance allows their rounding error.
    Native,
}

impl Contract {
    /// Name for reports.
    pub fn name(self) -> &'static str {
        match self {
            Contract::Exact => "exact",
            Contract::Close => "close",
            Contract::Native => "native",
        }
    }
}

/// The fusions that a backend requests from `passes::fuse`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Fusions {
    /// Merge matmuls of the same input into one op with several parts.
    pub shared_input: bool,
    /// Merge an addition into the norm that follows.
    pub add_norm: bool,
    /// Merge a gated linear unit into its matmuls, as an epilogue.
    pub glu: bool,
    /// Merge a residual addition into its matmul, as an epilogue.
    pub residual: bool,
    /// The rotation of queries and keys, and the write to the cache, become one op.
    pub rope_kv: bool,
}

impl Fusions {
    /// All fusions.
    pub const ALL: Fusions =
        Fusions { shared_input: true, add_norm: true, glu: true, residual: true, rope_kv: true };
}

crate::setters!(const Fusions { shared_input: bool, add_norm: bool, glu: bool, residual: bool, rope_kv: bool });

/// The row layout that a backend reads weights in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rows {
    /// As stored, plain or interleaved.
    AsStored,
    /// Plain rows.
    Plain,
    /// Interleaved rows in formats that support them, plain rows in the others.
    Interleaved,
}

/// A backend's fixed properties.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Caps {
    /// Name, as in `--backend`.
    pub name: String,
    /// Description of the device, for people.
    pub device: String,
    /// Bytes of memory available to buffers.
    pub memory_bytes: u64,
    /// Row layout of weights; loading converts them to it.
    pub rows: Rows,
    /// Fusions that the backend requests.
    pub fusions: Fusions,
    /// Guarantee about results.
    pub contract: Contract,
    /// Whether ops can read weights through a stream; see [`Backend::import`].
    pub streams: bool,
}

impl Caps {
    /// Describes a device with memory without limit, plain rows, no fusions, and results close to the
    /// reference.
    pub fn new(name: impl Into<String>, device: impl Into<String>) -> Caps {
        Caps {
            name: name.into(),
            device: device.into(),
            memory_bytes: u64::MAX,
            rows: Rows::Plain,
            fusions: Fusions::default(),
            contract: Contract::Close,
            streams: false,
        }
    }
}

crate::setters!(Caps { memory_bytes: u64, rows: Rows, fusions: Fusions, contract: Contract, streams: bool });

/// Whether a backend can run an op.
// Exhaustive: there is no third answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Support {
    /// The backend runs it.
    Native,
    /// The backend does not run it, for this reason.
    Unsupported(Gap),
}

/// Why a backend does not run an op.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gap {
    /// The hardware cannot run it.
    Never(String),
    /// It is not implemented yet.
    NotYet(String),
}

impl std::fmt::Display for Gap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Gap::Never(why) => write!(f, "never: {why}"),
            Gap::NotYet(why) => write!(f, "not yet: {why}"),
        }
    }
}

/// An op and its program: all that decides whether a backend can run it.
#[derive(Debug, Clone, Copy)]
pub struct OpSig<'a> {
    /// The program, for shapes and formats.
    pub program: &'a Program,
    /// The op.
    pub op: &'a Op,
}

/// The use of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Usage {
    /// Written once, read by every step.
    Weight,
    /// Read and written by steps.
    State,
    /// Exchanged between the host and steps.
    Io,
}

/// Memory of one backend. Clones are cheap and share the memory.
#[derive(Debug, Clone)]
pub struct Buffer {
    bytes: u64,
    memory: Arc<dyn Any + Send + Sync>,
}

impl Buffer {
    /// Wraps a backend's own memory type.
    pub fn new<M: Any + Send + Sync>(bytes: u64, memory: M) -> Buffer {
        Buffer { bytes, memory: Arc::new(memory) }
    }

    /// Returns the size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the backend's memory, if it is of type `M`.
    pub fn memory<M: Any>(&self) -> Option<&M> {
        (*self.memory).downcast_ref()
    }
}

/// An operand of an op, and the buffer that holds it.
#[derive(Debug, Clone, Copy)]
pub struct Operand<'a, Id> {
    /// Which tensor or state of the program it is.
    pub id: Id,
    /// Its memory, from the first byte on.
    pub buffer: &'a Buffer,
}

/// An op on buffers: what [`Op::try_map`] makes of an op of a program, for a device with memory of its own.
pub type DeviceOp<'a> = Op<Operand<'a, TensorId>, Operand<'a, StateId>>;

/// A request to stop, from any thread. Backends check it before every op.
///
/// Who runs work on behalf of others can also interrupt it, at a deadline or a signal, and take that back
/// without losing a request of theirs.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicU8>);

/// Bits of [`Cancel`].
const REQUESTED: u8 = 1;
const INTERRUPTED: u8 = 2;

impl Cancel {
    /// Requests the work to stop: it returns `Error::Cancelled` within one op.
    pub fn cancel(&self) {
        self.0.fetch_or(REQUESTED, Ordering::Relaxed);
    }

    /// Clears the request, so that later work runs.
    pub fn reset(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    /// Stops the work as [`Cancel::cancel`] does, until [`Cancel::resume`].
    pub fn interrupt(&self) {
        self.0.fetch_or(INTERRUPTED, Ordering::Relaxed);
    }

    /// Takes back [`Cancel::interrupt`]. A request to cancel stays.
    pub fn resume(&self) {
        self.0.fetch_and(!INTERRUPTED, Ordering::Relaxed);
    }

    /// Whether a stop was requested.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed) != 0
    }
}

/// In a page table: the sequence dropped this page.
pub const NO_PAGE: u32 = u32::MAX;

// Exhaustive from here to `Bindings`: who drives a plan must fill every field, and a new one means new work for
// each plan.

/// Consecutive tokens of one sequence in a step.
#[derive(Debug, Clone, Copy)]
pub struct Span<'a> {
    /// For each KV group ([`Program::windows`]), the sequence's page table: the pages of each state of the
    /// group, in order. They cover `start + len` positions. Pages entirely before the first token's window
    /// may be [`NO_PAGE`]. Of recurrent states, all may be except the page of position `start - 1` and the last; see
    /// [`StateKind::Recurrent`](crate::program::StateKind::Recurrent).
    pub tables: &'a [Vec<u32>],
    /// Position of the first token.
    pub start: u32,
    /// Number of tokens.
    pub len: u32,
}

/// One step: a batch of tokens of one or more sequences.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// In the order of `tokens`.
    pub spans: &'a [Span<'a>],
    /// Token ids, span after span.
    pub tokens: &'a [u32],
    /// Tokens that have outputs: indices into `tokens`, in increasing order.
    pub outputs: &'a [u32],
    /// Cancels the step.
    pub cancel: &'a Cancel,
}

impl Step<'_> {
    /// Returns the row of each token in a table of `rows` rows for [`Index::Part`](crate::program::Index::Part).
    ///
    /// # Errors
    /// [`Error::Argument`] if a span does not start at position 0.
    pub fn parts(&self, separator: u32, rows: usize) -> Result<impl Iterator<Item = u32> + '_> {
        if let Some(span) = self.spans.iter().find(|span| span.start > 0) {
            return Err(Error::argument("position of a text of parts", 0, span.start));
        }
        let last = rows.saturating_sub(1);
        let starts = self.spans.iter().scan(0, |next, span| {
            let start = *next;
            *next += span.len as usize;
            Some((start, *next))
        });
        let parts = starts.flat_map(move |(start, end)| {
            let tokens = self.tokens.get(start..end).unwrap_or(&[]);
            tokens.iter().scan(0, move |part, &token| {
                let row = *part;
                *part = (row + usize::from(token == separator)).min(last);
                Some(row as u32)
            })
        });
        Ok(parts)
    }
}

/// Maximum sizes of a plan's steps. Memory is reserved once, so that no step allocates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Maximum tokens of a step.
    pub tokens: u32,
    /// Maximum outputs of a step.
    pub outputs: u32,
}

/// Buffers in the order of the program's slots.
///
/// [`Backend::prepare`] knows slots alone, and compiles commands that name slots. Buffers come with each
/// submission. They are often those of the last one, but streamed weights change theirs. A device may keep
/// what it bound, and binds again if a buffer is not the same memory.
#[derive(Debug, Clone, Copy)]
pub struct Bindings<'a> {
    /// One per tensor in `Program::weights`.
    pub weights: &'a [Buffer],
    /// One per state in `Program::states`, whole pages of `State::page_bytes`.
    pub states: &'a [Buffer],
    /// One per tensor in `Program::io`, large enough for the plan's limits.
    pub io: &'a [Buffer],
}

/// A submission, to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(pub u64);

/// The clock of a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Clock {
    /// The host's clock.
    Host,
    /// The device's own timestamps.
    Device,
    /// A timing model of the device.
    Simulated,
}

/// The time of the submissions of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Timing {
    /// Time from start to end.
    pub elapsed: Duration,
    /// Clock of the time.
    pub clock: Clock,
    /// Energy, if the backend knows it.
    pub energy: Option<Energy>,
}

impl Timing {
    /// Time on a clock.
    pub const fn new(elapsed: Duration, clock: Clock) -> Timing {
        Timing { elapsed, clock, energy: None }
    }

    /// The time and the energy of both, on the clock of `next`.
    #[must_use]
    pub fn then(self, next: Timing) -> Timing {
        let energy = Energy::sum(self.energy, next.energy);
        Timing { elapsed: self.elapsed + next.elapsed, energy, ..next }
    }

    /// A part of it, from 0 to 1.
    #[must_use]
    pub fn part(self, fraction: f64) -> Timing {
        let energy = self.energy.map(|energy| Energy { joules: energy.joules * fraction, ..energy });
        Timing { elapsed: self.elapsed.mul_f64(fraction.clamp(0.0, 1.0)), energy, ..self }
    }
}

crate::setters!(Timing { energy: Option<Energy> });

/// A device: its memory, and the programs that it runs.
pub trait Backend: Send + Sync {
    /// Returns the backend's fixed properties.
    fn caps(&self) -> &Caps;

    /// Returns whether the backend can run an op. The answer may depend on formats and shapes, never on
    /// values.
    fn supports(&self, sig: &OpSig<'_>) -> Support;

    /// Describes, in a line for people, which kernel runs an op for `tokens` tokens, and why. May be empty.
    fn explain(&self, _sig: &OpSig<'_>, _tokens: u32) -> String {
        String::new()
    }

    /// Allocates zeroed memory.
    ///
    /// # Errors
    /// `Error::OutOfMemory`.
    fn alloc(&self, bytes: u64, usage: Usage) -> Result<Buffer>;

    /// Wraps mapped host pages without a copy; returns `None` if the device cannot read them. A region with a
    /// [`Region::stream`] is read during each step, by a device whose [`Caps::streams`].
    ///
    /// # Errors
    /// Errors of the device.
    fn import(&self, region: &Region) -> Result<Option<Buffer>>;

    /// Allocates zeroed memory for a KV cache in a file without a name in `folder`, of which the device keeps
    /// `kept_bytes` in memory between ops. Returns `None` if the device cannot.
    ///
    /// # Errors
    /// `Error::Io`.
    fn alloc_spilled(&self, bytes: u64, kept_bytes: u64, folder: &Path) -> Result<Option<Buffer>> {
        let _ = (bytes, kept_bytes, folder);
        Ok(None)
    }

    /// Writes `range` of a buffer: `write` fills the bytes, in one or more consecutive pieces.
    ///
    /// # Errors
    /// `Error::Argument` if the buffer is another backend's or the range is outside; errors of the device.
    fn fill(&self, dst: &Buffer, range: Range<u64>, write: &mut dyn FnMut(&mut [u8])) -> Result<()>;

    /// Reads a buffer's bytes from `offset`.
    ///
    /// # Errors
    /// As [`Backend::fill`].
    fn read(&self, src: &Buffer, offset: u64, dst: &mut [u8]) -> Result<()>;

    /// Prepares a valid program to run. Callers use [`prepare`], which rejects ops that [`Backend::supports`]
    /// declares as gaps. Conformance calls this method directly, to find gaps that should no longer be
    /// declared.
    ///
    /// # Errors
    /// Errors of the device. A backend never falls back to another device.
    fn prepare(&self, program: &Arc<Program>, limits: Limits) -> Result<Box<dyn Plan>>;

    /// Returns the bytes that a plan of this program needs besides its buffers, without preparing it.
    fn scratch_bytes(&self, program: &Program, limits: Limits) -> u64;

    /// Reports, in lines for people, what a user must know of the work so far, such as injected faults. A
    /// backend with such a report returns its lines before the first step too; most backends have none.
    fn report(&self) -> Vec<String> {
        Vec::new()
    }

    /// Loses the device for good, as when it is unplugged, so that tests see what later calls do: they must be
    /// errors. Returns whether the backend can.
    fn lose(&self) -> bool {
        false
    }
}

/// A prepared program.
pub trait Plan: Send {
    /// Starts the given segments of a step. Scratch tensors live until the next submission that starts at
    /// segment 0.
    ///
    /// A plan that computes on the host's threads sets the floating-point environment first, with
    /// [`DefaultFloats`](halite_kernels::float::DefaultFloats): the program around it may round in another
    /// way, or flush small numbers to zero.
    ///
    /// # Errors
    /// `Error::Cancelled`, `Error::Argument`, or errors of the device.
    fn submit(&mut self, step: &Step<'_>, segments: Range<usize>, bindings: &Bindings<'_>) -> Result<Ticket>;

    /// Waits for a submission. The time is that of its step so far: submissions add up, from the last one
    /// that started at segment 0.
    ///
    /// # Errors
    /// Errors of the device.
    fn wait(&mut self, ticket: Ticket) -> Result<Timing>;
}

/// Prepares a program to run on a backend.
///
/// # Errors
/// [`Error::Program`] if it is not valid, [`Error::Unsupported`] with a list of the ops that the backend
/// lacks, or errors of the device.
pub fn prepare(backend: &dyn Backend, program: &Arc<Program>, limits: Limits) -> Result<Box<dyn Plan>> {
    program.validate()?;
    check_support(backend, program)?;
    backend.prepare(program, limits)
}

/// Checks that a backend has all ops of a program.
///
/// # Errors
/// [`Error::Unsupported`] with a line per op that it lacks.
pub fn check_support(backend: &dyn Backend, program: &Program) -> Result<()> {
    let mut gaps: Vec<String> = Vec::new();
    for (segment, op) in program.ops() {
        if let Support::Unsupported(gap) = backend.supports(&OpSig { program, op }) {
            let segment = program.segments.get(segment).map_or("?", |s| &s.name);
            gaps.push(format!("{} in `{segment}`: {gap}", op.name()));
        }
    }
    // Of several products of one kind, one is named.
    gaps.dedup();
    if gaps.is_empty() {
        return Ok(());
    }
    Err(Error::Unsupported { backend: backend.caps().name.clone(), gaps })
}

/// Returns the first page that tokens from position `start` on see through a window.
pub(crate) fn first_page(start: u32, window: Option<u32>) -> usize {
    Sight { window, after: 0, aligned: false }.chunks(start as usize, usize::MAX).start
}

/// Validates a step against the plan's limits and state buffers. For [`Plan::submit`].
///
/// # Errors
/// [`Error::Argument`].
pub fn check_step(step: &Step<'_>, program: &Program, limits: Limits, states: &[Buffer]) -> Result<()> {
    let tokens = step.tokens.len();
    if tokens == 0 || tokens > limits.tokens as usize {
        return Err(Error::argument("step tokens", format!("1 to {}", limits.tokens), tokens));
    }
    if step.outputs.len() > limits.outputs as usize {
        return Err(Error::argument(
            "step outputs",
            format!("at most {}", limits.outputs),
            step.outputs.len(),
        ));
    }
    if let Some(&bad) = step.outputs.iter().find(|&&o| o as usize >= tokens) {
        return Err(Error::argument("step output", format!("below {tokens}"), bad));
    }
    let in_spans: u64 = step.spans.iter().map(|s| u64::from(s.len)).sum();
    if in_spans != tokens as u64 {
        return Err(Error::argument("step spans", format!("{tokens} tokens in all"), in_spans));
    }
    for span in step.spans {
        let end = u64::from(span.start) + u64::from(span.len);
        let groups = program.windows.len();
        if span.tables.len() != groups {
            return Err(Error::argument("span", format!("{groups} page tables"), span.tables.len()));
        }
        for (table, &window) in span.tables.iter().zip(&program.windows) {
            let have = table.len() as u64 * u64::from(PAGE_POSITIONS);
            if end > have {
                return Err(Error::argument("span", format!("at most {have} positions (its pages)"), end));
            }
            let is_recurrent = program.is_recurrent(window);
            // Kernels do not check page tables.
            let of_group = program.states.iter().zip(states).filter(|(state, _)| state.window == window);
            let pages = of_group.map(|(state, buffer)| buffer.bytes() / state.page_bytes().max(1)).min();
            let seen = table.get(first_page(span.start, window)..).unwrap_or(&[]);
            let there = |page: u32| pages.is_none_or(|pages| u64::from(page) < pages);
            let last = seen.len().saturating_sub(1);
            // A recurrent state needs the page with the state before the first token, and a page for the last one.
            let is_needed = |i: usize| !is_recurrent || i == last || (i == 0 && span.start > 0);
            let is_hole = |(i, page): (usize, u32)| if page == NO_PAGE { is_needed(i) } else { !there(page) };
            if let Some(hole) = seen.iter().copied().enumerate().position(is_hole) {
                let at = table.len() - seen.len() + hole;
                let expected = format!(
                    "pages below {} for every position visible to position {}",
                    pages.unwrap_or(0),
                    span.start
                );
                let got = table.get(at).filter(|&&page| page != NO_PAGE);
                let got = got.map_or_else(|| "none".into(), |page| format!("page {page}"));
                return Err(Error::argument("page table", expected, format!("{got} at index {at}")));
            }
        }
    }
    Ok(())
}

/// Writes bytes to a buffer from `offset`, in pieces of the backend's choice.
///
/// # Errors
/// As [`Backend::fill`].
pub fn upload(backend: &dyn Backend, dst: &Buffer, offset: u64, bytes: &[u8]) -> Result<()> {
    let mut rest = bytes;
    backend.fill(dst, offset..offset.saturating_add(bytes.len() as u64), &mut |to| {
        let (now, later) = rest.split_at(to.len().min(rest.len()));
        to[..now.len()].copy_from_slice(now);
        rest = later;
    })
}

#[cfg(test)]
mod tests {
    use super::Cancel;

    #[test]
    fn an_interruption_ends_and_a_request_stays() {
        let cancel = Cancel::default();
        cancel.interrupt();
        assert!(cancel.is_cancelled());
        cancel.resume();
        assert!(!cancel.is_cancelled());
        cancel.interrupt();
        cancel.clone().cancel();
        cancel.resume();
        assert!(cancel.is_cancelled());
        cancel.interrupt();
        cancel.reset();
        assert!(!cancel.is_cancelled());
    }
}
