//! Divides a program over several chips that share each layer (tensor parallelism).
//!
//! A product's rows, a layer's heads and a cache's KV heads are divided in equal, consecutive parts, one per chip.
//! Where an op needs all of a divided tensor, the chips exchange their parts: an [`Exchange`].
//!
//! With [`Sums::InOrder`], no sum is divided, so every element is computed by one chip as it would be alone, and the
//! results have the same bits. With [`Sums::Divided`], as Shoeybi et al. 2019 ("Megatron-LM") do, a product of a
//! divided tensor is divided along its sum. That needs half as many exchanges, of sums instead of parts, and the order
//! of the sums differs from one chip's.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::passes;
use crate::program::{
    Dim, FilePart, Op, Part, Parts, Program, Segment, Slot, StateId, Tensor, TensorId, part_as_stored,
};

/// The order of a product's sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Sums {
    /// No sum is divided: the bits are those of one chip.
    #[default]
    InOrder,
    /// Each chip sums its part, and the chips add their sums.
    Divided,
}

/// How chips share each layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Division {
    /// Number of chips.
    pub chips: u32,
    /// Number of groups of chips that hold different experts; divides `chips`. The chips of a group divide each of
    /// their experts. Used with [`Sums::Divided`] only.
    pub expert_groups: u32,
    /// The order of sums.
    pub sums: Sums,
}

crate::setters!(const Division { expert_groups: u32, sums: Sums });

impl Division {
    /// Divides over `chips` chips, in the order of one chip's sums.
    pub const fn over(chips: u32) -> Division {
        Division { chips, expert_groups: 1, sums: Sums::InOrder }
    }
}

/// What chips do to make a tensor whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ExchangeKind {
    /// Every chip gets the parts of all (all-gather).
    Gather,
    /// Every chip gets the sum of all (all-reduce).
    Sum,
    /// Each chip takes its part of a tensor that it has. Nothing is sent.
    Take,
}

/// An exchange between chips, before a segment of [`Share::program`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Exchange {
    /// The segment before which it happens.
    pub before: usize,
    /// What the chips do.
    pub kind: ExchangeKind,
    /// Each chip's own tensor.
    pub from: TensorId,
    /// Its result.
    pub to: TensorId,
    /// For [`ExchangeKind::Gather`] and [`ExchangeKind::Take`]: the number of parts that the tensor is divided in; chip
    /// c of n has part `c * parts / n`.
    pub parts: u32,
}

/// Bytes of a weight of the whole program that a chip's weight has.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct WeightPart {
    /// The weight's slot in the whole program.
    pub weight: usize,
    /// The bytes of it; `None` if they are not consecutive.
    pub bytes: Option<Range<u64>>,
}

/// One chip's share of a program.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Share {
    /// The chip's program. Between exchanges, it runs by itself.
    pub program: Program,
    /// For each segment of the whole program, the chip's segments.
    pub segments: Vec<Range<usize>>,
    /// Exchanges, in order.
    pub exchanges: Vec<Exchange>,
    /// For each weight of the chip's program, where it comes from.
    pub weights: Vec<WeightPart>,
    /// For each tensor in an input or output slot of the whole program, the chip's.
    pub io: Vec<TensorId>,
    /// For each state, the number of parts that its KV heads are divided in.
    pub state_parts: Vec<u32>,
    /// What every chip does alike because it cannot be divided, one line each.
    pub repeated: Vec<String>,
}

/// Returns the share of chip `chip`. All chips have the same ops and exchanges; with [`Sums::Divided`], the first one alone adds biases.
///
/// # Errors
/// [`Error::Argument`] for no chips, a chip beyond them, or groups of experts that do not divide them.
pub fn share(program: &Program, division: Division, chip: u32) -> Result<Share> {
    let Division { chips, expert_groups, .. } = division;
    if chips == 0 || chip >= chips {
        return Err(Error::argument("chip", format!("one of {chips} chips"), chip));
    }
    if expert_groups == 0 || !chips.is_multiple_of(expert_groups) {
        return Err(Error::argument("expert groups", format!("a divisor of {chips} chips"), expert_groups));
    }
    let whole = passes::decompose(program);
    let plan = Wanted::of(&whole, chips);
    let mut sharing = Sharing::new(&whole, division, chip, plan);
    sharing.inputs();
    for segment in &whole.segments {
        sharing.segment(segment)?;
    }
    Ok(sharing.finish())
}

