//! `halite run`.

use std::fs::File;
use std::io::{BufReader, BufWriter, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use halite::backend::Clock;
#[cfg(feature = "constrain")]
use halite::constrain::{Guide, Rule};
use halite::generate::{Aids, Finish, GenerateOptions, Generation};
use halite::session::{Head, SessionOptions, footprint};
use halite::speculate::{DraftModel, Drafter, Lookup};
use halite::tokenizer::EncodeOptions;

use super::{Failure, ModelArgs, SamplerArgs, bytes, print, read_text, tokenizer};

#[derive(Args)]
pub struct RunArgs {
    /// The text to continue; without it, it is read from --file or stdin.
    prompt: Option<String>,
    #[command(flatten)]
    model: ModelArgs,
    /// Read the prompt from a file (- for stdin).
    #[arg(short, long, value_name = "FILE", conflicts_with = "prompt")]
    file: Option<PathBuf>,
    /// Most tokens to generate.
    #[arg(short, value_name = "N", default_value_t = 128)]
    n: u32,
    #[command(flatten)]
    sampler: SamplerArgs,
    /// Guess up to N tokens by what followed the last few the time before, and check them in one step; the text stays the same.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, conflicts_with = "draft")]
    lookup: u32,
    /// Guess tokens with a smaller model of the same vocabulary, and check them in one step; the text stays the same.
    #[arg(long, value_name = "FILE")]
    draft: Option<PathBuf>,
    /// Most tokens that the draft model guesses at a time.
    #[arg(long, value_name = "N", default_value_t = 4)]
    draft_tokens: u32,
    /// Go on after the text of a sequence that --save wrote; the prompt may be empty.
    #[arg(long, value_name = "FILE")]
    restore: Option<PathBuf>,
    /// Write the sequence with its KV cache to a file at the end.
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    #[cfg(feature = "constrain")]
    #[command(flatten)]
    rule: RuleArgs,
    /// Stop before this text; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Most prompt tokens of one step.
    #[arg(long, value_name = "N", default_value_t = 512)]
    batch: u32,
    /// Read control tokens written out in the prompt as such.
    #[arg(long)]
    special: bool,
    /// Go on after the token that ends a text.
    #[arg(long)]
    ignore_end: bool,
    /// Print one JSON object at the end instead of text as it appears.
    #[arg(long)]
    json: bool,
    /// No timings at the end.
    #[arg(short, long)]
    quiet: bool,
}

/// What the output is held to.
#[cfg(feature = "constrain")]
#[derive(Args)]
#[group(multiple = false)]
struct RuleArgs {
    /// Generate JSON of the schema in this file.
    #[arg(long, value_name = "FILE")]
    json_schema: Option<PathBuf>,
    /// Generate a text that this regular expression matches.
    #[arg(long, value_name = "REGEX")]
    regex: Option<String>,
    /// Generate a text of the grammar in this file, in GBNF or in llguidance's variant of Lark's syntax.
    #[arg(long, value_name = "FILE")]
    grammar: Option<PathBuf>,
}

#[cfg(feature = "constrain")]
impl RuleArgs {
    fn guide(&self, tokenizer: &halite::Tokenizer) -> Result<Option<Guide>, Failure> {
        let rule = match self {
            RuleArgs { json_schema: Some(file), .. } => Rule::JsonSchema(read_text(file)?),
            RuleArgs { regex: Some(regex), .. } => Rule::Regex(regex.clone()),
            RuleArgs { grammar: Some(file), .. } => Rule::grammar(&read_text(file)?),
            _ => return Ok(None),
        };
        Ok(Some(Guide::new(tokenizer, &rule)?))
    }
}

pub fn run(args: &RunArgs) -> Result<(), Failure> {
    let prompt = match (&args.prompt, &args.file) {
        (Some(prompt), _) => prompt.clone(),
        (None, Some(path)) => read_text(path)?,
        (None, None) if std::io::stdin().is_terminal() => {
            return Err("no prompt: give it as an argument, with --file, or on stdin".into());
        }
        (None, None) => read_text("-".as_ref())?,
    };
    let start = Instant::now();
    let model = args.model.open()?;
    let tokenizer = tokenizer(&model)?;
    let drafts = if args.draft.is_some() { args.draft_tokens } else { args.lookup };
    let outputs = drafts.saturating_add(1);
    let session_options = args.model.options(args.batch, outputs);
    let mut session = args.model.session(&model, &session_options)?;
    let mut drafter: Option<Box<dyn Drafter>> = match &args.draft {
        Some(file) => {
            let draft = ModelArgs { model: Some(file.clone()), ..args.model.clone() };
            // A draft that is wrong from its first token on is taken back whole.
            let options = SessionOptions { rewind: drafts, ..draft.options(args.batch, 1) };
            let draft = draft.session(&draft.open()?, &options)?;
            Some(Box::new(DraftModel::new(draft, &session, drafts as usize)?))
        }
        None if drafts > 0 => Some(Box::new(Lookup::new(drafts as usize))),
        None => None,
    };
    let load = start.elapsed();
    let cancel = session.cancel();
    // Ctrl-C ends the generation; what was generated and its timings are still printed.
    ctrlc::set_handler(move || cancel.cancel())?;

    let options = GenerateOptions {
        max_tokens: args.n,
        sampler: args.sampler.options(),
        stop: args.stop.clone(),
        encode: EncodeOptions { add_special: true, parse_special: args.special },
        ignore_end: args.ignore_end,
        special: false,
    };
    let mut written = Ok(());
    let mut tokens = Vec::new();
    let sequence = match &args.restore {
        Some(file) => {
            let open = File::open(file).map_err(|e| format!("{}: {e}", file.display()))?;
            let sequence = session.restore(&mut BufReader::new(open))?;
            tokens.extend(session.tokens(sequence)?);
            sequence
        }
        None => session.add_sequence(),
    };
    // What continues a text does not begin one.
    let encode = EncodeOptions { add_special: tokens.is_empty(), ..options.encode };
    tokens.extend(tokenizer.encode(&prompt, encode));
    #[cfg(feature = "constrain")]
    let mut guide = args.rule.guide(&tokenizer)?;
    if !args.json {
        print(&prompt)?;
    }
    let aids = Aids {
        drafter: drafter.as_deref_mut().map(|d| d as _),
        #[cfg(feature = "constrain")]
        constraint: guide.as_mut().map(|g| g as _),
        #[cfg(not(feature = "constrain"))]
        constraint: None,
    };
    let generation = session.generate_in(sequence, &tokenizer, &tokens, &options, aids, &mut |text| {
        if !args.json {
            written = print(text);
        }
        if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    if let Some(file) = &args.save {
        // The last token was chosen, but not run. After Ctrl-C, there is still something to save.
        session.cancel().reset();
        let mut text = [&generation.prompt_tokens[..], &generation.tokens].concat();
        text.truncate(session.positions() as usize);
        let done = session.reuse(sequence, &text)?;
        session.prefill(sequence, &text[done..], Head::Logits)?;
        replace(file, &mut |out| session.save(sequence, out))?;
    }
    written?;
    let memory = footprint(&model, &**session.backend(), &session_options)?;
    if args.json {
        let report = json(&prompt, &generation, load, memory.working_bytes(), memory.weight_bytes);
        return print(&format!("{report}\n"));
    }
    print("\n")?;
    if !args.quiet {
        let caps = session.backend().caps();
        let prefilled = generation.prompt_tokens.len() as u32 - generation.reused_tokens;
        eprintln!(
            "\n{} on {} ({})\nload {} · first token {} · prefill {} · decode {} · memory {} + {} weights, {} mapped",
            model.name(),
            caps.name,
            caps.device,
            millis(load),
            millis(generation.first_token),
            rate(prefilled, generation.prefill),
            rate(generation.decode_tokens, generation.decode),
            bytes(memory.working_bytes()),
            bytes(memory.weight_bytes),
            bytes(session.weights().mapped_bytes),
        );
        if drafter.is_some() {
            let (drafted, right) = generation.drafted;
            eprintln!("drafted {drafted} tokens, {right} of them right · {} steps", generation.decode_steps);
        }
        if session.last_timing().is_some_and(|timing| timing.clock == Clock::Simulated) {
            let (prefill, decode) = generation.device;
            eprintln!(
                "simulated: prefill {}, {} · decode {} a token, {}",
                millis(prefill),
                rate(prefilled, prefill),
                millis(decode.checked_div(generation.decode_tokens).unwrap_or_default()),
                rate(generation.decode_tokens, decode),
            );
        }
    }
    Ok(())
}

fn millis(t: Duration) -> String {
    format!("{:.1} ms", t.as_secs_f64() * 1e3)
}

fn per_second(n: u32, t: Duration) -> f64 {
    if t.is_zero() { 0.0 } else { f64::from(n) / t.as_secs_f64() }
}

/// Writes a file beside the one that it then replaces, so that what was there is lost only to something whole. What is no plain
/// file, such as a pipe, is written as it is.
fn replace(
    file: &Path,
    write: &mut dyn FnMut(&mut dyn Write) -> Result<(), halite::Error>,
) -> Result<(), Failure> {
    // A link stays a link.
    let target = file.canonicalize().unwrap_or_else(|_| file.to_owned());
    let direct = target.exists() && !target.is_file();
    let mut beside = target.clone().into_os_string();
    beside.push(".part");
    let written = if direct { target.clone() } else { PathBuf::from(beside) };
    let failed = |e: std::io::Error| format!("{}: {e}", written.display());
    let mut out = BufWriter::new(File::create(&written).map_err(failed)?);
    let done = write(&mut out).map_err(Failure::from).and_then(|()| Ok(out.flush().map_err(failed)?));
    if direct {
        return done;
    }
    match done {
        Ok(()) => Ok(std::fs::rename(&written, &target).map_err(failed)?),
        Err(error) => {
            // Half a file is of no use.
            let _ = std::fs::remove_file(&written);
            Err(error)
        }
    }
}

pub(super) fn rate(n: u32, t: Duration) -> String {
    format!("{n} tokens, {:.1} tokens/s", per_second(n, t))
}

fn json(prompt: &str, g: &Generation, load: Duration, memory: u64, weights: u64) -> serde_json::Value {
    let finish = match g.finish {
        Finish::End => "end",
        Finish::Length => "length",
        Finish::Stop => "stop",
        Finish::ContextFull => "context_full",
        Finish::Callback => "callback",
        Finish::Cancelled => "cancelled",
    };
    serde_json::json!({
        "prompt": prompt,
        "text": g.text,
        "prompt_tokens": g.prompt_tokens,
        "tokens": g.tokens,
        "finish": finish,
        "load_s": load.as_secs_f64(),
        "first_token_s": g.first_token.as_secs_f64(),
        "prefill_tokens_per_s": per_second(g.prompt_tokens.len() as u32 - g.reused_tokens, g.prefill),
        "decode_steps": g.decode_steps,
        "drafted_tokens": g.drafted.0,
        "accepted_tokens": g.drafted.1,
        "decode_tokens_per_s": per_second(g.decode_tokens, g.decode),
        "device_prefill_s": g.device.0.as_secs_f64(),
        "device_decode_s": g.device.1.as_secs_f64(),
        "memory_bytes": memory,
        "weight_bytes": weights,
    })
}
