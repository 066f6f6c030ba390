//! Hyper-parameters from GGUF metadata, checked.

use std::sync::Arc;

use halite_kernels::formats::Format;

use crate::error::{Error, Result};
use crate::gguf::{Gguf, printable};
use crate::program::{Builder, Dim, Gate, State, TensorId};

/// Most layers that a model may have.
const MAX_LAYERS: u32 = 1024;
/// Most elements of a row, heads or vocabulary entries.
const MAX_EXTENT: u32 = 1 << 24;

/// Most elements of a head's key or value.
const MAX_HEAD_LENGTH: u32 = 1 << 12;

/// What the families share, under the names of the GGUF keys.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub struct Hparams {
    pub architecture: String,
    pub context_length: u32,
    pub embedding_length: u32,
    pub block_count: u32,
    /// One for each layer.
    pub feed_forward_length: Vec<u32>,
    /// One for each layer.
    pub head_count: Vec<u32>,
    /// One for each layer.
    pub head_count_kv: Vec<u32>,
    pub key_length: u32,
    pub value_length: u32,
    pub vocab_size: u32,
    /// Added under the root of norms.
    pub norm_eps: f32,
    /// Rotated elements of a head.
    pub rope_dimension_count: u32,
    pub rope_freq_base: f32,
    pub rope_scaling: RopeScaling,
    /// Positions that windowed layers look back.
    pub sliding_window: Option<u32>,
    pub attention_scale: Option<f32>,
    pub attn_logit_softcapping: Option<f32>,
    pub final_logit_softcapping: Option<f32>,
    pub expert_count: u32,
    pub expert_used_count: u32,
    /// How the KV cache is stored; a choice of the caller.
    pub kv_format: Format,
}

/// How rotary frequencies are stretched beyond the training context.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not.
    None,
    /// Positions are divided by a factor (Chen et al. 2023).
    Linear {
        /// The factor.
        factor: f32,
    },
}

