//! Models of known shapes with random weights, to benchmark devices without the real weights.

use std::io::{self, Write};

use halite_kernels::formats::{Format, Kind};

use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::gguf::write::{Encoded, NewTensor, Writer};
use crate::map::Source;
use crate::model::Model;
use crate::rng::SplitMix64;

/// Root mean square of the weights, as common at the start of training.
const WEIGHT_RMS: f32 = 0.02;
/// Minimum elements of a row of a matrix; shorter rows are those of convolutions and columns.
const MATRIX_COLS: u64 = 32;
/// The format of DeepSeek's rows that are no whole blocks of another.
const SHORT_ROWS: Format = Format::Q8_0;
/// Minimum bytes to generate at a time.
const CHUNK_BYTES: usize = 1 << 16;

/// The sizes of a model.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
#[non_exhaustive]
pub struct Shape {
    pub name: &'static str,
    pub embedding_length: u32,
    pub block_count: u32,
    pub head_count: u32,
    pub head_count_kv: u32,
    pub feed_forward_length: u32,
    pub vocab_size: u32,
    pub context_length: u32,
    pub rope_freq_base: f32,
    /// 0: one feed-forward block for all tokens.
    pub expert_count: u32,
    pub expert_used_count: u32,
    /// What other families than `llama` have besides.
    pub family: Family,
}

/// A family, with the sizes that only it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// `llama`.
    Llama,
    /// `lfm2`: short convolutions, and attention in some layers.
    Lfm2 {
        /// Taps of a convolution.
        taps: u32,
        /// The layers with attention.
        attention: &'static [u32],
    },
    /// `qwen35`: the gated delta rule, and gated attention in every fourth layer.
    Qwen35 {
        /// Elements of a head of attention.
        head_length: u32,
        /// Rotated elements of a head.
        rotated: u32,
        /// Heads of the delta rule's keys.
        key_heads: u32,
        /// Heads of its values.
        value_heads: u32,
        /// Elements of its keys and values.
        state_size: u32,
    },
    /// `granitehybrid`: Mamba 2, and attention without positions in some layers.
    GraniteHybrid {
        /// Heads of the scan, of 64 elements.
        heads: u32,
        /// Elements of its keys.
        state_size: u32,
        /// The layers with attention.
        attention: &'static [u32],
    },
    /// `deepseek2`: latent attention without a latent vector of queries, and mixtures of experts behind a dense layer.
    Deepseek2 {
        /// Elements of the latent vector.
        latent: u32,
        /// Elements of a head's key, and those of them that are rotated.
        key_length: u32,
        /// See `key_length`.
        rotated: u32,
        /// Elements of a head's value.
        value_length: u32,
        /// Hidden elements of an expert, and experts that all tokens use.
        expert_length: u32,
        /// See `expert_length`.
        shared_experts: u32,
    },
    /// `gemma4`: windows in four of five layers, inputs for each layer, shared caches.
    Gemma4 {
        /// Elements of a head with the whole context; half of them with a window.
        head_length: u32,
        /// Elements of each layer's input.
        input_length: u32,
        /// Layers at the end that share caches; their feed-forward blocks are twice as wide.
        shared_layers: u32,
    },
}

crate::setters!(const Shape {
    name: &'static str,
    embedding_length: u32,
    block_count: u32,
    head_count: u32,
    head_count_kv: u32,
    feed_forward_length: u32,
    vocab_size: u32,
    context_length: u32,
    rope_freq_base: f32,
    expert_count: u32,
    expert_used_count: u32,
    family: Family,
});

/// One row per shape, in the order of the fields of [`Shape`].
macro_rules! shapes {
    ($($name:literal: $dim:literal $layers:literal $heads:literal $kv_heads:literal $ff:literal $vocab:literal
       $context:literal $base:literal $experts:literal $used:literal $(, $family:expr)?;)+) => {
        /// The named shapes.
        pub const SHAPES: &[Shape] = &[$(Shape {
            name: $name,
            embedding_length: $dim,
            block_count: $layers,
            head_count: $heads,
            head_count_kv: $kv_heads,
            feed_forward_length: $ff,
            vocab_size: $vocab,
            context_length: $context,
            rope_freq_base: $base,
            expert_count: $experts,
            expert_used_count: $used,
            family: family!($($family)?),
        }),+];
    };
}

