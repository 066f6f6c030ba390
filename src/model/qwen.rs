//! Qwen 2 and 2.5 (Yang et al. 2024): Llama with biases on queries, keys and values, and mixtures with a gated expert for all
//! tokens. Qwen 3 (Yang et al. 2025): without them, but with normalised queries and keys.
//!
//! EXAONE 3 (LG AI Research 2024) and openPangu Embedded (Chen et al. 2025) differ from Qwen 2 in their biases only. OpenELM
//! (Mehta et al. 2024) is Qwen 3 with other heads and hidden elements in each layer. Mellum 2 (JetBrains 2026) is Qwen 3 with
//! windows in most layers. Models that also see (Qwen2-VL, Qwen3-VL) read texts like the others: a token has the same position in
//! all sections.

use super::Hparams;
use super::network::{Attention, Network, QkNorm};
use crate::program::{Builder, Gate, Gating, NormKind, RopePairs, TensorId};

pub(super) fn record_2(h: &Hparams, b: &mut Builder<'_>) {
    record(h, b, None, feed_forward);
}

pub(super) fn record_2_moe(h: &Hparams, b: &mut Builder<'_>) {
    record(h, b, None, |n, x| {
        let chosen = n.experts(x, Gating::Softmax, false, Gate::Silu);
        n.add_gated_shared_expert(x, chosen, Gate::Silu)
    });
}

pub(super) fn record_3(h: &Hparams, b: &mut Builder<'_>) {
    record(h, b, Some(QkNorm::Head), feed_forward);
}

pub(super) fn record_2_vl(h: &Hparams, b: &mut Builder<'_>) {
    if let Some([.., others]) = h.rope_dimension_sections.as_deref()
        && *others > 0
    {
        b.fail(format!(
            "key `{}.rope.dimension_sections`: {others} pairs beyond the third section",
            h.architecture
        ));
    }
    record_2(h, b);
}

pub(super) fn record_3_vl(h: &Hparams, b: &mut Builder<'_>) {
    Network::new(h, b, NormKind::Rms).check_text_sections();
    record_3(h, b);
}

pub(super) fn record_mellum(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let global_rope = n.rope(RopePairs::Halves);
    let local_rope = n.rope_unscaled(h.rope_freq_base, RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let window = h.window(layer, 4);
        let rope = if window.is_some() { &local_rope } else { &global_rope };
        let attention =
            Attention { rope: Some(rope), window, qk_norm: Some(QkNorm::Head), ..n.attention_of() };
        x = n.pre_norm_layer(x, &attention, feed_forward);
    }
    n.head(x, 1.0);
}

fn feed_forward(n: &mut Network<'_, '_>, x: TensorId) -> TensorId {
    match n.h.expert_count {
        0 => n.gated_mlp(x, Gate::Silu),
        _ => n.experts(x, Gating::Softmax, true, Gate::Silu),
    }
}

fn record(
    h: &Hparams,
    b: &mut Builder<'_>,
    qk_norm: Option<QkNorm>,
    feed_forward: impl Fn(&mut Network<'_, '_>, TensorId) -> TensorId,
) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let rope = n.rope(RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope: Some(&rope), qk_norm, ..n.attention_of() };
        x = n.pre_norm_layer(x, &attention, &feed_forward);
    }
    n.head(x, 1.0);
}
