//! What backends that compute in host memory share: buffers, and a plan that walks the ops and hands slices to [`Kernels`].

use std::ops::{Deref, DerefMut, Range};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use halite_kernels::attention::{PageShape, Pages, PagesMut, write as write_kv};
use halite_kernels::float::DefaultFloats;
use halite_kernels::formats::{Format, Layout};
use halite_kernels::rows::{Gate, Unary};

use super::{Bindings, Buffer, Clock, Limits, Plan, Step, Ticket, Timing, check_step};
use crate::error::{Error, Result};
use crate::map::Region;
use crate::memory::{reserved, zeroed};
use crate::passes;
use crate::program::{
    Dim, Epilogue, Gating, Index, NormKind, Op, PAGE_POSITIONS, Program, RopePairs, Slot, State, StateId,
    TensorId,
};

/// A weight's bytes and shape.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    pub format: Format,
    pub layout: Layout,
    pub bytes: &'a [u8],
    pub rows: usize,
    pub cols: usize,
}

impl<'a> Matrix<'a> {
    const EMPTY: Matrix<'static> =
        Matrix { format: Format::F32, layout: Layout::Rows, bytes: &[], rows: 0, cols: 0 };

    /// Rows `range`, or nothing if they are not all there. A range of interleaved rows starts with a whole group.
    pub fn rows(&self, range: Range<usize>) -> Matrix<'a> {
        let row = self.format.row_bytes(self.cols).unwrap_or(0);
        let bytes = self.bytes.get(range.start * row..range.end * row).unwrap_or(&[]);
        Matrix { bytes, rows: range.len(), ..*self }
    }

    /// Matrix `expert` of `experts` stacked ones.
    pub fn expert(&self, expert: usize, experts: usize) -> Matrix<'a> {
        let rows = self.rows / experts.max(1);
        self.rows(expert * rows..(expert + 1) * rows)
    }
}

/// One product of a [`Kernels::matmul`].
#[derive(Debug, Clone, Copy)]
pub struct Product<'a> {
    pub weight: Matrix<'a>,
    pub bias: Option<&'a [f32]>,
}

/// What follows the products.
#[derive(Debug, Clone, Copy)]
pub enum After<'a> {
    Nothing,
    Glu(Gate),
    Add(&'a [f32]),
}

pub struct NormArgs<'a> {
    pub x: &'a [f32],
    /// Added to `x` first.
    pub add: Option<&'a [f32]>,
    pub cols: usize,
    pub weight: Option<&'a [f32]>,
    pub bias: Option<&'a [f32]>,
    pub kind: NormKind,
    pub eps: f32,
    pub group: usize,
}

pub struct RopeArgs<'a> {
    pub x: &'a [f32],
    /// One for each row.
    pub positions: &'a [u32],
    pub cols: usize,
    pub head_dim: usize,
    pub frequencies: &'a [f32],
    pub factors: Option<&'a [f32]>,
    pub magnitude: f32,
    pub pairs: RopePairs,
}

pub struct AttendArgs<'a> {
    /// `[tokens][heads][key_dim]`.
    pub q: &'a [f32],
    pub heads: usize,
    pub pages: Pages<'a>,
    pub shape: PageShape,
    /// The KV group, and each token's pages in it and position.
    pub group: usize,
    pub tokens: &'a Tokens<'a>,
    pub window: Option<u32>,
    pub causal: bool,
    pub scale: f32,
    pub softcap: Option<f32>,
    pub sinks: Option<&'a [f32]>,
}

/// Where each token of a step stands.
#[derive(Debug)]
pub struct Tokens<'a> {
    pub spans: &'a [super::Span<'a>],
    /// The span of each token.
    pub span: &'a [u32],
    /// The position of each token.
    pub position: &'a [u32],
    /// A zero for each token.
    pub zeros: &'a [u32],
}

impl<'a> Tokens<'a> {
    /// A token's pages in a KV group, and its position.
    pub fn place(&self, token: usize, group: usize) -> (&'a [u32], u32) {
        let span = self.span.get(token).and_then(|&s| self.spans.get(s as usize));
        let table = span.and_then(|s| s.tables.get(group));
        (table.map_or(&[], |t| &t[..]), self.position.get(token).copied().unwrap_or(0))
    }
}

