//! Mamba 2 (Dao & Gu 2024): layers of one block.

use super::Hparams;
use super::network::Network;
use crate::program::{Builder, NormKind};

pub(super) fn record_2(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let y = n.norm("attn_norm", x);
        let y = n.mamba_2(y);
        x = n.add("residual", x, y);
    }
    n.head(x, 1.0);
}
