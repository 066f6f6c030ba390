//! `halite rerank`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use halite::embed::EmbedOptions;
use halite::rank;

use super::embed::{EncoderArgs, on_one_line, shortest, with_lines};
use super::{Failure, print};

#[derive(Args)]
pub struct RerankArgs {
    /// Query.
    query: String,
    /// Documents.
    documents: Vec<String>,
    #[command(flatten)]
    encoder: EncoderArgs,
    /// Read documents from a file (- for stdin), one per line.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Print only the best [default: all].
    #[arg(long, value_name = "N")]
    top: Option<NonZeroUsize>,
    /// Print the scores as JSON.
    #[arg(long)]
    json: bool,
}

pub fn rerank(args: &RerankArgs) -> Result<(), Failure> {
    let documents = with_lines(&args.documents, args.file.as_deref())?;
    if documents.is_empty() {
        return Err("no document: give some after the query, or with --file".into());
    }
    let (mut embedder, tokenizer) = args.encoder.open(EmbedOptions::default())?;
    let scores = embedder.rank(&tokenizer, &args.query, &documents)?;
    let mut best = rank::best(&scores);
    best.truncate(args.top.map_or(usize::MAX, NonZeroUsize::get));
    if args.json {
        let result = |&i: &usize| serde_json::json!({ "index": i, "document": documents[i], "score": shortest(&scores[i]) });
        let report = serde_json::json!({
            "model": embedder.model().name(),
            "query": args.query,
            "results": best.iter().map(result).collect::<Vec<_>>(),
        });
        return print(&format!("{report}\n"));
    }
    let line = |&i: &usize| format!("{:9.4}  {}\n", scores[i], on_one_line(&documents[i]));
    print(&best.iter().map(line).collect::<String>())
}