/// How many parts consumers want of each tensor, and of each state.
struct Wanted {
    tensors: Vec<Option<u32>>,
    states: Vec<u32>,
    repeated: Vec<String>,
}

impl Wanted {
    fn of(program: &Program, chips: u32) -> Wanted {
        let mut wanted = Wanted {
            tensors: vec![None; program.tensors.len()],
            states: vec![1; program.states.len()],
            repeated: Vec::new(),
        };
        // Query heads and KV heads are divided together, so that each chip has the KV heads of its query heads.
        let mut queries: HashMap<StateId, u32> = HashMap::new();
        for (_, op) in program.ops() {
            let Op::Attend { state, heads, .. } = op else { continue };
            let Some(s) = program.states.get(state.0 as usize) else { continue };
            let kv = greatest_common_divisor(s.kv_heads, chips);
            let divides = heads.is_multiple_of(chips) && (kv == chips || s.kv_heads == kv);
            let (of_queries, of_state) = if divides { (chips, kv) } else { (1, 1) };
            if !divides {
                wanted.repeat(format!(
                    "attention of {heads} heads with {} KV heads, not divisible by {chips}",
                    s.kv_heads
                ));
            }
            queries.insert(*state, of_queries);
            wanted.states[state.0 as usize] = of_state;
        }
        // From the last op to the first, so that an op's result is wanted before its operands are.
        let ops: Vec<&Op> = program.ops().map(|(_, op)| op).collect();
        for op in ops.into_iter().rev() {
            match op {
                Op::Attend { q, state, .. } => wanted.set(*q, queries.get(state).copied()),
                Op::KvWrite { k, v, state } => {
                    let parts = wanted.states.get(state.0 as usize).copied();
                    wanted.set(*k, parts);
                    wanted.set(*v, parts);
                }
                Op::Rope { x, out, .. } | Op::Unary { x, out, .. } => wanted.set(*x, wanted.get(*out)),
                Op::Norm { x, out, group, .. } => {
                    let parts = wanted.get(*out);
                    let cols = program.tensor(*x).cols;
                    let of_groups = |parts: &u32| (cols / parts).is_multiple_of(*group);
                    wanted.set(*x, parts.filter(of_groups));
                }
                Op::Slice { x, out, group, .. } => {
                    let cols = program.tensor(*x).cols;
                    wanted.set(*x, wanted.get(*out).filter(|parts| (cols / parts).is_multiple_of(*group)));
                }
                Op::Join { a, b, out, group, first } => {
                    let cols = program.tensor(*out).cols;
                    let parts = wanted.get(*out).filter(|parts| (cols / parts).is_multiple_of(*group));
                    wanted.set(*a, parts);
                    let is_shared = program.tensor(*b).cols == group - first;
                    wanted.set(*b, if is_shared { Some(1) } else { parts });
                }
                Op::BlockMatMul { x, weight, out } => {
                    let blocks = program.tensor(*weight).experts;
                    wanted.set(*x, wanted.get(*out).filter(|parts| blocks.is_multiple_of(*parts)));
                }
                // A router is small, and every chip needs all of its result.
                Op::Route { logits, .. } => wanted.set(*logits, Some(1)),
                _ => {}
            }
        }
        wanted
    }

    fn get(&self, id: TensorId) -> Option<u32> {
        self.tensors.get(id.0 as usize).copied().flatten()
    }

    fn set(&mut self, id: TensorId, parts: Option<u32>) {
        if let Some(wanted) = self.tensors.get_mut(id.0 as usize) {
            *wanted = parts.or(*wanted);
        }
    }

    fn repeat(&mut self, what: String) {
        if !self.repeated.contains(&what) {
            self.repeated.push(what);
        }
    }
}

fn greatest_common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

/// A tensor of the chip's program: one of `parts` equal parts of the columns of a tensor of the whole program.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Held {
    id: TensorId,
    parts: u32,
    /// The segment of the whole program that makes it.
    segment: usize,
}

/// Which part of a weight a chip has.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Slice {
    weight: TensorId,
    experts: Range<u32>,
    rows: Range<u32>,
    cols: Range<u32>,
}

