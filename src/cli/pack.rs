//! `halite pack`.

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;

use clap::Args;
use halite::Error;
use halite::gguf::{Gguf, write::Writer};
use halite::kernels::formats::Layout;

use super::{Failure, progress};

#[derive(Args)]
pub struct PackArgs {
    /// A GGUF file (the first one of a split model).
    file: PathBuf,
    /// The file to write; it must not exist yet.
    out: PathBuf,
}

/// Alignment of tensor data in packed files: a cache line, as wide as the widest vectors.
const ALIGNMENT: u32 = 64;

pub fn pack(args: &PackArgs) -> Result<(), Failure> {
    let gguf = Gguf::open(&args.file)?;
    let mut writer = Writer::new(ALIGNMENT)?;
    for (key, value) in gguf.encoded_metadata() {
        if key != "general.alignment" && !key.starts_with("split.") {
            writer.entry(key, value)?;
        }
    }
    for tensor in gguf.tensors() {
        let r = tensor.record;
        let layout =
            if r.format.interleaves() && r.dims.len() > 1 { Layout::Interleaved } else { Layout::Rows };
        writer.tensor(&r.name, &r.dims, r.format, layout)?;
    }
    let io = |source| Error::Io { path: args.out.clone(), source };
    // What is there, perhaps a real model, is not overwritten.
    let mut out = BufWriter::new(File::create_new(&args.out).map_err(io)?);
    let bar = progress(writer.tensors().iter().map(|t| t.bytes).sum(), "packing");
    let mut failure = None;
    let written = writer.write(&mut out, &mut |new, out| {
        let tensor = gguf.tensor(&new.name).ok_or_else(|| std::io::Error::other("a tensor is gone"))?;
        let bytes = match new.layout {
            Layout::Interleaved => tensor.interleaved(),
            Layout::Rows => tensor.rows(),
        };
        match bytes {
            Ok(bytes) => out.write_all(&bytes)?,
            Err(error) => failure = Some(error),
        }
        bar.inc(new.bytes);
        Ok(())
    });
    bar.finish_and_clear();
    match failure {
        Some(error) => Err(error.into()),
        None => Ok(written.map_err(io)?),
    }
}
