//! DBRX (Databricks 2024): a mixture of experts with layer norms, and limits on queries, keys and values.

use super::Hparams;
use super::network::{Attention, Network};
use crate::program::{Builder, Gate, Gating, NormKind, RopePairs};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Layer);
    n.required("attention.clamp_kqv", h.attention_clamp_kqv);
    let rope = n.rope(RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let y = n.norm("attn_norm", x);
        let y = n.attention(y, &Attention { rope: Some(&rope), ..n.attention_of() });
        x = n.add("attn_residual", x, y);
        let y = n.norm("attn_output_norm", x);
        let y = n.experts(y, Gating::Softmax, true, Gate::Silu);
        x = n.add("ffn_residual", x, y);
    }
    n.head(x, 1.0);
}