struct Sharing<'a> {
    whole: &'a Program,
    division: Division,
    chip: u32,
    wanted: Wanted,
    out: Share,
    /// The forms in which the chip has each tensor of the whole program.
    held: HashMap<TensorId, Vec<Held>>,
    slices: HashMap<Slice, TensorId>,
    segment: String,
}

impl<'a> Sharing<'a> {
    fn new(whole: &'a Program, division: Division, chip: u32, wanted: Wanted) -> Sharing<'a> {
        let states = whole.states.iter().zip(&wanted.states).map(|(state, parts)| {
            let mut state = state.clone();
            state.kv_heads /= parts;
            state
        });
        let program = Program {
            name: whole.name.clone(),
            tensors: Vec::new(),
            states: states.collect(),
            windows: whole.windows.clone(),
            segments: Vec::new(),
            weights: Vec::new(),
            io: Vec::new(),
            outputs: whole.outputs,
        };
        let out = Share {
            program,
            segments: Vec::new(),
            exchanges: Vec::new(),
            weights: Vec::new(),
            io: Vec::new(),
            state_parts: wanted.states.clone(),
            repeated: Vec::new(),
        };
        let (held, slices) = (HashMap::new(), HashMap::new());
        Sharing { whole, division, chip, wanted, out, held, slices, segment: String::new() }
    }

    fn chips(&self) -> u32 {
        self.division.chips
    }

    /// The chip's part of `extent` elements that are divided in `parts`.
    fn range(&self, extent: u32, parts: u32) -> Range<u32> {
        let each = extent / parts;
        let part = self.chip / (self.chips() / parts);
        part * each..(part + 1) * each
    }

    fn push(&mut self, op: Op) {
        if let Some(segment) = self.out.program.segments.last_mut() {
            segment.ops.push(op);
        }
    }

    fn add(&mut self, tensor: Tensor) -> TensorId {
        let program = &mut self.out.program;
        let id = TensorId(program.tensors.len() as u32);
        program.tensors.push(tensor);
        id
    }

    /// A tensor like one of the whole program, with other columns.
    fn scratch(&mut self, like: TensorId, cols: u32, suffix: &str) -> TensorId {
        let like = self.whole.tensor(like).clone();
        self.add(Tensor { name: format!("{}{suffix}", like.name), cols, slot: Slot::Scratch, ..like })
    }

    /// Gives a tensor an input or output slot.
    fn show(&mut self, id: TensorId) {
        let program = &mut self.out.program;
        let slot = Slot::Io(program.io.len() as u32);
        if let Some(t) = program.tensors.get_mut(id.0 as usize)
            && t.slot == Slot::Scratch
        {
            t.slot = slot;
            program.io.push(id);
        }
    }

    /// Starts a segment of the chip's program.
    fn start(&mut self) {
        let done = self.out.program.segments.last().is_none_or(|s| !s.ops.is_empty());
        if done {
            self.out.program.segments.push(Segment { name: self.segment.clone(), ops: Vec::new() });
        }
    }

    /// Makes a tensor of the whole program that an op writes, divided in `parts`.
    fn result(&mut self, id: TensorId, parts: u32) -> TensorId {
        let cols = self.whole.tensor(id).cols / parts;
        let held = self.scratch(id, cols, if parts == 1 { "" } else { ".part" });
        self.hold(id, held, parts);
        held
    }

    fn hold(&mut self, whole: TensorId, id: TensorId, parts: u32) {
        let segment = self.out.segments.len();
        self.held.entry(whole).or_default().push(Held { id, parts, segment });
    }

    /// The number of parts that a tensor is divided in.
    fn parts(&self, id: TensorId) -> u32 {
        self.held.get(&id).and_then(|held| held.first()).map_or(1, |held| held.parts)
    }

    /// Returns a tensor divided in `parts`, after an exchange if the chip does not have it so.
    fn need(&mut self, id: TensorId, parts: u32) -> Result<TensorId> {
        let held = self.held.get(&id).cloned().unwrap_or_default();
        if let Some(found) = held.iter().find(|held| held.parts == parts) {
            return Ok(found.id);
        }
        let Some(&Held { id: from, parts: has, .. }) = held.first() else {
            return Err(Error::Program(format!("tensor `{}` is read first", self.whole.tensor(id).name)));
        };
        if parts == 1 {
            return Ok(self.exchange(ExchangeKind::Gather, id, from, has));
        }
        let whole = self.need(id, 1)?;
        let cols = self.whole.tensor(id).cols / parts;
        let to = self.scratch(id, cols, ".part");
        self.exchanged(ExchangeKind::Take, whole, to, parts);
        self.hold(id, to, parts);
        Ok(to)
    }

    /// Makes a tensor whole.
    fn exchange(&mut self, kind: ExchangeKind, id: TensorId, from: TensorId, parts: u32) -> TensorId {
        let to = self.scratch(id, self.whole.tensor(id).cols, "");
        self.exchanged(kind, from, to, parts);
        self.hold(id, to, 1);
        to
    }

    fn exchanged(&mut self, kind: ExchangeKind, from: TensorId, to: TensorId, parts: u32) {
        self.show(from);
        self.show(to);
        self.start();
        let before = self.out.program.segments.len() - 1;
        self.out.exchanges.push(Exchange { before, kind, from, to, parts });
    }

    /// Returns the chip's slice of a weight.
    fn slice(&mut self, slice: Slice) -> TensorId {
        if let Some(&id) = self.slices.get(&slice) {
            return id;
        }
        let t = self.whole.tensor(slice.weight).clone();
        let Dim::Fixed(all_rows) = t.rows else { return TensorId(u32::MAX) };
        let Slice { weight, experts, rows, cols } = slice.clone();
        let is_whole =
            experts.len() as u32 == t.experts && rows.len() as u32 == all_rows && cols.len() as u32 == t.cols;
        let rows_of_one = t.experts == 1 && cols.len() as u32 == t.cols;
        let elements_of_one = t.experts == 1 && all_rows == 1;
        let whole_matrices = rows.len() as u32 == all_rows && cols.len() as u32 == t.cols;
        let per_block = t.format.block_len() as u64;
        let bytes = |elements: u64| elements / per_block * t.format.block_bytes() as u64;
        let first_row = u64::from(experts.start) * u64::from(all_rows) + u64::from(rows.start);
        let first = first_row * u64::from(t.cols) + u64::from(cols.start);
        let count = experts.len() as u64 * rows.len() as u64 * cols.len() as u64;
        let consecutive = is_whole || rows_of_one || elements_of_one || whole_matrices;
        let range = consecutive.then(|| match is_whole {
            true => 0..self.whole.fixed_bytes(weight).unwrap_or(0),
            false => bytes(first)..bytes(first + count),
        });
        let slot = Slot::Weight(self.out.program.weights.len() as u32);
        let part = if is_whole {
            t.part.clone()
        } else {
            let base = t.part.clone().unwrap_or(FilePart { of: t.name.clone(), first_element: 0 });
            Some(FilePart { first_element: base.first_element + first, ..base })
        };
        let name = if is_whole { t.name.clone() } else { format!("{}.{}", t.name, self.chip) };
        let (experts, cols) = (experts.len() as u32, cols.len() as u32);
        let id =
            self.add(Tensor { name, experts, rows: Dim::Fixed(rows.len() as u32), cols, slot, part, ..t });
        self.out.program.weights.push(id);
        let of = match self.whole.tensor(weight).slot {
            Slot::Weight(n) => n as usize,
            _ => usize::MAX,
        };
        self.out.weights.push(WeightPart { weight: of, bytes: range });
        self.slices.insert(slice, id);
        id
    }

    /// Returns all of a weight.
    fn all(&mut self, weight: TensorId) -> TensorId {
        let t = self.whole.tensor(weight);
        let rows = passes::rows(t.rows, 0, 0) as u32;
        self.slice(Slice { weight, experts: 0..t.experts, rows: 0..rows, cols: 0..t.cols })
    }

    /// Returns the chip's part of a vector.
    fn elements(&mut self, weight: TensorId, parts: u32) -> TensorId {
        let cols = self.range(self.whole.tensor(weight).cols, parts);
        self.slice(Slice { weight, experts: 0..1, rows: 0..1, cols })
    }

    /// Gives every chip the inputs of the program.
    fn inputs(&mut self) {
        let mut inputs = self.whole.io.clone();
        for (_, op) in self.whole.ops() {
            op.outputs(&mut |id| inputs.retain(|input| *input != id));
        }
        for id in inputs {
            let input = self.result(id, 1);
            self.show(input);
        }
    }

    fn segment(&mut self, segment: &Segment) -> Result<()> {
        self.segment = segment.name.clone();
        // A step may leave out a segment, and with it the exchanges of results of segments before.
        for held in self.held.values_mut() {
            let made = held.first().map_or(0, |held| held.segment);
            held.retain(|held| held.segment == made);
        }
        let first = self.out.program.segments.len();
        self.out.program.segments.push(Segment { name: self.segment.clone(), ops: Vec::new() });
        for op in &segment.ops {
            self.op(op)?;
            self.show_results(op)?;
        }
        self.out.segments.push(first..self.out.program.segments.len());
        Ok(())
    }

    /// Makes results whole that the caller reads.
    fn show_results(&mut self, op: &Op) -> Result<()> {
        let mut results = Vec::new();
        op.outputs(&mut |id| {
            if matches!(self.whole.tensor(id).slot, Slot::Io(_)) {
                results.push(id);
            }
        });
        for id in results {
            let whole = self.need(id, 1)?;
            self.show(whole);
        }
        Ok(())
    }

    fn op(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::MatMul { x, parts, outs, .. } => {
                let (Some(&part), Some(&out)) = (parts.first(), outs.first()) else { return Ok(()) };
                self.product(*x, part, out)
            }
            Op::Experts { .. } => self.experts(op),
            Op::Embed { table, index, out, scale } if self.division.sums == Sums::Divided => {
                // Each chip has some columns of the table.
                let t = self.whole.tensor(*table);
                let (rows, cols) = (passes::rows(t.rows, 0, 0) as u32, t.cols);
                let divides = cols.is_multiple_of(self.chips() * t.format.block_len() as u32);
                let parts = if divides { self.chips() } else { 1 };
                let range = self.range(cols, parts);
                let table = self.slice(Slice { weight: *table, experts: 0..1, rows: 0..rows, cols: range });
                let (index, scale) = (*index, *scale);
                let out = self.result(*out, parts);
                self.push(Op::Embed { table, index, out, scale });
                Ok(())
            }
            Op::Attend { q, state, out, heads, scale, growth, softcap, slopes, sinks } => {
                let parts = self.wanted.get(*q).unwrap_or(1);
                let q = self.need(*q, parts)?;
                let sinks = sinks.map(|sinks| self.elements(sinks, parts));
                let out = self.result(*out, parts);
                let range = self.range(*heads, parts);
                let of_range =
                    |slopes: &Arc<[f32]>| slopes.get(range.start as usize..range.end as usize).map(Arc::from);
                let slopes = slopes.as_ref().and_then(of_range);
                let (state, heads, scale, softcap) = (*state, heads / parts, *scale, *softcap);
                let growth = growth.clone();
                self.push(Op::Attend { q, state, out, heads, scale, growth, softcap, slopes, sinks });
                Ok(())
            }
            Op::KvWrite { k, v, state } => {
                let parts = self.wanted.states.get(state.0 as usize).copied().unwrap_or(1);
                let (k, v) = (self.need(*k, parts)?, self.need(*v, parts)?);
                self.push(Op::KvWrite { k, v, state: *state });
                Ok(())
            }
            Op::Join { a, b, out, group, first } => {
                let (parts, last) = (self.parts(*a), group - first);
                let divides = (self.whole.tensor(*a).cols / first).is_multiple_of(parts);
                let parts = if divides { parts } else { 1 };
                let of_b = if self.whole.tensor(*b).cols == last { 1 } else { parts };
                let (a, b) = (self.need(*a, parts)?, self.need(*b, of_b)?);
                let out = self.result(*out, parts);
                self.push(Op::Join { a, b, out, group: *group, first: *first });
                Ok(())
            }
            Op::BlockMatMul { x, weight, out } => {
                let t = self.whole.tensor(*weight);
                let (blocks, rows, cols) = (t.experts, passes::rows(t.rows, 0, 0) as u32, t.cols);
                let parts = Some(self.parts(*x)).filter(|&parts| blocks.is_multiple_of(parts)).unwrap_or(1);
                let experts = self.range(blocks, parts);
                let weight = self.slice(Slice { weight: *weight, experts, rows: 0..rows, cols: 0..cols });
                let (x, out) = (self.need(*x, parts)?, self.result(*out, parts));
                self.push(Op::BlockMatMul { x, weight, out });
                Ok(())
            }
            // Ops on each element, head or group stay divided where all their operands are divided alike.
            _ => {
                let mut operands = Vec::new();
                op.inputs(&mut |id| {
                    if !matches!(self.whole.tensor(id).slot, Slot::Weight(_)) {
                        operands.push(id);
                    }
                });
                let divided = self.divided(op, &operands);
                self.alike(op, divided)
            }
        }
    }

