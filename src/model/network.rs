//! The building blocks of families, named as in papers, with weights named as in GGUF files.
//!
//! A matrix or norm has a bias if the file has one: files have no other sign for it.

use std::sync::Arc;

use super::hparams::{MAX_EXTENT, RopeScaling};
use super::{Hparams, Pooling};
use crate::program::{
    Builder, Gate, Gating, Groups, Growth, Index, NormKind, Outputs, RopePairs, Rotation, Rule, State,
    TensorId, Unary,
};

/// Records a family's program.
pub(super) struct Network<'n, 'b> {
    pub h: &'n Hparams,
    b: &'n mut Builder<'b>,
    /// The kind of the family's norms, and their epsilon.
    norm: NormKind,
    norm_eps: f32,
    norm_weights: bool,
    /// The file's growth of scores by position.
    growth: Option<Growth>,
    /// Prefix of weight names: `blk.3.` in layer 3.
    prefix: String,
    layer: u32,
}

/// The residual streams of Gemma 3n: what a layer computes, and the others in one row.
#[derive(Clone, Copy)]
pub(super) struct Streams {
    pub active: TensorId,
    others: TensorId,
    /// A factor of 1 for each of the others.
    ones: TensorId,
}

/// Number of residual streams of Gemma 3n. Other runtimes know no other.
const STREAMS: u32 = 4;
/// Most factors of positions.
const MAX_FACTORS: u32 = 1 << 16;
/// Added to variances that are not zero.
const TINY: f32 = 1e-20;

/// The group over which queries and keys are normalised.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum QkNorm {
    /// Each head, with the same weights.
    Head,
    /// The same after the rotation, not before.
    RotatedHead,
    /// The same without weights.
    RotatedUnit,
    /// Each head, with weights of its own.
    EachHead,
    /// All heads together.
    Row,
}

/// Options of a layer's attention.
pub(super) struct Attention<'r> {
    /// Rotary embedding of queries and keys; `None`: no positions.
    pub rope: Option<&'r Rotation>,
    /// Sliding window.
    pub window: Option<u32>,
    pub qk_norm: Option<QkNorm>,
    /// A factor on the scores.
    pub scale: f32,
    /// One more, by position.
    pub growth: Option<Growth>,
    /// Whether windows lie side by side, and are not each token's own.
    pub aligned: bool,
    /// The largest exponent of slopes, from which scores have a bias by distance (ALiBi).
    pub max_alibi_bias: Option<f32>,
    /// How many positions after its own a token sees: 0, or more in an encoder.
    pub after: u32,
    /// Whether each head has a sink logit.
    pub sinks: bool,
    /// Whether each head's result is multiplied by a gate's sigmoid. Queries and gates alternate in the file, head by
    /// head.
    pub gated: bool,
    /// Whether each head's values are normalised, without weights.
    pub v_norm: bool,
    /// The layer whose KV cache it uses, if it is not its own.
    pub kv_of: Option<u32>,
    /// Whether the heads' results are normalised, all together (BitNet).
    pub sub_norm: bool,
}

impl<'n, 'b> Network<'n, 'b> {
    pub fn new(h: &'n Hparams, b: &'n mut Builder<'b>, norm: NormKind) -> Self {
        let mut network = Network {
            h,
            b,
            norm,
            norm_eps: 0.0,
            norm_weights: true,
            growth: None,
            prefix: String::new(),
            layer: 0,
        };
        if let Some(scale) = h.attention_temperature_scale {
            let period = h.attention_temperature_length.unwrap_or(h.original_context_length);
            network.growth = network.growth(scale, period, 0);
        }
        network.norm_eps = match norm {
            NormKind::Rms => network.required("attention.layer_norm_rms_epsilon", h.layer_norm_rms_epsilon),
            NormKind::Layer => network.required("attention.layer_norm_epsilon", h.layer_norm_epsilon),
        };
        network
    }

    /// Records an error: the file asks for what the family does not have here.
    pub fn fail(&mut self, message: String) {
        self.b.fail(message);
    }

    /// Norms without weights.
    pub fn without_norm_weights(self) -> Self {
        Network { norm_weights: false, ..self }
    }

    /// Returns a required hyper-parameter.
    pub fn required<T: Default>(&mut self, key: &str, value: Option<T>) -> T {
        value.unwrap_or_else(|| {
            self.b.fail(format!("key `{}.{key}` is missing", self.h.architecture));
            T::default()
        })
    }

    /// Starts a layer, and sets the prefix of weight names.
    pub fn layer(&mut self, layer: u32) {
        self.b.segment(&format!("blk.{layer}"));
        self.prefix = format!("blk.{layer}.");
        self.layer = layer;
    }

    /// Whether the file has this weight (in a layer: the layer's).
    pub fn has(&self, name: &str) -> bool {
        self.b.has(&format!("{}{name}", self.prefix))
    }

    fn weight(&mut self, name: &str, rows: u32, cols: u32) -> TensorId {
        self.b.weight(&format!("{}{name}", self.prefix), rows, cols)
    }

    fn bias(&mut self, name: &str, len: u32) -> Option<TensorId> {
        self.b.optional(&format!("{}{name}.bias", self.prefix), 1, len)
    }

    fn cols(&self, x: TensorId) -> u32 {
        self.b.shape(x).1
    }

    /// Embeddings of the tokens, times a factor.
    pub fn embed(&mut self, scale: f32) -> TensorId {
        self.b.segment("embedding");
        let table = self.weight("token_embd.weight", self.h.vocab_size, self.h.embedding_length);
        self.b.embed(table, Index::Token, scale)
    }

    /// Learned embeddings of the tokens' positions.
    pub fn embed_positions(&mut self) -> TensorId {
        let (positions, most) = (self.h.positions, self.h.context_length);
        if positions > most {
            self.b.fail(format!(
                "positions of the KV cache: expected at most the {most} of the position embeddings, got {positions}"
            ));
        }
        let table = self.weight("position_embd.weight", self.h.context_length, self.h.embedding_length);
        self.b.embed(table, Index::Position, 1.0)
    }

    /// The embedding of the token's type: 0 in a single text, and in rerankers the part of the text that it belongs to.
    pub fn embed_type(&mut self) -> TensorId {
        let h = self.h;
        let types = h.token_type_count.unwrap_or_else(|| {
            self.b.fail("key `tokenizer.ggml.token_type_count` is missing".into());
            1
        });
        let is_pair = h.pooling_type == Some(Pooling::Rank) && types > 1;
        let index = match h.separator_token {
            _ if !is_pair => Index::First,
            Some(separator) if separator < h.vocab_size => Index::Part { separator },
            Some(separator) => {
                let below = h.vocab_size;
                self.b.fail(format!(
                    "key `tokenizer.ggml.seperator_token_id`: expected below {below}, the vocabulary, got {separator}"
                ));
                Index::First
            }
            None => {
                self.b.fail("key `tokenizer.ggml.seperator_token_id` is missing: it ends the query".into());
                Index::First
            }
        };
        let table = self.weight("token_types.weight", types, h.embedding_length);
        self.b.embed(table, index, 1.0)
    }

    /// The family's norm over whole rows.
    pub fn norm(&mut self, name: &str, x: TensorId) -> TensorId {
        self.norm_as(name, name, x)
    }

    /// A norm whose result and weight have different names.
    pub fn norm_as(&mut self, result: &str, name: &str, x: TensorId) -> TensorId {
        let cols = self.cols(x);
        self.norm_over(result, name, x, cols)
    }

    fn norm_over(&mut self, result: &str, name: &str, x: TensorId, group: u32) -> TensorId {
        let weight = self.norm_weights.then(|| {
            // Files of Falcon-H1 leave out the ending of one.
            let weight = if self.has(name) { name.to_owned() } else { format!("{name}.weight") };
            self.weight(&weight, 1, group)
        });
        let bias = self.bias(name, group);
        self.b.norm(result, x, self.norm, weight, bias, self.norm_eps, group)
    }

    /// A norm over groups, each with weights of its own: a row of the file's matrix for each.
    fn norm_groups(&mut self, result: &str, name: &str, x: TensorId, group: u32) -> TensorId {
        let groups = self.cols(x) / group.max(1);
        let y = self.b.norm(result, x, self.norm, None, None, self.norm_eps, group);
        let weight = self.b.flat(&format!("{}{name}.weight", self.prefix), groups, group);
        self.b.mul(&format!("{result}_weighted"), y, weight)
    }

    pub fn add(&mut self, name: &str, a: TensorId, b: TensorId) -> TensorId {
        self.b.add(name, a, b)
    }

    /// `x + scale · y`: adds a block's result to the residual stream.
    pub fn add_scaled(&mut self, name: &str, x: TensorId, y: TensorId, scale: f32) -> TensorId {
        let y = self.scale(&format!("{name}_scaled"), y, scale);
        self.b.add(name, x, y)
    }

