//! Hyper-parameters from GGUF metadata, checked.

use std::sync::Arc;

use halite_kernels::formats::Format;

use crate::error::{Error, Result};
use crate::gguf::{Gguf, printable};
use crate::program::{Gating, State};

/// Maximum layers of a model.
const MAX_LAYERS: u32 = 1024;
/// Maximum elements of a row, heads or vocabulary entries.
pub(super) const MAX_EXTENT: u32 = 1 << 24;

/// Maximum elements of a head's key or value.
const MAX_HEAD_LENGTH: u32 = 1 << 12;

/// Hyper-parameters of all families, under the names of their GGUF keys.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
#[non_exhaustive]
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
    /// Epsilon of layer norms.
    pub layer_norm_epsilon: Option<f32>,
    /// Epsilon of RMS norms.
    pub layer_norm_rms_epsilon: Option<f32>,
    /// Rotated elements of a head.
    pub rope_dimension_count: u32,
    pub rope_freq_base: f32,
    /// Rotary base of sliding-window layers, if different.
    pub rope_freq_base_swa: Option<f32>,
    pub rope_scaling: RopeScaling,
    /// Extra factor on sine and cosine, besides that of the scaling.
    pub rope_attn_factor: f32,
    /// Original context length, before its extension.
    pub original_context_length: u32,
    /// The file's `rope.scaling.finetuned`.
    pub rope_finetuned: Option<bool>,
    /// Sliding window in positions.
    pub sliding_window: Option<u32>,
    /// Whether each layer has the sliding window, if the file says so of each.
    pub sliding_window_pattern: Option<Vec<bool>>,
    /// The period of layers without the sliding window, if the file has it.
    pub sliding_window_period: Option<u32>,
    /// Elements of pooled vectors between the two products of EmbeddingGemma.
    pub dense_2_feat_out: Option<u32>,
    /// The activation of a feed-forward block, if the file names it.
    pub hidden_activation: Option<String>,
    /// Whether attention is causal, if the file says so.
    pub attention_causal: Option<bool>,
    pub attention_scale: Option<f32>,
    /// The largest exponent of slopes by distance (ALiBi).
    pub max_alibi_bias: Option<f32>,
    /// The largest magnitude of queries, keys and values.
    pub attention_clamp_kqv: Option<f32>,
    /// Growth of queries beyond the original context (Llama 4's temperature tuning).
    pub attention_temperature_scale: Option<f32>,
    /// Positions after which it grows, if they are not the original context.
    pub attention_temperature_length: Option<u32>,
    pub attn_logit_softcapping: Option<f32>,
    pub final_logit_softcapping: Option<f32>,
    pub embedding_scale: Option<f32>,
    pub residual_scale: Option<f32>,
    pub logit_scale: Option<f32>,
    /// Whether attention and the feed-forward block read the same residual stream (GPT-NeoX).
    pub use_parallel_residual: Option<bool>,
    pub expert_count: u32,
    pub expert_used_count: u32,
    pub expert_feed_forward_length: Option<u32>,
    /// Layers at the beginning that have no experts.
    pub leading_dense_block_count: u32,
    /// Period of the layers with experts.
    pub interleave_moe_layer_step: Option<u32>,
    /// Period of the layers with experts (Nomic).
    pub moe_every_n_layers: Option<u32>,
    /// Experts that all tokens use; files store them as one.
    pub expert_shared_count: u32,
    /// Hidden elements of the expert that all tokens use.
    pub expert_shared_feed_forward_length: Option<u32>,
    pub expert_gating_func: Option<Gating>,
    pub expert_weights_norm: Option<bool>,
    pub expert_weights_scale: Option<f32>,
    /// Groups of experts, of which a token chooses from `expert_group_used_count`; 0 or 1: no groups.
    pub expert_group_count: u32,
    pub expert_group_used_count: u32,
    /// Elements of the inputs and results of experts, if they are not the embedding's.
    pub moe_latent_size: Option<u32>,
    /// Layers at the end that draft tokens; not in `block_count`.
    pub nextn_predict_layers: u32,
    /// Elements of an embedding that each layer has for each token.
    pub embedding_length_per_layer_input: Option<u32>,
    /// Layers at the end that use the KV caches of earlier ones.
    pub shared_kv_layers: u32,
    /// Elements of a key and of a value in sliding-window layers, if different.
    pub key_length_swa: Option<u32>,
    pub value_length_swa: Option<u32>,
    /// Rotated elements of a head in sliding-window layers, if different.
    pub rope_dimension_count_swa: Option<u32>,
    /// Sections of multi-dimensional rotary embedding, of which texts use the first three alike.
    pub rope_dimension_sections: Option<Vec<u32>>,
    /// Elements of the latent vector of queries, and of that of keys and values.
    pub q_lora_rank: Option<u32>,
    pub kv_lora_rank: Option<u32>,
    /// Elements of a head's key and value where `key_length` and `value_length` are those of the cache.
    pub key_length_mla: Option<u32>,
    pub value_length_mla: Option<u32>,
    /// Whether each layer is recurrent, if the file says so.
    pub recurrent_layers: Option<Vec<bool>>,
    /// Period of the layers with attention among recurrent ones.
    pub full_attention_interval: Option<u32>,
    /// Taps of LFM2's convolution.
    pub shortconv_l_cache: Option<u32>,
    /// Taps of a recurrent layer's convolution.
    pub ssm_conv_kernel: Option<u32>,
    /// Elements of a recurrent layer's values.
    pub ssm_inner_size: Option<u32>,
    /// Elements of a recurrent layer's key.
    pub ssm_state_size: Option<u32>,
    /// Heads of a recurrent layer's values.
    pub ssm_time_step_rank: Option<u32>,
    /// Heads of a recurrent layer's keys.
    pub ssm_group_count: Option<u32>,
    /// Whether Mamba's steps, B and C are normalised.
    pub ssm_dt_b_c_rms: bool,
    /// Elements of a head's key and value in layers of Kimi Delta Attention.
    pub kda_head_dim: Option<u32>,
    /// Pooling of token vectors.
    pub pooling_type: Option<Pooling>,
    /// Which token the classification head reads, if the file says it.
    pub classifier_pooling: Option<Pooling>,
    /// Labels that a classification head scores.
    pub label_count: u32,
    /// Number of token types (segments) of an encoder.
    pub token_type_count: Option<u32>,
    /// The token that ends a text of a pair.
    pub separator_token: Option<u32>,
    /// Format of the KV cache, set by the caller.
    pub kv_format: Format,
    /// Positions of the KV cache, set by the caller. They select the factors of LongRoPE.
    pub positions: u32,
}

