//! `halite convert`.

use std::path::PathBuf;

use clap::Args;
use halite::Error;
use halite::kernels::formats::Format;
use halite::output::Replace;

use super::interrupt::File;
use super::{Failure, progress, synth, warn};

#[derive(Args)]
pub struct ConvertArgs {
    /// Folder with config.json, safetensors and a vocabulary.
    folder: PathBuf,
    /// GGUF file to write; it must not exist yet.
    out: PathBuf,
    /// Format of matrices, such as f32 or q8_0.
    #[arg(long, default_value = "f16", value_parser = format)]
    format: Format,
}

fn format(name: &str) -> Result<Format, String> {
    synth::named(name, halite::convert::formats())
}

pub fn convert(args: &ConvertArgs) -> Result<(), Failure> {
    let io = |source| Error::Io { path: args.out.clone(), source };
    let mut out = File::create(&args.out, Replace::Nothing, &[])?;
    let bar = progress(0, "converting");
    let converted =
        halite::convert::convert(&args.folder, args.format, &mut out, &mut |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    match converted {
        Err(Error::Io { path, source }) if path.as_os_str().is_empty() => Err(io(source).into()),
        Err(error) => Err(error.into()),
        Ok(left_out) => {
            out.commit()?;
            warn(&left_out);
            Ok(())
        }
    }
}
