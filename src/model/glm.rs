//! ChatGLM 3, GLM-4 (GLM Team 2024) and GLM-4-0414 (Z.ai 2025): Llama with partial rotary embeddings, and with gate and up in
//! one weight. GLM-4-0414 also has norms after its blocks.
//!
//! GLM-4.5 (GLM Team 2025) has mixtures of experts after its first layers, and normalises queries and keys in the larger model.

use super::Hparams;
use super::network::{Attention, Network, QkNorm};
use crate::program::{Builder, Gate, Gating, NormKind, RopePairs};

pub(super) fn record_chat(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let rope = n.rope(RopePairs::Adjacent);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope: Some(&rope), ..n.attention_of() };
        x = n.pre_norm_layer(x, &attention, |n, x| n.fused_gated_mlp(x, Gate::Silu));
    }
    n.head(x, 1.0);
}

pub(super) fn record_4(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    // Files of models that also see have their rows in another order. The coordinates of a text are all the same.
    let sees = h.rope_dimension_sections.iter().flatten().any(|&pairs| pairs > 0);
    let rope = n.rope(if sees { RopePairs::Halves } else { RopePairs::Adjacent });
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope: Some(&rope), ..n.attention_of() };
        x = n.sandwich_norm_layer(x, &attention, |n, x| n.fused_gated_mlp(x, Gate::Silu));
    }
    n.head(x, 1.0);
}

pub(super) fn record_4_moe(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    n.check_text_sections();
    let rope = n.rope(RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let qk_norm = n.has("attn_q_norm.weight").then_some(QkNorm::Head);
        let y = n.norm("attn_norm", x);
        let y = n.attention(y, &Attention { rope: Some(&rope), qk_norm, ..n.attention_of() });
        x = n.add("attn_residual", x, y);
        let y = n.norm("post_attention_norm", x);
        let y = n.mlp_then_experts(y, Gating::Sigmoid, false, Gate::Silu);
        x = n.add("ffn_residual", x, y);
    }
    n.head(x, 1.0);
}
