//! The cost of a program: bytes moved and operations, counted from shapes alone.
//!
//! The counts do not depend on the device: each byte of weights and cache counts once per step, even if a
//! backend reads it again or caches it. With a device's peak rates, they give a lower bound of a step's time.

use std::ops::{Add, AddAssign};

use halite_kernels::formats::Kind;

use crate::passes;
use crate::program::{Dim, Op, Program, Slot, TensorId};

/// The tokens of one sequence in a step.
// Exhaustive: a cost needs every number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Position of the first token.
    pub start: u32,
    /// Number of tokens.
    pub tokens: u32,
    /// Number of tokens with outputs.
    pub outputs: u32,
}

/// The cost of an op or a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// Bytes of weights that are read: of an embedding table, the rows of the tokens; of experts, as many as
    /// the tokens may use (an upper bound, as several tokens may use the same).
    pub weight_bytes: u64,
    /// Bytes of the KV cache that are read and written.
    pub kv_bytes: u64,
    /// Bytes of other tensors that are read and written.
    pub activation_bytes: u64,
    /// Operations of products with quantised weights; a multiply-add is two.
    pub integer_ops: u64,
    /// Operations of products with plain weights, and of attention; a multiply-add is two.
    pub float_ops: u64,
}

impl Add for Cost {
    type Output = Cost;

    fn add(self, b: Cost) -> Cost {
        Cost {
            weight_bytes: self.weight_bytes.saturating_add(b.weight_bytes),
            kv_bytes: self.kv_bytes.saturating_add(b.kv_bytes),
            activation_bytes: self.activation_bytes.saturating_add(b.activation_bytes),
            integer_ops: self.integer_ops.saturating_add(b.integer_ops),
            float_ops: self.float_ops.saturating_add(b.float_ops),
        }
    }
}

impl AddAssign for Cost {
    fn add_assign(&mut self, b: Cost) {
        *self = *self + b;
    }
}

impl std::iter::Sum for Cost {
    fn sum<I: Iterator<Item = Cost>>(costs: I) -> Cost {
        costs.fold(Cost::default(), Cost::add)
    }
}

/// Peak rates of a device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Bytes of memory read per second.
    pub bytes_per_s: f64,
    /// Integer operations per second; a multiply-add is two.
    pub integer_ops_per_s: f64,
    /// Floating-point operations per second; a multiply-add is two.
    pub float_ops_per_s: f64,
}

impl Cost {
    /// Returns the bytes of memory traffic: weights and KV cache. Other tensors are small and stay in caches.
    pub fn memory_bytes(&self) -> u64 {
        self.weight_bytes.saturating_add(self.kv_bytes)
    }

    /// Returns the number of all operations.
    pub fn ops(&self) -> u64 {
        self.integer_ops.saturating_add(self.float_ops)
    }

    /// Returns the minimum seconds on a device with these rates: those of memory or of arithmetic, whichever
    /// are more.
    pub fn least_seconds(&self, rates: &Rates) -> f64 {
        (self.memory_bytes() as f64 / rates.bytes_per_s).max(self.arithmetic_seconds(rates))
    }

    /// Returns the seconds of the arithmetic alone.
    pub fn arithmetic_seconds(&self, rates: &Rates) -> f64 {
        self.integer_ops as f64 / rates.integer_ops_per_s + self.float_ops as f64 / rates.float_ops_per_s
    }
}

/// Returns the cost of a program's ops in a step of these sequences. Ops on outputs cost nothing in a step
/// without outputs.
pub fn step(program: &Program, sequences: &[Extent]) -> Cost {
    program.ops().map(|(_, o)| op(program, o, sequences)).sum()
}

