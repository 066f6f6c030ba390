//! Model families as plain programs. A family reads its hyper-parameters from the file and records ops; it knows no
//! backend.

mod bert;
mod cohere2;
mod falcon;
mod gemma;
mod gpt2;
mod gpt_oss;
mod granite;
mod hparams;
mod llama;
mod network;
mod olmo2;
mod phi;
mod qwen;
mod smollm3;
mod stablelm;
mod starcoder2;

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

/// One line for each architecture: its name in `general.architecture` and what records it.
const FAMILIES: &[(&str, Record)] = &[
    ("bert", bert::record),
    ("cohere2", cohere2::record),
    ("falcon", falcon::record),
    ("gemma2", gemma::record_2),
    ("gemma3", gemma::record_3),
    ("gpt-oss", gpt_oss::record),
    ("gpt2", gpt2::record),
    ("granite", granite::record),
    ("llama", llama::record),
    ("mistral3", llama::record),
    ("nomic-bert", bert::record_nomic),
    ("olmo2", olmo2::record),
    ("phi3", phi::record),
    ("phimoe", phi::record),
    ("qwen2", qwen::record_2),
    ("qwen3", qwen::record_3),
    ("qwen3moe", qwen::record_3),
    ("smollm3", smollm3::record),
    ("stablelm", stablelm::record),
    ("starcoder2", starcoder2::record),
];

/// Tensors of which a model uses one or the other, or none.
const OPTIONAL: &[&str] = &["rope_factors_long.weight", "rope_factors_short.weight"];

/// Architectures that Halite can build.
pub fn architectures() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|(name, _)| *name)
}

/// Choices that shape a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProgramOptions {
    /// How the KV cache is stored: `F16`, `F32`, `Q8_0` or `Q4_0`.
    pub kv_format: Format,
}

impl Default for ProgramOptions {
    fn default() -> Self {
        ProgramOptions { kv_format: Format::F16 }
    }
}

/// A model file and what it describes. Opening reads only the header.
#[derive(Debug)]
pub struct Model {
    gguf: Gguf,
    hparams: Hparams,
    record: Record,
    adapters: Vec<Adapter>,
    warnings: Vec<String>,
}

/// How many of the most likely tokens a program lists for each row: all, of a smaller vocabulary.
pub const TOP_K: u32 = 256;

impl Model {
    /// Opens a GGUF file (the first one of a split model).
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Gguf`], [`Error::Architecture`] or [`Error::Model`].
    pub fn open(path: impl AsRef<Path>) -> Result<Model> {
        Model::from_gguf(Gguf::open(path.as_ref())?)
    }

    /// A model from bytes in memory; see [`Source::from_static`] and [`Source::from_bytes`].
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn from_source(source: Arc<Source>) -> Result<Model> {
        Model::from_gguf(Gguf::from_source(source)?)
    }

    /// A model from an opened file.
    ///
    /// # Errors
    /// [`Error::Architecture`] or [`Error::Model`].
    pub fn from_gguf(gguf: Gguf) -> Result<Model> {
        let architecture = gguf.str("general.architecture")?;
        let record = FAMILIES.iter().find(|(name, _)| *name == architecture).map(|(_, record)| *record);
        let record = record.ok_or_else(|| {
            Error::Architecture(
                printable(architecture.as_bytes()),
                architectures().collect::<Vec<_>>().join(", "),
            )
        })?;
        let hparams = Hparams::read(&gguf)?;
        let warnings = without_elements(&gguf).into_iter().collect();
        Ok(Model { gguf, hparams, record, adapters: Vec::new(), warnings })
    }

    /// Adds a low-rank adapter (LoRA) to the model, times a factor; several add up. Its weights stay in their file, and the model's
    /// as they are.
    ///
    /// # Errors
    /// [`Error::Gguf`] or [`Error::Model`] for a file that is no adapter of this architecture. Tensors that do not fit the model
    /// are found by [`Model::program`].
    pub fn adapt(&mut self, adapter: Gguf, scale: f32) -> Result<()> {
        let _floats = DefaultFloats::set();
        let prefix = format!("lora{}.", self.adapters.len());
        let read = Adapter::read(&adapter, &self.hparams.architecture, prefix, scale)?;
        self.warnings.extend(without_elements(&adapter));
        self.gguf.join(adapter, &read.prefix)?;
        self.adapters.push(read);
        Ok(())
    }

    /// The factors on its adapters.
    #[cfg(feature = "save")]
    pub(crate) fn adapter_scales(&self) -> impl Iterator<Item = f32> {
        self.adapters.iter().map(|adapter| adapter.scale)
    }

    /// What is odd about the file but does not keep it from running, one line each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The file, and those of its adapters.
    pub fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    /// The hyper-parameters.
    pub fn hparams(&self) -> &Hparams {
        &self.hparams
    }

    /// `general.name`, or the architecture; without characters that could move a terminal's cursor.
    pub fn name(&self) -> String {
        let name = self.gguf.optional_str("general.name").ok().flatten();
        name.unwrap_or(&self.hparams.architecture).chars().filter(|c| !c.is_control()).take(256).collect()
    }

    /// The model's program for sequences of up to `positions`, before any fusion. Needs the header only, no weights.
    ///
    /// # Errors
    /// [`Error::Model`] for a missing, misshapen or unknown tensor, [`Error::Program`] for shapes that no program can have.
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

    /// Refuses a file with tensors that its family does not know: without them it would be another model.
    fn check_all_used(&self, program: &Program) -> Result<()> {
        let weights = program.weights.iter().map(|&id| program.tensor(id));
        let used: HashSet<&str> =
            weights.map(|t| t.part.as_ref().map_or(&t.name, |part| &part.of).as_str()).collect();
        let mut names = self.gguf.tensors().map(|t| t.record.name.as_str());
        let unused = names.find(|name| !used.contains(name) && !OPTIONAL.contains(name));
        unused.map_or(Ok(()), |name| {
            let architecture = printable(self.hparams.architecture.as_bytes());
            Err(Error::Model(format!("tensor `{name}` of the file is unknown to the family {architecture}")))
        })
    }
}

/// A line that names a file's tensors without elements, if it has any.
fn without_elements(gguf: &Gguf) -> Option<String> {
    let mut names = gguf.parts().flat_map(|(_, header)| &header.empty);
    let (first, others) = (names.next()?, names.count());
    let others = if others > 0 { format!(" and {others} others") } else { String::new() };
    Some(format!("tensor `{first}`{others}: no elements, left out"))
}
