//! Phi-3 and its mixture of experts, Phi-3.5-MoE (Abdin et al. 2024): Llama with fused weights, LongRoPE and,
//! in the mixture, biases everywhere.

use super::Hparams;
use super::network::{Attention, Network};
use crate::program::{Builder, Gate, Gating, NormKind, RopePairs};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    // Phi-3.5-MoE was published with layer norms, but its GGUF files have the epsilon of RMS norms, and other
    // runtimes use RMS norms. Follow them, so that the logits are the same.
    let mut n = Network::new(h, b, NormKind::Rms);
    let rope = n.rope(RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope: Some(&rope), ..n.attention_of() };
        x = n.pre_norm_layer(x, &attention, |n, x| match h.expert_count {
            0 => n.fused_gated_mlp(x, Gate::Silu),
            _ => n.experts(x, Gating::Softmax, true, Gate::Silu),
        });
    }
    n.head(x, 1.0);
}
