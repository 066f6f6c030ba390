//! Runs lowered ops for their results: every command moves or computes real bytes. Mistakes that a chip would
//! not detect are errors here: reads of unwritten bytes, writes to a slot in use, deadlocks, and accesses
//! outside the scratchpad or an operand.

use super::chip::Chip;
use super::faults::{Injector, Place};
use super::tile::{Action, Command, Lowered, Operand, Piece, Queue, Slot, Step, TileProgram, Work};
use halite::rng::SplitMix64;
use halite::{Error, Result};

/// Computes the steps of an op. Slices are the command's slots, cut to the written bytes or to the bytes to
/// write.
pub trait Function {
    /// Computes one step.
    ///
    /// # Errors
    /// Steps that cannot be computed.
    fn compute(&mut self, step: &Step, reads: &[&[u8]], writes: &mut [&mut [u8]]) -> Result<()>;
}

/// The operands of an op, in device memory.
pub struct Operands<'a, 'b> {
    /// What is read.
    pub inputs: &'a [&'b [u8]],
    /// What is written.
    pub outputs: &'a mut [&'b mut [u8]],
}

/// The order in which a tile's queues take turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    /// In the order of the commands.
    #[default]
    Listed,
    /// Random, as waits allow. Results must not depend on it.
    Random(u64),
}

/// Memory that ops reuse, and the faults that are injected into it.
#[derive(Debug, Default)]
pub struct Memory {
    faults: Option<Injector>,
    slots: Vec<SlotMemory>,
    semaphores: Vec<u32>,
    temps: Vec<Vec<u64>>,
}

impl Memory {
    pub fn with_faults(faults: Option<Injector>) -> Memory {
        Memory { faults, ..Memory::default() }
    }
}

#[derive(Debug, Default)]
struct SlotMemory {
    words: Vec<u64>,
    bytes: usize,
    /// Written bytes, from the start.
    written: usize,
}

/// Runs an op.
///
/// # Errors
/// Errors of the function, and [`Error::Backend`] for commands that break a rule of the chip.
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
    let programs = lowered.phases.iter().flat_map(|phase| phase.iter().enumerate());
    for (number, (tile, program)) in programs.enumerate() {
        if let Some(faults) = &mut memory.faults {
            faults.tile = tile as u32;
        }
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
                    return broken(format!(
                        "deadlock: a {} command waits for a later command",
                        command.queue.name()
                    ));
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
                    "deadlock: a {} command waits for a signal that never comes",
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
        Action::Compute { work, step, reads, writes } => {
            compute(memory, (work, step), reads, writes, function)?;
        }
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
    if let Some(faults) = &mut memory.faults {
        faults.pass_slice(Place::Dram, bytes);
        faults.pass_slice(Place::Link, bytes);
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
    let Memory { slots, temps, faults, .. } = memory;
    let target: &mut [u8] = match to.operand {
        Operand::Out(i) => operands.outputs.get_mut(i).map_or(&mut [], |out| &mut out[..]),
        Operand::Temp(i) => temps.get_mut(i).map_or(&mut [], |temp| bytemuck::cast_slice_mut(temp)),
        Operand::In(i) => return broken(format!("input {i} is written")),
    };
    let Some(slot) = slots.get_mut(from as usize) else {
        return broken(format!("slot {from} does not exist"));
    };
    let end = at + to.bytes() as usize;
    if end > slot.written {
        return broken(format!(
            "a store reads byte {end} of slot {from}, of which {} were written",
            slot.written
        ));
    }
    let bytes: &mut [u8] = &mut bytemuck::cast_slice_mut(&mut slot.words)[at..end];
    if let Some(faults) = faults {
        faults.pass_slice(Place::Scratchpad, bytes);
    }
    let have = target.len();
    for (run, from) in bytes.chunks_exact(to.run_bytes.max(1) as usize).enumerate() {
        let Some(target) = target.get_mut(run_range(to, run as u32)) else {
            return Err(outside(to, have));
        };
        target.copy_from_slice(from);
    }
    if let Some(faults) = faults {
        let run_bytes = to.run_bytes.max(1) as usize;
        faults.pass(Place::Link, bytes.len(), &mut |byte, mask| {
            let at = run_range(to, (byte / run_bytes) as u32).start + byte % run_bytes;
            if let Some(byte) = target.get_mut(at) {
                *byte ^= mask;
            }
        });
    }
    Ok(())
}

fn compute(
    memory: &mut Memory,
    (work, step): (&Work, &Step),
    reads: &[Slot],
    writes: &[(Slot, u32)],
    function: &mut dyn Function,
) -> std::result::Result<(), Fault> {
    // Take the slots to write out, so that the others can be read.
    let mut taken: Vec<(Slot, usize, Vec<u64>)> = Vec::with_capacity(writes.len());
    for &(number, bytes) in writes {
        let Some(slot) = memory.slots.get_mut(number as usize) else {
            return broken(format!("slot {number} does not exist"));
        };
        if slot.written > 0 {
            return broken(format!(
                "slot {number} is written while {} of its bytes are in use",
                slot.written
            ));
        }
        if bytes as usize > slot.bytes {
            return broken(format!("{bytes} bytes are written to slot {number} of {}", slot.bytes));
        }
        taken.push((number, bytes as usize, std::mem::take(&mut slot.words)));
    }
    if let Some(faults) = &mut memory.faults
        && *step != Step::Part
    {
        for &slot in reads {
            let Some(slot) = memory.slots.get_mut(slot as usize) else { continue };
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut slot.words);
            faults.pass_slice(Place::Scratchpad, bytes.get_mut(..slot.written).unwrap_or(&mut []));
        }
    }
    let of_slot = |&slot: &Slot| {
        let slot = memory.slots.get(slot as usize);
        slot.map_or(&[][..], |slot| bytemuck::cast_slice(&slot.words).get(..slot.written).unwrap_or(&[]))
    };
    let inputs: Vec<&[u8]> = reads.iter().map(of_slot).collect();
    let mut result = Ok(());
    if *step != Step::Part {
        // A slot without bytes only signals earlier work.
        if let Some((slot, _)) = reads.iter().zip(&inputs).find(|(slot, input)| {
            input.is_empty() && memory.slots.get(**slot as usize).is_some_and(|slot| slot.bytes > 0)
        }) {
            return broken(format!("slot {slot} is read before it was written"));
        }
        let mut outputs: Vec<&mut [u8]> = taken
            .iter_mut()
            .map(|(_, bytes, words)| &mut bytemuck::cast_slice_mut::<u64, u8>(words)[..*bytes])
            .collect();
        result = function.compute(step, &inputs, &mut outputs);
        if let Some(faults) = &mut memory.faults {
            outputs.iter_mut().for_each(|output| faults.results(work, step, output));
        }
    }
    for (number, bytes, words) in taken {
        if let Some(slot) = memory.slots.get_mut(number as usize) {
            slot.words = words;
            slot.written = bytes;
        }
    }
    result.map_err(Fault::Of)
}

