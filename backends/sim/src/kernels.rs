//! Lowers, times and runs each op of a plan.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use halite_kernels::rows;

use super::engine::OpTime;
use super::execute::{self, Function, Operands, Order};
use super::lower::Closed;
use super::machine::{Machine, floats, floats_mut, unknown};
use super::norm::norm;
use super::places::{Amounts, Data};
use super::shape::{self, Shape};
use super::step::saved_s;
use super::tile::{Lowered, Step};
use super::{Report, Sim, lower, measured, name, native};
use halite::backend::cpu::CpuKernels;
use halite::backend::energy::{Energy, EnergySource};
use halite::backend::host::{HostOp, HostStep, HostTensor, Kernels};
use halite::backend::{Bindings, Buffer, Clock, Step as ProgramStep, Timing};
use halite::error::Result;
use halite::program::{Access, Epilogue, NOT_FINITE, Op, TensorId};

/// [`Kernels`] that lower, run and time each op.
pub struct SimKernels {
    machine: Machine,
    /// Kernels that compute units.
    rows: CpuKernels,
    order: Order,
    memory: execute::Memory,
    /// Ops that were already lowered and timed.
    lowered: HashMap<Shape, (Arc<Lowered>, OpTime, Option<Closed>)>,
    /// The op before, on a chip that loads weights ahead.
    before: Option<Closed>,
    report: Arc<Mutex<Report>>,
    /// What the submission took so far.
    took: OpTime,
    /// Bytes of activations at once, at most.
    scratch_bytes: u64,
    /// What has its place.
    amounts: Amounts,
}

/// Maximum lowered ops to keep.
const KEPT: usize = 256;

/// A [`Function`] from a closure.
struct With<F>(F);

impl<F: FnMut(&Step, &[&[u8]], &mut [&mut [u8]]) -> Result<()>> Function for With<F> {
    fn compute(&mut self, step: &Step, reads: &[&[u8]], writes: &mut [&mut [u8]]) -> Result<()> {
        (self.0)(step, reads, writes)
    }
}

impl SimKernels {
    /// `scratch_bytes` are those of the program's activations.
    pub fn new(sim: &Sim, scratch_bytes: u64) -> Result<SimKernels> {
        let machine = Machine {
            isa: sim.isa,
            chip: sim.chip.clone(),
            decoded: native::Decoded::default(),
            sums: Default::default(),
            lanes: Default::default(),
            unpacked: Default::default(),
        };
        Ok(SimKernels {
            machine,
            rows: CpuKernels::of_rows(sim.isa)?,
            order: sim.order,
            memory: execute::Memory::with_faults(sim.injector()),
            lowered: HashMap::new(),
            before: None,
            report: sim.report.clone(),
            took: OpTime::none(),
            scratch_bytes,
            amounts: Amounts::default(),
        })
    }

    fn lower(&mut self, shape: &Shape) -> Result<(Arc<Lowered>, OpTime, Option<Closed>)> {
        if let Some(found) = self.lowered.get(shape) {
            return Ok(found.clone());
        }
        let lowered = Arc::new(lower::lower(&self.machine.chip, shape)?);
        let chip = &self.machine.chip;
        let time = measured::time(chip, shape, &lowered, None);
        let closed = chip.loads_ahead().then(|| measured::closed(chip, shape, &mut None)).transpose()?;
        if self.lowered.len() >= KEPT {
            self.lowered.clear();
        }
        self.lowered.insert(shape.clone(), (lowered.clone(), time, closed));
        Ok((lowered, time, closed))
    }
}

