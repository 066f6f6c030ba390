//! `halite run`.

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use halite::backend::Clock;
use halite::generate::{Finish, GenerateOptions, Generation};
use halite::session::{SessionOptions, footprint};
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
    let mut session = args.model.session(&model, args.batch, 1)?;
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
    if !args.json {
        print(&prompt)?;
    }
    let mut written = Ok(());
    let generation = session.generate(&tokenizer, &prompt, &options, &mut |text| {
        if !args.json {
            written = print(text);
        }
        if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    written?;
    let session_options = SessionOptions {
        context: args.model.ctx,
        batch: args.batch,
        program: args.model.program(),
        ..Default::default()
    };
    let memory = footprint(&model, &**session.backend(), &session_options)?;
    if args.json {
        let report = json(&prompt, &generation, load, memory.working_bytes(), memory.weight_bytes);
        return print(&format!("{report}\n"));
    }
    print("\n")?;
    if !args.quiet {
        let caps = session.backend().caps();
        eprintln!(
            "\n{} on {} ({})\nload {} · first token {} · prefill {} · decode {} · memory {} + {} weights, {} mapped",
            model.name(),
            caps.name,
            caps.device,
            millis(load),
            millis(generation.first_token),
            rate(generation.prompt_tokens.len() as u32, generation.prefill),
            rate(generation.decode_steps, generation.decode),
            bytes(memory.working_bytes()),
            bytes(memory.weight_bytes),
            bytes(session.weights().mapped_bytes),
        );
        if session.last_timing().is_some_and(|timing| timing.clock == Clock::Simulated) {
            let (prefill, decode) = generation.device;
            eprintln!(
                "simulated: prefill {}, {} · decode {} a token, {}",
                millis(prefill),
                rate(generation.prompt_tokens.len() as u32, prefill),
                millis(decode.checked_div(generation.decode_steps).unwrap_or_default()),
                rate(generation.decode_steps, decode),
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
        "prefill_tokens_per_s": per_second(g.prompt_tokens.len() as u32, g.prefill),
        "decode_tokens_per_s": per_second(g.decode_steps, g.decode),
        "device_prefill_s": g.device.0.as_secs_f64(),
        "device_decode_s": g.device.1.as_secs_f64(),
        "memory_bytes": memory,
        "weight_bytes": weights,
    })
}
