//! Baichuan 7B (Yang et al. 2023) is Llama. The 13B model has attention with linear biases (ALiBi) instead of rotary positions.

use super::network::{Attention, Network};
use super::{Hparams, llama};
use crate::program::{Builder, Gate, NormKind};

/// Layers of the 13B model: files have no other sign.
const LAYERS_13B: u32 = 40;

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    if h.block_count != LAYERS_13B {
        return llama::record(h, b);
    }
    let mut n = Network::new(h, b, NormKind::Rms);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { max_alibi_bias: Some(8.0), ..n.attention_of() };
        x = n.pre_norm_layer(x, &attention, |n, x| n.gated_mlp(x, Gate::Silu));
    }
    n.head(x, 1.0);
}
