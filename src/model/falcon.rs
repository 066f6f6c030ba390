//! Falcon (Almazrouei et al. 2023): parallel attention and feed-forward blocks, which share a norm in the smaller model and have
//! one each in the larger. Phi-2 (Microsoft 2023) is the smaller one with partial rotary embeddings, and biases everywhere.

use super::Hparams;
use super::network::{Attention, Network};
use crate::program::{Builder, NormKind, RopePairs, Unary};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Layer);
    let rope = n.rope(RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope: Some(&rope), ..n.attention_of() };
        let normed = n.norm("attn_norm", x);
        let to_attend = if n.has("attn_norm_2.weight") { n.norm("attn_norm_2", x) } else { normed };
        let attended = n.attention(to_attend, &attention);
        let fed = n.mlp(normed, Unary::Gelu);
        let blocks = n.add("blocks", fed, attended);
        x = n.add("residual", blocks, x);
    }
    n.head(x, 1.0);
}
