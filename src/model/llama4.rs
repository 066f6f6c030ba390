//! Llama 4 (Meta 2025): mixtures of experts in all or some layers. The last of every four layers has no positions; the others have
//! rotary ones, and see chunks of 8192 positions. Up to so many, all layers see everything, and there is no attention temperature.

use super::Hparams;
use super::network::{Attention, Network, QkNorm};
use crate::program::{Builder, Gate, Gating, NormKind, RopePairs};

/// Positions of a chunk. Files do not have them.
const CHUNK: u32 = 8192;
/// Experts of the model that does not normalise queries and keys.
const EXPERTS_OF_MAVERICK: u32 = 128;

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    // Files leave out how large the expert for all tokens is.
    let h = &Hparams { expert_shared_feed_forward_length: h.expert_feed_forward_length, ..h.clone() };
    let mut n = Network::new(h, b, NormKind::Rms);
    if h.positions > CHUNK {
        n.fail(format!("family llama4: supported up to {CHUNK} positions, got {}", h.positions));
    }
    let step = n.required("interleave_moe_layer_step", h.interleave_moe_layer_step).max(1);
    let rope = n.rope(RopePairs::Adjacent);
    let qk_norm = (h.expert_count != EXPERTS_OF_MAVERICK).then_some(QkNorm::RotatedUnit);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let (rope, qk_norm) = if h.is_windowed(layer, 4) { (Some(&rope), qk_norm) } else { (None, None) };
        let y = n.norm("attn_norm", x);
        let y = n.attention(y, &Attention { rope, qk_norm, window: None, ..n.attention_of() });
        x = n.add("attn_residual", x, y);
        let y = if (layer + 1).is_multiple_of(step) {
            n.input_weighted_experts(x, Gating::Sigmoid, Gate::Silu)
        } else {
            let y = n.norm("ffn_norm", x);
            n.gated_mlp(y, Gate::Silu)
        };
        x = n.add("ffn_residual", x, y);
    }
    n.head(x, 1.0);
}
