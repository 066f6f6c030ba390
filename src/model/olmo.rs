//! OLMo (Groeneveld et al. 2024): Llama with layer norms that have no weights. Some models clamp queries, keys and values.

use super::Hparams;
use super::network::{Attention, Network};
use crate::program::{Builder, Gate, NormKind, RopePairs};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Layer).without_norm_weights();
    let rope = n.rope(RopePairs::Adjacent);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope: Some(&rope), ..n.attention_of() };
        x = n.pre_norm_layer(x, &attention, |n, x| n.gated_mlp(x, Gate::Silu));
    }
    n.head(x, 1.0);
}
