//! Custom accelerators, simulated from their profiles: ops are lowered to commands for the chip's tiles (`lower`), which are
//! run for their results through scratchpads of the chip's size (`execute`) and for their time as events (`engine`).
//!
//! In [`Numerics::Exact`] results are the bits of the numeric contract; in [`Numerics::Native`] products are computed in the
//! formats of the chip.

mod chip;
mod engine;
mod execute;
mod lower;
pub mod matrix;
mod native;
mod shape;
pub mod step;
mod tile;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use halite_kernels::activation::{Activation, PADDING, Quantise, Quantised, QuantisedMut, SUMS, padded};
use halite_kernels::attention::{Attend as AttendPage, AttendChunks, Merge, PageShape, Pages, PagesMut};
use halite_kernels::formats::Layout;
use halite_kernels::isa::Cpu as Isa;
use halite_kernels::matmul::{MatMul, X, matmul};
use halite_kernels::panel::PanelMut;
use halite_kernels::rows::{self, Gate, Unary};

use super::cpu::CpuKernels;
use super::host::{
    self, After, AttendArgs, ExpertsArgs, HostPlan, Kernels, KvArgs, Matrix, NormArgs, Product, RopeArgs,
    RouteArgs, memory,
};
use super::{
    Backend, Buffer, Caps, Contract, Fusions, Gap, Limits, OpSig, Plan, Rows, Step as ProgramStep, Support,
    Usage, check_support,
};
use crate::error::{Error, Result};
use crate::map::Region;
use crate::numerics::Dtype;
use crate::profile::Profile;
use crate::program::{Op, PAGE_POSITIONS, Program};
use execute::{Function, Operands};
use shape::Shape;
use tile::{Form, Lowered, Step};

pub use chip::{Chip, Numerics};
pub use engine::{Bound, Busy, OpTime};
pub use execute::Order;
pub use tile::Queue;

/// How to simulate a chip.
#[derive(Debug, Clone, Default)]
pub struct SimOptions {
    /// What results are computed in.
    pub numerics: Numerics,
    /// The format of products, one of the profile's; otherwise the nearest to each weight's.
    pub products: Option<Dtype>,
    /// In which order queues take turns where nothing says.
    pub order: Order,
}

/// A simulated accelerator.
#[derive(Debug)]
pub struct Sim {
    caps: Caps,
    chip: Arc<Chip>,
    order: Order,
    isa: Isa,
    report: Arc<Mutex<Report>>,
}

/// What a simulated chip did, op by op.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// By op: how often, and what all of them took.
    pub ops: Vec<OpReport>,
}

/// What became of the ops of one name.
#[derive(Debug, Clone)]
pub struct OpReport {
    /// The op, and what of it distinguishes it.
    pub name: String,
    /// How often it ran.
    pub count: u64,
    /// What all of them took.
    pub time: OpTime,
}

impl Report {
    /// What everything took.
    pub fn total(&self) -> OpTime {
        let start = OpTime { joules: Some(0.0), ..OpTime::default() };
        self.ops.iter().fold(start, |sum, op| sum.then(op.time))
    }

    /// Adds an op.
    pub fn add(&mut self, name: &str, time: OpTime) {
        match self.ops.iter_mut().find(|op| op.name == name) {
            Some(op) => {
                op.count += 1;
                op.time = op.time.then(time);
            }
            None => self.ops.push(OpReport { name: name.into(), count: 1, time }),
        }
    }
}

impl Sim {
    /// The chip of a profile.
    ///
    /// # Errors
    /// [`Error::Argument`] if the profile cannot be simulated so.
    pub fn new(profile: Profile, options: &SimOptions) -> Result<Sim> {
        let chip = Chip::new(profile, options.numerics, options.products)?;
        if options.numerics == Numerics::Native {
            chip.check_native()?;
        }
        let exact = options.numerics == Numerics::Exact;
        let caps = Caps {
            name: format!("sim:{}", chip.profile.name),
            device: format!(
                "{} tiles of {} KiB, simulated, {} numerics",
                chip.tiles,
                chip.scratch_bytes / 1024,
                if exact { "exact" } else { "native" }
            ),
            memory_bytes: chip.device().capacity_bytes.value as u64,
            rows: Rows::Plain,
            fusions: Fusions::ALL,
            contract: if exact { Contract::Exact } else { Contract::Rounded },
        };
        let report = Arc::default();
        Ok(Sim { caps, chip: Arc::new(chip), order: options.order, isa: Isa::detect(), report })
    }