/// Scaling of rotary frequencies beyond the training context.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// No scaling.
    None,
    /// Positions are divided by a factor (Chen et al. 2023).
    Linear {
        /// The factor.
        factor: f32,
    },
    /// Slow pairs are interpolated, fast ones are not (YaRN, Peng et al. 2023).
    Yarn {
        /// The factor.
        factor: f32,
        /// Rotations within the original context above which a pair is not interpolated.
        beta_fast: f32,
        /// Rotations below which a pair is fully interpolated.
        beta_slow: f32,
        /// Factor on `0.1 · ln(factor)` in the denominator of the attention factor; 0: no denominator.
        log_multiplier: f32,
    },
    /// Each pair has its own factor, in a tensor of the file (LongRoPE, Ding et al. 2024).
    Long,
}

/// Pooling of token vectors (Reimers & Gurevych 2019).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pooling {
    /// No pooling: one vector per token.
    None,
    /// The mean of all tokens.
    Mean,
    /// The first token (CLS).
    Cls,
    /// The last token.
    Last,
    /// Scores of the file's classification head: of the first token, or in a decoder of the last (Nogueira & Cho 2019).
    Rank,
}

/// Unsupported options, the only values accepted for each, and the families that have more of it.
const ONLY: &[(&str, Only, &[&str])] = &[
    ("attention.max_alibi_bias", Only::F32(0.0), &["mpt"]),
    ("interleave_moe_layer_step", Only::UpTo(1), &["llama4"]),
    ("rope.scaling.yarn_attn_factor", Only::F32(1.0), &[]),
    ("rope.scaling.yarn_ext_factor", Only::F32(1.0), &[]),
];

#[derive(Clone, Copy)]
enum Only {
    F32(f32),
    UpTo(u32),
}