macro_rules! family {
    () => {
        Family::Llama
    };
    ($family:expr) => {
        $family
    };
}

// Sizes as published with each model, except that llama-1.1b (TinyLlama) has a longer context than 2048, to
// measure long contexts.
shapes! {
    "tiny":          256  2  4  2   512    512    512    10_000.0 0 0;
    "tiny-moe":      256  2  4  2   256    512    512    10_000.0 4 2;
    "moe-8x2":      1024 12 16  4  2816  32000   8192    10_000.0 8 2;
    "llama-1.1b":   2048 22 32  4  5632  32000   8192    10_000.0 0 0;
    "llama-2-7b":   4096 32 32 32 11008  32000   4096    10_000.0 0 0;
    "llama-2-13b":  5120 40 40 40 13824  32000   4096    10_000.0 0 0;
    "llama-2-70b":  8192 80 64  8 28672  32000   4096    10_000.0 0 0;
    "llama-3-8b":   4096 32 32  8 14336 128256   8192   500_000.0 0 0;
    "llama-3-70b":  8192 80 64  8 28672 128256   8192   500_000.0 0 0;
    "mistral-7b":   4096 32 32  8 14336  32000  32768 1_000_000.0 0 0;
    "mixtral-8x7b": 4096 32 32  8 14336  32000  32768 1_000_000.0 8 2;
    "lfm2.5-1.2b":  2048 16 32  8  8192  65536 128000 1_000_000.0 0 0,
        Family::Lfm2 { taps: 3, attention: &[2, 5, 8, 10, 12, 14] };
    "qwen3.5-0.8b": 1024 24  8  2  3584 248320 262144 10_000_000.0 0 0,
        Family::Qwen35 { head_length: 256, rotated: 64, key_heads: 16, value_heads: 16, state_size: 128 };
    "granite-4-micro-h": 2048 40 32 8 8192 100352 131072 10_000.0 0 0,
        Family::GraniteHybrid { heads: 64, state_size: 128, attention: &[5, 15, 25, 35] };
    "deepseek-v2-lite": 2048 27 16 1 10944 102400 163840 10_000.0 64 6,
        Family::Deepseek2 {
            latent: 512, key_length: 192, rotated: 64, value_length: 128, expert_length: 1408, shared_experts: 2
        };
    "gemma-4-e2b":  1536 35  8  1  6144 262144 131072 1_000_000.0 0 0,
        Family::Gemma4 { head_length: 512, input_length: 256, shared_layers: 20 };
}

/// Finds a shape by name.
pub fn shape(name: &str) -> Option<&'static Shape> {
    SHAPES.iter().find(|shape| shape.name == name)
}

/// Weight formats. Norms and expert routers are F32, as in all files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Formats {
    /// Matrices and the embedding table.
    pub weights: Format,
    /// The output matrix.
    pub output: Format,
}

impl Formats {
    /// One format for all matrices.
    pub const fn of(weights: Format) -> Formats {
        Formats { weights, output: weights }
    }
}

crate::setters!(const Formats { output: Format });

/// A model file to write. The same shape, formats and seed give the same file.
///
/// Weights are random blocks of their format, scaled to values of about 0.02; norms are about 1, decays of states about -1. The
/// vocabulary is made up, in SentencePiece's form.
#[derive(Debug)]
pub struct Synth {
    header: Writer,
    /// The formats of matrices and the scales of their blocks.
    scales: [(Format, f32); 4],
    rng: SplitMix64,
}

impl Synth {
    /// Plans a file, and writes nothing yet.
    ///
    /// # Errors
    /// [`Error::Argument`] if the shape has no attention heads, rows are not whole blocks of a format, or a
    /// format's blocks have no float scale.
    pub fn new(shape: &Shape, formats: Formats, seed: u64) -> Result<Synth> {
        let mut rng = SplitMix64::new(seed);
        let mut scale = |format| Ok((format, block_scale(format, &mut rng)?));
        // A generator of its own keeps the files of shapes that have no short rows.
        let short = block_scale(SHORT_ROWS, &mut SplitMix64::new(seed))?;
        let [weights, output, plain] = [scale(formats.weights)?, scale(formats.output)?, scale(Format::F32)?];
        let scales = [weights, output, plain, (SHORT_ROWS, short)];
        Ok(Synth { header: header(shape, formats)?, scales, rng })
    }