/// Returns the cost of one op of a program in a step of these sequences.
pub fn op(program: &Program, op: &Op, sequences: &[Extent]) -> Cost {
    let total =
        |number: fn(&Extent) -> u32| sequences.iter().fold(0u32, |sum, e| sum.saturating_add(number(e)));
    let (step_tokens, step_outputs) = (total(|e| e.tokens), total(|e| e.outputs));
    let is_weight = |id| matches!(program.tensor(id).slot, Slot::Weight(_));
    let mut tensors = Vec::new();
    op.inputs(&mut |id| tensors.push(id));
    op.outputs(&mut |id| tensors.push(id));
    // An op works on all rows of its tensors, except Gather, which reads only the rows that it writes.
    let rows = tensors.iter().filter(|&&id| !is_weight(id));
    let rows = rows.map(|&id| passes::rows(program.tensor(id).rows, step_tokens, step_outputs)).min();
    let rows = rows.unwrap_or(0);
    if rows == 0 {
        return Cost::default();
    }
    let mut cost = Cost::default();
    for id in tensors {
        if is_weight(id) {
            let bytes = program.fixed_bytes(id).unwrap_or(0);
            let (used, of) = used(program, op, id, rows);
            cost.weight_bytes += (bytes / of).saturating_mul(used);
        } else {
            cost.activation_bytes += 4 * rows * u64::from(program.tensor(id).cols);
        }
    }
    match op {
        Op::MatMul { parts, .. } => parts.iter().for_each(|p| cost += product(program, p.weight, rows)),
        Op::BlockMatMul { weight, .. } => {
            let blocks = u64::from(program.tensor(*weight).experts);
            cost += product(program, *weight, rows.saturating_mul(blocks));
        }
        Op::Experts { ids, gate, up, down, .. } => {
            let rows = rows * u64::from(program.tensor(*ids).cols);
            [gate, up, down].into_iter().for_each(|&weight| cost += product(program, weight, rows));
        }
        Op::KvWrite { state, .. } | Op::RopeKv { state, .. } => {
            cost.kv_bytes += rows * position_bytes(program, state.0)
        }
        Op::Conv { weight, state, .. } => {
            cost.float_ops = rows.saturating_mul(2 * elements(program, *weight));
            cost.kv_bytes = state_bytes(program, state.0, sequences);
        }
        Op::Recur { state, .. } => {
            let Some(s) = program.states.get(state.0 as usize) else { return cost };
            // Decay, what is known of a key, update, result.
            cost.float_ops = rows.saturating_mul(7 * s.page_bytes() / 4);
            cost.kv_bytes = state_bytes(program, state.0, sequences);
        }
        Op::Attend { state, heads, .. } => {
            let Some(s) = program.states.get(state.0 as usize) else { return cost };
            let window = u64::from(s.window.unwrap_or(u32::MAX));
            let elements = u64::from(*heads) * (u64::from(s.key_dim) + u64::from(s.value_dim));
            for extent in sequences {
                let (start, tokens) = (u64::from(extent.start), u64::from(extent.tokens));
                let end = start + tokens;
                let first = if s.aligned {
                    start - start % window.max(1)
                } else {
                    (start + 1).saturating_sub(window)
                };
                let read = end - first;
                cost.kv_bytes =
                    cost.kv_bytes.saturating_add(read.saturating_mul(position_bytes(program, state.0)));
                // Each token sees one position more, until the window is full.
                let growing = window.clamp(start, end) - start;
                let seen = match s.aligned {
                    true => seen_before(end, window) - seen_before(start, window),
                    false => {
                        growing * start
                            + growing * (growing + 1) / 2
                            + (tokens - growing).saturating_mul(window)
                    }
                };
                // And those after its own, except that the last tokens have fewer.
                let after = u64::from(s.after).min(tokens - tokens.min(1));
                let later = tokens.saturating_mul(after) - after * (after + 1) / 2;
                let seen = seen.saturating_add(later);
                cost.float_ops = cost.float_ops.saturating_add(seen.saturating_mul(2 * elements));
            }
        }
        _ => {}
    }
    cost
}

/// Returns the positions that all tokens before `end` see in windows side by side.
fn seen_before(end: u64, window: u64) -> u64 {
    let (windows, rest) = (end / window.max(1), end % window.max(1));
    windows * (window * (window + 1) / 2) + rest * (rest + 1) / 2
}

/// Returns the fraction of a weight that an op reads, as numerator and denominator.
fn used(program: &Program, op: &Op, weight: TensorId, rows: u64) -> (u64, u64) {
    let t = program.tensor(weight);
    let table_rows = passes::rows(t.rows, 0, 0).max(1);
    match op {
        Op::Embed { .. } => (rows.min(table_rows), table_rows),
        Op::Experts { ids, gate, .. } => {
            let experts = u64::from(program.tensor(*gate).experts).max(1);
            ((rows * u64::from(program.tensor(*ids).cols)).min(experts), experts)
        }
        _ => (1, 1),
    }
}

/// Returns the operations to multiply `rows` rows with one matrix of a weight.
fn product(program: &Program, weight: TensorId, rows: u64) -> Cost {
    let t = program.tensor(weight);
    let Dim::Fixed(outputs) = t.rows else { return Cost::default() };
    let ops = rows.saturating_mul(2 * u64::from(outputs) * u64::from(t.cols));
    match t.format.kind() {
        Kind::Quantised { .. } => Cost { integer_ops: ops, ..Cost::default() },
        Kind::Float => Cost { float_ops: ops, ..Cost::default() },
    }
}

/// Returns the elements of a weight.
fn elements(program: &Program, weight: TensorId) -> u64 {
    let t = program.tensor(weight);
    passes::rows(t.rows, 0, 0).saturating_mul(t.cols.into())
}

/// Returns the bytes of a recurrent state that a step reads and writes: once for each sequence, and not read at position 0.
fn state_bytes(program: &Program, state: u32, sequences: &[Extent]) -> u64 {
    let bytes = program.states.get(state as usize).map_or(0, |s| s.page_bytes());
    let times = sequences.iter().filter(|e| e.tokens > 0).map(|e| 1 + u64::from(e.start > 0));
    bytes.saturating_mul(times.sum())
}

/// Returns the bytes of one position of a KV cache.
fn position_bytes(program: &Program, state: u32) -> u64 {
    program
        .states
        .get(state as usize)
        .map_or(0, |s| s.page_bytes() / u64::from(crate::program::PAGE_POSITIONS))
}
