//! The keys and tensors of synthetic files, family by family.

use halite_kernels::formats::Format;

use super::{Family, Formats, Latent, SHORT_ROWS, Shape};
use crate::error::{Error, Result};
use crate::gguf::write::{Encoded, Writer};

/// Minimum elements of a row of a matrix; shorter rows are those of convolutions and columns.
const MATRIX_COLS: u64 = 32;
/// Matrices that are plain in all files: routers and decays.
const PLAIN: &[&str] = &["ffn_gate_inp.weight", "ssm_a"];
/// Taps of the convolutions in front of recurrent states.
const TAPS: u32 = 4;

/// The file without its data.
pub(super) fn header(shape: &Shape, formats: Formats) -> Result<Writer> {
    let mut w = Writer::new(32)?;
    let architecture = shape.family.architecture();
    w.entry("general.architecture", architecture)?;
    w.entry("general.name", format!("{} of random weights", shape.name).as_str())?;
    let head = match shape.family {
        Family::Mamba { .. } => 0,
        _ => shape
            .embedding_length
            .checked_div(shape.head_count)
            .ok_or_else(|| Error::argument("shape", "at least one attention head", 0))?,
    };
    let [dim, hidden, vocab, kv_heads, head] =
        [shape.embedding_length, shape.feed_forward_length, shape.vocab_size, shape.head_count_kv, head]
            .map(u64::from);
    let sizes = Sizes { layers: shape.block_count, dim, hidden, vocab, kv_heads, head };
    let mut file = File { w, shape, architecture, formats, sizes };
    for (key, value) in [
        ("vocab_size", shape.vocab_size),
        ("context_length", shape.context_length),
        ("embedding_length", shape.embedding_length),
        ("block_count", shape.block_count),
        ("attention.head_count", shape.head_count),
        ("expert_count", shape.expert_count),
        ("expert_used_count", shape.expert_used_count),
    ] {
        file.key(key, value)?;
    }
    if shape.rope_freq_base > 0.0 {
        file.key("rope.freq_base", shape.rope_freq_base)?;
    }
    file.key("attention.layer_norm_rms_epsilon", 1e-5f32)?;
    vocabulary(shape.vocab_size, &mut file.w)?;
    file.tensor("token_embd.weight", &[dim, vocab])?;
    let last_norm = if architecture == "lfm2" { "token_embd_norm.weight" } else { "output_norm.weight" };
    file.tensor(last_norm, &[dim])?;
    match shape.family {
        Family::Llama => file.llama()?,
        Family::Lfm2 { taps, attention } => file.lfm2(taps, attention)?,
        Family::Qwen35 { head_length, rotated, key_heads, value_heads, state_size } => {
            file.qwen35(head_length, rotated, key_heads, value_heads, state_size)?;
        }
        Family::GraniteHybrid { heads, state_size, attention } => {
            file.granite_hybrid(heads, state_size, attention)?;
        }
        Family::Mamba { inner, state_size, rank } => file.mamba(inner, state_size, rank)?,
        Family::Deepseek2(latent) => file.deepseek2(&latent)?,
        Family::KimiLinear { latent, state_size, attention } => {
            file.kimi_linear(&latent, state_size, attention)?
        }
        Family::Gemma4 { head_length, input_length, own_layers } => {
            file.gemma4(head_length, input_length, own_layers)?;
        }
    }
    Ok(file.w)
}

/// The sizes that most families use.
#[derive(Clone, Copy)]
struct Sizes {
    layers: u32,
    dim: u64,
    hidden: u64,
    vocab: u64,
    kv_heads: u64,
    /// Elements of a head.
    head: u64,
}

/// A header in the making.
struct File<'a> {
    w: Writer,
    shape: &'a Shape,
    architecture: &'static str,
    formats: Formats,
    sizes: Sizes,
}