    /// The tensors that the file will have.
    pub fn tensors(&self) -> &[NewTensor] {
        self.header.tensors()
    }

    /// Returns the model without its weights, for work on shapes alone.
    ///
    /// # Errors
    /// As [`Model::from_gguf`].
    pub fn model(&self) -> Result<Model> {
        let header = self.header.header();
        let file_bytes = self.header.data_bytes().saturating_add(header.len() as u64);
        Model::from_gguf(Gguf::from_header(Source::from_bytes("a shape", &header), file_bytes)?)
    }

    /// Writes the file.
    ///
    /// # Errors
    /// Errors of `out`.
    pub fn write(mut self, out: &mut dyn Write) -> io::Result<()> {
        let mut bytes = Vec::new();
        let mut data = |tensor: &NewTensor, out: &mut dyn Write| {
            let decays = tensor.name.ends_with(".ssm_a");
            if tensor.dims.len() == 1 || decays {
                let sign = if decays { -1.0 } else { 1.0 };
                let mut near_one = || (sign * (0.95 + 0.1 * self.rng.unit())).to_le_bytes();
                return (0..tensor.bytes / 4).try_for_each(|_| out.write_all(&near_one()));
            }
            let scale = self.scales.iter().find(|(format, _)| *format == tensor.format);
            let scale = scale.map_or(0.0, |(_, scale)| *scale);
            let chunk = CHUNK_BYTES.next_multiple_of(tensor.format.block_bytes()) as u64;
            let mut left = tensor.bytes;
            while left > 0 {
                let len = left.min(chunk);
                bytes.resize(len as usize, 0);
                random_blocks(tensor.format, scale, &mut self.rng, &mut bytes);
                out.write_all(&bytes)?;
                left -= len;
            }
            Ok(())
        };
        self.header.write(out, &mut data)
    }
}

