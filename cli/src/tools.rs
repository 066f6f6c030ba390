//! Commands for development: devices, tokenize, logits, perplexity, conform.

use std::path::PathBuf;

use clap::Args;
use halite::backend::{Backend, Contract};
use halite::conformance::{self, Case, Outcome, Recording};
use halite::kernels::formats::Format;
use halite::output::{self, Replace};
use halite::session::{OutputKind, OutputTokens, Run};
use halite::tokenizer::EncodeOptions;
use sha2::{Digest, Sha256};

use super::device::{DeviceArgs, drivers};
use super::{Failure, ModelArgs, bytes, gguf, interrupt, plain, print, progress, tokenizer, tokens_of};

/// Column width of device names; longer names get a line of their own.
const NAME_WIDTH: usize = 10;

pub fn devices() -> Result<(), Failure> {
    for driver in drivers() {
        for listed in (driver.list)()? {
            let mut text = format!("{:NAME_WIDTH$} ", listed.name);
            if listed.name.len() >= NAME_WIDTH {
                text = format!("{}\n{:NAME_WIDTH$}   ", listed.name, "");
            }
            text += &listed.device;
            match listed.memory_bytes {
                Some(u64::MAX) => text += "; memory unlimited",
                Some(memory) => text += &format!("; memory {}", bytes(memory)),
                None => {}
            }
            if let Some(contract) = listed.contract {
                text += &format!("; contract {}", contract.name());
            }
            for (fact, value) in &listed.facts {
                text += &format!("\n{:NAME_WIDTH$}   {fact}: {value}", "");
            }
            print(&plain(&(text + "\n")))?;
        }
    }
    Ok(())
}

#[derive(Args)]
pub struct TokenizeArgs {
    /// Text, or token ids to decode (comma- or space-separated).
    text: String,
    /// GGUF file, which needs a vocabulary alone [default: the built-in model].
    #[arg(short, long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Decode token ids to text.
    #[arg(long)]
    decode: bool,
    /// Do not add begin- and end-of-text tokens.
    #[arg(long)]
    no_special: bool,
    /// Parse control tokens in the text, such as <|im_end|>.
    #[arg(long)]
    special: bool,
}