    pub fn scale(&mut self, name: &str, x: TensorId, scale: f32) -> TensorId {
        if scale == 1.0 { x } else { self.b.unary(name, x, Unary::Scale(scale)) }
    }

    /// The product with a matrix of `rows` rows.
    fn linear(&mut self, result: &str, name: &str, x: TensorId, rows: u32) -> TensorId {
        let cols = self.cols(x);
        let weight = self.weight(&format!("{name}.weight"), rows, cols);
        let bias = self.bias(name, rows);
        let y = self.b.linear(result, x, weight, bias);
        // A factor of the whole matrix, which its format does not have. With a bias, it would come too late.
        let scale = format!("{}{name}.scale", self.prefix);
        // A router's factors are those of its input.
        let has_scale = bias.is_none() && name != "ffn_gate_inp" && self.b.has(&scale);
        match has_scale.then(|| self.weight(&format!("{name}.scale"), 1, 1)) {
            Some(scale) => self.b.mul(&format!("{result}_scaled"), y, scale),
            None => y,
        }
    }

    /// The products with matrices that are stored one after the other in one tensor.
    fn fused_linear<const N: usize>(
        &mut self,
        name: &str,
        x: TensorId,
        parts: [(&str, u32); N],
    ) -> [TensorId; N] {
        let (cols, all) = (self.cols(x), parts.iter().map(|(_, rows)| rows).sum());
        let name = format!("{}{name}", self.prefix);
        let mut start = 0;
        parts.map(|(result, rows)| {
            let range = start..start + rows;
            start += rows;
            let weight = self.b.weight_rows(&format!("{name}.weight"), all, range.clone(), cols);
            let bias = self.b.optional_elements(&format!("{name}.bias"), all, range);
            self.b.linear(result, x, weight, bias)
        })
    }

    /// Factors on scores that grow with the logarithm of how often a position has gone through `period`, from 1 on (Llama 4's
    /// temperature tuning); `None` if the session has no more positions than that.
    pub fn growth(&mut self, scale: f32, period: u32, ahead: u32) -> Option<Growth> {
        let last = self.h.positions.saturating_sub(1).saturating_add(ahead) / period.max(1);
        if last >= MAX_FACTORS {
            self.b.fail(format!(
                "{} positions, of which each {period} have a factor on scores: expected at most {MAX_FACTORS} factors",
                self.h.positions
            ));
            return None;
        }
        let factor = |step: u32| (f64::from(scale) * f64::from(step + 1).ln() + 1.0) as f32;
        (last > 0).then(|| Growth { factors: (0..=last).map(factor).collect(), period, ahead })
    }

    /// The file's rotary embedding.
    pub fn rope(&mut self, pairs: RopePairs) -> Rotation {
        self.rope_of(self.h.rope_freq_base, pairs)
    }

    /// The same with another base.
    pub fn rope_of(&mut self, base: f32, pairs: RopePairs) -> Rotation {
        let (frequencies, magnitude) = self.h.rope_frequencies(base, self.h.rope_scaling);
        let magnitude = magnitude * self.h.rope_attn_factor;
        let head_dim = self.h.key_length;
        Rotation { head_dim, frequencies, factors: self.rope_factors(), magnitude, pairs }
    }

    /// An unscaled rotary embedding, regardless of the file's scaling.
    pub fn rope_unscaled(&mut self, base: f32, pairs: RopePairs) -> Rotation {
        let (frequencies, magnitude) = self.h.rope_frequencies(base, RopeScaling::None);
        Rotation { head_dim: self.h.key_length, frequencies, factors: None, magnitude, pairs }
    }

    /// Divisors of the frequencies: Llama 3's, or LongRoPE's for the session's positions.
    fn rope_factors(&mut self) -> Option<TensorId> {
        let pairs = self.h.rope_dimension_count / 2;
        let long = "rope_factors_long.weight";
        if self.h.rope_scaling == RopeScaling::Long || self.b.has(long) {
            let beyond = self.h.positions > self.h.original_context_length;
            return Some(self.b.weight(if beyond { long } else { "rope_factors_short.weight" }, 1, pairs));
        }
        self.b.optional("rope_freqs.weight", 1, pairs)
    }

    /// The attention options of most families, without positions.
    pub fn attention_of<'r>(&self) -> Attention<'r> {
        Attention {
            rope: None,
            window: self.h.sliding_window,
            qk_norm: None,
            scale: self.h.attention_scale.unwrap_or(1.0 / (self.h.key_length as f32).sqrt()),
            growth: self.growth.clone(),
            aligned: false,
            max_alibi_bias: None,
            after: 0,
            sinks: false,
            gated: false,
            v_norm: false,
            kv_of: None,
            sub_norm: false,
        }
    }

    /// The same of an encoder: a token sees half of a window's width before its own position and half after it, or all.
    pub fn attention_both_ways<'r>(&self, width: Option<u32>) -> Attention<'r> {
        let half = width.map(|width| width / 2);
        Attention {
            window: half.map(|half| half + 1),
            after: half.unwrap_or(u32::MAX),
            ..self.attention_of()
        }
    }

    /// Grouped-query attention (Ainslie et al. 2023), causal or in both directions.
    pub fn attention(&mut self, x: TensorId, a: &Attention<'_>) -> TensorId {
        let h = self.h;
        if h.attention_causal.is_some_and(|causal| causal != (a.after == 0)) {
            let only = a.after == 0;
            self.b.fail(format!("key `{}.attention.causal`: only {only} is supported", h.architecture));
        }
        let (heads, kv_heads) =
            (Hparams::at(&h.head_count, self.layer), Hparams::at(&h.head_count_kv, self.layer));
        let query_length = h.key_length.saturating_mul(1 + u32::from(a.gated));
        let parts =
            [("q", heads * query_length), ("k", kv_heads * h.key_length), ("v", kv_heads * h.value_length)];
        let linear = |n: &mut Self, i: usize| {
            let (part, rows): (&str, u32) = parts[i];
            n.linear(part, &format!("attn_{part}"), x, rows)
        };
        let (q, kv) = if a.kv_of.is_some() {
            (linear(self, 0), None)
        } else if self.has("attn_qkv.weight") {
            let [q, k, v] = self.fused_linear("attn_qkv", x, parts);
            (q, Some((k, v)))
        } else {
            let (q, k) = (linear(self, 0), linear(self, 1));
            // Some families have no values: they are the keys, before all that follows.
            let v = if a.v_norm && !self.has("attn_v.weight") { k } else { linear(self, 2) };
            (q, Some((k, v)))
        };
        let limited = |n: &mut Self, part: &str, x| match h.attention_clamp_kqv {
            Some(limit) => n.b.unary(&format!("{part}_clamped"), x, Unary::Clamp(limit)),
            None => x,
        };
        let q = limited(self, "q", q);
        let kv = kv.map(|(k, v)| (limited(self, "k", k), limited(self, "v", v)));
        let gate = a.gated.then(|| self.b.slice("gate", q, query_length, h.key_length, h.key_length));
        let q = if a.gated { self.b.slice("query", q, query_length, 0, h.key_length) } else { q };
        let mut place = |part: &str, x: TensorId| {
            let rotated =
                |n: &mut Self, x| a.rope.map_or(x, |rope| n.b.rope(&format!("{part}_rope"), x, rope));
            let (result, name) = (format!("{part}_norm"), format!("attn_{part}_norm"));
            match a.qk_norm {
                None => rotated(self, x),
                Some(QkNorm::Head) => {
                    let x = self.norm_over(&result, &name, x, h.key_length);
                    rotated(self, x)
                }
                Some(QkNorm::RotatedHead) => {
                    let x = rotated(self, x);
                    self.norm_over(&result, &name, x, h.key_length)
                }
                Some(QkNorm::RotatedUnit) => {
                    let x = rotated(self, x);
                    self.b.norm(&result, x, NormKind::Rms, None, None, self.norm_eps, h.key_length)
                }
                Some(QkNorm::EachHead) => {
                    let x = self.norm_groups(&result, &name, x, h.key_length);
                    rotated(self, x)
                }
                Some(QkNorm::Row) => {
                    let x = self.norm_as(&result, &name, x);
                    rotated(self, x)
                }
            }
        };
        let q = place("q", q);
        let kv = kv.map(|(k, v)| (place("k", k), v));
        let state = h.kv_state(a.kv_of.unwrap_or(self.layer), a.window, a.after).aligned(a.aligned);
        let state = self.b.state(state);
        if let Some((k, mut v)) = kv {
            if a.v_norm {
                v = self.b.norm("v_norm", v, NormKind::Rms, None, None, self.norm_eps, h.value_length);
            }
            self.b.kv_write(k, v, state);
        }
        let sinks = a.sinks.then(|| self.weight("attn_sinks.weight", 1, heads));
        let slopes = a.max_alibi_bias.map(|max_bias| slopes(heads, max_bias));
        let cap = h.attn_logit_softcapping;
        let growth = a.growth.clone();
        let mut attended = self.b.attend_with(q, state, heads, a.scale, growth, cap, slopes, sinks);
        if let Some(gate) = gate {
            attended = self.b.glu(gate, attended, Gate::Sigmoid);
        }
        if a.sub_norm {
            attended = self.norm("attn_sub_norm", attended);
        }
        self.linear("attn_output", "attn_output", attended, h.embedding_length)
    }

