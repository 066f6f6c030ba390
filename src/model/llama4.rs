//! Llama 4 (Meta 2025): mixtures of experts in all or some layers. The last of every four layers has no positions, and scores that
//! grow with the position; the others have rotary ones, and see only the chunk of 8192 positions that a token is in.

use super::Hparams;
use super::network::{Attention, Network, QkNorm};
use crate::program::{Builder, Gate, Gating, NormKind, RopePairs};

/// Positions of a chunk, and of a step of the growth of scores. Files do not have them.
pub(crate) const CHUNK: u32 = 8192;
/// How fast scores grow. Files do not have this either.
const GROWTH: f32 = 0.1;
/// Experts of the model that does not normalise queries and keys.
pub(crate) const EXPERTS_OF_MAVERICK: u32 = 128;

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    // Files leave out how large the expert for all tokens is.
    let h = &Hparams { expert_shared_feed_forward_length: h.expert_feed_forward_length, ..h.clone() };
    let mut n = Network::new(h, b, NormKind::Rms);
    let step = n.required("interleave_moe_layer_step", h.interleave_moe_layer_step).max(1);
    let rope = n.rope(RopePairs::Adjacent);
    let qk_norm = (h.expert_count != EXPERTS_OF_MAVERICK).then_some(QkNorm::RotatedUnit);
    let window = (h.positions > CHUNK).then_some(CHUNK);
    let growth = n.growth(GROWTH, CHUNK, 1);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = if h.is_windowed(layer, 4) {
            let (rope, aligned) = (Some(&rope), window.is_some());
            Attention { rope, qk_norm, window, aligned, growth: None, ..n.attention_of() }
        } else {
            Attention { window: None, growth: growth.clone(), ..n.attention_of() }
        };
        let y = n.norm("attn_norm", x);
        let y = n.attention(y, &attention);
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
