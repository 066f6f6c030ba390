//! DeepSeekMoE (Dai et al. 2024) and Ling (Ling Team 2025): Llama with mixtures of many small experts, and some that all tokens
//! use. The first layers may have none. ERNIE 4.5 (Baidu 2025) differs in what it does with the weights of the chosen ones.
//!
//! dots.llm1 (rednote-hilab 2025), Ling 2.0 (Ling Team 2025) and MiniMax-M2 (MiniMax 2025) also normalise queries and keys, the
//! last one over all heads. Their routers have a bias that balances the experts (Wang et al. 2024), and may have groups.

use super::Hparams;
use super::network::{Attention, Network, QkNorm};
use crate::program::{Builder, Gate, Gating, NormKind, RopePairs};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    record_with(h, b, RopePairs::Adjacent, None, Gating::Softmax, false);
}

pub(super) fn record_ernie(h: &Hparams, b: &mut Builder<'_>) {
    record_with(h, b, RopePairs::Adjacent, None, Gating::Softmax, true);
}

pub(super) fn record_balanced(h: &Hparams, b: &mut Builder<'_>) {
    record_with(h, b, RopePairs::Halves, Some(QkNorm::Head), Gating::Sigmoid, false);
}

pub(super) fn record_minimax(h: &Hparams, b: &mut Builder<'_>) {
    record_with(h, b, RopePairs::Halves, Some(QkNorm::Row), Gating::Sigmoid, true);
}

fn record_with(
    h: &Hparams,
    b: &mut Builder<'_>,
    pairs: RopePairs,
    qk_norm: Option<QkNorm>,
    gating: Gating,
    normalise: bool,
) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let rope = n.rope(pairs);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope: Some(&rope), qk_norm, ..n.attention_of() };
        x = n.pre_norm_layer(x, &attention, |n, x| n.mlp_then_experts(x, gating, normalise, Gate::Silu));
    }
    n.head(x, 1.0);
}
