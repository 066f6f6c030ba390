//! A small accelerator with memory of its own, as a backend of Halite. Copy this crate for a chip.
//!
//! `memory.rs` is the device's memory, `product.rs` its one command, and this file the backend: it turns ops into that
//! command, and leaves the other ops to the host. With the option `gaps` it declares them as gaps instead.

mod memory;
mod product;

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use halite::backend::driver::{Driver, DriverOption, Listed, Value};
use halite::backend::{
    Backend, Bindings, Buffer, Caps, Clock, Contract, DeviceOp, Gap, Limits, OpSig, Operand, Plan, Step,
    Support, Ticket, Timing, Usage, check_step, reference,
};
use halite::kernels::float::DefaultFloats;
use halite::kernels::formats::Format;
use halite::map::Region;
use halite::passes::{self, Layout};
use halite::program::{Epilogue, Op, Part, Program, Slot, TensorId};
use halite::{Error, Result};

use memory::{Allocation, Memory};
use product::Product;

/// What `--backend` calls it.
const NAME: &str = "my-chip";
/// The memory of a device.
const CAPACITY_BYTES: u64 = 1 << 30;
/// The most that the host copies at a time.
const STAGING_BYTES: usize = 1 << 16;

/// The backend by name, for the table of drivers in `main.rs`.
pub const DRIVER: Driver = Driver::new(NAME, |_, options| Ok(Arc::new(MyChip::new(options.is_set("gaps")))))
    .help("an example")
    .options(&[DriverOption::new(
        "gaps",
        Value::Flag,
        "Declare what the chip has no command for as gaps, instead of running it on the host",
    )])
    .list(|| Ok(vec![Listed::of(MyChip::new(false).caps())]));

/// An open device. Clones are the same device.
#[derive(Debug, Clone)]
pub struct MyChip {
    caps: Caps,
    memory: Arc<Memory>,
    gaps: bool,
}

fn error(message: impl Into<String>) -> Error {
    Error::Backend { backend: NAME.into(), message: message.into() }
}

impl MyChip {
    /// Opens a device. With `gaps`, it runs only what the chip has a command for.
    pub fn new(gaps: bool) -> MyChip {
        let caps = Caps::new(NAME, "an accelerator that multiplies Q8_0; a crate to copy")
            .memory_bytes(CAPACITY_BYTES)
            .contract(Contract::Exact);
        MyChip { caps, memory: Arc::default(), gaps }
    }

    /// The memory behind a buffer.
    fn allocation<'a>(&self, buffer: &'a Buffer) -> Result<&'a Allocation> {
        let found = buffer.memory().filter(|allocation: &&Allocation| allocation.is_of(&self.memory));
        found.ok_or_else(|| error("a buffer of another device was passed"))
    }

    /// The address of a buffer that holds at least so many bytes.
    fn address(&self, buffer: &Buffer, bytes: usize) -> Result<usize> {
        Ok(self.allocation(buffer)?.addresses(0..bytes as u64)?.start)
    }
}

/// Whether the chip has a command for an op.
fn on_chip(program: &Program, op: &Op) -> bool {
    let q8_0 = |weight| program.tensor(weight).format == Format::Q8_0;
    matches!(op, Op::MatMul { parts, epilogue: Epilogue::None, .. } if parts.iter().all(|part| q8_0(part.weight)))
}

fn missing(op: &Op) -> String {
    format!("the chip has no command for this {}", op.name())
}

impl Backend for MyChip {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn supports(&self, sig: &OpSig<'_>) -> Support {
        match self.gaps && !on_chip(sig.program, sig.op) {
            true => Support::Unsupported(Gap::NotYet(missing(sig.op))),
            false => Support::Native,
        }
    }

    fn explain(&self, sig: &OpSig<'_>, _tokens: u32) -> String {
        let on_chip = on_chip(sig.program, sig.op);
        let place = if on_chip { "on the chip" } else { "on the host" };
        if on_chip || !self.gaps { place.into() } else { String::new() }
    }

    fn alloc(&self, bytes: u64, _usage: Usage) -> Result<Buffer> {
        Ok(Buffer::new(bytes, self.memory.alloc(bytes)?))
    }

    fn import(&self, _region: &Region) -> Result<Option<Buffer>> {
        // The chip cannot read pages of the host; `fill` copies them.
        Ok(None)
    }

    fn fill(&self, dst: &Buffer, range: Range<u64>, write: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        let to = self.allocation(dst)?.addresses(range)?;
        let mut staging = vec![0; STAGING_BYTES.min(to.len())];
        for address in to.clone().step_by(STAGING_BYTES) {
            let piece = &mut staging[..STAGING_BYTES.min(to.end - address)];
            write(piece);
            self.memory.write(address, piece)?;
        }
        Ok(())
    }

    fn read(&self, src: &Buffer, offset: u64, dst: &mut [u8]) -> Result<()> {
        let from = self.allocation(src)?.addresses(offset..offset.saturating_add(dst.len() as u64))?;
        self.memory.read(from.start, dst)
    }