    /// What was done since it was last asked.
    pub fn take_report(&self) -> Report {
        std::mem::take(&mut *self.report.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The chip.
    pub fn chip(&self) -> &Chip {
        &self.chip
    }
}

impl Backend for Sim {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    /// Every op of which the smallest part fits the scratchpad.
    fn supports(&self, sig: &OpSig<'_>) -> Support {
        let cancel = super::Cancel::default();
        let pages = [0];
        let spans = [super::Span { pages: &pages, start: 0, len: 1 }];
        let step = ProgramStep { spans: &spans, tokens: &[0], outputs: &[0], cancel: &cancel };
        let lowered =
            shape::shape(sig.program, sig.op, &step, None).and_then(|s| lower::lower(&self.chip, &s));
        match lowered {
            Ok(_) => Support::Native,
            Err(error) => Support::Unsupported(Gap::NotYet(error.to_string())),
        }
    }

    fn alloc(&self, bytes: u64, _: Usage) -> Result<Buffer> {
        memory::alloc(&self.caps.name, bytes, self.caps.memory_bytes)
    }

    fn import(&self, region: &Region) -> Result<Option<Buffer>> {
        Ok(Some(memory::import(region)))
    }

    fn fill(&self, dst: &Buffer, range: Range<u64>, write: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        memory::fill(&self.caps.name, dst, range, write)
    }

    fn read(&self, src: &Buffer, offset: u64, dst: &mut [u8]) -> Result<()> {
        memory::read(&self.caps.name, src, offset, dst)
    }

    fn prepare(&self, program: &Arc<Program>, limits: Limits) -> Result<Box<dyn Plan>> {
        program.validate()?;
        check_support(self, program)?;
        let kernels = SimKernels {
            machine: Machine {
                isa: self.isa,
                chip: self.chip.clone(),
                decoded: native::Decoded::default(),
                unpacked: HashMap::new(),
            },
            rows: CpuKernels::of_rows(self.isa)?,
            order: self.order,
            memory: execute::Memory::default(),
            lowered: HashMap::new(),
            op: None,
            name: String::new(),
            report: self.report.clone(),
            seconds: 0.0,
            error: None,
        };
        Ok(Box::new(HostPlan::new(&self.caps.name, program, limits, kernels)?))
    }

    fn scratch_bytes(&self, program: &Program, limits: Limits) -> u64 {
        host::scratch_bytes(program, limits)
    }
}

/// What computes steps of products.
struct Machine {
    isa: Isa,
    chip: Arc<Chip>,
    decoded: native::Decoded,
    /// Weights of this op that were unpacked before: tiles that share columns unpack the same.
    unpacked: HashMap<Box<[u8]>, Box<[u8]>>,
}

/// [`Kernels`] that lower, run and time each op.
struct SimKernels {
    machine: Machine,
    /// What units are computed with.
    rows: CpuKernels,
    order: Order,
    memory: execute::Memory,
    /// Ops that were lowered and timed before.
    lowered: HashMap<Shape, (Arc<Lowered>, OpTime)>,
    /// The op under way.
    op: Option<Shape>,
    name: String,
    report: Arc<Mutex<Report>>,
    seconds: f64,
    error: Option<Error>,
}

/// Ops that are kept lowered.
const KEPT: usize = 256;

/// A [`Function`] from a closure.
struct With<F>(F);

impl<F: FnMut(&Step, &[&[u8]], &mut [&mut [u8]]) -> Result<()>> Function for With<F> {
    fn compute(&mut self, step: &Step, reads: &[&[u8]], writes: &mut [&mut [u8]]) -> Result<()> {
        (self.0)(step, reads, writes)
    }
}

fn floats(bytes: &[u8]) -> &[f32] {
    bytemuck::try_cast_slice(bytes).unwrap_or(&[])
}

fn floats_mut<'a>(writes: &'a mut [&mut [u8]], i: usize) -> &'a mut [f32] {
    writes.get_mut(i).and_then(|out| bytemuck::try_cast_slice_mut(out).ok()).unwrap_or(&mut [])
}

