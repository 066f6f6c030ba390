//! Qwen 2 and 2.5 (Yang et al. 2024): Llama with biases on queries, keys and values, and mixtures with a gated expert for all
//! tokens. Qwen 3 (Yang et al. 2025): without them, but with normalised queries and keys.
//!
//! EXAONE 3 (LG AI Research 2024) and openPangu Embedded (Chen et al. 2025) differ from Qwen 2 in their biases only. OpenELM
//! (Mehta et al. 2024) is Qwen 3 with other heads and hidden elements in each layer.

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