#[cfg(test)]
mod tests {
    use super::super::chip::Numerics;
    use super::super::faults::{Fault, Faults};
    use super::super::lower::lower;
    use super::super::shape::{Rows, Shape, Units};
    use super::super::tile::{Builder, VectorWork, Work};
    use super::*;
    use halite_profiles::profile::Profile;

    /// Copies what it reads.
    struct Copy;

    impl Function for Copy {
        fn compute(&mut self, _: &Step, reads: &[&[u8]], writes: &mut [&mut [u8]]) -> Result<()> {
            for (from, to) in reads.iter().zip(writes) {
                to.copy_from_slice(from);
            }
            Ok(())
        }
    }

    fn chip() -> Chip {
        Chip::new(Profile::open("teaching-16x16").unwrap(), Numerics::Exact, None).unwrap()
    }

    /// What becomes of a program that has 256 bytes to read and 256 to write.
    fn outcome(program: TileProgram, order: Order) -> std::result::Result<Vec<u8>, String> {
        let input: Vec<u8> = (0..=255).collect();
        let mut output = vec![0; 256];
        let lowered = Lowered { phases: vec![vec![program]], temps: Vec::new() };
        let mut operands = Operands { inputs: &[&input], outputs: &mut [&mut output] };
        let mut memory = Memory::default();
        execute(&chip(), &lowered, &mut memory, &mut operands, order, &mut Copy)
            .map(|()| output)
            .map_err(|error| error.to_string())
    }

    const STEP: (Work, Step) = (
        Work::Vector(VectorWork { simple: 1, exp: 0, rsqrt: 0, divide: 0, quantize: 0 }),
        Step::Units { stage: 0, first: 0, count: 1 },
    );

    /// Loads, copies and stores 256 bytes in pieces of 64, through two slots.
    fn copying() -> TileProgram {
        let mut b = Builder::default();
        let (mut from, mut to) = (b.ring(2, 64), b.ring(2, 64));
        for at in (0..256).step_by(64) {
            let read = b.load(&mut from, [Piece::whole(Operand::In(0), at, 64)], 1);
            let [written] = b.compute(STEP, &[read], [(&mut to, 64)], &[read]);
            b.store(written, [Piece::whole(Operand::Out(0), at, 64)]);
        }
        b.finish()
    }

    #[test]
    fn a_right_program_runs_in_any_order() {
        for seed in 0..50 {
            assert_eq!(outcome(copying(), Order::Random(seed)), Ok((0..=255).collect()));
        }
        assert_eq!(outcome(copying(), Order::Listed), Ok((0..=255).collect()));
    }