/// The file without its data.
fn header(shape: &Shape, formats: Formats) -> Result<Writer> {
    let mut w = Writer::new(32)?;
    let architecture = shape.family.architecture();
    w.entry("general.architecture", architecture)?;
    w.entry("general.name", format!("{} of random weights", shape.name).as_str())?;
    let head_length = shape.embedding_length.checked_div(shape.head_count);
    let head_length =
        head_length.ok_or_else(|| Error::argument("shape", "at least one attention head", 0))?;
    let layers = shape.block_count;
    let mut file = File { w, architecture, formats };
    for (key, value) in [
        ("vocab_size", shape.vocab_size),
        ("context_length", shape.context_length),
        ("embedding_length", shape.embedding_length),
        ("block_count", layers),
        ("attention.head_count", shape.head_count),
        ("expert_count", shape.expert_count),
        ("expert_used_count", shape.expert_used_count),
    ] {
        file.key(key, value)?;
    }
    file.key("rope.freq_base", shape.rope_freq_base)?;
    file.key("attention.layer_norm_rms_epsilon", 1e-5f32)?;
    vocabulary(shape.vocab_size, &mut file.w)?;

    let [dim, hidden, vocab, kv_heads, head] = [
        shape.embedding_length,
        shape.feed_forward_length,
        shape.vocab_size,
        shape.head_count_kv,
        head_length,
    ]
    .map(u64::from);
    // Layers without attention have no KV heads.
    let kv_of = |attends: &dyn Fn(u32) -> bool| -> Vec<u32> {
        (0..layers).map(|layer| if attends(layer) { shape.head_count_kv } else { 0 }).collect()
    };
    file.tensor("token_embd.weight", &[dim, vocab])?;
    let last_norm = if architecture == "lfm2" { "token_embd_norm.weight" } else { "output_norm.weight" };
    file.tensor(last_norm, &[dim])?;
    match shape.family {
        Family::Llama => {
            file.w.tensor("output.weight", &[dim, vocab], formats.output)?;
            file.key("rope.dimension_count", head_length)?;
            file.key("attention.head_count_kv", shape.head_count_kv)?;
            file.key("feed_forward_length", shape.feed_forward_length)?;
            for layer in 0..layers {
                file.attention(layer, dim, dim, kv_heads * head)?;
                file.feed_forward(layer, dim, hidden, shape.expert_count.into(), "ffn_norm")?;
            }
        }
        Family::Lfm2 { taps, attention } => {
            let attends = |layer: u32| attention.contains(&layer);
            file.key("attention.head_count_kv", &kv_of(&attends)[..])?;
            file.key("feed_forward_length", shape.feed_forward_length)?;
            file.key("shortconv.l_cache", taps)?;
            for layer in 0..layers {
                if attends(layer) {
                    file.attention(layer, dim, dim, kv_heads * head)?;
                    file.head_norms(layer, head)?;
                } else {
                    file.layer(layer, "attn_norm", &[dim])?;
                    file.layer(layer, "shortconv.conv", &[taps.into(), dim])?;
                    file.layer(layer, "shortconv.in_proj", &[dim, 3 * dim])?;
                    file.layer(layer, "shortconv.out_proj", &[dim, dim])?;
                }
                file.feed_forward(layer, dim, hidden, 0, "ffn_norm")?;
            }
        }
        Family::Qwen35 { head_length, rotated, key_heads, value_heads, state_size } => {
            let heads = u64::from(shape.head_count);
            let [head, keys, values, size] = [head_length, key_heads, value_heads, state_size].map(u64::from);
            let (inner, taps) = (values * size, 4);
            file.key("attention.head_count_kv", shape.head_count_kv)?;
            file.key("feed_forward_length", shape.feed_forward_length)?;
            file.key("attention.key_length", head_length)?;
            file.key("attention.value_length", head_length)?;
            file.key("rope.dimension_count", rotated)?;
            file.key("rope.dimension_sections", &[rotated / 6 + 1, rotated / 6 + 1, rotated / 6, 0][..])?;
            file.recurrent(taps, inner, state_size, value_heads, key_heads)?;
            for layer in 0..layers {
                if (layer + 1).is_multiple_of(4) {
                    file.attention(layer, dim, heads * head, kv_heads * head)?;
                    file.head_norms(layer, head)?;
                } else {
                    let channels = 2 * keys * size + inner;
                    file.layer(layer, "attn_norm", &[dim])?;
                    file.layer(layer, "attn_qkv", &[dim, channels])?;
                    file.layer(layer, "attn_gate", &[dim, inner])?;
                    file.layer(layer, "ssm_conv1d", &[taps.into(), channels])?;
                    file.tensor(&format!("blk.{layer}.ssm_dt.bias"), &[values])?;
                    file.tensor(&format!("blk.{layer}.ssm_a"), &[values])?;
                    file.layer(layer, "ssm_beta", &[dim, values])?;
                    file.layer(layer, "ssm_alpha", &[dim, values])?;
                    file.layer(layer, "ssm_norm", &[size])?;
                    file.layer(layer, "ssm_out", &[inner, dim])?;
                }
                file.feed_forward(layer, dim, hidden, 0, "post_attention_norm")?;
            }
        }
        Family::GraniteHybrid { heads, state_size, attention } => {
            let attends = |layer: u32| attention.contains(&layer);
            let [scans, size] = [heads, state_size].map(u64::from);
            let (inner, taps) = (64 * scans, 4);
            file.key("attention.head_count_kv", &kv_of(&attends)[..])?;
            file.key("feed_forward_length", shape.feed_forward_length)?;
            file.key("rope.scaling.finetuned", false)?;
            // The factors of the published models.
            for (key, factor) in [
                ("logit_scale", 8.0f32),
                ("residual_scale", 0.22),
                ("embedding_scale", 12.0),
                ("attention.scale", 0.015625),
            ] {
                file.key(key, factor)?;
            }
            file.recurrent(taps, inner, state_size, heads, 1)?;
            for layer in 0..layers {
                if attends(layer) {
                    file.attention(layer, dim, dim, kv_heads * head)?;
                } else {
                    let channels = inner + 2 * size;
                    file.layer(layer, "attn_norm", &[dim])?;
                    file.layer(layer, "ssm_in", &[dim, inner + channels + scans])?;
                    file.layer(layer, "ssm_conv1d", &[taps.into(), channels])?;
                    file.tensor(&format!("blk.{layer}.ssm_conv1d.bias"), &[channels])?;
                    file.tensor(&format!("blk.{layer}.ssm_dt.bias"), &[scans])?;
                    file.tensor(&format!("blk.{layer}.ssm_a"), &[1, scans])?;
                    file.tensor(&format!("blk.{layer}.ssm_d"), &[1, scans])?;
                    file.layer(layer, "ssm_norm", &[inner])?;
                    file.layer(layer, "ssm_out", &[inner, dim])?;
                }
                file.feed_forward(layer, dim, hidden, 0, "ffn_norm")?;
            }
        }
        Family::Deepseek2 { latent, key_length, rotated, value_length, expert_length, shared_experts } => {
            file.key("attention.head_count_kv", shape.head_count_kv)?;
            file.key("feed_forward_length", shape.feed_forward_length)?;
            for (key, value) in [
                ("attention.kv_lora_rank", latent),
                ("attention.key_length", latent + rotated),
                ("attention.value_length", latent),
                ("attention.key_length_mla", key_length),
                ("attention.value_length_mla", value_length),
                ("rope.dimension_count", rotated),
                ("leading_dense_block_count", 1),
                ("expert_feed_forward_length", expert_length),
                ("expert_shared_count", shared_experts),
                ("expert_gating_func", 1),
                // The rotation of the published model.
                ("rope.scaling.original_context_length", 4096),
            ] {
                file.key(key, value)?;
            }
            file.key("rope.scaling.type", "yarn")?;
            file.key("rope.scaling.factor", 40.0f32)?;
            file.key("rope.scaling.yarn_log_multiplier", 0.0707f32)?;
            file.w.tensor("output.weight", &[dim, vocab], formats.output)?;
            let [rank, key, rotated, value] = [latent, key_length, rotated, value_length].map(u64::from);
            let [heads, experts, inner, shared] =
                [shape.head_count, shape.expert_count, expert_length, shared_experts].map(u64::from);
            for layer in 0..layers {
                file.layer(layer, "attn_norm", &[dim])?;
                file.layer(layer, "attn_q", &[dim, heads * key])?;
                file.layer(layer, "attn_kv_a_mqa", &[dim, rank + rotated])?;
                file.layer(layer, "attn_kv_a_norm", &[rank])?;
                file.layer(layer, "attn_k_b", &[key.saturating_sub(rotated), rank, heads])?;
                file.layer(layer, "attn_v_b", &[rank, value, heads])?;
                file.layer(layer, "attn_output", &[heads * value, dim])?;
                if layer == 0 {
                    file.feed_forward(layer, dim, hidden, 0, "ffn_norm")?;
                    continue;
                }
                file.feed_forward(layer, dim, inner, experts, "ffn_norm")?;
                file.layer(layer, "ffn_gate_shexp", &[dim, shared * inner])?;
                file.layer(layer, "ffn_up_shexp", &[dim, shared * inner])?;
                file.layer(layer, "ffn_down_shexp", &[shared * inner, dim])?;
            }
        }
        Family::Gemma4 { head_length, input_length, shared_layers } => {
            let (own, input) = (layers.saturating_sub(shared_layers), u64::from(input_length));
            let is_local = |layer: u32| !(layer + 1).is_multiple_of(5);
            let wide = |layer: u32| if layer < own { hidden } else { 2 * hidden };
            let local: Vec<bool> = (0..layers).map(is_local).collect();
            let hiddens: Vec<u32> = (0..layers).map(|layer| wide(layer) as u32).collect();
            file.key("attention.head_count_kv", shape.head_count_kv)?;
            file.key("feed_forward_length", &hiddens[..])?;
            for (key, value) in [
                ("attention.key_length", head_length),
                ("attention.value_length", head_length),
                ("rope.dimension_count", head_length),
                ("attention.key_length_swa", head_length / 2),
                ("attention.value_length_swa", head_length / 2),
                ("rope.dimension_count_swa", head_length / 2),
                ("attention.sliding_window", 512),
                ("attention.shared_kv_layers", shared_layers),
                ("embedding_length_per_layer_input", input_length),
            ] {
                file.key(key, value)?;
            }
            file.key("attention.sliding_window_pattern", &local[..])?;
            file.key("rope.freq_base_swa", 10_000.0f32)?;
            file.key("final_logit_softcapping", 30.0f32)?;
            file.tensor("per_layer_token_embd.weight", &[input * u64::from(layers), vocab])?;
            file.tensor("per_layer_model_proj.weight", &[dim, input * u64::from(layers)])?;
            file.tensor("per_layer_proj_norm.weight", &[input])?;
            file.tensor("rope_freqs.weight", &[u64::from(head_length) / 2])?;
            for layer in 0..layers {
                let head = u64::from(if is_local(layer) { head_length / 2 } else { head_length });
                let queries = u64::from(shape.head_count) * head;
                file.layer(layer, "attn_norm", &[dim])?;
                file.layer(layer, "attn_q", &[dim, queries])?;
                file.layer(layer, "attn_q_norm", &[head])?;
                if layer < own {
                    file.layer(layer, "attn_k", &[dim, kv_heads * head])?;
                    file.layer(layer, "attn_v", &[dim, kv_heads * head])?;
                    file.layer(layer, "attn_k_norm", &[head])?;
                }
                file.layer(layer, "attn_output", &[queries, dim])?;
                file.layer(layer, "post_attention_norm", &[dim])?;
                file.feed_forward(layer, dim, wide(layer), 0, "ffn_norm")?;
                file.layer(layer, "post_ffw_norm", &[dim])?;
                file.layer(layer, "inp_gate", &[dim, input])?;
                file.layer(layer, "proj", &[input, dim])?;
                file.layer(layer, "post_norm", &[dim])?;
                file.layer(layer, "layer_output_scale", &[1])?;
            }
        }
    }
    Ok(file.w)
}

