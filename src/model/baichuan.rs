//! Baichuan 7B (Yang et al. 2023) is Llama. The 13B model has attention with linear biases instead of rotary positions.

use super::{Hparams, llama};
use crate::program::Builder;

/// Layers of the 13B model: files have no other sign.
const LAYERS_13B: u32 = 40;

pub(super) fn record(h: &Hparams, b: &mut Builder<'_>) {
    if h.block_count == LAYERS_13B {
        b.fail("Baichuan 13B: attention with linear biases (ALiBi) is not supported".into());
    }
    llama::record(h, b);
}
