//! Generation: as a whole, or as an iterator of pieces of text.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use halite::GenerateOptions;
use halite::chat::Message;
use halite::constrain::{Guide, Rule};
use halite::generate::{Decoding, Finish, Stream};
use halite::speculate::PromptLookup;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};

use crate::error::{Failure, Fallible, Kind, named};
use crate::session::{Core, State};
use crate::work::lock;

/// A prompt: a text or its tokens.
#[derive(FromPyObject)]
pub enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

/// The options of a generation.
#[derive(Default)]
pub struct Given {
    pub options: GenerateOptions,
    rule: Option<Rule>,
    /// Tokens that prompt lookup drafts; 0: none.
    lookup: u32,
}

impl Given {
    /// Reads keywords; None stands for the default.
    pub fn read(py: Python<'_>, keywords: Option<&Bound<'_, PyDict>>) -> PyResult<Given> {
        let mut given = Given::default();
        for (key, value) in keywords.into_iter().flatten() {
            let key = key.extract::<String>()?;
            if !value.is_none() {
                given.set(py, &key, &value).map_err(|error| named(py, &key, error))?;
            }
        }
        Ok(given)
    }

    fn set(&mut self, py: Python<'_>, key: &str, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let options = &mut self.options;
        match key {
            "max_tokens" => options.max_tokens = value.extract()?,
            "temperature" => options.sampler.temperature = value.extract()?,
            "top_k" => options.sampler.top_k = value.extract()?,
            "top_p" => options.sampler.top_p = value.extract()?,
            "min_p" => options.sampler.min_p = value.extract()?,
            "repeat_penalty" => options.sampler.repeat_penalty = value.extract()?,
            "frequency_penalty" => options.sampler.frequency_penalty = value.extract()?,
            "presence_penalty" => options.sampler.presence_penalty = value.extract()?,
            "penalty_window" => options.sampler.penalty_window = value.extract()?,
            "seed" => options.sampler.seed = value.extract()?,
            "stop" => {
                options.stop = match value.cast::<PyString>() {
                    Ok(text) => vec![text.extract()?],
                    Err(_) => value.extract()?,
                }
            }
            "parse_special" => options.encode.parse_special = value.extract()?,
            "ignore_end" => options.ignore_end = value.extract()?,
            "show_special" => options.special = value.extract()?,
            "lookup" => self.lookup = value.extract()?,
            "json_schema" => {
                let text = match value.cast::<PyString>() {
                    Ok(text) => text.extract()?,
                    Err(_) => py.import("json")?.call_method1("dumps", (value,))?.extract()?,
                };
                self.hold_to(Rule::JsonSchema(text))?;
            }
            "regex" => self.hold_to(Rule::Regex(value.extract()?))?,
            "grammar" => self.hold_to(Rule::grammar(&value.extract::<String>()?))?,
            _ => return Err(PyTypeError::new_err("a generation has no such option")),
        }
        Ok(())
    }

    fn hold_to(&mut self, rule: Rule) -> Fallible<()> {
        if self.rule.is_some() {
            let message = "choose one of json_schema, regex and grammar";
            return Err(Failure::new(Kind::InvalidArgument, message));
        }
        self.rule = Some(rule);
        Ok(())
    }
}

/// What a generation did.
#[pyclass(module = "halite", frozen, get_all)]
#[derive(Clone)]
pub struct Generation {
    /// The text after the prompt.
    text: String,
    /// The generated tokens, without the end-of-text token.
    tokens: Vec<u32>,
    /// The prompt's tokens.
    prompt_tokens: Vec<u32>,
    /// Tokens of the prompt that the sequence had already.
    reused_tokens: u32,
    /// Why it ended: "end", "length", "stop", "context_full" or "cancelled"; None: it goes on.
    finish: Option<&'static str>,
    /// Seconds from the first prompt token to the first logits.
    prefill_seconds: f64,
    /// Seconds from the call to the first token.
    first_token_seconds: f64,
    /// Seconds of the steps after the prompt.
    decode_seconds: f64,
    /// Tokens that these steps chose.
    decode_tokens: u32,
    /// The number of these steps.
    decode_steps: u32,
    /// Seconds of the prompt and of the steps after it by the device's own clock.
    device_seconds: (f64, f64),
    /// Drafted tokens, and those that were right.
    drafted: (u32, u32),
}

impl Generation {
    fn of(generation: &halite::generate::Generation, text: &str, finish: Option<Finish>) -> Generation {
        Generation {
            text: text.into(),
            tokens: generation.tokens.clone(),
            prompt_tokens: generation.prompt_tokens.clone(),
            reused_tokens: generation.reused_tokens,
            finish: finish.map(Finish::name),
            prefill_seconds: generation.prefill.as_secs_f64(),
            first_token_seconds: generation.first_token.as_secs_f64(),
            decode_seconds: generation.decode.as_secs_f64(),
            decode_tokens: generation.decode_tokens,
            decode_steps: generation.decode_steps,
            device_seconds: (generation.device.0.as_secs_f64(), generation.device.1.as_secs_f64()),
            drafted: generation.drafted,
        }
    }

    /// With the text of an assistant's message, which has no reasoning in other channels.
    pub fn into_answer(self) -> Generation {
        Generation { text: Message::answer(&self.text).content, ..self }
    }
}

#[pymethods]
impl Generation {
    fn __str__(&self) -> &str {
        &self.text
    }

    fn __repr__(&self) -> String {
        let finish = self.finish.unwrap_or("None");
        format!("Generation(text={:?}, {} tokens, finish={finish})", self.text, self.tokens.len())
    }
}

