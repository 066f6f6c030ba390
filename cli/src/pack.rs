//! `halite pack`.

use std::path::PathBuf;

use clap::Args;
use halite::Error;
use halite::gguf::Gguf;
use halite::output::Replace;

use super::interrupt::File;
use super::{Failure, progress};

#[derive(Args)]
pub struct PackArgs {
    /// GGUF file (first file of a split model).
    file: PathBuf,
    /// File to write; it must not exist yet.
    out: PathBuf,
}

pub fn pack(args: &PackArgs) -> Result<(), Failure> {
    let gguf = Gguf::open(&args.file)?;
    let io = |source| Error::Io { path: args.out.clone(), source };
    let mut out = File::create(&args.out, Replace::Nothing, &[])?;
    let bar = progress(gguf.tensors().map(|t| t.record.bytes.len() as u64).sum(), "packing");
    let packed = halite::pack::pack(&gguf, &mut out, &mut |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    match packed {
        Err(Error::Io { source, .. }) => Err(io(source).into()),
        packed => {
            packed?;
            out.commit()
        }
    }
}
