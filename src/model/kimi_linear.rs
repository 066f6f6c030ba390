//! Kimi Linear (Kimi Team 2025): most layers are recurrent, with the delta rule whose states decay row by row; the others have
//! latent attention without positions. After the first layers, mixtures of experts with an expert for all tokens.

use super::Hparams;
use super::network::Network;
use crate::program::{Builder, Gate, Gating, NormKind};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let scale = 1.0 / (h.key_length_mla.unwrap_or(h.key_length) as f32).sqrt();
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let y = n.norm("attn_norm", x);
        // Recurrent layers have no KV heads.
        let y = match Hparams::at(&h.head_count_kv, layer) {
            0 => n.kimi_delta_attention(y),
            _ => n.latent_attention(y, None, scale),
        };
        x = n.add("attn_residual", x, y);
        let y = n.norm("ffn_norm", x);
        let y = n.mlp_then_experts(y, Gating::Sigmoid, true, Gate::Silu);
        x = n.add("ffn_residual", x, y);
    }
    n.head(x, 1.0);
}
