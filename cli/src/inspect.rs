//! `halite inspect`: describes a model file from its header alone.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::backend::reference::Reference;
use halite::gguf::Gguf;
use halite::kernels::formats::Layout;
use halite::model::Pooling;
use halite::session::{SessionOptions, footprint};
use halite::{Model, Tokenizer};

use super::{Failure, bytes, checksums, plain, plain_json, print, progress, warn};

#[derive(Args)]
pub struct InspectArgs {
    /// GGUF file (first file of a split model).
    file: PathBuf,
    /// Context size for the memory estimate [default: a session's].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    ctx: Option<u32>,
    /// Show what stays in memory if the process is kept below so many MiB.
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..))]
    memory: Option<u64>,
    /// Folder for the KV cache, if it takes much of --memory.
    #[arg(long, value_name = "FOLDER", requires = "memory")]
    spill: Option<PathBuf>,
    /// List every tensor.
    #[arg(long)]
    tensors: bool,
    /// Read all weights and list tensors with values that are not finite.
    #[arg(long)]
    verify: bool,
    /// Write the SHA-256 of the model's files to a new file, for --verify-on-load.
    #[arg(long, value_name = "FILE")]
    checksums: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// The memory that the file needs on one backend, or why it does not run there.
struct Estimate {
    backend: String,
    result: Result<halite::session::Footprint, String>,
}

/// The use of a model, and the command for it.
type Use = (&'static str, &'static str);
const CHATS: Use = ("chat", "chat");
const TEXTS: Use = ("text completion", "run");
const EMBEDDINGS: Use = ("embeddings", "embed");
const SCORES: Use = ("scores of documents", "rerank");

