//! Commands of a tile, one queue per engine or unit.
//!
//! Data moves between an op's operands in device memory and *slots* of the tile's scratchpad. Producers pass
//! slots to consumers through [`Ring`]s, each with two counting semaphores: the numbers of filled and of
//! freed slots. They define all waits and signals, for any number of slots; two slots make a double buffer.

use halite_kernels::formats::Format;

use super::places::Data;

/// Memory outside of the tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operand {
    /// Input number n of the op, weights included.
    In(usize),
    /// Output number n.
    Out(usize),
    /// Number n of the op's temporary buffers.
    Temp(usize),
}

/// Strided runs of bytes of an operand.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    /// The operand.
    pub operand: Operand,
    /// The first byte.
    pub offset: u64,
    /// Number of runs.
    pub runs: u32,
    /// Bytes per run.
    pub run_bytes: u32,
    /// Bytes from the start of a run to the start of the next.
    pub stride: u64,
    /// What the bytes are.
    pub data: Data,
}

impl Piece {
    /// Consecutive bytes of weights.
    pub fn whole(operand: Operand, offset: u64, bytes: u32) -> Piece {
        Piece { operand, offset, runs: 1, run_bytes: bytes, stride: 0, data: Data::Weights }
    }

    /// The same, of other data.
    pub fn of(self, data: Data) -> Piece {
        Piece { data, ..self }
    }

    /// The bytes `range` of each of the consecutive rows of `row_bytes` that the piece has.
    pub fn within(self, row_bytes: u32, range: std::ops::Range<u32>) -> Piece {
        let run_bytes = range.end - range.start;
        if run_bytes == row_bytes {
            return self;
        }
        let runs = self.run_bytes / row_bytes.max(1);
        let offset = self.offset + u64::from(range.start);
        Piece { offset, runs, run_bytes, stride: row_bytes.into(), ..self }
    }

    /// All bytes.
    pub fn bytes(&self) -> u64 {
        u64::from(self.runs) * u64::from(self.run_bytes)
    }
}

/// A slot of the scratchpad, by number.
pub type Slot = u32;
/// A counting semaphore, by number.
pub type Semaphore = u32;

/// An engine or unit, which executes its commands in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Queue {
    /// DMA from device memory.
    Load,
    /// The matrix unit.
    Matrix,
    /// The vector unit.
    Vector,
    /// DMA to device memory.
    Store,
}

impl Queue {
    /// All of them.
    pub const ALL: [Queue; 4] = [Queue::Load, Queue::Matrix, Queue::Vector, Queue::Store];

    /// For people.
    pub fn name(self) -> &'static str {
        ["load", "matrix", "vector", "store"][self as usize]
    }
}

/// Element operations of a vector command, by cost class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VectorWork {
    /// Additions, multiplications, comparisons, fused multiply-adds.
    pub simple: u64,
    /// Exponentials, sines and cosines.
    pub exp: u64,
    /// Reciprocal square roots.
    pub rsqrt: u64,
    /// Divisions.
    pub divide: u64,
    /// Roundings to a block format.
    pub quantize: u64,
}

impl VectorWork {
    /// Multiplies all counts.
    pub fn times(self, n: u64) -> VectorWork {
        VectorWork {
            simple: self.simple * n,
            exp: self.exp * n,
            rsqrt: self.rsqrt * n,
            divide: self.divide * n,
            quantize: self.quantize * n,
        }
    }
}

/// The work of a unit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Work {
    /// A product of `m x k` with `k x n` at rate number `rate` of the matrix unit. `sums_bytes` of unfinished sums pass between
    /// the unit and the scratchpad. Of sparse weights, the unit skips half.
    Matrix { rate: usize, m: u32, n: u32, k: u32, sums_bytes: u64, sparse: bool },
    /// Element-wise work.
    Vector(VectorWork),
}

/// The form of a product's operands in the scratchpad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Form {
    /// 32-bit floats.
    F32,
    /// Quantised activations of the numeric contract.
    Quantised(halite_kernels::formats::Activation),
    /// A weight as stored in the file.
    File(Format),
    /// Codes and scales of a format of the chip.
    Chip(halite_profiles::numerics::Dtype),
    /// A weight of so many 64ths of a bit an element. For times: files have no such weights.
    Packed(u32),
}

