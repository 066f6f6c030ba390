//! `/v1/completions`, and what chats have in common with it.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::Json;
use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use halite::Tokenizer;
use halite::batch::Request;
use halite::constrain::{Guide, Rule};
use halite::generate::{GenerateOptions, Generation};
use halite::sampler::SamplerOptions;
use halite::tokenizer::EncodeOptions;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::error::{Failure, Fallible};
use super::messages::Reading;
use super::voice::Voice;
use super::{App, Body, apart, now};
use crate::engine::{Engine, Ticket, Update};

/// Maximum texts that one request may ask for.
const MAX_CHOICES: u32 = 16;
/// Maximum stop texts, and bytes of each.
const MAX_STOP: usize = 16;
const MAX_STOP_BYTES: usize = 1024;

/// What completions and chats have in common.
#[derive(Deserialize)]
pub(super) struct Options {
    pub model: Option<String>,
    pub max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<usize>,
    min_p: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    repeat_penalty: Option<f32>,
    seed: Option<i64>,
    n: Option<u32>,
    stop: Option<OneOrMore>,
    pub stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    response_format: Option<ResponseFormat>,
    ignore_eos: Option<bool>,
    /// The other fields, of which some ask for what this server cannot do.
    #[serde(flatten)]
    others: Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

#[derive(Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ResponseFormat {
    Text,
    JsonObject,
    JsonSchema { json_schema: JsonSchema },
}

#[derive(Deserialize)]
struct JsonSchema {
    schema: Value,
}

/// A text, or its tokens.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

impl Prompt {
    /// The tokens of each text.
    pub fn tokens(self, tokenizer: &Tokenizer, options: EncodeOptions) -> Fallible<Vec<Vec<u32>>> {
        let encode = |text: String| tokenizer.encode(&text, options);
        let lists = match self {
            Prompt::Text(text) => vec![encode(text)],
            Prompt::Texts(texts) => texts.into_iter().map(encode).collect(),
            Prompt::Tokens(tokens) => vec![tokens],
            Prompt::TokenLists(lists) => lists,
        };
        lists.iter().try_for_each(|tokens| tokenizer.check(tokens))?;
        Ok(lists)
    }
}

#[derive(Deserialize)]
pub(super) struct Completion {
    prompt: Prompt,
    echo: Option<bool>,
    #[serde(flatten)]
    options: Options,
}

/// What an answer is held to, and how it is read.
#[derive(Debug, Clone, Default)]
pub(super) struct Held {
    /// Of chats.
    pub reading: Option<Reading>,
    pub rule: Option<Rule>,
}

impl Options {
    /// Rejects what would be ignored although it changes the answer.
    pub fn check(&self) -> Fallible<()> {
        let asks = |value: &Value| match value {
            Value::Null | Value::Bool(false) => false,
            Value::Array(items) => !items.is_empty(),
            Value::Object(items) => !items.is_empty(),
            Value::Number(_) => true,
            Value::String(text) => !text.is_empty(),
            Value::Bool(true) => true,
        };
        const UNSUPPORTED: [&str; 9] = [
            "logprobs",
            "top_logprobs",
            "logit_bias",
            "tools",
            "functions",
            "audio",
            "best_of",
            "suffix",
            "prediction",
        ];
        for name in UNSUPPORTED {
            let value = self.others.get(name);
            if value.is_some_and(|value| asks(value) && (name, value) != ("best_of", &json!(1))) {
                return Err(Failure::field(name, "this server does not support it"));
            }
        }
        Ok(())
    }

