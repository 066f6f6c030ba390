//! Writes texts as OpenAI's completions and chats, whole or in pieces.

use halite::generate::Finish;
use serde_json::{Map, Value, json};

use super::messages::Reading;
use super::parse::{Event, Parser, Said};
use super::tools::call_id;

/// One text of an answer.
#[derive(Debug)]
pub(super) struct Voice {
    index: usize,
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
    pub fn new(index: usize, reading: Option<Reading>) -> Voice {
        Voice { index, parser: reading.map(|reading| reading.parser()), has_begun: false }
    }

    /// The whole text as a choice.
    pub fn whole(mut self, text: &str, finish: Finish) -> Value {
        let Some(parser) = &mut self.parser else { return self.completion(text, Some(finish)) };
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
        let finish = reason(finish, has_calls);
        json!({ "index": self.index, "logprobs": null, "finish_reason": finish, "message": message })
    }

    /// A piece of the text, as choices of chunks.
    pub fn piece(&mut self, text: &str) -> Vec<Value> {
        let Some(parser) = &mut self.parser else { return vec![self.completion(text, None)] };
        let events = parser.push(text);
        events.into_iter().map(|event| self.event(event)).collect()
    }

    /// What is left at the end.
    pub fn end(&mut self, finish: Finish) -> Vec<Value> {
        let Some(parser) = &mut self.parser else { return vec![self.completion("", Some(finish))] };
        let events = parser.finish();
        let finish = reason(finish, parser.calls() > 0);
        let mut choices: Vec<Value> = events.into_iter().map(|event| self.event(event)).collect();
        choices.push(self.delta(Map::new(), Some(finish)));
        choices
    }

    fn completion(&self, text: &str, finish: Option<Finish>) -> Value {
        let finish = finish.map(|finish| reason(finish, false));
        json!({ "index": self.index, "text": text, "logprobs": null, "finish_reason": finish })
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
fn reason(finish: Finish, has_calls: bool) -> &'static str {
    match finish {
        Finish::Length | Finish::ContextFull => "length",
        _ if has_calls => "tool_calls",
        _ => "stop",
    }
}
