//! Chats: messages to the text of a prompt, by the Jinja template that a model file carries in `tokenizer.chat_template`.
//!
//! Templates come from files that nobody vouches for. So the language is run here, by an evaluator that asks before each allocation
//! and counts each step: no published engine limits what an operator builds, or how deep a value nests. It renders what Python's
//! Jinja2 does as transformers sets it up (`trim_blocks`, `lstrip_blocks`, `loopcontrols`, `generation`, an immutable sandbox).

mod eval;
mod filters;
mod lex;
mod methods;
mod parse;
mod text;
mod value;

use jiff::Timestamp;

use crate::error::{Error, Result, printable};
use crate::gguf::Gguf;
use crate::tokenizer::{EncodeOptions, Tokenizer};
use eval::Run;
use parse::Statement;
use value::{Fallible, Value};

/// Most bytes of a template.
const MAX_TEMPLATE: usize = 1 << 20;

/// Most bytes of a date's format.
const MAX_FORMAT: usize = 1000;

/// The stack that a template is read and run on: eight times what the deepest that the limits allow takes without optimization.
const STACK: usize = 64 << 20;

/// Where the answer starts in texts that think first, in OpenAI's harmony format: templates refuse what is before in a history.
const FINAL_CHANNEL: &str = "<|channel|>final<|message|>";
const ANY_CHANNEL: &str = "<|channel|>";

/// A message of a chat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: &str, content: &str) -> Message {
        Message { role: role.into(), content: content.into() }
    }

    /// What a history keeps of a generated text: all of it, but of the channels of OpenAI's harmony format the last one's.
    pub fn answer(generated: &str) -> Message {
        let content = match generated.rfind(FINAL_CHANNEL) {
            Some(at) => &generated[at + FINAL_CHANNEL.len()..],
            None if generated.contains(ANY_CHANNEL) => "",
            None => generated,
        };
        Message::new("assistant", content)
    }
}

/// A chat template.
#[derive(Debug)]
pub struct Template {
    body: Vec<Statement>,
    bos: String,
    eos: String,
}

impl Template {
    /// The template of a file; `None` if it has none.
    ///
    /// # Errors
    /// As [`Template::new`]; [`Error::Gguf`] if it is not a text.
    pub fn from_gguf(gguf: &Gguf, tokenizer: &Tokenizer) -> Result<Option<Template>> {
        let source = gguf.optional_str("tokenizer.chat_template")?;
        source.map(|source| Template::new(source, tokenizer)).transpose()
    }

    /// A template for a model with this tokenizer, whose begin- and end-of-text tokens it may use.
    ///
    /// # Errors
    /// [`Error::Template`] if it is not well-formed or too long.
    pub fn new(source: &str, tokenizer: &Tokenizer) -> Result<Template> {
        if source.len() > MAX_TEMPLATE {
            return Err(Error::Template(format!(
                "expected at most {MAX_TEMPLATE} bytes, got {}",
                source.len()
            )));
        }
        let body = on_large_stack(|| parse::parse(source))?;
        let text = |id: Option<u32>| {
            let text = id.and_then(|id| tokenizer.text(id)).unwrap_or_default();
            String::from_utf8_lossy(text).into_owned()
        };
        let (bos, eos) = (text(tokenizer.bos()), text(tokenizer.eos()));
        Ok(Template { body, bos, eos })
    }

    /// The text of a chat; with `add_generation_prompt` up to where the model answers.
    ///
    /// # Errors
    /// [`Error::Template`] for what the template refuses (roles that do not alternate, a system message) or does wrong, or if it
    /// takes too long or writes too much.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        on_large_stack(|| {
            let mut run = Run::new();
            let rendered = self.variables(&mut run, messages, add_generation_prompt);
            let rendered = rendered.and_then(|variables| run.template(&self.body, variables));
            rendered.map_err(|message| (run.line, message))
        })
    }

    fn variables(
        &self,
        run: &mut Run,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Fallible<Vec<(&'static str, Value)>> {
        let meter = &mut run.heap.meter;
        let mut list = Vec::new();
        for message in messages {
            let pair = |name: &str, text: &str| (Value::text(name), Value::text(text));
            list.push(meter.dict(vec![pair("role", &message.role), pair("content", &message.content)])?);
        }
        Ok(vec![
            ("messages", meter.list(list)?),
            ("add_generation_prompt", Value::Bool(add_generation_prompt)),
            ("bos_token", Value::text(&self.bos)),
            ("eos_token", Value::text(&self.eos)),
            // Where there are none, templates are told so.
            ("tools", Value::None),
            ("documents", Value::None),
        ])
    }
}

/// The tokens of a rendered chat. Control tokens written out in it are read as such, those in messages too, unless
/// [`Tokenizer::quote`] made them: otherwise who writes a message may end it, and go on as somebody else. The begin-of-text token is added where the vocabulary asks for it and the template did not write it.
pub fn encode(tokenizer: &Tokenizer, prompt: &str) -> Vec<u32> {
    let mut tokens = tokenizer.encode(prompt, EncodeOptions { add_special: false, parse_special: true });
    if tokenizer.adds_bos() && tokens.first().copied() != tokenizer.bos() {
        tokens.splice(0..0, tokenizer.bos());
    }
    tokens
}

/// Runs what nests as deep as a template makes it. A fault has its line and is safe to print.
fn on_large_stack<T: Send>(f: impl FnOnce() -> Result<T, (u32, String)> + Send) -> Result<T> {
    let result = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("template".into()).stack_size(STACK);
        thread.spawn_scoped(scope, f).map(|thread| thread.join())
    });
    match result {
        Ok(Ok(result)) => {
            result.map_err(|(line, message)| Error::Template(format!("line {line}: {}", printable(&message))))
        }
        Ok(Err(_)) => Err(Error::Template("the engine panicked".into())),
        Err(error) => Err(Error::Template(format!("no thread to run it: {error}"))),
    }
}

/// The time now, in UTC, as `strftime` writes it; without widths, which a template could make as large as it likes.
fn now(format: &str) -> Fallible<String> {
    let flags = ['-', '_', '0', '^', '#'];
    if format
        .split('%')
        .skip(1)
        .any(|part| part.trim_start_matches(flags).starts_with(|c: char| c.is_ascii_digit()))
    {
        return Err("strftime_now: no widths are allowed".into());
    }
    if format.len() > MAX_FORMAT {
        return Err(format!("strftime_now: expected at most {MAX_FORMAT} bytes, got {}", format.len()));
    }
    jiff::fmt::strtime::format(format, Timestamp::now()).map_err(|e| format!("strftime_now: {e}"))
}
