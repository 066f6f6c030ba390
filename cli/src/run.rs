//! `halite run`.

use std::fs::File;
use std::io::{BufRead, BufReader, IsTerminal};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use halite::backend::Clock;
#[cfg(feature = "constrain")]
use halite::constrain::{Guide, Rule};
use halite::generate::{Decoding, GenerateOptions, Generation};
use halite::output::{self, Replace};
use halite::session::{OutputKind, footprint};
use halite::speculate::{DraftModel, Drafter, PromptLookup};
use halite::tokenizer::EncodeOptions;

use super::interrupt::{self, Interrupted};
use super::{Failure, ModelArgs, SamplerArgs, bytes, limit, print, read_text, say, tokenizer};

#[derive(Args)]
pub struct RunArgs {
    /// Prompt [default: read --file or stdin].
    prompt: Option<String>,
    #[command(flatten)]
    model: ModelArgs,
    /// Read the prompt from a file (- for stdin).
    #[arg(short, long, value_name = "FILE", conflicts_with = "prompt")]
    file: Option<PathBuf>,
    /// Maximum number of tokens to generate; -1: no limit.
    #[arg(short, value_name = "N", default_value = "128", value_parser = limit, allow_negative_numbers = true)]
    n: u32,
    #[command(flatten)]
    sampler: SamplerArgs,
    /// Speculative decoding by prompt lookup, up to N tokens per step; the output stays the same.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, conflicts_with = "draft")]
    lookup: u32,
    /// Speculative decoding with this smaller model of the same vocabulary; the output stays the same.
    #[arg(long, value_name = "FILE")]
    draft: Option<PathBuf>,
    /// Tokens that the draft model proposes per step.
    #[arg(long, value_name = "N", default_value_t = 4)]
    draft_tokens: u32,
    /// Continue a sequence saved with --save; the prompt may be empty.
    #[arg(long, value_name = "FILE")]
    restore: Option<PathBuf>,
    /// Save the sequence and its KV cache at the end.
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    #[cfg(feature = "constrain")]
    #[command(flatten)]
    rule: RuleArgs,
    /// Stop when this text appears; may be repeated.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Prefill batch size in tokens.
    #[arg(long, value_name = "N", default_value_t = 512)]
    batch: u32,
    /// Parse control tokens in the prompt, such as <|im_end|>.
    #[arg(long)]
    special: bool,
    /// Ignore end-of-text tokens.
    #[arg(long)]
    ignore_end: bool,
    /// Print one JSON object at the end instead of streaming text.
    #[arg(long)]
    json: bool,
    /// Do not print timings.
    #[arg(short, long)]
    quiet: bool,
}

/// The constraint on the output.
#[cfg(feature = "constrain")]
#[derive(Args)]
#[group(multiple = false)]
struct RuleArgs {
    /// Constrain the output to the JSON schema in this file.
    #[arg(long, value_name = "FILE")]
    json_schema: Option<PathBuf>,
    /// Constrain the output to this regular expression.
    #[arg(long, value_name = "REGEX")]
    regex: Option<String>,
    /// Constrain the output to the grammar in this file (GBNF or llguidance's Lark).
    #[arg(long, value_name = "FILE")]
    grammar: Option<PathBuf>,
}