impl Hparams {
    /// Reads and checks the metadata.
    ///
    /// # Errors
    /// [`Error::Gguf`] for missing or mistyped keys, [`Error::Model`] for values out of range.
    pub fn read(gguf: &Gguf) -> Result<Hparams> {
        let architecture = gguf.str("general.architecture")?.to_owned();
        let key = |name: &str| format!("{architecture}.{name}");
        let ranged = |name: &str, value: u32, most: u32| {
            if (1..=most).contains(&value) {
                return Ok(value);
            }
            Err(Error::Model(format!("key `{}`: expected 1 to {most}, got {value}", key(name))))
        };
        let required = |name: &str, most: u32| ranged(name, gguf.u32(&key(name))?, most);

        let block_count = required("block_count", MAX_LAYERS)?;
        let layers = block_count as usize;
        let per_layer = |name: &str| -> Result<Option<Vec<u32>>> {
            let values = gguf.optional_u32_per_layer(&key(name), layers)?;
            for &value in values.iter().flatten() {
                ranged(name, value, MAX_EXTENT)?;
            }
            Ok(values)
        };
        let embedding_length = required("embedding_length", MAX_EXTENT)?;
        let missing = |name: &str| gguf.missing(&key(name));
        let head_count = per_layer("attention.head_count")?.ok_or_else(|| missing("attention.head_count"))?;
        let head_count_kv = per_layer("attention.head_count_kv")?.unwrap_or_else(|| head_count.clone());
        for (&heads, &kv) in head_count.iter().zip(&head_count_kv) {
            if heads % kv != 0 {
                let message = format!("{heads} attention heads are not a multiple of {kv} KV heads");
                return Err(Error::Model(message));
            }
        }
        let lengths = ["attention.key_length", "attention.value_length"];
        let defaulted = lengths.iter().any(|name| !gguf.metadata().iter().any(|(k, _)| *k == key(name)));
        if defaulted && let Some(heads) = head_count.iter().find(|&&heads| heads > embedding_length) {
            let message = format!(
                "key `{}`: expected at most the embedding's {embedding_length} elements, got {heads}",
                key("attention.head_count")
            );
            return Err(Error::Model(message));
        }
        let default_length = embedding_length / head_count.first().copied().unwrap_or(1).max(1);
        let length = |name: &str| {
            ranged(name, gguf.optional_u32(&key(name))?.unwrap_or(default_length), MAX_HEAD_LENGTH)
        };
        let key_length = length("attention.key_length")?;
        let value_length = length("attention.value_length")?;
        let heads = head_count.iter().max().copied().unwrap_or(0);
        let head_length = key_length.max(value_length);
        if u64::from(heads) * u64::from(head_length) > MAX_EXTENT.into() {
            let message = format!(
                "{heads} attention heads of {head_length} elements: expected at most {MAX_EXTENT} in all"
            );
            return Err(Error::Model(message));
        }
        let rope_dimension_count = ranged(
            "rope.dimension_count",
            gguf.optional_u32(&key("rope.dimension_count"))?.unwrap_or(key_length),
            MAX_HEAD_LENGTH,
        )?;
        if rope_dimension_count % 2 != 0 || rope_dimension_count > key_length {
            let name = key("rope.dimension_count");
            let message = format!(
                "key `{name}`: expected an even number up to {key_length}, got {rope_dimension_count}"
            );
            return Err(Error::Model(message));
        }
        let rope_freq_base = gguf.optional_f32(&key("rope.freq_base"))?.unwrap_or(10_000.0);
        if rope_freq_base <= 0.0 {
            let message =
                format!("key `{}`: expected a positive number, got {rope_freq_base}", key("rope.freq_base"));
            return Err(Error::Model(message));
        }
        let norm_eps = match gguf.optional_f32(&key("attention.layer_norm_rms_epsilon"))? {
            Some(eps) => eps,
            None => gguf
                .optional_f32(&key("attention.layer_norm_epsilon"))?
                .ok_or_else(|| missing("attention.layer_norm_rms_epsilon"))?,
        };
        let vocab_size = match gguf.optional_u32(&key("vocab_size"))? {
            Some(size) => size,
            None => match gguf.optional_strings("tokenizer.ggml.tokens")? {
                Some(tokens) => tokens.len() as u32,
                None => {
                    gguf.tensor("token_embd.weight").and_then(|t| t.record.dims.get(1).copied()).unwrap_or(0)
                        as u32
                }
            },
        };
        ranged("vocab_size", vocab_size, MAX_EXTENT)?;
        let expert_count = gguf.optional_u32(&key("expert_count"))?.unwrap_or(0);
        let expert_used_count = gguf.optional_u32(&key("expert_used_count"))?.unwrap_or(0);
        if expert_used_count > expert_count
            || expert_count as usize > halite_kernels::rows::MAX_EXPERTS
            || (expert_count > 0 && expert_used_count == 0)
        {
            let message = format!(
                "{expert_used_count} experts used of {expert_count}: expected 1 to all of at most 1024"
            );
            return Err(Error::Model(message));
        }
        Ok(Hparams {
            context_length: required("context_length", u32::MAX)?,
            embedding_length,
            block_count,
            feed_forward_length: per_layer("feed_forward_length")?
                .ok_or_else(|| missing("feed_forward_length"))?,
            head_count,
            head_count_kv,
            key_length,
            value_length,
            vocab_size,
            norm_eps,
            rope_dimension_count,
            rope_freq_base,
            rope_scaling: rope_scaling(gguf, &architecture)?,
            sliding_window: gguf.optional_u32(&key("attention.sliding_window"))?.filter(|&w| w > 0),
            attention_scale: gguf.optional_f32(&key("attention.scale"))?.filter(|&s| s != 0.0),
            attn_logit_softcapping: gguf.optional_f32(&key("attn_logit_softcapping"))?.filter(|&c| c > 0.0),
            final_logit_softcapping: gguf.optional_f32(&key("final_logit_softcapping"))?.filter(|&c| c > 0.0),
            expert_count,
            expert_used_count,
            kv_format: Format::F16,
            architecture,
        })
    }

    /// A layer's value of a per-layer list.
    pub(crate) fn at(list: &[u32], layer: u32) -> u32 {
        list.get(layer as usize).copied().unwrap_or(0)
    }

