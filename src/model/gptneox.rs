//! GPT-NeoX and Pythia (Black et al. 2022; Biderman et al. 2023): GPT-2 with partial rotary embeddings. Attention and the
//! feed-forward block mostly read the same residual stream, each through a norm of its own.

use super::Hparams;
use super::network::{Attention, Network};
use crate::program::{Builder, NormKind, RopePairs, Unary};

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Layer);
    let parallel = n.required("use_parallel_residual", h.use_parallel_residual);
    let rope = n.rope(RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let attention = Attention { rope: Some(&rope), ..n.attention_of() };
        if !parallel {
            x = n.pre_norm_layer(x, &attention, |n, x| n.mlp(x, Unary::Gelu));
            continue;
        }
        let y = n.norm("attn_norm", x);
        let attended = n.attention(y, &attention);
        let y = n.norm("ffn_norm", x);
        let fed = n.mlp(y, Unary::Gelu);
        let y = n.add("ffn_residual", fed, x);
        x = n.add("attn_residual", y, attended);
    }
    n.head(x, 1.0);
}
