//! Writes texts as OpenAI's completions and chats, whole or in pieces.

use std::sync::Arc;

use halite::Tokenizer;
use halite::generate::Finish;
use halite::sampler::Logprobs;
use serde_json::{Map, Value, json};

use super::messages::Reading;
use super::parse::{Event, Parser, Said};
use super::tools::call_id;
use crate::model::{Early, Hosted, Outcome};

/// One text of an answer.
#[derive(Debug)]
pub(super) struct Voice {
    index: usize,
    tokenizer: Arc<Tokenizer>,
    /// How a chat's answer is read; a completion's is only text.
    parser: Option<Parser>,
    has_begun: bool,
}

impl Reading {
    /// A parser for one answer.
    pub fn parser(&self) -> Parser {
        Parser::new(self.format, self.has_channels, self.thinking)
    }
}

impl Voice {
    /// The text of this index.
    pub fn new(index: usize, hosted: &Hosted, reading: Option<Reading>) -> Voice {
        let tokenizer = hosted.tokenizer().clone();
        Voice { index, tokenizer, parser: reading.map(|reading| reading.parser()), has_begun: false }
    }

    /// The whole text as a choice.
    pub fn whole(mut self, text: &str, logprobs: &[Logprobs], outcome: &Outcome) -> Value {
        let logprobs = self.logprobs(logprobs);
        let Some(parser) = &mut self.parser else { return self.completion(text, logprobs, Some(outcome)) };
        let mut said = Said::default();
        parser.push(text).into_iter().chain(parser.finish()).for_each(|event| said.add(event));
        let content =
            if said.content.is_empty() && !said.calls.is_empty() { Value::Null } else { said.content.into() };
        let mut message = json!({ "role": "assistant", "content": content, "refusal": null });
        if !said.reasoning.is_empty() {
            message["reasoning_content"] = said.reasoning.into();
        }
        let has_calls = !said.calls.is_empty();
        if has_calls {
            let call = |(name, arguments)| json!({ "id": call_id(), "type": "function", "function": { "name": name, "arguments": arguments } });
            message["tool_calls"] = said.calls.into_iter().map(call).collect();
        }
        let finish = reason(outcome, has_calls);
        json!({ "index": self.index, "logprobs": logprobs, "finish_reason": finish, "message": message })
    }

    /// A piece of the text, as choices of chunks.
    pub fn piece(&mut self, text: &str, logprobs: &[Logprobs]) -> Vec<Value> {
        // Nothing to tell yet.
        if text.is_empty() && logprobs.is_empty() {
            return Vec::new();
        }
        let logprobs = self.logprobs(logprobs);
        let Some(parser) = &mut self.parser else { return vec![self.completion(text, logprobs, None)] };
        let events = parser.push(text);
        let mut choices: Vec<Value> = events.into_iter().map(|event| self.event(event)).collect();
        if !logprobs.is_null() {
            if choices.is_empty() {
                choices.push(self.delta(Map::new(), None));
            }
            choices[0]["logprobs"] = logprobs;
        }
        choices
    }

    /// What is left at the end.
    pub fn end(&mut self, outcome: &Outcome) -> Vec<Value> {
        let Some(parser) = &mut self.parser else {
            return vec![self.completion("", Value::Null, Some(outcome))];
        };
        let events = parser.finish();
        let finish = reason(outcome, parser.calls() > 0);
        let mut choices: Vec<Value> = events.into_iter().map(|event| self.event(event)).collect();
        choices.push(self.delta(Map::new(), Some(finish)));
        choices
    }

    fn completion(&self, text: &str, logprobs: Value, outcome: Option<&Outcome>) -> Value {
        let finish = outcome.map(|outcome| reason(outcome, false));
        json!({ "index": self.index, "text": text, "logprobs": logprobs, "finish_reason": finish })
    }

    /// How likely tokens were.
    fn logprobs(&self, logprobs: &[Logprobs]) -> Value {
        if logprobs.is_empty() {
            return Value::Null;
        }
        let bytes = |token: u32| {
            let mut bytes = Vec::new();
            self.tokenizer.decode_token(token, true, &mut bytes);
            bytes
        };
        let text = |token: u32| String::from_utf8_lossy(&bytes(token)).into_owned();
        // JSON has no infinity.
        let finite = |logprob: f32| logprob.max(-9999.0);
        if self.parser.is_none() {
            let tops = logprobs.iter().map(|of| {
                of.top
                    .iter()
                    .map(|&(token, logprob)| (text(token), finite(logprob).into()))
                    .collect::<Map<_, _>>()
            });
            return json!({
                "tokens": logprobs.iter().map(|of| text(of.token)).collect::<Vec<_>>(),
                "token_logprobs": logprobs.iter().map(|of| finite(of.logprob)).collect::<Vec<_>>(),
                "top_logprobs": tops.collect::<Vec<_>>(),
            });
        }
        let one = |token: u32, logprob: f32| json!({ "token": text(token), "logprob": finite(logprob), "bytes": bytes(token) });
        let content = logprobs.iter().map(|of| {
            let mut value = one(of.token, of.logprob);
            value["top_logprobs"] = of.top.iter().map(|&(token, logprob)| one(token, logprob)).collect();
            value
        });
        json!({ "content": content.collect::<Vec<_>>(), "refusal": null })
    }

    fn event(&mut self, event: Event) -> Value {
        let (field, value): (&str, Value) = match event {
            Event::Content(text) => ("content", text.into()),
            Event::Reasoning(text) => ("reasoning_content", text.into()),
            Event::Call { index, name } => {
                let function = json!({ "name": name, "arguments": "" });
                let call =
                    json!({ "index": index, "id": call_id(), "type": "function", "function": function });
                ("tool_calls", json!([call]))
            }
            Event::Arguments { call, text } => {
                ("tool_calls", json!([{ "index": call, "function": { "arguments": text } }]))
            }
        };
        self.delta(Map::from_iter([(field.to_owned(), value)]), None)
    }

    fn delta(&mut self, mut delta: Map<String, Value>, finish: Option<&str>) -> Value {
        if !std::mem::replace(&mut self.has_begun, true) {
            delta.insert("role".into(), "assistant".into());
        }
        json!({ "index": self.index, "delta": delta, "logprobs": null, "finish_reason": finish })
    }
}

/// Why a text ended.
fn reason(outcome: &Outcome, has_calls: bool) -> &'static str {
    match outcome.generation.finish {
        _ if outcome.early == Some(Early::Denied) => "content_filter",
        _ if outcome.early == Some(Early::Late) => "length",
        Finish::Length | Finish::ContextFull => "length",
        _ if has_calls => "tool_calls",
        _ => "stop",
    }
}