    /// Multi-head latent attention (DeepSeek-AI 2024): keys and values are products of a latent vector, and all keys end in the
    /// same rotated elements. Older files have one matrix for these products, and the cache keeps what they give. Where a file has
    /// a matrix of each head for its keys and one for its values, the cache keeps the latent vector: queries are multiplied with
    /// the one, results with the other.
    pub fn latent_attention(&mut self, x: TensorId, rope: Option<&Rotation>, scale: f32) -> TensorId {
        let h = self.h;
        if let Some(limit) = h.attention_clamp_kqv {
            let key = format!("{}.attention.clamp_kqv", h.architecture);
            self.fail(format!("key `{key}`: latent attention has no clamps, got {limit}"));
        }
        let rank = self.required("attention.kv_lora_rank", h.kv_lora_rank);
        let heads = Hparams::at(&h.head_count, self.layer);
        let (key, value) =
            (h.key_length_mla.unwrap_or(h.key_length), h.value_length_mla.unwrap_or(h.value_length));
        let turned = h.rope_dimension_count;
        let (absorbed, kv_heads) = (self.has("attn_k_b.weight"), Hparams::at(&h.head_count_kv, self.layer));
        if key <= turned || kv_heads != if absorbed { 1 } else { heads } {
            self.b.fail(format!(
                "layer {}: {turned} rotated elements of keys of {key}, {kv_heads} KV heads for {heads} heads: expected other \
                elements, and {}",
                self.layer,
                if absorbed { "one KV head, that of the latent vectors" } else { "as many KV heads" }
            ));
            return x;
        }
        let plain = key - turned;
        let rope = rope.map(|rope| Rotation { head_dim: turned, ..rope.clone() });
        let turn = |n: &mut Self, name, x| rope.as_ref().map_or(x, |rope| n.b.rope(name, x, rope));
        let q = if self.has("attn_q_a.weight") {
            let q_rank = self.required("attention.q_lora_rank", h.q_lora_rank);
            let q = self.linear("q_latent", "attn_q_a", x, q_rank);
            let q = self.norm_as("q_norm", "attn_q_a_norm", q);
            self.linear("q", "attn_q_b", q, heads.saturating_mul(key))
        } else {
            self.linear("q", "attn_q", x, heads.saturating_mul(key))
        };
        let [latent, k] = self.fused_linear("attn_kv_a_mqa", x, [("kv_latent", rank), ("k", turned)]);
        let latent = self.norm_as("kv_norm", "attn_kv_a_norm", latent);
        let k = turn(self, "k_rope", k);
        let q_turned = self.b.slice("q_turned", q, key, plain, turned);
        let q_turned = turn(self, "q_rope", q_turned);
        let q_plain = self.b.slice("q_plain", q, key, 0, plain);
        let (name, prefix) = (format!("kv.{}", self.layer), self.prefix.clone());
        let attended = if absorbed {
            let keys = self.b.expert_weight(&format!("{prefix}attn_k_b.weight"), heads, rank, plain);
            let values = self.b.expert_weight(&format!("{prefix}attn_v_b.weight"), heads, value, rank);
            let q_plain = self.b.block_linear("q_of_latent", q_plain, keys);
            let q = self.b.join("q_all", q_plain, q_turned, rank, turned);
            let state = self.b.state(State::latent(name, rank + turned, rank, h.kv_format));
            self.b.kv_write(k, latent, state);
            let growth = self.growth.clone();
            let attended = self.b.attend_with(q, state, heads, scale, growth, None, None, None);
            self.b.block_linear("v", attended, values)
        } else {
            let kv = self.linear("kv", "attn_kv_b", latent, heads.saturating_mul(plain + value));
            let k_plain = self.b.slice("k_plain", kv, plain + value, 0, plain);
            let v = self.b.slice("v", kv, plain + value, plain, value);
            let q = self.b.join("q_all", q_plain, q_turned, plain, turned);
            let k = self.b.join("k_all", k_plain, k, plain, turned);
            let state = self.b.state(State::new(name, heads, key, value, h.kv_format));
            self.b.kv_write(k, v, state);
            self.b.attend_with(q, state, heads, scale, self.growth.clone(), None, None, None)
        };
        self.linear("attn_output", "attn_output", attended, h.embedding_length)
    }

    /// The inputs of all layers for each token (Gemma 3n): an embedding, and a product of `x`; one layer after the other.
    pub fn per_layer_inputs(&mut self, x: TensorId, length: u32) -> TensorId {
        let h = self.h;
        let all = length.saturating_mul(h.block_count);
        let table = self.weight("per_layer_token_embd.weight", h.vocab_size, all);
        let embedded = self.b.embed(table, Index::Token, (length as f32).sqrt());
        let projected = self.linear("per_layer_proj", "per_layer_model_proj", x, all);
        let projected = self.scale("per_layer_scaled", projected, 1.0 / (h.embedding_length as f32).sqrt());
        let projected = self.norm_over("per_layer_norm", "per_layer_proj_norm", projected, length);
        let sum = self.add("per_layer_sum", projected, embedded);
        self.scale("per_layer_inputs", sum, std::f32::consts::FRAC_1_SQRT_2)
    }

    /// Adds a layer's part of [`Network::per_layer_inputs`], gated by `x`.
    pub fn add_layer_input(&mut self, x: TensorId, inputs: TensorId, length: u32) -> TensorId {
        let y = self.layer_input(x, inputs, length);
        self.add("layer_residual", x, y)
    }

    fn layer_input(&mut self, x: TensorId, inputs: TensorId, length: u32) -> TensorId {
        let h = self.h;
        let input = self.b.slice("layer_input", inputs, self.cols(inputs), self.layer * length, length);
        let gate = self.linear("layer_gate", "inp_gate", x, length);
        let y = self.b.glu(gate, input, Gate::Gelu);
        let y = self.linear("layer_proj", "proj", y, h.embedding_length);
        self.norm_as("layer_post_norm", "post_norm", y)
    }

    /// The number of layers with KV caches of their own. The last two of them, one of each kind, serve those after them;
    /// `period` is that of windows.
    pub fn layers_with_caches(&mut self, period: u32) -> u32 {
        let h = self.h;
        let own = h.block_count - h.shared_kv_layers;
        let (local, global) = (own.saturating_sub(2), own.saturating_sub(1));
        if h.shared_kv_layers > 0
            && (own < 2 || !h.is_windowed(local, period) || h.is_windowed(global, period))
        {
            self.b.fail(format!("layers {local} and {global}: expected one with a window, then one without"));
        }
        own
    }

    /// The layer whose cache this layer uses, if it comes after the first `own` ones.
    pub fn cache_of(&self, own: u32, is_local: bool) -> Option<u32> {
        (self.layer >= own).then(|| own.saturating_sub(if is_local { 2 } else { 1 }))
    }

    /// All streams of Gemma 3n from the first: products of it, with its length.
    pub fn streams(&mut self, x: TensorId) -> Streams {
        let cols = self.cols(x);
        let weight = self.b.stacked("altup_proj.weight", STREAMS - 1, 0..STREAMS - 1, cols, cols);
        let others = self.b.linear("streams", x, weight, None);
        let others = self.with_length_of(x, others);
        // Any finite numbers, times 0, plus 1.
        let some = self.b.slice("some", x, cols, 0, STREAMS - 1);
        let zeros = self.b.unary("zeros", some, Unary::Scale(0.0));
        let ones = self.b.unary("ones", zeros, Unary::Shift(1.0));
        Streams { active: x, others, ones }
    }

    /// Each part of `y` with the length of `x`.
    fn with_length_of(&mut self, x: TensorId, y: TensorId) -> TensorId {
        let cols = self.cols(x);
        let length = self.b.spread("length", x, NormKind::Rms, TINY, cols);
        let y = self.b.norm("unit", y, NormKind::Rms, None, None, TINY, cols);
        self.b.mix("of_length", y, length, 1)
    }

    /// The weights of streams in a layer, from one of them (AltUp's router): `rows` of them.
    fn stream_weights(&mut self, name: &str, x: TensorId, rows: u32) -> TensorId {
        let y = self.norm_as("altup_norm", "altup_router_norm", x);
        let y = self.scale("altup_input", y, 1.0 / self.cols(x) as f32);
        let y = self.linear("altup_router", "altup_router", y, STREAMS);
        let y = self.b.unary("altup_tanh", y, Unary::SoftCap(1.0));
        self.linear(name, name, y, rows)
    }