fn bytes_of(x: &[f32]) -> &[u8] {
    bytemuck::cast_slice(x)
}

/// An optional operand: nothing, where it is absent.
fn optional(x: Option<&[f32]>) -> &[u8] {
    x.map_or(&[], bytes_of)
}

fn unknown(step: &Step) -> Error {
    Error::Program(format!("a step that this op does not have: {step:?}"))
}

impl SimKernels {
    fn lower(&mut self, shape: &Shape) -> Result<(Arc<Lowered>, OpTime)> {
        if let Some(found) = self.lowered.get(shape) {
            return Ok(found.clone());
        }
        let lowered = Arc::new(lower::lower(&self.machine.chip, shape)?);
        let time = engine::time(&self.machine.chip, &lowered, None);
        if self.lowered.len() >= KEPT {
            self.lowered.clear();
        }
        self.lowered.insert(shape.clone(), (lowered.clone(), time));
        Ok((lowered, time))
    }

    /// Lowers, times and runs the op under way.
    fn run(
        &mut self,
        inputs: &[&[u8]],
        outputs: &mut [&mut [f32]],
        function: impl FnMut(&mut CpuKernels, &mut Machine, &Step, &[&[u8]], &mut [&mut [u8]]) -> Result<()>,
    ) {
        if let Err(error) = self.try_run(inputs, outputs, function) {
            self.error.get_or_insert(error);
        }
    }

    fn try_run(
        &mut self,
        inputs: &[&[u8]],
        outputs: &mut [&mut [f32]],
        mut function: impl FnMut(&mut CpuKernels, &mut Machine, &Step, &[&[u8]], &mut [&mut [u8]]) -> Result<()>,
    ) -> Result<()> {
        let Some(shape) = self.op.take() else { return Ok(()) };
        let (lowered, time) = self.lower(&shape)?;
        self.note(time);
        let mut outputs: Vec<&mut [u8]> =
            outputs.iter_mut().map(|out| bytemuck::cast_slice_mut(out)).collect();
        let mut operands = Operands { inputs, outputs: &mut outputs };
        let SimKernels { machine, rows, memory, order, .. } = self;
        let chip = machine.chip.clone();
        let mut with = With(|step: &Step, reads: &[&[u8]], writes: &mut [&mut [u8]]| {
            function(rows, machine, step, reads, writes)
        });
        execute::execute(&chip, &lowered, memory, &mut operands, *order, &mut with)
    }

    fn note(&mut self, time: OpTime) {
        self.seconds += time.seconds;
        self.report.lock().unwrap_or_else(PoisonError::into_inner).add(&self.name, time);
    }

    /// For ops of which each unit gives one row of floats: `f(kernels, first unit, rows read, row written)`.
    fn units(
        &mut self,
        inputs: &[&[u8]],
        outputs: &mut [&mut [f32]],
        mut f: impl FnMut(&mut CpuKernels, Range<usize>, &[&[f32]], &mut [f32]),
    ) {
        self.run(inputs, outputs, |kernels, machine, step, reads, writes| {
            let Step::Units { first, count, .. } = *step else { return Err(unknown(step)) };
            let reads: Vec<&[f32]> = reads.iter().map(|bytes| floats(bytes)).collect();
            let units = first as usize..(first + count) as usize;
            let out = floats_mut(writes, 0);
            f(kernels, units, &reads, out);
            machine.round(out);
            Ok(())
        });
    }
}

impl Machine {
    /// Rounds what a unit wrote to what the vector unit keeps.
    fn round(&self, x: &mut [f32]) {
        if self.chip.numerics == Numerics::Native {
            native::round(self.chip.vector_dtype(), self.chip.profile.rounding.elements, x);
        }
    }