    /// The number of parts in which an op can work, of an op that works on elements, heads or groups.
    fn divided(&self, op: &Op, operands: &[TensorId]) -> u32 {
        let parts = operands.first().map_or(1, |&id| self.parts(id));
        let each = operands.first().map_or(0, |&id| self.whole.tensor(id).cols) / parts;
        let unit = match op {
            Op::Add { .. } | Op::Glu { .. } | Op::Unary { .. } | Op::Gather { .. } => 1,
            Op::Rope { rotation, .. } => rotation.head_dim,
            Op::Norm { group, .. } | Op::Slice { group, .. } => *group,
            Op::Mul { weight, .. } => self.whole.tensor(*weight).cols,
            _ => return 1,
        };
        let alike = operands.iter().all(|&id| self.parts(id) == parts);
        if alike && each.is_multiple_of(unit) { parts } else { 1 }
    }

    /// Repeats an op on operands that are divided in `parts`, and whole weights.
    fn alike(&mut self, op: &Op, parts: u32) -> Result<()> {
        let mut map: HashMap<TensorId, TensorId> = HashMap::new();
        let mut operands = Vec::new();
        op.tensors(|&id, access| operands.push((id, access)));
        for (id, access) in operands {
            let to = match (self.whole.tensor(id).slot, access) {
                (Slot::Weight(_), _) => self.all(id),
                (_, crate::program::Access::Read) => self.need(id, parts)?,
                (_, crate::program::Access::Write) => self.result(id, parts),
            };
            map.insert(id, to);
        }
        let op = op.try_map(|id, _| map.get(id).copied().ok_or(()), |state, _| Ok(*state));
        if let Ok(op) = op {
            self.push(op);
        }
        Ok(())
    }

