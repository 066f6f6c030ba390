//! Granite 3 (IBM 2024): Llama with factors on embeddings, scores, residuals and logits.

use super::Hparams;
use super::network::{Attention, Network};
use crate::program::{Builder, Gate, NormKind, RopePairs};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let logit_scale = n.required("logit_scale", h.logit_scale);
    let residual_scale = h.residual_scale.unwrap_or(1.0);
    let rope = n.rope(RopePairs::Adjacent);
    // Files use this key for models without positions.
    let rope = (h.rope_finetuned != Some(false)).then_some(&rope);
    let mut x = n.embed(h.embedding_scale.unwrap_or(1.0));
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope, ..n.attention_of() };
        let y = n.norm("attn_norm", x);
        let y = n.attention(y, &attention);
        x = n.add_scaled("attn_residual", x, y, residual_scale);
        let y = n.norm("ffn_norm", x);
        let y = n.gated_mlp(y, Gate::Silu);
        x = n.add_scaled("ffn_residual", x, y, residual_scale);
    }
    n.head(x, 1.0 / logit_scale);
}
