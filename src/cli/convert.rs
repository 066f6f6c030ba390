//! `halite convert`.

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;

use clap::Args;
use halite::Error;
use halite::kernels::formats::Format;

use super::{Failure, progress, synth, warn};

#[derive(Args)]
pub struct ConvertArgs {
    /// A folder with config.json, safetensors and a vocabulary.
    folder: PathBuf,
    /// The GGUF file to write; it must not exist yet.
    out: PathBuf,
    /// How matrices are stored, such as f32 or q8_0.
    #[arg(long, default_value = "f16", value_parser = synth::format)]
    format: Format,
}

pub fn convert(args: &ConvertArgs) -> Result<(), Failure> {
    let io = |source| Error::Io { path: args.out.clone(), source };
    // What is there, perhaps a real model, is not overwritten.
    let mut out = BufWriter::new(File::create_new(&args.out).map_err(io)?);
    let bar = progress(0, "converting");
    let converted =
        halite::convert::convert(&args.folder, args.format, &mut out, &mut |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    if converted.is_err() {
        // Half a file is of no use. That it stays where it cannot be removed is seen by the next attempt.
        let _ = std::fs::remove_file(&args.out);
    }
    match converted {
        Err(Error::Io { path, source }) if path.as_os_str().is_empty() => Err(io(source).into()),
        Err(error) => Err(error.into()),
        Ok(left_out) => {
            warn(&left_out);
            Ok(())
        }
    }
}