impl File<'_> {
    fn llama(&mut self) -> Result<()> {
        let Sizes { layers, dim, hidden, vocab, kv_heads, head } = self.sizes;
        self.w.tensor("output.weight", &[dim, vocab], self.formats.output)?;
        self.key("rope.dimension_count", head as u32)?;
        self.key("attention.head_count_kv", self.shape.head_count_kv)?;
        self.key("feed_forward_length", self.shape.feed_forward_length)?;
        for layer in 0..layers {
            self.attention(layer, dim, dim, kv_heads * head)?;
            self.feed_forward(layer, dim, hidden, self.shape.expert_count.into(), "ffn_norm")?;
        }
        Ok(())
    }

    fn lfm2(&mut self, taps: u32, attention: &[u32]) -> Result<()> {
        let Sizes { layers, dim, hidden, kv_heads, head, .. } = self.sizes;
        self.key("attention.head_count_kv", &self.kv_heads(attention)[..])?;
        self.key("feed_forward_length", self.shape.feed_forward_length)?;
        self.key("shortconv.l_cache", taps)?;
        for layer in 0..layers {
            if attention.contains(&layer) {
                self.attention(layer, dim, dim, kv_heads * head)?;
                self.head_norms(layer, head)?;
            } else {
                self.layer(layer, "attn_norm", &[dim])?;
                self.layer(layer, "shortconv.conv", &[taps.into(), dim])?;
                self.layer(layer, "shortconv.in_proj", &[dim, 3 * dim])?;
                self.layer(layer, "shortconv.out_proj", &[dim, dim])?;
            }
            self.feed_forward(layer, dim, hidden, 0, "ffn_norm")?;
        }
        Ok(())
    }

    fn qwen35(
        &mut self,
        head_length: u32,
        rotated: u32,
        key_heads: u32,
        value_heads: u32,
        state_size: u32,
    ) -> Result<()> {
        let Sizes { layers, dim, hidden, kv_heads, .. } = self.sizes;
        let heads = u64::from(self.shape.head_count);
        let [head, keys, values, size] = [head_length, key_heads, value_heads, state_size].map(u64::from);
        let inner = values * size;
        self.key("attention.head_count_kv", self.shape.head_count_kv)?;
        self.key("feed_forward_length", self.shape.feed_forward_length)?;
        self.key("attention.key_length", head_length)?;
        self.key("attention.value_length", head_length)?;
        self.key("rope.dimension_count", rotated)?;
        self.key("rope.dimension_sections", &[rotated / 6 + 1, rotated / 6 + 1, rotated / 6, 0][..])?;
        self.recurrent(inner, state_size, value_heads, key_heads)?;
        for layer in 0..layers {
            if (layer + 1).is_multiple_of(4) {
                self.attention(layer, dim, heads * head, kv_heads * head)?;
                self.head_norms(layer, head)?;
            } else {
                let channels = 2 * keys * size + inner;
                self.layer(layer, "attn_norm", &[dim])?;
                self.layer(layer, "attn_qkv", &[dim, channels])?;
                self.layer(layer, "attn_gate", &[dim, inner])?;
                self.layer(layer, "ssm_conv1d", &[TAPS.into(), channels])?;
                self.tensor(&format!("blk.{layer}.ssm_dt.bias"), &[values])?;
                self.tensor(&format!("blk.{layer}.ssm_a"), &[values])?;
                self.layer(layer, "ssm_beta", &[dim, values])?;
                self.layer(layer, "ssm_alpha", &[dim, values])?;
                self.layer(layer, "ssm_norm", &[size])?;
                self.layer(layer, "ssm_out", &[inner, dim])?;
            }
            self.feed_forward(layer, dim, hidden, 0, "post_attention_norm")?;
        }
        Ok(())
    }

    fn granite_hybrid(&mut self, heads: u32, state_size: u32, attention: &[u32]) -> Result<()> {
        let Sizes { layers, dim, hidden, kv_heads, head, .. } = self.sizes;
        let [scans, size] = [heads, state_size].map(u64::from);
        let inner = 64 * scans;
        self.key("attention.head_count_kv", &self.kv_heads(attention)[..])?;
        self.key("feed_forward_length", self.shape.feed_forward_length)?;
        self.key("rope.scaling.finetuned", false)?;
        // The factors of the published models.
        for (key, factor) in [
            ("logit_scale", 8.0f32),
            ("residual_scale", 0.22),
            ("embedding_scale", 12.0),
            ("attention.scale", 0.015625),
        ] {
            self.key(key, factor)?;
        }
        self.recurrent(inner, state_size, heads, 1)?;
        for layer in 0..layers {
            if attention.contains(&layer) {
                self.attention(layer, dim, dim, kv_heads * head)?;
            } else {
                let channels = inner + 2 * size;
                self.layer(layer, "attn_norm", &[dim])?;
                self.layer(layer, "ssm_in", &[dim, inner + channels + scans])?;
                self.layer(layer, "ssm_conv1d", &[TAPS.into(), channels])?;
                self.tensor(&format!("blk.{layer}.ssm_conv1d.bias"), &[channels])?;
                self.tensor(&format!("blk.{layer}.ssm_dt.bias"), &[scans])?;
                self.tensor(&format!("blk.{layer}.ssm_a"), &[1, scans])?;
                self.tensor(&format!("blk.{layer}.ssm_d"), &[1, scans])?;
                self.layer(layer, "ssm_norm", &[inner])?;
                self.layer(layer, "ssm_out", &[inner, dim])?;
            }
            self.feed_forward(layer, dim, hidden, 0, "ffn_norm")?;
        }
        Ok(())
    }

    fn mamba(&mut self, inner: u32, state_size: u32, rank: u32) -> Result<()> {
        let Sizes { layers, dim, .. } = self.sizes;
        self.key("feed_forward_length", 0u32)?;
        for (key, value) in [
            ("ssm.conv_kernel", TAPS),
            ("ssm.inner_size", inner),
            ("ssm.state_size", state_size),
            ("ssm.time_step_rank", rank),
        ] {
            self.key(key, value)?;
        }
        let [inner, size, rank] = [inner, state_size, rank].map(u64::from);
        for layer in 0..layers {
            self.layer(layer, "attn_norm", &[dim])?;
            self.layer(layer, "ssm_in", &[dim, 2 * inner])?;
            self.layer(layer, "ssm_conv1d", &[TAPS.into(), inner])?;
            self.tensor(&format!("blk.{layer}.ssm_conv1d.bias"), &[inner])?;
            self.layer(layer, "ssm_x", &[inner, rank + 2 * size])?;
            self.layer(layer, "ssm_dt", &[rank, inner])?;
            self.tensor(&format!("blk.{layer}.ssm_dt.bias"), &[inner])?;
            self.tensor(&format!("blk.{layer}.ssm_a"), &[size, inner])?;
            self.tensor(&format!("blk.{layer}.ssm_d"), &[inner])?;
            self.layer(layer, "ssm_out", &[inner, dim])?;
        }
        Ok(())
    }

    fn deepseek2(&mut self, latent: &Latent) -> Result<()> {
        self.key("attention.head_count_kv", self.shape.head_count_kv)?;
        self.latent_keys(latent)?;
        self.key("expert_gating_func", 1u32)?;
        // The rotation of the published model.
        self.key("rope.scaling.original_context_length", 4096u32)?;
        self.key("rope.scaling.type", "yarn")?;
        self.key("rope.scaling.factor", 40.0f32)?;
        self.key("rope.scaling.yarn_log_multiplier", 0.0707f32)?;
        for layer in 0..self.sizes.layers {
            self.latent_attention(layer, latent)?;
            self.mlp_then_experts(layer, latent)?;
        }
        Ok(())
    }

    fn kimi_linear(&mut self, latent: &Latent, state_size: u32, attention: &[u32]) -> Result<()> {
        let Sizes { layers, dim, .. } = self.sizes;
        self.key("attention.head_count_kv", &self.kv_heads(attention)[..])?;
        self.latent_keys(latent)?;
        self.key("expert_gating_func", 2u32)?;
        self.key("expert_weights_scale", 2.446f32)?;
        self.key("ssm.conv_kernel", TAPS)?;
        self.key("kda.head_dim", state_size)?;
        let [heads, size] = [self.shape.head_count, state_size].map(u64::from);
        let inner = heads * size;
        for layer in 0..layers {
            if attention.contains(&layer) {
                self.latent_attention(layer, latent)?;
            } else {
                self.layer(layer, "attn_norm", &[dim])?;
                for part in ["q", "k", "v"] {
                    self.layer(layer, &format!("attn_{part}"), &[dim, inner])?;
                    self.layer(layer, &format!("ssm_conv1d_{part}"), &[TAPS.into(), 1, inner])?;
                }
                for part in ["f", "g"] {
                    self.layer(layer, &format!("ssm_{part}_a"), &[dim, size])?;
                    self.layer(layer, &format!("ssm_{part}_b"), &[size, inner])?;
                }
                self.layer(layer, "ssm_beta", &[dim, heads])?;
                self.tensor(&format!("blk.{layer}.ssm_dt.bias"), &[inner])?;
                self.tensor(&format!("blk.{layer}.ssm_a"), &[1, heads])?;
                self.layer(layer, "ssm_norm", &[size])?;
                self.layer(layer, "attn_output", &[inner, dim])?;
            }
            self.mlp_then_experts(layer, latent)?;
            if layer > 0 {
                self.tensor(&format!("blk.{layer}.exp_probs_b.bias"), &[self.shape.expert_count.into()])?;
            }
        }
        Ok(())
    }

    fn gemma4(&mut self, head_length: u32, input_length: u32, own_layers: u32) -> Result<()> {
        let Sizes { layers, dim, hidden, vocab, kv_heads, .. } = self.sizes;
        let (own, input) = (own_layers.min(layers), u64::from(input_length));
        let is_local = |layer: u32| !(layer + 1).is_multiple_of(5);
        let wide = |layer: u32| if layer < own { hidden } else { 2 * hidden };
        let local: Vec<bool> = (0..layers).map(is_local).collect();
        let hiddens: Vec<u32> = (0..layers).map(|layer| wide(layer) as u32).collect();
        self.key("attention.head_count_kv", self.shape.head_count_kv)?;
        self.key("feed_forward_length", &hiddens[..])?;
        for (key, value) in [
            ("attention.key_length", head_length),
            ("attention.value_length", head_length),
            ("rope.dimension_count", head_length),
            ("attention.key_length_swa", head_length / 2),
            ("attention.value_length_swa", head_length / 2),
            ("rope.dimension_count_swa", head_length / 2),
            ("attention.sliding_window", 512),
            ("attention.shared_kv_layers", layers - own),
            ("embedding_length_per_layer_input", input_length),
        ] {
            self.key(key, value)?;
        }
        self.key("attention.sliding_window_pattern", &local[..])?;
        self.key("rope.freq_base_swa", 10_000.0f32)?;
        self.key("final_logit_softcapping", 30.0f32)?;
        self.tensor("per_layer_token_embd.weight", &[input * u64::from(layers), vocab])?;
        self.tensor("per_layer_model_proj.weight", &[dim, input * u64::from(layers)])?;
        self.tensor("per_layer_proj_norm.weight", &[input])?;
        self.tensor("rope_freqs.weight", &[u64::from(head_length) / 2])?;
        for layer in 0..layers {
            let head = u64::from(if is_local(layer) { head_length / 2 } else { head_length });
            let queries = u64::from(self.shape.head_count) * head;
            self.layer(layer, "attn_norm", &[dim])?;
            self.layer(layer, "attn_q", &[dim, queries])?;
            self.layer(layer, "attn_q_norm", &[head])?;
            if layer < own {
                self.layer(layer, "attn_k", &[dim, kv_heads * head])?;
                self.layer(layer, "attn_v", &[dim, kv_heads * head])?;
                self.layer(layer, "attn_k_norm", &[head])?;
            }
            self.layer(layer, "attn_output", &[queries, dim])?;
            self.layer(layer, "post_attention_norm", &[dim])?;
            self.feed_forward(layer, dim, wide(layer), 0, "ffn_norm")?;
            self.layer(layer, "post_ffw_norm", &[dim])?;
            self.layer(layer, "inp_gate", &[dim, input])?;
            self.layer(layer, "proj", &[input, dim])?;
            self.layer(layer, "post_norm", &[dim])?;
            self.layer(layer, "layer_output_scale", &[1])?;
        }
        Ok(())
    }

    fn key(&mut self, key: &str, value: impl Into<Encoded>) -> Result<()> {
        self.w.entry(&format!("{}.{key}", self.architecture), value)
    }

    /// Matrices have the format of weights; vectors, columns and rows of a few elements are plain.
    fn tensor(&mut self, name: &str, dims: &[u64]) -> Result<()> {
        let is_plain = dims.len() < 2 || dims[0] < MATRIX_COLS || PLAIN.iter().any(|end| name.ends_with(end));
        let format = match self.formats.weights.row_bytes(dims[0] as usize) {
            _ if is_plain => Format::F32,
            None if self.shape.family.has_short_rows() => SHORT_ROWS,
            _ => self.formats.weights,
        };
        self.w.tensor(name, dims, format)
    }

    fn layer(&mut self, layer: u32, name: &str, dims: &[u64]) -> Result<()> {
        self.tensor(&format!("blk.{layer}.{name}.weight"), dims)
    }

    fn attention(&mut self, layer: u32, dim: u64, queries: u64, kv: u64) -> Result<()> {
        let gates = if self.architecture == "qwen35" { 2 } else { 1 };
        self.layer(layer, "attn_norm", &[dim])?;
        self.layer(layer, "attn_q", &[dim, gates * queries])?;
        self.layer(layer, "attn_k", &[dim, kv])?;
        self.layer(layer, "attn_v", &[dim, kv])?;
        self.layer(layer, "attn_output", &[queries, dim])
    }

    fn head_norms(&mut self, layer: u32, head: u64) -> Result<()> {
        self.layer(layer, "attn_q_norm", &[head])?;
        self.layer(layer, "attn_k_norm", &[head])
    }

    fn feed_forward(&mut self, layer: u32, dim: u64, hidden: u64, experts: u64, norm: &str) -> Result<()> {
        self.layer(layer, norm, &[dim])?;
        if experts > 0 {
            self.layer(layer, "ffn_gate_inp", &[dim, experts])?;
            self.layer(layer, "ffn_gate_exps", &[dim, hidden, experts])?;
            self.layer(layer, "ffn_up_exps", &[dim, hidden, experts])?;
            return self.layer(layer, "ffn_down_exps", &[hidden, dim, experts]);
        }
        self.layer(layer, "ffn_gate", &[dim, hidden])?;
        self.layer(layer, "ffn_up", &[dim, hidden])?;
        self.layer(layer, "ffn_down", &[hidden, dim])
    }

    /// The keys of latent attention without a latent vector of queries, and of mixtures of experts behind a dense layer; the head.
    fn latent_keys(&mut self, own: &Latent) -> Result<()> {
        self.key("feed_forward_length", self.shape.feed_forward_length)?;
        for (key, value) in [
            ("attention.kv_lora_rank", own.rank),
            ("attention.key_length", own.rank + own.rotated),
            ("attention.value_length", own.rank),
            ("attention.key_length_mla", own.key_length),
            ("attention.value_length_mla", own.value_length),
            ("rope.dimension_count", own.rotated),
            ("leading_dense_block_count", 1),
            ("expert_feed_forward_length", own.expert_length),
            ("expert_shared_count", own.shared_experts),
        ] {
            self.key(key, value)?;
        }
        let Sizes { dim, vocab, .. } = self.sizes;
        self.w.tensor("output.weight", &[dim, vocab], self.formats.output)
    }

    fn latent_attention(&mut self, layer: u32, own: &Latent) -> Result<()> {
        let dim = self.sizes.dim;
        let [heads, rank, key, rotated, value] =
            [self.shape.head_count, own.rank, own.key_length, own.rotated, own.value_length].map(u64::from);
        self.layer(layer, "attn_norm", &[dim])?;
        self.layer(layer, "attn_q", &[dim, heads * key])?;
        self.layer(layer, "attn_kv_a_mqa", &[dim, rank + rotated])?;
        self.layer(layer, "attn_kv_a_norm", &[rank])?;
        self.layer(layer, "attn_k_b", &[key.saturating_sub(rotated), rank, heads])?;
        self.layer(layer, "attn_v_b", &[rank, value, heads])?;
        self.layer(layer, "attn_output", &[heads * value, dim])
    }

    fn mlp_then_experts(&mut self, layer: u32, own: &Latent) -> Result<()> {
        let Sizes { dim, hidden, .. } = self.sizes;
        if layer == 0 {
            return self.feed_forward(layer, dim, hidden, 0, "ffn_norm");
        }
        let [inner, shared] = [own.expert_length, own.shared_experts].map(u64::from);
        self.feed_forward(layer, dim, inner, self.shape.expert_count.into(), "ffn_norm")?;
        self.layer(layer, "ffn_gate_shexp", &[dim, shared * inner])?;
        self.layer(layer, "ffn_up_shexp", &[dim, shared * inner])?;
        self.layer(layer, "ffn_down_shexp", &[shared * inner, dim])
    }

    /// KV heads of each layer: none without attention.
    fn kv_heads(&self, attention: &[u32]) -> Vec<u32> {
        let kv_heads = |layer| if attention.contains(&layer) { self.shape.head_count_kv } else { 0 };
        (0..self.sizes.layers).map(kv_heads).collect()
    }

    /// The keys of recurrent layers.
    fn recurrent(&mut self, inner: u64, state_size: u32, heads: u32, groups: u32) -> Result<()> {
        self.key("ssm.conv_kernel", TAPS)?;
        self.key("ssm.inner_size", inner as u32)?;
        self.key("ssm.state_size", state_size)?;
        self.key("ssm.time_step_rank", heads)?;
        self.key("ssm.group_count", groups)
    }
}

