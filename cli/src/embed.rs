//! `halite embed`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use halite::embed::{EmbedOptions, Embedder, cosine};
use halite::model::Pooling;

use super::device::DeviceArgs;
use super::{Failure, MemoryArgs, open_adapted, print, progress, read_text, tokenizer};

#[derive(Args)]
pub struct EmbedArgs {
    /// Texts.
    texts: Vec<String>,
    /// GGUF file of the encoder.
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    memory: MemoryArgs,
    /// Read texts from a file (- for stdin), one per line.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Pooling of token vectors [default: the model's].
    #[arg(long, value_name = "HOW")]
    pooling: Option<PoolingArg>,
    /// Do not normalise vectors to unit length.
    #[arg(long)]
    no_normalize: bool,
    /// Truncate texts that are too long instead of failing.
    #[arg(long)]
    truncate: bool,
    /// Maximum tokens of a step, and so of a text.
    #[arg(long, value_name = "N", default_value_t = 512)]
    batch: u32,
    /// Print cosine similarities instead of vectors.
    #[arg(long)]
    compare: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum PoolingArg {
    None,
    Mean,
    Cls,
    Last,
}

pub fn embed(args: &EmbedArgs) -> Result<(), Failure> {
    let mut texts = args.texts.clone();
    if let Some(path) = &args.file {
        texts.extend(read_text(path)?.lines().map(str::to_owned));
    }
    if texts.is_empty() {
        return Err("no text: give some as arguments, or with --file".into());
    }
    let pooling = args.pooling.map(|pooling| match pooling {
        PoolingArg::None => Pooling::None,
        PoolingArg::Mean => Pooling::Mean,
        PoolingArg::Cls => Pooling::Cls,
        PoolingArg::Last => Pooling::Last,
    });
    if args.compare && matches!(args.pooling, Some(PoolingArg::None)) {
        return Err("--compare: needs one vector per text, so --pooling none does not work".into());
    }
    let model = open_adapted(Some(&args.model), &[], args.memory.maps())?;
    let tokenizer = tokenizer(&model)?;
    let options = EmbedOptions::default()
        .batch(args.batch)
        .pooling(pooling)
        .normalize(!args.no_normalize)
        .truncate(args.truncate)
        .memory(args.memory.bytes());
    let total = model.gguf().tensors().map(|t| t.record.bytes.len() as u64).sum();
    let bar = progress(total, "loading");
    let mut embedder =
        Embedder::with_progress(&model, &args.device.open()?, &options, &mut |done| bar.set_position(done))?;
    bar.finish_and_clear();
    let vectors = embedder.embed(&tokenizer, &texts)?;
    if args.compare {
        return print(&matrix(&texts, &vectors));
    }
    let report = serde_json::json!({
        "model": model.name(),
        "dimension": embedder.dimension(),
        "texts": texts,
        "embeddings": vectors.iter().map(|vector| vector.iter().map(shortest).collect()).collect::<Vec<Vec<_>>>(),
    });
    print(&format!("{report}\n"))
}

/// The shortest decimal number that is read back as the same f32.
fn shortest(x: &f32) -> Option<f64> {
    x.to_string().parse().ok()
}

/// Formats the cosine similarities, one row per text.
fn matrix(texts: &[String], vectors: &[Vec<f32>]) -> String {
    let row = |(a, text): (&Vec<f32>, &String)| {
        let cosines: String = vectors.iter().map(|b| format!("{:8.4}", cosine(a, b))).collect();
        format!("{cosines}  {}\n", text.chars().filter(|c| !c.is_control()).collect::<String>())
    };
    vectors.iter().zip(texts).map(row).collect()
}
