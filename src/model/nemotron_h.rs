//! Nemotron-H (NVIDIA 2025): each layer has one block: of Mamba 2, attention without positions, or a feed-forward block with
//! squared ReLU. Nemotron 3 (NVIDIA 2025) has mixtures of such experts instead.

use super::Hparams;
use super::network::Network;
use crate::program::{Builder, NormKind, Unary};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    // Files have either epsilon.
    let h =
        &Hparams { layer_norm_rms_epsilon: h.layer_norm_rms_epsilon.or(h.layer_norm_epsilon), ..h.clone() };
    let mut n = Network::new(h, b, NormKind::Rms);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let y = n.norm("attn_norm", x);
        let hidden = Hparams::at(&h.feed_forward_length, layer);
        let y = match (hidden, Hparams::at(&h.head_count_kv, layer)) {
            (1.., _) if h.expert_count > 0 => n.squared_relu_experts(y),
            (1.., _) => n.mlp(y, Unary::ReluSquared),
            (0, 0) => n.mamba_2(y),
            (0, _) => n.attention(y, &n.attention_of()),
        };
        x = n.add("residual", x, y);
    }
    n.head(x, 1.0);
}