pub fn tokenize(args: &TokenizeArgs) -> Result<(), Failure> {
    let tokenizer = tokenizer(&gguf(args.model.as_deref(), true)?)?;
    if args.decode {
        let ids = parse_ids(&args.text)?;
        tokenizer.check(&ids)?;
        return print(&format!("{}\n", tokenizer.decode(&ids, args.special)));
    }
    let options = EncodeOptions::default().add_special(!args.no_special).parse_special(args.special);
    let ids = tokenizer.encode(&args.text, options);
    print(&format!("{}\n", ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")))
}

pub fn parse_ids(text: &str) -> Result<Vec<u32>, Failure> {
    text.split([',', ' ', '\n'])
        .filter(|part| !part.is_empty())
        .map(|part| part.parse().map_err(|_| format!("token id: expected a number, got `{part}`").into()))
        .collect()
}

#[derive(Args)]
pub struct LogitsArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Token ids, comma-separated.
    #[arg(long, value_name = "IDS")]
    tokens: String,
    /// Output file: little-endian f32, [tokens, vocab].
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
}

pub fn logits(args: &LogitsArgs) -> Result<(), Failure> {
    let tokens = parse_ids(&args.tokens)?;
    if tokens.is_empty() {
        return Err("--tokens: expected at least one token id, got none".into());
    }
    output::check(&args.out, Replace::Unmarked, &args.model.inputs())?;
    let model = args.model.open()?;
    let vocab = model.hparams().vocab_size;
    if let Some(bad) = tokens.iter().find(|&&id| id >= vocab) {
        return Err(format!("token id: expected below {vocab}, got {bad}").into());
    }
    let batch = rows_per_step(vocab);
    let mut session = args.model.session(&model, &args.model.options(batch, batch))?;
    let sequence = session.add_sequence();
    let out = |e| format!("{}: {e}", args.out.display());
    let mut file = interrupt::File::create(&args.out, Replace::Unmarked, &args.model.inputs())?;
    let bar = progress(tokens.len() as u64, "logits");
    for tokens in tokens.chunks(batch as usize) {
        session.step(&[Run::new(sequence, tokens).outputs(OutputTokens::All)], OutputKind::Logits)?;
        for logit in session.logits() {
            std::io::Write::write_all(&mut file, &logit.to_le_bytes()).map_err(out)?;
        }
        bar.inc(tokens.len() as u64);
    }
    bar.finish_and_clear();
    file.commit()
}

/// The number of rows of logits that take about 64 MiB.
fn rows_per_step(vocab: u32) -> u32 {
    ((64 << 20) / (4 * vocab.max(1))).clamp(1, 512)
}

#[derive(Args)]
pub struct PerplexityArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text file.
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Window length in tokens; the second half of each window is scored.
    #[arg(long, value_name = "N", default_value_t = 512)]
    window: u32,
    /// Maximum number of tokens of the text; 0: all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    limit: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Computes the perplexity as llama.cpp's tool does: cuts the text into windows, begins each with the
/// begin-of-text token if the vocabulary has one, and scores the second half of each window.
pub fn perplexity(args: &PerplexityArgs) -> Result<(), Failure> {
    let model = args.model.open()?;
    let tokenizer = tokenizer(model.gguf())?;
    let window = args.window as usize;
    if args.model.ctx.is_some() {
        return Err("--ctx: a step sees one window: set its length with --window".into());
    }
    // The second half of a window has to have a token with one after it.
    if window < 3 {
        return Err(format!("--window: expected at least 3 tokens, got {window}").into());
    }
    let tokens = tokens_of(&args.file, &tokenizer, args.limit, window)?;
    let vocab = model.hparams().vocab_size as usize;
    let batch = rows_per_step(vocab as u32).min(args.window);
    let context = ModelArgs { ctx: Some(args.window), ..args.model.clone() };
    let mut session = context.session(&model, &context.options(batch, batch))?;
    let windows = tokens.len() / window;
    let bar = progress((windows * window) as u64, "perplexity");
    let (mut sum, mut sum_of_squares, mut count) = (0.0f64, 0.0f64, 0u64);
    for window_tokens in tokens.chunks_exact(window) {
        let mut input = window_tokens.to_vec();
        if tokenizer.adds_bos()
            && let Some(bos) = tokenizer.bos()
        {
            input[0] = bos;
        }
        let sequence = session.add_sequence();
        for (i, step) in input.chunks(batch as usize).enumerate() {
            let first = i * batch as usize;
            let scored = first + step.len() > window / 2;
            let outputs = if scored { OutputTokens::All } else { OutputTokens::None };
            session.step(&[Run::new(sequence, step).outputs(outputs)], OutputKind::Logits)?;
            if scored {
                for (row, logits) in session.logits().chunks_exact(vocab).enumerate() {
                    let position = first + row;
                    if position < window / 2 || position + 1 >= window {
                        continue;
                    }
                    let loss = cross_entropy(logits, window_tokens[position + 1] as usize);
                    sum += loss;
                    sum_of_squares += loss * loss;
                    count += 1;
                }
            }
            bar.inc(step.len() as u64);
        }
        session.remove(sequence)?;
    }
    bar.finish_and_clear();
    let mean = sum / count as f64;
    let perplexity = mean.exp();
    let deviation =
        ((sum_of_squares / count as f64 - mean * mean) / (count.max(2) - 1) as f64).max(0.0).sqrt();
    if args.json {
        let report = serde_json::json!({
            "perplexity": perplexity, "standard_error": deviation * perplexity, "tokens": count, "windows": windows,
        });
        return print(&format!("{report}\n"));
    }
    print(&format!(
        "perplexity {perplexity:.4} ± {:.4} over {count} tokens in {windows} window{} of {window}\n",
        deviation * perplexity,
        if windows == 1 { "" } else { "s" }
    ))
}

/// `-ln softmax(logits)[target]`, in f64.
fn cross_entropy(logits: &[f32], target: usize) -> f64 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
    let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
    sum.ln() - f64::from(logits.get(target).copied().unwrap_or(f32::NEG_INFINITY) - max)
}

#[derive(Args)]
pub struct ConformArgs {
    #[command(flatten)]
    device: DeviceArgs,
    /// Run only cases whose name contains this, such as `MatMul` or `Q4_K`.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    filter: String,
    /// Print every case, not only failures and a line for each kind of gap.
    #[arg(short, long)]
    verbose: bool,
    /// Run a recorded case, as `halite bisect` writes it.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["filter", "table"])]
    replay: Option<PathBuf>,
    /// Run all cases on these backends and print a support table.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', conflicts_with_all = ["backend", "filter", "verbose"])]
    table: Vec<String>,
    /// Print a checksum of each case's results, and compare them with nothing: `diff` shows where two machines part. For emulators,
    /// on which the reference is slow.
    #[arg(long, conflicts_with_all = ["replay", "table", "verbose"])]
    checksums: bool,
}

/// Returns the start of the SHA-256 of a case's results on a backend. All NaNs count as one, as in comparisons.
fn checksum(backend: &dyn Backend, case: &Case) -> Result<String, String> {
    if let Some(gap) = case.gap(backend) {
        return Ok(gap.to_string());
    }
    let mut hasher = Sha256::new();
    for output in case.record(0)?.run(backend).map_err(|failure| failure.to_string())? {
        for &word in &output.words {
            let nan = !output.integers && f32::from_bits(word).is_nan();
            hasher.update(if nan { f32::NAN.to_bits() } else { word }.to_le_bytes());
        }
    }
    Ok(hasher.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect())
}