impl Kernels for SimKernels {
    fn run(&mut self, op: &mut HostOp<'_>, step: &HostStep<'_>) -> Result<()> {
        let ids = if let Op::Experts { ids, .. } = &*op { Some(ids.ints()) } else { None };
        let shape = shape::shape(step.program, step.op, step.step, ids)?;
        let (lowered, time, closed) = self.lower(&shape)?;
        let time = OpTime { seconds: time.seconds - saved_s(&mut self.before, closed), ..time };
        self.took = self.took.then(time);
        let report = name(step.program, step.op);
        self.report.lock().unwrap_or_else(PoisonError::into_inner).add(&report, time);
        let rows = &mut self.rows;
        let mut device = Device {
            machine: &mut self.machine,
            memory: &mut self.memory,
            order: self.order,
            lowered: &lowered,
        };
        match op {
            // Its time is that of whole rows; pages have the host's layout.
            Op::KvWrite { .. } => rows.run(op, step),
            Op::RopeKv { .. } | Op::Conv { .. } | Op::Recur { .. } => {
                rows.run(op, step)?;
                if let Op::RopeKv { out, .. } | Op::Conv { out, .. } | Op::Recur { out, .. } = op {
                    device.machine.round(out.floats_mut());
                }
                Ok(())
            }
            Op::Attend { .. } => {
                let Some((a, out)) = op.attention(step) else { return Ok(()) };
                let inputs =
                    [bytemuck::cast_slice(a.q), a.pages.bytes, bytemuck::cast_slice(a.sinks.unwrap_or(&[]))];
                let mut outputs = [bytemuck::cast_slice_mut(out)];
                device.run(&inputs, &mut outputs, |machine, step, reads, writes| {
                    machine.attend(&a, step, reads, writes)
                })
            }
            op => {
                let (inputs, mut outputs) = operands(op);
                let pieces = lowered.phases.len() > 1;
                device.run(&inputs, &mut outputs, |machine, command, reads, writes| match step.op {
                    Op::MatMul { epilogue, .. } => {
                        let epilogue = match *epilogue {
                            Epilogue::None => Epilogue::None,
                            Epilogue::Glu(act) => Epilogue::Glu(act),
                            Epilogue::Add(_) => Epilogue::Add(()),
                            _ => return Err(unknown(command)),
                        };
                        machine.product(command, reads, writes, epilogue)
                    }
                    Op::BlockMatMul { .. } => machine.product(command, reads, writes, Epilogue::None),
                    // In one stage, rows are whole.
                    Op::Norm { .. } if pieces => norm(machine, step, command, reads, writes),
                    Op::Experts { .. } => experts(machine, step, command, reads, writes),
                    Op::TopK { x, ids, .. } => {
                        let (cols, k) = (step.program.tensor(*x).cols, step.program.tensor(*ids).cols);
                        top_k(cols as usize, k as usize, command, reads, writes)
                    }
                    Op::ArgMax { x, .. } => {
                        arg_max(machine, step.program.tensor(*x).cols as usize, command, reads, writes)
                    }
                    _ => units(machine, rows, step, command, reads, writes),
                })
            }
        }
    }

    fn begin(&mut self, bindings: &Bindings<'_>) {
        let bytes = |buffers: &[Buffer]| buffers.iter().map(Buffer::bytes).sum::<u64>() as f64;
        let amounts = Amounts::default()
            .with(Data::Weights, bytes(bindings.weights))
            .with(Data::Cache, bytes(bindings.states))
            .with(Data::Activations, self.scratch_bytes as f64);
        self.before = None;
        self.took = self.took.then(OpTime::of_host(self.machine.chip.profile.host_s()));
        if amounts != self.amounts {
            self.amounts = amounts;
            Arc::make_mut(&mut self.machine.chip).place(amounts);
            self.lowered.clear();
        }
    }

    fn end(&mut self, _elapsed: Duration) -> Timing {
        let took = std::mem::replace(&mut self.took, OpTime::none());
        let joules = took.joules.zip(self.machine.chip.profile.idle_joules(took.seconds));
        let energy = joules
            .map(|(work, idle)| work.total() + idle)
            .map(|joules| Energy::new(joules, EnergySource::Profile));
        Timing::new(Duration::from_secs_f64(took.seconds), Clock::Simulated).energy(energy)
    }
}

/// A lowered op on its chip.
struct Device<'a> {
    machine: &'a mut Machine,
    memory: &'a mut execute::Memory,
    order: Order,
    lowered: &'a Lowered,
}

impl Device<'_> {
    /// Runs the op; `f` computes a command.
    fn run<'b>(
        &mut self,
        inputs: &[&'b [u8]],
        outputs: &mut [&'b mut [u8]],
        mut f: impl FnMut(&mut Machine, &Step, &[&[u8]], &mut [&mut [u8]]) -> Result<()>,
    ) -> Result<()> {
        let (chip, machine) = (self.machine.chip.clone(), &mut *self.machine);
        let mut with =
            With(|step: &Step, reads: &[&[u8]], writes: &mut [&mut [u8]]| f(machine, step, reads, writes));
        let mut operands = Operands { inputs, outputs };
        execute::execute(&chip, self.lowered, self.memory, &mut operands, self.order, &mut with)
    }
}

