//! Shared parts of backends that compute in host memory: buffers, and a plan that binds the operands of each
//! op to memory and passes the op to [`Kernels`].

use std::cell::{Ref, RefCell, RefMut};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use crate::clock::Instant;

use halite_kernels::attention::{Growth, PageShape, Pages, PagesMut, Sight};
use halite_kernels::float::DefaultFloats;
use halite_kernels::formats::{Format, Layout};
use halite_kernels::panel::PanelMut;
use halite_kernels::recurrent::{self, Stretch};

use super::{
    Backend, Bindings, Buffer, Clock, DeviceOp, Limits, NO_PAGE, Plan, Span, Step, Ticket, Timing,
    check_step, upload,
};
use crate::error::{Error, Result};
use crate::map::{Region, Spilled};
pub use crate::memory::{Allocator, System, Words};
use crate::memory::{Zeroed, reserved, zeroed};
use crate::passes;
use crate::program::{
    Access, Dim, Epilogue, Index, MAX_PARTS, Op, Program, Slot, StateId, StateKind, TensorId,
};

/// A weight's bytes and shape.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    /// How elements are stored.
    pub format: Format,
    /// How rows lie in memory.
    pub layout: Layout,
    /// The bytes of all rows.
    pub bytes: &'a [u8],
    /// Rows.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
}

impl<'a> Matrix<'a> {
    /// A weight without rows.
    pub const EMPTY: Matrix<'static> =
        Matrix { format: Format::F32, layout: Layout::Rows, bytes: &[], rows: 0, cols: 0 };

    /// Returns rows `range`, or no rows if the range is outside. A range of interleaved rows starts at a
    /// group.
    pub fn rows(&self, range: Range<usize>) -> Matrix<'a> {
        let row = self.format.row_bytes(self.cols).unwrap_or(0);
        let bytes = self.bytes.get(range.start * row..range.end * row).unwrap_or(&[]);
        Matrix { bytes, rows: range.len(), ..*self }
    }
}

