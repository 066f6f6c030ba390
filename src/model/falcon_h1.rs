//! Falcon-H1 (Falcon Team 2025): Llama with a block of Mamba 2 beside each attention. Converters apply its factors to the weights.

use super::Hparams;
use super::network::{Attention, Network};
use crate::program::{Builder, Gate, NormKind, RopePairs};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let rope = n.rope(RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let y = n.norm("attn_norm", x);
        let attended = n.attention(y, &Attention { rope: Some(&rope), ..n.attention_of() });
        let scanned = n.mamba_2(y);
        let y = n.add("mixed", attended, scanned);
        x = n.add("mixed_residual", x, y);
        let y = n.norm("ffn_norm", x);
        let y = n.gated_mlp(y, Gate::Silu);
        x = n.add("ffn_residual", x, y);
    }
    n.head(x, 1.0);
}