/// Query rows: consecutive tokens of one sequence, with query heads that share a KV head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueryRows {
    /// The first token of the step.
    pub token: u32,
    /// Tokens.
    pub tokens: u32,
    /// The position of the first token.
    pub position: u32,
    /// The end of the positions of its sequence.
    pub end: u32,
    /// The first head.
    pub head: u32,
    /// Heads.
    pub heads: u32,
}

/// The computation of a command.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// No results: a part of a longer operation, whose last command computes all of them.
    Part,
    /// Units `first..first + count` of stage number `stage` of an op that works on rows or runs of elements.
    Units { stage: u32, first: u32, count: u32 },
    /// Converts rows of `k` floats to another form.
    Convert { rows: u32, k: u32, to: Form },
    /// Converts rows of a weight to a form of the chip.
    Unpack { rows: u32, k: u32, from: Format, to: Form },
    /// `out[row][column] = Σ x[row][i] w[column][i]`: the elements `k` of the sums, in order from 0. Only the `last` ones give
    /// results; until then the sums stay in place number `sums` of the matrix unit.
    Product { rows: u32, columns: u32, k: std::ops::Range<u32>, last: bool, sums: usize, x: Form, w: Form },
    /// Adds the biases, if any, to products of this many columns, then applies the op's epilogue. Reads the
    /// products, the biases, then the addend.
    Finish { columns: u32, biases: Vec<bool> },
    /// The attention of tokens to chunks of the cache: partial results, `[token][head][chunk]`.
    Pages { rows: QueryRows, chunks: std::ops::Range<u32> },
    /// Merges the results of chunks, `[token][head][chunk]`, in order into those of earlier chunks.
    Merge { rows: QueryRows, chunks: std::ops::Range<u32>, fresh: bool, last: bool },
}

/// The action of a command.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Bytes from device memory to a slot, from byte `at` on; `sharers` tiles load the same at about the same
    /// time.
    Load { from: Piece, to: Slot, at: u32, sharers: u32 },
    /// Bytes of a slot, from byte `at` on, to device memory.
    Store { from: Slot, at: u32, to: Piece },
    /// Work of a unit, with the bytes that it writes to each slot.
    Compute { work: Work, step: Step, reads: Vec<Slot>, writes: Vec<(Slot, u32)> },
}

/// A command.
#[derive(Debug, Clone, PartialEq)]
pub struct Command {
    /// The queue.
    pub queue: Queue,
    /// Semaphores to wait for, each with the count that it must reach.
    pub waits: Vec<(Semaphore, u32)>,
    /// The action.
    pub action: Action,
    /// Semaphores to increment at the end.
    pub signals: Vec<Semaphore>,
    /// Slots to free at the end.
    pub frees: Vec<Slot>,
}

/// The commands of one tile.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TileProgram {
    /// Bytes of each slot.
    pub slots: Vec<u32>,
    /// Semaphores.
    pub semaphores: u32,
    /// In an order that also works sequentially.
    pub commands: Vec<Command>,
}

/// Slots start at multiples of this many bytes.
pub const ALIGNMENT: u32 = 64;

impl TileProgram {
    /// Bytes of scratchpad.
    pub fn scratch_bytes(&self) -> u64 {
        self.slots.iter().map(|&bytes| u64::from(bytes.next_multiple_of(ALIGNMENT))).sum()
    }
}

/// An op on a chip: consecutive phases, each with a program per tile that has work.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Lowered {
    /// In order; all tiles end one before any starts the next.
    pub phases: Vec<Vec<TileProgram>>,
    /// Bytes of temporary buffers in device memory.
    pub temps: Vec<u64>,
}

/// Equal slots, filled and freed in turn.
#[derive(Debug)]
pub struct Ring {
    first: Slot,
    /// How many there are.
    pub slots: u32,
    full: Semaphore,
    free: Semaphore,
    entries: u32,
    filled: u32,
}

/// A slot that is in use.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// The slot.
    pub slot: Slot,
    full: Semaphore,
    free: Semaphore,
    /// The count of `free` required to fill it.
    begin: u32,
    /// The count of `full` when it is filled.
    ready: u32,
}

