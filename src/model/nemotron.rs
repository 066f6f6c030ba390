//! Nemotron-4 and Minitron (Parmar et al. 2024; Muralidharan et al. 2024): layer norms, partial rotary embeddings, and squared
//! ReLU (So et al. 2021). Jais 2 (Anwar et al. 2025) is alike, with biases.

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
        x = n.pre_norm_layer(x, &attention, |n, x| n.mlp(x, Unary::ReluSquared));
    }
    n.head(x, 1.0);
}
