//! Ops as they come from a plan: each is lowered, timed and run.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use halite_kernels::attention::{Pages, PagesMut};
use halite_kernels::rows::{self, Gate, Unary};

use super::engine::{self, OpTime};
use super::execute::{self, Function, Operands, Order};
use super::machine::{Epilogue, Machine, floats, floats_mut, unknown};
use super::shape::{self, Shape};
use super::tile::{Lowered, Step};
use super::{Report, Sim, lower, name, native};
use halite::backend::Step as ProgramStep;
use halite::backend::cpu::CpuKernels;
use halite::backend::host::{
    After, AttendArgs, ExpertsArgs, Kernels, KvArgs, Matrix, NormArgs, Product, RopeArgs, RouteArgs,
};
use halite::error::{Error, Result};
use halite::program::{NOT_FINITE, Op, Program};

/// [`Kernels`] that lower, run and time each op.
pub struct SimKernels {
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

fn bytes_of(x: &[f32]) -> &[u8] {
    bytemuck::cast_slice(x)
}

/// An optional operand: nothing, where it is absent.
fn optional(x: Option<&[f32]>) -> &[u8] {
    x.map_or(&[], bytes_of)
}

impl SimKernels {
    pub fn new(sim: &Sim) -> Result<SimKernels> {
        let machine = Machine {
            isa: sim.isa,
            chip: sim.chip.clone(),
            decoded: native::Decoded::default(),
            unpacked: HashMap::new(),
        };
        Ok(SimKernels {
            machine,
            rows: CpuKernels::of_rows(sim.isa)?,
            order: sim.order,
            memory: execute::Memory::default(),
            lowered: HashMap::new(),
            op: None,
            name: String::new(),
            report: sim.report.clone(),
            seconds: 0.0,
            error: None,
        })
    }

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
            Pages::Q4_0(data) => data,
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
                    let value = match at[0] {
                        // Another run may have a number.
                        NOT_FINITE if x.iter().all(|&x| x == f32::NEG_INFINITY) => f32::NEG_INFINITY,
                        NOT_FINITE => f32::NAN,
                        at => x[at as usize],
                    };
                    let before = (first as usize + unit) % (cols / run) * run;
                    out.copy_from_slice(&[f32::from_bits((before as u32).wrapping_add_signed(at[0])), value]);
                } else {
                    // What is no number stays, once it is found.
                    let better = |new: f32, old: f32| !old.is_nan() && (new > old || new.is_nan());
                    let best =
                        |old: [f32; 2], &new: &[f32; 2]| if better(new[1], old[1]) { new } else { old };
                    let [id, value] = x.as_chunks().0.iter().fold([0.0, f32::NEG_INFINITY], best);
                    out[0] = if value.is_finite() { id } else { f32::from_bits(NOT_FINITE as u32) };
                }
            }
            Ok(())
        });
    }
}
