//! Model families as plain programs. A family reads its hyper-parameters from the file and records ops; it
//! knows no backend.

mod arcee;
mod baichuan;
mod bert;
mod bitnet;
mod cohere2;
mod command_r;
mod dbrx;
mod deepseek;
mod deepseek2;
mod exaone4;
mod falcon;
mod falcon_h1;
mod gemma;
mod gemma3n;
mod gemma4;
mod glm;
mod gpt2;
mod gpt_oss;
mod gptneox;
mod granite;
mod hparams;
mod hunyuan;
mod kimi_linear;
mod lfm2;
mod llama;
pub(crate) mod llama4;
mod mamba;
mod mpt;
mod nemotron;
mod nemotron_h;
mod network;
mod olmo;
mod olmo2;
mod olmoe;
mod phi;
mod plamo;
mod qwen;
mod qwen35;
mod seed_oss;
mod smallthinker;
mod smollm3;
mod stablelm;
mod starcoder2;
mod unknown;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use halite_kernels::float::DefaultFloats;
use halite_kernels::formats::Format;

pub use hparams::{Hparams, Pooling};

use crate::error::{Error, Result};
use crate::gguf::{Gguf, printable};
use crate::lora::Adapter;
use crate::map::Source;
use crate::program::{Builder, Program, WeightInfo};

/// Records a family's program.
type Record = fn(&Hparams, &mut Builder<'_>);

/// One line per architecture: its name in `general.architecture` and the function that records it.
const FAMILIES: &[(&str, Record)] = &[
    ("arcee", arcee::record),
    ("baichuan", baichuan::record),
    ("bailingmoe", deepseek::record),
    ("bailingmoe2", deepseek::record_balanced),
    ("bert", bert::record),
    ("bitnet", bitnet::record),
    ("bitnet-b1.58", bitnet::record_squared),
    ("bloom", mpt::record_bloom),
    ("chatglm", glm::record_chat),
    ("codeshell", starcoder2::record),
    ("cohere2", cohere2::record),
    ("command-r", command_r::record),
    ("dbrx", dbrx::record),
    ("deepseek", deepseek::record),
    ("deepseek2", deepseek2::record),
    ("dots1", deepseek::record_balanced),
    ("ernie4_5", llama::record),
    ("ernie4_5-moe", deepseek::record_ernie),
    ("exaone", qwen::record_2),
    ("exaone-moe", exaone4::record_moe),
    ("exaone4", exaone4::record),
    ("falcon", falcon::record),
    ("falcon-h1", falcon_h1::record),
    ("gemma", gemma::record_1),
    ("gemma-embedding", gemma::record_embedding),
    ("gemma2", gemma::record_2),
    ("gemma3", gemma::record_3),
    ("gemma3n", gemma3n::record),
    ("gemma4", gemma4::record),
    ("glm4", glm::record_4),
    ("glm4moe", glm::record_4_moe),
    ("gpt-oss", gpt_oss::record),
    ("gpt2", gpt2::record),
    ("gptneox", gptneox::record),
    ("granite", granite::record),
    ("granitehybrid", granite::record),
    ("granitemoe", granite::record),
    ("hunyuan-dense", hunyuan::record),
    ("hunyuan-moe", hunyuan::record),
    ("internlm2", llama::record),
    ("jais2", nemotron::record),
    ("jina-bert-v2", bert::record_jina),
    ("jina-bert-v3", bert::record_jina_3),
    ("kimi-linear", kimi_linear::record),
    ("lfm2", lfm2::record),
    ("lfm2moe", lfm2::record),
    ("llama", llama::record),
    ("llama4", llama4::record),
    ("maincoder", hunyuan::record_maincoder),
    ("mamba", mamba::record),
    ("mamba2", mamba::record_2),
    ("mellum", qwen::record_mellum),
    ("minicpm", granite::record_minicpm),
    ("minicpm3", deepseek2::record_minicpm),
    ("minimax-m2", deepseek::record_minimax),
    ("mistral3", llama::record),
    ("modern-bert", bert::record_modern),
    ("mpt", mpt::record),
    ("nemotron", nemotron::record),
    ("nemotron_h", nemotron_h::record),
    ("nemotron_h_moe", nemotron_h::record),
    ("nomic-bert", bert::record_nomic),
    ("nomic-bert-moe", bert::record_nomic_moe),
    ("olmo", olmo::record),
    ("olmo2", olmo2::record),
    ("olmoe", olmoe::record),
    ("openelm", qwen::record_3),
    ("orion", stablelm::record),
    ("pangu-embedded", qwen::record_2),
    ("phi2", falcon::record),
    ("phi3", phi::record),
    ("phimoe", phi::record),
    ("plamo", plamo::record),
    ("plamo2", plamo::record_2),
    ("plamo3", plamo::record_3),
    ("qwen2", qwen::record_2),
    ("qwen2moe", qwen::record_2_moe),
    ("qwen2vl", qwen::record_2_vl),
    ("qwen3", qwen::record_3),
    ("qwen35", qwen35::record),
    ("qwen35moe", qwen35::record),
    ("qwen3moe", qwen::record_3),
    ("qwen3next", qwen35::record),
    ("qwen3vl", qwen::record_3_vl),
    ("qwen3vlmoe", qwen::record_3_vl),
    ("seed_oss", seed_oss::record),
    ("smallthinker", smallthinker::record),
    ("smollm3", smollm3::record),
    ("stablelm", stablelm::record),
    ("starcoder", gpt2::record),
    ("starcoder2", starcoder2::record),
    ("xverse", llama::record),
];

/// Tensors of which a model uses at most one.
const OPTIONAL: &[&str] = &["rope_factors_long.weight", "rope_factors_short.weight"];

/// Returns the supported architectures.
pub fn architectures() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|(name, _)| *name)
}

