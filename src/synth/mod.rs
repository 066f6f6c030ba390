//! Models of known shapes with random weights, to benchmark devices without the real weights.

mod layers;

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
/// The format of rows that are no whole blocks of the format of weights, in families that have such rows.
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
    /// 0: no positions.
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
    /// `mamba`: nothing but Mamba.
    Mamba {
        /// Channels of the scan.
        inner: u32,
        /// Elements of a channel's state.
        state_size: u32,
        /// Rank of the steps' matrix.
        rank: u32,
    },
    /// `deepseek2`: latent attention and mixtures of experts.
    Deepseek2(Latent),
    /// `kimi-linear`: the delta rule whose states decay row by row, latent attention in some layers, and mixtures of experts.
    KimiLinear {
        /// Latent attention and experts.
        latent: Latent,
        /// Elements of the delta rule's keys and values.
        state_size: u32,
        /// The layers with attention.
        attention: &'static [u32],
    },
    /// `gemma4`: windows in four of five layers, inputs for each layer, shared caches.
    Gemma4 {
        /// Elements of a head with the whole context; half of them with a window.
        head_length: u32,
        /// Elements of each layer's input.
        input_length: u32,
        /// Layers with caches of their own. The others share them, and have feed-forward blocks of twice the width.
        own_layers: u32,
    },
}

/// Latent attention without a latent vector of queries, and mixtures of experts behind a dense layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Latent {
    /// Elements of the latent vector.
    pub rank: u32,
    /// Elements of a head's key.
    pub key_length: u32,
    /// Those of a head's key that are rotated.
    pub rotated: u32,
    /// Elements of a head's value.
    pub value_length: u32,
    /// Hidden elements of an expert.
    pub expert_length: u32,
    /// Experts that all tokens use.
    pub shared_experts: u32,
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
        Family::Deepseek2(Latent {
            rank: 512, key_length: 192, rotated: 64, value_length: 128, expert_length: 1408, shared_experts: 2
        });
    "gemma-4-e2b":  1536 35  8  1  6144 262144 131072 1_000_000.0 0 0,
        Family::Gemma4 { head_length: 512, input_length: 256, own_layers: 15 };
    "kimi-linear-48b-a3b": 2304 27 32 1 9216 163840 1048576 0.0 256 8,
        Family::KimiLinear {
            latent: Latent {
                rank: 512, key_length: 192, rotated: 64, value_length: 128, expert_length: 1024, shared_experts: 1
            },
            state_size: 128,
            attention: &[3, 7, 11, 15, 19, 23, 26],
        };
    "mamba-1.4b":   2048 48  0  0     0  50280 1048576 0.0 0 0,
        Family::Mamba { inner: 4096, state_size: 16, rank: 128 };
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
        Ok(Synth { header: layers::header(shape, formats)?, scales, rng })
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

impl Family {
    /// Its name in files.
    pub const fn architecture(&self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Lfm2 { .. } => "lfm2",
            Family::Qwen35 { .. } => "qwen35",
            Family::GraniteHybrid { .. } => "granitehybrid",
            Family::Mamba { .. } => "mamba",
            Family::Deepseek2(_) => "deepseek2",
            Family::KimiLinear { .. } => "kimi-linear",
            Family::Gemma4 { .. } => "gemma4",
        }
    }

    /// Whether some rows are shorter than blocks of 256 values.
    fn has_short_rows(&self) -> bool {
        matches!(self, Family::Deepseek2(_) | Family::KimiLinear { .. } | Family::Mamba { .. })
    }
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
