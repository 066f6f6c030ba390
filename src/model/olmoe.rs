//! OLMoE (Muennighoff et al. 2024): Llama with queries and keys normalised over all heads, and mixtures of experts whose
//! weights do not add up to 1.

use super::Hparams;
use super::network::{Attention, Network, QkNorm};
use crate::program::{Builder, Gate, Gating, NormKind, RopePairs};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let rope = n.rope(RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope: Some(&rope), qk_norm: Some(QkNorm::Row), ..n.attention_of() };
        x = n.pre_norm_layer(x, &attention, |n, x| n.experts(x, Gating::Softmax, false, Gate::Silu));
    }
    n.head(x, 1.0);
}
