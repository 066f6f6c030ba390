//! Mamba (Gu & Dao 2023) and Mamba 2 (Dao & Gu 2024): layers of one block.

use super::Hparams;
use super::network::Network;
use crate::program::{Builder, NormKind, TensorId};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    record_blocks(h, b, Network::mamba);
}

pub(super) fn record_2(h: &Hparams, b: &mut Builder<'_>) {
    record_blocks(h, b, Network::mamba_2);
}

fn record_blocks<'n, 'b>(
    h: &'n Hparams,
    b: &'n mut Builder<'b>,
    block: impl Fn(&mut Network<'n, 'b>, TensorId) -> TensorId,
) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let y = n.norm("attn_norm", x);
        let y = block(&mut n, y);
        x = n.add("residual", x, y);
    }
    n.head(x, 1.0);
}
