//! The CPU backend: `halite-kernels` over mapped pages, on a pool of threads.
//!
//! Weights are imported, never copied. Those that do not fit a session's memory are streamed: an op reads some
//! rows of them at a time, while others are on their way. Work is split by output columns or rows, or in
//! attention by chunks of the cache whose results are merged in order, so no result depends on the split.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use halite_kernels::activation::{Activation, PADDING, Quantise, Quantised, QuantisedMut, SUMS, padded};
use halite_kernels::attention::{self, Attend, AttendChunks, Merge, PageShape, ROWS};
use halite_kernels::formats::{Kind, Layout};
use halite_kernels::isa::Cpu as Isa;
use halite_kernels::matmul::{self, MatMul, X};
use halite_kernels::panel::PanelMut;
pub use halite_kernels::pool::Executor;
use halite_kernels::pool::Pool;
use halite_kernels::recurrent::{self, Stretch};
use halite_kernels::roofline;
use halite_kernels::rows;

use super::driver::{Driver, DriverOption, Listed, Value};
use super::energy::Meter;
use super::host::{
    self, Attention, HostOp, HostPlan, HostState, HostStep, HostTensor, Kernels, Matrix, memory, row_chunks,
};
use super::{
    Backend, Bindings, Buffer, Caps, Clock, Contract, Fusions, Gap, Limits, OpSig, Plan, Rows, Support,
    Timing, Usage,
};
use crate::cost::Rates;
use crate::error::{Error, Result};
use crate::map::Region;
use crate::memory::{Allocator, System, Zeroed, zeroed};
use crate::program::{
    Epilogue, Gate, Gating, Groups, MAX_PARTS, NOT_FINITE, NormKind, Op, PAGE_POSITIONS, Part, Program,
    RopePairs, Rotation, Rule, Unary,
};
use crate::stream::Chunk;

/// The driver of the CPU backend.
pub const DRIVER: Driver = Driver::new("cpu", |_, options| {
    let threads = options.number("threads")?.unwrap_or(0);
    let cpu = Cpu::with_threads(usize::try_from(threads).unwrap_or(usize::MAX))?;
    Ok(Arc::new(match options.value("energy") {
        Some(counter) => cpu.with_energy(Path::new(counter))?,
        None => cpu,
    }))
})
.options(&[
    DriverOption::new("threads", Value::Number("N"), "CPU threads [default: all cores]"),
    DriverOption::new(
        "energy",
        Value::Text("COUNTER"),
        "Counter of the CPU's energy: `rapl`, or a file of microjoules, such as hwmon's energy1_input",
    ),
])
.list(|| Ok(vec![Listed::of(Cpu::new()?.caps())]));

/// The CPU.
pub struct Cpu {
    caps: Caps,
    isa: Isa,
    pool: Arc<Pool>,
    allocator: Arc<dyn Allocator>,
    meter: Option<Arc<Meter>>,
}

impl std::fmt::Debug for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cpu").field("caps", &self.caps).finish_non_exhaustive()
    }
}

impl Cpu {
    /// Opens the CPU with a thread for each usable core ([`halite_kernels::cores`]) and its best instruction set, or the one named in the
    /// environment variable `HALITE_ISA`.
    ///
    /// # Errors
    /// [`Error::Backend`] if this CPU lacks the named instruction set or a thread cannot be started.
    pub fn new() -> Result<Cpu> {
        Cpu::with_threads(0)
    }

    /// As [`Cpu::new`], with `threads` threads; 0: one for each core.
    ///
    /// # Errors
    /// As [`Cpu::new`].
    pub fn with_threads(threads: usize) -> Result<Cpu> {
        match std::env::var_os("HALITE_ISA") {
            Some(name) if !name.is_empty() => Cpu::with_isa(threads, &name.to_string_lossy()),
            _ => Cpu::with_isa(threads, Isa::detect().name()),
        }
    }

    /// As [`Cpu::with_threads`], with a named instruction set, one of [`Isa::NAMES`].
    ///
    /// # Errors
    /// [`Error::Backend`] if this CPU lacks it or a thread cannot be started.
    pub fn with_isa(threads: usize, name: &str) -> Result<Cpu> {
        let failed = |message: String| Error::Backend { backend: "cpu".into(), message };
        let isa = Isa::from_name(name).ok_or_else(|| {
            failed(format!(
                "instruction set `{name}`: expected one of {} that this CPU has",
                Isa::NAMES.join(", ")
            ))
        })?;
        let threads = match threads {
            0 => halite_kernels::cores::usable(),
            n => n,
        };
        let pool = Pool::new(threads).map_err(|e| failed(format!("cannot start {threads} threads: {e}")))?;
        Ok(Cpu::on(isa, pool))
    }

    /// Opens the CPU on the threads of the host, with the best instruction set.
    pub fn with_executor(executor: Arc<dyn Executor>) -> Cpu {
        Cpu::on(Isa::detect(), Pool::with_executor(executor))
    }

    fn on(isa: Isa, pool: Pool) -> Cpu {
        let threads = pool.threads();
        let device = format!("{} on {threads} thread{}", isa.name(), if threads == 1 { "" } else { "s" });
        let caps = Caps::new("cpu", device)
            .memory_bytes(memory_bytes())
            .rows(Rows::AsStored)
            // It gains nothing from a rotation that goes straight to the cache.
            .fusions(Fusions::ALL.rope_kv(false))
            .contract(Contract::Exact)
            .streams(true);
        Cpu { caps, isa, pool: Arc::new(pool), allocator: Arc::new(System), meter: None }
    }

    /// Takes the memory of sessions from an allocator: the KV cache, the inputs and outputs of steps, scratch,
    /// and weights that are not mapped.
    #[must_use]
    pub fn with_memory(mut self, allocator: Arc<dyn Allocator>) -> Cpu {
        self.allocator = allocator;
        self
    }

    /// Tells the energy of steps ([`Timing::energy`]), from the counters `rapl` or a file that counts microjoules, such as Linux's
    /// `/sys/class/hwmon/hwmon0/energy1_input`. The counters are the machine's: what others use at the same time is in them. Steps that run
    /// at the same time in this process share it equally.
    ///
    /// # Errors
    /// [`Error::Io`] if there is no such counter, or it may not be read. Linux lets only root read RAPL.
    pub fn with_energy(mut self, counter: &Path) -> Result<Cpu> {
        self.meter = Some(Meter::open(counter)?);
        Ok(self)
    }

    /// The instruction set in use.
    pub fn isa(&self) -> &'static str {
        self.isa.name()
    }

    /// Measures the peak rates of these threads and this instruction set, in a second or two. The memory rate
    /// is that of reading `buffer_bytes` repeatedly: a cache's, if they fit in one.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if there is no room for the buffer.
    pub fn rates(&self, buffer_bytes: u64) -> Result<Rates> {
        Ok(Rates {
            bytes_per_s: self.read_bytes_per_s(buffer_bytes)?,
            integer_ops_per_s: roofline::dots_per_s(self.isa, &self.pool),
            float_ops_per_s: roofline::flops_per_s(self.isa, &self.pool),
        })
    }
}

impl Cpu {
    /// Returns the number of threads.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Measures the bytes per second that all threads together read, each its own part of a buffer
    /// repeatedly.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if there is no room for the buffer.
    pub fn read_bytes_per_s(&self, buffer_bytes: u64) -> Result<f64> {
        Ok(roofline::read_bytes_per_s(self.isa, &self.pool, &touched(buffer_bytes)?))
    }

    /// Measures the bytes per second that all threads together copy, each within its own part of a buffer. A
    /// copied byte is read once and written once.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if there is no room for the buffer.
    pub fn copy_bytes_per_s(&self, buffer_bytes: u64) -> Result<f64> {
        Ok(roofline::copy_bytes_per_s(&self.pool, &mut touched(buffer_bytes)?))
    }
}