    /// The steps of products: activations converted, weights unpacked, products, and what follows them.
    fn product(
        &mut self,
        step: &Step,
        reads: &[&[u8]],
        writes: &mut [&mut [u8]],
        epilogue: Epilogue,
    ) -> Result<()> {
        let rules = self.chip.profile.rounding.rules();
        match step {
            Step::Convert { k, to: Form::Quantised(activation), .. } => {
                let (k, x) = (*k as usize, floats(reads[0]));
                let out = quantised_mut(*activation, x.len() / k.max(1), k, writes[0]);
                self.isa.run(Quantise { to: *activation, k, x, out });
            }
            Step::Convert { k, to: Form::Chip(dtype), .. } => {
                native::encode(*dtype, rules, *k as usize, floats(reads[0]), writes[0])?;
            }
            Step::Unpack { k, rows, from, to: Form::Chip(dtype) } => {
                if let Some(found) = self.unpacked.get(reads[0]) {
                    writes[0].copy_from_slice(found);
                    return Ok(());
                }
                let mut values = vec![0.0; *k as usize * *rows as usize];
                from.dequantize(reads[0], &mut values).map_err(|e| Error::Program(e.to_string()))?;
                native::encode(*dtype, rules, *k as usize, &values, writes[0])?;
                self.unpacked.insert(reads[0].into(), (&*writes[0]).into());
            }
            Step::Product { rows, columns, k, x, w } => {
                let (k, rows) = (*k as usize, *rows as usize);
                let out = floats_mut(writes, 0);
                let (format, x) = match (w, x) {
                    (Form::Chip(w), Form::Chip(x)) => {
                        let (x, w) = ((*x, reads[0]), (*w, reads[1]));
                        return native::product(self.isa, &mut self.decoded, x, w, k, out);
                    }
                    (Form::File(w), Form::F32) => (*w, X::F32(floats(reads[0]))),
                    (Form::File(w), Form::Quantised(a)) => {
                        (*w, X::Quantised(quantised(*a, rows, k, reads[0])))
                    }
                    _ => return Err(unknown(step)),
                };
                let out = PanelMut::new(out, *columns as usize);
                matmul(self.isa, format, MatMul { w: reads[1], layout: Layout::Rows, k, x, out });
            }
            Step::Finish { columns, biases } => {
                let reads: Vec<&[f32]> = reads.iter().map(|bytes| floats(bytes)).collect();
                let (products, mut rest) = reads.split_at(biases.len());
                let mut products: Vec<Vec<f32>> = products.iter().map(|p| p.to_vec()).collect();
                for (product, _) in products.iter_mut().zip(biases).filter(|(_, has_bias)| **has_bias) {
                    let Some((bias, later)) = rest.split_first() else { return Err(unknown(step)) };
                    rest = later;
                    for row in product.chunks_exact_mut(*columns as usize) {
                        row.iter_mut().zip(*bias).for_each(|(y, b)| *y += b);
                    }
                }
                let out = floats_mut(writes, 0);
                match (epilogue, products.as_slice(), rest) {
                    (Epilogue::Nothing, [product], []) => out.copy_from_slice(product),
                    (Epilogue::Glu(f), [gate, up], []) => self.isa.run(rows::Glu { f, gate, up, out }),
                    (Epilogue::Add, [product], [residual]) => {
                        self.isa.run(rows::Add { a: residual, b: product, out });
                    }
                    _ => return Err(unknown(step)),
                }
                self.round(out);
            }
            _ => return Err(unknown(step)),
        }
        Ok(())
    }