impl<'a> AttendArgs<'a> {
    /// A token's pages and the last position that it sees.
    pub fn sees(&self, token: usize) -> (&'a [u32], u32) {
        let (pages, position) = self.tokens.place(token, self.group);
        let span = self.tokens.span.get(token).and_then(|&s| self.tokens.spans.get(s as usize));
        let end = span.map_or(0, |s| s.start.saturating_add(s.len));
        (pages, if self.causal { position } else { end.saturating_sub(1) })
    }
}

pub struct RouteArgs<'a> {
    pub logits: &'a [f32],
    pub experts: usize,
    pub used: usize,
    pub gating: Gating,
    pub normalise: bool,
    pub scale: f32,
}

pub struct ExpertsArgs<'a> {
    pub x: &'a [f32],
    pub ids: &'a [i32],
    pub weights: &'a [f32],
    pub used: usize,
    pub experts: usize,
    pub gate: Matrix<'a>,
    pub up: Matrix<'a>,
    pub down: Matrix<'a>,
    pub biases: Option<[&'a [f32]; 3]>,
    pub act: Gate,
}

/// The keys and values of some tokens, and where they go.
pub struct KvArgs<'a> {
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub shape: PageShape,
    pub group: usize,
    pub tokens: &'a Tokens<'a>,
}

/// The ops on slices. Lengths are those that `Program::validate` guarantees.
pub trait Kernels: Send {
    /// What comes next.
    fn begin(&mut self, _program: &Program, _op: &Op, _step: &Step<'_>) -> Result<()> {
        Ok(())
    }

    /// How the op since [`Kernels::begin`] went.
    fn end(&mut self) -> Result<()> {
        Ok(())
    }

    /// The time of the ops since it was last asked, by another clock than the host's.
    fn simulated(&mut self) -> Option<Duration> {
        None
    }

    fn select(&mut self, x: &[f32], rows: &[u32], cols: usize, out: &mut [f32]) {
        for (out, &row) in out.chunks_exact_mut(cols).zip(rows) {
            out.copy_from_slice(&x[row as usize * cols..][..cols]);
        }
    }

    fn kv_write(&mut self, args: &KvArgs<'_>, pages: &mut PagesMut<'_>) {
        let shape = args.shape;
        let rows = args.k.chunks_exact(shape.kv_heads * shape.key_dim);
        let rows = rows.zip(args.v.chunks_exact(shape.kv_heads * shape.value_dim));
        for (t, (k, v)) in rows.enumerate() {
            let (table, position) = args.tokens.place(t, args.group);
            let (chunk, slot) = (position / PAGE_POSITIONS, position % PAGE_POSITIONS);
            let page = table.get(chunk as usize).map_or(usize::MAX, |&p| p as usize);
            write_kv(pages, shape, page, slot as usize, k, v);
        }
    }

