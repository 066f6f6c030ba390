//! StableLM (Stability AI 2023; Bellagente et al. 2024): Llama with layer norms and partial rotary
//! embeddings. If the feed-forward block has no norm, it reads the same input as attention. Orion (Chen et al. 2024) is the same
//! with full rotary embeddings.

use super::Hparams;
use super::network::{Attention, Network};
use crate::program::{Builder, Gate, NormKind, RopePairs};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Layer);
    let rope = n.rope(RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope: Some(&rope), ..n.attention_of() };
        let normed = n.norm("attn_norm", x);
        let attended = n.attention(normed, &attention);
        x = n.add("attn_residual", x, attended);
        let y = if n.has("ffn_norm.weight") { n.norm("ffn_norm", x) } else { normed };
        let y = n.gated_mlp(y, Gate::Silu);
        x = n.add("ffn_residual", x, y);
    }
    n.head(x, 1.0);
}