/// Runs all cases and returns a table of ops and formats by backend. Fails if any case fails.
fn support_table(backends: &[String]) -> Result<String, Failure> {
    let cases = conformance::cases();
    // Ops, then weight formats, then cache formats. Each cell: the number of passed cases, and the gap, if
    // any.
    let mut groups: Vec<(usize, String)> = Vec::new();
    let mut cells: Vec<Vec<(u32, Option<String>)>> = Vec::new();
    for (column, name) in backends.iter().enumerate() {
        let backend = DeviceArgs::named(name).open()?;
        for case in &cases {
            let outcome = conformance::check(&*backend, case);
            let mut words = case.name.split_whitespace();
            let (op, second) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
            let format = Format::from_name(second).map(|format| {
                let section = if matches!(op, "Attend" | "RopeKv") { 2 } else { 1 };
                (section, format.name().to_owned())
            });
            for group in std::iter::once((0, op.to_owned())).chain(format) {
                let at = groups.iter().position(|g| *g == group).unwrap_or_else(|| {
                    groups.push(group);
                    cells.push(vec![(0, None); backends.len()]);
                    groups.len() - 1
                });
                let cell = &mut cells[at][column];
                match &outcome {
                    Outcome::Pass(_) => cell.0 += 1,
                    Outcome::Gap(gap) => cell.1 = Some(gap.to_string()),
                    failed => return Err(format!("{name}: {}: {failed}", case.name).into()),
                }
            }
        }
    }
    let mut text = "# What runs where\n\nWritten by `halite conform --table`: how many cases of each kind give what the \
         reference defines,\nand why the others are not run.\n"
        .to_owned();
    for (section, heading) in ["Ops", "Weight formats", "KV cache formats"].iter().enumerate() {
        text += &format!(
            "\n## {heading}\n\n| | {} |\n|---|{}\n",
            backends.join(" | "),
            "---|".repeat(backends.len())
        );
        let rows = groups.iter().zip(&cells).filter(|((s, _), _)| *s == section);
        for ((_, name), row) in rows {
            let cell = |(passed, gap): &(u32, Option<String>)| match gap {
                None => passed.to_string(),
                Some(gap) => format!("{passed}; {gap}"),
            };
            text += &format!("| {name} | {} |\n", row.iter().map(cell).collect::<Vec<_>>().join(" | "));
        }
    }
    let families: Vec<_> = halite::model::architectures().map(|name| format!("`{name}`")).collect();
    text += "\n## Families\n\nA family is a program of these ops, and runs wherever they do:\n";
    Ok(text + &families.join(", ") + ".\n")
}

pub fn conform(args: &ConformArgs) -> Result<(), Failure> {
    if !args.table.is_empty() {
        return print(&support_table(&args.table)?);
    }
    let backend = args.device.open()?;
    if let Some(file) = &args.replay {
        let named = |e: &dyn std::fmt::Display| format!("{}: {e}", file.display());
        let bytes = std::fs::read(file).map_err(|e| named(&e))?;
        let recording = Recording::from_bytes(&bytes).map_err(|e| named(&e))?;
        let outcome = conformance::check_recording(&*backend, &recording);
        print(&format!("{}: {}: {outcome}\n", backend.caps().name, recording.program.name))?;
        return if outcome.failed() { Err("conformance failed".into()) } else { Ok(()) };
    }
    let cases: Vec<_> = conformance::cases().into_iter().filter(|c| c.name.contains(&args.filter)).collect();
    if cases.is_empty() {
        return Err(format!("--filter {}: no case has this in its name (case counts)", args.filter).into());
    }
    if args.checksums {
        let caps = backend.caps();
        if caps.contract != Contract::Exact {
            return Err(format!(
                "{}: results of the contract {} have no checksums",
                caps.name,
                caps.contract.name()
            )
            .into());
        }
        for case in &cases {
            let sum = checksum(&*backend, case).map_err(|why| format!("{}: {why}", case.name))?;
            print(&plain(&format!("{sum} {}\n", case.name)))?;
        }
        return Ok(());
    }
    let bar = progress(cases.len() as u64, "conformance");
    let mut report = conformance::Report::default();
    // Each reason, the number of cases, and the first.
    let mut gaps: Vec<(String, usize, &str)> = Vec::new();
    for case in &cases {
        let outcome = conformance::check(&*backend, case);
        if args.verbose || outcome.failed() {
            let kernels = case.explain(&*backend);
            bar.suspend(|| print(plain(&format!("{:60} {outcome:8} {kernels}", case.name)).trim_end()))
                .and_then(|()| print("\n"))?;
        } else if let Outcome::Gap(_) = &outcome {
            let reason = outcome.to_string();
            match gaps.iter_mut().find(|(known, ..)| *known == reason) {
                Some((_, cases, _)) => *cases += 1,
                None => gaps.push((reason, 1, &case.name)),
            }
        }
        report.add(&outcome);
        bar.inc(1);
    }
    bar.finish_and_clear();
    for (reason, cases, first) in gaps {
        let cases = if cases == 1 { "1 case".to_owned() } else { format!("{cases} cases") };
        print(&plain(&format!("{reason}: {cases}, such as {first}\n")))?;
    }
    print(&format!("{}: {report}\n", backend.caps().name))?;
    if report.failed > 0 { Err("conformance failed".into()) } else { Ok(()) }
}
