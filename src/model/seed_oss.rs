//! Seed-OSS (ByteDance 2025): Qwen 2, whose norm before the feed-forward block has another name in files.

use super::Hparams;
use super::network::{Attention, Network};
use crate::program::{Builder, Gate, NormKind, RopePairs};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let rope = n.rope(RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope: Some(&rope), ..n.attention_of() };
        let y = n.norm("attn_norm", x);
        let y = n.attention(y, &attention);
        x = n.add("attn_residual", x, y);
        let y = n.norm_as("ffn_norm", "post_attention_norm", x);
        let y = n.gated_mlp(y, Gate::Silu);
        x = n.add("ffn_residual", x, y);
    }
    n.head(x, 1.0);
}
