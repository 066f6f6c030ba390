//! SmallThinker (Song et al. 2025): the router reads a layer's input, so that experts load during attention. The first of four
//! layers sees the whole context, without positions; the others have a sliding window.

use super::Hparams;
use super::network::{Attention, Network};
use crate::program::{Builder, Gate, Gating, NormKind, RopePairs};

/// Period of the layers: the first of each period sees the whole context, without positions.
const WINDOW_PERIOD: u32 = 4;

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let rope = n.rope(RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        // A model without a window has positions in all layers.
        let whole = h.sliding_window.is_some() && layer.is_multiple_of(WINDOW_PERIOD);
        let (window, rope) = if whole { (None, None) } else { (h.sliding_window, Some(&rope)) };
        let attention = Attention { rope, window, ..n.attention_of() };
        let input = x;
        x = n.pre_norm_layer(x, &attention, |n, x| {
            n.experts_routed_by(input, x, Gating::Softmax, true, Gate::Relu)
        });
    }
    n.head(x, 1.0);
}
