//! SmolLM3 (Hugging Face 2025): Llama without positions in every fourth layer (Yang et al. 2025, "RoPE to
//! NoPE and back").

use super::Hparams;
use super::network::{Attention, Network};
use crate::program::{Builder, Gate, NormKind, RopePairs};

/// Period of the layers: the last of each period has no positions.
const NOPE_PERIOD: u32 = 4;

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let rope = n.rope(RopePairs::Adjacent);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let rope = (!(layer + 1).is_multiple_of(NOPE_PERIOD)).then_some(&rope);
        let attention = Attention { rope, ..n.attention_of() };
        x = n.pre_norm_layer(x, &attention, |n, x| n.gated_mlp(x, Gate::Silu));
    }
    n.head(x, 1.0);
}