/// Allocates and writes a buffer to measure memory with. Unwritten pages would all map to one zero page.
fn touched(bytes: u64) -> Result<Vec<u8>> {
    let mut buffer: Vec<u8> = zeroed(bytes, "the buffer to measure memory with")?;
    buffer.fill(1);
    Ok(buffer)
}

/// Returns the machine's memory, or no limit if it is unknown.
fn memory_bytes() -> u64 {
    let total = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|l| l.starts_with("MemTotal:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    });
    total.map_or(u64::MAX, |kib| kib.saturating_mul(1024))
}

impl Backend for Cpu {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    /// The backend runs every op, with every epilogue, on every format that the build has kernels for.
    fn supports(&self, sig: &OpSig<'_>) -> Support {
        let weights = match sig.op {
            Op::MatMul { parts, .. } => parts.iter().map(|part| part.weight).collect::<Vec<_>>(),
            Op::BlockMatMul { weight, .. } => vec![*weight],
            Op::Experts { gate, up, down, .. } => vec![*gate, *up, *down],
            _ => vec![],
        };
        let missing = weights.iter().find_map(|&weight| {
            let format = sig.program.tensor(weight).format;
            let feature = matmul::missing_feature(self.isa, format)?;
            Some(format!("{} weights: this build lacks the cargo feature `{feature}`", format.name()))
        });
        missing.map_or(Support::Native, |missing| Support::Unsupported(Gap::NotYet(missing)))
    }

    fn explain(&self, sig: &OpSig<'_>, tokens: u32) -> String {
        let line = |weight| {
            let t = sig.program.tensor(weight);
            matmul::describe(self.isa, t.format, t.layout, tokens as usize).to_string()
        };
        let mut lines: Vec<String> = match sig.op {
            Op::MatMul { parts, .. } => parts.iter().map(|part| line(part.weight)).collect(),
            Op::Experts { gate: weight, .. } | Op::BlockMatMul { weight, .. } => vec![line(*weight)],
            _ => vec![self.isa.name().into()],
        };
        lines.dedup();
        lines.join(" | ")
    }

    fn alloc(&self, bytes: u64, _: Usage) -> Result<Buffer> {
        memory::alloc_from(&*self.allocator, &self.caps.name, bytes, self.caps.memory_bytes)
    }

    fn import(&self, region: &Region) -> Result<Option<Buffer>> {
        Ok(match region.stream() {
            Some(_) => Some(memory::stream(region)),
            None => memory::import(region),
        })
    }

    fn alloc_spilled(&self, bytes: u64, kept_bytes: u64, folder: &Path) -> Result<Option<Buffer>> {
        memory::alloc_spilled(bytes, kept_bytes, folder).map(Some)
    }

    fn fill(&self, dst: &Buffer, range: Range<u64>, write: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        memory::fill(&self.caps.name, dst, range, write)
    }

    fn read(&self, src: &Buffer, offset: u64, dst: &mut [u8]) -> Result<()> {
        memory::read(&self.caps.name, src, offset, dst)
    }

    fn prepare(&self, program: &Arc<Program>, limits: Limits) -> Result<Box<dyn Plan>> {
        let kernels = CpuKernels {
            isa: self.isa,
            pool: self.pool.clone(),
            memory: Scratch::for_program(program, limits).allocate(&*self.allocator)?,
            meter: self.meter.clone(),
            began: None,
        };
        let allocator = &*self.allocator;
        Ok(Box::new(HostPlan::with_memory(allocator, &self.caps.name, program, limits, kernels)?))
    }

    fn scratch_bytes(&self, program: &Program, limits: Limits) -> u64 {
        host::scratch_bytes(program, limits).saturating_add(Scratch::for_program(program, limits).bytes())
    }
}

/// Scratch memory of kernels, in elements.
#[derive(Debug, Clone, Copy, Default)]
struct Scratch {
    /// Quantised activations: tokens times the longest matmul input.
    quantised: u64,
    /// The second product of the largest gated linear unit: tokens times columns.
    up: u64,
    /// Partial results of split attention: heads times value elements, for some chunks.
    attended: u64,
    /// (token, rank) pairs of the largest expert op, its input and hidden columns.
    pairs: u64,
    expert_cols: u64,
    expert_hidden: u64,
    /// Elements of the largest input and output of a product by blocks.
    blocks: [u64; 2],
    /// Keys of one token that are rotated on the way to the cache.
    rotated: u64,
}

impl Scratch {
    fn for_program(program: &Program, limits: Limits) -> Scratch {
        let mut s = Scratch::default();
        for (_, op) in program.ops() {
            match op {
                Op::MatMul { x, epilogue, outs, .. } => {
                    let x = program.tensor(*x);
                    let rows = crate::passes::rows(x.rows, limits.tokens, limits.outputs);
                    if let (Epilogue::Glu(_), Some(&out)) = (epilogue, outs.first()) {
                        let cols = u64::from(program.tensor(out).cols);
                        s.up = s.up.max(rows.saturating_mul(cols));
                    }
                    s.quantised = s.quantised.max(rows.saturating_mul(padded(x.cols as usize) as u64));
                }
                Op::Experts { x, ids, gate, .. } => {
                    let hidden = match program.tensor(*gate).rows {
                        crate::program::Dim::Fixed(rows) => u64::from(rows),
                        _ => 0,
                    };
                    let cols = u64::from(program.tensor(*x).cols);
                    let pairs = u64::from(limits.tokens) * u64::from(program.tensor(*ids).cols);
                    s.pairs = s.pairs.max(pairs);
                    s.expert_cols = s.expert_cols.max(cols);
                    s.expert_hidden = s.expert_hidden.max(hidden);
                    s.up = s.up.max(pairs.saturating_mul(hidden));
                    s.quantised =
                        s.quantised.max(pairs.saturating_mul(padded(cols.max(hidden) as usize) as u64));
                }
                Op::BlockMatMul { x, weight, out } => {
                    let (weight, t) = (program.tensor(*weight), program.tensor(*x));
                    let rows = crate::passes::rows(t.rows, limits.tokens, limits.outputs);
                    let cols = [t.cols, program.tensor(*out).cols];
                    let blocks = rows.saturating_mul(weight.experts.into());
                    s.quantised = s.quantised.max(blocks.saturating_mul(padded(weight.cols as usize) as u64));
                    for (most, cols) in s.blocks.iter_mut().zip(cols) {
                        *most = (*most).max(rows.saturating_mul(cols.into()));
                    }
                }
                Op::RopeKv { k, .. } => s.rotated = s.rotated.max(program.tensor(*k).cols.into()),
                Op::Attend { state, heads, .. } => {
                    let value_dim =
                        program.states.get(state.0 as usize).map_or(0, |s| u64::from(s.value_dim));
                    let head = 2 * KEPT_CHUNKS as u64 * (value_dim + 2) + 2;
                    s.attended = s.attended.max(u64::from(*heads) * head);
                }
                _ => {}
            }
        }
        s
    }

    /// Lengths of: codes, scales, sums (each for two activation formats), expert inputs, second products of
    /// gated units, hidden values of experts, outputs, results of attention.
    fn lengths(&self) -> [u64; 9] {
        let (pairs, cols, hidden) = (self.pairs, self.expert_cols, self.expert_hidden);
        [
            self.quantised,
            self.quantised / 32 + 1,
            self.quantised / PADDING as u64 * SUMS as u64,
            pairs.saturating_mul(cols).max(self.blocks[0]),
            self.up,
            pairs.saturating_mul(hidden),
            pairs.saturating_mul(cols).max(self.blocks[1]),
            self.attended,
            self.rotated,
        ]
    }

    fn bytes(&self) -> u64 {
        let [codes, scales, sums, input, up, hidden, output, attended, rotated] = self.lengths();
        let floats = [scales, sums, scales, sums, input, up, hidden, output, attended, rotated]
            .iter()
            .fold(0u64, |n, l| n.saturating_add(*l));
        codes
            .saturating_mul(2)
            .saturating_add(floats.saturating_mul(4))
            .saturating_add(self.pairs.saturating_mul(4))
    }

    fn allocate(&self, from: &dyn Allocator) -> Result<KernelMemory> {
        const WHAT: &str = "kernel scratch on `cpu`";
        let [codes, scales, sums, input, up, hidden, output, attended, rotated] = self.lengths();
        let quantised = || -> Result<QuantisedMemory> {
            Ok(QuantisedMemory {
                codes: Zeroed::new(from, codes, WHAT)?,
                scales: Zeroed::new(from, scales, WHAT)?,
                sums: Zeroed::new(from, sums, WHAT)?,
            })
        };
        Ok(KernelMemory {
            q8_0: quantised()?,
            q8_k: quantised()?,
            places: Zeroed::new(from, self.pairs, WHAT)?,
            input: Zeroed::new(from, input, WHAT)?,
            up: Zeroed::new(from, up, WHAT)?,
            activated: Zeroed::new(from, hidden, WHAT)?,
            output: Zeroed::new(from, output, WHAT)?,
            attended: Zeroed::new(from, attended, WHAT)?,
            rotated: Zeroed::new(from, rotated, WHAT)?,
            rows: Vec::new(),
        })
    }
}

/// Memory for one activation format.
#[derive(Debug)]
struct QuantisedMemory {
    codes: Zeroed<i8>,
    scales: Zeroed<f32>,
    sums: Zeroed<i32>,
}

impl QuantisedMemory {
    /// Quantises rows of `k` values.
    fn quantise(&mut self, isa: Isa, pool: &Pool, to: Activation, x: &[f32], k: usize) {
        let (tokens, width) = (x.len() / k, padded(k));
        let blocks = width / to.block_len();
        let codes = &mut self.codes[..tokens * width];
        let scales = &mut self.scales[..tokens * blocks];
        let sums_width = width / PADDING * SUMS;
        let sums = &mut self.sums[..tokens * sums_width];
        pool.rows3((codes, width), (scales, blocks), (sums, sums_width), 8, &|first, codes, scales, sums| {
            let x = &x[first * k..][..codes.len() / width * k];
            isa.run(Quantise { to, k, x, out: QuantisedMut { codes, scales, sums } });
        });
    }

    fn view(&self, to: Activation, tokens: Range<usize>, k: usize) -> Quantised<'_> {
        let width = padded(k);
        let of = |each: usize| tokens.start * each..tokens.end * each;
        Quantised {
            k,
            codes: &self.codes[of(width)],
            scales: &self.scales[of(width / to.block_len())],
            sums: &self.sums[of(width / PADDING * SUMS)],
        }
    }
}