    /// The steps of attention.
    fn attend(
        &mut self,
        a: &AttendArgs<'_>,
        step: &Step,
        reads: &[&[u8]],
        writes: &mut [&mut [u8]],
    ) -> Result<()> {
        // A page as it lies in the scratchpad has one head.
        let shape = PageShape { kv_heads: 1, ..a.shape };
        let found = shape.value_dim + 2;
        let out = floats_mut(writes, 0);
        match step {
            Step::Page { rows, chunk } => {
                let heads = rows.heads as usize;
                let mut q = floats(reads[0]).to_vec();
                self.round_products(&mut q);
                let page = reads[1];
                let pages = match a.pages {
                    Pages::F32(_) => Pages::F32(floats(page)),
                    Pages::F16(_) => Pages::F16(bytemuck::try_cast_slice(page).unwrap_or(&[])),
                    Pages::Q8_0(_) => Pages::Q8_0(bytemuck::cast_slice(page)),
                };
                let outs = out.chunks_exact_mut(heads * found).zip(q.chunks_exact(heads * shape.key_dim));
                for (i, (out, q)) in outs.enumerate() {
                    let position = rows.position + i as u32;
                    if !chunks(position, a.window).contains(chunk) {
                        continue;
                    }
                    let attend = AttendPage {
                        q,
                        q_stride: q.len(),
                        out_stride: out.len(),
                        out,
                        tokens: 1,
                        heads,
                        pages,
                        shape,
                        table: &[0],
                        kv_head: 0,
                        // Positions are counted from the start of the page.
                        position: (position - chunk * PAGE_POSITIONS) as usize,
                        window: a.window,
                        scale: a.scale,
                        softcap: a.softcap,
                        sinks: None,
                    };
                    self.isa.run(AttendChunks { attend, chunks: 0..1 });
                }
            }
            Step::Merge { rows, chunks: range, fresh, last } => {
                let reads: Vec<&[f32]> = reads.iter().map(|bytes| floats(bytes)).collect();
                let (new, rest) = reads.split_first().ok_or_else(|| unknown(step))?;
                let (state, rest) =
                    if *fresh { (None, rest) } else { (rest.first(), rest.get(1..).unwrap_or(&[])) };
                let heads = rows.heads as usize;
                let stride = if *last { shape.value_dim } else { found };
                for (row, out) in out.chunks_exact_mut(stride).enumerate() {
                    let position = rows.position + (row / heads) as u32;
                    let seen = chunks(position, a.window);
                    let old = state.map(|state| &state[row * found..][..found]);
                    let mut values = old.map_or(vec![0.0; found], <[f32]>::to_vec);
                    let (values, ends) = values.split_at_mut(shape.value_dim);
                    let [max, sum] = ends else { return Err(unknown(step)) };
                    // Of a run of chunks, rows are alone and see all of them; of one chunk, some may not see it.
                    let sees = seen.contains(&range.start);
                    let new = if range.len() == 1 { &new[row * found..][..found] } else { new };
                    self.isa.run(Merge {
                        chunks: if sees { new } else { &[] },
                        stride: found,
                        out: values,
                        max,
                        sum,
                        fresh: range.start <= seen.start,
                        last: *last,
                        sink: rest.first().map(|sinks| sinks[row % heads]),
                    });
                    out[..shape.value_dim].copy_from_slice(values);
                    if !last {
                        out[shape.value_dim..].copy_from_slice(&[*max, *sum]);
                    }
                }
                if *last {
                    self.round(out);
                }
            }
            _ => return Err(unknown(step)),
        }
        Ok(())
    }

    /// Rounds operands of attention to the format in which the chip multiplies them. Keys, values and what softmax makes of
    /// scores stay as they are.
    fn round_products(&self, x: &mut [f32]) {
        if self.chip.numerics == Numerics::Native {
            let (dtype, ..) = self.chip.formats(self.chip.attention_rate());
            native::round(dtype, self.chip.profile.rounding.elements, x);
        }
    }
}

/// What a product's last step does.
#[derive(Debug, Clone, Copy)]
enum Epilogue {
    Nothing,
    Glu(Gate),
    Add,
}

/// The chunks that a token at `position` sees.
fn chunks(position: u32, window: Option<u32>) -> Range<u32> {
    let chunks = halite_kernels::attention::chunks(position as usize, window);
    chunks.start as u32..chunks.end as u32
}

/// Quantised activations as they lie in a slot: codes, scales, sums.
fn quantised(to: Activation, rows: usize, k: usize, bytes: &[u8]) -> Quantised<'_> {
    let width = rows * padded(k);
    let (codes, rest) = bytes.split_at(width.min(bytes.len()));
    let (scales, sums) = rest.split_at((4 * width / to.block_len()).min(rest.len()));
    Quantised {
        k,
        codes: bytemuck::cast_slice(codes),
        scales: floats(scales),
        sums: bytemuck::try_cast_slice(sums).unwrap_or(&[]),
    }
}

