//! Granite 3 and its mixtures of experts (IBM 2024): Llama with factors on embeddings, scores, residuals and logits. MiniCPM
//! (Hu et al. 2024) has factors in the same places. Most layers of Granite 4's hybrids (IBM 2025) are those of Mamba 2.

use super::Hparams;
use super::network::{Attention, Network};
use crate::program::{Builder, Gate, Gating, NormKind, RopePairs};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let n = Network::new(h, b, NormKind::Rms);
    // Files use this key for models without positions.
    let positions = h.rope_finetuned != Some(false);
    record_with(n, positions);
}

pub(super) fn record_minicpm(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    n.required("embedding_scale", h.embedding_scale);
    n.required("residual_scale", h.residual_scale);
    record_with(n, true);
}

fn record_with(mut n: Network<'_, '_>, positions: bool) {
    let h = n.h;
    let logit_scale = n.required("logit_scale", h.logit_scale);
    let residual_scale = h.residual_scale.unwrap_or(1.0);
    let rope = n.rope(RopePairs::Adjacent);
    let rope = positions.then_some(&rope);
    let mut x = n.embed(h.embedding_scale.unwrap_or(1.0));
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope, ..n.attention_of() };
        let y = n.norm("attn_norm", x);
        let y = match Hparams::at(&h.head_count_kv, layer) {
            0 => n.mamba_2(y),
            _ => n.attention(y, &attention),
        };
        x = n.add_scaled("attn_residual", x, y, residual_scale);
        let y = n.norm("ffn_norm", x);
        let y = match h.expert_count {
            0 => n.gated_mlp(y, Gate::Silu),
            _ => {
                let chosen = n.experts(y, Gating::Softmax, true, Gate::Silu);
                n.add_shared_expert(y, chosen, Gate::Silu)
            }
        };
        x = n.add_scaled("ffn_residual", x, y, residual_scale);
    }
    n.head(x, 1.0 / logit_scale);
}
