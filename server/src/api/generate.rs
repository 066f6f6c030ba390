//! `/v1/completions` and `/v1/chat/completions`.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use halite::chat;
use halite::constrain::Rule;
use halite::Tokenizer;
use halite::generate::{Finish, GenerateOptions, MAX_TOP_LOGPROBS};
use halite::sampler::{Logprobs, SamplerOptions};
use halite::tokenizer::EncodeOptions;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::error::{Failure, Fallible};
use super::{App, Body, apart, now};
use crate::model::{Hosted, Job, Outcome, Part, Progress, Running};

/// Maximum texts that one request may ask for.
const MAX_CHOICES: u32 = 16;
/// Maximum stop texts, and bytes of each.
const MAX_STOP: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
/// Maximum tokens with a bias.
const MAX_BIASES: usize = 1024;

/// What completions and chats have in common.
#[derive(Deserialize)]
pub(super) struct Options {
    model: Option<String>,
    max_tokens: Option<u32>,
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
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    response_format: Option<ResponseFormat>,
    ignore_eos: Option<bool>,
    /// Completions have a number of alternatives here, chats whether there are any.
    logprobs: Option<Value>,
    top_logprobs: Option<u32>,
    logit_bias: Option<BTreeMap<String, f32>>,
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
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

#[derive(Deserialize)]
pub(super) struct Completion {
    prompt: Prompt,
    echo: Option<bool>,
    #[serde(flatten)]
    options: Options,
}

#[derive(Deserialize)]
pub(super) struct Chat {
    messages: Vec<Message>,
    #[serde(flatten)]
    options: Options,
}

/// A message of a chat.
#[derive(Deserialize)]
pub(super) struct Message {
    role: String,
    content: Option<Content>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<ContentPart>),
}

