//! Chat templates: render messages to the text of a prompt, with the Jinja template in a model file's
//! `tokenizer.chat_template`.
//!
//! Templates come from untrusted files. Halite has its own evaluator, which limits every allocation and every
//! step: no published engine limits the size of an operator's result or the depth of a value. It renders as
//! Python's Jinja2 with the settings of transformers (`trim_blocks`, `lstrip_blocks`, `loopcontrols`,
//! `generation`, an immutable sandbox).

mod eval;
mod filters;
mod json;
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
pub use json::Json;
use parse::Statement;
use value::{Fallible, Value};

/// Maximum bytes of a template.
const MAX_TEMPLATE: usize = 1 << 20;

/// Maximum bytes of a date format.
const MAX_FORMAT: usize = 1000;

/// Stack size for parsing and running a template: eight times what the deepest allowed template needs in a
/// build without optimization.
#[cfg(not(target_family = "wasm"))]
const STACK: usize = 64 << 20;

/// Marks where the answer starts in OpenAI's harmony format. Templates reject the reasoning before it in a
/// history.
const FINAL_CHANNEL: &str = "<|channel|>final<|message|>";
const ANY_CHANNEL: &str = "<|channel|>";

/// A message of a chat.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Message {
    /// `system`, `user`, `assistant`, or another role of the template.
    pub role: String,
    /// The text of the message.
    pub content: String,
    /// What else the template can read, such as `tool_calls`. A field named `role` or `content` replaces that one.
    pub fields: Vec<(String, Json)>,
}

impl Message {
    /// Creates a message.
    pub fn new(role: &str, content: &str) -> Message {
        Message { role: role.into(), content: content.into(), fields: Vec::new() }
    }

    /// Adds a field.
    #[must_use]
    pub fn field(mut self, name: &str, value: Json) -> Message {
        self.fields.push((name.into(), value));
        self
    }

    /// Creates the assistant's message from generated text. In OpenAI's harmony format, it contains only the
    /// last channel.
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
    source: String,
    body: Vec<Statement>,
    bos: String,
    eos: String,
}

impl Template {
    /// Reads the template of a file; `None` if it has none.
    ///
    /// # Errors
    /// As [`Template::new`]; [`Error::Gguf`] if it is not a text.
    pub fn from_gguf(gguf: &Gguf, tokenizer: &Tokenizer) -> Result<Option<Template>> {
        let source = gguf.optional_str("tokenizer.chat_template")?;
        source.map(|source| Template::new(source, tokenizer)).transpose()
    }

    /// Parses a template for a tokenizer, whose begin- and end-of-text tokens it may use.
    ///
    /// # Errors
    /// [`Error::Template`] if it is malformed or too long.
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
        Ok(Template { source: source.into(), body, bos, eos })
    }

    /// The text of the template.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders the text of a chat; with `add_generation_prompt`, up to the start of the model's answer.
    ///
    /// # Errors
    /// [`Error::Template`] if the template rejects the messages (for example roles that do not alternate, or
    /// a system message), fails, or exceeds a limit of time or size.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.render_with(messages, &[], add_generation_prompt)
    }

    /// As [`Template::render`], with further variables, such as `tools`.
    ///
    /// # Errors
    /// As [`Template::render`].
    pub fn render_with(
        &self,
        messages: &[Message],
        variables: &[(&str, Json)],
        add_generation_prompt: bool,
    ) -> Result<String> {
        on_large_stack(|| {
            let mut run = Run::new();
            let rendered = self.variables(&mut run, messages, variables, add_generation_prompt);
            let rendered = rendered.and_then(|variables| run.template(&self.body, variables));
            rendered.map_err(|message| (run.line, message))
        })
    }

    fn variables<'a>(
        &self,
        run: &mut Run,
        messages: &[Message],
        variables: &[(&'a str, Json)],
        add_generation_prompt: bool,
    ) -> Fallible<Vec<(&'a str, Value)>> {
        let meter = &mut run.heap.meter;
        let mut list = Vec::new();
        for message in messages {
            let pair = |name: &str, text: &str| (Value::text(name), Value::text(text));
            let mut pairs = vec![pair("role", &message.role), pair("content", &message.content)];
            for (name, value) in &message.fields {
                pairs.push((meter.str(name)?, value.value(meter, 0)?));
            }
            list.push(meter.dict(pairs)?);
        }
        let mut all = vec![
            ("messages", meter.list(list)?),
            ("add_generation_prompt", Value::Bool(add_generation_prompt)),
            ("bos_token", Value::text(&self.bos)),
            ("eos_token", Value::text(&self.eos)),
            // Templates test these names for `none`.
            ("tools", Value::None),
            ("documents", Value::None),
        ];
        for (name, value) in variables {
            all.push((name, value.value(meter, 0)?));
        }
        Ok(all)
    }
}

/// Encodes a rendered chat, and parses its control tokens. Quote untrusted messages with
/// [`Tokenizer::quote`]; otherwise the author of a message could end it and forge another turn. Adds the
/// begin-of-text token if the vocabulary defines it and the template did not write it.
pub fn encode(tokenizer: &Tokenizer, prompt: &str) -> Vec<u32> {
    let mut tokens =
        tokenizer.encode(prompt, EncodeOptions::default().add_special(false).parse_special(true));
    if tokenizer.adds_bos() && tokens.first().copied() != tokenizer.bos() {
        tokens.splice(0..0, tokenizer.bos());
    }
    tokens
}

/// Runs recursive work on a large stack. Adds the line number to an error, and escapes text from the
/// template.
fn on_large_stack<T: Send>(f: impl FnOnce() -> Result<T, (u32, String)> + Send) -> Result<T> {
    // There are no threads in a browser, and one stack.
    #[cfg(target_family = "wasm")]
    let result: std::io::Result<std::thread::Result<_>> = Ok(Ok(f()));
    #[cfg(not(target_family = "wasm"))]
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

/// Formats the current time in UTC as `strftime` does. Rejects widths, because a template could make them
/// arbitrarily large.
fn strftime_now(format: &str) -> Fallible<String> {
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
    let now = Timestamp::UNIX_EPOCH
        .checked_add(crate::clock::since_1970())
        .map_err(|e| format!("strftime_now: {e}"))?;
    jiff::fmt::strtime::format(format, now).map_err(|e| format!("strftime_now: {e}"))
}
