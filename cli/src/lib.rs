//! The command `halite` as a library: arguments in, library calls, text out. Everything that prints is here.
//!
//! [`main`] takes a table of drivers, so that a command with a backend of your own is a `main.rs` of a few
//! lines.
#![deny(unsafe_code)]

mod bench;
mod bisect;
#[cfg(feature = "sim")]
mod calibrate;
mod card;
mod certify;
mod chat;
mod checksums;
mod convert;
mod device;
mod embed;
#[cfg(feature = "sim")]
mod estimate;
#[cfg(feature = "sim")]
mod explore;
mod export;
mod inspect;
mod interrupt;
#[cfg(feature = "serve")]
mod keys;
mod machine;
mod pack;
#[cfg(feature = "sim")]
mod plot;
#[cfg(feature = "sim")]
mod profile;
mod quantize;
mod rerank;
mod run;
#[cfg(feature = "serve")]
mod serve;
#[cfg(feature = "serve")]
mod sign;
mod synth;
mod tools;
#[cfg(feature = "serve")]
mod usage;

use std::ffi::{OsStr, OsString};
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Parser, Subcommand};
use halite::backend::driver::Driver;
use halite::gguf::Gguf;
use halite::kernels::formats::Format;
use halite::kernels::kv;
use halite::map::Source;
use halite::model::ProgramOptions;
use halite::sampler::SamplerOptions;
use halite::session::{Session, SessionOptions};
use halite::tokenizer::EncodeOptions;
use halite::{Model, Tokenizer};

use device::DeviceArgs;

/// The error of a command: a message for people.
type Failure = Box<dyn std::error::Error>;

/// Run language models on CPUs, GPUs and simulated accelerators.
#[derive(Parser)]
#[command(version, arg_required_else_help = true, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Continue a prompt.
    Run(run::RunArgs),
    /// Chat with a model, using its chat template.
    Chat(chat::ChatArgs),
    /// Answer HTTP requests, with OpenAI's interface.
    #[cfg(feature = "serve")]
    Serve(serve::ServeArgs),
    /// Sum up what a server's clients used.
    #[cfg(feature = "serve")]
    Usage(usage::UsageArgs),
    /// Check a server's ledger, or remove its old entries.
    #[cfg(feature = "serve")]
    Ledger(usage::LedgerArgs),
    /// Make keys for a server's clients.
    #[cfg(feature = "serve")]
    Keys(keys::KeysArgs),
    /// Write a model's manifest, the SHA-256 of every tensor, and sign it.
    #[cfg(feature = "serve")]
    Sign(sign::SignArgs),
    /// Check a model against its manifest, and the manifest against its signature.
    #[cfg(feature = "serve")]
    Verify(sign::VerifyArgs),
    /// Show a model file's contents, whether it runs here, and the memory it needs.
    Inspect(inspect::InspectArgs),
    /// List backends, GPUs and simulated chips.
    Devices,
    /// Turn text into token ids, or back with --decode.
    Tokenize(tools::TokenizeArgs),
    /// Run tokens and write the logits of every position to a file.
    Logits(tools::LogitsArgs),
    /// Measure how well a model predicts a text.
    Perplexity(tools::PerplexityArgs),
    /// Benchmark prefill and decode.
    Bench(bench::BenchArgs),
    /// Show, compare and check what `bench --ops` measured.
    Card(card::CardArgs),
    /// Write a GGUF file of a known model's shape with random weights, for benchmarks.
    Synth(synth::SynthArgs),
    /// Compute text embeddings with an encoder model.
    Embed(embed::EmbedArgs),
    /// Order documents by how well they answer a query, with a reranker model.
    Rerank(rerank::RerankArgs),
    /// Convert a Hugging Face model folder to GGUF.
    Convert(convert::ConvertArgs),
    /// Write a model in other formats, such as the mix q4_k_m.
    Quantize(quantize::QuantizeArgs),
    /// Sum up what a text needs of a model, for `quantize --imatrix`.
    Imatrix(quantize::ImatrixArgs),
    /// Rewrite a model with interleaved rows, which decode faster.
    Pack(pack::PackArgs),
    /// Write a model as an image for microcontrollers.
    Export(export::ExportArgs),
    /// Check a chip's profile and print its rates.
    #[cfg(feature = "sim")]
    Profile(profile::ProfileArgs),
    /// Predict time, energy and cost of serving a model on a chip.
    #[cfg(feature = "sim")]
    Estimate(estimate::EstimateArgs),
    /// Vary the numbers of a chip and its layouts, and find the best designs.
    #[cfg(feature = "sim")]
    Explore(explore::ExploreArgs),
    /// Measure this machine's memory and kernels, or fit a chip's timing model to measured kernels (--fit).
    #[cfg(feature = "sim")]
    Calibrate(calibrate::CalibrateArgs),
    /// Run the conformance tests of a backend against the reference.
    Conform(tools::ConformArgs),
    /// Check a backend thoroughly, and write a certificate.
    Certify(certify::CertifyArgs),
    /// Find the op at which two backends part.
    Bisect(bisect::BisectArgs),
}