/// Memory that kernels reuse in every step.
#[derive(Debug)]
struct KernelMemory {
    q8_0: QuantisedMemory,
    q8_k: QuantisedMemory,
    /// The place of each pair of token and rank in the order of experts.
    places: Zeroed<u32>,
    input: Zeroed<f32>,
    up: Zeroed<f32>,
    activated: Zeroed<f32>,
    /// Each head's maximum and sum, and the partial results of chunks.
    attended: Zeroed<f32>,
    /// The rotated keys of one token.
    rotated: Zeroed<f32>,
    /// Outputs of experts, for each pair of token and rank.
    output: Zeroed<f32>,
    /// Rows of a table that stays in its file.
    rows: Vec<u8>,
}

/// [`Kernels`] with vector instructions and threads.
pub struct CpuKernels {
    isa: Isa,
    pool: Arc<Pool>,
    memory: KernelMemory,
    meter: Option<Arc<Meter>>,
    /// When the submission began, by the meter.
    began: Option<f64>,
}

/// Minimum elements of row work per thread: below this, waking a thread costs more than it saves.
const SERIAL_ELEMENTS: usize = 16 * 1024;

impl CpuKernels {
    /// Kernels for row ops, on the calling thread.
    pub fn of_rows(isa: Isa) -> Result<CpuKernels> {
        let failed = |e| Error::Backend { backend: "cpu".into(), message: format!("no thread: {e}") };
        let pool = Arc::new(Pool::new(1).map_err(failed)?);
        let memory = Scratch::default().allocate(&System)?;
        Ok(CpuKernels { isa, pool, memory, meter: None, began: None })
    }

    /// Runs `task(first row, rows)` over the rows of `out`, on the pool if there is enough work.
    fn rows(&self, out: &mut [f32], cols: usize, task: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        if out.len() <= SERIAL_ELEMENTS {
            return task(0, out);
        }
        let grain = (SERIAL_ELEMENTS / 4 / cols.max(1)).max(1);
        self.pool.rows(out, cols, grain, task);
    }
}

/// Minimum chunks of the KV cache to split a token's attention between threads.
const SPLIT_CHUNKS: usize = 4;
/// Chunks whose partial results are stored at a time.
const KEPT_CHUNKS: usize = 64;

/// Computes the attention of one token to one KV head.
fn attend<'a>(a: &Attention<'a>, token: usize, kv_head: usize, out: &'a mut [f32]) -> Attend<'a> {
    let (shape, heads) = (a.shape, a.heads / a.shape.kv_heads);
    let (table, position, end) = a.place(token);
    let (q_stride, first) = (a.heads * shape.key_dim, kv_head * heads);
    Attend {
        q: &a.q[token * q_stride + first * shape.key_dim..],
        q_stride,
        out,
        out_stride: heads * shape.value_dim,
        tokens: 1,
        heads,
        pages: a.pages,
        shape,
        table,
        kv_head,
        position,
        end,
        sight: a.sight,
        scale: a.scale,
        growth: a.growth,
        softcap: a.softcap,
        slopes: a.slopes.map(|s| &s[first..first + heads]),
        sinks: a.sinks.map(|s| &s[first..first + heads]),
    }
}

impl CpuKernels {
    /// Computes the attention of one token, with its chunks split between threads.
    fn attend_split(&mut self, a: &Attention<'_>, token: usize, out: &mut [f32]) {
        let (shape, isa, pool) = (a.shape, self.isa, &self.pool);
        let group = a.heads / shape.kv_heads;
        let head = shape.value_dim + 2;
        let all = a.chunks(token);
        let (max, rest) = self.memory.attended.split_at_mut(a.heads);
        let (sum, kept) = rest.split_at_mut(a.heads);
        for first in all.clone().step_by(KEPT_CHUNKS) {
            let len = (all.end - first).min(KEPT_CHUNKS);
            // A few tasks per thread; no task has chunks of two KV heads.
            let grain = (len * shape.kv_heads).div_ceil(4 * pool.threads()).min(len);
            let runs = len.div_ceil(grain);
            let grain = len.div_ceil(runs);
            let kept = &mut kept[..shape.kv_heads * runs * grain * group * head];
            pool.rows(kept, grain * group * head, 1, &|run, out| {
                let (kv_head, start) = (run / runs, first + run % runs * grain);
                let chunks = start..(start + grain).min(first + len);
                isa.run(AttendChunks { attend: attend(a, token, kv_head, out), chunks });
            });
            let kept = &*kept;
            let rows = ((&mut *out, shape.value_dim), (&mut *max, 1), (&mut *sum, 1));
            pool.rows3(
                rows.0,
                rows.1,
                rows.2,
                a.heads.div_ceil(pool.threads()),
                &|first_head, out, max, sum| {
                    for (i, out) in out.chunks_exact_mut(shape.value_dim).enumerate() {
                        let h = first_head + i;
                        let start = (h / group * runs * grain * group + h % group) * head;
                        isa.run(Merge {
                            chunks: &kept[start..][..((len - 1) * group + 1) * head],
                            stride: group * head,
                            out,
                            max: &mut max[i],
                            sum: &mut sum[i],
                            fresh: first == all.start,
                            last: first + len == all.end,
                            sink: a.sinks.map(|s| s[h]),
                        });
                    }
                },
            );
        }
    }
}

