//! `halite pack`.

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;

use clap::Args;
use halite::Error;
use halite::gguf::Gguf;

use super::{Failure, progress};

#[derive(Args)]
pub struct PackArgs {
    /// A GGUF file (the first one of a split model).
    file: PathBuf,
    /// The file to write; it must not exist yet.
    out: PathBuf,
}

pub fn pack(args: &PackArgs) -> Result<(), Failure> {
    let gguf = Gguf::open(&args.file)?;
    let io = |source| Error::Io { path: args.out.clone(), source };
    // What is there, perhaps a real model, is not overwritten.
    let mut out = BufWriter::new(File::create_new(&args.out).map_err(io)?);
    let bar = progress(gguf.tensors().map(|t| t.record.bytes.len() as u64).sum(), "packing");
    let packed = halite::pack::pack(&gguf, &mut out, &mut |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    match packed {
        Err(Error::Io { source, .. }) => Err(io(source).into()),
        packed => Ok(packed?),
    }
}
