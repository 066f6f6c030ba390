//! Qwen 2 and 2.5 (Yang et al. 2024): Llama with biases on queries, keys and values. Qwen 3 (Yang et al.
//! 2025): without them, but with normalised queries and keys, and mixtures of experts.

use super::Hparams;
use super::network::{Attention, Network, QkNorm};
use crate::program::{Builder, Gate, Gating, NormKind, RopePairs};

pub(super) fn record_2(h: &Hparams, b: &mut Builder<'_>) {
    record(h, b, None);
}

pub(super) fn record_3(h: &Hparams, b: &mut Builder<'_>) {
    record(h, b, Some(QkNorm::Head));
}

fn record(h: &Hparams, b: &mut Builder<'_>, qk_norm: Option<QkNorm>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let rope = n.rope(RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope: Some(&rope), qk_norm, ..n.attention_of() };
        x = n.pre_norm_layer(x, &attention, |n, x| match h.expert_count {
            0 => n.gated_mlp(x, Gate::Silu),
            _ => n.experts(x, Gating::Softmax, true, Gate::Silu),
        });
    }
    n.head(x, 1.0);
}