/// The same, to write.
fn quantised_mut(to: Activation, rows: usize, k: usize, bytes: &mut [u8]) -> QuantisedMut<'_> {
    let width = rows * padded(k);
    let (codes, rest) = bytes.split_at_mut(width.min(bytes.len()));
    let (scales, sums) = rest.split_at_mut((4 * width / to.block_len()).min(rest.len()));
    let sums = &mut sums[..4 * width / PADDING * SUMS];
    QuantisedMut {
        codes: bytemuck::cast_slice_mut(codes),
        scales: bytemuck::try_cast_slice_mut(scales).unwrap_or(&mut []),
        sums: bytemuck::try_cast_slice_mut(sums).unwrap_or(&mut []),
    }
}

impl Kernels for SimKernels {
    fn begin(&mut self, program: &Program, op: &Op, step: &ProgramStep<'_>) -> Result<()> {
        self.name = name(program, op);
        self.machine.unpacked.clear();
        self.op = Some(shape::shape(program, op, step, None)?);
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        match self.error.take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn simulated(&mut self) -> Option<Duration> {
        Some(Duration::from_secs_f64(std::mem::take(&mut self.seconds)))
    }

    fn embed(&mut self, table: Matrix<'_>, _: &[u32], scale: f32, out: &mut [f32]) {
        self.run(&[table.bytes], &mut [out], |kernels, machine, _, reads, writes| {
            let out = floats_mut(writes, 0);
            let rows: Vec<u32> = (0..(out.len() / table.cols.max(1)) as u32).collect();
            let table = Matrix { bytes: reads[0], rows: rows.len(), ..table };
            kernels.embed(table, &rows, scale, out);
            machine.round(out);
            Ok(())
        });
    }

    fn select(&mut self, x: &[f32], _: &[u32], _: usize, out: &mut [f32]) {
        self.units(&[bytes_of(x)], &mut [out], |_, _, reads, out| out.copy_from_slice(reads[0]));
    }

    /// Its time is that of whole rows; pages are laid out as the host has them.
    fn kv_write(&mut self, args: &KvArgs<'_>, pages: &mut PagesMut<'_>) {
        if let Some(shape) = self.op.take() {
            match self.lower(&shape) {
                Ok((_, time)) => self.note(time),
                Err(error) => _ = self.error.get_or_insert(error),
            }
        }
        self.rows.kv_write(args, pages);
    }

    fn add(&mut self, a: &[f32], b: &[f32], out: &mut [f32]) {
        self.units(&[bytes_of(a), bytes_of(b)], &mut [out], |kernels, _, reads, out| {
            kernels.add(reads[0], reads[1], out);
        });
    }

    fn norm(&mut self, n: &NormArgs<'_>, out: &mut [f32], sum: Option<&mut [f32]>) {
        let inputs = [bytes_of(n.x), optional(n.add), optional(n.weight), optional(n.bias)];
        let mut outputs = vec![out];
        outputs.extend(sum);
        self.run(&inputs, &mut outputs, |kernels, machine, _, reads, writes| {
            let mut reads = reads.iter().map(|bytes| floats(bytes));
            let x = reads.next().unwrap_or(&[]);
            // In the order in which they are there.
            let mut next = |there: bool| if there { reads.next() } else { None };
            let add = next(n.add.is_some());
            let (weight, bias) = (next(n.weight.is_some()), next(n.bias.is_some()));
            let args = NormArgs { x, add, cols: n.group, weight, bias, ..*n };
            let (out, sum) = writes.split_at_mut(1);
            let sum = if sum.is_empty() { None } else { Some(floats_mut(sum, 0)) };
            kernels.norm(&args, floats_mut(out, 0), sum);
            for i in 0..writes.len() {
                machine.round(floats_mut(writes, i));
            }
            Ok(())
        });
    }

    fn matmul(&mut self, x: &[f32], products: &[Product<'_>], after: After<'_>, outs: &mut [&mut [f32]]) {
        let (epilogue, residual) = match after {
            After::Nothing => (Epilogue::Nothing, &[][..]),
            After::Glu(act) => (Epilogue::Glu(act), &[][..]),
            After::Add(residual) => (Epilogue::Add, residual),
        };
        let mut inputs = vec![bytes_of(x), bytes_of(residual)];
        for p in products {
            inputs.extend([p.weight.bytes, optional(p.bias)]);
        }
        self.run(&inputs, outs, |_, machine, step, reads, writes| {
            machine.product(step, reads, writes, epilogue)
        });
    }

    fn rope(&mut self, a: &RopeArgs<'_>, out: &mut [f32]) {
        let heads = a.cols / a.head_dim;
        self.units(&[bytes_of(a.x), optional(a.factors)], &mut [out], |kernels, units, reads, out| {
            let positions: Vec<u32> = units.map(|unit| a.positions[unit / heads]).collect();
            let factors = a.factors.and(reads.get(1)).copied();
            kernels
                .rope(&RopeArgs { x: reads[0], positions: &positions, cols: a.head_dim, factors, ..*a }, out);
        });
    }

    fn attend(&mut self, a: &AttendArgs<'_>, out: &mut [f32]) {
        let pages: &[u8] = match a.pages {
            Pages::F32(data) => bytemuck::cast_slice(data),
            Pages::F16(data) => bytemuck::cast_slice(data),
            Pages::Q8_0(data) => bytemuck::cast_slice(data),
        };
        let inputs = [bytes_of(a.q), pages, optional(a.sinks)];
        self.run(&inputs, &mut [out], |_, machine, step, reads, writes| {
            machine.attend(a, step, reads, writes)
        });
    }

    fn glu(&mut self, act: Gate, gate: &[f32], up: &[f32], out: &mut [f32]) {
        self.units(&[bytes_of(gate), bytes_of(up)], &mut [out], |kernels, _, reads, out| {
            kernels.glu(act, reads[0], reads[1], out);
        });
    }

    fn map(&mut self, f: Unary, x: &[f32], out: &mut [f32]) {
        self.units(&[bytes_of(x)], &mut [out], |kernels, _, reads, out| kernels.map(f, reads[0], out));
    }

    fn route(&mut self, a: &RouteArgs<'_>, ids: &mut [i32], weights: &mut [f32]) {
        let mut outputs = [bytemuck::cast_slice_mut(ids), weights];
        self.run(&[bytes_of(a.logits)], &mut outputs, |kernels, _, _, reads, writes| {
            let (ids, weights) = writes.split_at_mut(1);
            let ids = bytemuck::try_cast_slice_mut(&mut *ids[0]).unwrap_or(&mut []);
            kernels.route(&RouteArgs { logits: floats(reads[0]), ..*a }, ids, floats_mut(weights, 0));
            Ok(())
        });
    }

    fn experts(&mut self, a: &ExpertsArgs<'_>, out: &mut [f32]) {
        if let Some(Shape::Experts(shape)) = &mut self.op {
            shape.ids = a.ids.iter().map(|&id| id as u32).collect();
        }
        let biases = a.biases.unwrap_or([&[]; 3]).map(bytes_of);
        let [gate, up, down] = [a.gate, a.up, a.down].map(|m| m.bytes);
        let inputs = [bytes_of(a.x), gate, up, down, biases[0], biases[1], biases[2], bytes_of(a.weights)];
        let (cols, act, used) = (a.gate.cols, a.act, a.used);
        self.run(&inputs, &mut [out], |_, machine, step, reads, writes| {
            if !matches!(step, Step::Units { .. }) {
                // Only gates are finished in pairs.
                let gated = matches!(step, Step::Finish { biases, .. } if biases.len() == 2);
                let epilogue = if gated { Epilogue::Glu(act) } else { Epilogue::Nothing };
                return machine.product(step, reads, writes, epilogue);
            }
            let found = floats(reads[0]).chunks_exact(used * cols).zip(floats(reads[1]).chunks_exact(used));
            let out = floats_mut(writes, 0);
            for (acc, (found, weights)) in out.chunks_exact_mut(cols).zip(found) {
                acc.fill(0.0);
                for (x, &weight) in found.chunks_exact(cols).zip(weights) {
                    machine.isa.run(rows::AddScaled { weight, x, acc });
                }
            }
            machine.round(out);
            Ok(())
        });
    }

    fn top_k(&mut self, x: &[f32], cols: usize, k: usize, ids: &mut [i32], values: &mut [f32]) {
        let mut outputs = [bytemuck::cast_slice_mut(ids), values];
        self.run(&[bytes_of(x)], &mut outputs, |_, _, step, reads, writes| {
            let Step::Units { stage, first, count } = *step else { return Err(unknown(step)) };
            let x = floats(reads[0]);
            let row = x.len() / (count as usize).max(1);
            for (unit, x) in x.chunks_exact(row.max(1)).enumerate() {
                let before = (first as usize + unit) % (cols / row.max(1)).max(1) * row;
                // Lists are in the order of the runs that they are of, so ties stay in order.
                let (from, x): (Vec<f32>, Vec<f32>) = match stage {
                    0 => x.iter().enumerate().map(|(i, &x)| (f32::from_bits((before + i) as u32), x)).unzip(),
                    _ => x.as_chunks::<2>().0.iter().map(|&[id, x]| (id, x)).unzip(),
                };
                let (mut at, mut best) = (vec![0; k], vec![0.0; k]);
                rows::largest(&x, &mut at, &mut best);
                let ids = at.iter().map(|&at| from[at as usize]);
                if let [to_ids, to_values] = writes {
                    let run = unit * k..(unit + 1) * k;
                    let to = &mut bytemuck::try_cast_slice_mut(to_ids).unwrap_or(&mut [])[run.clone()];
                    to.iter_mut().zip(ids).for_each(|(to, id)| *to = id);
                    let to = &mut bytemuck::try_cast_slice_mut(to_values).unwrap_or(&mut [])[run];
                    to.copy_from_slice(&best);
                } else {
                    let to = &mut floats_mut(writes, 0)[2 * unit * k..][..2 * k];
                    for (to, (id, value)) in to.as_chunks_mut::<2>().0.iter_mut().zip(ids.zip(best)) {
                        *to = [id, value];
                    }
                }
            }
            Ok(())
        });
    }

    fn arg_max(&mut self, x: &[f32], cols: usize, out: &mut [i32]) {
        self.run(&[bytes_of(x)], &mut [bytemuck::cast_slice_mut(out)], |kernels, _, step, reads, writes| {
            let Step::Units { stage, first, count } = *step else { return Err(unknown(step)) };
            let (x, out) = (floats(reads[0]), floats_mut(writes, 0));
            let run = x.len() / (count as usize).max(1);
            for (unit, (x, out)) in
                x.chunks_exact(run).zip(out.chunks_exact_mut(2 - stage as usize)).enumerate()
            {
                if stage == 0 {
                    let mut at = [0];
                    kernels.arg_max(x, run, &mut at);
                    let value = x.get(at[0] as usize).copied().unwrap_or(f32::NAN);
                    let before = (first as usize + unit) % (cols / run) * run;
                    out.copy_from_slice(&[f32::from_bits(before as u32 + at[0] as u32), value]);
                } else {
                    let best = |best: (f32, f32), new: (f32, f32)| if new.1 > best.1 { new } else { best };
                    let pairs = x.as_chunks::<2>().0.iter().map(|&[id, value]| (id, value));
                    out[0] = pairs.fold((0.0, f32::NEG_INFINITY), best).0;
                }
            }
            Ok(())
        });
    }
}

/// An op for reports: its name, and for products the weight's, without the layer.
pub(crate) fn name(program: &Program, op: &Op) -> String {
    let weight = match op {
        Op::MatMul { parts, .. } => parts.first().map(|p| p.weight),
        Op::Experts { gate, .. } => Some(*gate),
        _ => None,
    };
    match weight {
        None => op.name().to_owned(),
        Some(weight) => {
            let name = &program.tensor(weight).name;
            let short = name.split('.').filter(|part| !part.bytes().all(|b| b.is_ascii_digit()));
            let short: Vec<_> = short.filter(|part| !matches!(*part, "blk" | "weight")).collect();
            format!("{} {}", op.name(), short.join("."))
        }
    }
}