    fn embed(&mut self, table: Matrix<'_>, rows: &[u32], scale: f32, out: &mut [f32]);
    fn add(&mut self, a: &[f32], b: &[f32], out: &mut [f32]);
    fn norm(&mut self, args: &NormArgs<'_>, out: &mut [f32], sum: Option<&mut [f32]>);
    fn matmul(&mut self, x: &[f32], products: &[Product<'_>], after: After<'_>, outs: &mut [&mut [f32]]);
    fn rope(&mut self, args: &RopeArgs<'_>, out: &mut [f32]);
    fn attend(&mut self, args: &AttendArgs<'_>, out: &mut [f32]);
    fn glu(&mut self, act: Gate, gate: &[f32], up: &[f32], out: &mut [f32]);
    fn map(&mut self, f: Unary, x: &[f32], out: &mut [f32]);
    fn route(&mut self, args: &RouteArgs<'_>, ids: &mut [i32], weights: &mut [f32]);
    fn experts(&mut self, args: &ExpertsArgs<'_>, out: &mut [f32]);
    fn arg_max(&mut self, x: &[f32], cols: usize, out: &mut [i32]);
    fn top_k(&mut self, x: &[f32], cols: usize, k: usize, ids: &mut [i32], values: &mut [f32]);
}

/// Host memory behind a [`Buffer`].
enum HostMemory {
    Mapped(Region),
    Owned(RwLock<Vec<u64>>),
}

/// Buffers in host memory; the part of `Backend` that all host backends share.
pub mod memory {
    use super::*;

    /// Zeroed memory, within a limit.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn alloc(backend: &str, bytes: u64, limit_bytes: u64) -> Result<Buffer> {
        let what = format!("a buffer on `{backend}`");
        if bytes > limit_bytes {
            return Err(Error::OutOfMemory { what, need_bytes: bytes, have_bytes: limit_bytes });
        }
        let memory = zeroed(bytes.div_ceil(8), &what)?;
        Ok(Buffer::new(bytes, HostMemory::Owned(RwLock::new(memory))))
    }

    /// Mapped pages as they are.
    pub fn import(region: &Region) -> Buffer {
        Buffer::new(region.bytes().len() as u64, HostMemory::Mapped(region.clone()))
    }

    /// As [`Backend::fill`](crate::backend::Backend::fill).
    ///
    /// # Errors
    /// [`Error::Argument`] outside of the buffer, [`Error::Backend`] for memory of another kind.
    pub fn fill(
        backend: &str,
        dst: &Buffer,
        range: Range<u64>,
        write: &mut dyn FnMut(&mut [u8]),
    ) -> Result<()> {
        let mut memory = write_guard(backend, dst)?;
        let bytes = bytemuck::cast_slice_mut(&mut memory);
        let outside =
            || Error::argument("fill range", format!("inside 0..{}", dst.bytes()), format!("{range:?}"));
        let slice = bytes.get_mut(range.start as usize..range.end as usize).ok_or_else(outside)?;
        write(slice);
        Ok(())
    }

    /// As [`Backend::read`](crate::backend::Backend::read).
    ///
    /// # Errors
    /// As [`fill`].
    pub fn read(backend: &str, src: &Buffer, offset: u64, dst: &mut [u8]) -> Result<()> {
        let memory = read_guard(backend, src)?;
        let end = offset.saturating_add(dst.len() as u64);
        let outside = || {
            Error::argument("read range", format!("inside 0..{}", src.bytes()), format!("{offset}..{end}"))
        };
        dst.copy_from_slice(memory.bytes().get(offset as usize..end as usize).ok_or_else(outside)?);
        Ok(())
    }
}

/// Shared access to a buffer's bytes.
enum ReadGuard<'a> {
    Mapped(&'a [u8]),
    Owned(RwLockReadGuard<'a, Vec<u64>>),
}

impl ReadGuard<'_> {
    fn bytes(&self) -> &[u8] {
        match self {
            ReadGuard::Mapped(bytes) => bytes,
            ReadGuard::Owned(words) => bytemuck::cast_slice(words),
        }
    }
}

fn host_memory<'a>(backend: &str, buffer: &'a Buffer) -> Result<&'a HostMemory> {
    buffer.memory().ok_or_else(|| Error::Backend {
        backend: backend.into(),
        message: "a buffer of another backend was passed".into(),
    })
}

fn poisoned(backend: &str) -> Error {
    Error::Backend {
        backend: backend.into(),
        message: "a buffer was left half-written by a failed thread".into(),
    }
}

fn read_guard<'a>(backend: &str, buffer: &'a Buffer) -> Result<ReadGuard<'a>> {
    match host_memory(backend, buffer)? {
        HostMemory::Mapped(region) => Ok(ReadGuard::Mapped(region.bytes())),
        HostMemory::Owned(lock) => lock.read().map(ReadGuard::Owned).map_err(|_| poisoned(backend)),
    }
}

fn write_guard<'a>(backend: &str, buffer: &'a Buffer) -> Result<RwLockWriteGuard<'a, Vec<u64>>> {
    match host_memory(backend, buffer)? {
        HostMemory::Mapped(_) => Err(Error::Backend {
            backend: backend.into(),
            message: "a mapped weight cannot be written".into(),
        }),
        HostMemory::Owned(lock) => lock.write().map_err(|_| poisoned(backend)),
    }
}

/// An output's memory while an op runs.
enum Out<'a> {
    /// A scratch place, taken out of the plan.
    Place(usize, Vec<f32>, usize),
    /// A bound buffer.
    Io(RwLockWriteGuard<'a, Vec<u64>>, usize),
}

impl Deref for Out<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match self {
            Out::Place(_, memory, len) => &memory[..*len],
            Out::Io(memory, len) => &bytemuck::cast_slice(memory)[..*len],
        }
    }
}

