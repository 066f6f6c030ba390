//! `halite export`.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use halite::export::ExportOptions;
use halite::kernels::formats::Format;
use halite::model::ProgramOptions;
use halite::output::Replace;

use super::{Failure, bytes, interrupt, kv_format, open_adapted, plain, print, scaled};

#[derive(Args)]
pub struct ExportArgs {
    /// Image to write; it must not exist yet.
    out: PathBuf,
    /// GGUF file (first file of a split model) [default: the built-in model].
    #[arg(short, long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// LoRA adapter (GGUF) with an optional scale; may be repeated.
    #[arg(long, value_name = "FILE[:SCALE]")]
    lora: Vec<std::ffi::OsString>,
    /// Context size in tokens [default: 256, or the model's if that is less].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    ctx: Option<u32>,
    /// Most tokens of a step: more read a prompt faster, and take more memory.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Format of the KV cache.
    #[arg(long, value_name = "FORMAT", default_value = "f16", value_parser = kv_format())]
    kv: Format,
}

pub fn export(args: &ExportArgs) -> Result<(), Failure> {
    let adapters = args.lora.iter().map(|adapter| Path::new(scaled(adapter).0));
    let inputs: Vec<&Path> = args.model.iter().map(PathBuf::as_path).chain(adapters).collect();
    let mut out = interrupt::File::create(&args.out, Replace::Nothing, &inputs)?;
    let model = open_adapted(args.model.as_deref(), &args.lora, true)?;
    let program = ProgramOptions::default().kv_format(args.kv);
    let context = args.ctx.unwrap_or_else(|| model.hparams().context_length.min(256));
    let options = ExportOptions::default().context(context).tokens(args.batch).program(program);
    let (image, size) = halite::export::export(&model, &options)?;
    let written = image.iter().try_for_each(|word| out.write_all(&word.to_le_bytes()));
    written.map_err(|e| format!("{}: {e}", args.out.display()))?;
    out.commit()?;
    let line = |what: &str, n: u64| format!("{what:8} {n:>12} bytes ({})\n", bytes(n));
    let text = line("image", size.image_bytes)
        + &line("weights", size.weight_bytes)
        + &line("texts", size.text_bytes)
        + &line("memory", size.kv_bytes + size.working_bytes)
        + &line("KV cache", size.kv_bytes)
        + &line("results", size.working_bytes);
    print(&plain(&text))
}
