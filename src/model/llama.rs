//! Llama 2 and 3, Mistral, and Mixtral's mixture of experts (Touvron et al. 2023; Jiang et al. 2023, 2024).

use super::Hparams;
use crate::program::{Builder, Gate, Gating, RopePairs, TensorId};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    b.segment("embedding");
    let embedding = b.weight("token_embd.weight", h.vocab_size, h.embedding_length);
    let mut x = b.embed(embedding, 1.0);
    for layer in 0..h.block_count {
        b.segment(&format!("blk.{layer}"));
        let attended = attention(h, b, layer, x);
        x = b.add("attn_residual", x, attended);
        let norm = b.weight(&format!("blk.{layer}.ffn_norm.weight"), 1, h.embedding_length);
        let normed = b.rms_norm("ffn_norm", x, norm, h.norm_eps);
        let fed = if h.expert_count > 0 {
            experts(h, b, layer, normed)
        } else {
            h.feed_forward(b, layer, normed, Gate::Silu)
        };
        x = b.add("ffn_residual", x, fed);
    }
    let norm = b.weight("output_norm.weight", 1, h.embedding_length);
    let output = h.output_weight(b, embedding);
    h.head(b, x, norm, output);
}

fn attention(h: &Hparams, b: &mut Builder<'_>, layer: u32, x: TensorId) -> TensorId {
    let (heads, kv_heads) = (Hparams::at(&h.head_count, layer), Hparams::at(&h.head_count_kv, layer));
    let (q_cols, k_cols, v_cols) = (heads * h.key_length, kv_heads * h.key_length, kv_heads * h.value_length);
    let name = |part: &str| format!("blk.{layer}.{part}");
    let norm = b.weight(&name("attn_norm.weight"), 1, h.embedding_length);
    let w_q = b.weight(&name("attn_q.weight"), q_cols, h.embedding_length);
    let w_k = b.weight(&name("attn_k.weight"), k_cols, h.embedding_length);
    let w_v = b.weight(&name("attn_v.weight"), v_cols, h.embedding_length);
    let w_o = b.weight(&name("attn_output.weight"), h.embedding_length, heads * h.value_length);
    let b_q = b.optional(&name("attn_q.bias"), 1, q_cols);
    let b_k = b.optional(&name("attn_k.bias"), 1, k_cols);
    let b_v = b.optional(&name("attn_v.bias"), 1, v_cols);
    let b_o = b.optional(&name("attn_output.bias"), 1, h.embedding_length);
    let frequencies = h.rope_frequencies(h.rope_freq_base, h.rope_scaling);
    let factors = b.optional("rope_freqs.weight", 1, h.rope_dimension_count / 2);
    let kv = b.state(h.kv_state(layer, None));

    let x = b.rms_norm("attn_norm", x, norm, h.norm_eps);
    let q = b.linear("q", x, w_q, b_q);
    let k = b.linear("k", x, w_k, b_k);
    let v = b.linear("v", x, w_v, b_v);
    let q = b.rope("q_rope", q, h.key_length, &frequencies, factors, 1.0, RopePairs::Adjacent);
    let k = b.rope("k_rope", k, h.key_length, &frequencies, factors, 1.0, RopePairs::Adjacent);
    b.kv_write(k, v, kv);
    let scale = h.attention_scale.unwrap_or(1.0 / (h.key_length as f32).sqrt());
    let attended = b.attend(q, kv, heads, scale, None, None);
    b.linear("attn_output", attended, w_o, b_o)
}

fn experts(h: &Hparams, b: &mut Builder<'_>, layer: u32, x: TensorId) -> TensorId {
    let (hidden, n) = (Hparams::at(&h.feed_forward_length, layer), h.expert_count);
    let name = |part: &str| format!("blk.{layer}.{part}");
    let router = b.weight(&name("ffn_gate_inp.weight"), n, h.embedding_length);
    let gate = b.expert_weight(&name("ffn_gate_exps.weight"), n, hidden, h.embedding_length);
    let up = b.expert_weight(&name("ffn_up_exps.weight"), n, hidden, h.embedding_length);
    let down = b.expert_weight(&name("ffn_down_exps.weight"), n, h.embedding_length, hidden);
    let logits = b.linear("router", x, router, None);
    let routes = b.route(logits, h.expert_used_count, Gating::Softmax, true, 1.0);
    b.experts(x, routes, [gate, up, down], None, Gate::Silu)
}