    /// A product: its rows are divided, or its sum.
    fn product(&mut self, x: TensorId, part: Part, out: TensorId) -> Result<()> {
        let t = self.whole.tensor(part.weight);
        let rows = passes::rows(t.rows, 0, 0) as u32;
        let (cols, has) = (t.cols, self.parts(x));
        // Parts of a sum must be whole blocks, of weights and of activations.
        let block = match t.format.kind() {
            halite_kernels::formats::Kind::Quantised { activation, .. } => activation.block_len(),
            halite_kernels::formats::Kind::Float => 1,
        };
        let block = block.max(t.format.block_len()) as u32;
        if self.division.sums == Sums::Divided
            && has == self.chips()
            && (cols / has).is_multiple_of(block)
            && has > 1
        {
            let x = self.need(x, has)?;
            let range = self.range(cols, has);
            let weight = self.slice(Slice { weight: part.weight, experts: 0..1, rows: 0..rows, cols: range });
            // A bias is added once.
            let bias = part.bias.filter(|_| self.chip == 0).map(|bias| self.all(bias));
            return self.sum(out, |to| Op::product(x, weight, bias, to));
        }
        let parts = self.wanted.get(out).unwrap_or_else(|| self.row_parts(part.weight, rows));
        let parts = if self.can_divide(part.weight, rows, parts) { parts } else { 1 };
        if parts == 1 && self.chips() > 1 && self.wanted.get(out) != Some(1) {
            self.wanted.repeat(format!("products with the {rows} rows of `{}`", t.name_in_layer()));
        }
        let x = self.need(x, 1)?;
        let range = self.range(rows, parts);
        let weight = self.slice(Slice { weight: part.weight, experts: 0..1, rows: range, cols: 0..cols });
        let bias = part.bias.map(|bias| self.elements(bias, parts));
        let out = self.result(out, parts);
        let (mut products, mut outs) = (Parts::new(), arrayvec::ArrayVec::new());
        products.push(Part { weight, bias });
        outs.push(out);
        self.push(Op::MatMul { x, parts: products, epilogue: crate::program::Epilogue::None, outs });
        Ok(())
    }