impl Family {
    /// Its name in files.
    pub const fn architecture(&self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Lfm2 { .. } => "lfm2",
            Family::Qwen35 { .. } => "qwen35",
            Family::GraniteHybrid { .. } => "granitehybrid",
            Family::Deepseek2 { .. } => "deepseek2",
            Family::Gemma4 { .. } => "gemma4",
        }
    }
}

/// A header in the making.
struct File {
    w: Writer,
    architecture: &'static str,
    formats: Formats,
}

impl File {
    fn key(&mut self, key: &str, value: impl Into<Encoded>) -> Result<()> {
        self.w.entry(&format!("{}.{key}", self.architecture), value)
    }

    /// Matrices have the format of weights; vectors, columns and rows of a few elements are plain.
    fn tensor(&mut self, name: &str, dims: &[u64]) -> Result<()> {
        let is_matrix = dims.len() > 1 && dims[0] >= MATRIX_COLS && !name.ends_with("ffn_gate_inp.weight");
        let is_short = self.formats.weights.row_bytes(dims[0] as usize).is_none();
        let format = match self.architecture {
            _ if !is_matrix => Format::F32,
            // As its published files, which are in blocks of 256 otherwise.
            "deepseek2" if is_short => SHORT_ROWS,
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

    /// The keys of recurrent layers.
    fn recurrent(&mut self, taps: u32, inner: u64, state_size: u32, heads: u32, groups: u32) -> Result<()> {
        self.key("ssm.conv_kernel", taps)?;
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

/// Fills `bytes` with random blocks with this scale and a random sign, because codes alone rarely have a mean
/// of zero.
fn random_blocks(format: Format, scale: f32, rng: &mut SplitMix64, bytes: &mut [u8]) {
    rng.fill(bytes);
    // NVFP4's scale has no sign, and plain floats have a random sign already.
    if format == Format::NVFP4 || format.kind() == Kind::Float {
        return format.set_scale(bytes, scale);
    }
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        format.set_scale(block, if rng.unit() < 0.5 { scale } else { -scale });
    }
}

/// Returns the scale for which random blocks have values of about [`WEIGHT_RMS`].
fn block_scale(format: Format, rng: &mut SplitMix64) -> Result<f32> {
    let blocks = 4096 / format.block_len();
    let (mut bytes, mut values) =
        (vec![0; blocks * format.block_bytes()], vec![0.0; blocks * format.block_len()]);
    let mut rms = |scale| {
        random_blocks(format, scale, rng, &mut bytes);
        // The lengths match: both are of the same blocks.
        let _ = format.dequantize(&bytes, &mut values);
        (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt()
    };
    let scale = WEIGHT_RMS / rms(1.0);
    // A power-of-two scale is accurate only within a factor of two.
    let got = rms(scale);
    if !(WEIGHT_RMS / 4.0..WEIGHT_RMS * 4.0).contains(&got) {
        let expected = "a format whose blocks have a float scale";
        return Err(Error::argument("weight format", expected, format.name()));
    }
    Ok(scale)
}