/// Writes the vocabulary: three special tokens, all bytes, the space, and then words of letters, shorter ones
/// first.
fn vocabulary(size: u32, w: &mut Writer) -> Result<()> {
    let special = ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter().zip([2, 3, 3]);
    let bytes = (0..=255u8).map(|b| (format!("<0x{b:02X}>"), 6));
    let words = std::iter::once("\u{2581}".to_owned()).chain((0..).map(word)).map(|text| (text, 1));
    let (tokens, kinds): (Vec<String>, Vec<i32>) =
        special.chain(bytes).chain(words).take(size as usize).unzip();
    // Of two merges, the one to the earlier, shorter word comes first.
    let scores: Vec<f32> = (0..tokens.len()).map(|id| -(id as f32)).collect();
    w.entry("tokenizer.ggml.model", "llama")?;
    w.entry("tokenizer.ggml.tokens", &tokens[..])?;
    w.entry("tokenizer.ggml.scores", &scores[..])?;
    w.entry("tokenizer.ggml.token_type", &kinds[..])?;
    for (name, id) in [("unknown", 0u32), ("bos", 1), ("eos", 2)] {
        w.entry(&format!("tokenizer.ggml.{name}_token_id"), id)?;
    }
    Ok(())
}

/// Word number n: a, b … z, aa, ab …
fn word(mut n: u32) -> String {
    let mut letters = Vec::new();
    loop {
        letters.push(b'a' + (n % 26) as u8);
        if n < 26 {
            break;
        }
        n = n / 26 - 1;
    }
    letters.iter().rev().map(|&letter| letter as char).collect()
}
