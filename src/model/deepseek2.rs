//! DeepSeek-V2 and V3 (DeepSeek-AI 2024): latent attention, and DeepSeekMoE's mixtures of experts, of which V3 chooses from groups,
//! by sigmoids. Kimi K2 (Moonshot AI 2025) and GLM-4.7-Flash (Z.ai 2026) have the same layers. MiniCPM3 (OpenBMB 2024) has latent
//! attention in dense layers.

use super::Hparams;
use super::hparams::RopeScaling;
use super::network::Network;
use crate::program::{Builder, Gate, Gating, NormKind, RopePairs};

/// The vocabulary of GLM-4.7-Flash, whose first files do not say that their routers have sigmoids.
const GLM_VOCABULARY: u32 = 154_880;

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let mut rope = n.rope(RopePairs::Adjacent);
    // With YaRN, scores grow with the logarithm of the factor; and so do sines, in files that do not say how much.
    let grown = match h.rope_scaling {
        RopeScaling::Yarn { factor, log_multiplier, .. } if factor > 1.0 => {
            // Files have a tenth of the multiplier.
            let growth = |by: f32| 1.0 + by * factor.ln();
            rope.magnitude = h.rope_attn_factor * if log_multiplier == 0.0 { growth(0.1) } else { 1.0 };
            rope.magnitude * growth(log_multiplier)
        }
        RopeScaling::None | RopeScaling::Yarn { .. } => rope.magnitude,
        other => {
            n.fail(format!("family deepseek2: rotary scaling {other:?} is not supported (none, yarn)"));
            1.0
        }
    };
    let scale = grown * grown / (h.key_length_mla.unwrap_or(h.key_length) as f32).sqrt();
    let gating = if h.vocab_size == GLM_VOCABULARY { Gating::Sigmoid } else { Gating::Softmax };
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let y = n.norm("attn_norm", x);
        let y = n.latent_attention(y, Some(&rope), scale);
        x = n.add("attn_residual", x, y);
        let y = n.norm("ffn_norm", x);
        let y = n.mlp_then_experts(y, gating, false, Gate::Silu);
        x = n.add("ffn_residual", x, y);
    }
    n.head(x, 1.0);
}

/// The factors are those of MiniCPM3-4B; files have none.
pub(super) fn record_minicpm(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let rope = n.rope(RopePairs::Halves);
    let residual_scale = 1.4 / (h.block_count as f32).sqrt();
    let mut x = n.embed(12.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let y = n.norm("attn_norm", x);
        let y = n.latent_attention(y, Some(&rope), 1.0 / (h.key_length as f32).sqrt());
        x = n.add_scaled("attn_residual", x, y, residual_scale);
        let y = n.norm("ffn_norm", x);
        let y = n.gated_mlp(y, Gate::Silu);
        x = n.add_scaled("ffn_residual", x, y, residual_scale);
    }
    n.head(x, 256.0 / h.embedding_length as f32);
}
