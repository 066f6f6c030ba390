//! Models of known shapes with random weights, to benchmark devices without the real weights.

use std::io::{self, Write};

use halite_kernels::formats::{Format, Kind};

use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::gguf::write::{NewTensor, Writer};
use crate::map::Source;
use crate::model::Model;
use crate::rng::SplitMix64;

/// Root mean square of the weights, as common at the start of training.
const WEIGHT_RMS: f32 = 0.02;
/// Minimum bytes to generate at a time.
const CHUNK_BYTES: usize = 1 << 16;

/// The sizes of a model of the `llama` family.
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
});

/// One row per shape, in the order of the fields of [`Shape`].
macro_rules! shapes {
    ($($name:literal: $dim:literal $layers:literal $heads:literal $kv_heads:literal $ff:literal $vocab:literal
       $context:literal $base:literal $experts:literal $used:literal;)+) => {
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
        }),+];
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
/// Weights are random blocks of their format, scaled to values of about 0.02; norms are about 1. The
/// vocabulary is made up, in SentencePiece's form.
#[derive(Debug)]
pub struct Synth {
    header: Writer,
    /// The formats of matrices and the scales of their blocks.
    scales: [(Format, f32); 3],
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
        let scales = [scale(formats.weights)?, scale(formats.output)?, scale(Format::F32)?];
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
            if tensor.dims.len() == 1 {
                let mut norm = || (0.95 + 0.1 * self.rng.unit()).to_le_bytes();
                return (0..tensor.bytes / 4).try_for_each(|_| out.write_all(&norm()));
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
    w.entry("general.architecture", "llama")?;
    w.entry("general.name", format!("{} of random weights", shape.name).as_str())?;
    let head_length = shape.embedding_length.checked_div(shape.head_count);
    let head_length =
        head_length.ok_or_else(|| Error::argument("shape", "at least one attention head", 0))?;
    for (key, value) in [
        ("vocab_size", shape.vocab_size),
        ("context_length", shape.context_length),
        ("embedding_length", shape.embedding_length),
        ("block_count", shape.block_count),
        ("feed_forward_length", shape.feed_forward_length),
        ("attention.head_count", shape.head_count),
        ("attention.head_count_kv", shape.head_count_kv),
        ("rope.dimension_count", head_length),
        ("expert_count", shape.expert_count),
        ("expert_used_count", shape.expert_used_count),
    ] {
        w.entry(&format!("llama.{key}"), value)?;
    }
    w.entry("llama.rope.freq_base", shape.rope_freq_base)?;
    w.entry("llama.attention.layer_norm_rms_epsilon", 1e-5f32)?;
    vocabulary(shape.vocab_size, &mut w)?;

    let [dim, hidden, vocab] =
        [shape.embedding_length, shape.feed_forward_length, shape.vocab_size].map(u64::from);
    let kv_dim = u64::from(shape.head_count_kv) * u64::from(head_length);
    let experts = u64::from(shape.expert_count);
    w.tensor("token_embd.weight", &[dim, vocab], formats.weights)?;
    w.tensor("output_norm.weight", &[dim], Format::F32)?;
    w.tensor("output.weight", &[dim, vocab], formats.output)?;
    let attention: [(&str, &[u64]); 6] = [
        ("attn_norm", &[dim]),
        ("attn_q", &[dim, dim]),
        ("attn_k", &[dim, kv_dim]),
        ("attn_v", &[dim, kv_dim]),
        ("attn_output", &[dim, dim]),
        ("ffn_norm", &[dim]),
    ];
    let dense: &[(&str, &[u64])] =
        &[("ffn_gate", &[dim, hidden]), ("ffn_up", &[dim, hidden]), ("ffn_down", &[hidden, dim])];
    let mixture: &[(&str, &[u64])] = &[
        ("ffn_gate_inp", &[dim, experts]),
        ("ffn_gate_exps", &[dim, hidden, experts]),
        ("ffn_up_exps", &[dim, hidden, experts]),
        ("ffn_down_exps", &[hidden, dim, experts]),
    ];
    for layer in 0..shape.block_count {
        for (name, dims) in attention.iter().chain(if experts > 0 { mixture } else { dense }) {
            let plain = dims.len() == 1 || *name == "ffn_gate_inp";
            let format = if plain { Format::F32 } else { formats.weights };
            w.tensor(&format!("blk.{layer}.{name}.weight"), dims, format)?;
        }
    }
    Ok(w)
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