/// A generation and all that it needs from step to step.
pub struct Running {
    core: Arc<Core>,
    stream: Stream,
    tokenizer: Arc<halite::Tokenizer>,
    lookup: Option<PromptLookup>,
    guide: Option<Guide>,
    sequence: u64,
    /// Whether the sequence ends with the generation.
    is_own: bool,
    /// The sequence's count of changes after the last step.
    changes: u64,
    text: String,
    finish: Option<Finish>,
    /// Whether a step failed or was left.
    is_over: bool,
}

impl Running {
    /// Starts a generation, in a sequence of its own if there is none.
    pub fn new(
        core: &Arc<Core>,
        state: &mut State,
        sequence: Option<u64>,
        prompt: Prompt,
        given: Given,
    ) -> Fallible<Running> {
        let none = || Failure::new(Kind::Unsupported, "this model file has no vocabulary: use steps");
        let tokenizer = core.tokenizer.clone().ok_or_else(none)?;
        let prompt = match prompt {
            Prompt::Text(text) => tokenizer.encode(&text, given.options.encode),
            Prompt::Tokens(tokens) => tokens,
        };
        if given.lookup >= state.session.outputs() {
            let expected = format!("less than the session's outputs, {}", state.session.outputs());
            return Err(Failure::argument("lookup", expected, given.lookup));
        }
        let guide = given.rule.map(|rule| Guide::new(&tokenizer, &rule)).transpose()?;
        let number = match sequence {
            Some(number) => number,
            None => {
                let id = state.session.add_sequence();
                state.number(id)
            }
        };
        let (id, changes) = state.change(number)?;
        let stream = match Stream::new(&mut state.session, id, &prompt, &given.options) {
            Ok(stream) => stream,
            Err(error) => {
                if sequence.is_none() {
                    state.remove(number)?;
                }
                return Err(error.into());
            }
        };
        Ok(Running {
            core: core.clone(),
            stream,
            tokenizer,
            lookup: (given.lookup > 0).then(|| PromptLookup::new(given.lookup as usize)),
            guide,
            sequence: number,
            is_own: sequence.is_none(),
            changes,
            text: String::new(),
            finish: None,
            is_over: false,
        })
    }

    /// Runs one step, and returns whether the generation goes on.
    fn advance(&mut self, state: &mut State) -> Fallible<bool> {
        if self.is_over {
            return Ok(false);
        }
        // Unless this step comes to its end.
        self.is_over = true;
        if state.changes(self.sequence)? != self.changes {
            return Err(Failure::argument("sequence", "as the stream left it", "a change by another call"));
        }
        (_, self.changes) = state.change(self.sequence)?;
        let mut decoding = Decoding::default();
        if let Some(lookup) = &mut self.lookup {
            decoding = decoding.drafter(lookup);
        }
        if let Some(guide) = &mut self.guide {
            decoding = decoding.constraint(guide);
        }
        let text = &mut self.text;
        let goes_on =
            self.stream.advance(&mut state.session, &self.tokenizer, &mut decoding, &mut |piece| {
                text.push_str(piece);
                ControlFlow::Continue(())
            })?;
        if goes_on {
            self.is_over = false;
        } else {
            self.finish = Some(self.stream.generation().finish);
        }
        Ok(goes_on)
    }

    fn generation(&self) -> Generation {
        Generation::of(self.stream.generation(), &self.text, self.finish)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.is_own {
            self.core.drop_later(self.sequence);
        }
    }
}

/// Generates as a whole.
pub fn whole(
    core: &Arc<Core>,
    state: &mut State,
    sequence: Option<u64>,
    prompt: Prompt,
    given: Given,
) -> Fallible<Generation> {
    let mut running = Running::new(core, state, sequence, prompt, given)?;
    while running.advance(state)? {}
    Ok(running.generation())
}

/// An iterator of pieces of generated text. `generation` tells what was done so far.
#[pyclass(name = "Stream", module = "halite", frozen)]
pub struct TextStream {
    state: Mutex<Streaming>,
}

enum Streaming {
    Running(Box<Running>),
    Done(Generation),
}

impl Streaming {
    /// Frees what only a running generation needs.
    fn end(&mut self) {
        if let Streaming::Running(running) = self {
            *self = Streaming::Done(running.generation());
        }
    }
}

const STREAM: &str = "stream";

impl TextStream {
    pub fn new(running: Running) -> TextStream {
        TextStream { state: Mutex::new(Streaming::Running(Box::new(running))) }
    }
}

#[pymethods]
impl TextStream {
    fn __iter__(this: Py<TextStream>) -> Py<TextStream> {
        this
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<String>> {
        let mut streaming = lock(STREAM, &self.state)?;
        let Streaming::Running(running) = &mut *streaming else { return Ok(None) };
        let core = running.core.clone();
        let mut locked = core.lock()?;
        let before = running.text.len();
        let running = &mut **running;
        let result = core.work(py, &mut locked, |state| {
            let mut goes_on = true;
            while goes_on && running.text.len() == before {
                goes_on = running.advance(state)?;
            }
            Ok((running.text[before..].to_owned(), goes_on))
        });
        drop(locked);
        match result {
            Ok((text, true)) => Ok(Some(text)),
            Ok((text, false)) => {
                streaming.end();
                Ok(Some(text).filter(|text| !text.is_empty()))
            }
            Err(error) => {
                streaming.end();
                Err(error)
            }
        }
    }

    /// What the generation did so far.
    #[getter]
    fn generation(&self) -> PyResult<Generation> {
        Ok(match &*lock(STREAM, &self.state)? {
            Streaming::Running(running) => running.generation(),
            Streaming::Done(generation) => generation.clone(),
        })
    }

    /// Ends the generation.
    fn close(&self) -> PyResult<()> {
        lock(STREAM, &self.state)?.end();
        Ok(())
    }
}