/// The memory of an operand while an op runs.
enum Memory<'a> {
    Bytes(&'a [u8]),
    BytesMut(&'a mut [u8]),
    Scratch(Ref<'a, Zeroed<f32>>),
    ScratchMut(RefMut<'a, Zeroed<f32>>),
    Streamed(&'a Region),
    Spilled(RwLockReadGuard<'a, Spilled>),
    SpilledMut(RwLockWriteGuard<'a, Spilled>),
    Locked(RwLockReadGuard<'a, Zeroed<u64>>),
    LockedMut(RwLockWriteGuard<'a, Zeroed<u64>>),
    /// Read and written: a copy of a device's memory.
    Owned(Vec<u64>),
}

impl Memory<'_> {
    fn bytes(&self) -> &[u8] {
        match self {
            Memory::Bytes(bytes) => bytes,
            Memory::BytesMut(bytes) => bytes,
            Memory::Scratch(floats) => bytemuck::cast_slice(floats),
            Memory::ScratchMut(floats) => bytemuck::cast_slice(floats),
            Memory::Locked(words) => bytemuck::cast_slice(words),
            Memory::LockedMut(words) => bytemuck::cast_slice(words),
            Memory::Owned(words) => bytemuck::cast_slice(words),
            Memory::Streamed(_) => &[],
            Memory::Spilled(spilled) => spilled.bytes(),
            Memory::SpilledMut(spilled) => spilled.bytes(),
        }
    }

    fn len(&self) -> u64 {
        match self {
            Memory::Streamed(region) => region.len(),
            _ => self.bytes().len() as u64,
        }
    }

    /// Empty for an operand to read.
    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Memory::BytesMut(bytes) => bytes,
            Memory::ScratchMut(floats) => bytemuck::cast_slice_mut(floats),
            Memory::LockedMut(words) => bytemuck::cast_slice_mut(words),
            Memory::Owned(words) => bytemuck::cast_slice_mut(words),
            Memory::SpilledMut(spilled) => spilled.bytes_mut(),
            Memory::Bytes(_)
            | Memory::Scratch(_)
            | Memory::Locked(_)
            | Memory::Streamed(_)
            | Memory::Spilled(_) => &mut [],
        }
    }
}

/// An operand of an op, in host memory: `experts` matrices of `rows` by `cols`.
pub struct HostTensor<'a> {
    memory: Memory<'a>,
    /// Bytes of the tensor.
    len: usize,
    /// How elements are stored.
    pub format: Format,
    /// How rows lie in memory.
    pub layout: Layout,
    /// Number of stacked matrices; 1 for most tensors.
    pub experts: usize,
    /// Rows in this step.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
}

impl<'a> HostTensor<'a> {
    /// Wraps bytes as rows of `cols` elements to read.
    pub fn shared(bytes: &'a [u8], format: Format, cols: usize) -> HostTensor<'a> {
        HostTensor::new(Memory::Bytes(bytes), bytes.len(), format, cols)
    }

    /// Wraps bytes as rows of `cols` elements to write.
    pub fn unique(bytes: &'a mut [u8], format: Format, cols: usize) -> HostTensor<'a> {
        let len = bytes.len();
        HostTensor::new(Memory::BytesMut(bytes), len, format, cols)
    }

    fn new(memory: Memory<'a>, len: usize, format: Format, cols: usize) -> HostTensor<'a> {
        let rows = len / format.row_bytes(cols).unwrap_or(0).max(1);
        HostTensor { memory, len, format, layout: Layout::Rows, experts: 1, rows, cols }
    }

    /// The place of a weight that is streamed, whose bytes are not in memory.
    pub fn streamed(&self) -> Option<&'a Region> {
        match self.memory {
            Memory::Streamed(region) => Some(region),
            _ => None,
        }
    }

    /// Returns all bytes.
    pub fn bytes(&self) -> &[u8] {
        self.memory.bytes().get(..self.len).unwrap_or(&[])
    }

    /// Returns all bytes of an output, and none of an input.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let len = self.len;
        self.memory.bytes_mut().get_mut(..len).unwrap_or(&mut [])
    }

    /// Returns the elements of an F32 tensor.
    pub fn floats(&self) -> &[f32] {
        bytemuck::try_cast_slice(self.bytes()).unwrap_or(&[])
    }

    /// Returns the elements of an F32 output.
    pub fn floats_mut(&mut self) -> &mut [f32] {
        bytemuck::try_cast_slice_mut(self.bytes_mut()).unwrap_or(&mut [])
    }

    /// Returns the elements of an I32 tensor.
    pub fn ints(&self) -> &[i32] {
        bytemuck::try_cast_slice(self.bytes()).unwrap_or(&[])
    }

    /// Returns the elements of an I32 output.
    pub fn ints_mut(&mut self) -> &mut [i32] {
        bytemuck::try_cast_slice_mut(self.bytes_mut()).unwrap_or(&mut [])
    }

    /// Returns the weight, or the first expert's.
    pub fn matrix(&self) -> Matrix<'_> {
        self.expert(0)
    }

    /// Returns the weights of all experts, one after the other.
    pub fn stacked(&self) -> Matrix<'_> {
        Matrix {
            format: self.format,
            layout: self.layout,
            bytes: self.bytes(),
            rows: self.rows * self.experts,
            cols: self.cols,
        }
    }

    /// Returns an expert's weight, without rows if there is no such expert.
    pub fn expert(&self, expert: usize) -> Matrix<'_> {
        self.stacked().rows(expert * self.rows..(expert + 1) * self.rows)
    }
}

/// A layer's KV cache, in host memory.
pub struct HostState<'a> {
    memory: Memory<'a>,
    format: Format,
    /// Heads and dimensions of a page.
    pub shape: PageShape,
    /// KV group; see [`Program::windows`].
    pub group: usize,
    /// What a token sees.
    pub sight: Sight,
}

impl HostState<'_> {
    /// The pages, to read.
    pub fn pages(&self) -> Pages<'_> {
        Pages { format: self.format, bytes: self.memory.bytes() }
    }

    /// The pages, to write.
    pub fn pages_mut(&mut self) -> PagesMut<'_> {
        PagesMut { format: self.format, bytes: self.memory.bytes_mut() }
    }

    /// The pages of a recurrent state, one a row, to read and write.
    pub fn rows_mut(&mut self) -> PanelMut<'_> {
        let PageShape { kv_heads, key_dim, value_dim, .. } = self.shape;
        let floats = bytemuck::try_cast_slice_mut(self.memory.bytes_mut()).unwrap_or(&mut []);
        PanelMut::new(floats, kv_heads * key_dim * value_dim)
    }
}

/// An op on host memory.
pub type HostOp<'a> = Op<HostTensor<'a>, HostState<'a>>;

/// The context of an op: its program and step.
#[derive(Clone, Copy)]
pub struct HostStep<'a> {
    /// The program.
    pub program: &'a Program,
    /// The op in its program.
    pub op: &'a Op,
    /// The step.
    pub step: &'a Step<'a>,
    /// The span of each token.
    pub span: &'a [u32],
    /// The position of each token.
    pub positions: &'a [u32],
    /// The row of each token in the table of an op whose index is neither its id nor its position.
    pub rows: &'a [u32],
}

impl<'a> HostStep<'a> {
    fn span_of(&self, token: usize) -> Option<&'a Span<'a>> {
        self.span.get(token).and_then(|&s| self.step.spans.get(s as usize))
    }

    /// Returns a token's pages in a KV group, and its position.
    pub fn place(&self, token: usize, group: usize) -> (&'a [u32], u32) {
        let table = self.span_of(token).and_then(|span| span.tables.get(group));
        (table.map_or(&[], |table| &table[..]), self.positions.get(token).copied().unwrap_or(0))
    }

    /// Returns the end of the positions of a token's span.
    pub fn end(&self, token: usize) -> u32 {
        self.span_of(token).map_or(0, |s| s.start.saturating_add(s.len))
    }

    /// Calls `f` with each stretch of each span, its tokens counted from the step's first.
    pub fn stretches(&self, group: usize, mut f: impl FnMut(Stretch)) {
        let mut first = 0;
        for span in self.step.spans {
            let table = span.tables.get(group).map_or(&[][..], |table| table);
            let (start, len) = (span.start as usize, span.len as usize);
            for stretch in recurrent::stretches(table, start, len, |page| page != NO_PAGE) {
                let tokens = first + stretch.tokens.start..first + stretch.tokens.end;
                f(Stretch { tokens, ..stretch });
            }
            first += len;
        }
    }