impl DerefMut for Out<'_> {
    fn deref_mut(&mut self) -> &mut [f32] {
        match self {
            Out::Place(_, memory, len) => &mut memory[..*len],
            Out::Io(memory, len) => &mut bytemuck::cast_slice_mut(memory)[..*len],
        }
    }
}

/// An input's elements while an op runs.
enum In<'a> {
    Place(&'a [f32]),
    Bound(ReadGuard<'a>, usize),
}

impl Deref for In<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match self {
            In::Place(x) => x,
            In::Bound(guard, len) => bytemuck::try_cast_slice(&guard.bytes()[..4 * len]).unwrap_or(&[]),
        }
    }
}

/// A weight's bytes while an op runs.
struct Weight<'a> {
    guard: ReadGuard<'a>,
    format: Format,
    layout: Layout,
    rows: usize,
    cols: usize,
}

impl Weight<'_> {
    fn matrix(&self) -> Matrix<'_> {
        Matrix {
            format: self.format,
            layout: self.layout,
            bytes: self.guard.bytes(),
            rows: self.rows,
            cols: self.cols,
        }
    }
}

/// A prepared program on a host backend.
pub struct HostPlan<K> {
    memory: Memory,
    kernels: K,
    limits: Limits,
    spans: Vec<u32>,
    positions: Vec<u32>,
    zeros: Vec<u32>,
    submitted: u64,
    timing: Timing,
}

/// A plan's scratch tensors.
struct Memory {
    backend: String,
    program: Arc<Program>,
    layout: passes::Layout,
    places: Vec<Vec<f32>>,
}

/// Bytes of a host plan's scratch tensors.
pub fn scratch_bytes(program: &Program, limits: Limits) -> u64 {
    passes::liveness(program).bytes(limits.tokens, limits.outputs)
}

impl<K: Kernels> HostPlan<K> {
    pub fn new(backend: &str, program: &Arc<Program>, limits: Limits, kernels: K) -> Result<HostPlan<K>> {
        let layout = passes::liveness(program);
        let mut places = Vec::new();
        for &(dim, cols) in &layout.places {
            let len = passes::rows(dim, limits.tokens, limits.outputs).saturating_mul(cols.into());
            let place = zeroed(len, &format!("scratch memory on `{backend}`"))?;
            places.push(place);
        }
        let memory = Memory { backend: backend.into(), program: program.clone(), layout, places };
        Ok(HostPlan {
            memory,
            kernels,
            limits,
            spans: reserved(limits.tokens.into(), "the places of tokens")?,
            positions: reserved(limits.tokens.into(), "the places of tokens")?,
            zeros: zeroed(limits.tokens.into(), "the places of tokens")?,
            submitted: 0,
            timing: Timing { elapsed: Duration::ZERO, clock: Clock::Host },
        })
    }

    /// Checks a step against the limits and notes where each token stands.
    fn place_tokens(&mut self, step: &Step<'_>, states: &[Buffer]) -> Result<()> {
        check_step(step, &self.memory.program, self.limits, states)?;
        self.spans.clear();
        self.positions.clear();
        for (i, span) in step.spans.iter().enumerate() {
            for p in 0..span.len {
                self.spans.push(i as u32);
                self.positions.push(span.start + p);
            }
        }
        Ok(())
    }
}

impl Memory {
    /// Rows of a tensor in this step.
    fn len(&self, id: TensorId, step: &Step<'_>) -> usize {
        let t = self.program.tensor(id);
        let rows = passes::rows(t.rows, step.tokens.len() as u32, step.outputs.len() as u32);
        rows as usize * t.experts as usize * t.cols as usize
    }

    /// A tensor's memory, to write; scratch memory goes back with [`Memory::put`].
    fn take<'b>(&mut self, id: TensorId, step: &Step<'_>, b: &Bindings<'b>) -> Result<Out<'b>> {
        let len = self.len(id, step);
        let t = self.program.tensor(id);
        let (out, have) = match t.slot {
            Slot::Io(n) => {
                let guard = write_guard(&self.backend, bound(b.io, n, "io")?)?;
                let have = 2 * guard.len();
                (Out::Io(guard, len), have)
            }
            _ => {
                let place = self.layout.place.get(id.0 as usize).copied().flatten();
                let memory =
                    place.and_then(|p| self.places.get_mut(p)).map(std::mem::take).unwrap_or_default();
                let have = memory.len();
                (Out::Place(place.unwrap_or(usize::MAX), memory, len), have)
            }
        };
        if have < len {
            self.put(out);
            return Err(Error::argument("buffer", format!("at least {} bytes", 4 * len), 4 * have));
        }
        Ok(out)
    }