#[derive(Deserialize)]
struct ContentPart {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

impl Message {
    /// The text of the message.
    fn text(&self) -> Fallible<String> {
        match &self.content {
            None => Ok(String::new()),
            Some(Content::Text(text)) => Ok(text.clone()),
            Some(Content::Parts(parts)) => {
                let text = |part: &ContentPart| match (&*part.kind, &part.text) {
                    ("text" | "input_text" | "output_text", Some(text)) => Ok(text.clone()),
                    (kind, _) => {
                        Err(Failure::field("messages", format!("expected parts of type text, got `{kind}`")))
                    }
                };
                parts.iter().map(text).collect()
            }
        }
    }
}

/// The text of a chat's prompt, by the model's template.
pub(super) fn prompt_of(hosted: &Hosted, messages: &[Message]) -> Fallible<String> {
    let template = hosted.template().ok_or_else(|| {
        let name = hosted.name();
        Failure::request(format!(
            "model `{name}` has no chat template: it answers /v1/completions, not chats"
        ))
    })?;
    // Control tokens in a message are text.
    let quoted = |message: &Message| {
        Ok(chat::Message::new(&message.role, &hosted.tokenizer().quote(&message.text()?)))
    };
    let messages = messages.iter().map(quoted).collect::<Fallible<Vec<_>>>()?;
    Ok(template.render(&messages, true)?)
}

impl Options {
    /// Rejects what would be ignored although it changes the answer.
    fn check(&self) -> Fallible<()> {
        let asks = |value: &Value| match value {
            Value::Null | Value::Bool(false) => false,
            Value::Array(items) => !items.is_empty(),
            Value::Object(items) => !items.is_empty(),
            Value::Number(_) => true,
            Value::String(text) => !text.is_empty(),
            Value::Bool(true) => true,
        };
        const UNSUPPORTED: [&str; 6] = [
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
        hosted: &Hosted,
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
        let vocab = hosted.tokenizer().len() as u32;
        let bias = |(token, &bias): (&String, &f32)| match token.parse() {
            Ok(token) if token < vocab && (-100.0..=100.0).contains(&bias) => Ok((token, bias)),
            _ => {
                let expected = format!("tokens below {vocab} with numbers from -100 to 100");
                Err(Failure::field("logit_bias", format!("expected {expected}, got {token}: {bias}")))
            }
        };
        let biases = self.logit_bias.iter().flatten();
        if biases.clone().count() > MAX_BIASES {
            return Err(Failure::field("logit_bias", format!("expected at most {MAX_BIASES} tokens")));
        }
        sampler = sampler.logit_bias(biases.map(bias).collect::<Fallible<Vec<_>>>()?);
        let room = hosted.positions().saturating_sub(prompt_tokens as u32);
        let max_tokens =
            self.max_completion_tokens.or(self.max_tokens).unwrap_or(form.max_tokens()).min(room.max(1));
        Ok(GenerateOptions::default()
            .max_tokens(max_tokens)
            .sampler(sampler)
            .stop(stop)
            .logprobs(self.logprobs(form)?)
            .ignore_end(self.ignore_eos == Some(true)))
    }

    /// How many alternatives of each token are asked for.
    fn logprobs(&self, form: Form) -> Fallible<Option<u32>> {
        let count = match (&self.logprobs, form) {
            (None | Some(Value::Null | Value::Bool(false)), _) => None,
            (Some(Value::Bool(true)), Form::Chat) => Some(self.top_logprobs.unwrap_or(0)),
            (Some(value), Form::Completion) if value.is_u64() => value.as_u64().map(|n| n.min(u32::MAX.into()) as u32),
            (Some(value), form) => {
                let expected = if form == Form::Chat { "true or false" } else { "a number" };
                return Err(Failure::field("logprobs", format!("expected {expected}, got {value}")));
            }
        };
        if let Some(count) = count.filter(|count| *count > MAX_TOP_LOGPROBS) {
            let name = if form == Form::Chat { "top_logprobs" } else { "logprobs" };
            return Err(Failure::field(name, format!("expected at most {MAX_TOP_LOGPROBS}, got {count}")));
        }
        Ok(count)
    }

    /// The rule that the answer must follow.
    fn rule(&self) -> Option<Rule> {
        match &self.response_format {
            None | Some(ResponseFormat::Text) => None,
            Some(ResponseFormat::JsonObject) => Some(Rule::JsonSchema(r#"{"type":"object"}"#.into())),
            Some(ResponseFormat::JsonSchema { json_schema }) => {
                Some(Rule::JsonSchema(json_schema.schema.to_string()))
            }
        }
    }
}

/// Which of the two interfaces an answer is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
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

    /// A text of an answer.
    fn choice(self, index: usize, text: &str, logprobs: Value, finish: Option<Finish>) -> Value {
        let finish = finish.map(finish_reason);
        match self {
            Form::Completion => {
                json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": finish })
            }
            Form::Chat => json!({
                "index": index, "logprobs": logprobs, "finish_reason": finish,
                "message": { "role": "assistant", "content": text, "refusal": null },
            }),
        }
    }

    /// A piece of a text.
    fn piece(
        self,
        index: usize,
        text: Option<&str>,
        logprobs: Value,
        is_first: bool,
        finish: Option<Finish>,
    ) -> Value {
        let finish = finish.map(finish_reason);
        if self == Form::Completion {
            return json!({
                "index": index, "text": text.unwrap_or_default(), "logprobs": logprobs, "finish_reason": finish,
            });
        }
        let mut delta = Map::new();
        if is_first {
            delta.insert("role".into(), "assistant".into());
        }
        if let Some(text) = text {
            delta.insert("content".into(), text.into());
        }
        json!({ "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish })
    }

    /// How likely tokens were.
    fn logprobs(self, tokenizer: &Tokenizer, logprobs: &[Logprobs]) -> Value {
        if logprobs.is_empty() {
            return Value::Null;
        }
        let bytes = |token: u32| {
            let mut bytes = Vec::new();
            tokenizer.decode_token(token, true, &mut bytes);
            bytes
        };
        let text = |token: u32| String::from_utf8_lossy(&bytes(token)).into_owned();
        // JSON has no infinity.
        let finite = |logprob: f32| logprob.max(-9999.0);
        if self == Form::Completion {
            let tops = logprobs.iter().map(|of| {
                of.top.iter().map(|&(token, logprob)| (text(token), finite(logprob).into())).collect::<Map<_, _>>()
            });
            return json!({
                "tokens": logprobs.iter().map(|of| text(of.token)).collect::<Vec<_>>(),
                "token_logprobs": logprobs.iter().map(|of| finite(of.logprob)).collect::<Vec<_>>(),
                "top_logprobs": tops.collect::<Vec<_>>(),
            });
        }
        let one = |token: u32, logprob: f32| {
            json!({ "token": text(token), "logprob": finite(logprob), "bytes": bytes(token) })
        };
        let content = logprobs.iter().map(|of| {
            let mut value = one(of.token, of.logprob);
            value["top_logprobs"] = of.top.iter().map(|&(token, logprob)| one(token, logprob)).collect();
            value
        });
        json!({ "content": content.collect::<Vec<_>>(), "refusal": null })
    }
}

/// A seed for a request that names none.
fn any_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(())
}

fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Length | Finish::ContextFull => "length",
        _ => "stop",
    }
}

/// What the texts of a request took.
#[derive(Default)]
struct Usage {
    prompt: usize,
    cached: usize,
    completion: usize,
    parts: Vec<Part>,
    is_inexact: bool,
}

impl Usage {
    fn add(&mut self, outcome: Outcome, is_first_of_prompt: bool) {
        let generation = &outcome.generation;
        if is_first_of_prompt {
            self.prompt += generation.prompt_tokens.len();
            self.cached += generation.reused_tokens as usize;
        }
        self.completion += generation.tokens.len();
        self.is_inexact |= !outcome.is_exact;
        self.parts.extend(outcome.parts);
    }

    fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": { "cached_tokens": self.cached },
        })
    }

    /// Where the texts ran.
    fn devices(&self) -> Value {
        let part = |part: &Part| json!({ "device": part.device, "tokens": part.tokens, "device_us": part.time.as_micros() as u64 });
        json!({ "parts": self.parts.iter().map(part).collect::<Vec<_>>(), "exact": !self.is_inexact })
    }
}

/// What is the same in every part of an answer.
struct Answer {
    form: Form,
    id: String,
    created: u64,
    hosted: Arc<Hosted>,
    /// Texts for each prompt.
    n: usize,
}

impl Answer {
    fn json(&self, is_chunk: bool, choices: Vec<Value>) -> Value {
        let object = self.form.object(is_chunk);
        let model = self.hosted.name();
        json!({ "id": self.id, "object": object, "created": self.created, "model": model, "choices": choices })
    }

    fn logprobs(&self, logprobs: &[Logprobs]) -> Value {
        self.form.logprobs(self.hosted.tokenizer(), logprobs)
    }
}

/// `POST /v1/completions`.
pub(super) async fn completions(
    State(app): State<App>,
    headers: HeaderMap,
    Body(body): Body<Completion>,
) -> Fallible<Response> {
    let Completion { prompt, echo, options } = body;
    let hosted = app.model(options.model.as_deref())?;
    let tokenizer = hosted.tokenizer().clone();
    let (prompts, echoed) = apart(move || {
        let encode = |text: String| tokenizer.encode(&text, EncodeOptions::default());
        let prompts = match prompt {
            Prompt::Text(text) => vec![encode(text)],
            Prompt::Texts(texts) => texts.into_iter().map(encode).collect(),
            Prompt::Tokens(tokens) => vec![tokens],
            Prompt::TokenLists(lists) => lists,
        };
        prompts.iter().try_for_each(|tokens| tokenizer.check(tokens))?;
        let echoed = |tokens: &Vec<u32>| {
            if echo == Some(true) { tokenizer.decode(tokens, false) } else { String::new() }
        };
        let echoed = prompts.iter().map(echoed).collect();
        Ok((prompts, echoed))
    })
    .await?;
    answer(&app, hosted, tenant(&headers), Form::Completion, options, prompts, echoed).await
}

/// `POST /v1/chat/completions`.
pub(super) async fn chat(
    State(app): State<App>,
    headers: HeaderMap,
    Body(body): Body<Chat>,
) -> Fallible<Response> {
    let Chat { messages, options } = body;
    let hosted = app.model(options.model.as_deref())?;
    let own = hosted.clone();
    let encode = move || Ok(chat::encode(own.tokenizer(), &prompt_of(&own, &messages)?));
    let tokens = apart(encode).await?;
    answer(&app, hosted, tenant(&headers), Form::Chat, options, vec![tokens], vec![String::new()]).await
}

/// Who shares KV pages: requests with the same authorization.
fn tenant(headers: &HeaderMap) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    headers.get(header::AUTHORIZATION).map(|value| value.as_bytes()).hash(&mut hasher);
    hasher.finish()
}

/// Runs the prompts, and answers as a whole or as a stream.
async fn answer(
    app: &App,
    hosted: Arc<Hosted>,
    tenant: u64,
    form: Form,
    options: Options,
    prompts: Vec<Vec<u32>>,
    echoed: Vec<String>,
) -> Fallible<Response> {
    options.check()?;
    let n = options.n.unwrap_or(1);
    let most = hosted.most().min(MAX_CHOICES as usize);
    if n == 0 || (n as usize).saturating_mul(prompts.len()) > most || prompts.is_empty() {
        let got = format!("{n} for each of {} prompts", prompts.len());
        return Err(Failure::field("n", format!("expected 1 to {most} texts in all, got {got}")));
    }
    for prompt in &prompts {
        let (need, have) = (prompt.len() as u64 + 1, hosted.positions().into());
        if need > have {
            return Err(halite::Error::ContextFull { need, have }.into());
        }
    }
    let rule = options.rule().map(Arc::new);
    let mut texts = Vec::new();
    for prompt in prompts {
        let prompt: Arc<[u32]> = prompt.into();
        for choice in 0..n {
            let (prompt, rule) = (prompt.clone(), rule.clone());
            let options = options.generate(form, &hosted, prompt.len(), choice)?;
            texts.push(hosted.submit(Job { prompt, options, rule, tenant, priority: 0 }).await?);
        }
    }
    let prefix = if form == Form::Chat { "chatcmpl" } else { "cmpl" };
    let answer = Answer { form, id: app.id(prefix), created: now(), hosted, n: n as usize };
    if options.stream == Some(true) {
        let include_usage = options.stream_options.is_some_and(|options| options.include_usage == Some(true));
        let stream = Pieces::new(answer, texts, echoed, include_usage).await?;
        return Ok(Sse::new(stream).keep_alive(KeepAlive::default()).into_response());
    }
    let mut usage = Usage::default();
    let mut choices = Vec::new();
    for (index, mut running) in texts.into_iter().enumerate() {
        let mut text = echoed[index / answer.n].clone();
        let mut logprobs = Vec::new();
        let outcome = loop {
            match running.next().await {
                Some(Progress::Text { text: piece, logprobs: more }) => {
                    text.push_str(&piece);
                    logprobs.extend(more);
                }
                Some(Progress::Done(outcome)) => break outcome,
                Some(Progress::Failed(failed)) => return Err(failed.into()),
                None => return Err(Failure::internal("the request ended early")),
            }
        };
        let finish = outcome.generation.finish;
        choices.push(form.choice(index, &text, answer.logprobs(&logprobs), Some(finish)));
        usage.add(*outcome, index.is_multiple_of(answer.n));
    }
    let mut body = answer.json(false, choices);
    body["usage"] = usage.json();
    body["halite"] = usage.devices();
    Ok(Json(body).into_response())
}

