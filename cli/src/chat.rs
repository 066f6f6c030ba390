//! `halite chat`.

use std::io::{BufRead, IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;

use clap::Args;
use halite::Error;
use halite::chat::{self, Message, Template};
use halite::generate::{Decoding, Finish, GenerateOptions};

use super::run::rate;
use super::{Failure, ModelArgs, SamplerArgs, interrupt, limit, print, read_text, say, tokenizer};

#[derive(Args)]
pub struct ChatArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// System message.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Jinja chat template [default: the model's].
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// Maximum number of tokens per answer; -1: no limit.
    #[arg(short, value_name = "N", default_value = "2048", value_parser = limit, allow_negative_numbers = true)]
    n: u32,
    /// When the context is full, drop the oldest turns (never --system) instead of the newest message.
    #[arg(long)]
    drop_oldest: bool,
    #[command(flatten)]
    sampler: SamplerArgs,
    /// Prefill batch size in tokens.
    #[arg(long, value_name = "N", default_value_t = 512)]
    batch: u32,
    /// Do not print timings.
    #[arg(short, long)]
    quiet: bool,
}

/// Reads each line of stdin as a message and prints the answers. Drops a message that cannot be answered, and
/// continues the chat.
pub fn chat(args: &ChatArgs) -> Result<(), Failure> {
    let model = args.model.open()?;
    let tokenizer = tokenizer(model.gguf())?;
    let template = match &args.template {
        Some(file) => Template::new(&read_text(file)?, &tokenizer)?,
        None => Template::from_gguf(model.gguf(), &tokenizer)?.ok_or(
            "this model file has no chat template (tokenizer.chat_template): use `halite run`, or pass one with --template",
        )?,
    };
    // The next prompt may render the last answer differently, for instance without its reasoning.
    let session_options = args.model.options(args.batch, 1).rewind(args.n);
    let mut session = args.model.session(&model, &session_options)?;
    let options = GenerateOptions::default().max_tokens(args.n).sampler(args.sampler.options()).special(true);
    let interactive = std::io::stdin().is_terminal();
    let sequence = session.add_sequence();
    let mut messages: Vec<Message> = args.system.iter().map(|text| Message::new("system", text)).collect();
    let mut stdin = std::io::stdin().lock();
    let (mut line, mut dropped) = (Vec::new(), 0);
    loop {
        if interactive {
            write!(std::io::stderr(), "> ")?;
        }
        line.clear();
        if (&mut stdin).take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        let mut drop_message = |why: &dyn std::fmt::Display| {
            dropped += 1;
            say(&format!("halite: message dropped: {why}"));
        };
        if line.len() as u64 == MAX_LINE && !line.ends_with(b"\n") {
            // The rest of the line is not a message of its own.
            stdin.skip_until(b'\n')?;
            drop_message(&format!("the line is longer than {MAX_LINE} bytes"));
            continue;
        }
        let Ok(text) = std::str::from_utf8(&line) else {
            drop_message(&"the line is not UTF-8");
            continue;
        };
        let text = text.trim_end_matches(['\n', '\r']);
        if text.trim().is_empty() {
            continue;
        }
        messages.push(Message::new("user", &tokenizer.quote(text)));
        // Leave room for an answer: all of -n, or a quarter of a small context.
        let answer = args.n.min(session.positions() / 4);
        let max_prompt = session.positions().saturating_sub(answer) as usize;
        let prompt = loop {
            let prompt = template.render(&messages, true).map(|prompt| chat::encode(&tokenizer, &prompt));
            let full = prompt.as_ref().is_ok_and(|prompt| prompt.len() > max_prompt);
            if !(args.drop_oldest && full && forget_oldest(&mut messages)) {
                break prompt;
            }
            say("halite: the context is full: the oldest turn was dropped");
        };
        let prompt = match prompt {
            Ok(prompt) => prompt,
            Err(error) => {
                messages.pop();
                drop_message(&error);
                continue;
            }
        };
        // Ctrl-C during an answer ends the answer, and otherwise the command.
        let work = interrupt::Work::new(session.cancel_handle());
        let mut written = Ok(());
        let generation =
            session.generate_in(sequence, &tokenizer, &prompt, &options, Decoding::default(), |text| {
                written = print(text);
                if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            });
        drop(work);
        written?;
        let generation = match generation {
            Ok(generation) => generation,
            // The message is at fault, not the session.
            Err(error @ (Error::ContextFull { .. } | Error::Argument { .. })) => {
                messages.pop();
                drop_message(&format!("{error}{}", hint(&error)));
                continue;
            }
            Err(error) => return Err(error.into()),
        };
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
            let full = format!(
                "the context of {} positions is full, so the answer is cut short",
                session.positions()
            );
            if args.drop_oldest {
                say(&format!("halite: {full}"));
            } else {
                messages.truncate(messages.len() - 2);
                drop_message(&format!("{full}{FULL}"));
            }
        }
    }
    // At a terminal, the user has seen each message already.
    match dropped {
        1.. if !interactive => {
            Err(format!("{dropped} message{} dropped", if dropped == 1 { " was" } else { "s were" }).into())
        }
        _ => Ok(()),
    }
}

/// Maximum bytes of a message.
const MAX_LINE: u64 = 16 << 20;

/// The hint when the context is full.
const FULL: &str = " (see --ctx and --drop-oldest)";

fn hint(error: &Error) -> &'static str {
    if matches!(error, Error::ContextFull { .. }) { FULL } else { "" }
}

/// Removes the oldest turn (a message and its answer) after the system message. Keeps the newest message.
fn forget_oldest(messages: &mut Vec<Message>) -> bool {
    let first = usize::from(messages.first().is_some_and(|message| message.role == "system"));
    if messages.len() <= first + 1 {
        return false;
    }
    messages.remove(first);
    while messages.len() > first + 1 && messages[first].role != "user" {
        messages.remove(first);
    }
    true
}
