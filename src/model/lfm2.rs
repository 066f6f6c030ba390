//! LFM2 and LFM2.5 (Liquid AI 2025): most layers mix tokens by a short convolution between two gates, a few by attention
//! with normalised queries and keys. The larger ones have mixtures of experts.

use super::Hparams;
use super::network::{Attention, Network, QkNorm};
use crate::program::{Builder, Gate, Gating, NormKind, RopePairs};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let taps = n.required("shortconv.l_cache", h.shortconv_l_cache);
    let rope = n.rope(RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let y = n.norm("attn_norm", x);
        let y = if Hparams::at(&h.head_count_kv, layer) == 0 {
            n.short_conv(y, taps)
        } else {
            let attention = Attention { rope: Some(&rope), qk_norm: Some(QkNorm::Head), ..n.attention_of() };
            n.attention(y, &attention)
        };
        x = n.add("operator_residual", x, y);
        let y = n.norm("ffn_norm", x);
        let y = n.mlp_then_experts(y, Gating::Sigmoid, true, Gate::Silu);
        x = n.add("ffn_residual", x, y);
    }
    n.head_with_norm(x, "token_embd_norm", 1.0);
}