pub fn inspect(args: &InspectArgs) -> Result<(), Failure> {
    let gguf = if args.memory.is_some() { Gguf::open_unmapped(&args.file)? } else { Gguf::open(&args.file)? };
    if let Some(list) = &args.checksums {
        checksums::write(&gguf, list)?;
    }
    let file_bytes: u64 = gguf.parts().map(|(source, _)| source.len()).sum();
    let version = gguf.parts().next().map_or(0, |(_, header)| header.version);
    let alignment = gguf.parts().next().map_or(0, |(_, header)| header.alignment);
    let metadata: Vec<(String, String)> =
        gguf.metadata().iter().map(|(key, value)| (key.clone(), gguf.display_value(value))).collect();
    let mut formats: Vec<(&str, u64, u64)> = Vec::new();
    let mut tensors = Vec::new();
    let mut not_finite = Vec::new();
    let bar = progress(if args.verify { file_bytes } else { 0 }, "verifying");
    for tensor in gguf.tensors() {
        let r = tensor.record;
        if args.verify {
            let finite = match r.layout {
                Layout::Rows => r.format.is_finite(&tensor.region()?.load()?),
                Layout::Interleaved => r.format.is_finite(&tensor.rows()?),
            };
            if !finite {
                not_finite.push(r.name.clone());
            }
            bar.inc(r.bytes.len() as u64);
        }
        let size = r.bytes.len() as u64;
        match formats.iter_mut().find(|(name, ..)| *name == r.format.name()) {
            Some((_, count, total)) => (*count, *total) = (*count + 1, *total + size),
            None => formats.push((r.format.name(), 1, size)),
        }
        tensors.push((r.name.clone(), r.format.name(), r.dims.clone(), size));
    }
    bar.finish_and_clear();
    let tokenizer = match Tokenizer::from_gguf(&gguf) {
        Ok(Some(t)) => {
            warn(t.warnings());
            Ok(format!("{} tokens", t.len()))
        }
        Ok(None) => Ok("none: token ids only".into()),
        Err(error) => Err(error.to_string()),
    };
    let chats = gguf.optional_str("tokenizer.chat_template")?.is_some();
    let mut made_for = None;
    let options = SessionOptions::default()
        .context(args.ctx)
        .memory(args.memory.map(|mib| mib.saturating_mul(1 << 20)))
        .spill(args.spill.clone());
    let mut positions = args.ctx.unwrap_or(0);
    let mut estimates = Vec::new();
    match Model::from_gguf(gguf) {
        Err(error) => estimates.push(Estimate { backend: "any".into(), result: Err(error.to_string()) }),
        Ok(model) => {
            warn(model.warnings());
            positions = options.positions(&model);
            let vectors = model.program(options.program, positions).is_ok_and(|p| p.outputs.logits.is_none());
            made_for = Some(match model.hparams().pooling_type {
                Some(Pooling::Rank) if vectors => SCORES,
                _ if vectors => EMBEDDINGS,
                _ if chats => CHATS,
                _ => TEXTS,
            });
            for backend in backends()? {
                let result = footprint(&model, &*backend, &options).map_err(|e| e.to_string());
                estimates.push(Estimate { backend: backend.caps().name.clone(), result });
            }
        }
    }
    if args.json {
        let report = serde_json::json!({
            "file": args.file.to_string_lossy(),
            "file_bytes": file_bytes,
            "version": version,
            "alignment": alignment,
            "metadata": metadata.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
            "tensors": tensors.iter().map(|(name, format, dims, size)| serde_json::json!({
                "name": name, "format": format, "dims": dims, "bytes": size,
            })).collect::<Vec<_>>(),
            "tokenizer": tokenizer.as_ref().map_or_else(|e| e.clone(), Clone::clone),
            "made_for": made_for.map(|(purpose, _)| purpose),
            "context": positions,
            "not_finite": args.verify.then_some(&not_finite),
            "backends": estimates.iter().map(|e| match &e.result {
                Ok(f) => serde_json::json!({
                    "name": e.backend, "runs": true, "weight_bytes": f.weight_bytes, "kv_bytes": f.kv_bytes,
                    "scratch_bytes": f.scratch_bytes, "io_bytes": f.io_bytes, "streamed_bytes": f.streamed_bytes,
                    "stream_bytes": f.stream_bytes, "spilled_bytes": f.spilled_bytes,
                }),
                Err(why) => serde_json::json!({ "name": e.backend, "runs": false, "why": why }),
            }).collect::<Vec<_>>(),
        });
        print(&plain_json(&report))?;
        return verdict(&not_finite);
    }
    let mut text = format!(
        "{}: GGUF version {version}, {}, {} tensors, alignment {alignment}\n\nmetadata\n",
        args.file.display(),
        bytes(file_bytes),
        tensors.len()
    );
    for (key, value) in &metadata {
        let value: String = if value.chars().count() > 100 {
            value.chars().take(99).chain(['…']).collect()
        } else {
            value.clone()
        };
        text += &format!("  {key} = {value}\n");
    }
    text += "\nformats\n";
    for (name, count, size) in &formats {
        text += &format!("  {name:8} {count:5} tensors {:>12}\n", bytes(*size));
    }
    if args.tensors {
        text += "\ntensors\n";
        for (name, format, dims, size) in &tensors {
            text += &format!("  {name:40} {format:8} {dims:?} {}\n", bytes(*size));
        }
    }
    text += &format!("\ntokenizer: {}\n", tokenizer.unwrap_or_else(|e| e));
    if let Some((purpose, command)) = made_for {
        text += &format!("use: {purpose} (`halite {command}`)\n");
    }
    text += &format!("\nwith a context of {positions}\n");
    for e in &estimates {
        match &e.result {
            Ok(f) => {
                text += &format!(
                    "  {:10} supported: weights {}, KV cache {}, scratch {}, outputs {}\n",
                    e.backend,
                    bytes(f.weight_bytes),
                    bytes(f.kv_bytes),
                    bytes(f.scratch_bytes),
                    bytes(f.io_bytes)
                );
                if f.streamed_bytes > 0 {
                    text += &format!(
                        "  {:10} {} of the weights stay in the file, and {} are for reading them\n",
                        "",
                        bytes(f.streamed_bytes),
                        bytes(f.stream_bytes)
                    );
                }
                if f.spilled_bytes > 0 {
                    text += &format!(
                        "  {:10} {} of the KV cache are kept in a file\n",
                        "",
                        bytes(f.spilled_bytes)
                    );
                }
            }
            Err(why) => text += &format!("  {:10} not supported: {why}\n", e.backend),
        }
    }
    if args.verify {
        text += &format!("\nverified: {} of {} tensors are not finite\n", not_finite.len(), tensors.len());
    }
    print(&plain(&text))?;
    verdict(&not_finite)
}

fn verdict(not_finite: &[String]) -> Result<(), Failure> {
    if not_finite.is_empty() {
        return Ok(());
    }
    Err(format!("tensors with scales or values that are not finite: {}", not_finite.join(", ")).into())
}

fn backends() -> Result<Vec<Arc<dyn Backend>>, Failure> {
    Ok(vec![Arc::new(Cpu::with_threads(1)?), Arc::new(Reference::new())])
}
