//! Arcee's foundation models (2025): Llama with a feed-forward block without a gate, and squared ReLU (So et al. 2021).

use super::Hparams;
use super::network::{Attention, Network};
use crate::program::{Builder, NormKind, RopePairs, Unary};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let rope = n.rope(RopePairs::Adjacent);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope: Some(&rope), ..n.attention_of() };
        x = n.pre_norm_layer(x, &attention, |n, x| n.mlp(x, Unary::ReluSquared));
    }
    n.head(x, 1.0);
}
