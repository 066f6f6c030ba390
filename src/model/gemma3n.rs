//! Gemma 3n (Gemma Team 2025): Gemma 3 on four streams, of which each layer computes one and predicts the others (AltUp, Baykal
//! et al. 2023), with products of low rank beside attention (Laurel, Menghani et al. 2024), inputs of each layer's own for each
//! token, sparse gates in the first layers, and layers at the end that use the KV caches of earlier ones.

use super::Hparams;
use super::network::{Attention, Network, QkNorm};
use crate::program::{Builder, Gate, NormKind, RopePairs};

/// Layers whose gates are sparse, and from how many standard deviations on a gate is not zero: the largest 5 % of a normal
/// distribution. Other runtimes have the same constants.
const SPARSE_LAYERS: u32 = 10;
const DEVIATIONS: f32 = 1.644_853_5;
/// Rank of the products beside attention.
const LAUREL_RANK: u32 = 64;

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let window = Some(n.required("attention.sliding_window", h.sliding_window));
    let length = n.required("embedding_length_per_layer_input", h.embedding_length_per_layer_input);
    n.required("final_logit_softcapping", h.final_logit_softcapping);
    let global_rope = n.rope(RopePairs::Halves);
    let local_rope = n.rope_unscaled(h.rope_freq_base_swa.unwrap_or(10_000.0), RopePairs::Halves);
    let own = n.layers_with_caches(5);
    let x = n.embed((h.embedding_length as f32).sqrt());
    let inputs = n.per_layer_inputs(x, length);
    let mut streams = n.streams(x);
    for layer in 0..h.block_count {
        n.layer(layer);
        let is_local = h.is_windowed(layer, 5);
        let attention = Attention {
            rope: Some(if is_local { &local_rope } else { &global_rope }),
            window: if is_local { window } else { None },
            qk_norm: Some(QkNorm::Head),
            v_norm: true,
            scale: 1.0,
            kv_of: n.cache_of(own, is_local),
            ..n.attention_of()
        };
        let predicted = n.predict(&streams);
        let x = predicted.active;
        let y = n.norm("attn_norm", x);
        let beside = n.laurel(y, LAUREL_RANK);
        let y = n.attention(y, &attention);
        let y = n.norm_as("attn_post_norm", "post_attention_norm", y);
        let y = n.add("attn_residual", x, y);
        let y = n.add("laurel_residual", y, beside);
        let x = n.scale("laurel_scaled", y, std::f32::consts::FRAC_1_SQRT_2);
        let y = n.norm("ffn_norm", x);
        let y = n.sparse_mlp(y, (layer < SPARSE_LAYERS).then_some(DEVIATIONS), Gate::Gelu);
        let y = n.norm_as("ffn_post_norm", "post_ffw_norm", y);
        let x = n.add("ffn_residual", x, y);
        streams = n.correct(predicted, x);
        streams = n.add_layer_input_to_others(streams, inputs, length);
    }
    let x = n.mean_of_streams(streams);
    n.head(x, 1.0);
}
