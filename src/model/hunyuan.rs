//! Hunyuan (Tencent 2025) and Maincoder (Maincode 2025): Llama with queries and keys normalised after their rotation. Hunyuan's
//! mixtures also have an expert that all tokens use.

use super::Hparams;
use super::network::{Attention, Network, QkNorm};
use crate::program::{Builder, Gate, Gating, NormKind, RopePairs};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    record_with(h, b, RopePairs::Halves);
}

pub(super) fn record_maincoder(h: &Hparams, b: &mut Builder<'_>) {
    record_with(h, b, RopePairs::Adjacent);
}

fn record_with(h: &Hparams, b: &mut Builder<'_>, pairs: RopePairs) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let rope = n.rope(pairs);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention =
            Attention { rope: Some(&rope), qk_norm: Some(QkNorm::RotatedHead), ..n.attention_of() };
        x = n.pre_norm_layer(x, &attention, |n, x| match h.expert_count {
            0 => n.gated_mlp(x, Gate::Silu),
            _ => {
                let chosen = n.experts(x, Gating::Softmax, true, Gate::Silu);
                n.add_shared_expert(x, chosen, Gate::Silu)
            }
        });
    }
    n.head(x, 1.0);
}
