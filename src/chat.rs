//! Chats: messages to the text of a prompt, by the Jinja template that a model file carries in `tokenizer.chat_template`.
//!
//! Templates come from files that nobody vouches for. They read no files, their instructions, nesting and output are limited, and
//! what goes wrong in them is an error. The memory of texts that a template builds and never writes is not limited.

use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

use jiff::Timestamp;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind, context};
use minijinja_contrib::pycompat::unknown_method_callback;

use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::tokenizer::{EncodeOptions, Tokenizer};

/// Most instructions of one rendering: a template takes some dozens a message.
const FUEL: u64 = 10_000_000;

/// Most nested calls and blocks.
const DEPTH: usize = 100;

/// Most bytes of a template, and of its output.
const MAX_BYTES: usize = 16 << 20;

/// Most columns that a filter may indent by.
const MAX_INDENT: usize = 64;

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
    environment: Environment<'static>,
    source: String,
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
        if source.len() > MAX_BYTES {
            return Err(Error::Template(format!("expected at most {MAX_BYTES} bytes, got {}", source.len())));
        }
        let mut environment = Environment::new();
        // As transformers sets it up, which templates are written for.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::Template(e.to_string()))?);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: &str| {
            jiff::fmt::strtime::format(format, Timestamp::now())
                .map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e.to_string()))
        });
        // These two repeat spaces as often as they are told.
        environment.add_filter("tojson", to_json);
        environment.remove_filter("indent");
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(DEPTH);
        contain(|| environment.template_from_str(source).map(drop))?;
        let text = |id: Option<u32>| {
            let text = id.and_then(|id| tokenizer.text(id)).unwrap_or_default();
            String::from_utf8_lossy(text).into_owned()
        };
        let (bos, eos) = (text(tokenizer.bos()), text(tokenizer.eos()));
        Ok(Template { environment, source: source.into(), bos, eos })
    }

    /// The text of a chat; with `add_generation_prompt` up to where the model answers.
    ///
    /// # Errors
    /// [`Error::Template`] for what the template refuses (roles that do not alternate, a system message) or does wrong, or if it
    /// takes too long or writes too much.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let message = |m: &Message| context! { role => m.role.as_str(), content => m.content.as_str() };
        // Where there are no tools, templates are told so.
        let context = context! {
            messages => messages.iter().map(message).collect::<Vec<Value>>(),
            add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
            tools => (),
            documents => (),
        };
        let mut out = Limited(Vec::new());
        contain(|| {
            let template = self.environment.template_from_str(&self.source)?;
            template.render_captured_to(context, &mut out).map(drop)
        })?;
        String::from_utf8(out.0).map_err(|e| Error::Template(e.to_string()))
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

/// Runs what may fail or, for all that is known of the engine, panic.
fn contain(f: impl FnOnce() -> Result<(), minijinja::Error>) -> Result<()> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => {
            let line = error.line().map_or(String::new(), |line| format!("line {line}: "));
            Err(Error::Template(format!("{line}{error}")))
        }
        Err(_) => Err(Error::Template("the engine panicked".into())),
    }
}

fn to_json(value: &Value, indent: Option<Value>, kwargs: Kwargs) -> Result<Value, minijinja::Error> {
    let named = kwargs.peek::<Option<Value>>("indent").ok().flatten();
    for width in [&indent, &named].into_iter().flatten() {
        if width.as_usize().is_some_and(|width| width > MAX_INDENT) {
            let message = format!("tojson: expected an indent of at most {MAX_INDENT}, got {width}");
            return Err(minijinja::Error::new(ErrorKind::InvalidOperation, message));
        }
    }
    minijinja::filters::tojson(value, indent, kwargs)
}

/// Memory that takes so many bytes and no more.
struct Limited(Vec<u8>);

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > MAX_BYTES - self.0.len() {
            return Err(io::Error::other(format!("more than {MAX_BYTES} bytes of output")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
