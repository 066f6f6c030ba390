//! Gemma 3 (Gemma Team 2025): norms before and after each block, normalised queries and keys, five layers of sliding-window
//! attention for each global one.

use super::Hparams;
use super::hparams::RopeScaling;
use crate::program::{Builder, Gate, RopePairs, TensorId};

/// Every sixth layer sees the whole context.
const GLOBAL_EVERY: u32 = 6;
/// The rotary base of windowed layers.
const LOCAL_FREQ_BASE: f32 = 10_000.0;
/// The largest model's depth; its attention is scaled by the width of a head of the embedding, the others' by the key's.
const BLOCKS_27B: u32 = 62;

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    b.segment("embedding");
    let embedding = b.weight("token_embd.weight", h.vocab_size, h.embedding_length);
    let mut x = b.embed(embedding, (h.embedding_length as f32).sqrt());
    for layer in 0..h.block_count {
        b.segment(&format!("blk.{layer}"));
        let weight = |b: &mut Builder<'_>, part: &str| {
            b.weight(&format!("blk.{layer}.{part}.weight"), 1, h.embedding_length)
        };
        let (attn_norm, attn_post_norm) = (weight(b, "attn_norm"), weight(b, "post_attention_norm"));
        let (ffn_norm, ffn_post_norm) = (weight(b, "ffn_norm"), weight(b, "post_ffw_norm"));

        let normed = b.rms_norm("attn_norm", x, attn_norm, h.norm_eps);
        let attended = attention(h, b, layer, normed);
        let attended = b.rms_norm("attn_post_norm", attended, attn_post_norm, h.norm_eps);
        x = b.add("attn_residual", x, attended);
        let normed = b.rms_norm("ffn_norm", x, ffn_norm, h.norm_eps);
        let fed = h.feed_forward(b, layer, normed, Gate::Gelu);
        let fed = b.rms_norm("ffn_post_norm", fed, ffn_post_norm, h.norm_eps);
        x = b.add("ffn_residual", x, fed);
    }
    let norm = b.weight("output_norm.weight", 1, h.embedding_length);
    let output = h.output_weight(b, embedding);
    h.head(b, x, norm, output);
}

fn attention(h: &Hparams, b: &mut Builder<'_>, layer: u32, x: TensorId) -> TensorId {
    let (heads, kv_heads) = (Hparams::at(&h.head_count, layer), Hparams::at(&h.head_count_kv, layer));
    let name = |part: &str| format!("blk.{layer}.{part}.weight");
    let w_q = b.weight(&name("attn_q"), heads * h.key_length, h.embedding_length);
    let w_k = b.weight(&name("attn_k"), kv_heads * h.key_length, h.embedding_length);
    let w_v = b.weight(&name("attn_v"), kv_heads * h.value_length, h.embedding_length);
    let w_o = b.weight(&name("attn_output"), h.embedding_length, heads * h.value_length);
    let q_norm = b.weight(&name("attn_q_norm"), 1, h.key_length);
    let k_norm = b.weight(&name("attn_k_norm"), 1, h.key_length);
    let global = (layer + 1).is_multiple_of(GLOBAL_EVERY) || h.sliding_window.is_none();
    let (window, frequencies) = match global {
        true => (None, h.rope_frequencies(h.rope_freq_base, h.rope_scaling)),
        false => (h.sliding_window, h.rope_frequencies(LOCAL_FREQ_BASE, RopeScaling::None)),
    };
    let kv = b.state(h.kv_state(layer, window));

    let q = b.linear("q", x, w_q, None);
    let k = b.linear("k", x, w_k, None);
    let v = b.linear("v", x, w_v, None);
    let q = b.head_norm("q_norm", q, q_norm, h.norm_eps);
    let k = b.head_norm("k_norm", k, k_norm, h.norm_eps);
    let q = b.rope("q_rope", q, h.key_length, &frequencies, None, 1.0, RopePairs::Halves);
    let k = b.rope("k_rope", k, h.key_length, &frequencies, None, 1.0, RopePairs::Halves);
    b.kv_write(k, v, kv);
    let scaled_by =
        if h.block_count == BLOCKS_27B { h.embedding_length / heads.max(1) } else { h.key_length };
    let scale = h.attention_scale.unwrap_or(1.0 / (scaled_by as f32).sqrt());
    let attended = b.attend(q, kv, heads, scale, h.attn_logit_softcapping, None);
    b.linear("attn_output", attended, w_o, None)
}
