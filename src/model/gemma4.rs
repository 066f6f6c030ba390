//! Gemma 4 (Gemma Team 2026): Gemma 3 with other heads in layers with a window, normalised values, inputs of each layer's own
//! for each token, and layers at the end that use the KV caches of earlier ones. Or with mixtures of experts.

use super::Hparams;
use super::network::{Attention, Network, QkNorm};
use crate::program::{Builder, Gate, NormKind, RopePairs};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let local = Hparams {
        key_length: h.key_length_swa.unwrap_or(h.key_length),
        value_length: h.value_length_swa.unwrap_or(h.value_length),
        rope_dimension_count: h.rope_dimension_count_swa.unwrap_or(h.rope_dimension_count),
        ..h.clone()
    };
    let mut n = Network::new(h, b, NormKind::Rms);
    if h.sliding_window_pattern.is_none() && h.sliding_window_period.is_none() {
        n.fail("key `gemma4.attention.sliding_window_pattern` is missing".into());
    }
    let window = Some(n.required("attention.sliding_window", h.sliding_window));
    let global_rope = n.rope(RopePairs::Halves);
    n.h = &local;
    let local_rope = n.rope_unscaled(h.rope_freq_base_swa.unwrap_or(10_000.0), RopePairs::Halves);
    n.h = h;
    let mut x = n.embed((h.embedding_length as f32).sqrt());
    let inputs = h.embedding_length_per_layer_input.map(|length| (n.per_layer_inputs(x, length), length));
    let own = n.layers_with_caches(0);
    for layer in 0..h.block_count {
        let is_local = h.is_windowed(layer, 0);
        n.h = if is_local { &local } else { h };
        n.layer(layer);
        let attention = Attention {
            rope: Some(if is_local { &local_rope } else { &global_rope }),
            window: if is_local { window } else { None },
            qk_norm: Some(QkNorm::Head),
            v_norm: true,
            scale: 1.0,
            kv_of: n.cache_of(own, is_local),
            ..n.attention_of()
        };
        x = if n.has("ffn_gate_inp.weight") {
            let x = n.sandwich_norm_attention(x, &attention);
            n.experts_beside_mlp(x, Gate::Gelu)
        } else {
            n.sandwich_norm_layer(x, &attention, |n, x| n.gated_mlp(x, Gate::Gelu))
        };
        if let Some((inputs, length)) = inputs {
            x = n.add_layer_input(x, inputs, length);
        }
        x = n.layer_scale(x);
    }
    n.h = h;
    n.head(x, 1.0);
}