    /// The largest number of parts that a weight's rows can be divided in.
    fn row_parts(&self, weight: TensorId, rows: u32) -> u32 {
        let mut parts = greatest_common_divisor(rows, self.chips());
        while parts > 1 && !(self.chips().is_multiple_of(parts) && self.can_divide(weight, rows, parts)) {
            parts -= 1;
        }
        parts
    }

    /// Whether a weight's rows can be divided in `parts`, as they are stored.
    fn can_divide(&self, weight: TensorId, rows: u32, parts: u32) -> bool {
        let each = rows / parts;
        rows.is_multiple_of(parts) && part_as_stored(self.whole.tensor(weight).layout, 0..each, rows)
    }

    /// Adds an op that computes each chip's part of a sum, and the exchange.
    fn sum(&mut self, out: TensorId, op: impl FnOnce(TensorId) -> Op) -> Result<()> {
        let cols = self.whole.tensor(out).cols;
        let part = self.scratch(out, cols, ".sum");
        self.push(op(part));
        self.exchange(ExchangeKind::Sum, out, part, self.chips());
        Ok(())
    }

    /// A mixture of experts: with divided sums, each group of chips has other experts, and the chips of a group divide
    /// each of them.
    fn experts(&mut self, op: &Op) -> Result<()> {
        let Op::Experts { x, ids, weights, gate, up, down, biases, out, act } = op else { return Ok(()) };
        let t = self.whole.tensor(*gate);
        let (experts, hidden) = (t.experts, passes::rows(t.rows, 0, 0) as u32);
        let cols = t.cols;
        let groups = self.division.expert_groups;
        let within = self.chips() / groups;
        let block = self.whole.tensor(*down).format.block_len() as u32;
        let divides = experts.is_multiple_of(groups)
            && hidden.is_multiple_of(within)
            && (hidden / within).is_multiple_of(block);
        if self.division.sums == Sums::InOrder || !divides {
            if self.chips() > 1 {
                self.wanted.repeat(format!("{experts} experts of {hidden} rows"));
            }
            return self.alike(op, 1);
        }
        let (group, place) = (self.chip / within, self.chip % within);
        let mine = group * (experts / groups)..(group + 1) * (experts / groups);
        let rows = place * (hidden / within)..(place + 1) * (hidden / within);
        let (x, ids, weights) = (self.need(*x, 1)?, self.need(*ids, 1)?, self.need(*weights, 1)?);
        let of_hidden =
            |weight: TensorId| Slice { weight, experts: mine.clone(), rows: rows.clone(), cols: 0..cols };
        let gate = self.slice(of_hidden(*gate));
        let up = self.slice(of_hidden(*up));
        let down = Slice { weight: *down, experts: mine.clone(), rows: 0..cols, cols: rows.clone() };
        let down = self.slice(down);
        let biases = match biases {
            Some([gate, up, down]) => {
                let mut part = |weight: TensorId, cols: Range<u32>| {
                    self.slice(Slice { weight, experts: 0..1, rows: mine.clone(), cols })
                };
                Some([part(*gate, rows.clone()), part(*up, rows.clone()), part(*down, 0..cols)])
            }
            None => None,
        };
        let act = *act;
        self.sum(*out, |out| Op::Experts { x, ids, weights, gate, up, down, biases, out, act })
    }

    fn finish(mut self) -> Share {
        let whole = |id: TensorId| {
            let held = self.held.get(&id).into_iter().flatten();
            held.clone().find(|held| held.parts == 1).map(|held| held.id)
        };
        let outputs = &mut self.out.program.outputs;
        outputs.logits = outputs.logits.and_then(whole);
        outputs.arg_max = outputs.arg_max.and_then(whole);
        outputs.hidden = outputs.hidden.and_then(whole);
        outputs.top = outputs.top.and_then(|[ids, values]| Some([whole(ids)?, whole(values)?]));
        self.out.io = self.whole.io.iter().filter_map(|&id| whole(id)).collect();
        self.out.repeated = std::mem::take(&mut self.wanted.repeated);
        self.out
    }
}