    /// Without any one of its waits the program does something that is refused, in some order.
    #[test]
    fn every_missing_wait_is_found() {
        let program = copying();
        let waits =
            program.commands.iter().enumerate().flat_map(|(i, c)| (0..c.waits.len()).map(move |w| (i, w)));
        for (command, wait) in waits {
            let mut wrong = program.clone();
            wrong.commands[command].waits.remove(wait);
            let found = (0..200).find_map(|seed| outcome(wrong.clone(), Order::Random(seed)).err());
            let found = found.unwrap_or_else(|| panic!("wait {wait} of command {command} is not missed"));
            assert!(found.contains("program 0 of the op: "), "{found}");
        }
    }

    #[test]
    fn broken_rules_are_named() {
        let changed = |change: &dyn Fn(&mut TileProgram)| {
            let mut program = copying();
            change(&mut program);
            outcome(program, Order::Listed).unwrap_err()
        };
        let broken = |change: &dyn Fn(&mut TileProgram), message: &str| {
            let found = changed(change);
            assert!(found.contains(message), "expected `{message}`, got `{found}`");
        };
        broken(&|p| p.slots[0] = 70_000, "bytes of a scratchpad of 65536");
        broken(&|p| drop(p.commands.remove(0)), "waits for a later command");
        broken(&|p| p.slots[0] = 63, "a load of 64 bytes into slot 0 of 63");
        broken(
            &|p| p.commands[1].frees.clear(),
            "a load fills slot 0 from byte 0 on, of which 64 are in use",
        );
        broken(&|p| p.commands[2].frees.clear(), "slot 2 is written while 64 of its bytes are in use");
        let piece = |p: &mut TileProgram, to: Piece| match &mut p.commands[2].action {
            Action::Store { to: piece, .. } => *piece = to,
            other => panic!("{other:?}"),
        };
        broken(
            &|p| piece(p, Piece::whole(Operand::Out(0), 0, 65)),
            "a store reads byte 65 of slot 2, of which 64",
        );
        broken(&|p| piece(p, Piece::whole(Operand::Out(0), 250, 64)), "is outside of its 256 bytes");
        broken(&|p| piece(p, Piece::whole(Operand::In(0), 0, 64)), "input 0 is written");
        let unread = |p: &mut TileProgram| {
            p.commands.remove(0);
            p.commands[0].waits.clear();
        };
        broken(&unread, "slot 0 is read before it was written");
    }

    /// 2048 bits are loaded, read by the unit, read by the store, and stored.
    #[test]
    fn every_bit_passes_where_it_should() {
        let passed = |place: &str, rate: &str| {
            let chip = chip();
            let spec = format!("bitflip:rate={rate},where={place},seed=3");
            let faults = Faults::new(&Fault::list(&spec).unwrap());
            let mut memory = Memory::with_faults(Injector::new(&faults, &chip, 0));
            let (input, mut output) = ([0; 256], [0; 256]);
            let lowered = Lowered { phases: vec![vec![copying()]], temps: Vec::new() };
            let mut operands = Operands { inputs: &[&input], outputs: &mut [&mut output] };
            execute(&chip, &lowered, &mut memory, &mut operands, Order::Listed, &mut Copy).unwrap();
            let flipped: u64 = output.iter().map(|b| u64::from(b.count_ones())).sum();
            (faults.counts()[0].passed, faults.counts()[0].injected, flipped)
        };
        assert_eq!(passed("dram", "1"), (2048, 2048, 2048));
        // Flipped twice.
        assert_eq!(passed("link", "1"), (4096, 4096, 0));
        assert_eq!(passed("scratchpad", "1"), (4096, 4096, 0));
        // No command of the matrix unit.
        assert_eq!(passed("accumulator", "1"), (0, 0, 0));
        for place in ["dram", "link", "scratchpad"] {
            let (_, injected, flipped) = passed(place, "1e-2");
            assert!(injected == flipped && (5..90).contains(&injected), "{place}: {injected}, {flipped}");
        }
    }

    #[test]
    fn a_wait_for_nothing_ends() {
        let mut program = copying();
        program.commands[0].signals.clear();
        let error = outcome(program, Order::Random(1)).unwrap_err();
        assert!(error.contains("waits for a signal that never comes"), "{error}");
    }

    /// What is lowered for a chip stays within its scratchpad, whatever the sizes.
    #[test]
    fn scratchpads_are_never_exceeded() {
        for (count, elements) in [(1, 1), (1, 4000), (7, 8000), (1000, 16), (3, 16_000)] {
            let rows = |operand| vec![Rows::own(operand, elements)];
            let (reads, writes) = (rows(Operand::In(0)), rows(Operand::Out(0)));
            let shape = Shape::Units(Units { count, pieces: 1, reads, writes, work: [1, 0, 0, 0, 0] });
            match lower(&chip(), &shape) {
                Ok(lowered) => {
                    let bytes = lowered.phases.iter().flatten().map(TileProgram::scratch_bytes).max();
                    assert!(bytes <= Some(65536), "{count} x {elements}: {bytes:?}");
                }
                Err(error) => {
                    assert!(elements > 8000 && error.to_string().contains("one row of the op"), "{error}")
                }
            }
        }
    }
}