    fn put(&mut self, out: Out<'_>) {
        if let Out::Place(place, memory, _) = out
            && let Some(p) = self.places.get_mut(place)
        {
            *p = memory;
        }
    }

    /// A tensor's elements, to read.
    fn get<'b>(&'b self, id: TensorId, step: &Step<'_>, b: &Bindings<'b>) -> Result<In<'b>> {
        let len = self.len(id, step);
        let guard = match self.program.tensor(id).slot {
            Slot::Io(n) => read_guard(&self.backend, bound(b.io, n, "io")?)?,
            Slot::Weight(n) => read_guard(&self.backend, bound(b.weights, n, "weights")?)?,
            Slot::Scratch => {
                let place = self.layout.place.get(id.0 as usize).copied().flatten();
                let memory = place.and_then(|p| self.places.get(p)).map_or(&[][..], |p| p);
                return memory.get(..len).map(In::Place).ok_or_else(|| {
                    Error::argument("scratch tensor", format!("{len} elements"), memory.len())
                });
            }
        };
        let bytes = guard.bytes();
        if bytes.len() < 4 * len || !(bytes.as_ptr() as usize).is_multiple_of(4) {
            return Err(Error::argument(
                "buffer",
                format!("at least {} aligned bytes", 4 * len),
                bytes.len(),
            ));
        }
        Ok(In::Bound(guard, len))
    }

    fn optional<'b>(
        &'b self,
        id: Option<TensorId>,
        step: &Step<'_>,
        b: &Bindings<'b>,
    ) -> Result<Option<In<'b>>> {
        id.map(|id| self.get(id, step, b)).transpose()
    }

    fn weight<'b>(&self, id: TensorId, b: &Bindings<'b>) -> Result<Weight<'b>> {
        let t = self.program.tensor(id);
        let (Slot::Weight(n), Dim::Fixed(rows)) = (t.slot, t.rows) else {
            return Err(Error::Program(format!("`{}` is no weight", t.name)));
        };
        let guard = read_guard(&self.backend, bound(b.weights, n, "weights")?)?;
        let (need, have) = (self.program.fixed_bytes(id).unwrap_or(u64::MAX), guard.bytes().len() as u64);
        if have < need {
            return Err(Error::argument("weight buffer", format!("{need} bytes for `{}`", t.name), have));
        }
        Ok(Weight {
            guard,
            format: t.format,
            layout: t.layout,
            rows: rows as usize * t.experts as usize,
            cols: t.cols as usize,
        })
    }

    fn state(&self, id: StateId) -> Result<(&State, PageShape)> {
        let state = self.program.states.get(id.0 as usize);
        let state = state.ok_or_else(|| Error::Program(format!("state {} does not exist", id.0)))?;
        let shape = PageShape {
            kv_heads: state.kv_heads as usize,
            key_dim: state.key_dim as usize,
            value_dim: state.value_dim as usize,
        };
        Ok((state, shape))
    }

    fn cols(&self, id: TensorId) -> usize {
        self.program.tensor(id).cols as usize
    }
}

fn bound<'a>(buffers: &'a [Buffer], n: u32, what: &'static str) -> Result<&'a Buffer> {
    let missing = || Error::argument("bindings", format!("a buffer in {what} slot {n}"), buffers.len());
    buffers.get(n as usize).ok_or_else(missing)
}

/// Most outputs of one op.
const MAX_OUTPUTS: usize = 8;

