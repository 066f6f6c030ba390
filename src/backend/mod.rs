//! The only trait that a chip implements.
//!
//! A [`Backend`] owns memory and turns a [`Program`] into a [`Plan`]; a plan runs steps. Nothing here knows a model, and
//! nothing above knows a chip. `template.rs` is a whole backend to copy; `examples/my-chip` runs models, in a crate of its own.

pub mod cpu;
pub mod driver;
pub mod host;
pub mod reference;
pub mod template;

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::map::Region;
use crate::program::{Op, PAGE_POSITIONS, Program, StateId, TensorId};

/// What a backend promises about its results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contract {
    /// The bits of the reference, always.
    Exact,
    /// Close to the reference; conformance states the bounds.
    Close,
    /// As close as number formats of its own allow; conformance states how close that is.
    Rounded,
}

/// Which fused forms a backend wants `passes::fuse` to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Fusions {
    /// Matmuls of one input become parts of one op.
    pub shared_input: bool,
    /// An addition becomes part of the norm that follows.
    pub add_norm: bool,
    /// A gated linear unit becomes the epilogue of its matmuls.
    pub glu: bool,
    /// A residual addition becomes the epilogue of its matmul.
    pub residual: bool,
}

impl Fusions {
    /// Every fusion there is.
    pub const ALL: Fusions = Fusions { shared_input: true, add_norm: true, glu: true, residual: true };
}

/// How a backend reads the rows of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// As they are stored, plain or interleaved.
    AsStored,
    /// One after the other.
    Plain,
    /// Interleaved, in formats that interleave; one after the other in the rest.
    Interleaved,
}

/// What a backend is.
#[derive(Debug, Clone)]
pub struct Caps {
    /// Its name, as `--backend` takes it.
    pub name: String,
    /// What it runs on, for people.
    pub device: String,
    /// Bytes of memory that buffers may take.
    pub memory_bytes: u64,
    /// How it reads the rows of weights, which are brought into that order on the way.
    pub rows: Rows,
    /// Fused forms that it wants.
    pub fusions: Fusions,
    /// What its results promise.
    pub contract: Contract,
}

/// Whether a backend can run an op.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Support {
    /// It can.
    Native,
    /// It cannot, for a named reason.
    Unsupported(Gap),
}

/// Why a backend lacks an op.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gap {
    /// The hardware cannot, and will not.
    Never(String),
    /// Nobody has written it yet.
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

/// An op in its program: everything that decides whether a backend can run it.
#[derive(Debug, Clone, Copy)]
pub struct OpSig<'a> {
    /// The program, for shapes and formats.
    pub program: &'a Program,
    /// The op.
    pub op: &'a Op,
}

/// What a buffer is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usage {
    /// Written once, read by every step.
    Weight,
    /// Read and written by steps.
    State,
    /// Written by the host or a step, read by the other.
    Io,
}

/// Memory of one backend. Cheap to clone; all clones are the same memory.
#[derive(Debug, Clone)]
pub struct Buffer {
    bytes: u64,
    memory: Arc<dyn Any + Send + Sync>,
}

impl Buffer {
    /// A handle on a backend's own kind of memory.
    pub fn new<M: Any + Send + Sync>(bytes: u64, memory: M) -> Buffer {
        Buffer { bytes, memory: Arc::new(memory) }
    }

    /// The size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The backend's memory, if it is of this kind.
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

/// A request to stop, from any thread. Backends look at it before every op.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Asks the work to stop; it ends with `Error::Cancelled` within one op.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Lets later work run again.
    pub fn reset(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    /// Whether a stop was asked for.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// In a page table, where a sequence has no page any more.
pub const NO_PAGE: u32 = u32::MAX;

/// A run of one sequence's tokens in a step.
#[derive(Debug, Clone, Copy)]
pub struct Span<'a> {
    /// For each KV group ([`Program::windows`]) the sequence's pages in order: those of each state of the group. They cover
    /// `start + len` positions. A page that is wholly before the window of the first token may be [`NO_PAGE`].
    pub tables: &'a [Vec<u32>],
    /// Position of the first token.
    pub start: u32,
    /// Tokens.
    pub len: u32,
}

/// One step: tokens of one or more sequences, run together.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// In the order of `tokens`.
    pub spans: &'a [Span<'a>],
    /// Token ids, span after span.
    pub tokens: &'a [u32],
    /// Which tokens' outputs are wanted: indices into `tokens`, rising.
    pub outputs: &'a [u32],
    /// Stops the step.
    pub cancel: &'a Cancel,
}

/// The most that a plan is prepared for. Memory is reserved once, so that no step allocates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Tokens of a step.
    pub tokens: u32,
    /// Outputs of a step.
    pub outputs: u32,
}

/// Buffers in the order of the program's slots.
#[derive(Debug, Clone, Copy)]
pub struct Bindings<'a> {
    /// One for each of `Program::weights`.
    pub weights: &'a [Buffer],
    /// One for each of `Program::states`, whole pages of `State::page_bytes`.
    pub states: &'a [Buffer],
    /// One for each of `Program::io`, large enough for the plan's limits.
    pub io: &'a [Buffer],
}

/// Work under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(pub u64);

/// Which clock a time is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// The host's.
    Host,
    /// The device's own timestamps.
    Device,
    /// A model of the device.
    Simulated,
}

