//! Decoders whose positions are biases of attention by distance (ALiBi, Press et al. 2022): BLOOM (BigScience 2022) with a norm of
//! embeddings, and MPT (MosaicML 2023), some of whose models have learned positions instead.

use super::Hparams;
use super::network::{Attention, Network};
use crate::program::{Builder, NormKind, Unary};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Layer);
    let mut x = n.embed(1.0);
    if n.has("position_embd.weight") {
        let positions = n.embed_positions();
        x = n.add("embed_residual", x, positions);
    }
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { max_alibi_bias: h.max_alibi_bias, ..n.attention_of() };
        x = n.pre_norm_layer(x, &attention, |n, x| n.mlp(x, Unary::Gelu));
    }
    n.head(x, 1.0);
}

pub(super) fn record_bloom(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Layer);
    let x = n.embed(1.0);
    let mut x = n.norm("token_embd_norm", x);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { max_alibi_bias: Some(8.0), ..n.attention_of() };
        x = n.pre_norm_layer(x, &attention, |n, x| n.mlp(x, Unary::Gelu));
    }
    n.head(x, 1.0);
}