/// An answer as server-sent events.
struct Pieces {
    answer: Answer,
    /// None where a text is complete.
    texts: Vec<Option<Running>>,
    /// Whether a text has begun.
    begun: Vec<bool>,
    /// Events that are ready.
    ready: std::collections::VecDeque<Event>,
    usage: Usage,
    include_usage: bool,
    is_done: bool,
    next: usize,
}

impl Pieces {
    /// Waits for the first news, so that a request that cannot run gets an error and no stream.
    async fn new(
        answer: Answer,
        texts: Vec<Running>,
        echoed: Vec<String>,
        include_usage: bool,
    ) -> Fallible<Pieces> {
        let count = texts.len();
        let texts = texts.into_iter().map(Some).collect();
        let (ready, usage) = Default::default();
        let begun = vec![false; count];
        let mut pieces = Pieces { answer, texts, begun, ready, usage, include_usage, is_done: false, next: 0 };
        for index in 0..count {
            let text = echoed[index / pieces.answer.n].clone();
            if !text.is_empty() {
                pieces.take(index, Progress::Text { text, logprobs: Vec::new() });
            }
        }
        let first = match pieces.texts.first_mut() {
            Some(Some(running)) => running.next().await,
            _ => None,
        };
        match first {
            Some(Progress::Failed(failed)) => return Err(failed.into()),
            Some(progress) => pieces.take(0, progress),
            None => return Err(Failure::internal("the request ended early")),
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

    fn take(&mut self, index: usize, progress: Progress) {
        let form = self.answer.form;
        match progress {
            // Nothing to tell yet.
            Progress::Text { text, logprobs } if text.is_empty() && logprobs.is_empty() => {}
            Progress::Text { text, logprobs } => {
                let is_first = !std::mem::replace(&mut self.begun[index], true);
                let logprobs = self.answer.logprobs(&logprobs);
                self.choice(form.piece(index, Some(&text), logprobs, is_first, None));
            }
            Progress::Done(outcome) => {
                let is_first = !self.begun[index];
                let finish = Some(outcome.generation.finish);
                self.usage.add(*outcome, index.is_multiple_of(self.answer.n));
                self.choice(form.piece(index, None, Value::Null, is_first, finish));
                self.texts[index] = None;
            }
            Progress::Failed(failed) => self.fail(failed.into()),
        }
        if !self.is_done && self.texts.iter().all(Option::is_none) {
            self.end();
        }
    }

    /// Ends the stream with an error.
    fn fail(&mut self, failure: Failure) {
        self.push(&failure.body());
        self.texts.clear();
        self.end();
    }

    fn end(&mut self) {
        self.is_done = true;
        if self.include_usage && !self.texts.is_empty() {
            let mut body = self.answer.json(true, Vec::new());
            body["usage"] = self.usage.json();
            body["halite"] = self.usage.devices();
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
            let count = self.texts.len();
            let first = self.next;
            self.next = (self.next + 1) % count;
            let mut is_pending = true;
            for index in (first..count).chain(0..first) {
                let Some(running) = &mut self.texts[index] else { continue };
                match running.poll_next(context) {
                    Poll::Pending => continue,
                    Poll::Ready(Some(progress)) => self.take(index, progress),
                    Poll::Ready(None) => self.fail(Failure::internal("the request ended early")),
                }
                is_pending = false;
                break;
            }
            if is_pending {
                return Poll::Pending;
            }
        }
    }
}
