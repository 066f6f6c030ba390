//! Command R, Command R+ and Aya 23 (Cohere 2024): parallel attention and feed-forward blocks, a factor on the logits. Command R+
//! also normalises queries and keys, with weights for each head.

use super::Hparams;
use super::network::{Attention, Network, QkNorm};
use crate::program::{Builder, Gate, NormKind, RopePairs};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Layer);
    let rope = n.rope(RopePairs::Adjacent);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let qk_norm = n.has("attn_q_norm.weight").then_some(QkNorm::EachHead);
        let attention = Attention { rope: Some(&rope), qk_norm, ..n.attention_of() };
        x = n.parallel_layer(x, &attention, |n, x| n.gated_mlp(x, Gate::Silu));
    }
    n.head(x, h.logit_scale.unwrap_or(1.0));
}