/// Builds a tile's program.
#[derive(Debug, Default)]
pub struct Builder {
    program: TileProgram,
}

impl Builder {
    /// New slots.
    pub fn ring(&mut self, slots: u32, bytes: u64) -> Ring {
        let first = self.program.slots.len() as Slot;
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.program.slots.extend((0..slots).map(|_| bytes));
        let full = self.program.semaphores;
        self.program.semaphores += 2;
        Ring { first, slots, full, free: full + 1, entries: 0, filled: 0 }
    }

    /// Adds commands that load pieces, one after the other, into the next slot of a ring.
    pub fn load(&mut self, ring: &mut Ring, pieces: impl IntoIterator<Item = Piece>, sharers: u32) -> Entry {
        let mut entry = ring.next();
        let mut at = 0;
        for from in pieces {
            let bytes = from.bytes() as u32;
            let action = Action::Load { from, to: entry.slot, at, sharers };
            self.push(Queue::Load, entry.must_be_free(), action, vec![entry.full], Vec::new());
            ring.fill(&mut entry);
            at += bytes;
        }
        entry
    }

    /// Adds a command of a unit: it reads entries, fills new entries of the rings in `writes` with the given
    /// bytes, and then frees the entries in `frees`.
    pub fn compute<const W: usize>(
        &mut self,
        (work, step): (Work, Step),
        reads: &[Entry],
        writes: [(&mut Ring, u64); W],
        frees: &[Entry],
    ) -> [Entry; W] {
        let queue = if matches!(work, Work::Matrix { .. }) { Queue::Matrix } else { Queue::Vector };
        let mut waits: Vec<_> = reads.iter().map(|e| (e.full, e.ready)).collect();
        let mut signals = Vec::with_capacity(W + frees.len());
        let bytes = writes.each_ref().map(|(_, bytes)| *bytes as u32);
        let entries = writes.map(|(ring, _)| {
            let mut entry = ring.next();
            waits.extend(entry.must_be_free());
            signals.push(entry.full);
            ring.fill(&mut entry);
            entry
        });
        signals.extend(frees.iter().map(|e| e.free));
        let action = Action::Compute {
            work,
            step,
            reads: reads.iter().map(|e| e.slot).collect(),
            writes: entries.iter().map(|e| e.slot).zip(bytes).collect(),
        };
        let frees = frees.iter().map(|e| e.slot).collect();
        self.push(queue, waits, action, signals, frees);
        entries
    }

    /// Adds commands that store consecutive pieces of an entry, and free it.
    pub fn store(&mut self, entry: Entry, pieces: impl IntoIterator<Item = Piece>) {
        let mut pieces = pieces.into_iter().peekable();
        let mut at = 0;
        while let Some(to) = pieces.next() {
            let bytes = to.bytes() as u32;
            let last = pieces.peek().is_none();
            let (signals, frees) =
                if last { (vec![entry.free], vec![entry.slot]) } else { Default::default() };
            let action = Action::Store { from: entry.slot, at, to };
            self.push(Queue::Store, vec![(entry.full, entry.ready)], action, signals, frees);
            at += bytes;
        }
    }

    fn push(
        &mut self,
        queue: Queue,
        waits: Vec<(Semaphore, u32)>,
        action: Action,
        signals: Vec<Semaphore>,
        frees: Vec<Slot>,
    ) {
        self.program.commands.push(Command { queue, waits, action, signals, frees });
    }

    /// Returns the finished program.
    pub fn finish(self) -> TileProgram {
        self.program
    }
}

impl Ring {
    fn next(&mut self) -> Entry {
        let begin = (self.entries + 1).saturating_sub(self.slots);
        let slot = self.first + self.entries % self.slots.max(1);
        self.entries += 1;
        Entry { slot, full: self.full, free: self.free, begin, ready: self.filled }
    }

    fn fill(&mut self, entry: &mut Entry) {
        self.filled += 1;
        entry.ready = self.filled;
    }
}

impl Entry {
    fn must_be_free(&self) -> Vec<(Semaphore, u32)> {
        if self.begin == 0 { Vec::new() } else { vec![(self.free, self.begin)] }
    }
}