    /// Adds to the streams what is for the active one and for the others, in one row.
    fn add_to_streams(&mut self, streams: &Streams, all: TensorId) -> Streams {
        let (cols, row) = (self.cols(streams.active), self.cols(all));
        let active = self.b.slice("of_active", all, row, 0, cols);
        let others = self.b.slice("of_others", all, row, cols, row - cols);
        let active = self.add("active", active, streams.active);
        let others = self.add("others", others, streams.others);
        Streams { active, others, ..*streams }
    }

    /// Predicts a layer's streams: adds to each a weighted sum of all.
    pub fn predict(&mut self, streams: &Streams) -> Streams {
        let weights = self.stream_weights("altup_predict_coef", streams.active, STREAMS * STREAMS);
        let first = self.b.slice("of_first", weights, STREAMS, 0, 1);
        let rest = self.b.slice("of_rest", weights, STREAMS, 1, STREAMS - 1);
        let a = self.b.mix("predicted_by_first", streams.active, first, 1);
        let b = self.b.mix("predicted_by_rest", streams.others, rest, STREAMS - 1);
        let all = self.add("predicted", a, b);
        self.add_to_streams(streams, all)
    }

    /// Corrects what was predicted by how the computed stream, `x`, differs from it.
    pub fn correct(&mut self, predicted: Streams, x: TensorId) -> Streams {
        let weights = self.stream_weights("altup_correct_coef", x, STREAMS);
        let weights = self.b.unary("altup_weights", weights, Unary::Shift(1.0));
        let negative = self.b.unary("negative", predicted.active, Unary::Scale(-1.0));
        let news = self.add("innovation", x, negative);
        let all = self.b.mix("corrections", news, weights, 1);
        self.add_to_streams(&predicted, all)
    }

    /// Adds a layer's part of [`Network::per_layer_inputs`], gated by the active stream, to the other streams.
    pub fn add_layer_input_to_others(&mut self, streams: Streams, inputs: TensorId, length: u32) -> Streams {
        let cols = self.cols(streams.active);
        let weight = self.weight("altup_correct_scale.weight", 1, cols);
        let x = self.b.mul("altup_scaled", streams.active, weight);
        let y = self.layer_input(x, inputs, length);
        let all = self.b.mix("layer_inputs", y, streams.ones, 1);
        Streams { others: self.add("others_with_inputs", streams.others, all), ..streams }
    }

    /// The mean of all streams, the others after products that keep the length of the active one.
    pub fn mean_of_streams(&mut self, streams: Streams) -> TensorId {
        self.b.segment("streams");
        self.prefix.clear();
        let mut sum = streams.active;
        let (cols, all) = (self.cols(sum), self.cols(streams.others));
        for i in 0..STREAMS - 1 {
            let weight = self.b.stacked("altup_unembd_proj.weight", STREAMS - 1, i..i + 1, cols, cols);
            let x = self.b.slice("stream", streams.others, all, i * cols, cols);
            let y = self.b.linear("unembedded", x, weight, None);
            let y = self.with_length_of(streams.active, y);
            sum = self.add("sum_of_streams", sum, y);
        }
        self.scale("mean_of_streams", sum, 1.0 / STREAMS as f32)
    }

    /// Products of low rank, normalised, plus their input (Laurel).
    pub fn laurel(&mut self, x: TensorId, rank: u32) -> TensorId {
        let y = self.linear("laurel_l", "laurel_l", x, rank);
        let y = self.linear("laurel_r", "laurel_r", y, self.cols(x));
        let y = self.norm_as("laurel_norm", "laurel_post_norm", y);
        self.add("laurel", y, x)
    }

    /// [`Network::gated_mlp`] of whose gate remains what is so many standard deviations above its mean.
    pub fn sparse_mlp(&mut self, x: TensorId, deviations: Option<f32>, act: Gate) -> TensorId {
        let hidden = self.hidden();
        let [mut gate, up] = self.gate_and_up(x);
        if let Some(deviations) = deviations {
            // Of a sample, not of a population.
            let most = deviations * (hidden as f32 / (hidden.max(2) - 1) as f32).sqrt();
            let spread = self.b.spread("gate_spread", gate, NormKind::Layer, TINY, hidden);
            let unit = self.b.norm("gate_unit", gate, NormKind::Layer, None, None, TINY, hidden);
            let above = self.b.unary("gate_above", unit, Unary::Shift(-most));
            let above = self.b.unary("gate_relu", above, Unary::Relu);
            gate = self.b.mix("gate_sparse", above, spread, 1);
        }
        self.gated(gate, up, act)
    }

    /// Multiplies by the layer's factor, if the file has one.
    pub fn layer_scale(&mut self, x: TensorId) -> TensorId {
        let name = format!("{}layer_output_scale.weight", self.prefix);
        match self.b.optional(&name, 1, 1) {
            Some(factor) => self.b.mul("layer_scaled", x, factor),
            None => x,
        }
    }

    /// A short convolution between two gates (LFM2).
    pub fn short_conv(&mut self, x: TensorId, taps: u32) -> TensorId {
        let cols = self.h.embedding_length;
        let parts = [("conv_in_gate", cols), ("conv_out_gate", cols), ("conv_in", cols)];
        let [in_gate, out_gate, x] = self.fused_linear("shortconv.in_proj", x, parts);
        let x = self.b.glu(in_gate, x, Gate::Identity);
        let weight = self.weight("shortconv.conv.weight", cols, taps);
        let state = State::recurrent(format!("conv.{}", self.layer), cols, 1, taps.saturating_sub(1));
        let state = self.b.state(state);
        let x = self.b.conv("conv", x, weight, None, state);
        let x = self.b.glu(out_gate, x, Gate::Identity);
        self.linear("shortconv_out", "shortconv.out_proj", x, cols)
    }

    /// A layer of the gated delta rule (Yang, Kautz & Hatamizadeh 2024), as in Qwen3-Next: queries, keys and values pass
    /// a short convolution, queries and keys have length 1, and results are normalised and gated.
    pub fn gated_delta_net(&mut self, x: TensorId) -> TensorId {
        let h = self.h;
        let taps = self.required("ssm.conv_kernel", h.ssm_conv_kernel);
        let inner = self.required("ssm.inner_size", h.ssm_inner_size);
        let key_dim = self.required("ssm.state_size", h.ssm_state_size).max(1);
        let heads = self.required("ssm.time_step_rank", h.ssm_time_step_rank).max(1);
        let key_heads = self.required("ssm.group_count", h.ssm_group_count);
        let (keys, value_dim) = (key_heads.saturating_mul(key_dim), inner / heads);
        let all = keys.saturating_mul(2).saturating_add(inner);
        if !inner.is_multiple_of(heads) || !heads.is_multiple_of(key_heads.max(1)) || all > MAX_EXTENT {
            self.b.fail(format!(
                "{key_heads} heads of {key_dim} elements and {inner} elements of values for {heads} heads: expected at \
                most {MAX_EXTENT} elements in all, whole heads, and as many of values for each of keys"
            ));
            return x;
        }
        let parts = [("q", keys), ("k", keys), ("v", inner)];
        let of_key = inner / key_heads.max(1);
        let (projected, gate) = if self.has("ssm_in.weight") {
            // Older files of Qwen3-Next: the parts alternate, key head by key head.
            let all = self.linear("qkvz", "ssm_in", x, keys.saturating_mul(2).saturating_add(2 * inner));
            let [q, k, v, gate] = self.alternating(
                all,
                key_heads,
                [("q", key_dim), ("k", key_dim), ("v", of_key), ("gate", of_key)],
            );
            ([q, k, v], gate)
        } else {
            (self.fused_linear("attn_qkv", x, parts), self.linear("gate", "attn_gate", x, inner))
        };
        let bias = self.weight("ssm_dt.bias", 1, heads);
        let neighbours = self.has("ssm_ba.weight");
        let [beta, decay] = if neighbours {
            let all = self.linear("ba", "ssm_ba", x, 2 * heads);
            let each = heads / key_heads.max(1);
            let [beta, decay] = self.alternating(all, key_heads, [("beta", each), ("alpha", each)]);
            let bias = self.b.embed(bias, Index::First, 1.0);
            [beta, self.add("decay", decay, bias)]
        } else {
            let beta = self.linear("beta", "ssm_beta", x, heads);
            let weight = self.weight("ssm_alpha.weight", heads, h.embedding_length);
            [beta, self.b.linear("decay", x, weight, Some(bias))]
        };
        let [q, k, v] = self.convolved(parts, projected, taps);
        let (q, k) = self.unit_queries_and_keys(q, k, key_dim);
        let a = self.weight("ssm_a", 1, heads);
        let state =
            self.b.state(State::recurrent(format!("delta.{}", self.layer), heads, key_dim, value_dim));
        // Once for the length of queries, once as in attention.
        let rule = Rule::Delta { beta, scale: 1.0 / key_dim as f32, neighbours };
        let y = self.b.recur([q, k, v], decay, a, rule, state);
        let y = self.norm_over("ssm_norm", "ssm_norm", y, value_dim);
        let y = self.b.glu(gate, y, Gate::Silu);
        self.linear("ssm_out", "ssm_out", y, h.embedding_length)
    }