/// Runs one op: takes its outputs out of the plan, borrows its inputs, calls the kernel, puts the outputs back.
fn execute<K: Kernels>(
    memory: &mut Memory,
    kernels: &mut K,
    op: &Op,
    step: &Step<'_>,
    tokens: &Tokens<'_>,
    b: &Bindings<'_>,
) -> Result<()> {
    let mut ids = [None; MAX_OUTPUTS];
    let mut count = 0;
    op.outputs(&mut |id| {
        if let Some(place) = ids.get_mut(count) {
            *place = Some(id);
        }
        count += 1;
    });
    let mut outs: [Option<Out<'_>>; MAX_OUTPUTS] = Default::default();
    let mut result = Ok(());
    for (out, id) in outs.iter_mut().zip(ids.iter().flatten()) {
        match memory.take(*id, step, b) {
            Ok(taken) => *out = Some(taken),
            Err(error) => result = Err(error),
        }
    }
    if result.is_ok() {
        // A panic must neither leave the library nor lose the memory that was taken out. What was being written to a bound
        // buffer is lost: its lock is then poisoned, and later steps say so.
        let compute = || compute(memory, kernels, op, step, tokens, b, &mut outs);
        result = catch_unwind(AssertUnwindSafe(compute)).unwrap_or_else(|panic| {
            let said = panic.downcast_ref::<&str>().copied();
            let said = said.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
            let message = format!("{} panicked: {}", op.name(), said.unwrap_or("no message"));
            Err(Error::Backend { backend: memory.backend.clone(), message })
        });
    }
    for out in outs.into_iter().flatten() {
        memory.put(out);
    }
    result
}

fn compute<K: Kernels>(
    memory: &Memory,
    kernels: &mut K,
    op: &Op,
    step: &Step<'_>,
    tokens: &Tokens<'_>,
    b: &Bindings<'_>,
    outs: &mut [Option<Out<'_>>; MAX_OUTPUTS],
) -> Result<()> {
    if let Op::MatMul { x, parts, epilogue } = op {
        let x = memory.get(*x, step, b)?;
        let residual = match epilogue {
            Epilogue::Add(id) => Some(memory.get(*id, step, b)?),
            _ => None,
        };
        let mut weights: [Option<(Weight<'_>, Option<In<'_>>)>; MAX_OUTPUTS] = Default::default();
        for (weight, part) in weights.iter_mut().zip(parts) {
            *weight = Some((memory.weight(part.weight, b)?, memory.optional(part.bias, step, b)?));
        }
        let mut products = [Product { weight: Matrix::EMPTY, bias: None }; MAX_OUTPUTS];
        for (product, (weight, bias)) in products.iter_mut().zip(weights.iter().flatten()) {
            *product = Product { weight: weight.matrix(), bias: bias.as_deref() };
        }
        let after = match (epilogue, &residual) {
            (Epilogue::Glu(act), _) => After::Glu(*act),
            (Epilogue::Add(_), Some(residual)) => After::Add(residual),
            _ => After::Nothing,
        };
        let mut slices: [&mut [f32]; MAX_OUTPUTS] = Default::default();
        for (slice, out) in slices.iter_mut().zip(outs.iter_mut().flatten()) {
            *slice = out;
        }
        kernels.matmul(&x, &products[..parts.len()], after, &mut slices);
        return Ok(());
    }
    let [first, second, ..] = outs;
    let out: &mut [f32] = first.as_mut().map_or(&mut [], |out| &mut out[..]);
    match op {
        Op::Embed { table, index, scale, .. } => {
            let table = memory.weight(*table, b)?;
            let (what, indices) = match index {
                Index::Token => ("token id", step.tokens),
                Index::Position => ("position", tokens.position),
                Index::First => ("row", tokens.zeros),
            };
            if let Some(&bad) = indices.iter().find(|&&i| i as usize >= table.rows) {
                return Err(Error::argument(what, format!("below {}", table.rows), bad));
            }
            kernels.embed(table.matrix(), indices, *scale, out);
        }
        Op::Select { x, .. } => {
            kernels.select(&memory.get(*x, step, b)?, step.outputs, memory.cols(*x), out);
        }
        Op::Norm { x, add, weight, bias, kind, eps, group, .. } => {
            let cols = memory.cols(*x);
            let (x, add) = (memory.get(*x, step, b)?, memory.optional(*add, step, b)?);
            let (weight, bias) = (memory.optional(*weight, step, b)?, memory.optional(*bias, step, b)?);
            let args = NormArgs {
                x: &x,
                add: add.as_deref(),
                cols,
                weight: weight.as_deref(),
                bias: bias.as_deref(),
                kind: *kind,
                eps: *eps,
                group: *group as usize,
            };
            let sum: Option<&mut [f32]> = second.as_mut().map(|out| &mut out[..]);
            kernels.norm(&args, out, sum);
        }
        Op::MatMul { .. } => {}
        Op::Rope { x, head_dim, frequencies, factors, magnitude, pairs, .. } => {
            let (cols, x) = (memory.cols(*x), memory.get(*x, step, b)?);
            let factors = memory.optional(*factors, step, b)?;
            let args = RopeArgs {
                x: &x,
                positions: tokens.position,
                cols,
                head_dim: *head_dim as usize,
                frequencies,
                factors: factors.as_deref(),
                magnitude: *magnitude,
                pairs: *pairs,
            };
            kernels.rope(&args, out);
        }
        Op::KvWrite { k, v, state } => {
            let (k, v) = (memory.get(*k, step, b)?, memory.get(*v, step, b)?);
            let (description, shape) = memory.state(*state)?;
            let mut guard = write_guard(&memory.backend, bound(b.states, state.0, "states")?)?;
            let mut pages = match description.format {
                Format::F16 => PagesMut::F16(bytemuck::cast_slice_mut(&mut guard)),
                Format::Q8_0 => PagesMut::Q8_0(bytemuck::cast_slice_mut(&mut guard)),
                Format::Q4_0 => PagesMut::Q4_0(bytemuck::cast_slice_mut(&mut guard)),
                _ => PagesMut::F32(bytemuck::cast_slice_mut(&mut guard)),
            };
            let group = memory.program.kv_group(description);
            kernels.kv_write(&KvArgs { k: &k, v: &v, shape, group, tokens }, &mut pages);
        }
        Op::Attend { q, state, heads, scale, softcap, sinks, .. } => {
            let q = memory.get(*q, step, b)?;
            let sinks = memory.optional(*sinks, step, b)?;
            let (description, shape) = memory.state(*state)?;
            let guard = read_guard(&memory.backend, bound(b.states, state.0, "states")?)?;
            let pages = match description.format {
                Format::F16 => Pages::F16(bytemuck::try_cast_slice(guard.bytes()).unwrap_or(&[])),
                Format::Q8_0 => Pages::Q8_0(bytemuck::try_cast_slice(guard.bytes()).unwrap_or(&[])),
                Format::Q4_0 => Pages::Q4_0(guard.bytes()),
                _ => Pages::F32(bytemuck::try_cast_slice(guard.bytes()).unwrap_or(&[])),
            };
            let args = AttendArgs {
                q: &q,
                heads: *heads as usize,
                pages,
                shape,
                group: memory.program.kv_group(description),
                tokens,
                window: description.window,
                causal: description.causal,
                scale: *scale,
                softcap: *softcap,
                sinks: sinks.as_deref(),
            };
            kernels.attend(&args, out);
        }
        Op::Glu { gate, up, act, .. } => {
            kernels.glu(*act, &memory.get(*gate, step, b)?, &memory.get(*up, step, b)?, out);
        }
        Op::Add { a, b: other, .. } => {
            kernels.add(&memory.get(*a, step, b)?, &memory.get(*other, step, b)?, out);
        }
        Op::Map { x, f, .. } => kernels.map(*f, &memory.get(*x, step, b)?, out),
        Op::Route { logits, ids, gating, normalise, scale, .. } => {
            let (experts, used) = (memory.cols(*logits), memory.cols(*ids));
            let logits = memory.get(*logits, step, b)?;
            let args = RouteArgs {
                logits: &logits,
                experts,
                used,
                gating: *gating,
                normalise: *normalise,
                scale: *scale,
            };
            let weights: &mut [f32] = second.as_mut().map_or(&mut [], |out| &mut out[..]);
            kernels.route(&args, bytemuck::cast_slice_mut(out), weights);
        }
        Op::Experts { x, ids, weights, gate, up, down, biases, act, .. } => {
            let (used, experts) = (memory.cols(*ids), memory.program.tensor(*gate).experts as usize);
            let (x, ids) = (memory.get(*x, step, b)?, memory.get(*ids, step, b)?);
            let weights = memory.get(*weights, step, b)?;
            let (gate, up, down) =
                (memory.weight(*gate, b)?, memory.weight(*up, b)?, memory.weight(*down, b)?);
            let biases = match biases {
                Some([g, u, d]) => {
                    Some([memory.get(*g, step, b)?, memory.get(*u, step, b)?, memory.get(*d, step, b)?])
                }
                None => None,
            };
            let args = ExpertsArgs {
                x: &x,
                ids: bytemuck::cast_slice(&ids),
                weights: &weights,
                used,
                experts,
                gate: gate.matrix(),
                up: up.matrix(),
                down: down.matrix(),
                biases: biases.as_ref().map(|b| b.each_ref().map(|b| &b[..])),
                act: *act,
            };
            kernels.experts(&args, out);
        }
        Op::TopK { x, ids, .. } => {
            let values: &mut [f32] = second.as_mut().map_or(&mut [], |out| &mut out[..]);
            let (cols, k) = (memory.cols(*x), memory.cols(*ids));
            kernels.top_k(&memory.get(*x, step, b)?, cols, k, bytemuck::cast_slice_mut(out), values);
        }
        Op::ArgMax { x, .. } => {
            kernels.arg_max(&memory.get(*x, step, b)?, memory.cols(*x), bytemuck::cast_slice_mut(out));
        }
    }
    Ok(())
}

impl<K: Kernels> Plan for HostPlan<K> {
    fn submit(&mut self, step: &Step<'_>, segments: Range<usize>, bindings: &Bindings<'_>) -> Result<Ticket> {
        let start = Instant::now();
        let _floats = DefaultFloats::set();
        let from_start = segments.start == 0;
        self.place_tokens(step, bindings.states)?;
        let program = self.memory.program.clone();
        let zeros = self.zeros.get(..step.tokens.len()).unwrap_or(&[]);
        let tokens = Tokens { spans: step.spans, span: &self.spans, position: &self.positions, zeros };
        let wrong = || {
            Error::argument("segments", format!("within 0..{}", program.segments.len()), "a range outside")
        };
        for segment in program.segments.get(segments).ok_or_else(wrong)? {
            for op in &segment.ops {
                if step.cancel.is_cancelled() {
                    return Err(Error::Cancelled);
                }
                self.kernels.begin(&program, op, step)?;
                execute(&mut self.memory, &mut self.kernels, op, step, &tokens, bindings)?;
                self.kernels.end()?;
            }
        }
        self.submitted += 1;
        // Submissions of one step add up.
        let before = if from_start { Duration::ZERO } else { self.timing.elapsed };
        self.timing = match self.kernels.simulated() {
            Some(elapsed) => Timing { elapsed: before + elapsed, clock: Clock::Simulated },
            None => Timing { elapsed: before + start.elapsed(), clock: Clock::Host },
        };
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
    use crate::backend::{Cancel, Span};
    use crate::program::Builder;
    use halite_kernels::pool::Pool;

    /// Adds, unless a task is to fail.
    struct Faulty {
        pool: Pool,
        fail: bool,
    }

    #[rustfmt::skip]
    impl Kernels for Faulty {
        fn add(&mut self, a: &[f32], b: &[f32], out: &mut [f32]) {
            let fail = self.fail;
            self.pool.run(8, &|n| assert!(!fail || n != 5, "task 5 fails"));
            out.iter_mut().zip(a.iter().zip(b)).for_each(|(out, (a, b))| *out = a + b);
        }
        fn embed(&mut self, _: Matrix<'_>, _: &[u32], _: f32, _: &mut [f32]) { unreachable!() }
        fn norm(&mut self, _: &NormArgs<'_>, _: &mut [f32], _: Option<&mut [f32]>) { unreachable!() }
        fn matmul(&mut self, _: &[f32], _: &[Product<'_>], _: After<'_>, _: &mut [&mut [f32]]) { unreachable!() }
        fn rope(&mut self, _: &RopeArgs<'_>, _: &mut [f32]) { unreachable!() }
        fn attend(&mut self, _: &AttendArgs<'_>, _: &mut [f32]) { unreachable!() }
        fn glu(&mut self, _: Gate, _: &[f32], _: &[f32], _: &mut [f32]) { unreachable!() }
        fn map(&mut self, _: Unary, _: &[f32], _: &mut [f32]) { unreachable!() }
        fn route(&mut self, _: &RouteArgs<'_>, _: &mut [i32], _: &mut [f32]) { unreachable!() }
        fn experts(&mut self, _: &ExpertsArgs<'_>, _: &mut [f32]) { unreachable!() }
        fn arg_max(&mut self, _: &[f32], _: usize, _: &mut [i32]) { unreachable!() }
        fn top_k(&mut self, _: &[f32], _: usize, _: usize, _: &mut [i32], _: &mut [f32]) { unreachable!() }
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
