//! OLMo 2 and 3 (OLMo Team 2024, 2025): norms after each block instead of before, queries and keys normalised
//! over all heads; OLMo 3 has a sliding window in three layers of four.

use super::Hparams;
use super::network::{Attention, Network, QkNorm};
use crate::program::{Builder, Gate, NormKind, RopePairs};

/// Period of the layers: the last of each period sees the whole context.
const WINDOW_PERIOD: u32 = 4;

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let global_rope = n.rope(RopePairs::Halves);
    let local_rope = n.rope_unscaled(h.rope_freq_base_swa.unwrap_or(h.rope_freq_base), RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let window = h.window(layer, WINDOW_PERIOD);
        let rope = if window.is_some() { &local_rope } else { &global_rope };
        let attention =
            Attention { rope: Some(rope), window, qk_norm: Some(QkNorm::Row), ..n.attention_of() };
        x = n.result_norm_layer(x, &attention, |n, x| n.gated_mlp(x, Gate::Silu));
    }
    n.head(x, 1.0);
}