    /// A layer of Kimi Delta Attention (Kimi Team 2025): the gated delta rule whose states decay row by row. Decays and the gate of
    /// the results are products of low rank.
    pub fn kimi_delta_attention(&mut self, x: TensorId) -> TensorId {
        let h = self.h;
        let taps = self.required("ssm.conv_kernel", h.ssm_conv_kernel);
        let dim = self.required("kda.head_dim", h.kda_head_dim).max(1);
        let heads = Hparams::at(&h.head_count, self.layer);
        let inner = heads.saturating_mul(dim);
        if inner == 0 || inner > MAX_EXTENT {
            self.b.fail(format!(
                "layer {}: {heads} heads of {dim} elements: expected 1 to {MAX_EXTENT} elements in all",
                self.layer
            ));
            return x;
        }
        let [q, k, v] = ["q", "k", "v"].map(|part| {
            let y = self.linear(part, &format!("attn_{part}"), x, inner);
            // A matrix of one row for each channel.
            let weight =
                self.b.stacked(&format!("{}ssm_conv1d_{part}.weight", self.prefix), inner, 0..inner, 1, taps);
            let state = format!("conv_{part}.{}", self.layer);
            let state = self.b.state(State::recurrent(state, inner, 1, taps.saturating_sub(1)));
            let y = self.b.conv(&format!("{part}_conv"), y, weight, None, state);
            self.b.unary(&format!("{part}_silu"), y, Unary::Silu)
        });
        let low_rank = |n: &mut Self, name: &str, bias: Option<TensorId>| {
            let y = n.linear(&format!("{name}_low"), &format!("ssm_{name}_a"), x, dim);
            let weight = n.weight(&format!("ssm_{name}_b.weight"), inner, dim);
            n.b.linear(name, y, weight, bias)
        };
        let bias = self.weight("ssm_dt.bias", 1, inner);
        let decay = low_rank(self, "f", Some(bias));
        let beta = self.linear("beta", "ssm_beta", x, heads);
        let (q, k) = self.unit_queries_and_keys(q, k, dim);
        let a = self.b.flat(&format!("{}ssm_a", self.prefix), heads, 1);
        let state = self.b.state(State::recurrent(format!("delta.{}", self.layer), heads, dim, dim));
        let rule = Rule::Delta { beta, scale: 1.0 / dim as f32, neighbours: false };
        let y = self.b.recur([q, k, v], decay, a, rule, state);
        let y = self.norm_over("ssm_norm", "ssm_norm", y, dim);
        let gate = low_rank(self, "g", None);
        let y = self.b.glu(gate, y, Gate::Sigmoid);
        self.linear("attn_output", "attn_output", y, h.embedding_length)
    }

    /// Queries and keys of the delta rule: keys have length 1. Queries are longer, by the root of the number of elements.
    fn unit_queries_and_keys(&mut self, q: TensorId, k: TensorId, key_dim: u32) -> (TensorId, TensorId) {
        // The root of the mean square is the length over the root of the number of elements.
        let mut unit = |name: &str, x: TensorId| {
            self.b.norm(name, x, NormKind::Rms, None, None, self.norm_eps / key_dim as f32, key_dim)
        };
        let (q, k) = (unit("q_norm", q), unit("k_norm", k));
        (q, self.scale("k_unit", k, 1.0 / (key_dim as f32).sqrt()))
    }

    /// The parts of a row that alternate, group by group.
    fn alternating<const N: usize>(
        &mut self,
        x: TensorId,
        groups: u32,
        parts: [(&str, u32); N],
    ) -> [TensorId; N] {
        let (group, mut first) = (self.cols(x) / groups.max(1), 0);
        parts.map(|(part, len)| {
            let y = self.b.slice(part, x, group, first, len);
            first += len;
            y
        })
    }

    /// A short convolution of each part, whose weights are stored one after the other, and SiLU.
    fn convolved<const N: usize>(
        &mut self,
        parts: [(&str, u32); N],
        inputs: [TensorId; N],
        taps: u32,
    ) -> [TensorId; N] {
        let all = parts.iter().map(|(_, cols)| cols).sum();
        let name = format!("{}ssm_conv1d", self.prefix);
        let mut first = 0;
        std::array::from_fn(|i| {
            let (part, cols) = parts[i];
            let range = first..first + cols;
            first += cols;
            let weight = self.b.weight_rows(&format!("{name}.weight"), all, range.clone(), taps);
            let bias = self.b.optional_elements(&format!("{name}.bias"), all, range);
            let state = format!("conv_{part}.{}", self.layer);
            let state = self.b.state(State::recurrent(state, cols, 1, taps.saturating_sub(1)));
            let x = self.b.conv(&format!("{part}_conv"), inputs[i], weight, bias, state);
            self.b.unary(&format!("{part}_silu"), x, Unary::Silu)
        })
    }

    /// A layer of Mamba (Gu & Dao 2023): x passes a short convolution, of which B, C and the step of each channel are products, and
    /// results are gated. Each channel is a head.
    pub fn mamba(&mut self, x: TensorId) -> TensorId {
        let h = self.h;
        let taps = self.required("ssm.conv_kernel", h.ssm_conv_kernel);
        let inner = self.required("ssm.inner_size", h.ssm_inner_size);
        let state_size = self.required("ssm.state_size", h.ssm_state_size).max(1);
        let rank = self.required("ssm.time_step_rank", h.ssm_time_step_rank);
        if inner.saturating_mul(state_size) > MAX_EXTENT || rank > MAX_EXTENT {
            self.b.fail(format!(
                "{inner} channels with states of {state_size} elements, from {rank}: expected at most {MAX_EXTENT} in all"
            ));
            return x;
        }
        let [x, gate] = self.fused_linear("ssm_in", x, [("x", inner), ("gate", inner)]);
        let [x] = self.convolved([("x", inner)], [x], taps);
        let parts = self.fused_linear("ssm_x", x, [("dt", rank), ("b", state_size), ("c", state_size)]);
        let [step, k, q] = if h.ssm_dt_b_c_rms {
            let mut unit = |y: TensorId| {
                let cols = self.cols(y);
                self.b.norm("ssm_unit", y, NormKind::Rms, None, None, self.norm_eps, cols)
            };
            parts.map(&mut unit)
        } else {
            parts
        };
        let rate = self.linear("dt_rate", "ssm_dt", step, inner);
        let a = self.b.flat(&format!("{}ssm_a", self.prefix), inner, state_size);
        let d = self.weight("ssm_d", 1, inner);
        let state = State::recurrent(format!("scan.{}", self.layer), inner, state_size, 1);
        let state = self.b.state(state);
        let y = self.b.recur([q, k, x], rate, a, Rule::Scan { d }, state);
        let y = self.b.glu(gate, y, Gate::Silu);
        self.linear("ssm_out", "ssm_out", y, h.embedding_length)
    }

    /// The layer of PLaMo 2 (Preferred Networks 2025): heads as in Mamba 2, whose B, C and steps are normalised products of x after its
    /// convolution.
    pub fn mamba_of_plamo(&mut self, x: TensorId) -> TensorId {
        let h = self.h;
        let taps = self.required("ssm.conv_kernel", h.ssm_conv_kernel);
        let inner = self.required("ssm.inner_size", h.ssm_inner_size);
        let state_size = self.required("ssm.state_size", h.ssm_state_size).max(1);
        let heads = self.required("ssm.time_step_rank", h.ssm_time_step_rank).max(1);
        let value_dim = inner / heads;
        if !inner.is_multiple_of(heads) || inner > MAX_EXTENT / 2 || state_size > MAX_EXTENT / 4 {
            self.b.fail(format!(
                "{inner} elements of values for {heads} heads, and states of {state_size}: expected at most {} elements, and whole \
                heads",
                MAX_EXTENT / 2
            ));
            return x;
        }
        // Files do not have it.
        let rank = (h.embedding_length / 16).max(64);
        let all = self.linear("zx", "ssm_in", x, 2 * inner);
        let [gate, x] = self.alternating(all, heads, [("gate", value_dim), ("x", value_dim)]);
        let [x] = self.convolved([("x", inner)], [x], taps);
        let [k, q, step] =
            self.fused_linear("ssm_x", x, [("b", state_size), ("c", state_size), ("dt", rank)]);
        let (k, q) = (self.norm_as("b_norm", "ssm_b_norm", k), self.norm_as("c_norm", "ssm_c_norm", q));
        let step = self.norm_as("dt_norm", "ssm_dt_norm", step);
        let rate = self.linear("dt_rate", "ssm_dt", step, heads);
        let [a, d] = ["ssm_a", "ssm_d"].map(|name| self.weight(name, 1, heads));
        let state = State::recurrent(format!("scan.{}", self.layer), heads, state_size, value_dim);
        let state = self.b.state(state);
        let y = self.b.recur([q, k, x], rate, a, Rule::Scan { d }, state);
        let y = self.b.glu(gate, y, Gate::Silu);
        self.linear("ssm_out", "ssm_out", y, h.embedding_length)
    }

