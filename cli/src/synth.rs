//! `halite synth`.

use std::path::PathBuf;

use clap::Args;
use clap::builder::PossibleValuesParser;
use halite::Error;
use halite::kernels::formats::Format;
use halite::model::ProgramOptions;
use halite::output::Replace;
use halite::synth::{self, Formats, Synth};

use super::Failure;
use super::interrupt::File;

#[derive(Args)]
pub struct SynthArgs {
    /// Model shape.
    #[arg(value_parser = PossibleValuesParser::new(synth::SHAPES.iter().map(|shape| shape.name)))]
    shape: String,
    /// GGUF file to write; it must not exist yet.
    out: PathBuf,
    /// Format of weights, such as q4_0.
    #[arg(long, value_parser = format)]
    format: Format,
    /// Format of the output matrix [default: as --format].
    #[arg(long, value_name = "FORMAT", value_parser = format)]
    output_format: Option<Format>,
    /// Layers, if not as many as the model has: the first ones of a model that is too large.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    layers: Option<u32>,
    /// Seed of the weights.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

pub fn format(name: &str) -> Result<Format, String> {
    named(name, Format::ALL.iter().copied())
}

/// The format of a name, which need not be offered; the error for an unknown name lists what is.
pub fn named(name: &str, offered: impl Iterator<Item = Format>) -> Result<Format, String> {
    Format::from_name(&name.to_uppercase()).ok_or_else(|| {
        let names: Vec<_> = offered.map(|format| format.name().to_lowercase()).collect();
        format!("expected one of {}", names.join(", "))
    })
}

pub fn synth(args: &SynthArgs) -> Result<(), Failure> {
    let shape = synth::shape(&args.shape).ok_or_else(|| format!("unknown shape `{}`", args.shape))?;
    let layers = args.layers.unwrap_or(shape.block_count);
    if layers > shape.block_count {
        return Err(format!("--layers {layers}: {} has {}", shape.name, shape.block_count).into());
    }
    let shape = &shape.clone().block_count(layers);
    let formats = Formats::of(args.format).output(args.output_format.unwrap_or(args.format));
    let file = Synth::new(shape, formats, args.seed)?;
    // The first layers may lack a kind of layer that the family needs.
    file.model().and_then(|model| model.program(ProgramOptions::default(), 1))?;
    let io = |source| Error::Io { path: args.out.clone(), source };
    let mut out = File::create(&args.out, Replace::Nothing, &[])?;
    file.write(&mut out).map_err(io)?;
    out.commit()
}
