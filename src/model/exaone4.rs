//! EXAONE 4 (LG AI Research 2025): OLMo 2 with queries and keys normalised per head. In the larger model, three layers of four
//! have a sliding window and positions; the fourth has neither. K-EXAONE (LG AI Research 2026): the same with norms before the blocks
//! and mixtures of experts.

use super::Hparams;
use super::network::{Attention, Network, QkNorm};
use crate::program::{Builder, Gate, Gating, NormKind, RopePairs};

/// Period of the layers: the last of each period sees the whole context, without positions.
const WINDOW_PERIOD: u32 = 4;

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let base = h.sliding_window.and(h.rope_freq_base_swa).unwrap_or(h.rope_freq_base);
    let rope = n.rope_of(base, RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let window = h.window(layer, WINDOW_PERIOD);
        let rope = (window.is_some() || h.sliding_window.is_none()).then_some(&rope);
        let attention = Attention { rope, window, qk_norm: Some(QkNorm::Head), ..n.attention_of() };
        x = n.result_norm_layer(x, &attention, |n, x| n.gated_mlp(x, Gate::Silu));
    }
    n.head(x, 1.0);
}

pub(super) fn record_moe(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let rope = n.rope(RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let window = h.window(layer, WINDOW_PERIOD);
        let rope = window.is_some().then_some(&rope);
        let attention = Attention { rope, window, qk_norm: Some(QkNorm::Head), ..n.attention_of() };
        x = n.pre_norm_layer(x, &attention, |n, x| n.mlp_then_experts(x, Gating::Sigmoid, false, Gate::Silu));
    }
    n.head(x, 1.0);
}
