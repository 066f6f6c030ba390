//! PLaMo 13B (Preferred Networks 2023): Llama with parallel attention and feed-forward blocks. PLaMo 2
//! (Preferred Networks 2025) has norms before and after each block, and recurrent layers between those with attention. PLaMo 3
//! (Preferred Networks 2025) has norms before and after each block, and a window in most layers.

use super::Hparams;
use super::network::{Attention, Network, QkNorm};
use crate::program::{Builder, Gate, NormKind, RopePairs};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let rope = n.rope(RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope: Some(&rope), ..n.attention_of() };
        x = n.parallel_layer(x, &attention, |n, x| n.gated_mlp(x, Gate::Silu));
    }
    n.head(x, 1.0);
}

pub(super) fn record_2(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let rope = n.rope(RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let y = n.norm("attn_norm", x);
        // Recurrent layers have no KV heads.
        let y = match Hparams::at(&h.head_count_kv, layer) {
            0 => n.mamba_of_plamo(y),
            _ => {
                let qk_norm = Some(QkNorm::EachHead);
                n.attention(y, &Attention { rope: Some(&rope), qk_norm, ..n.attention_of() })
            }
        };
        let y = n.norm_as("attn_post_norm", "post_attention_norm", y);
        x = n.add("attn_residual", x, y);
        let y = n.norm("ffn_norm", x);
        let y = n.fused_gated_mlp(y, Gate::Silu);
        let y = n.norm_as("ffn_post_norm", "post_ffw_norm", y);
        x = n.add("ffn_residual", x, y);
    }
    n.head(x, 1.0);
}

pub(super) fn record_3(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let global_rope = n.rope(RopePairs::Halves);
    let local_rope = n.rope_unscaled(h.rope_freq_base_swa.unwrap_or(h.rope_freq_base), RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let window = h.window(layer, 8);
        let rope = if window.is_some() { &local_rope } else { &global_rope };
        let attention =
            Attention { rope: Some(rope), window, qk_norm: Some(QkNorm::Head), ..n.attention_of() };
        x = n.sandwich_norm_layer(x, &attention, |n, x| n.fused_gated_mlp(x, Gate::Silu));
    }
    n.head(x, 1.0);
}