/// Options of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProgramOptions {
    /// Format of the KV cache, one of [`formats`](halite_kernels::kv::formats).
    pub kv_format: Format,
}

impl Default for ProgramOptions {
    fn default() -> Self {
        ProgramOptions { kv_format: Format::F16 }
    }
}

crate::setters!(const ProgramOptions { kv_format: Format });

/// A model file. Opening it reads only the header.
#[derive(Debug)]
pub struct Model {
    gguf: Gguf,
    hparams: Hparams,
    record: Record,
    adapters: Vec<Adapter>,
    warnings: Vec<String>,
}

/// Number of most likely tokens that a program returns per row; all tokens of a smaller vocabulary.
pub const TOP_K: u32 = 256;

impl Model {
    /// Opens a GGUF file (first file of a split model).
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Gguf`], [`Error::Architecture`] or [`Error::Model`].
    pub fn open(path: impl AsRef<Path>) -> Result<Model> {
        Model::from_gguf(Gguf::open(path.as_ref())?)
    }

    /// As [`Model::open`], without a map: weights are read when a session needs them, into memory of its own
    /// or, if they do not fit [`SessionOptions::memory`](crate::SessionOptions::memory), during each step.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn open_unmapped(path: impl AsRef<Path>) -> Result<Model> {
        Model::from_gguf(Gguf::open_unmapped(path.as_ref())?)
    }

    /// Opens a model from bytes in memory; see [`Source::from_static`] and [`Source::from_bytes`].
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn from_source(source: Arc<Source>) -> Result<Model> {
        Model::from_gguf(Gguf::from_source(source)?)
    }

    /// Creates a model from an opened file.
    ///
    /// # Errors
    /// [`Error::Architecture`] or [`Error::Model`].
    pub fn from_gguf(gguf: Gguf) -> Result<Model> {
        let architecture = gguf.architecture()?;
        let record = FAMILIES.iter().find(|(name, _)| *name == architecture).map(|(_, record)| *record);
        let record = record.ok_or_else(|| Error::Architecture {
            name: printable(architecture.as_bytes()),
            found: unknown::describe(&gguf, architecture),
            supported: architectures().collect::<Vec<_>>().join(", "),
        })?;
        let hparams = Hparams::read(&gguf)?;
        let warnings = without_elements(&gguf).into_iter().collect();
        Ok(Model { gguf, hparams, record, adapters: Vec::new(), warnings })
    }

    /// Adds a low-rank adapter (LoRA) with a scale to the model; several adapters add up. The weights of the
    /// model and of the adapter stay in their files, unchanged.
    ///
    /// # Errors
    /// [`Error::Gguf`] or [`Error::Model`] for a file that is not an adapter of this architecture.
    /// [`Model::program`] reports tensors that do not fit the model.
    pub fn apply_lora(&mut self, adapter: Gguf, scale: f32) -> Result<()> {
        let _floats = DefaultFloats::set();
        let prefix = format!("lora{}.", self.adapters.len());
        let read = Adapter::read(&adapter, &self.hparams.architecture, prefix, scale)?;
        self.warnings.extend(without_elements(&adapter));
        self.gguf.join(adapter, &read.prefix)?;
        self.adapters.push(read);
        Ok(())
    }

    /// The scales of its adapters.
    #[cfg(feature = "save")]
    pub(crate) fn adapter_scales(&self) -> impl Iterator<Item = f32> {
        self.adapters.iter().map(|adapter| adapter.scale)
    }

    /// Warnings about the file, one line each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The model file, with the tensors of its adapters.
    pub fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    /// The hyper-parameters.
    pub fn hparams(&self) -> &Hparams {
        &self.hparams
    }

    /// Returns `general.name` or the architecture, with control characters escaped.
    pub fn name(&self) -> String {
        let name = self.gguf.optional_str("general.name").ok().flatten();
        name.unwrap_or(&self.hparams.architecture).chars().filter(|c| !c.is_control()).take(256).collect()
    }

    /// Returns the model's unfused program for sequences of up to `positions`. Reads only the header, no
    /// weights.
    ///
    /// # Errors
    /// [`Error::Model`] for a missing or unknown tensor or a wrong shape, [`Error::Program`] for an invalid
    /// program.
    pub fn program(&self, options: ProgramOptions, positions: u32) -> Result<Program> {
        let _floats = DefaultFloats::set();
        let lookup = |name: &str| {
            let info = self.gguf.tensor(name)?;
            Some(WeightInfo {
                dims: info.record.dims.clone(),
                format: info.record.format,
                layout: info.record.layout,
            })
        };
        let mut builder = Builder::new(&self.name(), &lookup);
        let hparams = Hparams { kv_format: options.kv_format, positions, ..self.hparams.clone() };
        (self.record)(&hparams, &mut builder);
        let mut program = builder.finish()?;
        for adapter in &self.adapters {
            adapter.apply(&mut program, &self.gguf)?;
        }
        if !self.adapters.is_empty() {
            program.validate()?;
        }
        self.check_all_used(&program)?;
        Ok(program)
    }

    /// Rejects a file with tensors that its family does not use: ignoring them would compute another model.
    fn check_all_used(&self, program: &Program) -> Result<()> {
        let weights = program.weights.iter().map(|&id| program.tensor(id));
        let used: HashSet<&str> =
            weights.map(|t| t.part.as_ref().map_or(&t.name, |part| &part.of).as_str()).collect();
        let mut names = self.gguf.tensors().map(|t| t.record.name.as_str());
        // Layers that draft tokens change no result, nor do the keys and values of layers that use others'. And a decoder that
        // embeds has no use for its output matrix.
        let h = &self.hparams;
        let drafting = h.block_count..h.block_count.saturating_add(h.nextn_predict_layers);
        let sharing = h.block_count.saturating_sub(h.shared_kv_layers)..h.block_count;
        let is_idle = |name: &str| {
            let Some((layer, part)) = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else {
                return false;
            };
            let Ok(layer) = layer.parse() else { return false };
            let is_kv = ["attn_k.weight", "attn_v.weight", "attn_k_norm.weight"].contains(&part);
            drafting.contains(&layer) || is_kv && sharing.contains(&layer)
        };
        let optional = |name: &str| OPTIONAL.contains(&name) || h.embeds() && name == "output.weight";
        let unused = names.find(|name| !used.contains(name) && !optional(name) && !is_idle(name));
        unused.map_or(Ok(()), |name| {
            if let Some(adapter) = self.adapters.iter().find(|adapter| name.starts_with(&adapter.prefix)) {
                return Err(adapter.unused(name));
            }
            let architecture = printable(self.hparams.architecture.as_bytes());
            Err(Error::Model(format!("tensor `{name}` of the file is unknown to the family {architecture}")))
        })
    }
}

/// Returns a warning about tensors without elements, if there are any.
fn without_elements(gguf: &Gguf) -> Option<String> {
    let mut names = gguf.parts().flat_map(|(_, header)| &header.empty);
    let (first, others) = (names.next()?, names.count());
    let others = if others > 0 { format!(" and {others} others") } else { String::new() };
    Some(format!("tensor `{first}`{others}: ignored, has no elements"))
}