    /// Returns the row index of each token in a table of `rows` rows.
    ///
    /// # Errors
    /// [`Error::Argument`] for an index beyond the table.
    pub fn rows(&self, index: Index, rows: usize) -> Result<&'a [u32]> {
        let (what, indices) = match index {
            Index::Token => ("token id", self.step.tokens),
            Index::Position => ("position", self.positions),
            Index::First => ("row", self.rows),
            Index::Part { .. } => ("part", self.rows),
        };
        match indices.iter().find(|&&i| i as usize >= rows) {
            Some(&bad) => Err(Error::argument(what, format!("below {rows}"), bad)),
            None => Ok(indices),
        }
    }
}

/// [`Op::Attend`] on slices, for kernels that split it between threads.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    /// `[tokens][heads][key_dim]`.
    pub q: &'a [f32],
    /// Query heads.
    pub heads: usize,
    /// The cache.
    pub pages: Pages<'a>,
    /// Heads and dimensions of a page.
    pub shape: PageShape,
    /// The KV group.
    pub group: usize,
    /// What a token sees.
    pub sight: Sight,
    /// Factor on the scores.
    pub scale: f32,
    /// One more, by the token's position.
    pub growth: Option<Growth<'a>>,
    /// Soft cap of the scores.
    pub softcap: Option<f32>,
    /// Factor per head on distances, which is taken off the scores.
    pub slopes: Option<&'a [f32]>,
    /// Extra logit per head in the softmax denominator.
    pub sinks: Option<&'a [f32]>,
    /// The span of each token, its pages and its position.
    pub step: &'a HostStep<'a>,
}

impl<'a> Attention<'a> {
    /// A token's pages, its position, and the end of the positions of its span.
    pub fn place(&self, token: usize) -> (&'a [u32], usize, usize) {
        let (table, position) = self.step.place(token, self.group);
        (table, position as usize, self.step.end(token) as usize)
    }

    /// The positions that a token sees.
    pub fn sees(&self, token: usize) -> Range<usize> {
        let (_, position, end) = self.place(token);
        self.sight.positions(position, end)
    }

    /// The chunks of these positions.
    pub fn chunks(&self, token: usize) -> Range<usize> {
        let (_, position, end) = self.place(token);
        self.sight.chunks(position, end)
    }
}

impl HostOp<'_> {
    /// [`Op::Attend`] on slices, and its output.
    pub fn attention<'a>(&'a mut self, step: &'a HostStep<'a>) -> Option<(Attention<'a>, &'a mut [f32])> {
        let Op::Attend { q, state, out, heads, scale, growth, softcap, slopes, sinks } = self else {
            return None;
        };
        let attention = Attention {
            q: q.floats(),
            heads: *heads as usize,
            pages: state.pages(),
            shape: state.shape,
            group: state.group,
            sight: state.sight,
            scale: *scale,
            growth: growth.as_ref().map(|growth| growth.factors()),
            softcap: *softcap,
            slopes: slopes.as_deref(),
            sinks: sinks.as_ref().map(|sinks| sinks.floats()),
            step,
        };
        Some((attention, out.floats_mut()))
    }
}

/// The op implementations of a backend on host memory.
pub trait Kernels: Send {
    /// Runs an op of a valid program: all shapes match.
    ///
    /// # Errors
    /// Values that the op cannot handle, such as an index beyond a table.
    fn run(&mut self, op: &mut HostOp<'_>, step: &HostStep<'_>) -> Result<()>;

    /// A submission begins, with these buffers. [`Kernels::end`] follows, whether its ops succeed or not.
    fn begin(&mut self, _: &Bindings<'_>) {}

    /// The submission ended, `elapsed` after it began. Returns its time by the backend's clock, and its energy if that is known.
    fn end(&mut self, elapsed: Duration) -> Timing {
        Timing::new(elapsed, Clock::Host)
    }
}

/// Host memory behind a [`Buffer`].
enum HostMemory {
    Mapped(Region),
    Streamed(Region),
    Spilled(RwLock<Spilled>),
    Owned(RwLock<Zeroed<u64>>),
}

/// Allocation and access of buffers in host memory, shared by all host backends.
pub mod memory {
    use super::*;

    /// Allocates zeroed memory, within a limit.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn alloc(backend: &str, bytes: u64, limit_bytes: u64) -> Result<Buffer> {
        alloc_from(&System, backend, bytes, limit_bytes)
    }

    /// As [`alloc`], from an allocator.
    ///
    /// # Errors
    /// As [`alloc`].
    pub fn alloc_from(
        allocator: &dyn Allocator,
        backend: &str,
        bytes: u64,
        limit_bytes: u64,
    ) -> Result<Buffer> {
        let what = format!("a buffer on `{backend}`");
        if bytes > limit_bytes {
            return Err(Error::OutOfMemory { what, need_bytes: bytes, have_bytes: limit_bytes });
        }
        let memory = Zeroed::new(allocator, bytes.div_ceil(8), &what)?;
        Ok(Buffer::new(bytes, HostMemory::Owned(RwLock::new(memory))))
    }

    /// As [`Backend::alloc_spilled`].
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn alloc_spilled(bytes: u64, kept_bytes: u64, folder: &Path) -> Result<Buffer> {
        let spilled = Spilled::new(folder, bytes, kept_bytes)?;
        Ok(Buffer::new(bytes, HostMemory::Spilled(RwLock::new(spilled))))
    }

