//! Qwen 3.5 (Qwen Team 2026): three of four layers are recurrent, with the gated delta rule; the fourth has attention
//! whose results are gated. Or with mixtures of experts, and a shared expert that has a gate. Qwen3-Next (Qwen Team 2025) is the same
//! with other layouts of weights.

use super::Hparams;
use super::network::{Attention, Network, QkNorm};
use crate::program::{Builder, Gate, Gating, NormKind, RopePairs};

/// Period of the layers: the last of each period has attention.
const ATTENTION_PERIOD: u32 = 4;

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    let mut n = Network::new(h, b, NormKind::Rms);
    n.check_text_sections();
    let rope = n.rope(RopePairs::Halves);
    let mut x = n.embed(1.0);
    for layer in 0..h.block_count {
        n.layer(layer);
        let y = n.norm("attn_norm", x);
        let y = if h.is_recurrent(layer, ATTENTION_PERIOD) {
            n.gated_delta_net(y)
        } else {
            let (rope, qk_norm) = (Some(&rope), Some(QkNorm::Head));
            n.attention(y, &Attention { rope, qk_norm, gated: true, ..n.attention_of() })
        };
        x = n.add("attn_residual", x, y);
        let y = n.norm("post_attention_norm", x);
        let y = match h.expert_count {
            0 => n.gated_mlp(y, Gate::Silu),
            _ => {
                let chosen = n.experts(y, Gating::Softmax, true, Gate::Silu);
                n.add_gated_shared_expert(y, chosen, Gate::Silu)
            }
        };
        x = n.add("ffn_residual", x, y);
    }
    n.head(x, 1.0);
}