/// The operands of an op, in the order in which [`shape`] numbers them. Absent ones are empty.
fn operands<'a>(op: &'a mut HostOp<'_>) -> (Vec<&'a [u8]>, Vec<&'a mut [u8]>) {
    fn optional<'a>(x: &'a Option<HostTensor<'_>>) -> &'a [u8] {
        x.as_ref().map_or(&[], |x| x.bytes())
    }
    match op {
        Op::Embed { table: x, out, .. }
        | Op::Gather { x, out }
        | Op::Slice { x, out, .. }
        | Op::Spread { x, out, .. }
        | Op::Unary { x, out, .. }
        | Op::ArgMax { x, out } => (vec![x.bytes()], vec![out.bytes_mut()]),
        Op::Glu { gate: a, up: b, out, .. }
        | Op::Add { a, b, out }
        | Op::Join { a, b, out, .. }
        | Op::BlockMatMul { x: a, weight: b, out }
        | Op::Mul { x: a, weight: b, out }
        | Op::Mix { x: a, factors: b, out, .. } => (vec![a.bytes(), b.bytes()], vec![out.bytes_mut()]),
        Op::Norm { x, add, sum, weight, bias, out, .. } => {
            let mut outputs = vec![out.bytes_mut()];
            outputs.extend(sum.as_mut().map(|sum| sum.bytes_mut()));
            (vec![x.bytes(), optional(add), optional(weight), optional(bias)], outputs)
        }
        Op::MatMul { x, parts, epilogue, outs } => {
            let residual = if let Epilogue::Add(residual) = epilogue { residual.bytes() } else { &[] };
            let mut inputs = vec![x.bytes(), residual];
            inputs.extend(parts.iter().flat_map(|part| [part.weight.bytes(), optional(&part.bias)]));
            (inputs, outs.iter_mut().map(|out| out.bytes_mut()).collect())
        }
        Op::Rope { x, out, rotation } => {
            (vec![x.bytes(), optional(&rotation.factors)], vec![out.bytes_mut()])
        }
        Op::Route { logits, bias, ids, weights, scales, .. } => {
            let inputs = vec![logits.bytes(), optional(bias), optional(scales)];
            (inputs, vec![ids.bytes_mut(), weights.bytes_mut()])
        }
        Op::TopK { x, ids, values } => (vec![x.bytes()], vec![ids.bytes_mut(), values.bytes_mut()]),
        Op::Experts { x, weights, gate, up, down, biases, out, .. } => {
            let biases = biases.as_ref().map_or([&[][..]; 3], |b| b.each_ref().map(|b| b.bytes()));
            let weights =
                [x, gate, up, down].map(|x| x.bytes()).into_iter().chain(biases).chain([weights.bytes()]);
            (weights.collect(), vec![out.bytes_mut()])
        }
        // Their memory is paged.
        Op::KvWrite { .. } | Op::Attend { .. } => (Vec::new(), Vec::new()),
        // `shape` rejects unknown ops.
        _ => (Vec::new(), Vec::new()),
    }
}