    /// Wraps mapped pages; `None` if the region is not mapped.
    pub fn import(region: &Region) -> Option<Buffer> {
        region.mapped().map(|_| Buffer::new(region.len(), HostMemory::Mapped(region.clone())))
    }

    /// Wraps a region that kernels read through its stream.
    pub(crate) fn stream(region: &Region) -> Buffer {
        Buffer::new(region.len(), HostMemory::Streamed(region.clone()))
    }

    /// As [`Backend::fill`].
    ///
    /// # Errors
    /// [`Error::Argument`] for a range outside the buffer, [`Error::Backend`] for another backend's buffer.
    pub fn fill(
        backend: &str,
        dst: &Buffer,
        range: Range<u64>,
        write: &mut dyn FnMut(&mut [u8]),
    ) -> Result<()> {
        let mut memory = write_guard(backend, dst)?;
        let bytes = memory.bytes_mut();
        let outside =
            || Error::argument("fill range", format!("inside 0..{}", dst.bytes()), format!("{range:?}"));
        let slice = bytes.get_mut(range.start as usize..range.end as usize).ok_or_else(outside)?;
        write(slice);
        Ok(())
    }

    /// As [`Backend::read`].
    ///
    /// # Errors
    /// As [`fill`].
    pub fn read(backend: &str, src: &Buffer, offset: u64, dst: &mut [u8]) -> Result<()> {
        let memory = read_guard(backend, src)?;
        let end = offset.saturating_add(dst.len() as u64);
        let outside = || {
            Error::argument("read range", format!("inside 0..{}", src.bytes()), format!("{offset}..{end}"))
        };
        if let Memory::Streamed(region) = memory {
            return region.read_at(offset, dst);
        }
        dst.copy_from_slice(memory.bytes().get(offset as usize..end as usize).ok_or_else(outside)?);
        Ok(())
    }
}

fn host_memory<'a>(backend: &str, buffer: &'a Buffer) -> Result<&'a HostMemory> {
    buffer.memory().ok_or_else(|| Error::Backend {
        backend: backend.into(),
        message: "a buffer of another backend was passed".into(),
    })
}

fn poisoned(backend: &str) -> Error {
    Error::Backend { backend: backend.into(), message: "a thread failed while it wrote this buffer".into() }
}

fn read_guard<'a>(backend: &str, buffer: &'a Buffer) -> Result<Memory<'a>> {
    match host_memory(backend, buffer)? {
        HostMemory::Mapped(region) => Ok(Memory::Bytes(region.mapped().unwrap_or(&[]))),
        HostMemory::Streamed(region) => Ok(Memory::Streamed(region)),
        HostMemory::Spilled(lock) => lock.read().map(Memory::Spilled).map_err(|_| poisoned(backend)),
        HostMemory::Owned(lock) => lock.read().map(Memory::Locked).map_err(|_| poisoned(backend)),
    }
}

fn write_guard<'a>(backend: &str, buffer: &'a Buffer) -> Result<Memory<'a>> {
    match host_memory(backend, buffer)? {
        HostMemory::Mapped(_) | HostMemory::Streamed(_) => Err(Error::Backend {
            backend: backend.into(),
            message: "a weight of a file cannot be written".into(),
        }),
        HostMemory::Spilled(lock) => lock.write().map(Memory::SpilledMut).map_err(|_| poisoned(backend)),
        HostMemory::Owned(lock) => lock.write().map(Memory::LockedMut).map_err(|_| poisoned(backend)),
    }
}

/// The location of an operand of a prepared op.
#[derive(Debug, Clone, Copy)]
enum Place {
    Weight(u32),
    Io(u32),
    Scratch(usize),
}

/// The shape of a tensor, looked up once.
#[derive(Debug, Clone)]
struct Shape {
    id: TensorId,
    format: Format,
    layout: Layout,
    experts: usize,
    rows: Dim,
    cols: usize,
    row_bytes: usize,
}

impl Shape {
    fn of(program: &Program, id: TensorId) -> Shape {
        let t = program.tensor(id);
        let (experts, cols) = (t.experts as usize, t.cols as usize);
        let row_bytes = t.format.row_bytes(cols).unwrap_or(usize::MAX);
        Shape { id, format: t.format, layout: t.layout, experts, rows: t.rows, cols, row_bytes }
    }

    /// Returns the tensor in a step, whose memory is what `memory` makes of its length in bytes.
    fn bind<'a>(
        &self,
        step: &Step<'_>,
        memory: impl FnOnce(usize) -> Result<Memory<'a>>,
    ) -> Result<HostTensor<'a>> {
        let rows = passes::rows(self.rows, step.tokens.len() as u32, step.outputs.len() as u32) as usize;
        let len = self.row_bytes.saturating_mul(rows).saturating_mul(self.experts);
        let Shape { format, layout, experts, cols, .. } = *self;
        Ok(HostTensor { memory: memory(len)?, len, format, layout, experts, rows, cols })
    }
}

/// An operand of a prepared op.
#[derive(Debug, Clone)]
struct Placed {
    place: Place,
    shape: Shape,
}

/// The cache of a prepared op.
#[derive(Debug, Clone)]
struct Cache {
    id: StateId,
    format: Format,
    shape: PageShape,
    group: usize,
    sight: Sight,
}