/// How long the submissions of a step took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timing {
    /// From start to end.
    pub elapsed: Duration,
    /// By which clock.
    pub clock: Clock,
}

/// A device, and how to run programs on it.
pub trait Backend: Send + Sync {
    /// What it is.
    fn caps(&self) -> &Caps;

    /// Whether it can run an op. The answer may depend on formats and shapes, never on values.
    fn supports(&self, sig: &OpSig<'_>) -> Support;

    /// Which kernel runs an op for so many tokens, and why: a line for people, or nothing.
    fn explain(&self, _sig: &OpSig<'_>, _tokens: u32) -> String {
        String::new()
    }

    /// New memory, zeroed.
    ///
    /// # Errors
    /// `Error::OutOfMemory`.
    fn alloc(&self, bytes: u64, usage: Usage) -> Result<Buffer>;

    /// Uses mapped host pages as they are, if the device can; `None` if it needs a copy.
    ///
    /// # Errors
    /// What the device says.
    fn import(&self, region: &Region) -> Result<Option<Buffer>>;

    /// Writes `range` of a buffer: `write` fills the bytes, in one or more consecutive pieces.
    ///
    /// # Errors
    /// `Error::Argument` if the buffer is another backend's or the range is outside; what the device says.
    fn fill(&self, dst: &Buffer, range: Range<u64>, write: &mut dyn FnMut(&mut [u8])) -> Result<()>;

    /// Reads a buffer's bytes from `offset`.
    ///
    /// # Errors
    /// As [`Backend::fill`].
    fn read(&self, src: &Buffer, offset: u64, dst: &mut [u8]) -> Result<()>;

    /// Makes a valid program ready to run. Call [`prepare`] instead, which refuses what [`Backend::supports`] declares a gap;
    /// conformance calls this one to find gaps that are none.
    ///
    /// # Errors
    /// What the device says. It never falls back to another device.
    fn prepare(&self, program: &Arc<Program>, limits: Limits) -> Result<Box<dyn Plan>>;

    /// Bytes that a plan of this program would take besides its buffers, known without preparing it.
    fn scratch_bytes(&self, program: &Program, limits: Limits) -> u64;
}

/// A prepared program.
pub trait Plan: Send {
    /// Starts the given segments on a step. Scratch tensors live until the next submission that starts at segment 0.
    ///
    /// # Errors
    /// `Error::Cancelled`, `Error::Argument`, or what the device says.
    fn submit(&mut self, step: &Step<'_>, segments: Range<usize>, bindings: &Bindings<'_>) -> Result<Ticket>;

    /// Waits for a submission. The time is that of its step so far: submissions add up, from the last one that started at
    /// segment 0.
    ///
    /// # Errors
    /// What the device says.
    fn wait(&mut self, ticket: Ticket) -> Result<Timing>;
}

/// Makes a program ready to run on a backend.
///
/// # Errors
/// [`Error::Program`] if it is not valid, [`Error::Unsupported`] listing every op that the backend lacks, or what the device says.
pub fn prepare(backend: &dyn Backend, program: &Arc<Program>, limits: Limits) -> Result<Box<dyn Plan>> {
    program.validate()?;
    check_support(backend, program)?;
    backend.prepare(program, limits)
}

/// Checks that a backend has all ops of a program.
///
/// # Errors
/// [`Error::Unsupported`] with a line for each op that it lacks.
pub fn check_support(backend: &dyn Backend, program: &Program) -> Result<()> {
    let mut gaps: Vec<String> = Vec::new();
    for (segment, op) in program.ops() {
        if let Support::Unsupported(gap) = backend.supports(&OpSig { program, op }) {
            let segment = program.segments.get(segment).map_or("?", |s| &s.name);
            gaps.push(format!("{} in `{segment}`: {gap}", op.name()));
        }
    }
    if gaps.is_empty() {
        return Ok(());
    }
    Err(Error::Unsupported { backend: backend.caps().name.clone(), gaps })
}

/// The first page that tokens from position `start` on see through a window.
pub(crate) fn first_page(start: u32, window: Option<u32>) -> usize {
    halite_kernels::attention::chunks(start as usize, window).start
}

/// Checks a step against what a plan was prepared for, and against the buffers of its states. For [`Plan::submit`].
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
            // What is read must be there: no kernel looks for it.
            let of_group = program.states.iter().zip(states).filter(|(state, _)| state.window == window);
            let pages = of_group.map(|(state, buffer)| buffer.bytes() / state.page_bytes().max(1)).min();
            let seen = table.get(first_page(span.start, window)..).unwrap_or(&[]);
            let there = |page: u32| pages.is_none_or(|pages| u64::from(page) < pages);
            if let Some(hole) = seen.iter().position(|&page| page == NO_PAGE || !there(page)) {
                let at = table.len() - seen.len() + hole;
                let expected =
                    format!("a page, of {}, for all that position {} sees", pages.unwrap_or(0), span.start);
                let got = table.get(at).filter(|&&page| page != NO_PAGE);
                let got = got.map_or_else(|| "none".into(), |page| format!("page {page}"));
                return Err(Error::argument("page table", expected, format!("{got} at place {at}")));
            }
        }
    }
    Ok(())
}

/// Writes bytes to a buffer from `offset`, in whatever pieces the backend asks for them.
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
