//! How much memory things take: what an exporter reserves, a check demands and a step uses.

use halite_kernels::activation::{Activation, SUMS, padded};
use halite_kernels::formats::Kind;
use halite_kernels::kv::CHUNK;

use crate::image::Tensor;
use crate::ops::Op;

/// Words of the codes, scales and sums of a quantised row of `k` elements.
pub(crate) fn quantised_words(to: Activation, k: usize) -> [usize; 3] {
    let width = padded(k);
    [width / 4, width / to.block_len(), width / 256 * SUMS]
}

/// Words of memory that an op's kernels need, beside its operands, for inputs of `rows` rows.
pub fn work_words(op: &Op, rows: u64, tensor: impl Fn(u32) -> Option<Tensor>) -> Option<u64> {
    let quantised = |weight: u32, rows: u64| {
        let weight = tensor(weight)?;
        match weight.format.kind() {
            Kind::Quantised { activation, .. } => {
                let row: usize = quantised_words(activation, weight.cols as usize).iter().sum();
                rows.checked_mul(row as u64)
            }
            Kind::Float => Some(0),
        }
    };
    match *op {
        Op::MatMul { weight, .. } => quantised(weight, rows),
        Op::Experts { gate, up, down, .. } => {
            let (cols, hidden) = (u64::from(tensor(gate)?.cols), u64::from(tensor(down)?.cols));
            let most = quantised(gate, 1)?.max(quantised(up, 1)?).max(quantised(down, 1)?);
            most.checked_add(3 * hidden + cols)
        }
        _ => Some(0),
    }
}

/// Pages of 64 positions that a context has.
pub fn chunks(context: u32) -> u32 {
    context.div_ceil(CHUNK as u32)
}

/// Pages that a state needs: those of the context, or fewer if a step of `tokens` tokens sees no more through a window.
pub fn pages(context: u32, tokens: u32, window: Option<u32>) -> u32 {
    let seen =
        window.map_or(u64::MAX, |window| (u64::from(window) + u64::from(tokens) - 1) / CHUNK as u64 + 2);
    seen.min(chunks(context).into()) as u32
}
