//! Llama 2 and 3, Mistral and Ministral, and Mixtral's mixture of experts (Touvron et al. 2023; Jiang et al. 2023, 2024). InternLM 2
//! (Cai et al. 2024), ERNIE 4.5's dense models (Baidu 2025) and XVERSE (2023) are the same.

use super::Hparams;
use super::network::{Attention, Network};
use crate::program::{Builder, Gate, Gating, NormKind, RopePairs};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let rope = n.rope(RopePairs::Adjacent);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope: Some(&rope), ..n.attention_of() };
        x = n.pre_norm_layer(x, &attention, |n, x| match h.expert_count {
            0 => n.gated_mlp(x, Gate::Silu),
            _ => n.experts(x, Gating::Softmax, true, Gate::Silu),
        });
    }
    n.head(x, 1.0);
}