    fn prepare(&self, program: &Arc<Program>, limits: Limits) -> Result<Box<dyn Plan>> {
        let layout = passes::liveness(program);
        let bytes = |&(rows, cols)| 4 * passes::rows(rows, limits.tokens, limits.outputs) * u64::from(cols);
        let scratch = layout.places.iter().map(|place| self.alloc(bytes(place), Usage::State));
        Ok(Box::new(ChipPlan {
            chip: self.clone(),
            scratch: scratch.collect::<Result<_>>()?,
            layout,
            program: program.clone(),
            limits,
            submitted: 0,
            elapsed: Duration::ZERO,
        }))
    }

    fn scratch_bytes(&self, program: &Program, limits: Limits) -> u64 {
        passes::liveness(program).bytes(limits.tokens, limits.outputs)
    }
}

/// A tensor of an op, and its buffer.
type Tensor<'a> = Operand<'a, TensorId>;

/// A program ready to run.
struct ChipPlan {
    chip: MyChip,
    program: Arc<Program>,
    limits: Limits,
    /// The place of each scratch tensor, and a buffer for each place.
    layout: Layout,
    scratch: Vec<Buffer>,
    submitted: u64,
    elapsed: Duration,
}

impl ChipPlan {
    /// An op with the buffers of its operands.
    fn bind<'a>(&'a self, op: &Op, bindings: &Bindings<'a>) -> Result<DeviceOp<'a>> {
        let scratch = |id: TensorId| self.scratch.get((*self.layout.place.get(id.0 as usize)?)?);
        op.try_map(
            |&id, _| {
                let tensor = self.program.tensor(id);
                let buffer = match tensor.slot {
                    Slot::Weight(n) => bindings.weights.get(n as usize),
                    Slot::Io(n) => bindings.io.get(n as usize),
                    Slot::Scratch => scratch(id),
                };
                let buffer = buffer.ok_or_else(|| error(format!("`{}` has no buffer", tensor.name)))?;
                Ok(Operand { id, buffer })
            },
            |&id, _| {
                let buffer = bindings.states.get(id.0 as usize);
                let buffer = buffer.ok_or_else(|| error(format!("state {} has no buffer", id.0)))?;
                Ok(Operand { id, buffer })
            },
        )
    }

    /// Queues the chip's commands for products. This chip runs them at once.
    fn queue(
        &self,
        x: &Tensor<'_>,
        parts: &[Part<Tensor<'_>>],
        outs: &[Tensor<'_>],
        step: &Step<'_>,
    ) -> Result<()> {
        let (chip, shape) = (&self.chip, self.program.tensor(x.id));
        let tokens = passes::rows(shape.rows, step.tokens.len() as u32, step.outputs.len() as u32) as usize;
        let cols = shape.cols as usize;
        for (part, out) in parts.iter().zip(outs) {
            let rows = self.program.tensor(out.id).cols as usize;
            let weight_bytes = rows * (cols / product::BLOCK) * product::BLOCK_BYTES;
            let product = Product {
                x: chip.address(x.buffer, 4 * tokens * cols)?,
                weight: chip.address(part.weight.buffer, weight_bytes)?,
                bias: part.bias.map(|bias| chip.address(bias.buffer, 4 * rows)).transpose()?,
                out: chip.address(out.buffer, 4 * tokens * rows)?,
                tokens,
                rows,
                cols,
            };
            chip.memory.run(|memory| product.run(memory))?;
        }
        Ok(())
    }
}

impl Plan for ChipPlan {
    fn submit(&mut self, step: &Step<'_>, segments: Range<usize>, bindings: &Bindings<'_>) -> Result<Ticket> {
        let start = Instant::now();
        // The program that embeds Halite may round in another way.
        let _floats = DefaultFloats::set();
        check_step(step, &self.program, self.limits, bindings.states)?;
        let first = segments.start == 0;
        let segments = self.program.segments.get(segments).ok_or_else(|| error("no such segments"))?;
        for op in segments.iter().flat_map(|segment| &segment.ops) {
            if step.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            match self.bind(op, bindings)? {
                Op::MatMul { x, parts, outs, .. } if on_chip(&self.program, op) => {
                    self.queue(&x, &parts, &outs, step)?;
                }
                _ if self.chip.gaps => return Err(error(missing(op))),
                bound => reference::run(&self.chip, &self.program, &bound, step)?,
            }
        }
        // The submissions of a step add up.
        let before = if first { Duration::ZERO } else { self.elapsed };
        self.elapsed = before + start.elapsed();
        self.submitted += 1;
        Ok(Ticket(self.submitted))
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Timing> {
        if ticket.0 != self.submitted {
            return Err(Error::argument("ticket", self.submitted, ticket.0));
        }
        Ok(Timing::new(self.elapsed, Clock::Host))
    }
}