type PreparedOp = Op<Placed, Cache>;

/// A prepared program on a host backend.
pub struct HostPlan<K> {
    kernels: K,
    bound: Bound,
    /// The ops of each segment.
    ops: Vec<Vec<PreparedOp>>,
    limits: Limits,
    tokens: Tokens,
    submitted: u64,
    timing: Timing,
}

/// The span and position of each token of a step, and its row in the table of an op: the memory behind [`HostStep`].
struct Tokens {
    spans: Vec<u32>,
    positions: Vec<u32>,
    rows: Vec<u32>,
}

impl Tokens {
    /// Reserves memory for `max_tokens` tokens.
    fn new(max_tokens: u32) -> Result<Tokens> {
        Ok(Tokens {
            spans: reserved(max_tokens.into(), "the places of tokens")?,
            positions: reserved(max_tokens.into(), "the places of tokens")?,
            rows: reserved(max_tokens.into(), "the places of tokens")?,
        })
    }

    /// Records the span and position of each token of a step.
    fn place(&mut self, step: &Step<'_>) {
        self.spans.clear();
        self.positions.clear();
        for (i, span) in step.spans.iter().enumerate() {
            for p in 0..span.len {
                self.spans.push(i as u32);
                self.positions.push(span.start + p);
            }
        }
    }

    /// Returns the step, which [`Tokens::place`] has recorded, for an op.
    ///
    /// # Errors
    /// As [`Step::parts`].
    fn step<'a>(&'a mut self, program: &'a Program, op: &'a Op, step: &'a Step<'a>) -> Result<HostStep<'a>> {
        match op {
            Op::Embed { index: Index::First, .. } => {
                self.rows.clear();
                self.rows.resize(step.tokens.len(), 0);
            }
            Op::Embed { index: Index::Part { separator }, table, .. } => {
                let rows = passes::rows(program.tensor(*table).rows, 0, 0);
                self.rows.clear();
                self.rows.extend(step.parts(*separator, rows as usize)?);
            }
            _ => {}
        }
        let (span, positions, rows) = (&self.spans[..], &self.positions[..], &self.rows[..]);
        Ok(HostStep { program, op, step, span, positions, rows })
    }
}

/// Memory of a plan besides the buffers of a submission.
struct Bound {
    backend: String,
    program: Arc<Program>,
    /// Scratch tensors. An op's outputs never share memory with its inputs.
    places: Vec<RefCell<Zeroed<f32>>>,
}

/// Returns the bytes of a host plan's scratch tensors.
pub fn scratch_bytes(program: &Program, limits: Limits) -> u64 {
    passes::liveness(program).bytes(limits.tokens, limits.outputs)
}

/// Resolves a state of a program.
fn cache(program: &Program, id: StateId) -> Result<Cache> {
    let state = program.states.get(id.0 as usize);
    let state = state.ok_or_else(|| Error::Program(format!("state {} does not exist", id.0)))?;
    let shape = PageShape {
        kv_heads: state.kv_heads as usize,
        key_dim: state.key_dim as usize,
        value_dim: state.value_dim as usize,
        latent: state.kind == StateKind::Latent,
    };
    let (group, sight) = (program.kv_group(state), state.sight());
    Ok(Cache { id, format: state.format, shape, group, sight })
}

/// Resolves the operands of an op.
fn prepared(program: &Program, layout: &passes::Layout, op: &Op) -> Result<PreparedOp> {
    let operand = |&id: &TensorId, _| {
        let t = program.tensor(id);
        let place = match t.slot {
            Slot::Weight(n) => Place::Weight(n),
            Slot::Io(n) => Place::Io(n),
            Slot::Scratch => {
                let place = layout.place.get(id.0 as usize).copied().flatten();
                Place::Scratch(place.ok_or_else(|| Error::Program(format!("`{}` is never written", t.name)))?)
            }
        };
        Ok(Placed { place, shape: Shape::of(program, id) })
    };
    op.try_map(operand, |&id, _| cache(program, id))
}

impl<K: Kernels> HostPlan<K> {
    /// Binds the operands of a valid program, and reserves all memory for it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Program`].
    pub fn new(backend: &str, program: &Arc<Program>, limits: Limits, kernels: K) -> Result<HostPlan<K>> {
        HostPlan::with_memory(&System, backend, program, limits, kernels)
    }

    /// As [`HostPlan::new`], with scratch tensors in memory of an allocator.
    ///
    /// # Errors
    /// As [`HostPlan::new`].
    pub fn with_memory(
        allocator: &dyn Allocator,
        backend: &str,
        program: &Arc<Program>,
        limits: Limits,
        kernels: K,
    ) -> Result<HostPlan<K>> {
        let layout = passes::liveness(program);
        let mut places = Vec::new();
        for &(dim, cols) in &layout.places {
            let len = passes::rows(dim, limits.tokens, limits.outputs).saturating_mul(cols.into());
            let place = Zeroed::new(allocator, len, &format!("scratch memory on `{backend}`"))?;
            places.push(RefCell::new(place));
        }
        let of_segment = |segment: &crate::program::Segment| {
            segment.ops.iter().map(|op| prepared(program, &layout, op)).collect()
        };
        Ok(HostPlan {
            kernels,
            ops: program.segments.iter().map(of_segment).collect::<Result<_>>()?,
            bound: Bound { backend: backend.into(), program: program.clone(), places },
            limits,
            tokens: Tokens::new(limits.tokens)?,
            submitted: 0,
            timing: Timing::new(Duration::ZERO, Clock::Host),
        })
    }
}