impl Command {
    /// Whether the command itself listens to the signals that end it.
    fn stops_itself(&self) -> bool {
        #[cfg(feature = "serve")]
        return matches!(self, Command::Serve(_));
        #[cfg(not(feature = "serve"))]
        false
    }
}

/// The model and the backend of a command.
#[derive(Args, Clone)]
struct ModelArgs {
    /// GGUF file (first file of a split model) [default: the built-in model].
    #[arg(short, long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Check the SHA-256 of all model, adapter and draft files against this list (`sha256sum` format); fail
    /// on a mismatch.
    #[arg(long, value_name = "FILE")]
    verify_on_load: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    /// LoRA adapter (GGUF) with an optional scale; may be repeated.
    #[arg(long, value_name = "FILE[:SCALE]")]
    lora: Vec<OsString>,
    /// Context size in tokens [default: the model's, at most 4096].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    ctx: Option<u32>,
    /// Format of the KV cache.
    #[arg(long, value_name = "FORMAT", default_value = "f16", value_parser = kv_format())]
    kv: Format,
    #[command(flatten)]
    memory: MemoryArgs,
    /// Folder on a drive for the KV cache, if it takes much of --memory.
    #[arg(long, value_name = "FOLDER", requires = "memory")]
    spill: Option<PathBuf>,
}

/// The limit on the memory of the process.
#[derive(Args, Clone, Copy)]
struct MemoryArgs {
    /// Keep the whole process below so many MiB: weights that do not fit are read from the file in each step.
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..))]
    memory: Option<u64>,
}

impl MemoryArgs {
    fn bytes(self) -> Option<u64> {
        self.memory.map(|mib| mib.saturating_mul(1 << 20))
    }

    /// Whether the model's file may be mapped: mapped pages count.
    fn maps(self) -> bool {
        self.memory.is_none()
    }
}

/// The sampler's options.
#[derive(Args, Clone)]
struct SamplerArgs {
    /// Sampling temperature; 0 always takes the most likely token.
    #[arg(long, default_value_t = 0.8)]
    temp: f32,
    /// Sample from the N most likely tokens; 0 or -1: all.
    #[arg(long, value_name = "N", default_value = "40", value_parser = top_k, allow_negative_numbers = true)]
    top_k: usize,
    /// Sample from the smallest set of most likely tokens whose probabilities sum to P.
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f32,
    /// Drop tokens less likely than P times the most likely one.
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    min_p: f32,
    /// Divide positive and multiply negative logits of recent tokens by X; 1: off.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    repeat_penalty: f32,
    /// Subtract X from a token's logit for each recent occurrence.
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    frequency_penalty: f32,
    /// Subtract X from the logit of every recent token.
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    presence_penalty: f32,
    /// Number of tokens that the penalties look back.
    #[arg(long, value_name = "N", default_value_t = 64)]
    penalty_window: usize,
    /// Sampler seed; -1: random, and printed.
    #[arg(long, value_name = "N", default_value = "0", value_parser = seed, allow_negative_numbers = true)]
    seed: u64,
}

