//! Runs lowered ops for their results: every command moves or computes real bytes, and what a chip would silently get wrong is
//! an error here. Reading bytes that nothing wrote, filling a slot that is still in use, waiting for a signal that never
//! comes, leaving the scratchpad or an operand.

use super::chip::Chip;
use super::tile::{Action, Command, Lowered, Operand, Piece, Queue, Slot, Step, TileProgram};
use crate::rng::SplitMix64;
use crate::{Error, Result};

/// Computes the steps of an op. Slices are the slots of the command, cut to what was written to them, or is to be written.
pub trait Function {
    /// Computes one.
    ///
    /// # Errors
    /// What cannot be computed.
    fn compute(&mut self, step: &Step, reads: &[&[u8]], writes: &mut [&mut [u8]]) -> Result<()>;
}

/// The operands of an op, in device memory.
pub struct Operands<'a, 'b> {
    /// What is read.
    pub inputs: &'a [&'b [u8]],
    /// What is written.
    pub outputs: &'a mut [&'b mut [u8]],
}

/// In which order a tile's queues take turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    /// As the commands are listed.
    #[default]
    Listed,
    /// At random, as waits allow. Results must not depend on it.
    Random(u64),
}

/// Memory that is reused from op to op.
#[derive(Debug, Default)]
pub struct Memory {
    slots: Vec<SlotMemory>,
    semaphores: Vec<u32>,
    temps: Vec<Vec<u64>>,
}

#[derive(Debug, Default)]
struct SlotMemory {
    words: Vec<u64>,
    bytes: usize,
    /// Bytes from the start that were written.
    written: usize,
}

/// Runs an op.
///
/// # Errors
/// What the function says, and [`Error::Backend`] where the commands break a rule of the chip.
pub fn execute(
    chip: &Chip,
    lowered: &Lowered,
    memory: &mut Memory,
    operands: &mut Operands<'_, '_>,
    order: Order,
    function: &mut dyn Function,
) -> Result<()> {
    memory.temps.clear();
    memory.temps.extend(lowered.temps.iter().map(|bytes| vec![0; bytes.div_ceil(8) as usize]));
    for (number, program) in lowered.phases.iter().flatten().enumerate() {
        run_tile(chip, program, memory, operands, order, function)
            .map_err(|error| explain(chip, number, error))?;
    }
    Ok(())
}

fn explain(chip: &Chip, tile: usize, error: Fault) -> Error {
    match error {
        Fault::Of(error) => error,
        Fault::Broken(message) => Error::Backend {
            backend: format!("sim:{}", chip.profile.name),
            message: format!("program {tile} of the op: {message}"),
        },
    }
}

enum Fault {
    Of(Error),
    Broken(String),
}

fn broken<T>(message: String) -> std::result::Result<T, Fault> {
    Err(Fault::Broken(message))
}

fn run_tile(
    chip: &Chip,
    program: &TileProgram,
    memory: &mut Memory,
    operands: &mut Operands<'_, '_>,
    order: Order,
    function: &mut dyn Function,
) -> std::result::Result<(), Fault> {
    let need = program.scratch_bytes();
    if need > chip.scratch_bytes {
        return broken(format!("{need} bytes of a scratchpad of {}", chip.scratch_bytes));
    }
    memory.slots.resize_with(memory.slots.len().max(program.slots.len()), SlotMemory::default);
    for (slot, &bytes) in memory.slots.iter_mut().zip(&program.slots) {
        slot.bytes = bytes as usize;
        slot.written = 0;
        let words = slot.bytes.div_ceil(8);
        if slot.words.len() < words {
            slot.words.resize(words, 0);
        }
    }
    memory.semaphores.clear();
    memory.semaphores.resize(program.semaphores as usize, 0);
    match order {
        Order::Listed => {
            for command in &program.commands {
                if !ready(command, &memory.semaphores) {
                    return broken(format!("a {} command waits for later ones", command.queue.name()));
                }
                run(command, memory, operands, function)?;
            }
        }
        Order::Random(seed) => {
            let mut rng = SplitMix64::new(seed);
            let mut queues: [Vec<&Command>; 4] = Default::default();
            for command in program.commands.iter().rev() {
                queues[command.queue as usize].push(command);
            }
            loop {
                let can_run = |q: &&Queue| {
                    queues[**q as usize].last().is_some_and(|command| ready(command, &memory.semaphores))
                };
                let able: Vec<Queue> = Queue::ALL.iter().filter(can_run).copied().collect();
                let chosen = able.get(rng.next() as usize % able.len().max(1));
                let Some(command) = chosen.and_then(|&q| queues[q as usize].pop()) else { break };
                run(command, memory, operands, function)?;
            }
            if let Some(stuck) = queues.iter().find_map(|q| q.last()) {
                return broken(format!(
                    "a {} command waits for a signal that never comes",
                    stuck.queue.name()
                ));
            }
        }
    }
    Ok(())
}

fn ready(command: &Command, semaphores: &[u32]) -> bool {
    let reached = |&(semaphore, count): &(u32, u32)| semaphores.get(semaphore as usize) >= Some(&count);
    command.waits.iter().all(reached)
}

fn run(
    command: &Command,
    memory: &mut Memory,
    operands: &mut Operands<'_, '_>,
    function: &mut dyn Function,
) -> std::result::Result<(), Fault> {
    match &command.action {
        Action::Load { from, to, at, .. } => load(memory, operands, from, *to, *at as usize)?,
        Action::Store { from, at, to } => store(memory, operands, *from, *at as usize, to)?,
        Action::Compute { step, reads, writes, .. } => compute(memory, step, reads, writes, function)?,
    }
    for &slot in &command.frees {
        if let Some(slot) = memory.slots.get_mut(slot as usize) {
            slot.written = 0;
        }
    }
    for &semaphore in &command.signals {
        if let Some(count) = memory.semaphores.get_mut(semaphore as usize) {
            *count += 1;
        }
    }
    Ok(())
}

