//! GPT-2 (Radford et al. 2019): learned positions, layer norms, biases everywhere. StarCoder (Li et al. 2023) shares one head of
//! keys and values.

use super::Hparams;
use super::network::Network;
use crate::program::{Builder, NormKind, Unary};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Layer);
    let (tokens, positions) = (n.embed(1.0), n.embed_positions());
    let mut x = n.add("embed_residual", tokens, positions);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = n.attention_of();
        x = n.pre_norm_layer(x, &attention, |n, x| n.mlp(x, Unary::Gelu));
    }
    n.head(x, 1.0);
}
