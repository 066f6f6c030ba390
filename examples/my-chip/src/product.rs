//! The chip's one command: products of Q8_0 weights with activations that it quantises to Q8_0.
//!
//! The formulas are those of `docs/numeric-contract.md`, in its order, so the results have the bits of the reference.

use halite::f16;

/// Values that share a scale.
pub const BLOCK: usize = 32;
/// A stored block: the scale in half precision, then a byte for each value.
pub const BLOCK_BYTES: usize = 2 + BLOCK;

/// `out[t][r] = x[t] · weight[r] + bias[r]`, with addresses instead of tensors.
pub struct Product {
    /// `[tokens][cols]`, f32.
    pub x: usize,
    /// `[rows][cols / BLOCK]` blocks.
    pub weight: usize,
    /// `[rows]`, f32.
    pub bias: Option<usize>,
    /// `[tokens][rows]`, f32.
    pub out: usize,
    pub tokens: usize,
    pub rows: usize,
    pub cols: usize,
}

impl Product {
    /// Runs on the chip's memory; `None` if an address is outside.
    pub fn run(&self, memory: &mut [u8]) -> Option<()> {
        let row_bytes = self.cols / BLOCK * BLOCK_BYTES;
        for t in 0..self.tokens {
            let x = floats(memory, self.x + 4 * t * self.cols, self.cols)?;
            let x: Vec<_> = x.chunks(BLOCK).map(quantise).collect();
            for r in 0..self.rows {
                let row = memory.get(self.weight + r * row_bytes..)?.get(..row_bytes)?;
                let mut y = dot(row, &x);
                if let Some(bias) = self.bias {
                    y += floats(memory, bias + 4 * r, 1)?[0];
                }
                let out = self.out + 4 * (t * self.rows + r);
                memory.get_mut(out..out + 4)?.copy_from_slice(&y.to_le_bytes());
            }
        }
        Some(())
    }
}

fn floats(memory: &[u8], address: usize, count: usize) -> Option<Vec<f32>> {
    let bytes = memory.get(address..address + 4 * count)?;
    Some(bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect())
}

/// A block of activations: scale and codes.
fn quantise(x: &[f32]) -> (f32, Vec<i32>) {
    let zeros = vec![0; x.len()];
    if x.iter().any(|x| !x.is_finite()) {
        // Whatever depends on this block becomes NaN.
        return (f32::NAN, zeros);
    }
    let largest = x.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
    let inverse = 127.0 / largest;
    if !inverse.is_finite() {
        return (0.0, zeros);
    }
    let codes = x.iter().map(|x| (x * inverse).round_ties_even() as i32).collect();
    (f16::from_f32(largest / 127.0).to_f32(), codes)
}

/// Exact in integers inside a block; one fused multiply-add for each block, in order.
fn dot(row: &[u8], x: &[(f32, Vec<i32>)]) -> f32 {
    row.chunks(BLOCK_BYTES).zip(x).fold(0.0, |acc: f32, (block, (scale, codes))| {
        let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
        let sum: i32 = block[2..].iter().zip(codes).map(|(&w, &x)| i32::from(w as i8) * x).sum();
        (sum as f32).mul_add(d * scale, acc)
    })
}