/// Parses a number; -1 stands for `stands_for()`.
fn or_minus_one<T: std::str::FromStr>(text: &str, stands_for: impl FnOnce() -> T) -> Result<T, String> {
    match text {
        "-1" => Ok(stands_for()),
        _ => text.parse().map_err(|_| "expected a whole number, or -1".into()),
    }
}

/// A number of most likely tokens, or -1 for all.
fn top_k(text: &str) -> Result<usize, String> {
    or_minus_one(text, || 0)
}

/// A number of tokens to generate, or -1 for no limit.
fn limit(text: &str) -> Result<u32, String> {
    or_minus_one(text, || u32::MAX)
}

/// A seed, or -1 for a random one.
fn seed(text: &str) -> Result<u64, String> {
    or_minus_one(text, || {
        // The standard library seeds its hashers at random. Few digits: a person may type the seed again.
        let random = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0) >> 32;
        say(&format!("seed {random}"));
        random
    })
}

impl SamplerArgs {
    fn options(&self) -> SamplerOptions {
        SamplerOptions::default()
            .temperature(self.temp)
            .top_k(self.top_k)
            .top_p(self.top_p)
            .min_p(self.min_p)
            .repeat_penalty(self.repeat_penalty)
            .frequency_penalty(self.frequency_penalty)
            .presence_penalty(self.presence_penalty)
            .penalty_window(self.penalty_window)
            .seed(self.seed)
    }
}

/// Reads a format of the KV cache by its name in lower case.
fn kv_format() -> impl clap::builder::TypedValueParser<Value = Format> {
    use clap::builder::TypedValueParser;
    let names = kv::formats().map(|format| format.name().to_lowercase());
    clap::builder::PossibleValuesParser::new(names).try_map(|name| {
        let found = kv::formats().find(|format| format.name().to_lowercase() == name);
        found.ok_or_else(|| format!("unknown format {name}"))
    })
}

/// Opens the model of a file, or the built-in one.
fn open_model(path: Option<&Path>) -> Result<Arc<Model>, Failure> {
    open_adapted(path, &[], true)
}

/// As [`open_model`], with adapters, each `FILE` or `FILE:SCALE`.
fn open_adapted(path: Option<&Path>, adapters: &[OsString], map: bool) -> Result<Arc<Model>, Failure> {
    let mut model = Model::from_gguf(gguf(path, map)?)?;
    for adapter in adapters {
        let (file, scale) = scaled(adapter);
        model.apply_lora(gguf(Some(file.as_ref()), map)?, scale)?;
    }
    warn(model.warnings());
    Ok(Arc::new(model))
}

/// Opens a file, or that of the built-in model.
fn gguf(path: Option<&Path>, map: bool) -> halite::Result<Gguf> {
    match path {
        Some(path) if map => Gguf::open(path),
        Some(path) => Gguf::open_unmapped(path),
        None => Gguf::from_source(Source::from_static("the built-in model", halite_models::AUSTEN)),
    }
}

/// Splits `FILE` or `FILE:SCALE` into an adapter's file and scale.
fn scaled(adapter: &OsStr) -> (&OsStr, f32) {
    let scaled = adapter.to_str().and_then(|text| text.rsplit_once(':'));
    let scaled = scaled.and_then(|(file, scale)| Some((OsStr::new(file), scale.parse().ok()?)));
    scaled.unwrap_or((adapter, 1.0))
}

impl ModelArgs {
    fn open(&self) -> Result<Arc<Model>, Failure> {
        let model = open_adapted(self.model.as_deref(), &self.lora, self.memory.maps())?;
        if let Some(list) = &self.verify_on_load {
            checksums::check(model.gguf(), list)?;
        }
        Ok(model)
    }