impl Hparams {
    /// Reads and checks the metadata.
    ///
    /// # Errors
    /// [`Error::Gguf`] for missing or mistyped keys, [`Error::Model`] for values out of range.
    pub fn read(gguf: &Gguf) -> Result<Hparams> {
        let architecture = gguf.architecture()?.to_owned();
        let key = |name: &str| format!("{architecture}.{name}");
        let ranged = |name: &str, value: u32, max: u32| {
            if (1..=max).contains(&value) {
                return Ok(value);
            }
            Err(Error::Model(format!("key `{}`: expected 1 to {max}, got {value}", key(name))))
        };
        let required = |name: &str, max: u32| ranged(name, gguf.u32(&key(name))?, max);

        let all_blocks = required("block_count", MAX_LAYERS)?;
        let (sliding_window_pattern, sliding_window_period) =
            sliding_window_pattern(gguf, &architecture, all_blocks)?;
        let layers = all_blocks as usize;
        let nextn_predict_layers = gguf.optional_u32(&key("nextn_predict_layers"))?.unwrap_or(0);
        let Some(block_count) = all_blocks.checked_sub(nextn_predict_layers).filter(|&count| count > 0)
        else {
            return Err(Error::Model(format!(
                "key `{}`: expected less than the {all_blocks} blocks, got {nextn_predict_layers}",
                key("nextn_predict_layers")
            )));
        };
        let per_layer = |name: &str| -> Result<Option<Vec<u32>>> {
            let values = gguf.optional_u32_per_layer(&key(name), layers)?;
            for &value in values.iter().flatten() {
                ranged(name, value, MAX_EXTENT)?;
            }
            Ok(values)
        };
        let embedding_length = required("embedding_length", MAX_EXTENT)?;
        let missing = |name: &str| gguf.missing(&key(name));
        // Recurrent layers have no heads.
        let is_recurrent = gguf.optional_u32(&key("ssm.state_size"))?.is_some();
        let head_count = if is_recurrent {
            gguf.optional_u32_per_layer(&key("attention.head_count"), layers)?
        } else {
            per_layer("attention.head_count")?
        };
        let head_count = head_count.ok_or_else(|| missing("attention.head_count"))?;
        // Layers without attention have no KV heads.
        let head_count_kv = gguf.optional_u32_per_layer(&key("attention.head_count_kv"), layers)?;
        let head_count_kv = head_count_kv.unwrap_or_else(|| head_count.clone());
        if head_count_kv.iter().all(|&kv| kv == 0) && !is_recurrent {
            ranged("attention.head_count_kv", 0, MAX_EXTENT)?;
        }
        for (&heads, &kv) in head_count.iter().zip(&head_count_kv) {
            if kv > 0 && heads % kv != 0 {
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
        // Without heads, any length will do.
        let default_length =
            head_count.iter().find(|&&heads| heads > 0).map_or(2, |heads| embedding_length / heads);
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
        for (name, only, except) in ONLY {
            if except.contains(&architecture.as_str()) {
                continue;
            }
            let key = key(name);
            let (fits, expected) = match only {
                Only::F32(only) => (gguf.optional_f32(&key)?.is_none_or(|v| v == *only), only.to_string()),
                Only::UpTo(only) => {
                    (gguf.optional_u32(&key)?.is_none_or(|v| v <= *only), format!("up to {only}"))
                }
            };
            if !fits {
                let message = format!("key `{key}`: only {expected} is supported");
                return Err(Error::Model(message));
            }
        }
        let positive = |name: &str| match gguf.optional_f32(&key(name))? {
            Some(value) if value <= 0.0 => {
                Err(Error::Model(format!("key `{}`: expected a positive number, got {value}", key(name))))
            }
            value => Ok(value),
        };
        // Zero means no factor.
        let factor = |name: &str| -> Result<Option<f32>> {
            if gguf.optional_f32(&key(name))? == Some(0.0) { Ok(None) } else { positive(name) }
        };
        let epsilon = |name: &str| match gguf.optional_f32(&key(name))? {
            Some(value) if value < 0.0 => {
                Err(Error::Model(format!("key `{}`: expected at least 0, got {value}", key(name))))
            }
            value => Ok(value),
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
        let expert_feed_forward_length = match gguf.optional_u32(&key("expert_feed_forward_length"))? {
            Some(length) => Some(ranged("expert_feed_forward_length", length, MAX_EXTENT)?),
            None => None,
        };
        let expert_shared_feed_forward_length = match gguf
            .optional_u32(&key("expert_shared_feed_forward_length"))?
            .filter(|&length| length > 0)
        {
            Some(length) => Some(ranged("expert_shared_feed_forward_length", length, MAX_EXTENT)?),
            None => None,
        };
        // Layers without a feed-forward block have no hidden elements.
        let feed_forward_length = gguf
            .optional_u32_per_layer(&key("feed_forward_length"), layers)?
            .filter(|lengths| lengths.iter().any(|&length| length > 0) || is_recurrent);
        for &length in feed_forward_length.iter().flatten().filter(|&&length| length > 0) {
            ranged("feed_forward_length", length, MAX_EXTENT)?;
        }
        let feed_forward_length = feed_forward_length
            .or_else(|| expert_feed_forward_length.map(|length| vec![length; layers]))
            .ok_or_else(|| missing("feed_forward_length"))?;
        let expert_gating_func = match gguf.optional_u32(&key("expert_gating_func"))? {
            None | Some(0) => None,
            Some(1) => Some(Gating::Softmax),
            Some(2) => Some(Gating::Sigmoid),
            Some(3) => Some(Gating::SoftmaxOfTop),
            Some(other) => {
                let message = format!("key `{}`: expected 0 to 3, got {other}", key("expert_gating_func"));
                return Err(Error::Model(message));
            }
        };
        let size = |name: &str| -> Result<Option<u32>> {
            gguf.optional_u32(&key(name))?.map(|value| ranged(name, value, MAX_EXTENT)).transpose()
        };
        let recurrent_layers = gguf.optional_u32_per_layer(&key("attention.recurrent_layers"), layers)?;
        let shared_kv_layers = gguf.optional_u32(&key("attention.shared_kv_layers"))?.unwrap_or(0);
        if shared_kv_layers >= block_count {
            return Err(Error::Model(format!(
                "key `{}`: expected less than the {block_count} blocks, got {shared_kv_layers}",
                key("attention.shared_kv_layers")
            )));
        }
        let head_size = |name: &str| -> Result<Option<u32>> {
            gguf.optional_u32(&key(name))?.map(|length| ranged(name, length, MAX_HEAD_LENGTH)).transpose()
        };
        let key_length_swa = head_size("attention.key_length_swa")?;
        let value_length_swa = head_size("attention.value_length_swa")?;
        let rope_dimension_count_swa = head_size("rope.dimension_count_swa")?;
        let rotated = rope_dimension_count_swa.unwrap_or(0);
        if rotated % 2 != 0 || rotated > key_length_swa.unwrap_or(key_length) {
            let message = format!(
                "key `{}`: expected an even number up to the length of a key, got {rotated}",
                key("rope.dimension_count_swa")
            );
            return Err(Error::Model(message));
        }
        let context_length = required("context_length", u32::MAX)?;
        let original_context_length = match gguf.optional_u32(&key("rope.scaling.original_context_length"))? {
            Some(length) => ranged("rope.scaling.original_context_length", length, u32::MAX)?,
            None => context_length,
        };
        let labels = gguf.optional_strings(&key("classifier.output_labels"))?;
        let labels = labels.map_or(1, |labels| labels.len().try_into().unwrap_or(u32::MAX));
        Ok(Hparams {
            context_length,
            embedding_length,
            block_count,
            feed_forward_length,
            head_count,
            head_count_kv,
            key_length,
            value_length,
            vocab_size,
            layer_norm_epsilon: epsilon("attention.layer_norm_epsilon")?,
            layer_norm_rms_epsilon: epsilon("attention.layer_norm_rms_epsilon")?,
            rope_dimension_count,
            rope_freq_base: positive("rope.freq_base")?.unwrap_or(10_000.0),
            rope_freq_base_swa: positive("rope.freq_base_swa")?,
            rope_scaling: rope_scaling(gguf, &architecture)?,
            rope_attn_factor: positive("rope.scaling.attn_factor")?.unwrap_or(1.0),
            original_context_length,
            rope_finetuned: gguf.optional_bool(&key("rope.scaling.finetuned"))?,
            sliding_window: gguf.optional_u32(&key("attention.sliding_window"))?.filter(|&w| w > 0),
            sliding_window_pattern,
            sliding_window_period,
            dense_2_feat_out: size("dense_2_feat_out")?,
            hidden_activation: gguf.optional_str(&key("hidden_activation"))?.map(str::to_owned),
            attention_causal: gguf.optional_bool(&key("attention.causal"))?,
            attention_scale: factor("attention.scale")?,
            max_alibi_bias: factor("attention.max_alibi_bias")?,
            attention_clamp_kqv: factor("attention.clamp_kqv")?,
            attention_temperature_scale: factor("attention.temperature_scale")?,
            attention_temperature_length: gguf
                .optional_u32(&key("attention.temperature_length"))?
                .filter(|&length| length > 0),
            attn_logit_softcapping: factor("attn_logit_softcapping")?,
            final_logit_softcapping: factor("final_logit_softcapping")?,
            embedding_scale: factor("embedding_scale")?,
            residual_scale: factor("residual_scale")?,
            logit_scale: factor("logit_scale")?,
            use_parallel_residual: gguf.optional_bool(&key("use_parallel_residual"))?,
            expert_count,
            expert_used_count,
            expert_feed_forward_length,
            expert_shared_feed_forward_length,
            leading_dense_block_count: gguf.optional_u32(&key("leading_dense_block_count"))?.unwrap_or(0),
            interleave_moe_layer_step: gguf.optional_u32(&key("interleave_moe_layer_step"))?,
            moe_every_n_layers: gguf.optional_u32(&key("moe_every_n_layers"))?.filter(|&period| period > 0),
            expert_shared_count: gguf.optional_u32(&key("expert_shared_count"))?.unwrap_or(0),
            expert_gating_func,
            expert_weights_norm: gguf.optional_bool(&key("expert_weights_norm"))?,
            expert_weights_scale: factor("expert_weights_scale")?,
            expert_group_count: gguf.optional_u32(&key("expert_group_count"))?.unwrap_or(0),
            expert_group_used_count: gguf.optional_u32(&key("expert_group_used_count"))?.unwrap_or(0),
            moe_latent_size: size("moe_latent_size")?,
            nextn_predict_layers,
            embedding_length_per_layer_input: gguf
                .optional_u32(&key("embedding_length_per_layer_input"))?
                .filter(|&length| length > 0)
                .map(|length| ranged("embedding_length_per_layer_input", length, MAX_HEAD_LENGTH))
                .transpose()?,
            shared_kv_layers,
            key_length_swa,
            value_length_swa,
            rope_dimension_count_swa,
            rope_dimension_sections: gguf.optional_u32_per_layer(&key("rope.dimension_sections"), 4)?,
            q_lora_rank: size("attention.q_lora_rank")?,
            kv_lora_rank: head_size("attention.kv_lora_rank")?,
            key_length_mla: head_size("attention.key_length_mla")?,
            value_length_mla: head_size("attention.value_length_mla")?,
            recurrent_layers: recurrent_layers.map(|layers| layers.iter().map(|&is| is != 0).collect()),
            full_attention_interval: size("full_attention_interval")?,
            shortconv_l_cache: size("shortconv.l_cache")?,
            ssm_conv_kernel: size("ssm.conv_kernel")?,
            ssm_inner_size: size("ssm.inner_size")?,
            ssm_state_size: size("ssm.state_size")?,
            ssm_time_step_rank: size("ssm.time_step_rank")?,
            // PLaMo 2 says that it has none.
            ssm_group_count: match gguf.optional_u32(&key("ssm.group_count"))? {
                Some(0) => None,
                _ => size("ssm.group_count")?,
            },
            ssm_dt_b_c_rms: gguf.optional_bool(&key("ssm.dt_b_c_rms"))?.unwrap_or(false),
            kda_head_dim: head_size("kda.head_dim")?,
            pooling_type: pooling_type(gguf, &key("pooling_type"))?,
            classifier_pooling: pooling_type(gguf, &key("classifier.pooling_type"))?,
            label_count: ranged("classifier.output_labels", labels, MAX_EXTENT)?,
            token_type_count: gguf.optional_u32("tokenizer.ggml.token_type_count")?,
            // The format misspells the key.
            separator_token: gguf.optional_u32("tokenizer.ggml.seperator_token_id")?,
            kv_format: Format::F16,
            positions: context_length,
            architecture,
        })
    }

    /// Returns a layer's value in a per-layer list.
    pub(crate) fn at(list: &[u32], layer: u32) -> u32 {
        list.get(layer as usize).copied().unwrap_or(0)
    }

    /// Whether the model gives vectors of texts: it is an encoder, or a decoder whose file has a pooling.
    pub(crate) fn embeds(&self) -> bool {
        self.pooling_type.is_some_and(|pooling| pooling != Pooling::None)
    }

    /// Returns the KV cache of a layer.
    pub(crate) fn kv_state(&self, layer: u32, window: Option<u32>, after: u32) -> State {
        let kv_heads = Hparams::at(&self.head_count_kv, layer);
        // A text whose vector is wanted is whole in a step. No layer needs earlier steps, so layers share a cache.
        let name = if after > 0 || self.embeds() {
            format!("kv.{kv_heads}.{}", window.unwrap_or(0))
        } else {
            format!("kv.{layer}")
        };
        State::new(name, kv_heads, self.key_length, self.value_length, self.kv_format)
            .window(window)
            .after(after)
    }

    /// Whether a layer is recurrent: as the file says, or all but the last of every `period` layers.
    pub(crate) fn is_recurrent(&self, layer: u32, period: u32) -> bool {
        match &self.recurrent_layers {
            Some(layers) => layers.get(layer as usize).copied().unwrap_or(false),
            None => !(layer + 1).is_multiple_of(self.full_attention_interval.unwrap_or(period)),
        }
    }

    /// Whether a layer has the sliding window: as the file says, or all but the last of every `period`
    /// layers; with a period of 0, no layer is the last.
    pub(crate) fn is_windowed(&self, layer: u32, period: u32) -> bool {
        self.is_windowed_from(layer.saturating_add(1), layer, period)
    }

    /// The same, but all but the first of every `period` layers.
    pub(crate) fn is_windowed_after_first(&self, layer: u32, period: u32) -> bool {
        self.is_windowed_from(layer, layer, period)
    }

    fn is_windowed_from(&self, n: u32, layer: u32, period: u32) -> bool {
        match &self.sliding_window_pattern {
            Some(pattern) => pattern.get(layer as usize).copied().unwrap_or(false),
            None => n.checked_rem(self.sliding_window_period.unwrap_or(period)) != Some(0),
        }
    }

    /// A layer's sliding window, if it has one and the model has windows.
    pub(crate) fn window(&self, layer: u32, period: u32) -> Option<u32> {
        self.sliding_window.filter(|_| self.is_windowed(layer, period))
    }

    /// Returns the radians per position of each rotated pair, and the factor on sine and cosine.
    ///
    /// Pair i of n has the frequency `base^(-i / n)`. Linear scaling divides it by a factor. YaRN
    /// interpolates between both, by how often the pair rotates within the original context.
    pub(crate) fn rope_frequencies(&self, base: f32, scaling: RopeScaling) -> (Arc<[f32]>, f32) {
        let dims = f64::from(self.rope_dimension_count);
        let base = f64::from(base);
        let frequencies = (0..self.rope_dimension_count / 2).map(|i| {
            let frequency = base.powf(-f64::from(2 * i) / dims);
            let scaled = match scaling {
                RopeScaling::None | RopeScaling::Long => frequency,
                RopeScaling::Linear { factor } => frequency / f64::from(factor),
                RopeScaling::Yarn { factor, beta_fast, beta_slow, .. } => {
                    // The pair that rotates `rotations` times within the original context.
                    let pair = |rotations: f32| {
                        let context = f64::from(self.original_context_length);
                        dims * (context / (f64::from(rotations) * std::f64::consts::TAU)).ln()
                            / (2.0 * base.ln())
                    };
                    let first = pair(beta_fast).floor().max(0.0);
                    let last = pair(beta_slow).ceil().min(dims - 1.0);
                    let ramp = ((f64::from(i) - first) / (last - first).max(0.001)).clamp(0.0, 1.0);
                    frequency * (ramp / f64::from(factor) + (1.0 - ramp))
                }
            };
            scaled as f32
        });
        let magnitude = match scaling {
            RopeScaling::Yarn { factor, log_multiplier, .. } if factor > 1.0 => {
                let grown = |by: f32| f64::from(by) * 0.1 * f64::from(factor).ln() + 1.0;
                (if log_multiplier == 0.0 { grown(1.0) } else { grown(1.0) / grown(log_multiplier) }) as f32
            }
            _ => 1.0,
        };
        (frequencies.collect(), magnitude)
    }
}

/// A pooling: the published values of the key.
fn pooling_type(gguf: &Gguf, key: &str) -> Result<Option<Pooling>> {
    Ok(match gguf.optional_u32(key)? {
        None => None,
        Some(0) => Some(Pooling::None),
        Some(1) => Some(Pooling::Mean),
        Some(2) => Some(Pooling::Cls),
        Some(3) => Some(Pooling::Last),
        Some(4) => Some(Pooling::Rank),
        Some(other) => {
            let message = format!(
                "key `{key}`: expected 0 (none), 1 (mean), 2 (CLS), 3 (last) or 4 (rank), got {other}"
            );
            return Err(Error::Model(message));
        }
    })
}

/// `attention.sliding_window_pattern`: a flag per layer, or a period.
#[allow(clippy::type_complexity)]
fn sliding_window_pattern(
    gguf: &Gguf,
    architecture: &str,
    layers: u32,
) -> Result<(Option<Vec<bool>>, Option<u32>)> {
    let key = format!("{architecture}.attention.sliding_window_pattern");
    let is_array = gguf.metadata().iter().any(|(k, value)| *k == key && value.array_len.is_some());
    if is_array {
        let pattern = gguf.optional_u32_per_layer(&key, layers as usize)?;
        return Ok((pattern.map(|pattern| pattern.iter().map(|&v| v != 0).collect()), None));
    }
    Ok((None, gguf.optional_u32(&key)?))
}

fn rope_scaling(gguf: &Gguf, architecture: &str) -> Result<RopeScaling> {
    let key = |name: &str| format!("{architecture}.rope.{name}");
    let positive = |name: &str, value: f32| {
        if value > 0.0 {
            return Ok(value);
        }
        Err(Error::Model(format!("key `{}`: expected a positive number, got {value}", key(name))))
    };
    let linear = |name: &str, factor: f32| Ok(RopeScaling::Linear { factor: positive(name, factor)? });
    match gguf.optional_str(&key("scaling.type"))? {
        None => match gguf.optional_f32(&key("scale_linear"))? {
            None => match gguf.optional_f32(&key("scaling.factor"))? {
                // Files older than `scaling.type` mean linear scaling.
                Some(factor) if factor != 1.0 && factor != 0.0 => linear("scaling.factor", factor),
                _ => Ok(RopeScaling::None),
            },
            Some(factor) => linear("scale_linear", factor),
        },
        Some("none") => Ok(RopeScaling::None),
        Some("linear") => linear("scaling.factor", gguf.f32(&key("scaling.factor"))?),
        Some("yarn") => {
            let beta =
                |name: &str, default: f32| positive(name, gguf.optional_f32(&key(name))?.unwrap_or(default));
            let log_multiplier = "scaling.yarn_log_multiplier";
            Ok(RopeScaling::Yarn {
                factor: positive("scaling.factor", gguf.f32(&key("scaling.factor"))?)?,
                beta_fast: beta("scaling.yarn_beta_fast", 32.0)?,
                beta_slow: beta("scaling.yarn_beta_slow", 1.0)?,
                log_multiplier: match gguf.optional_f32(&key(log_multiplier))? {
                    None | Some(0.0) => 0.0,
                    Some(value) => positive(log_multiplier, value)?,
                },
            })
        }
        Some("longrope") => Ok(RopeScaling::Long),
        Some(other) => Err(Error::Model(format!(
            "key `{}`: scaling {} is not supported (none, linear, yarn, longrope)",
            key("scaling.type"),
            printable(other.as_bytes())
        ))),
    }
}