/// A weight, or rows of one, and its bias.
#[derive(Debug, Clone, Copy)]
struct Product<'a> {
    weight: Matrix<'a>,
    bias: Option<&'a [f32]>,
}

impl<'a> Product<'a> {
    fn new(weight: &'a HostTensor<'_>, bias: Option<&'a HostTensor<'_>>) -> Product<'a> {
        Product { weight: weight.matrix(), bias: bias.map(HostTensor::floats) }
    }

    /// Selects rows of this product, whose weight is in `chunk`.
    fn chunk<'b>(&self, rows: &Range<usize>, chunk: &'b LoadedRows<'_>) -> Product<'b>
    where
        'a: 'b,
    {
        Product { weight: chunk.matrix(), bias: self.bias.map(|bias| &bias[rows.clone()]) }
    }

    /// Whether both are one product. Experts without gates name a matrix twice.
    fn is(&self, other: &Product<'_>) -> bool {
        let bias = |product: &Product<'_>| product.bias.map(<[f32]>::as_ptr_range);
        self.weight.bytes.as_ptr_range() == other.weight.bytes.as_ptr_range() && bias(self) == bias(other)
    }

    /// Selects an expert's rows of `weight`, and its row of `biases`.
    fn of_expert(weight: Matrix<'a>, biases: Option<&'a [f32]>, rows: usize, expert: usize) -> Product<'a> {
        let range = expert * rows..(expert + 1) * rows;
        let bias = biases.map(|b| b.get(range.clone()).unwrap_or(&[]));
        Product { weight: weight.rows(range), bias }
    }
}

/// Rows of a weight, in memory until this is dropped.
struct LoadedRows<'a> {
    /// The rows, without bytes if they are streamed.
    matrix: Matrix<'a>,
    chunk: Option<Chunk<'a>>,
}

impl<'a> LoadedRows<'a> {
    /// Returns rows of a weight, or of all its experts; waits for them if they are streamed.
    fn next(weight: &'a HostTensor<'_>, rows: Range<usize>) -> Result<LoadedRows<'a>> {
        let stacked = weight.stacked();
        let Some(stream) = weight.streamed().and_then(Region::stream) else {
            return Ok(LoadedRows { matrix: stacked.rows(rows), chunk: None });
        };
        Ok(LoadedRows { matrix: Matrix { rows: rows.len(), ..stacked }, chunk: Some(stream.next()?) })
    }

    fn matrix(&self) -> Matrix<'_> {
        match &self.chunk {
            Some(chunk) => Matrix { bytes: chunk.bytes(), ..self.matrix },
            None => self.matrix,
        }
    }
}

/// The rows of a weight's matrix and their bytes.
fn row_shape(weight: &HostTensor<'_>) -> (usize, usize) {
    (weight.rows, weight.format.row_bytes(weight.cols).unwrap_or(usize::MAX))
}

/// Some columns of a residual.
#[derive(Debug, Clone, Copy)]
struct Residual<'a> {
    /// Rows of `width` elements.
    x: &'a [f32],
    width: usize,
    /// The first column.
    first: usize,
}

/// An input, quantised for the formats of its weights.
struct Input<'a> {
    x: &'a [f32],
    k: usize,
    tokens: usize,
    q8_0: &'a QuantisedMemory,
    q8_k: &'a QuantisedMemory,
}

impl<'a> Input<'a> {
    fn new(
        isa: Isa,
        pool: &Pool,
        memory: (&'a mut QuantisedMemory, &'a mut QuantisedMemory),
        x: &'a [f32],
        products: &[Product<'_>],
    ) -> Input<'a> {
        let (q8_0, q8_k) = memory;
        let k = products.first().map_or(1, |p| p.weight.cols);
        let wants = |to: Activation| {
            let matches = |p: &Product<'_>| matches!(p.weight.format.kind(), Kind::Quantised { activation, .. } if activation == to);
            products.iter().any(matches)
        };
        if wants(Activation::Q8_0) {
            q8_0.quantise(isa, pool, Activation::Q8_0, x, k);
        }
        if wants(Activation::Q8_K) {
            q8_k.quantise(isa, pool, Activation::Q8_K, x, k);
        }
        Input { x, k, tokens: x.len() / k, q8_0, q8_k }
    }

    /// Computes columns of a product from `first` on, with the bias added, for as many tokens from `token` on
    /// as `out` has rows.
    fn product(&self, isa: Isa, product: &Product<'_>, token: usize, first: usize, out: &mut PanelMut<'_>) {
        let (cols, tokens) = (out.cols(), token..token + out.rows());
        let weight = product.weight.rows(first..first + cols);
        let x = match weight.format.kind() {
            Kind::Float => X::F32(&self.x[tokens.start * self.k..tokens.end * self.k]),
            Kind::Quantised { activation: Activation::Q8_0, .. } => {
                X::Quantised(self.q8_0.view(Activation::Q8_0, tokens, self.k))
            }
            Kind::Quantised { .. } => X::Quantised(self.q8_k.view(Activation::Q8_K, tokens, self.k)),
        };
        let (w, layout) = (weight.bytes, weight.layout);
        matmul::matmul(isa, weight.format, MatMul { w, layout, k: self.k, x, out: out.reborrow() });
        if let Some(bias) = product.bias {
            for t in 0..out.rows() {
                for (y, b) in out.row(t).iter_mut().zip(&bias[first..first + cols]) {
                    *y += b;
                }
            }
        }
    }
}

/// Multiply-adds of a task, at least: threads share nothing smaller.
const TASK_MACS: usize = 64 * 1024;

/// Returns the columns that threads share out: whole tiles, with enough work for `tokens` tokens.
fn grain(tokens: usize, k: usize) -> usize {
    (TASK_MACS / (tokens * k).max(1)).next_multiple_of(32).max(32)
}