    /// The input files.
    fn inputs(&self) -> Vec<&Path> {
        let adapters = self.lora.iter().map(|adapter| Path::new(scaled(adapter).0));
        let list = self.verify_on_load.iter().map(PathBuf::as_path);
        let model = self.model.iter().map(PathBuf::as_path);
        model.chain(adapters).chain(list).chain(self.device.file()).collect()
    }

    fn program(&self) -> ProgramOptions {
        ProgramOptions::default().kv_format(self.kv)
    }

    fn options(&self, batch: u32, outputs: u32) -> SessionOptions {
        SessionOptions::default()
            .context(self.ctx)
            .batch(batch)
            .outputs(outputs)
            .program(self.program())
            .memory(self.memory.bytes())
            .spill(self.spill.clone())
    }

    /// Opens a session, with a progress bar if it takes long.
    fn session(&self, model: &Arc<Model>, options: &SessionOptions) -> Result<Session, Failure> {
        let backend = self.device.open()?;
        let total = model.gguf().tensors().map(|t| t.record.bytes.len() as u64).sum();
        let bar = progress(total, "loading");
        let session = Session::with_progress(model, &backend, options, &mut |done| bar.set_position(done))?;
        bar.finish_and_clear();
        self.device.report_placement(session.program());
        Ok(session)
    }
}

fn tokenizer(gguf: &Gguf) -> Result<Tokenizer, Failure> {
    let tokenizer = Tokenizer::from_gguf(gguf)?.ok_or("this model file has no vocabulary: pass token ids")?;
    warn(tokenizer.warnings());
    Ok(tokenizer)
}

/// Warnings on stderr, each once.
fn warn(warnings: &[String]) {
    static SAID: std::sync::Mutex<Vec<String>> = std::sync::Mutex::new(Vec::new());
    let Ok(mut said) = SAID.lock() else { return };
    for warning in warnings {
        if !said.contains(warning) {
            say(&format!("halite: warning: {warning}"));
            said.push(warning.clone());
        }
    }
}

/// Escapes control characters in a text for a terminal.
fn plain(text: &str) -> String {
    escaped(text, |c| c.escape_default().to_string())
}

/// Prints JSON for a terminal: serde_json does not escape the control characters from U+007F on.
fn plain_json(json: &serde_json::Value) -> String {
    escaped(&format!("{json:#}\n"), |c| format!("\\u{:04x}", u32::from(c)))
}

fn escaped(text: &str, escape: impl Fn(char) -> String) -> String {
    let steers = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    text.chars().map(|c| if steers(c) { escape(c) } else { c.into() }).collect()
}

/// A progress bar on stderr, drawn only on a terminal and only for work that takes over a second.
fn progress(total: u64, what: &'static str) -> indicatif::ProgressBar {
    if !std::io::stderr().is_terminal() {
        return indicatif::ProgressBar::hidden();
    }
    let bar = indicatif::ProgressBar::with_draw_target(Some(total), indicatif::ProgressDrawTarget::hidden());
    let style = indicatif::ProgressStyle::with_template("{msg} {wide_bar} {percent}% {eta}");
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar.set_message(what);
    let late = bar.clone();
    std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_secs(1));
        if !late.is_finished() {
            late.set_draw_target(indicatif::ProgressDrawTarget::stderr());
        }
    });
    bar
}

/// Maximum bytes of a text.
const MAX_TEXT_BYTES: u64 = 1 << 30;

/// Reads a text file, or stdin for `-`. The file may be a pipe, such as a shell's `<(command)`.
fn read_text(path: &Path) -> Result<String, Failure> {
    let mut text = String::new();
    let read = if path == Path::new("-") {
        std::io::stdin().take(MAX_TEXT_BYTES + 1).read_to_string(&mut text)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(MAX_TEXT_BYTES + 1).read_to_string(&mut text))
    };
    read.map_err(|e| format!("{}: {e}", path.display()))?;
    if text.len() as u64 > MAX_TEXT_BYTES {
        return Err(format!("{}: expected at most {MAX_TEXT_BYTES} bytes of text", path.display()).into());
    }
    // A byte order mark is not part of the text.
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