/// The bytes of one run of a piece.
fn run_range(piece: &Piece, run: u32) -> std::ops::Range<usize> {
    let start = piece.offset.saturating_add(u64::from(run) * piece.stride) as usize;
    start..start.saturating_add(piece.run_bytes as usize)
}

fn outside(piece: &Piece, have: usize) -> Fault {
    Fault::Broken(format!("{piece:?} is outside of its {have} bytes"))
}

fn load(
    memory: &mut Memory,
    operands: &Operands<'_, '_>,
    from: &Piece,
    to: Slot,
    at: usize,
) -> std::result::Result<(), Fault> {
    let source: &[u8] = match from.operand {
        Operand::In(i) => operands.inputs.get(i).copied().unwrap_or(&[]),
        Operand::Out(i) => operands.outputs.get(i).map_or(&[], |out| &out[..]),
        Operand::Temp(i) => memory.temps.get(i).map_or(&[], |temp| bytemuck::cast_slice(temp)),
    };
    let Some(slot) = memory.slots.get_mut(to as usize) else {
        return broken(format!("slot {to} does not exist"));
    };
    if slot.written != at {
        return broken(format!(
            "a load fills slot {to} from byte {at} on, of which {} are in use",
            slot.written
        ));
    }
    let end = at + from.bytes() as usize;
    if end > slot.bytes {
        return broken(format!("a load of {end} bytes into slot {to} of {}", slot.bytes));
    }
    let bytes: &mut [u8] = &mut bytemuck::cast_slice_mut(&mut slot.words)[at..end];
    for (run, to) in bytes.chunks_exact_mut(from.run_bytes.max(1) as usize).enumerate() {
        let Some(source) = source.get(run_range(from, run as u32)) else {
            return Err(outside(from, source.len()));
        };
        to.copy_from_slice(source);
    }
    slot.written = end;
    Ok(())
}

fn store(
    memory: &mut Memory,
    operands: &mut Operands<'_, '_>,
    from: Slot,
    at: usize,
    to: &Piece,
) -> std::result::Result<(), Fault> {
    let Memory { slots, temps, .. } = memory;
    let target: &mut [u8] = match to.operand {
        Operand::Out(i) => operands.outputs.get_mut(i).map_or(&mut [], |out| &mut out[..]),
        Operand::Temp(i) => temps.get_mut(i).map_or(&mut [], |temp| bytemuck::cast_slice_mut(temp)),
        Operand::In(i) => return broken(format!("input {i} is written")),
    };
    let Some(slot) = slots.get(from as usize) else {
        return broken(format!("slot {from} does not exist"));
    };
    let end = at + to.bytes() as usize;
    if end > slot.written {
        return broken(format!(
            "a store reads byte {end} of slot {from}, of which {} were written",
            slot.written
        ));
    }
    let bytes: &[u8] = &bytemuck::cast_slice(&slot.words)[at..end];
    let have = target.len();
    for (run, from) in bytes.chunks_exact(to.run_bytes.max(1) as usize).enumerate() {
        let Some(target) = target.get_mut(run_range(to, run as u32)) else {
            return Err(outside(to, have));
        };
        target.copy_from_slice(from);
    }
    Ok(())
}

fn compute(
    memory: &mut Memory,
    step: &Step,
    reads: &[Slot],
    writes: &[(Slot, u32)],
    function: &mut dyn Function,
) -> std::result::Result<(), Fault> {
    // What is written is taken out, so that the rest can be read.
    let mut taken: Vec<(Slot, usize, Vec<u64>)> = Vec::with_capacity(writes.len());
    for &(number, bytes) in writes {
        let Some(slot) = memory.slots.get_mut(number as usize) else {
            return broken(format!("slot {number} does not exist"));
        };
        if slot.written > 0 {
            return broken(format!("slot {number} is written while {} bytes of it are in use", slot.written));
        }
        if bytes as usize > slot.bytes {
            return broken(format!("{bytes} bytes are written to slot {number} of {}", slot.bytes));
        }
        taken.push((number, bytes as usize, std::mem::take(&mut slot.words)));
    }
    let of_slot = |&slot: &Slot| {
        let slot = memory.slots.get(slot as usize);
        slot.map_or(&[][..], |slot| bytemuck::cast_slice(&slot.words).get(..slot.written).unwrap_or(&[]))
    };
    let inputs: Vec<&[u8]> = reads.iter().map(of_slot).collect();
    let mut result = Ok(());
    if *step != Step::Part {
        // A slot without bytes only stands for what came before.
        if let Some((slot, _)) = reads.iter().zip(&inputs).find(|(slot, input)| {
            input.is_empty() && memory.slots.get(**slot as usize).is_some_and(|slot| slot.bytes > 0)
        }) {
            return broken(format!("slot {slot} is read, of which nothing was written"));
        }
        let mut outputs: Vec<&mut [u8]> = taken
            .iter_mut()
            .map(|(_, bytes, words)| &mut bytemuck::cast_slice_mut::<u64, u8>(words)[..*bytes])
            .collect();
        result = function.compute(step, &inputs, &mut outputs);
    }
    for (number, bytes, words) in taken {
        if let Some(slot) = memory.slots.get_mut(number as usize) {
            slot.words = words;
            slot.written = bytes;
        }
    }
    result.map_err(Fault::Of)
}
