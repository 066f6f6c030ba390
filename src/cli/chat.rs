//! `halite chat`.

use std::io::{BufRead, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;

use clap::Args;
use halite::chat::{self, Message, Template};
use halite::generate::{Aids, Finish, GenerateOptions};
use halite::session::SessionOptions;

use super::run::{limit, rate};
use super::{Failure, ModelArgs, SamplerArgs, interrupt, print, read_text, say, tokenizer};

#[derive(Args)]
pub struct ChatArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// What the model is told first.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// A Jinja template to use instead of the model file's.
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// Most tokens of an answer; -1: no limit.
    #[arg(short, value_name = "N", default_value = "2048", value_parser = limit, allow_negative_numbers = true)]
    n: u32,
    #[command(flatten)]
    sampler: SamplerArgs,
    /// Most prompt tokens of one step.
    #[arg(long, value_name = "N", default_value_t = 512)]
    batch: u32,
    /// No timings after answers.
    #[arg(short, long)]
    quiet: bool,
}

/// Each line of stdin is a message; answers go to stdout.
pub fn chat(args: &ChatArgs) -> Result<(), Failure> {
    let model = args.model.open()?;
    let tokenizer = tokenizer(&model)?;
    let template = match &args.template {
        Some(file) => Template::new(&read_text(file)?, &tokenizer)?,
        None => Template::from_gguf(model.gguf(), &tokenizer)?.ok_or(
            "this model file has no chat template (tokenizer.chat_template): use `halite run`, or pass one with --template",
        )?,
    };
    // The next prompt may have the last answer in another form, as without its thoughts.
    let session_options = SessionOptions { rewind: args.n, ..args.model.options(args.batch, 1) };
    let mut session = args.model.session(&model, &session_options)?;
    let options = GenerateOptions {
        max_tokens: args.n,
        sampler: args.sampler.options(),
        special: true,
        ..Default::default()
    };
    let interactive = std::io::stdin().is_terminal();
    let sequence = session.add_sequence();
    let mut messages: Vec<Message> = args.system.iter().map(|text| Message::new("system", text)).collect();
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if interactive {
            write!(std::io::stderr(), "> ")?;
        }
        let Some(line) = lines.next().transpose()? else { return Ok(()) };
        if line.trim().is_empty() {
            continue;
        }
        messages.push(Message::new("user", &tokenizer.quote(&line)));
        let prompt = chat::encode(&tokenizer, &template.render(&messages, true)?);
        // Ctrl-C ends an answer; before one, the command.
        let work = interrupt::Work::new(session.cancel());
        let mut written = Ok(());
        let generation =
            session.generate_in(sequence, &tokenizer, &prompt, &options, Aids::default(), &mut |text| {
                written = print(text);
                if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            })?;
        drop(work);
        written?;
        print("\n")?;
        messages.push(Message::answer(&generation.text));
        if !args.quiet {
            say(&format!(
                "[{} tokens kept · prefill {} · decode {}]",
                generation.reused_tokens,
                rate(generation.prefill_tokens, generation.prefill),
                rate(generation.decode_tokens, generation.decode),
            ));
        }
        if generation.finish == Finish::ContextFull {
            return Err(format!("the context of {} positions is full: see --ctx", session.positions()).into());
        }
    }
}