    /// The KV cache of a layer.
    pub(crate) fn kv_state(&self, layer: u32, window: Option<u32>) -> State {
        State {
            name: format!("kv.{layer}"),
            kv_heads: Hparams::at(&self.head_count_kv, layer),
            key_dim: self.key_length,
            value_dim: self.value_length,
            format: self.kv_format,
            window,
        }
    }

    /// Radians per position of each rotated pair: `base^(-2i / dims)`, divided by the scaling factor.
    pub(crate) fn rope_frequencies(&self, base: f32, scaling: RopeScaling) -> Arc<[f32]> {
        let dims = self.rope_dimension_count;
        let factor = match scaling {
            RopeScaling::None => 1.0,
            RopeScaling::Linear { factor } => f64::from(factor),
        };
        (0..dims / 2)
            .map(|i| (f64::from(base).powf(-f64::from(2 * i) / f64::from(dims)) / factor) as f32)
            .collect()
    }

    /// `[1, cols]` of the vocabulary's embedding table, which is also the output matrix where a file has none of its own.
    pub(crate) fn output_weight(&self, b: &mut Builder<'_>, embedding: TensorId) -> TensorId {
        let name = "output.weight";
        if b.has(name) { b.weight(name, self.vocab_size, self.embedding_length) } else { embedding }
    }

    /// The gated feed-forward block that most families share: `down(act(gate x) * (up x))`.
    pub(crate) fn feed_forward(&self, b: &mut Builder<'_>, layer: u32, x: TensorId, act: Gate) -> TensorId {
        let hidden = Hparams::at(&self.feed_forward_length, layer);
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let w_gate = b.weight(&name("ffn_gate"), hidden, self.embedding_length);
        let w_up = b.weight(&name("ffn_up"), hidden, self.embedding_length);
        let w_down = b.weight(&name("ffn_down"), self.embedding_length, hidden);
        let gate = b.linear("ffn_gate", x, w_gate, None);
        let up = b.linear("ffn_up", x, w_up, None);
        let y = b.glu(gate, up, act);
        b.linear("ffn_down", y, w_down, None)
    }

    /// The end of every program: the rows that are wanted, their logits, and in a last segment the most likely token.
    pub(crate) fn head(&self, b: &mut Builder<'_>, x: TensorId, norm: TensorId, output: TensorId) {
        b.segment("output");
        let x = b.select(x);
        let x = b.rms_norm("norm", x, norm, self.norm_eps);
        let mut logits = b.linear("matmul", x, output, None);
        if let Some(cap) = self.final_logit_softcapping {
            logits = b.map("softcap", logits, crate::program::Unary::SoftCap(cap));
        }
        b.name(logits, super::outputs::LOGITS);
        b.output(logits);
        b.segment("argmax");
        let best = b.arg_max(logits);
        b.name(best, super::outputs::ARG_MAX);
        b.output(best);
        debug_assert!(matches!(b.shape(best).0, Dim::Outputs));
    }
}

fn rope_scaling(gguf: &Gguf, architecture: &str) -> Result<RopeScaling> {
    let key = |name: &str| format!("{architecture}.rope.{name}");
    let positive = |factor: f32| {
        if factor > 0.0 {
            return Ok(RopeScaling::Linear { factor });
        }
        Err(Error::Model(format!(
            "key `{}`: expected a positive number, got {factor}",
            key("scaling.factor")
        )))
    };
    match gguf.optional_str(&key("scaling.type"))? {
        None => match gguf.optional_f32(&key("scale_linear"))? {
            None => match gguf.optional_f32(&key("scaling.factor"))? {
                // Files from before `scaling.type` mean linear scaling.
                Some(factor) if factor != 1.0 && factor != 0.0 => positive(factor),
                _ => Ok(RopeScaling::None),
            },
            Some(factor) => positive(factor),
        },
        Some("none") => Ok(RopeScaling::None),
        Some("linear") => positive(gguf.f32(&key("scaling.factor"))?),
        Some(other) => Err(Error::Model(format!(
            "key `{}`: scaling {} is not supported yet (none, linear)",
            key("scaling.type"),
            printable(other.as_bytes())
        ))),
    }
}
