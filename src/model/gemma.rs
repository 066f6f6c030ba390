//! Gemma 1, 2 and 3 (Gemma Team 2024, 2024, 2025). Gemma 1 is Llama with GELU and scaled embeddings. The others have norms
//! before and after each block, and sliding-window attention in most layers. Gemma 2 caps its logits; Gemma 3 normalises
//! queries and keys instead. EmbeddingGemma (Schechter Vera et al. 2025) is Gemma 3 as an encoder.

use super::Hparams;
use super::network::{Attention, Network, QkNorm};
use crate::program::{Builder, Gate, NormKind, RopePairs, Rotation};

pub(super) fn record_1(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let rope = n.rope(RopePairs::Halves);
    let mut x = n.embed((h.embedding_length as f32).sqrt());
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope: Some(&rope), ..n.attention_of() };
        x = n.pre_norm_layer(x, &attention, |n, x| n.gated_mlp(x, Gate::Gelu));
    }
    n.head(x, 1.0);
}

pub(super) fn record_2(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    n.required("attention.sliding_window", h.sliding_window);
    n.required("attn_logit_softcapping", h.attn_logit_softcapping);
    n.required("final_logit_softcapping", h.final_logit_softcapping);
    let rope = n.rope(RopePairs::Halves);
    record(
        n,
        &Gemma { window_period: 2, blocks_27b: 46, qk_norm: None, global_rope: &rope, local_rope: &rope },
    );
}

pub(super) fn record_3(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let global_rope = &n.rope(RopePairs::Halves);
    let local_rope = &n.rope_unscaled(h.rope_freq_base_swa.unwrap_or(10_000.0), RopePairs::Halves);
    let qk_norm = Some(QkNorm::Head);
    record(n, &Gemma { window_period: 6, blocks_27b: 62, qk_norm, global_rope, local_rope });
}

pub(super) fn record_embedding(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let width = n.required("attention.sliding_window", h.sliding_window);
    let global_rope = n.rope(RopePairs::Halves);
    let local_rope = n.rope_unscaled(h.rope_freq_base_swa.unwrap_or(10_000.0), RopePairs::Halves);
    let mut x = n.embed((h.embedding_length as f32).sqrt());
    for layer in 0..h.block_count {
        n.layer(layer);
        let windowed = h.is_windowed(layer, 6);
        let rope = Some(if windowed { &local_rope } else { &global_rope });
        let attention = Attention {
            rope,
            qk_norm: Some(QkNorm::Head),
            ..n.attention_both_ways(windowed.then_some(width))
        };
        x = n.sandwich_norm_layer(x, &attention, |n, x| n.gated_mlp(x, Gate::Gelu));
    }
    n.normed_embeddings(x);
}

/// The differences between Gemma 2 and 3.
struct Gemma<'r> {
    /// Period of the layers: the last of each period sees the whole context.
    window_period: u32,
    /// Layers of the largest model, which scales attention by the embedding's width per head; the others
    /// scale it by the key's.
    blocks_27b: u32,
    qk_norm: Option<QkNorm>,
    global_rope: &'r Rotation,
    local_rope: &'r Rotation,
}

fn record(mut n: Network<'_, '_>, gemma: &Gemma<'_>) {
    let h = n.h;
    let mut x = n.embed((h.embedding_length as f32).sqrt());
    for layer in 0..h.block_count {
        n.layer(layer);
        let window = h.window(layer, gemma.window_period);
        let rope = if window.is_some() { gemma.local_rope } else { gemma.global_rope };
        let scaled_by = match h.block_count == gemma.blocks_27b {
            true => h.embedding_length / Hparams::at(&h.head_count, layer).max(1),
            false => h.key_length,
        };
        let scale = h.attention_scale.unwrap_or(1.0 / (scaled_by as f32).sqrt());
        let attention =
            Attention { rope: Some(rope), window, qk_norm: gemma.qk_norm, scale, ..n.attention_of() };
        x = n.sandwich_norm_layer(x, &attention, |n, x| n.gated_mlp(x, Gate::Gelu));
    }
    n.head(x, 1.0);
}