#[cfg(feature = "constrain")]
impl RuleArgs {
    fn guide(&self, tokenizer: &halite::Tokenizer) -> Result<Option<Guide>, Failure> {
        let (from, rule) = match self {
            RuleArgs { json_schema: Some(file), .. } => {
                (file.display().to_string(), Rule::JsonSchema(read_text(file)?))
            }
            RuleArgs { regex: Some(regex), .. } => ("--regex".into(), Rule::Regex(regex.clone())),
            RuleArgs { grammar: Some(file), .. } => {
                (file.display().to_string(), Rule::grammar(&read_text(file)?))
            }
            _ => return Ok(None),
        };
        Ok(Some(Guide::new(tokenizer, &rule).map_err(|e| format!("{from}: {e}"))?))
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
    if let Some(file) = &args.save {
        output::check(file, Replace::SAVED_SEQUENCE, &inputs(args))?;
    }
    let model = args.model.open()?;
    let tokenizer = tokenizer(model.gguf())?;
    let drafts = if args.draft.is_some() { args.draft_tokens } else { args.lookup };
    let outputs = drafts.saturating_add(1);
    let session_options = args.model.options(args.batch, outputs);
    let mut session = args.model.session(&model, &session_options)?;
    let mut drafter: Option<Box<dyn Drafter>> = match &args.draft {
        Some(file) => {
            let draft = ModelArgs { model: Some(file.clone()), ..args.model.clone() };
            if args.model.memory.bytes().is_some() {
                return Err("--draft and --memory: choose one; a limit holds for one model".into());
            }
            // A draft whose first token is rejected is undone as a whole.
            let options = draft.options(args.batch, 1).rewind(drafts);
            let draft = draft.session(&draft.open()?, &options)?;
            Some(Box::new(DraftModel::new(draft, &session, drafts as usize)?))
        }
        None if drafts > 0 => Some(Box::new(PromptLookup::new(drafts as usize))),
        None => None,
    };
    let load = start.elapsed();
    let options = GenerateOptions::default()
        .max_tokens(args.n)
        .sampler(args.sampler.options())
        .stop(args.stop.clone())
        .encode(EncodeOptions::default().parse_special(args.special))
        .ignore_end(args.ignore_end);
    let mut written = Ok(());
    let mut tokens = Vec::new();
    let sequence = match &args.restore {
        Some(file) => {
            let open = File::open(file).map_err(|e| format!("{}: {e}", file.display()))?;
            let mut open = BufReader::new(open);
            let sequence = session.restore(&mut open).map_err(|e| format!("{}: {e}", file.display()))?;
            if open.fill_buf().is_ok_and(|rest| !rest.is_empty()) {
                return Err(format!("{}: expected nothing after the saved sequence", file.display()).into());
            }
            tokens.extend(session.tokens(sequence)?);
            sequence
        }
        None => session.add_sequence(),
    };
    // A prompt that continues a sequence gets no begin-of-text token.
    let encode = options.encode.add_special(tokens.is_empty());
    tokens.extend(tokenizer.encode(&prompt, encode));
    #[cfg(feature = "constrain")]
    let mut guide = args.rule.guide(&tokenizer)?;
    let mut decoding = Decoding::default();
    decoding.drafter = drafter.as_deref_mut().map(|d| d as _);
    #[cfg(feature = "constrain")]
    if let Some(guide) = &mut guide {
        decoding = decoding.constraint(guide);
    }
    // Ctrl-C ends the generation. The text so far and its timings are still printed, and the sequence is
    // saved.
    let work = interrupt::Work::new(session.cancel_handle());
    // The prompt is printed with the first text, so a wrong option or prompt prints nothing.
    let mut prompted = args.json;
    let mut show = |text: &str| {
        if !std::mem::replace(&mut prompted, true) {
            print(&prompt)?;
        }
        if args.json { Ok(()) } else { print(text) }
    };
    let generation = session.generate_in(sequence, &tokenizer, &tokens, &options, decoding, |text| {
        written = show(text);
        if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    written = written.and_then(|()| show(""));
    let interrupted = work.interrupted();
    drop(work);
    if let Some(file) = &args.save {
        let mut text = [&generation.prompt_tokens[..], &generation.tokens].concat();
        text.truncate(session.positions() as usize);
        let done = session.reuse(sequence, &text)?;
        // The last token was chosen but not run. Ctrl-C may have left out more.
        if text.len() - done <= 1 {
            session.prefill(sequence, &text[done..], OutputKind::Logits)?;
        }
        let mut out = interrupt::File::create(file, Replace::SAVED_SEQUENCE, &inputs(args))?;
        session.save(sequence, &mut out).map_err(|e| match e {
            halite::Error::Io { source, .. } => halite::Error::Io { path: file.clone(), source },
            e => e,
        })?;
        out.commit()?;
    }
    written?;
    let memory = footprint(
        &model,
        &**session.backend(),
        &session_options.clone().memory(None).batch(session.batch()),
    )?;
    if args.json {
        let mut report = json(&prompt, &generation, load, memory.working_bytes(), memory.weight_bytes);
        report["seed"] = args.sampler.seed.into();
        print(&format!("{report}\n"))?;
        return if interrupted { Err(Interrupted.into()) } else { Ok(()) };
    }
    print("\n")?;
    if !args.quiet {
        let caps = session.backend().caps();
        let prefilled = generation.prefill_tokens;
        say(&format!(
            "\n{} on {} ({})\nload {} · first token {} · prefill {} · decode {} · memory {} + weights {} ({} mapped)",
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
        ));
        if let Some(stream) = &session.weights().stream {
            let seconds = (generation.prefill + generation.decode).as_secs_f64();
            say(&format!(
                "streamed: {} of weights stay in the file; {} were read, {:.2} GB/s",
                bytes(session.weights().streamed_bytes),
                bytes(stream.read_bytes()),
                stream.read_bytes() as f64 / seconds.max(1e-9) / 1e9,
            ));
        }
        if drafter.is_some() {
            let (drafted, accepted) = generation.drafted;
            let steps = generation.decode_steps;
            say(&format!("drafted {drafted} tokens, {accepted} accepted · {steps} steps"));
        }
        if session.last_timing().is_some_and(|timing| timing.clock == Clock::Simulated) {
            let (prefill, decode) = generation.device;
            say(&format!(
                "simulated: prefill {}, {} · decode {} a token, {}",
                millis(prefill),
                rate(prefilled, prefill),
                millis(decode.checked_div(generation.decode_tokens).unwrap_or_default()),
                rate(generation.decode_tokens, decode),
            ));
        }
        if let Some(energy) = generation.energy {
            let tokens = generation.tokens.len().max(1);
            let each = energy.joules / tokens as f64;
            say(&format!("energy: {:.3} J, {each:.4} J a token ({})", energy.joules, energy.source.name()));
        }
        if args.model.model.is_some() {
            say(match model.gguf().optional_str("tokenizer.chat_template")? {
                Some(_) => "note: this is a chat model; use `halite chat` for answers",
                None => "note: this model has no chat template, so `halite chat` does not work with it",
            });
        }
    }
    if interrupted { Err(Interrupted.into()) } else { Ok(()) }
}

/// The input files, except for the restored sequence: --save may replace it.
fn inputs(args: &RunArgs) -> Vec<&Path> {
    let others = [&args.file, &args.draft];
    let mut inputs = args.model.inputs();
    #[cfg(feature = "constrain")]
    inputs.extend([&args.rule.json_schema, &args.rule.grammar].into_iter().flatten().map(PathBuf::as_path));
    inputs.extend(others.into_iter().flatten().map(PathBuf::as_path));
    inputs
}

fn millis(t: Duration) -> String {
    format!("{:.1} ms", t.as_secs_f64() * 1e3)
}

fn per_second(n: u32, t: Duration) -> f64 {
    if t.is_zero() { 0.0 } else { f64::from(n) / t.as_secs_f64() }
}

pub(super) fn rate(n: u32, t: Duration) -> String {
    format!("{n} tokens, {:.1} tokens/s", per_second(n, t))
}

fn json(prompt: &str, g: &Generation, load: Duration, memory: u64, weights: u64) -> serde_json::Value {
    serde_json::json!({
        "prompt": prompt,
        "text": g.text,
        "prompt_tokens": g.prompt_tokens,
        "tokens": g.tokens,
        "finish": g.finish.name(),
        "load_s": load.as_secs_f64(),
        "first_token_s": g.first_token.as_secs_f64(),
        "prefill_tokens": g.prefill_tokens,
        "prefill_tokens_per_s": per_second(g.prefill_tokens, g.prefill),
        "decode_steps": g.decode_steps,
        "drafted_tokens": g.drafted.0,
        "accepted_tokens": g.drafted.1,
        "decode_tokens_per_s": per_second(g.decode_tokens, g.decode),
        "device_prefill_s": g.device.0.as_secs_f64(),
        "device_decode_s": g.device.1.as_secs_f64(),
        "energy_j": g.energy.map(|energy| energy.joules),
        "energy_source": g.energy.map(|energy| energy.source.name()),
        "memory_bytes": memory,
        "weight_bytes": weights,
    })
}