impl Bound {
    /// Returns an operand's memory in a step.
    fn tensor<'a>(
        &'a self,
        o: &Placed,
        access: Access,
        step: &Step<'_>,
        b: &Bindings<'a>,
    ) -> Result<HostTensor<'a>> {
        let name = || &self.program.tensor(o.shape.id).name;
        o.shape.bind(step, |len| {
            let backend = &self.backend;
            let memory = match (o.place, access) {
                (Place::Weight(n), _) => read_guard(backend, bound(b.weights, n, "weights")?)?,
                (Place::Io(n), Access::Read) => read_guard(backend, bound(b.io, n, "io")?)?,
                (Place::Io(n), Access::Write) => write_guard(backend, bound(b.io, n, "io")?)?,
                (Place::Scratch(place), _) => {
                    let shared = || Error::Program(format!("`{}` is read and written", name()));
                    let place = self.places.get(place).ok_or_else(shared)?;
                    match access {
                        Access::Read => Memory::Scratch(place.try_borrow().map_err(|_| shared())?),
                        Access::Write => Memory::ScratchMut(place.try_borrow_mut().map_err(|_| shared())?),
                    }
                }
            };
            if memory.len() < len as u64 {
                let expected = format!("at least {len} bytes for `{}`", name());
                return Err(Error::argument("buffer", expected, memory.len()));
            }
            let in_memory = !matches!(memory, Memory::Streamed(_));
            if in_memory
                && o.shape.format == Format::F32
                && !(memory.bytes().as_ptr() as usize).is_multiple_of(4)
            {
                let expected = format!("`{}` at a multiple of 4 bytes", name());
                return Err(Error::argument("buffer", expected, "another address"));
            }
            Ok(memory)
        })
    }

    /// Returns a cache's memory.
    fn state<'a>(&self, c: &Cache, access: Access, b: &Bindings<'a>) -> Result<HostState<'a>> {
        let buffer = bound(b.states, c.id.0, "states")?;
        let memory = match access {
            Access::Read => read_guard(&self.backend, buffer)?,
            Access::Write => write_guard(&self.backend, buffer)?,
        };
        let Cache { format, shape, group, sight, .. } = *c;
        Ok(HostState { memory, format, shape, group, sight })
    }
}

/// Rows of products that are computed at a time if weights are streamed: whole tiles of kernels.
pub(crate) const CHUNK_ROWS: usize = 32;

/// Returns the order in which a product reads its weights, each given as rows and bytes of a row: rows of one
/// weight after the other or, if `paired`, the same rows of each in turn.
pub fn row_chunks<const N: usize>(
    weights: [(usize, usize); N],
    count: usize,
    paired: bool,
    chunk_bytes: u64,
) -> impl Iterator<Item = (usize, Range<usize>)> {
    let at_a_time = move |row_bytes: usize| {
        let rows = usize::try_from(chunk_bytes).unwrap_or(usize::MAX) / row_bytes.max(1);
        (rows / CHUNK_ROWS * CHUNK_ROWS).max(CHUNK_ROWS)
    };
    let widest = weights.iter().take(count).map(|&(_, row_bytes)| row_bytes).max().unwrap_or(0);
    let runs = if paired { 1 } else { count };
    (0..runs).flat_map(move |run| {
        let (rows, row_bytes) = weights[run];
        let each = at_a_time(if paired { widest } else { row_bytes });
        (0..rows).step_by(each).flat_map(move |first| {
            let of = if paired { 0..count } else { run..run + 1 };
            of.map(move |weight| (weight, first..(first + each).min(rows)))
        })
    })
}

/// Requests a product's weights from their stream, in the order of [`row_chunks`].
fn request(op: &PreparedOp, b: &Bindings<'_>) -> Result<()> {
    let Op::MatMul { parts, epilogue, .. } = op else { return Ok(()) };
    let (mut shapes, mut regions) = ([(0, 0); MAX_PARTS], [None; MAX_PARTS]);
    for ((part, shape), region) in parts.iter().zip(&mut shapes).zip(&mut regions) {
        let weight = &part.weight;
        let Place::Weight(n) = weight.place else { continue };
        *shape = (passes::rows(weight.shape.rows, 0, 0) as usize, weight.shape.row_bytes);
        if let Some(HostMemory::Streamed(streamed)) = bound(b.weights, n, "weights")?.memory() {
            *region = Some(streamed);
        }
    }
    let Some(stream) = regions.iter().flatten().find_map(|region| region.stream()) else { return Ok(()) };
    let paired = matches!(epilogue, Epilogue::Glu(_));
    for (part, rows) in row_chunks(shapes, parts.len(), paired, stream.chunk_bytes()) {
        if let Some(region) = regions[part] {
            let row_bytes = shapes[part].1;
            let outside = || Error::Program("a streamed weight is shorter than its shape".into());
            let chunk = region.part(rows.start * row_bytes..rows.end * row_bytes).ok_or_else(outside)?;
            stream.request(&chunk, false);
        }
    }
    Ok(())
}