/// Computes the products of one input with several weights, each into its own output, and the epilogue. `up`
/// is memory for the second product of a gated linear unit.
fn products(
    isa: Isa,
    pool: &Pool,
    input: &Input<'_>,
    products: &[Product<'_>],
    epilogue: Epilogue<Residual<'_>>,
    outs: &mut [PanelMut<'_>],
    up: &mut [f32],
) {
    let grain = grain(input.tokens, input.k);
    if let (Epilogue::Glu(f), &[gate, up_product], [out, ..]) = (epilogue, products, &mut *outs) {
        let columns = out.cols();
        let up = PanelMut::new(&mut up[..input.tokens * columns], columns);
        return pool.blocks([out.reborrow(), up], &[input.tokens], grain, &|_, first, blocks| {
            glu(isa, input, [gate, up_product], f, 0, first, blocks);
        });
    }
    pool.panels(outs, grain, &|i, first, mut panel| {
        let Some(product) = products.get(i) else { return };
        input.product(isa, product, 0, first, &mut panel);
        if let Epilogue::Add(Residual { x, width, first: start }) = epilogue {
            let cols = panel.cols();
            for t in 0..panel.rows() {
                for (y, r) in panel.row(t).iter_mut().zip(&x[t * width + start + first..][..cols]) {
                    *y += r;
                }
            }
        }
    });
}

/// As [`products`], with weights of which some are streamed.
fn streamed_products(
    isa: Isa,
    pool: &Pool,
    input: &Input<'_>,
    parts: &[Part<HostTensor<'_>>],
    epilogue: Epilogue<Residual<'_>>,
    outs: &mut [PanelMut<'_>],
    up: &mut [f32],
) -> Result<()> {
    let stream = parts.iter().find_map(|part| part.weight.streamed()?.stream());
    let chunk_bytes = stream.map_or(0, |stream| stream.chunk_bytes());
    let mut shapes = [(0, 0); MAX_PARTS];
    shapes.iter_mut().zip(parts).for_each(|(shape, part)| *shape = row_shape(&part.weight));
    let paired = matches!(epilogue, Epilogue::Glu(_));
    let mut gate = None;
    for (i, range) in row_chunks(shapes, parts.len(), paired, chunk_bytes) {
        let rows = LoadedRows::next(&parts[i].weight, range.clone())?;
        let bias = |i: usize| parts[i].bias.as_ref().map(|bias| &bias.floats()[range.clone()]);
        if paired && i == 0 {
            gate = Some(rows);
            continue;
        }
        let last = Product { weight: rows.matrix(), bias: bias(i) };
        let both = gate.as_ref().map(|gate| [Product { weight: gate.matrix(), bias: bias(0) }, last]);
        let list = both.as_ref().map_or(std::slice::from_ref(&last), |both| &both[..]);
        let epilogue = match epilogue {
            Epilogue::Add(all) => Epilogue::Add(Residual { first: range.start, ..all }),
            other => other,
        };
        let out = outs[if paired { 0 } else { i }].columns(range.clone());
        products(isa, pool, input, list, epilogue, &mut [out], up);
    }
    Ok(())
}

/// Computes columns of a gated linear unit from `first` on, in place of the gate's products, for the tokens
/// from `token` on.
fn glu(
    isa: Isa,
    input: &Input<'_>,
    [gate_product, up_product]: [Product<'_>; 2],
    f: rows::Gate,
    token: usize,
    first: usize,
    [mut gate, mut up]: [PanelMut<'_>; 2],
) {
    input.product(isa, &gate_product, token, first, &mut gate);
    if gate_product.is(&up_product) {
        (0..gate.rows()).for_each(|t| up.row(t).copy_from_slice(gate.row(t)));
    } else {
        input.product(isa, &up_product, token, first, &mut up);
    }
    let mut gates = [0.0; GLU_ELEMENTS];
    for t in 0..gate.rows() {
        for (out, up) in gate.row(t).chunks_mut(GLU_ELEMENTS).zip(up.row(t).chunks(GLU_ELEMENTS)) {
            let gate = &mut gates[..out.len()];
            gate.copy_from_slice(out);
            isa.run(rows::Glu { f, gate, up, out });
        }
    }
}

/// Elements of a gate that are buffered while the unit overwrites them.
const GLU_ELEMENTS: usize = 256;

impl CpuKernels {
    /// [`Op::Embed`] of a table that stays in its file.
    fn embed_streamed(
        &mut self,
        table: &HostTensor<'_>,
        rows: &[u32],
        scale: f32,
        out: &mut [f32],
    ) -> Result<()> {
        let Some(region) = table.streamed() else { return Ok(()) };
        let matrix = table.matrix();
        // Interleaved rows can only be read together.
        let together = if matrix.layout == Layout::Interleaved { ROWS_TOGETHER } else { 1 };
        let row_bytes = row_shape(table).1;
        let memory = &mut self.memory.rows;
        if memory.len() < together * row_bytes {
            *memory = zeroed((together * row_bytes) as u64, "rows of a table that stays in its file")?;
        }
        for (out, &row) in out.chunks_exact_mut(matrix.cols).zip(rows) {
            let first = row as usize / together * together;
            let bytes = &mut memory[..(matrix.rows - first).min(together) * row_bytes];
            region.read_at((first * row_bytes) as u64, bytes)?;
            matmul::embed(matrix.format, matrix.layout, bytes, row as usize - first, scale, out);
        }
        Ok(())
    }

    fn embed(&mut self, table: Matrix<'_>, rows: &[u32], scale: f32, out: &mut [f32]) {
        self.rows(out, table.cols, &|first, out| {
            for (out, &row) in out.chunks_exact_mut(table.cols).zip(&rows[first..]) {
                matmul::embed(table.format, table.layout, table.bytes, row as usize, scale, out);
            }
        });
    }

    fn add(&mut self, a: &[f32], b: &[f32], out: &mut [f32]) {
        self.rows(out, 1, &|first, out| {
            let range = first..first + out.len();
            self.isa.run(rows::Add { a: &a[range.clone()], b: &b[range], out });
        });
    }

    /// [`Op::Rope`].
    fn rope(
        &self,
        x: &HostTensor<'_>,
        rotation: &Rotation<&[f32]>,
        step: &HostStep<'_>,
        out: &mut HostTensor<'_>,
    ) {
        let (cols, x) = (x.cols, x.floats());
        self.rows(out.floats_mut(), cols, &|first, out| {
            for (i, out) in out.chunks_exact_mut(cols).enumerate() {
                let t = first + i;
                self.isa.run(rope(&x[t * cols..][..cols], rotation, step.positions[t], out));
            }
        });
    }

    /// [`Op::Attend`].
    fn attend(&mut self, a: &Attention<'_>, out: &mut [f32]) {
        let (shape, threads) = (a.shape, self.pool.threads());
        let group = a.heads / shape.kv_heads;
        let tokens = out.len() / (a.heads * shape.value_dim);
        let max_chunks = (0..tokens).map(|t| a.chunks(t).len()).max();
        if threads > 1
            && tokens * shape.kv_heads < 4 * threads
            && group <= ROWS
            && max_chunks >= Some(SPLIT_CHUNKS)
        {
            for (t, out) in out.chunks_exact_mut(a.heads * shape.value_dim).enumerate() {
                self.attend_split(a, t, out);
            }
            return;
        }
        // A task is some tokens with all heads if every thread gets several such tasks, else a token's heads
        // of one KV head.
        let (heads, grain) = if tokens >= 4 * threads {
            (a.heads, (tokens / (4 * threads)).min((ROWS / group).max(1)))
        } else {
            (group, 1)
        };
        let cols = heads * shape.value_dim;
        self.pool.rows(out, cols, grain, &|first, out| {
            let (token, head) = (first * heads / a.heads, first * heads % a.heads);
            let spans = &a.step.span[token..token + out.len() / cols];
            let mut done = 0;
            for span in spans.chunk_by(|a, b| a == b) {
                for h in (head..head + heads).step_by(group) {
                    let out = &mut out[done * cols + (h - head) * shape.value_dim..];
                    let attend = Attend {
                        out_stride: cols,
                        tokens: span.len(),
                        ..attend(a, token + done, h / group, out)
                    };
                    self.isa.run(attend);
                }
                done += span.len();
            }
        });
    }

    /// [`Op::BlockMatMul`]: all rows of a block meet its matrix at once.
    fn block_products(&mut self, x: &HostTensor<'_>, weight: &HostTensor<'_>, out: &mut HostTensor<'_>) {
        let (blocks, cols, outputs, rows) = (weight.experts, weight.cols, weight.rows, x.rows);
        let (isa, pool) = (self.isa, self.pool.clone());
        let KernelMemory { q8_0, q8_k, input, output, .. } = &mut self.memory;
        let (input, output) = (&mut input[..rows * x.cols], &mut output[..rows * out.cols]);
        for (i, x) in x.floats().chunks_exact(cols).enumerate() {
            input[(i % blocks * rows + i / blocks) * cols..][..cols].copy_from_slice(x);
        }
        let stacked = weight.stacked();
        let product = |block: usize| Product::of_expert(stacked, None, outputs, block);
        let input = Input::new(isa, &pool, (q8_0, q8_k), input, &[product(0)]);
        let mut ends = [0; rows::MAX_EXPERTS];
        let ends = &mut ends[..blocks];
        ends.iter_mut().enumerate().for_each(|(block, end)| *end = (block + 1) * rows);
        let panel = PanelMut::new(&mut *output, outputs);
        pool.blocks([panel], ends, grain(rows, cols), &|block, first, [mut out]| {
            input.product(isa, &product(block), block * rows, first, &mut out);
        });
        for (i, out) in out.floats_mut().chunks_exact_mut(outputs).enumerate() {
            out.copy_from_slice(&output[(i % blocks * rows + i / blocks) * outputs..][..outputs]);
        }
    }

    /// [`Op::Experts`].
    fn experts(&mut self, op: &mut HostOp<'_>) -> Result<()> {
        let Op::Experts { x, ids, weights, gate, up: up_weight, down, biases, out, act } = op else {
            return Ok(());
        };
        let matrices = [&*gate, up_weight, down];
        let stream = matrices.iter().find_map(|weight| weight.streamed()?.stream());
        let (cols, hidden, used) = (gate.cols, gate.rows, ids.cols);
        let (x, ids, weights, out) = (x.floats(), ids.ints(), weights.floats(), out.floats_mut());
        let weights_of = matrices.map(|weight| (weight.stacked(), weight.rows));
        let biases_of = |which: usize| biases.as_ref().map(|b| b[which].floats());
        let biases_of = [biases_of(0), biases_of(1), biases_of(2)];
        let (experts, act) = (gate.experts, *act);
        let (isa, pool) = (self.isa, self.pool.clone());
        let KernelMemory { q8_0, q8_k, places, input, up, activated, output, .. } = &mut self.memory;
        let start = |ends: &[usize], band: usize| band.checked_sub(1).map_or(0, |before| ends[before]);
        // Pairs of token and rank are put in order of their experts, so that an expert's weights meet all their
        // tokens at once.
        let (mut used_experts, mut ends) = ([0; rows::MAX_EXPERTS], [0; rows::MAX_EXPERTS]);
        let (mut bands, mut pairs) = (0, 0);
        for e in 0..experts {
            for (i, _) in ids.iter().enumerate().filter(|&(_, &id)| id as usize == e) {
                input[pairs * cols..][..cols].copy_from_slice(&x[i / used * cols..][..cols]);
                places[i] = pairs as u32;
                pairs += 1;
            }
            if start(&ends, bands) < pairs {
                (used_experts[bands], ends[bands]) = (e, pairs);
                bands += 1;
            }
        }
        let ends = &ends[..bands];
        let product = |which: usize, band: usize| {
            let (weight, rows) = weights_of[which];
            Product::of_expert(weight, biases_of[which], rows, used_experts[band])
        };
        // A band has the same number of columns as any other, but not of tokens.
        let grain = |k: usize| grain(pairs / bands.max(1), k);
        let bands = 0..bands;
        let of_band = |band: usize| start(ends, band)..ends[band];
        // What the chosen experts read, in the order of use.
        let order = |which: Range<usize>, band: usize| {
            let shapes = [which.start, which.end - 1].map(|which| row_shape(matrices[which]));
            let expert = used_experts[band];
            let chunk_bytes = stream.map_or(0, |stream| stream.chunk_bytes());
            row_chunks(shapes, which.len(), which.len() == 2, chunk_bytes).map(move |(i, rows)| {
                let (which, height) = (which.start + i, shapes[i].0);
                (which, rows.clone(), expert * height + rows.start..expert * height + rows.end)
            })
        };
        if let Some(stream) = stream {
            let all = [GATE_UP, DOWN].into_iter();
            for (which, band) in all.flat_map(|which| bands.clone().map(move |band| (which.clone(), band))) {
                for (which, _, rows) in order(which, band) {
                    let Some(region) = matrices[which].streamed() else { continue };
                    let bytes = row_shape(matrices[which]).1;
                    let outside = || Error::Program("a streamed weight is shorter than its shape".into());
                    let chunk = region.part(rows.start * bytes..rows.end * bytes).ok_or_else(outside)?;
                    stream.request(&chunk, true);
                }
            }
        }
        {
            let list = [product(0, 0), product(1, 0)];
            let input = Input::new(isa, &pool, (&mut *q8_0, &mut *q8_k), &input[..pairs * cols], &list);
            if stream.is_some() {
                for band in bands.clone() {
                    let (tokens, mut gate) = (of_band(band), None);
                    for (which, rows, stacked) in order(GATE_UP, band) {
                        let chunk = LoadedRows::next(matrices[which], stacked)?;
                        if which == GATE_UP.start {
                            gate = Some(chunk);
                            continue;
                        }
                        let Some(gate) = &gate else { continue };
                        let both = [(0, gate), (1, &chunk)]
                            .map(|(which, chunk)| product(which, band).chunk(&rows, chunk));
                        let span = tokens.start * hidden..tokens.end * hidden;
                        let mut panels = [&mut *activated, &mut *up]
                            .map(|out| PanelMut::new(&mut out[span.clone()], hidden));
                        let panels = panels.each_mut().map(|panel| panel.columns(rows.clone()));
                        pool.blocks(panels, &[tokens.len()], grain(cols), &|_, first, blocks| {
                            glu(isa, &input, both, act, tokens.start, first, blocks);
                        });
                    }
                }
            } else {
                let panels =
                    [&mut *activated, up].map(|out| PanelMut::new(&mut out[..pairs * hidden], hidden));
                pool.blocks(panels, ends, grain(cols), &|band, first, blocks| {
                    let both = [product(0, band), product(1, band)];
                    glu(isa, &input, both, act, start(ends, band), first, blocks);
                });
            }
        }
        let list = [product(2, 0)];
        let input = Input::new(isa, &pool, (q8_0, q8_k), &activated[..pairs * hidden], &list);
        if stream.is_some() {
            for band in bands {
                let tokens = of_band(band);
                for (which, rows, stacked) in order(DOWN, band) {
                    let chunk = LoadedRows::next(matrices[which], stacked)?;
                    let product = product(which, band).chunk(&rows, &chunk);
                    let mut panel = PanelMut::new(&mut output[tokens.start * cols..tokens.end * cols], cols);
                    let panel = panel.columns(rows);
                    pool.blocks([panel], &[tokens.len()], grain(hidden), &|_, first, [mut out]| {
                        input.product(isa, &product, tokens.start, first, &mut out);
                    });
                }
            }
        } else {
            let panel = PanelMut::new(&mut output[..pairs * cols], cols);
            pool.blocks([panel], ends, grain(hidden), &|band, first, [mut out]| {
                input.product(isa, &product(2, band), start(ends, band), first, &mut out);
            });
        }
        for (t, out) in out.chunks_exact_mut(cols).enumerate() {
            out.fill(0.0);
            for i in t * used..(t + 1) * used {
                let x = &output[places[i] as usize * cols..][..cols];
                isa.run(rows::AddScaled { weight: weights[i], x, acc: out });
            }
        }
        Ok(())
    }
}

/// The weights of experts that are multiplied together, as indices.
const GATE_UP: Range<usize> = 0..2;
/// The last weight of experts.
const DOWN: Range<usize> = 2..3;
/// Rows that are interleaved.
const ROWS_TOGETHER: usize = halite_kernels::formats::ROWS;

/// A rotation that threads can share.
fn slices<'a>(rotation: &'a Rotation<HostTensor<'_>>) -> Rotation<&'a [f32]> {
    rotation.with_factors(rotation.factors.as_ref().map(HostTensor::floats))
}

/// The kernel that rotates one token's heads.
fn rope<'a>(
    x: &'a [f32],
    rotation: &'a Rotation<&[f32]>,
    position: u32,
    out: &'a mut [f32],
) -> rows::Rope<'a> {
    rows::Rope {
        x,
        out,
        head_dim: rotation.head_dim as usize,
        position,
        frequencies: &rotation.frequencies,
        factors: rotation.factors,
        magnitude: rotation.magnitude,
        adjacent: rotation.pairs == RopePairs::Adjacent,
    }
}

/// Channels of a convolution that a task computes at least; they divide those of most models.
const CONV_CHANNELS: usize = 16;

/// The state in page `to`, after what page `from` holds has been brought there.
fn entered<'a>(states: &'a mut PanelMut<'_>, from: Option<u32>, to: u32) -> &'a mut [f32] {
    let to = to as usize;
    match from {
        Some(from) => states.copy_row(from as usize, to),
        None => states.row(to).fill(0.0),
    }
    states.row(to)
}

/// Stores values, and the keys that `keys` passes on for each token, in the cache.
fn kv_write(
    state: &mut HostState<'_>,
    step: &HostStep<'_>,
    v: &[f32],
    mut keys: impl FnMut(usize, usize, &mut dyn FnMut(&[f32])),
) {
    let (shape, group) = (state.shape, state.group);
    let mut pages = state.pages_mut();
    let cols = shape.kv_heads * shape.key_only();
    for (t, v) in v.chunks_exact(shape.kv_heads * shape.value_dim).enumerate() {
        let (table, position) = step.place(t, group);
        let (chunk, slot) = (position / PAGE_POSITIONS, position % PAGE_POSITIONS);
        let page = table.get(chunk as usize).map_or(usize::MAX, |&p| p as usize);
        keys(t, cols, &mut |k| {
            attention::write(&mut pages, shape, page, slot as usize, k, v);
        });
    }
}

impl Kernels for CpuKernels {
    fn begin(&mut self, _: &Bindings<'_>) {
        self.began = self.meter.as_ref().and_then(|meter| meter.begin());
    }

    fn end(&mut self, elapsed: Duration) -> Timing {
        let energy = self.meter.as_ref().and_then(|meter| meter.end(self.began.take()));
        Timing::new(elapsed, Clock::Host).energy(energy)
    }

    fn run(&mut self, op: &mut HostOp<'_>, step: &HostStep<'_>) -> Result<()> {
        match op {
            Op::Embed { table, index, out, scale } => {
                let rows = step.rows(*index, table.rows)?;
                if table.streamed().is_some() {
                    return self.embed_streamed(table, rows, *scale, out.floats_mut());
                }
                self.embed(table.matrix(), rows, *scale, out.floats_mut());
            }
            Op::Gather { x, out } => {
                let (cols, x) = (x.cols, x.floats());
                for (out, &row) in out.floats_mut().chunks_exact_mut(cols).zip(step.step.outputs) {
                    out.copy_from_slice(&x[row as usize * cols..][..cols]);
                }
            }
            Op::Norm { x, add, sum, weight, bias, out, kind, eps, group } => {
                let (cols, group, centred) = (x.cols, *group as usize, *kind == NormKind::Layer);
                let x = match (add, sum) {
                    (Some(add), Some(sum)) => {
                        self.add(x.floats(), add.floats(), sum.floats_mut());
                        sum.floats()
                    }
                    _ => x.floats(),
                };
                let weight = weight.as_ref().map(|w| w.floats());
                let bias = bias.as_ref().map(|b| b.floats());
                let eps = *eps;
                self.rows(out.floats_mut(), cols, &|first, out| {
                    let x = &x[first * cols..][..out.len()];
                    for (x, out) in x.chunks_exact(group).zip(out.chunks_exact_mut(group)) {
                        self.isa.run(rows::Norm { x, weight, bias, eps, centred, out });
                    }
                });
            }
            Op::MatMul { x, parts, epilogue, outs } => {
                let mut list = [Product { weight: Matrix::EMPTY, bias: None }; MAX_PARTS];
                for (product, part) in list.iter_mut().zip(&*parts) {
                    *product = Product::new(&part.weight, part.bias.as_ref());
                }
                let list = &list[..parts.len()];
                let epilogue = match epilogue {
                    Epilogue::None => Epilogue::None,
                    Epilogue::Glu(act) => Epilogue::Glu(*act),
                    Epilogue::Add(residual) => {
                        Epilogue::Add(Residual { x: residual.floats(), width: residual.cols, first: 0 })
                    }
                };
                let count = outs.len();
                let mut panels: [PanelMut<'_>; MAX_PARTS] =
                    std::array::from_fn(|_| PanelMut::new(&mut [], 1));
                for (panel, out) in panels.iter_mut().zip(outs) {
                    let cols = out.cols;
                    *panel = PanelMut::new(out.floats_mut(), cols);
                }
                let memory = (&mut self.memory.q8_0, &mut self.memory.q8_k);
                let input = Input::new(self.isa, &self.pool, memory, x.floats(), list);
                let up = &mut self.memory.up;
                if parts.iter().any(|part| part.weight.streamed().is_some()) {
                    let panels = &mut panels[..count];
                    return streamed_products(self.isa, &self.pool, &input, parts, epilogue, panels, up);
                }
                products(self.isa, &self.pool, &input, list, epilogue, &mut panels[..count], up);
            }
            Op::Rope { x, out, rotation } => self.rope(x, &slices(rotation), step, out),
            Op::KvWrite { k, v, state } => {
                let (k, v) = (k.floats(), v.floats());
                kv_write(state, step, v, |t, cols, write| write(&k[t * cols..][..cols]));
            }
            Op::RopeKv { q, k, v, out, state, rotation } => {
                let rotation = slices(rotation);
                self.rope(q, &rotation, step, out);
                let (k, isa, rotated) = (k.floats(), self.isa, &mut self.memory.rotated);
                let cols = state.shape.kv_heads * state.shape.key_dim;
                if rotated.len() < cols {
                    *rotated = Zeroed::new(&System, cols as u64, "rotated keys on `cpu`")?;
                }
                kv_write(state, step, v.floats(), |t, cols, write| {
                    let rotated = &mut rotated[..cols];
                    isa.run(rope(&k[t * cols..][..cols], &rotation, step.positions[t], rotated));
                    write(rotated);
                });
            }
            Op::Attend { .. } => {
                if let Some((a, out)) = op.attention(step) {
                    self.attend(&a, out);
                }
            }
            Op::Conv { x, weight, bias, state, out } => {
                let (taps, width, group) = (weight.cols, x.cols, state.group);
                let (x, weight, bias) = (x.floats(), weight.floats(), bias.as_ref().map(|b| b.floats()));
                let (isa, out) = (self.isa, PanelMut::new(out.floats_mut(), width));
                let widths = [CONV_CHANNELS * (taps - 1), CONV_CHANNELS];
                self.pool.columns([state.rows_mut(), out], widths, &|run, [mut states, mut out]| {
                    step.stretches(group, |Stretch { from, to, tokens }| {
                        let first = run * CONV_CHANNELS;
                        let state = entered(&mut states, from, to);
                        let x = &x[tokens.start * width..];
                        let out = out.reborrow();
                        isa.run(recurrent::Conv { x, width, first, weight, bias, taps, state, tokens, out });
                    });
                });
            }
            Op::Recur { q, k, v, decay, a, rule, state, out } => {
                let PageShape { kv_heads: heads, key_dim, value_dim, .. } = state.shape;
                let (key_width, group, cols) = (k.cols, state.group, out.cols);
                let (rates, factors) = (decay.cols / heads, a.cols / heads);
                let [q, k, v, decay, a] = [q, k, v, decay, a].map(|x| x.floats());
                // A rule that threads can share.
                let rule = match rule {
                    Rule::Delta { beta, scale, neighbours } => {
                        Rule::Delta { beta: beta.floats(), scale: *scale, neighbours: *neighbours }
                    }
                    Rule::Scan { d } => Rule::Scan { d: d.floats() },
                };
                let (isa, out) = (self.isa, PanelMut::new(out.floats_mut(), cols));
                let size = key_dim * value_dim;
                self.pool.columns(
                    [state.rows_mut(), out],
                    [size, value_dim],
                    &|first, [mut states, mut out]| {
                        step.stretches(group, |Stretch { from, to, tokens }| {
                            let states = entered(&mut states, from, to);
                            // One value a head, and one key: vector lanes are heads.
                            if let (Rule::Scan { d }, 1, true) = (rule, value_dim, key_width == key_dim) {
                                let (state, out) = (states, out.reborrow());
                                isa.run(recurrent::Channels {
                                    q,
                                    k,
                                    key_dim,
                                    v,
                                    decay,
                                    a,
                                    factors,
                                    d,
                                    heads,
                                    first,
                                    state,
                                    tokens,
                                    out,
                                });
                                return;
                            }
                            for (i, state) in states.chunks_exact_mut(size).enumerate() {
                                let head = first + i;
                                let key = rule.key_head(head, heads, key_width / key_dim) * key_dim;
                                let rule = match rule {
                                    Rule::Delta { beta, scale, .. } => recurrent::Rule::Delta { beta, scale },
                                    Rule::Scan { d } => recurrent::Rule::Scan { d: d[head] },
                                };
                                let (a, tokens) = (&a[head * factors..][..factors], tokens.clone());
                                let out = out.columns(i * value_dim..(i + 1) * value_dim);
                                isa.run(recurrent::Recur {
                                    q,
                                    k,
                                    key_width,
                                    key,
                                    key_dim,
                                    v,
                                    decay,
                                    rates,
                                    a,
                                    rule,
                                    heads,
                                    head,
                                    state,
                                    tokens,
                                    out,
                                });
                            }
                        });
                    },
                );
            }
            Op::Spread { x, out, kind, eps, group } => {
                let (x, centred, eps) = (x.floats(), *kind == NormKind::Layer, *eps);
                let group = *group as usize;
                self.rows(out.floats_mut(), 1, &|first, out| {
                    let x = x[first * group..].chunks_exact(group);
                    for (x, out) in x.zip(out) {
                        *out = self.isa.run(rows::Spread { x, eps, centred });
                    }
                });
            }
            Op::Mix { x, factors, out, parts } => {
                let (parts, cols, out_cols) = (*parts as usize, x.cols, out.cols);
                let (len, factor_cols) = (cols / parts, factors.cols);
                let (x, factors) = (x.floats(), factors.floats());
                self.rows(out.floats_mut(), out_cols, &|first, out| {
                    for (row, out) in (first..).zip(out.chunks_exact_mut(out_cols)) {
                        let factors = factors[row * factor_cols..].chunks_exact(parts);
                        for (acc, factors) in out.chunks_exact_mut(len).zip(factors) {
                            acc.fill(0.0);
                            let parts = x[row * cols..].chunks_exact(len);
                            for (x, &weight) in parts.zip(factors) {
                                self.isa.run(rows::AddScaled { weight, x, acc });
                            }
                        }
                    }
                });
            }
            Op::Slice { x, out, group, first } => {
                let (cols, out_cols, group, start) = (x.cols, out.cols, *group as usize, *first as usize);
                let (x, len) = (x.floats(), out_cols / (cols / group));
                self.rows(out.floats_mut(), out_cols, &|first, out| {
                    let groups = x[first * cols..].chunks_exact(group);
                    for (out, x) in out.chunks_exact_mut(len).zip(groups) {
                        out.copy_from_slice(&x[start..start + len]);
                    }
                });
            }
            Op::Join { a, b, out, group, first } => {
                let (a_cols, b_cols, cols) = (a.cols, b.cols, out.cols);
                let (group, start) = (*group as usize, *first as usize);
                let (a, b) = (a.floats(), b.floats());
                self.rows(out.floats_mut(), cols, &|first, out| {
                    for (i, out) in out.chunks_exact_mut(cols).enumerate() {
                        let row = first + i;
                        let a = a[row * a_cols..][..a_cols].chunks_exact(start);
                        let b = b[row * b_cols..][..b_cols].chunks_exact(group - start).cycle();
                        for (out, (a, b)) in out.chunks_exact_mut(group).zip(a.zip(b)) {
                            let (first, last) = out.split_at_mut(start);
                            first.copy_from_slice(a);
                            last.copy_from_slice(b);
                        }
                    }
                });
            }
            Op::BlockMatMul { x, weight, out } => self.block_products(x, weight, out),
            Op::Mul { x, weight, out } => {
                let (x, weight) = (x.floats(), weight.floats());
                if let [factor] = *weight {
                    let f = Unary::Scale(factor);
                    self.rows(out.floats_mut(), 1, &|first, out| {
                        self.isa.run(rows::Elementwise { f, x: &x[first..first + out.len()], out });
                    });
                } else {
                    let n = weight.len();
                    self.rows(out.floats_mut(), n, &|first, out| {
                        for (x, out) in x[first * n..].chunks_exact(n).zip(out.chunks_exact_mut(n)) {
                            self.isa.run(rows::Glu { f: Gate::Identity, gate: weight, up: x, out });
                        }
                    });
                }
            }
            Op::Glu { gate, up, out, act } => {
                let (f, gate, up) = (*act, gate.floats(), up.floats());
                self.rows(out.floats_mut(), 1, &|first, out| {
                    let range = first..first + out.len();
                    self.isa.run(rows::Glu { f, gate: &gate[range.clone()], up: &up[range], out });
                });
            }
            Op::Add { a, b, out } => self.add(a.floats(), b.floats(), out.floats_mut()),
            Op::Unary { x, out, f } => {
                let (f, x) = (*f, x.floats());
                self.rows(out.floats_mut(), 1, &|first, out| {
                    self.isa.run(rows::Elementwise { f, x: &x[first..first + out.len()], out });
                });
            }
            Op::Route { logits, bias, groups, ids, weights, gating, normalise, scale, scales } => {
                let (experts, used) = (logits.cols, ids.cols);
                let (mut p, mut choice) = ([0.0f32; rows::MAX_EXPERTS], [0.0f32; rows::MAX_EXPERTS]);
                let bias = bias.as_ref().map(|bias| bias.floats());
                let out = ids.ints_mut().chunks_exact_mut(used);
                let out = out.zip(weights.floats_mut().chunks_exact_mut(used));
                for (logits, (ids, weights)) in logits.floats().chunks_exact(experts).zip(out) {
                    let p = &mut p[..experts];
                    p.copy_from_slice(logits);
                    match gating {
                        Gating::Softmax => self.isa.run(rows::Softmax { x: p }),
                        Gating::Sigmoid => self.isa.run(rows::Sigmoid { x: p }),
                        Gating::SoftmaxOfTop => {}
                    }
                    let choice = &mut choice[..experts];
                    choice.copy_from_slice(p);
                    if let Some(bias) = bias {
                        choice.iter_mut().zip(bias).for_each(|(choice, bias)| *choice += bias);
                    }
                    if let Some(Groups { count, used }) = *groups {
                        rows::keep_groups(choice, count as usize, used as usize);
                    }
                    rows::top_k(choice, ids);
                    for (weight, &id) in weights.iter_mut().zip(&*ids) {
                        *weight = p[id as usize];
                    }
                    if *gating == Gating::SoftmaxOfTop {
                        self.isa.run(rows::Softmax { x: weights });
                    }
                    if *normalise {
                        let sum: f32 = weights.iter().sum();
                        weights.iter_mut().for_each(|w| *w /= sum);
                    }
                    if *scale != 1.0 {
                        weights.iter_mut().for_each(|w| *w *= *scale);
                    }
                    if let Some(scales) = scales {
                        weights.iter_mut().zip(&*ids).for_each(|(w, &id)| *w *= scales.floats()[id as usize]);
                    }
                }
            }
            Op::Experts { .. } => self.experts(op)?,
            Op::ArgMax { x, out } => {
                for (x, out) in x.floats().chunks_exact(x.cols).zip(out.ints_mut()) {
                    *out = self.isa.run(rows::ArgMax { x }).map_or(NOT_FINITE, |at| at as i32);
                }
            }
            Op::TopK { x, ids, values } => {
                let k = ids.cols;
                let rows = ids.ints_mut().chunks_exact_mut(k).zip(values.floats_mut().chunks_exact_mut(k));
                for (x, (ids, values)) in x.floats().chunks_exact(x.cols).zip(rows) {
                    rows::largest(x, ids, values);
                }
            }
        }
        Ok(())
    }
}
