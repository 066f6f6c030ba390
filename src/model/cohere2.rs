//! Command R7B and A (Cohere 2024, 2025): parallel attention and feed-forward blocks, a factor on the logits.
//! Three of four layers have a sliding window and positions; the fourth has neither.

use super::Hparams;
use super::network::{Attention, Network};
use crate::program::{Builder, Gate, NormKind, RopePairs};

/// Period of the layers: the last of each period sees the whole context, without positions.
const WINDOW_PERIOD: u32 = 4;

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Layer);
    let sliding_window = n.required("attention.sliding_window", h.sliding_window);
    let logit_scale = n.required("logit_scale", h.logit_scale);
    let rope = n.rope(RopePairs::Adjacent);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let windowed = h.is_windowed(layer, WINDOW_PERIOD);
        let (window, rope) = (windowed.then_some(sliding_window), windowed.then_some(&rope));
        let attention = Attention { rope, window, ..n.attention_of() };
        x = n.parallel_layer(x, &attention, |n, x| n.gated_mlp(x, Gate::Silu));
    }
    n.head(x, logit_scale);
}