/// Frees the memory of the cache that an op was the last to use, as far as it is kept in a file.
fn release(op: &PreparedOp, b: &Bindings<'_>) {
    let Op::Attend { state, .. } = op else { return };
    let memory = b.states.get(state.id.0 as usize).and_then(|buffer| buffer.memory());
    if let Some(HostMemory::Spilled(lock)) = memory
        && let Ok(spilled) = lock.read()
    {
        spilled.release();
    }
}

fn bound<'a>(buffers: &'a [Buffer], n: u32, what: &'static str) -> Result<&'a Buffer> {
    let missing = || Error::argument("bindings", format!("a buffer in {what} slot {n}"), buffers.len());
    buffers.get(n as usize).ok_or_else(missing)
}

/// Runs one op on the memory of its operands.
fn execute<K: Kernels>(
    bound: &Bound,
    kernels: &mut K,
    op: &PreparedOp,
    step: &HostStep<'_>,
    b: &Bindings<'_>,
) -> Result<()> {
    guarded(&bound.backend, op.name(), || {
        let mut op = op.try_map(
            |operand, access| bound.tensor(operand, access, step.step, b),
            |cache, access| bound.state(cache, access, b),
        )?;
        kernels.run(&mut op, step)
    })
}

/// Runs an op, and turns a panic into an error. A panic poisons the lock of a buffer that the op was writing, and later
/// steps then fail with an error.
fn guarded(backend: &str, op: &str, run: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<&str>().copied();
        let said = said.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        let message = format!("{op} panicked: {}", said.unwrap_or("no message"));
        Err(Error::Backend { backend: backend.into(), message })
    })
}

/// Bytes of a device's buffer, copied unless they are yet to be written.
fn copied(backend: &dyn Backend, buffer: &Buffer, len: usize, access: Access) -> Result<Memory<'static>> {
    let mut words = zeroed(len.div_ceil(8) as u64, "a copy of device memory")?;
    if access == Access::Read {
        let bytes = bytemuck::cast_slice_mut(&mut words);
        backend.read(buffer, 0, bytes.get_mut(..len).unwrap_or(&mut []))?;
    }
    Ok(Memory::Owned(words))
}

fn copied_tensor(
    backend: &dyn Backend,
    program: &Program,
    operand: &super::Operand<'_, TensorId>,
    access: Access,
    step: &Step<'_>,
) -> Result<HostTensor<'static>> {
    let t = program.tensor(operand.id);
    if t.layout != Layout::Rows {
        let expected = format!("`{}` in plain rows (`Rows::Plain` in the caps)", t.name);
        return Err(Error::argument("weight", expected, "interleaved rows"));
    }
    Shape::of(program, operand.id).bind(step, |len| copied(backend, operand.buffer, len, access))
}

fn copied_state(
    backend: &dyn Backend,
    program: &Program,
    operand: &super::Operand<'_, StateId>,
    step: &Step<'_>,
) -> Result<HostState<'static>> {
    let Cache { format, shape, group, sight, .. } = cache(program, operand.id)?;
    // The pages up to the last one that the step uses, which keep what the op does not write.
    let tables = step.spans.iter().filter_map(|span| span.tables.get(group)).flatten();
    let last = tables.filter(|&&page| page != NO_PAGE).max();
    let page_bytes = program.states.get(operand.id.0 as usize).map_or(0, |s| s.page_bytes()) as usize;
    let len = last.map_or(0, |&page| (page as usize + 1).saturating_mul(page_bytes));
    let memory = copied(backend, operand.buffer, len, Access::Read)?;
    Ok(HostState { memory, format, shape, group, sight })
}

/// Runs one op on copies of its operands in host memory, and copies what it writes back.
pub(super) fn run_on_copies<K: Kernels>(
    kernels: &mut K,
    backend: &dyn Backend,
    program: &Program,
    op: &DeviceOp<'_>,
    step: &Step<'_>,
) -> Result<()> {
    let _floats = DefaultFloats::set();
    let mut tokens = Tokens::new(step.tokens.len() as u32)?;
    tokens.place(step);
    let ids = op.try_map(|t, _| Ok::<_, Error>(t.id), |s, _| Ok(s.id))?;
    let name = &backend.caps().name;
    let host_step = tokens.step(program, &ids, step)?;
    guarded(name, op.name(), || {
        let mut copy = op.try_map(
            |operand, access| copied_tensor(backend, program, operand, access, step),
            |operand, _| copied_state(backend, program, operand, step),
        )?;
        kernels.run(&mut copy, &host_step)?;
        // Both ops list their operands in the same order.
        let (mut results, mut pages) = (Vec::new(), Vec::new());
        copy.try_map(
            |t, _| {
                results.push(t.bytes());
                Ok::<_, Error>(())
            },
            |s, _| {
                pages.push(s.memory.bytes());
                Ok(())
            },
        )?;
        let (mut results, mut pages) = (results.into_iter(), pages.into_iter());
        let copy_back = |access, buffer, bytes: Option<&[u8]>| match (access, bytes) {
            (Access::Write, Some(bytes)) => upload(backend, buffer, 0, bytes),
            _ => Ok(()),
        };
        op.try_map(
            |t, access| copy_back(access, t.buffer, results.next()),
            |s, access| copy_back(access, s.buffer, pages.next()),
        )?;
        Ok(())
    })
}

