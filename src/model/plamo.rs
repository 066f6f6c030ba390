//! PLaMo 13B (Preferred Networks 2023): Llama with parallel attention and feed-forward blocks. PLaMo 3 (Preferred Networks 2025) has
//! norms before and after each block, and a window in most layers.

use super::Hparams;
use super::network::{Attention, Network, QkNorm};
use crate::program::{Builder, Gate, NormKind, RopePairs};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let rope = n.rope(RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope: Some(&rope), ..n.attention_of() };
        x = n.parallel_layer(x, &attention, |n, x| n.gated_mlp(x, Gate::Silu));
    }
    n.head(x, 1.0);
}

pub(super) fn record_3(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let global_rope = n.rope(RopePairs::Halves);
    let local_rope = n.rope_unscaled(h.rope_freq_base_swa.unwrap_or(h.rope_freq_base), RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let window = h.window(layer, 8);
        let rope = if window.is_some() { &local_rope } else { &global_rope };
        let attention =
            Attention { rope: Some(rope), window, qk_norm: Some(QkNorm::Head), ..n.attention_of() };
        x = n.sandwich_norm_layer(x, &attention, |n, x| n.fused_gated_mlp(x, Gate::Silu));
    }
    n.head(x, 1.0);
}