    /// The options of a text, of which there may be several.
    fn generate(
        &self,
        form: Form,
        engine: &Engine,
        prompt_tokens: usize,
        choice: u32,
    ) -> Fallible<GenerateOptions> {
        let in_range = |name: &str, value: Option<f32>, low: f32, high: f32| match value {
            Some(value) if !(low..=high).contains(&value) => {
                Err(Failure::field(name, format!("expected a number from {low} to {high}, got {value}")))
            }
            value => Ok(value),
        };
        let mut sampler = SamplerOptions::default()
            .temperature(in_range("temperature", self.temperature, 0.0, 2.0)?.unwrap_or(1.0))
            .top_p(in_range("top_p", self.top_p, 0.0, 1.0)?.unwrap_or(1.0))
            .min_p(in_range("min_p", self.min_p, 0.0, 1.0)?.unwrap_or(0.0))
            .top_k(self.top_k.unwrap_or(0))
            .presence_penalty(in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)?.unwrap_or(0.0))
            .frequency_penalty(
                in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?.unwrap_or(0.0),
            )
            .repeat_penalty(in_range("repeat_penalty", self.repeat_penalty, 0.1, 10.0)?.unwrap_or(1.0));
        let seed = self.seed.map_or_else(any_seed, |seed| seed as u64);
        sampler = sampler.seed(seed.wrapping_add(choice.into()));
        let stop = match &self.stop {
            None => Vec::new(),
            Some(OneOrMore::One(text)) => vec![text.clone()],
            Some(OneOrMore::More(texts)) => texts.clone(),
        };
        if stop.len() > MAX_STOP || stop.iter().any(|text| text.len() > MAX_STOP_BYTES) {
            return Err(Failure::field(
                "stop",
                format!("expected at most {MAX_STOP} texts of {MAX_STOP_BYTES} bytes"),
            ));
        }
        let room = engine.positions().saturating_sub(prompt_tokens as u32);
        let max_tokens =
            self.max_completion_tokens.or(self.max_tokens).unwrap_or(form.max_tokens()).min(room.max(1));
        Ok(GenerateOptions::default()
            .max_tokens(max_tokens)
            .sampler(sampler)
            .stop(stop)
            .ignore_end(self.ignore_eos == Some(true)))
    }

    /// The schema that the text must follow.
    pub fn schema(&self) -> Option<Value> {
        match &self.response_format {
            None | Some(ResponseFormat::Text) => None,
            Some(ResponseFormat::JsonObject) => Some(json!({ "type": "object" })),
            Some(ResponseFormat::JsonSchema { json_schema }) => Some(json_schema.schema.clone()),
        }
    }
}

/// Which of the two interfaces an answer is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Completion,
    Chat,
}

impl Form {
    /// Tokens of a text for which no number is given.
    fn max_tokens(self) -> u32 {
        match self {
            Form::Completion => 16,
            Form::Chat => u32::MAX,
        }
    }

    /// The name of an answer's kind; `chunk` for a part of one.
    fn object(self, is_chunk: bool) -> &'static str {
        match (self, is_chunk) {
            (Form::Completion, _) => "text_completion",
            (Form::Chat, false) => "chat.completion",
            (Form::Chat, true) => "chat.completion.chunk",
        }
    }
}

/// A seed for a request that names none.
fn any_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(())
}

/// Tokens of the texts of a request.
#[derive(Default)]
pub(super) struct Usage {
    prompt: usize,
    cached: usize,
    completion: usize,
}

impl Usage {
    fn add(&mut self, generation: &Generation, is_first_of_prompt: bool) {
        if is_first_of_prompt {
            self.prompt += generation.prompt_tokens.len();
            self.cached += generation.reused_tokens as usize;
        }
        self.completion += generation.tokens.len();
    }

    fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": { "cached_tokens": self.cached },
        })
    }
}

/// What is the same in every part of an answer.
struct Answer {
    form: Form,
    id: String,
    created: u64,
    model: String,
    /// Texts for each prompt.
    n: usize,
}

