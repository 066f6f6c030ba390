//! gpt-oss (OpenAI 2025): mixtures of experts with a clamped gate, attention sinks, and a sliding window in
//! every other layer.

use super::Hparams;
use super::network::{Attention, Network};
use crate::program::{Builder, Gate, Gating, NormKind, RopePairs};

/// The gate in the model card.
const GATE: Gate = Gate::SiluClamped { alpha: 1.702, limit: 7.0 };
/// Period of the layers: the last of each period sees the whole context.
const WINDOW_PERIOD: u32 = 2;

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let sliding_window = n.required("attention.sliding_window", h.sliding_window);
    let rope = n.rope(RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let window = h.is_windowed(layer, WINDOW_PERIOD).then_some(sliding_window);
        let attention = Attention { rope: Some(&rope), window, sinks: true, ..n.attention_of() };
        let y = n.norm("attn_norm", x);
        let y = n.attention(y, &attention);
        x = n.add("attn_residual", x, y);
        let y = n.norm_as("ffn_norm", "post_attention_norm", x);
        let y = n.experts(y, Gating::SoftmaxOfTop, false, GATE);
        x = n.add("ffn_residual", x, y);
    }
    n.head(x, 1.0);
}
