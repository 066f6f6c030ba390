//! DeepSeekMoE (Dai et al. 2024) and Ling (Ling Team 2025): Llama with mixtures of many small experts, and some that all tokens
//! use. The first layers may have none.

use super::Hparams;
use super::network::{Attention, Network};
use crate::program::{Builder, Gate, Gating, NormKind, RopePairs};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let rope = n.rope(RopePairs::Adjacent);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope: Some(&rope), ..n.attention_of() };
        x = n.pre_norm_layer(x, &attention, |n, x| n.mlp_then_experts(x, Gating::Softmax, false, Gate::Silu));
    }
    n.head(x, 1.0);
}
