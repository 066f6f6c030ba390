//! `halite embed`, and the encoder of `halite rerank`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use halite::Tokenizer;
use halite::embed::{EmbedOptions, Embedder, cosine};
use halite::model::Pooling;

use super::device::DeviceArgs;
use super::{Failure, MemoryArgs, open_adapted, print, progress, read_text, tokenizer};

#[derive(Args)]
pub struct EmbedArgs {
    /// Texts.
    texts: Vec<String>,
    #[command(flatten)]
    encoder: EncoderArgs,
    /// Read texts from a file (- for stdin), one per line.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Pooling of token vectors [default: the model's].
    #[arg(long, value_name = "HOW")]
    pooling: Option<PoolingArg>,
    /// Do not normalise vectors to unit length.
    #[arg(long)]
    no_normalize: bool,
    /// Print cosine similarities instead of vectors.
    #[arg(long)]
    compare: bool,
}

/// An encoder and where it runs.
#[derive(Args)]
pub struct EncoderArgs {
    /// GGUF file of the encoder, or of a decoder that embeds or ranks.
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    memory: MemoryArgs,
    /// Truncate texts that are too long instead of failing.
    #[arg(long)]
    truncate: bool,
    /// Maximum tokens of a step, and so of a text.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
}

impl EncoderArgs {
    /// Loads it, with a bar.
    pub fn open(&self, options: EmbedOptions) -> Result<(Embedder, Tokenizer), Failure> {
        let model = open_adapted(Some(&self.model), &[], self.memory.maps())?;
        let tokenizer = tokenizer(model.gguf())?;
        let options = options.batch(self.batch).truncate(self.truncate).memory(self.memory.bytes());
        let total = model.gguf().tensors().map(|t| t.record.bytes.len() as u64).sum();
        let bar = progress(total, "loading");
        let mut loaded = |done| bar.set_position(done);
        let embedder = Embedder::with_progress(&model, &self.device.open()?, &options, &mut loaded)?;
        bar.finish_and_clear();
        Ok((embedder, tokenizer))
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum PoolingArg {
    None,
    Mean,
    Cls,
    Last,
}

pub fn embed(args: &EmbedArgs) -> Result<(), Failure> {
    let texts = with_lines(&args.texts, args.file.as_deref())?;
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
    let options = EmbedOptions::default().pooling(pooling).normalize(!args.no_normalize);
    let (mut embedder, tokenizer) = args.encoder.open(options)?;
    if embedder.pooling() == Pooling::Rank {
        return Err("this model scores documents and gives no vectors: use `halite rerank`".into());
    }
    let vectors = embedder.embed(&tokenizer, &texts)?;
    if args.compare {
        return print(&matrix(&texts, &vectors));
    }
    let report = serde_json::json!({
        "model": embedder.model().name(),
        "dimension": embedder.dimension(),
        "texts": texts,
        "embeddings": vectors.iter().map(|vector| vector.iter().map(shortest).collect()).collect::<Vec<Vec<_>>>(),
    });
    print(&format!("{report}\n"))
}

/// Texts, and the lines of a file after them.
pub fn with_lines(texts: &[String], file: Option<&Path>) -> Result<Vec<String>, Failure> {
    let mut texts = texts.to_vec();
    if let Some(path) = file {
        texts.extend(read_text(path)?.lines().map(str::to_owned));
    }
    Ok(texts)
}

/// A text without what would move the terminal's cursor.
pub fn on_one_line(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).collect()
}

/// The shortest decimal number that is read back as the same f32.
pub fn shortest(x: &f32) -> Option<f64> {
    x.to_string().parse().ok()
}

/// Formats the cosine similarities, one row per text.
fn matrix(texts: &[String], vectors: &[Vec<f32>]) -> String {
    let row = |(a, text): (&Vec<f32>, &String)| {
        let cosines: String = vectors.iter().map(|b| format!("{:8.4}", cosine(a, b))).collect();
        format!("{cosines}  {}\n", on_one_line(text))
    };
    vectors.iter().zip(texts).map(row).collect()
}