impl<K: Kernels> HostPlan<K> {
    /// Runs segments.
    fn run(&mut self, step: &Step<'_>, segments: Range<usize>, bindings: &Bindings<'_>) -> Result<()> {
        let program = self.bound.program.clone();
        let wrong = || {
            Error::argument("segments", format!("within 0..{}", program.segments.len()), "a range outside")
        };
        let of_program = program.segments.get(segments.clone()).ok_or_else(wrong)?;
        let prepared = self.ops.get(segments).ok_or_else(wrong)?;
        let ops = of_program.iter().flat_map(|segment| &segment.ops);
        let stream = bindings.weights.iter().find_map(|buffer| match buffer.memory()? {
            HostMemory::Streamed(region) => region.stream(),
            _ => None,
        });
        // What an earlier step left, if it failed.
        stream.inspect(|stream| stream.reset());
        let mut ahead = stream.map_or(&[][..], |_| prepared).iter().flatten();
        // Reads ahead up to experts, which are chosen in the step.
        let mut read_ahead = || loop {
            match ahead.next() {
                Some(Op::Experts { .. }) | None => return Ok(()),
                Some(op) => request(op, bindings)?,
            }
        };
        read_ahead()?;
        for (op, prepared) in ops.zip(prepared.iter().flatten()) {
            if step.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let step = self.tokens.step(&program, op, step)?;
            execute(&self.bound, &mut self.kernels, prepared, &step, bindings)?;
            if let Op::Experts { .. } = op {
                read_ahead()?;
            }
            release(prepared, bindings);
        }
        Ok(())
    }
}

impl<K: Kernels> Plan for HostPlan<K> {
    fn submit(&mut self, step: &Step<'_>, segments: Range<usize>, bindings: &Bindings<'_>) -> Result<Ticket> {
        let start = Instant::now();
        let _floats = DefaultFloats::set();
        let from_start = segments.start == 0;
        check_step(step, &self.bound.program, self.limits, bindings.states)?;
        self.tokens.place(step);
        self.kernels.begin(bindings);
        let ran = self.run(step, segments, bindings);
        let timing = self.kernels.end(start.elapsed());
        ran?;
        self.submitted += 1;
        // Submissions of one step add up.
        self.timing = if from_start { timing } else { self.timing.then(timing) };
        Ok(Ticket(self.submitted))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Timing> {
        if ticket.0 != self.submitted {
            return Err(Error::argument("ticket", self.submitted, ticket.0));
        }
        Ok(self.timing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Cancel;
    use crate::program::Builder;
    use halite_kernels::pool::Pool;

    /// Adds, unless a task is to fail.
    struct Faulty {
        pool: Pool,
        fail: bool,
    }

    impl Kernels for Faulty {
        fn run(&mut self, op: &mut HostOp<'_>, _: &HostStep<'_>) -> Result<()> {
            let Op::Add { a, b, out } = op else { return Err(Error::Cancelled) };
            let fail = self.fail;
            self.pool.run(8, &|n| assert!(!fail || n != 5, "task 5 fails"));
            let sums = a.floats().iter().zip(b.floats()).map(|(a, b)| a + b);
            out.floats_mut().iter_mut().zip(sums).for_each(|(out, sum)| *out = sum);
            Ok(())
        }
    }

    /// A panic in a task of the pool is the step's error, and a later step that does not fail is right.
    #[test]
    fn a_panic_is_an_error() {
        let no_weights = |_: &str| None;
        let mut b = Builder::new("sum", &no_weights);
        let x = b.input("x", Dim::Tokens, 4);
        let twice = b.add("twice", x, x);
        let y = b.add("y", twice, x);
        b.output(y);
        let program = Arc::new(b.finish().unwrap());
        let kernels = Faulty { pool: Pool::new(3).unwrap(), fail: true };
        let limits = Limits { tokens: 1, outputs: 1 };
        let mut plan = HostPlan::new("faulty", &program, limits, kernels).unwrap();
        let io: Vec<_> = (0..2).map(|_| memory::alloc("faulty", 16, u64::MAX).unwrap()).collect();
        memory::fill("faulty", &io[0], 0..16, &mut |bytes| {
            bytes.as_chunks_mut::<4>().0.iter_mut().for_each(|x| *x = 2f32.to_le_bytes());
        })
        .unwrap();
        let tables = vec![vec![0]; program.windows.len()];
        let (spans, cancel) = ([Span { tables: &tables, start: 0, len: 1 }], Cancel::default());
        let step = Step { spans: &spans, tokens: &[0], outputs: &[], cancel: &cancel };
        let bindings = Bindings { weights: &[], states: &[], io: &io };
        let all = 0..program.segments.len();
        for _ in 0..3 {
            let error = plan.submit(&step, all.clone(), &bindings).unwrap_err().to_string();
            assert_eq!(error, "backend `faulty`: Add panicked: task 5 fails");
        }
        plan.kernels.fail = false;
        plan.submit(&step, all, &bindings).unwrap();
        let mut found = [0; 16];
        memory::read("faulty", &io[1], 0, &mut found).unwrap();
        assert_eq!(bytemuck::cast::<_, [f32; 4]>(found), [6.0; 4]);
    }
}
