//! What ops ask of a device that is not simulated. It does not depend on the device, so it is counted once for many of them.

use halite_kernels::formats::Format;

use super::kernel::{self, Kernel};
use crate::chip::file_bits;
use crate::shape;
use halite::cost::{self, Cost, Extent};
use halite::passes;
use halite::program::{Op, Part, Program};

/// A kernel and its stored operands.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    /// The kernel.
    pub kernel: Kernel,
    /// Formats of the weights, or that of the KV cache.
    pub formats: Vec<Format>,
    /// Mean bits per value of these, scales included.
    pub bits: f64,
}

/// The work of an op in a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Work {
    /// Bytes and operations.
    pub cost: Cost,
    /// Bytes of weights that are read: of experts, those of the distinct ones that tokens are expected to choose.
    pub weight_bytes: f64,
    /// Format of the weights, if the op multiplies them.
    pub multiplied: Option<Format>,
    /// Whether it is attention.
    pub attends: bool,
    /// The kernels that multiply.
    pub kernels: Vec<Asked>,
}

impl Work {
    /// Counts the work of an op for some sequences; none if it does nothing.
    pub fn of(program: &Program, op: &Op, sequences: &[Extent]) -> Option<Work> {
        let cost = cost::op(program, op, sequences);
        if cost == Cost::default() {
            return None;
        }
        let tokens = sequences.iter().fold(0u32, |sum, e| sum.saturating_add(e.tokens));
        let rows = |x| passes::rows(program.tensor(x).rows, tokens, sequences.len() as u32);
        let weight_bytes = cost.weight_bytes as f64;
        let mut work = Work { cost, weight_bytes, multiplied: None, attends: false, kernels: Vec::new() };
        let mut add = |kernel, formats: Vec<Format>, bits| {
            work.kernels.push(Asked { kernel, formats, bits });
        };
        match op {
            Op::MatMul { x, parts, .. } => {
                let columns = |p: &Part| passes::rows(program.tensor(p.weight).rows, 0, 0);
                let n: u64 = parts.iter().map(columns).sum();
                let format = |p: &Part| program.tensor(p.weight).format;
                let bits = parts.iter().map(|p| columns(p) as f64 * file_bits(format(p))).sum::<f64>();
                let kernel = Kernel::MatMul { m: rows(*x), n, k: program.tensor(*x).cols.into() };
                add(kernel, parts.iter().map(format).collect(), bits / n.max(1) as f64);
                work.multiplied = parts.first().map(format);
            }
            Op::BlockMatMul { x, weight, .. } => {
                // As one product with all matrices, which has as many weights and as many operations.
                let t = program.tensor(*weight);
                let n = u64::from(t.experts) * passes::rows(t.rows, 0, 0);
                let kernel = Kernel::MatMul { m: rows(*x), n, k: t.cols.into() };
                add(kernel, vec![t.format], file_bits(t.format));
                work.multiplied = Some(t.format);
            }
            Op::Experts { ids, gate, up, down, .. } => {
                let weights = [gate, up, down].map(|weight| program.tensor(*weight));
                let (held, each) = (f64::from(weights[0].experts), program.tensor(*ids).cols);
                // Others may have the rest of the experts.
                let all = shape::routed(program, *ids).map_or(held, f64::from);
                let share = held / all.max(1.0);
                let pairs = f64::from(tokens) * f64::from(each);
                let experts = share * kernel::distinct_experts(all, each.into(), tokens.into());
                let kernel = Kernel::Experts {
                    experts: (experts.round() as u64).max(1),
                    rows: (pairs * share).ceil() as u64,
                    columns: weights[0].cols.into(),
                    hidden: passes::rows(weights[0].rows, 0, 0),
                };
                let bits = weights.iter().map(|w| file_bits(w.format)).sum::<f64>() / 3.0;
                add(kernel, weights.iter().map(|w| w.format).collect(), bits);
                work.weight_bytes *= experts / pairs.min(held).max(1.0);
                work.multiplied = Some(weights[0].format);
            }
            Op::Attend { state, heads, .. } => {
                let state = program.states.get(state.0 as usize)?;
                let (heads, kv_heads): (u64, u64) = ((*heads).into(), state.kv_heads.into());
                let head_dim = u64::from(state.key_dim);
                let window = state.window.unwrap_or(u32::MAX);
                // Positions before the first that its token sees.
                let before = |e: &Extent| match state.aligned {
                    true => e.start % window.max(1),
                    false => e.start.min(window),
                };
                let mut add = |kernel| add(kernel, vec![state.format], file_bits(state.format));
                let (one, many): (Vec<&Extent>, Vec<_>) = sequences.iter().partition(|e| e.tokens == 1);
                if let Some(longest) = one.iter().map(|e| before(e).saturating_add(1)).max() {
                    let (batch, kv_len) = (one.len() as u64, longest.min(window).into());
                    add(Kernel::Attention { batch, heads, kv_heads, head_dim, kv_len });
                }
                for alike in many.chunk_by(|a, b| a == b) {
                    let one = alike[0];
                    let ops = cost::op(program, op, &[*one]).float_ops;
                    let tokens = u64::from(one.tokens);
                    let kv_len = u64::from(before(one)) + tokens;
                    let per_pair = 2 * heads * u64::from(state.key_dim + state.value_dim);
                    let seen = ops / per_pair.max(1);
                    let batch = alike.len() as u64;
                    add(Kernel::Prefill { batch, heads, kv_heads, head_dim, tokens, kv_len, seen });
                }
                work.attends = true;
            }
            _ => {}
        }
        Some(work)
    }
}

/// The distinct works of some steps.
#[derive(Debug, Clone, Default)]
pub struct Works {
    /// Each work once.
    pub distinct: Vec<Work>,
    /// For each step, its works by number, and how many times each comes.
    steps: Vec<Vec<(usize, u32)>>,
}

impl Works {
    /// Adds the ops of a step. `spans` has the first position and number of tokens of each sequence, which has one output.
    pub fn add(&mut self, program: &Program, spans: &[(u32, u32)]) {
        let sequences = extents(spans);
        let mut step: Vec<(usize, u32)> = Vec::new();
        for work in program.greedy_ops().filter_map(|(_, op)| Work::of(program, op, &sequences)) {
            let known = self.distinct.iter().position(|known| *known == work);
            let at = known.unwrap_or_else(|| {
                self.distinct.push(work);
                self.distinct.len() - 1
            });
            match step.iter_mut().find(|(known, _)| *known == at) {
                Some((_, count)) => *count += 1,
                None => step.push((at, 1)),
            }
        }
        self.steps.push(step);
    }

    /// Sums up what each of the distinct works takes, for each step.
    pub fn sums<'a>(&'a self, each: &'a [f64]) -> impl Iterator<Item = f64> {
        self.steps.iter().map(|step| step.iter().map(|(at, n)| f64::from(*n) * each[*at]).sum())
    }
}

/// The extents of a step's sequences with one output each.
pub fn extents(spans: &[(u32, u32)]) -> Vec<Extent> {
    spans.iter().map(|&(start, tokens)| Extent { start, tokens, outputs: 1 }).collect()
}
