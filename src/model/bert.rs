//! BERT (Devlin et al. 2019): an encoder with attention in both directions and norms after the blocks.
//! Nomic's model (Nussbaum et al. 2024) has rotary positions and a gated feed-forward block.

use super::Hparams;
use super::network::{Attention, Network};
use crate::program::{Builder, Gate, NormKind, RopePairs, Unary};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Layer);
    let (tokens, kind, positions) = (n.embed(1.0), n.embed_type(), n.embed_positions());
    let x = n.add("embed_type", tokens, kind);
    let x = n.add("embed_positions", x, positions);
    let mut x = n.norm("token_embd_norm", x);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { after: u32::MAX, ..n.attention_of() };
        x = n.post_norm_layer(x, &attention, |n, x| n.mlp(x, Unary::GeluErf));
    }
    n.embeddings(x);
}

pub(super) fn record_nomic(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Layer);
    let rope = n.rope(RopePairs::Halves);
    let (tokens, kind) = (n.embed(1.0), n.embed_type());
    let x = n.add("embed_type", tokens, kind);
    let mut x = n.norm("token_embd_norm", x);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope: Some(&rope), after: u32::MAX, ..n.attention_of() };
        x = n.post_norm_layer(x, &attention, |n, x| n.gated_mlp(x, Gate::Silu));
    }
    n.embeddings(x);
}