/// Ops whose units are computed independently: the program's op, on the command's slots.
fn units(
    machine: &Machine,
    kernels: &mut CpuKernels,
    step: &HostStep<'_>,
    command: &Step,
    reads: &[&[u8]],
    writes: &mut [&mut [u8]],
) -> Result<()> {
    let Step::Units { first, count, .. } = *command else { return Err(unknown(command)) };
    let HostStep { program, op, .. } = *step;
    let written = writes.first().map_or(0, |bytes| bytes.len() / 4);
    // Elements of a unit of an operand.
    let cols = |id: TensorId| match op {
        Op::Norm { group, .. } => *group,
        Op::Rope { x, out, rotation } if id == *x || id == *out => rotation.head_dim,
        Op::Slice { x, group, .. } | Op::Spread { x, group, .. } if id == *x => *group,
        Op::Spread { .. } => 1,
        Op::Slice { .. } => (written as u32).checked_div(count).unwrap_or(0),
        Op::Glu { .. } | Op::Add { .. } | Op::Mul { .. } | Op::Unary { .. } => 1,
        // Rows may be moved in parts.
        Op::Embed { .. } | Op::Gather { .. } => written as u32 / count.max(1),
        _ => program.tensor(id).cols,
    };
    // Slots have exactly the rows that the units chose.
    let own: Vec<u32> = (0..count).collect();
    let positions: Vec<u32> = match op {
        Op::Rope { x, rotation, .. } => {
            let heads = program.tensor(*x).cols / rotation.head_dim;
            (first..first + count)
                .filter_map(|unit| step.positions.get((unit / heads) as usize).copied())
                .collect()
        }
        _ => own.clone(),
    };
    {
        let (mut reads, mut writes) = (reads.iter(), writes.iter_mut());
        let tensor = |&id: &TensorId, access| {
            let format = program.tensor(id).format;
            let cols = |bytes: usize| match op {
                // Operands have different units.
                Op::Join { .. } => bytes / 4 / count.max(1) as usize,
                _ => cols(id) as usize,
            };
            let slot = match access {
                Access::Read => {
                    reads.next().map(|bytes| HostTensor::shared(bytes, format, cols(bytes.len())))
                }
                Access::Write => writes.next().map(|bytes| {
                    let cols = cols(bytes.len());
                    HostTensor::unique(bytes, format, cols)
                }),
            };
            slot.ok_or_else(|| unknown(command))
        };
        let mut op: HostOp<'_> = op.try_map(tensor, |_, _| Err(unknown(command)))?;
        let tokens = ProgramStep { tokens: &own, outputs: &own, ..*step.step };
        let step = HostStep { step: &tokens, positions: &positions, rows: &own, ..*step };
        kernels.run(&mut op, &step)?;
    }
    if !matches!(op, Op::Route { .. }) {
        (0..writes.len()).for_each(|i| machine.round(floats_mut(writes, i)));
    }
    Ok(())
}

/// Products of experts, and their weighted sum.
fn experts(
    machine: &mut Machine,
    step: &HostStep<'_>,
    command: &Step,
    reads: &[&[u8]],
    writes: &mut [&mut [u8]],
) -> Result<()> {
    let Op::Experts { x, ids, act, .. } = step.op else { return Err(unknown(command)) };
    if !matches!(command, Step::Units { .. }) {
        // Only gates are finished in pairs.
        let gated = matches!(command, Step::Finish { biases, .. } if biases.len() == 2);
        return machine.product(
            command,
            reads,
            writes,
            if gated { Epilogue::Glu(*act) } else { Epilogue::None },
        );
    }
    let (cols, used) = (step.program.tensor(*x).cols as usize, step.program.tensor(*ids).cols as usize);
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
}

/// The `k` largest of runs of `cols` elements, then of lists of them.
fn top_k(cols: usize, k: usize, step: &Step, reads: &[&[u8]], writes: &mut [&mut [u8]]) -> Result<()> {
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
}

/// The largest of runs of `cols` elements, then of pairs of index and element.
fn arg_max(
    machine: &Machine,
    cols: usize,
    step: &Step,
    reads: &[&[u8]],
    writes: &mut [&mut [u8]],
) -> Result<()> {
    let Step::Units { stage, first, count } = *step else { return Err(unknown(step)) };
    let (x, out) = (floats(reads[0]), floats_mut(writes, 0));
    let run = x.len() / (count as usize).max(1);
    for (unit, (x, out)) in x.chunks_exact(run).zip(out.chunks_exact_mut(2 - stage as usize)).enumerate() {
        if stage == 0 {
            let at = machine.isa.run(rows::ArgMax { x });
            let value = match at {
                // Another run may have a finite number.
                None if x.iter().all(|&x| x == f32::NEG_INFINITY) => f32::NEG_INFINITY,
                None => f32::NAN,
                Some(at) => x[at],
            };
            let before = (first as usize + unit) % (cols / run) * run;
            out.copy_from_slice(&[
                f32::from_bits((before as u32).wrapping_add_signed(at.map_or(NOT_FINITE, |at| at as i32))),
                value,
            ]);
        } else {
            // NaN stays, once found.
            let better = |new: f32, old: f32| !old.is_nan() && (new > old || new.is_nan());
            let best = |old: [f32; 2], &new: &[f32; 2]| if better(new[1], old[1]) { new } else { old };
            let [id, value] = x.as_chunks().0.iter().fold([0.0, f32::NEG_INFINITY], best);
            out[0] = if value.is_finite() { id } else { f32::from_bits(NOT_FINITE as u32) };
        }
    }
    Ok(())
}
