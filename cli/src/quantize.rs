//! `halite quantize` and `halite imatrix`.

use std::path::PathBuf;

use clap::Args;
use halite::Error;
use halite::gguf::Gguf;
use halite::kernels::formats::Format;
use halite::output::Replace;
use halite::quantize::{self, Imatrix, MIXES, Mix, QuantizeOptions, Written};
use serde_json::json;

use super::device::DeviceArgs;
use super::interrupt::{File, Work};
use super::{Failure, bytes, open_model, plain, plain_json, print, progress, synth, tokenizer, tokens_of};

#[derive(Args)]
pub struct QuantizeArgs {
    /// GGUF file (first file of a split model), best in F32, F16 or BF16.
    file: PathBuf,
    /// File to write; it must not exist yet.
    out: PathBuf,
    #[arg(long, value_name = "MIX", value_parser = mix, help = format!("Mix of formats: {}", mixes()))]
    format: &'static Mix,
    /// Format of the matrices whose names match a regular expression; may be repeated, and the first match counts.
    #[arg(long, value_name = "PATTERN=FORMAT", value_parser = pattern)]
    tensor: Vec<(String, Format)>,
    /// Give all matrices the mix's common format.
    #[arg(long)]
    pure: bool,
    /// Matrix of importance, as `halite imatrix` writes it.
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// Also quantise matrices that are quantised already, to fewer than 8 bits. Errors add up.
    #[arg(long)]
    requantize: bool,
    /// CPU threads; 0: all cores.
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn mixes() -> String {
    MIXES.iter().map(|mix| mix.name).collect::<Vec<_>>().join(", ")
}

fn mix(name: &str) -> Result<&'static Mix, String> {
    quantize::mix_named(name).ok_or_else(|| format!("expected one of {}", mixes()))
}

fn pattern(text: &str) -> Result<(String, Format), String> {
    let parts = text.rsplit_once('=').filter(|(pattern, _)| !pattern.is_empty());
    let (pattern, format) = parts.ok_or("expected PATTERN=FORMAT, such as attn_v=q8_0")?;
    Ok((pattern.to_owned(), synth::named(format, quantize::formats())?))
}

pub fn quantize(args: &QuantizeArgs) -> Result<(), Failure> {
    let gguf = Gguf::open(&args.file)?;
    let imatrix = args.imatrix.as_deref().map(Imatrix::open).transpose()?;
    let options = QuantizeOptions::new(args.format)
        .tensors(args.tensor.clone())
        .pure(args.pure)
        .requantize(args.requantize)
        .imatrix(imatrix)
        .imatrix_file(args.imatrix.as_ref().map(|file| file.display().to_string()).unwrap_or_default())
        .threads(args.threads);
    let mut out = File::create(&args.out, Replace::Nothing, &[])?;
    let bar = progress(gguf.tensors().map(|t| t.record.bytes.len() as u64).sum(), "quantising");
    let written = quantize::quantize(&gguf, &options, &mut out, &mut |tensor| bar.inc(tensor.from_bytes));
    bar.finish_and_clear();
    let written = match written {
        Err(Error::Io { path, source }) if path.as_os_str().is_empty() => {
            return Err(Error::Io { path: args.out.clone(), source }.into());
        }
        written => written?,
    };
    out.commit()?;
    print(&if args.json { as_json(&written) } else { as_table(&written) })
}

/// Bytes before and after of all tensors.
fn totals(written: &[Written]) -> (u64, u64) {
    let sum = |bytes: fn(&Written) -> u64| written.iter().map(bytes).sum();
    (sum(|tensor| tensor.from_bytes), sum(|tensor| tensor.to_bytes))
}

fn as_json(written: &[Written]) -> String {
    let tensors = written.iter().map(|tensor| {
        json!({
            "name": tensor.name, "from": tensor.from.name(), "to": tensor.to.name(), "from_bytes": tensor.from_bytes,
            "to_bytes": tensor.to_bytes, "important": tensor.important, "error": tensor.error,
        })
    });
    let (from_bytes, to_bytes) = totals(written);
    let tensors: Vec<_> = tensors.collect();
    plain_json(&json!({ "tensors": tensors, "from_bytes": from_bytes, "to_bytes": to_bytes }))
}

fn as_table(written: &[Written]) -> String {
    let width = written.iter().map(|tensor| tensor.name.chars().count()).max().unwrap_or(0).clamp(6, 48);
    let mut table = format!("{:width$}  {:8} {:8} {:>12}  error\n", "tensor", "from", "to", "bytes");
    for tensor in written {
        let error = tensor.error.map_or("-".into(), |error| format!("{:.3}%", 100.0 * error));
        let important = if tensor.important { "  by importance" } else { "" };
        let (from, to) = (tensor.from.name(), tensor.to.name());
        table +=
            &format!("{:width$}  {from:8} {to:8} {:>12}  {error}{important}\n", tensor.name, tensor.to_bytes);
    }
    let (from, to) = totals(written);
    plain(&format!("{table}{} to {}\n", bytes(from), bytes(to)))
}

#[derive(Args)]
pub struct ImatrixArgs {
    /// GGUF file (first file of a split model).
    model: PathBuf,
    /// Text file; `-`: stdin.
    text: PathBuf,
    /// File to write; it must not exist yet.
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Tokens of each piece of the text.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..))]
    window: u32,
    /// Maximum number of tokens of the text; 0: all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    limit: usize,
    #[command(flatten)]
    device: DeviceArgs,
}

pub fn imatrix(args: &ImatrixArgs) -> Result<(), Failure> {
    let model = open_model(Some(&args.model))?;
    let tokenizer = tokenizer(model.gguf())?;
    let tokens = tokens_of(&args.text, &tokenizer, args.limit, args.window as usize)?;
    let mut out = File::create(&args.out, Replace::Nothing, &[&args.model, &args.text])?;
    let backend = args.device.open()?;
    let bar = progress(tokens.len() as u64, "imatrix");
    let first = tokenizer.bos().filter(|_| tokenizer.adds_bos());
    // Until it is dropped, Ctrl-C stops the work.
    let mut work = None;
    let mut started = |cancel| work = Some(Work::new(cancel));
    let found =
        quantize::collect(&model, &backend, &tokens, args.window, first, &mut started, &mut |n| bar.inc(n));
    bar.finish_and_clear();
    drop(work);
    let mut found = found?;
    found.datasets = vec![args.text.display().to_string()];
    match found.write(&mut out) {
        Err(Error::Io { source, .. }) => {
            return Err(Error::Io { path: args.out.clone(), source }.into());
        }
        written => written?,
    }
    out.commit()?;
    print(&format!(
        "{} matrices, {} pieces of {} tokens\n",
        found.sums.len(),
        found.chunks,
        found.chunk_tokens
    ))
}
