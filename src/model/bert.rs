//! BERT (Devlin et al. 2019): an encoder with attention in both directions and norms after the blocks.
//! Nomic's model (Nussbaum et al. 2024) has rotary positions and a gated feed-forward block; its second one (Nussbaum & Duderstadt
//! 2025) has mixtures of experts without gates in every other layer, and Jina's third model (Sturua et al. 2024) no gates. ModernBERT (Warner et al. 2024) has
//! these too, norms before the blocks, and a window in two of three layers. Jina's second model (Günther et al. 2023) has biases of
//! attention by distance (ALiBi) as positions.

use super::network::{Attention, Network, QkNorm};
use super::{Hparams, Pooling};
use crate::gguf::printable;
use crate::program::{Builder, Gate, NormKind, RopePairs, TensorId, Unary};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Layer);
    let mut x = n.embed(1.0);
    // DistilBERT has one type of tokens (Sanh et al. 2019).
    if n.has("token_types.weight") || h.token_type_count.is_some() {
        let kind = n.embed_type();
        x = n.add("embed_type", x, kind);
    }
    let positions = n.embed_positions();
    let x = n.add("embed_positions", x, positions);
    let mut x = n.norm("token_embd_norm", x);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = n.attention_both_ways(None);
        x = n.post_norm_layer(x, &attention, |n, x| n.mlp(x, Unary::GeluErf));
    }
    n.embeddings(x);
}

pub(super) fn record_nomic(h: &Hparams, b: &mut Builder<'_>) {
    record_rotary(h, b, |n, x, _| n.gated_mlp(x, Gate::Silu));
}

pub(super) fn record_nomic_moe(h: &Hparams, b: &mut Builder<'_>) {
    record_rotary(h, b, |n, x, layer| match n.h.moe_every_n_layers {
        // The second layer of each group.
        Some(period) if layer % period == 1 => n.gelu_experts(x),
        _ => n.mlp(x, Unary::GeluErf),
    });
}

pub(super) fn record_jina_3(h: &Hparams, b: &mut Builder<'_>) {
    record_rotary(h, b, |n, x, _| n.mlp(x, Unary::GeluErf));
}

/// BERT with rotary positions; `feed_forward` also gets the layer.
fn record_rotary(
    h: &Hparams,
    b: &mut Builder<'_>,
    feed_forward: impl Fn(&mut Network<'_, '_>, TensorId, u32) -> TensorId,
) {
    let mut n = Network::new(h, b, NormKind::Layer);
    let rope = n.rope(RopePairs::Halves);
    let (tokens, kind) = (n.embed(1.0), n.embed_type());
    let x = n.add("embed_type", tokens, kind);
    let mut x = n.norm("token_embd_norm", x);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope: Some(&rope), ..n.attention_both_ways(None) };
        x = n.post_norm_layer(x, &attention, |n, x| feed_forward(n, x, layer));
    }
    n.embeddings(x);
}

pub(super) fn record_jina(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Layer);
    let (tokens, kind) = (n.embed(1.0), n.embed_type());
    let x = n.add("embed_type", tokens, kind);
    let mut x = n.norm("token_embd_norm", x);
    for layer in 0..h.block_count {
        n.layer(layer);
        let qk_norm = n.has("attn_q_norm.weight").then_some(QkNorm::Row);
        let attention = Attention { max_alibi_bias: Some(8.0), qk_norm, ..n.attention_both_ways(None) };
        let y = n.attention(x, &attention);
        let y = n.add("attn_residual", x, y);
        let mut y = n.norm("attn_output_norm", y);
        if n.has("attn_norm_2.weight") {
            let sum = n.add("attn_residual_2", x, y);
            y = n.norm("attn_norm_2", sum);
        }
        let fed = match n.has("ffn_gate.weight") {
            true => n.gated_mlp(y, Gate::GeluErf),
            false => n.fused_gated_mlp(y, Gate::GeluErf),
        };
        let sum = n.add("ffn_residual", y, fed);
        x = n.norm("layer_output_norm", sum);
    }
    n.embeddings(x);
}

/// The first of so many layers has no window.
const MODERN_PERIOD: u32 = 3;

pub(super) fn record_modern(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Layer);
    let act = match h.hidden_activation.as_deref() {
        None | Some("gelu") => Gate::GeluErf,
        Some("silu") => Gate::Silu,
        Some(other) => {
            n.fail(format!(
                "key `modern-bert.hidden_activation`: expected gelu or silu, got {}",
                printable(other.as_bytes())
            ));
            Gate::GeluErf
        }
    };
    let global_rope = n.rope(RopePairs::Halves);
    let local_rope = n.rope_unscaled(h.rope_freq_base_swa.unwrap_or(10_000.0), RopePairs::Halves);
    let x = n.embed(1.0);
    let mut x = n.norm("token_embd_norm", x);
    for layer in 0..h.block_count {
        n.layer(layer);
        let width = h.sliding_window.filter(|_| h.is_windowed_after_first(layer, MODERN_PERIOD));
        let rope = if width.is_some() { &local_rope } else { &global_rope };
        let attention = Attention { rope: Some(rope), ..n.attention_both_ways(width) };
        // The first layer reads what is normalised already.
        let y = if layer == 0 && !n.has("attn_norm.weight") { x } else { n.norm("attn_norm", x) };
        let y = n.attention(y, &attention);
        let sum = n.add("attn_residual", x, y);
        let y = n.norm("ffn_norm", sum);
        let y = n.fused_gated_mlp(y, act);
        x = n.add("ffn_residual", sum, y);
    }
    match h.pooling_type {
        Some(Pooling::Rank) => n.normed_scores(x),
        _ => n.normed_embeddings(x),
    }
}
