//! StarCoder2 (Lozhkov et al. 2024) and CodeShell (Xie et al. 2024): GPT-2 with rotary positions and grouped-query attention.

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
        x = n.pre_norm_layer(x, &attention, |n, x| n.mlp(x, Unary::Gelu));
    }
    n.head(x, 1.0);
}
