//! BitNet b1.58 (Ma et al. 2024): Llama with a norm before the last product of each block. Its weights are -1, 0 and 1, times a
//! factor of the matrix that the file may keep apart. The published model, `bitnet-b1.58` (Ma et al. 2025), has the square of ReLU.

use super::Hparams;
use super::network::{Attention, Network};
use crate::program::{Builder, Gate, NormKind, RopePairs};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    layers(h, b, &[Gate::Silu]);
}

pub(super) fn record_squared(h: &Hparams, b: &mut Builder<'_>) {
    layers(h, b, &[Gate::Relu, Gate::Relu]);
}

fn layers(h: &Hparams, b: &mut Builder<'_>, gates: &[Gate]) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let rope = n.rope(RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope: Some(&rope), sub_norm: true, ..n.attention_of() };
        x = n.pre_norm_layer(x, &attention, |n, x| n.sub_normed_mlp(x, gates));
    }
    n.head(x, 1.0);
}