impl Answer {
    fn json(&self, is_chunk: bool, choices: Vec<Value>) -> Value {
        let object = self.form.object(is_chunk);
        json!({ "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices })
    }
}

/// `POST /v1/completions`.
pub(super) async fn completions(State(app): State<App>, Body(body): Body<Completion>) -> Fallible<Response> {
    let Completion { prompt, echo, options } = body;
    let (name, engine) = app.engine(options.model.as_deref())?;
    let tokenizer = engine.tokenizer().clone();
    let (prompts, echoed) = apart(move || {
        let prompts = prompt.tokens(&tokenizer, EncodeOptions::default())?;
        let echoed = |tokens: &Vec<u32>| {
            if echo == Some(true) { tokenizer.decode(tokens, false) } else { String::new() }
        };
        let echoed = prompts.iter().map(echoed).collect();
        Ok((prompts, echoed))
    })
    .await?;
    let held =
        Held { reading: None, rule: options.schema().map(|schema| Rule::JsonSchema(schema.to_string())) };
    answer(&app, (name, engine), Form::Completion, options, prompts, echoed, held).await
}

/// Runs the prompts, and answers as a whole or as a stream.
pub(super) async fn answer(
    app: &App,
    (name, engine): (&str, &Arc<Engine>),
    form: Form,
    options: Options,
    prompts: Vec<Vec<u32>>,
    echoed: Vec<String>,
    held: Held,
) -> Fallible<Response> {
    options.check()?;
    let n = options.n.unwrap_or(1);
    if n == 0 || n as usize * prompts.len() > MAX_CHOICES as usize || prompts.is_empty() {
        let got = format!("{n} for each of {} prompts", prompts.len());
        return Err(Failure::field("n", format!("expected 1 to {MAX_CHOICES} texts in all, got {got}")));
    }
    if n as usize * prompts.len() > engine.most() {
        return Err(Failure::field(
            "n",
            format!("expected at most {} texts in all for this model", engine.most()),
        ));
    }
    prompts.iter().try_for_each(|prompt| fits(engine, prompt))?;
    let mut tickets = Vec::new();
    for prompt in &prompts {
        for choice in 0..n {
            tickets.push(submit(engine, form, &options, prompt, choice, &held).await?);
        }
    }
    let prefix = if form == Form::Chat { "chatcmpl" } else { "cmpl" };
    let voices = (0..tickets.len()).map(|index| Voice::new(index, held.reading)).collect::<Vec<_>>();
    let answer = Answer { form, id: app.id(prefix), created: now(), model: name.to_owned(), n: n as usize };
    if options.stream == Some(true) {
        let include_usage = options.stream_options.is_some_and(|options| options.include_usage == Some(true));
        let stream = Pieces::new(answer, tickets, voices, echoed, include_usage).await?;
        return Ok(Sse::new(stream).keep_alive(KeepAlive::default()).into_response());
    }
    let mut usage = Usage::default();
    let mut choices = Vec::new();
    for (index, (mut ticket, voice)) in tickets.into_iter().zip(voices).enumerate() {
        let mut text = echoed[index / answer.n].clone();
        let generation = loop {
            match ticket.next().await {
                Some(Update::Text(piece)) => text.push_str(&piece),
                Some(Update::Done(generation)) => break generation,
                Some(Update::Failed(error)) => return Err(error.into()),
                None => return Err(crate::engine::Refused::Stopped.into()),
            }
        };
        usage.add(&generation, index.is_multiple_of(answer.n));
        choices.push(voice.whole(&text, generation.finish));
    }
    let mut body = answer.json(false, choices);
    body["usage"] = usage.json();
    Ok(Json(body).into_response())
}

/// Checks that a prompt and a token of its answer fit.
pub(super) fn fits(engine: &Engine, prompt: &[u32]) -> Fallible<()> {
    let (need, have) = (prompt.len() as u64 + 1, engine.positions().into());
    if need > have { Err(halite::Error::ContextFull { need, have }.into()) } else { Ok(()) }
}

/// Hands a text's request to the engine.
pub(super) async fn submit(
    engine: &Arc<Engine>,
    form: Form,
    options: &Options,
    prompt: &[u32],
    choice: u32,
    held: &Held,
) -> Fallible<Ticket> {
    let control = held.reading.as_ref().map_or(&[][..], Reading::control);
    let generate = options.generate(form, engine, prompt.len(), choice)?.special(!control.is_empty());
    let mut request = Request::new(prompt.to_vec()).options(generate);
    if let Some(rule) = &held.rule {
        request = request.constraint(Some(Box::new(guide(engine, rule.clone(), control).await?) as _));
    }
    Ok(engine.submit(request)?)
}

/// Compiles a rule, which takes up to seconds.
async fn guide(engine: &Arc<Engine>, rule: Rule, control: &'static [&'static str]) -> Fallible<Guide> {
    let tokenizer = engine.tokenizer().clone();
    apart(move || Ok(Guide::with_control(&tokenizer, &rule, control)?)).await
}

/// An answer as server-sent events.
struct Pieces {
    answer: Answer,
    /// None where a text is complete.
    tickets: Vec<Option<Ticket>>,
    voices: Vec<Voice>,
    /// Events that are ready.
    ready: std::collections::VecDeque<Event>,
    usage: Usage,
    include_usage: bool,
    is_done: bool,
    next: usize,
}

impl Pieces {
    /// Waits for the first update, so that a request that cannot run gets an error and no stream.
    async fn new(
        answer: Answer,
        tickets: Vec<Ticket>,
        voices: Vec<Voice>,
        echoed: Vec<String>,
        include_usage: bool,
    ) -> Fallible<Pieces> {
        let count = tickets.len();
        let tickets = tickets.into_iter().map(Some).collect();
        let (ready, usage) = Default::default();
        let mut pieces =
            Pieces { answer, tickets, voices, ready, usage, include_usage, is_done: false, next: 0 };
        for index in 0..count {
            let text = &echoed[index / pieces.answer.n];
            if !text.is_empty() {
                pieces.update(index, Update::Text(text.clone()));
            }
        }
        let first = match pieces.tickets.first_mut() {
            Some(Some(ticket)) => ticket.next().await,
            _ => None,
        };
        match first {
            Some(Update::Failed(error)) => return Err(error.into()),
            Some(update) => pieces.update(0, update),
            None => return Err(crate::engine::Refused::Stopped.into()),
        }
        Ok(pieces)
    }