    /// A layer of Mamba 2 (Dao & Gu 2024): x, B and C pass a short convolution, and results are gated, then normalised.
    pub fn mamba_2(&mut self, x: TensorId) -> TensorId {
        let h = self.h;
        let taps = self.required("ssm.conv_kernel", h.ssm_conv_kernel);
        let inner = self.required("ssm.inner_size", h.ssm_inner_size);
        let state_size = self.required("ssm.state_size", h.ssm_state_size).max(1);
        let heads = self.required("ssm.time_step_rank", h.ssm_time_step_rank).max(1);
        let groups = self.required("ssm.group_count", h.ssm_group_count).max(1);
        let (keys, value_dim) = (groups.saturating_mul(state_size), inner / heads);
        let convolved = keys.saturating_mul(2).saturating_add(inner);
        if !inner.is_multiple_of(heads) || !heads.is_multiple_of(groups) || convolved > MAX_EXTENT {
            self.b.fail(format!(
                "{inner} elements of values for {heads} heads, and {groups} groups of {state_size} elements: expected at most \
                {MAX_EXTENT} elements in all, whole heads, and as many heads in each group"
            ));
            return x;
        }
        let all = inner + convolved + heads;
        let name = format!("{}ssm_in.weight", self.prefix);
        let mut first = 0;
        let mut weight = |b: &mut Builder<'_>, rows: u32| {
            let range = first..first + rows;
            first += rows;
            b.weight_rows(&name, all, range, h.embedding_length)
        };
        let gate = weight(self.b, inner);
        let gate = self.b.linear("gate", x, gate, None);
        let parts = [("x", inner), ("b", keys), ("c", keys)];
        let projected = parts.map(|(part, rows)| {
            let weight = weight(self.b, rows);
            self.b.linear(part, x, weight, None)
        });
        let rate = weight(self.b, heads);
        let bias = self.weight("ssm_dt.bias", 1, heads);
        let rate = self.b.linear("dt", x, rate, Some(bias));
        let [v, k, q] = self.convolved(parts, projected, taps);
        let [a, d] = ["ssm_a", "ssm_d"].map(|name| self.b.flat(&format!("{}{name}", self.prefix), heads, 1));
        let state = State::recurrent(format!("scan.{}", self.layer), heads, state_size, value_dim);
        let state = self.b.state(state);
        let y = self.b.recur([q, k, v], rate, a, Rule::Scan { d }, state);
        let mut y = self.b.glu(gate, y, Gate::Silu);
        if self.has("ssm_norm.weight") {
            // Each group has weights of its own.
            y = self.b.norm("ssm_norm", y, NormKind::Rms, None, None, self.norm_eps, inner / groups);
            let weight = self.b.flat(&format!("{}ssm_norm.weight", self.prefix), groups, inner / groups);
            y = self.b.mul("ssm_norm_weighted", y, weight);
        }
        self.linear("ssm_out", "ssm_out", y, h.embedding_length)
    }

    /// Checks that a text's tokens have one position: each rotated pair belongs to one of the first three sections, which
    /// take turns.
    pub fn check_text_sections(&mut self) {
        let Some(sections) = &self.h.rope_dimension_sections else { return };
        let pairs = self.h.rope_dimension_count / 2;
        let belongs = |pair: u32| {
            let length = sections.get(pair as usize % 3).copied().unwrap_or(0);
            pair < length.saturating_mul(3)
        };
        if let Some(pair) = (0..pairs).find(|&pair| !belongs(pair)) {
            self.b.fail(format!(
                "key `{}.rope.dimension_sections`: {sections:?} leave out pair {pair} of {pairs}",
                self.h.architecture
            ));
        }
    }

    fn hidden(&self) -> u32 {
        Hparams::at(&self.h.feed_forward_length, self.layer)
    }

    /// `down(act(up x))` (Vaswani et al. 2017).
    pub fn mlp(&mut self, x: TensorId, act: Unary) -> TensorId {
        let up = self.linear("ffn_up", "ffn_up", x, self.hidden());
        let y = self.b.unary("ffn_act", up, act);
        self.linear("ffn_down", "ffn_down", y, self.h.embedding_length)
    }

    /// `down(act(gate x) * (up x))` (Shazeer 2020).
    pub fn gated_mlp(&mut self, x: TensorId, act: Gate) -> TensorId {
        let [gate, up] = self.gate_and_up(x);
        self.gated(gate, up, act)
    }

    fn gate_and_up(&mut self, x: TensorId) -> [TensorId; 2] {
        ["ffn_gate", "ffn_up"].map(|name| self.linear(name, name, x, self.hidden()))
    }

    /// The same with gate and up in one tensor, in this order.
    pub fn fused_gated_mlp(&mut self, x: TensorId, act: Gate) -> TensorId {
        let hidden = self.hidden();
        let [gate, up] = self.fused_linear("ffn_up", x, [("ffn_gate", hidden), ("ffn_up", hidden)]);
        self.gated(gate, up, act)
    }

    /// The same, gated by the product of some functions and normalised before the last product (BitNet).
    pub fn sub_normed_mlp(&mut self, x: TensorId, gates: &[Gate]) -> TensorId {
        let [gate, up] = self.gate_and_up(x);
        let y = gates.iter().fold(up, |y, &act| self.b.glu(gate, y, act));
        let y = self.norm("ffn_sub_norm", y);
        self.linear("ffn_down", "ffn_down", y, self.h.embedding_length)
    }

    fn gated(&mut self, gate: TensorId, up: TensorId, act: Gate) -> TensorId {
        let y = self.b.glu(gate, up, act);
        self.linear("ffn_down", "ffn_down", y, self.h.embedding_length)
    }

    /// A mixture of gated feed-forward experts: a router chooses some for each token (Shazeer et al. 2017).
    /// The file's settings of the router override `gating` and `normalise`.
    pub fn experts(&mut self, x: TensorId, gating: Gating, normalise: bool, act: Gate) -> TensorId {
        self.experts_routed_by(x, x, gating, normalise, act)
    }

    /// A gated feed-forward block in the layers that the file says come first, then a mixture of experts, with an expert for all
    /// tokens if the file has one.
    pub fn mlp_then_experts(&mut self, x: TensorId, gating: Gating, normalise: bool, act: Gate) -> TensorId {
        if self.h.expert_count == 0 || self.layer < self.h.leading_dense_block_count {
            return self.gated_mlp(x, act);
        }
        let chosen = self.experts(x, gating, normalise, act);
        self.add_shared_expert(x, chosen, act)
    }

    /// The same where the router reads another input than the experts.
    pub fn experts_routed_by(
        &mut self,
        routed_by: TensorId,
        x: TensorId,
        gating: Gating,
        normalise: bool,
        act: Gate,
    ) -> TensorId {
        self.experts_with_gate("ffn_gate_exps", routed_by, x, gating, normalise, act)
    }

    fn experts_with_gate(
        &mut self,
        gate: &str,
        routed_by: TensorId,
        x: TensorId,
        gating: Gating,
        normalise: bool,
        act: Gate,
    ) -> TensorId {
        let (h, n) = (self.h, self.h.expert_count);
        if h.expert_shared_count > 0 && !self.has("ffn_up_shexp.weight") {
            self.b.fail(format!(
                "key `{}.expert_shared_count`: the file has no shared experts",
                h.architecture
            ));
        }
        let (cols, hidden) = (self.cols(x), h.expert_feed_forward_length.unwrap_or(self.hidden()));
        let logits = self.linear("router", "ffn_gate_inp", routed_by, n);
        let parts = [(gate, hidden, cols), ("ffn_up_exps", hidden, cols), ("ffn_down_exps", cols, hidden)];
        let fused = format!("{}ffn_gate_up_exps.weight", self.prefix);
        let weights = if self.b.has(&fused) {
            let mut rows = |first: u32| {
                self.b.expert_rows(&fused, n, hidden.saturating_mul(2), first..first + hidden, cols)
            };
            let (gate, up) = (rows(0), rows(hidden));
            [gate, up, self.expert_weights(n, [parts[2]])[0]]
        } else {
            self.expert_weights(n, parts)
        };
        let scales = self.b.optional(&format!("{}ffn_down_exps.scale", self.prefix), 1, n);
        let has_biases = parts.iter().any(|(name, ..)| self.has(&format!("{name}.bias")));
        let biases =
            has_biases.then(|| parts.map(|(name, rows, _)| self.weight(&format!("{name}.bias"), n, rows)));
        let bias = self.bias("exp_probs_b", n);
        let groups = (h.expert_group_count > 1)
            .then_some(Groups { count: h.expert_group_count, used: h.expert_group_used_count });
        let routes = self.b.route_among(
            logits,
            bias,
            groups,
            h.expert_used_count,
            h.expert_gating_func.unwrap_or(gating),
            h.expert_weights_norm.unwrap_or(normalise),
            h.expert_weights_scale.unwrap_or(1.0),
            scales,
        );
        self.b.experts(x, routes, weights, biases, act)
    }

    /// What the router of Gemma 4 reads: `x` normalised, times factors over the root of their number.
    pub fn router_input(&mut self, x: TensorId) -> TensorId {
        let cols = self.cols(x);
        let factors = self.weight("ffn_gate_inp.scale", 1, cols);
        let y = self.b.norm("router_norm", x, self.norm, Some(factors), None, self.norm_eps, cols);
        self.scale("router_input", y, 1.0 / (cols as f32).sqrt())
    }

    /// A mixture of experts of which each token uses one, whose input, not its result, is multiplied by its weight (Llama 4);
    /// `x` is not yet normalised. And an expert for all tokens.
    pub fn input_weighted_experts(&mut self, x: TensorId, gating: Gating, act: Gate) -> TensorId {
        let (h, n, cols) = (self.h, self.h.expert_count, self.cols(x));
        let hidden = h.expert_feed_forward_length.unwrap_or(self.hidden());
        if h.expert_used_count != 1 {
            self.b.fail(format!(
                "key `{}.expert_used_count`: only 1 is supported, got {}",
                h.architecture, h.expert_used_count
            ));
        }
        let y = self.norm("ffn_norm", x);
        let logits = self.linear("router", "ffn_gate_inp", y, n);
        let (ids, weight) = self.b.route(logits, 1, gating, false, h.expert_weights_scale.unwrap_or(1.0));
        // The softmax of one logit.
        let (_, one) = self.b.route(logits, 1, Gating::SoftmaxOfTop, false, 1.0);
        // The norm's weights, times the token's weight, times what the norm multiplies by them.
        let factors = self.b.column(&format!("{}ffn_norm.weight", self.prefix), cols);
        let factors = self.b.linear("expert_factors", weight, factors, None);
        let unit = self.b.norm("ffn_unit", x, self.norm, None, None, self.norm_eps, cols);
        let input = self.b.glu(factors, unit, Gate::Identity);
        let parts =
            [("ffn_gate_exps", hidden, cols), ("ffn_up_exps", hidden, cols), ("ffn_down_exps", cols, hidden)];
        let weights = self.expert_weights(n, parts);
        let chosen = self.b.experts(input, (ids, one), weights, None, act);
        self.add_shared_expert(y, chosen, act)
    }

    /// A mixture of experts without gates, with squared ReLU, and an expert for all tokens (Nemotron 3). The chosen experts
    /// may read a projection of the input to fewer elements.
    pub fn squared_relu_experts(&mut self, x: TensorId) -> TensorId {
        let h = self.h;
        let latent = h.moe_latent_size.map(|length| self.linear("latent", "ffn_latent_down", x, length));
        // Squared ReLU is ReLU as a gate on itself.
        let (gate, input) = ("ffn_up_exps", latent.unwrap_or(x));
        let mut y = self.experts_with_gate(gate, x, input, Gating::Sigmoid, false, Gate::Relu);
        if latent.is_some() {
            y = self.linear("latent_out", "ffn_latent_up", y, h.embedding_length);
        }
        let shared = self.linear("shared_up", "ffn_up_shexp", x, self.shared_hidden());
        let shared = self.b.unary("shared_act", shared, Unary::ReluSquared);
        let shared = self.linear("shared_down", "ffn_down_shexp", shared, h.embedding_length);
        self.add("ffn_shared", y, shared)
    }

    /// A mixture of experts without gates, with GELU (Nomic).
    pub fn gelu_experts(&mut self, x: TensorId) -> TensorId {
        // GELU is the normal distribution function as a gate on itself.
        self.experts_with_gate("ffn_up_exps", x, x, Gating::Softmax, false, Gate::Normal)
    }

    fn expert_weights<const N: usize>(
        &mut self,
        experts: u32,
        parts: [(&str, u32, u32); N],
    ) -> [TensorId; N] {
        parts.map(|(name, rows, cols)| {
            self.b.expert_weight(&format!("{}{name}.weight", self.prefix), experts, rows, cols)
        })
    }

    fn shared_hidden(&self) -> u32 {
        let h = self.h;
        let together = |length: u32| length.saturating_mul(h.expert_shared_count);
        let stated =
            h.expert_feed_forward_length.map(together).filter(|&length| (1..=MAX_EXTENT).contains(&length));
        h.expert_shared_feed_forward_length.or(stated).unwrap_or(self.hidden())
    }

    /// Adds the result of an expert that all tokens use (DeepSeekMoE, Dai et al. 2024) to that of the chosen ones, if the
    /// file has such an expert.
    pub fn add_shared_expert(&mut self, x: TensorId, chosen: TensorId, act: Gate) -> TensorId {
        if !self.has("ffn_up_shexp.weight") {
            return chosen;
        }
        let hidden = self.shared_hidden();
        let gate = self.linear("shared_gate", "ffn_gate_shexp", x, hidden);
        let up = self.linear("shared_up", "ffn_up_shexp", x, hidden);
        let y = self.b.glu(gate, up, act);
        let shared = self.linear("shared_down", "ffn_down_shexp", y, self.h.embedding_length);
        self.add("ffn_shared", chosen, shared)
    }

    /// The same with a gate: the expert's result is multiplied by `σ(gate · x)`. That is a mixture of one expert.
    pub fn add_gated_shared_expert(&mut self, x: TensorId, chosen: TensorId, act: Gate) -> TensorId {
        let (cols, hidden) = (self.h.embedding_length, self.shared_hidden());
        let logit = self.linear("shared_router", "ffn_gate_inp_shexp", x, 1);
        let routes = self.b.route(logit, 1, Gating::Sigmoid, false, 1.0);
        let parts = [
            ("ffn_gate_shexp", hidden, cols),
            ("ffn_up_shexp", hidden, cols),
            ("ffn_down_shexp", cols, hidden),
        ];
        let weights = self.expert_weights(1, parts);
        let shared = self.b.experts(x, routes, weights, None, act);
        self.add("ffn_shared", chosen, shared)
    }

    /// A layer with norms before its blocks: `x += attention(norm x)`, then `x += feed_forward(norm x)`.
    pub fn pre_norm_layer(
        &mut self,
        x: TensorId,
        attention: &Attention<'_>,
        feed_forward: impl FnOnce(&mut Self, TensorId) -> TensorId,
    ) -> TensorId {
        let y = self.norm("attn_norm", x);
        let y = self.attention(y, attention);
        let x = self.add("attn_residual", x, y);
        let y = self.norm("ffn_norm", x);
        let y = feed_forward(self, y);
        self.add("ffn_residual", x, y)
    }

    /// A layer whose blocks read the same input (Wang & Komatsuzaki 2021):
    /// `x += attention(norm x) + feed_forward(norm x)`.
    pub fn parallel_layer(
        &mut self,
        x: TensorId,
        attention: &Attention<'_>,
        feed_forward: impl FnOnce(&mut Self, TensorId) -> TensorId,
    ) -> TensorId {
        let normed = self.norm("attn_norm", x);
        let attended = self.attention(normed, attention);
        let fed = feed_forward(self, normed);
        let y = self.add("ffn_residual", fed, x);
        self.add("attn_residual", y, attended)
    }

    /// A layer that normalises the results of its blocks, not their inputs (OLMo 2): `x += norm(attention(x))`, then
    /// `x += norm(feed_forward(x))`.
    pub fn result_norm_layer(
        &mut self,
        x: TensorId,
        attention: &Attention<'_>,
        feed_forward: impl FnOnce(&mut Self, TensorId) -> TensorId,
    ) -> TensorId {
        let y = self.attention(x, attention);
        let y = self.norm_as("attn_post_norm", "post_attention_norm", y);
        let x = self.add("attn_residual", x, y);
        let y = feed_forward(self, x);
        let y = self.norm_as("ffn_post_norm", "post_ffw_norm", y);
        self.add("ffn_residual", x, y)
    }

    /// A layer with norms before and after each of its blocks (Gemma 2): `x += norm(attention(norm x))`, then
    /// `x += norm(feed_forward(norm x))`.
    pub fn sandwich_norm_layer(
        &mut self,
        x: TensorId,
        attention: &Attention<'_>,
        feed_forward: impl FnOnce(&mut Self, TensorId) -> TensorId,
    ) -> TensorId {
        let x = self.sandwich_norm_attention(x, attention);
        let y = self.norm("ffn_norm", x);
        let y = feed_forward(self, y);
        let y = self.norm_as("ffn_post_norm", "post_ffw_norm", y);
        self.add("ffn_residual", x, y)
    }

    /// The first half of such a layer.
    pub fn sandwich_norm_attention(&mut self, x: TensorId, attention: &Attention<'_>) -> TensorId {
        let y = self.norm("attn_norm", x);
        let y = self.attention(y, attention);
        let y = self.norm_as("attn_post_norm", "post_attention_norm", y);
        self.add("attn_residual", x, y)
    }

    /// The second half of a layer of Gemma 4 with a mixture of experts beside its feed-forward block, each between norms.
    pub fn experts_beside_mlp(&mut self, x: TensorId, act: Gate) -> TensorId {
        let y = self.norm("ffn_norm", x);
        let y = self.gated_mlp(y, act);
        let fed = self.norm_as("mlp_post_norm", "post_ffw_norm_1", y);
        let (routed_by, y) = (self.router_input(x), self.norm_as("experts_norm", "pre_ffw_norm_2", x));
        let y = self.experts_routed_by(routed_by, y, Gating::Softmax, true, act);
        let chosen = self.norm_as("experts_post_norm", "post_ffw_norm_2", y);
        let y = self.add("ffn_mixed", fed, chosen);
        let y = self.norm_as("ffn_post_norm", "post_ffw_norm", y);
        self.add("ffn_residual", x, y)
    }

    /// A layer with norms after its blocks (Vaswani et al. 2017): `x = norm(x + attention(x))`, then
    /// `x = norm(x + feed_forward(x))`.
    pub fn post_norm_layer(
        &mut self,
        x: TensorId,
        attention: &Attention<'_>,
        feed_forward: impl FnOnce(&mut Self, TensorId) -> TensorId,
    ) -> TensorId {
        let y = self.attention(x, attention);
        let x = self.add("attn_residual", x, y);
        let x = self.norm("attn_output_norm", x);
        let y = feed_forward(self, x);
        let x = self.add("ffn_residual", x, y);
        self.norm("layer_output_norm", x)
    }

    /// The end of an encoder whose last norm is apart: gathers the output rows, normalises them, and multiplies them with the
    /// matrices for pooled vectors, if there are any. A mean of products is the product of the mean.
    pub fn normed_embeddings(mut self, x: TensorId) {
        self.b.segment("output");
        self.prefix.clear();
        let x = self.b.gather(x);
        let mut x = self.norm_as("norm", "output_norm", x);
        if self.has("dense_2.weight") {
            let features = self.required("dense_2_feat_out", self.h.dense_2_feat_out);
            x = self.linear("dense_2", "dense_2", x, features);
        }
        if self.has("dense_3.weight") {
            x = self.linear("dense_3", "dense_3", x, self.h.embedding_length);
        }
        self.give_embeddings(x);
    }

    /// The end of an encoder: gathers the output rows.
    pub fn embeddings(mut self, x: TensorId) {
        self.b.segment("output");
        let x = self.b.gather(x);
        self.give_embeddings(x);
    }

    /// The end of an encoder with ModernBERT's classification head: a matrix, GELU, a norm, a matrix. It reads the mean of all
    /// tokens, or the first one.
    pub fn normed_scores(mut self, x: TensorId) {
        self.b.segment("output");
        self.prefix.clear();
        let x = self.norm_as("norm", "output_norm", x);
        let x = match self.h.classifier_pooling {
            None | Some(Pooling::Mean) => self.mean_of_tokens(x),
            Some(Pooling::Cls) => x,
            Some(other) => {
                let key = format!("{}.classifier.pooling_type", self.h.architecture);
                self.fail(format!("key `{key}`: expected 1 (mean) or 2 (CLS), got {other:?}"));
                x
            }
        };
        let x = self.b.gather(x);
        let cols = self.cols(x);
        let dense = self.linear("dense", "cls", x, cols);
        let gelu = self.b.unary("gelu", dense, Unary::GeluErf);
        let normed = self.norm_as("dense_norm", "cls.norm", gelu);
        let scores = self.linear("scores", "cls.output", normed, self.h.label_count);
        self.give(scores);
    }

    /// The mean of all tokens of a text, in each of its rows: attention whose scores are all zero.
    fn mean_of_tokens(&mut self, x: TensorId) -> TensorId {
        let heads = Hparams::at(&self.h.head_count, 0);
        let length = self.cols(x) / heads.max(1);
        let state = State::new("kv.mean", heads, length, length, self.h.kv_format).after(u32::MAX);
        let state = self.b.state(state);
        self.b.kv_write(x, x, state);
        self.b.attend(x, state, heads, 0.0, None, None)
    }

    fn give_embeddings(&mut self, x: TensorId) {
        let x = if self.h.pooling_type == Some(Pooling::Rank) { self.classification_head(x) } else { x };
        self.give(x);
    }

    fn give(&mut self, x: TensorId) {
        self.b.name(x, "embeddings");
        self.b.output(x);
        self.b.outputs().hidden = Some(x);
    }

    /// Scores of labels: one matrix or two, with a tanh between them, as RoBERTa has them (Liu et al. 2019). It reads the first token,
    /// or a decoder's last one.
    fn classification_head(&mut self, x: TensorId) -> TensorId {
        self.prefix.clear();
        if let Some(pooling @ (Pooling::None | Pooling::Mean | Pooling::Rank)) = self.h.classifier_pooling {
            let architecture = &self.h.architecture;
            self.b.fail(format!(
                "key `{architecture}.classifier.pooling_type`: expected 2 (CLS) or 3 (last), got {pooling:?}"
            ));
        }
        let labels = self.h.label_count;
        if !self.has("cls.weight") {
            return self.linear("scores", "cls.output", x, labels);
        }
        // Without a second matrix, the first one gives the scores.
        let has_scores = self.has("cls.output.weight");
        let dense = self.linear("dense", "cls", x, if has_scores { self.cols(x) } else { labels });
        let tanh = self.b.unary("tanh", dense, Unary::SoftCap(1.0));
        if has_scores { self.linear("scores", "cls.output", tanh, labels) } else { tanh }
    }

    /// The end of a decoder: gathers the output rows and computes their logits, times a factor. The most
    /// likely token and the most likely tokens are computed in segments of their own. Without an output
    /// matrix in the file, the output matrix is the embedding table. A model that embeds ends before its logits.
    pub fn head(self, x: TensorId, scale: f32) {
        self.head_with_norm(x, "output_norm", scale);
    }

    /// [`Network::head`] with another name of the last norm.
    pub fn head_with_norm(mut self, x: TensorId, norm: &str, scale: f32) {
        self.b.segment("output");
        self.prefix.clear();
        let x = self.b.gather(x);
        let x = self.norm_as("norm", norm, x);
        if self.h.embeds() {
            self.give_embeddings(x);
            return;
        }
        let name = if self.has("output.weight") { "output" } else { "token_embd" };
        let weight = self.weight(&format!("{name}.weight"), self.h.vocab_size, self.h.embedding_length);
        let bias = self.bias("output", self.h.vocab_size);
        let logits = self.b.linear("matmul", x, weight, bias);
        let mut logits = self.scale("scaled", logits, scale);
        if let Some(cap) = self.h.final_logit_softcapping {
            logits = self.b.unary("softcap", logits, Unary::SoftCap(cap));
        }
        self.b.name(logits, "logits");
        self.b.output(logits);
        self.b.segment("argmax");
        let best = self.b.arg_max(logits);
        self.b.name(best, "argmax");
        self.b.output(best);
        self.b.segment("topk");
        let (ids, values) = self.b.top_k(logits, super::TOP_K.min(self.h.vocab_size));
        for (id, name) in [(ids, "top_ids"), (values, "top_logits")] {
            self.b.name(id, name);
            self.b.output(id);
        }
        *self.b.outputs() =
            Outputs { logits: Some(logits), arg_max: Some(best), top: Some([ids, values]), hidden: None };
    }
}

/// The slopes of attention with linear biases (Press et al. 2022). For 2^k heads they are a geometric sequence that ends at
/// `2^-max_bias`; further heads have those between the first ones of twice as many heads.
fn slopes(heads: u32, max_bias: f32) -> Arc<[f32]> {
    let known = 1 << heads.max(1).ilog2();
    let slope = |n: u32, of: u32| (-f64::from(max_bias) * f64::from(n) / f64::from(of)).exp2() as f32;
    let further = (0..heads.saturating_sub(known)).map(|i| slope(2 * i + 1, 2 * known));
    (1..=known.min(heads)).map(|n| slope(n, known)).chain(further).collect()
}