/// The first `limit` tokens of a text file, or all for 0: at least a window of them.
fn tokens_of(path: &Path, tokenizer: &Tokenizer, limit: usize, window: usize) -> Result<Vec<u32>, Failure> {
    let mut tokens = tokenizer.encode(&read_text(path)?, EncodeOptions::default());
    if limit > 0 {
        tokens.truncate(limit);
    }
    let got = tokens.len();
    if got < window {
        return Err(
            format!("{}: needs at least {window} tokens (--window), has {got}", path.display()).into()
        );
    }
    Ok(tokens)
}

/// Writes to stdout; ends the command quietly if the reader closed the pipe.
fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Into::into)
}

/// Writes a line to stderr, with control characters escaped. Ignores errors: there is no other place to
/// report them.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{}", plain(line));
}

/// Formats a number of bytes for people.
fn bytes(n: u64) -> String {
    indicatif::BinaryBytes(n).to_string()
}

/// Runs the command with the arguments of this process. `drivers` are the backends that it offers; the first
/// one is the default.
pub fn main(drivers: &[Driver]) -> ExitCode {
    device::set_drivers(drivers);
    #[cfg(unix)]
    {
        halite::map::exit_on_bus_error();
        halite::map::fail_on_file_size();
    }
    let cli = Cli::parse();
    let listening = if cli.command.stops_itself() { Ok(()) } else { interrupt::listen() };
    let result = listening.and_then(|()| match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Chat(args) => chat::chat(&args),
        #[cfg(feature = "serve")]
        Command::Serve(args) => serve::serve(&args),
        #[cfg(feature = "serve")]
        Command::Usage(args) => usage::usage(&args),
        #[cfg(feature = "serve")]
        Command::Ledger(args) => usage::ledger(&args),
        #[cfg(feature = "serve")]
        Command::Keys(args) => keys::keys(&args),
        #[cfg(feature = "serve")]
        Command::Sign(args) => sign::sign(&args),
        #[cfg(feature = "serve")]
        Command::Verify(args) => sign::verify(&args),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Devices => tools::devices(),
        Command::Tokenize(args) => tools::tokenize(&args),
        Command::Logits(args) => tools::logits(&args),
        Command::Perplexity(args) => tools::perplexity(&args),
        Command::Bench(args) => bench::bench(&args),
        Command::Card(args) => card::card(&args),
        Command::Synth(args) => synth::synth(&args),
        Command::Embed(args) => embed::embed(&args),
        Command::Rerank(args) => rerank::rerank(&args),
        Command::Convert(args) => convert::convert(&args),
        Command::Quantize(args) => quantize::quantize(&args),
        Command::Imatrix(args) => quantize::imatrix(&args),
        Command::Pack(args) => pack::pack(&args),
        Command::Export(args) => export::export(&args),
        #[cfg(feature = "sim")]
        Command::Profile(args) => profile::profile(&args),
        #[cfg(feature = "sim")]
        Command::Estimate(args) => estimate::run(&args),
        #[cfg(feature = "sim")]
        Command::Explore(args) => explore::run(&args),
        #[cfg(feature = "sim")]
        Command::Calibrate(args) => calibrate::calibrate(&args),
        Command::Conform(args) => tools::conform(&args),
        Command::Certify(args) => certify::certify(&args),
        Command::Bisect(args) => bisect::bisect(&args),
    });
    device::say_reports();
    let Err(failure) = result else { return ExitCode::SUCCESS };
    let broken_pipe =
        failure.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe);
    if broken_pipe {
        return ExitCode::SUCCESS;
    }
    let cancelled = failure.downcast_ref().is_some_and(|e| matches!(e, halite::Error::Cancelled));
    if cancelled || failure.is::<interrupt::Interrupted>() {
        say("halite: interrupted");
        return interrupt::EXIT_CODE.into();
    }
    say(&format!("halite: {failure}"));
    ExitCode::FAILURE
}