    fn push(&mut self, body: &Value) {
        self.ready.push_back(Event::default().data(body.to_string()));
    }

    fn choice(&mut self, choice: Value) {
        let mut body = self.answer.json(true, vec![choice]);
        if self.include_usage {
            body["usage"] = Value::Null;
        }
        self.push(&body);
    }

    fn update(&mut self, index: usize, update: Update) {
        match update {
            Update::Text(text) => {
                let choices = self.voices[index].piece(&text);
                choices.into_iter().for_each(|choice| self.choice(choice));
            }
            Update::Done(generation) => {
                self.usage.add(&generation, index.is_multiple_of(self.answer.n));
                let choices = self.voices[index].end(generation.finish);
                choices.into_iter().for_each(|choice| self.choice(choice));
                self.tickets[index] = None;
            }
            Update::Failed(error) => self.fail(error.into()),
        }
        if !self.is_done && self.tickets.iter().all(Option::is_none) {
            self.end();
        }
    }

    /// Ends the stream with an error.
    fn fail(&mut self, failure: Failure) {
        self.push(&failure.body());
        self.tickets.clear();
        self.end();
    }

    fn end(&mut self) {
        self.is_done = true;
        if self.include_usage && !self.tickets.is_empty() {
            let mut body = self.answer.json(true, Vec::new());
            body["usage"] = self.usage.json();
            self.push(&body);
        }
        self.ready.push_back(Event::default().data("[DONE]"));
    }
}

impl futures_core::Stream for Pieces {
    type Item = Result<Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            if self.is_done {
                return Poll::Ready(None);
            }
            // The texts in turn, so that none starves.
            let count = self.tickets.len();
            let first = self.next;
            self.next = (self.next + 1) % count;
            // An update may be text that shows nothing yet, and then there may be more.
            let mut is_waiting = true;
            for index in (first..count).chain(0..first) {
                let Some(ticket) = &mut self.tickets[index] else { continue };
                match ticket.poll_next(context) {
                    Poll::Pending => continue,
                    Poll::Ready(Some(update)) => self.update(index, update),
                    Poll::Ready(None) => self.fail(crate::engine::Refused::Stopped.into()),
                }
                is_waiting = false;
                break;
            }
            if is_waiting {
                return Poll::Pending;
            }
        }
    }
}
