//! Tools that a model may call: how each family of models writes a call, and the rule that makes it write one.

use std::fmt::Write;

use halite::constrain::Rule;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::{Failure, Fallible};

/// Maximum tools of a request, and bytes of a name.
const MAX_TOOLS: usize = 128;
const MAX_NAME: usize = 64;

/// What a call looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// An object with a `name`, and with `arguments` or `parameters`.
    Object,
    /// A name, this text, and an object of arguments.
    Named(&'static str),
    /// A message on a channel of its own, to the function.
    Channel,
}

/// How a family writes calls. A call is `head`, the name, `middle`, the arguments and `tail`.
#[derive(Debug)]
pub(super) struct Format {
    /// A template that has one of these texts is of the family. The first row that fits counts.
    signs: &'static [&'static str],
    pub shape: Shape,
    /// Texts that may begin the calls. An object may also begin them by itself if `leads` is set.
    pub triggers: &'static [&'static str],
    /// Whether calls are an answer's beginning. Otherwise a text may stand before them.
    pub leads: bool,
    open: &'static str,
    head: &'static str,
    middle: &'static str,
    tail: &'static str,
    /// What stands between two calls; without it, an answer has one.
    next: Option<&'static str>,
    close: &'static str,
    /// Control tokens that an answer has.
    pub control: &'static [&'static str],
}

const OBJECT: &str = "{\"name\": \"";
const ARGUMENTS: &str = "\", \"arguments\": ";
const PARAMETERS: &str = "\", \"parameters\": ";

/// Answers on channels, as gpt-oss writes them.
pub(super) static HARMONY: Format = Format {
    signs: &["<|channel|>"],
    shape: Shape::Channel,
    triggers: &[],
    leads: true,
    open: "",
    head: "<|channel|>commentary to=functions.",
    middle: " <|constrain|>json<|message|>",
    tail: "",
    next: None,
    close: "",
    control: &["<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>"],
};

/// The other families, and how they write calls.
static FORMATS: [Format; 5] = [
    Format {
        signs: &["[ARGS]"],
        shape: Shape::Named("[ARGS]"),
        triggers: &["[TOOL_CALLS]"],
        leads: false,
        open: "",
        head: "",
        middle: "[ARGS]",
        tail: "",
        next: Some("[TOOL_CALLS]"),
        close: "",
        control: &["[TOOL_CALLS]", "[ARGS]"],
    },
    Format {
        signs: &["[TOOL_CALLS]"],
        shape: Shape::Object,
        triggers: &["[TOOL_CALLS]"],
        leads: false,
        open: "[",
        head: OBJECT,
        middle: ARGUMENTS,
        tail: "}",
        next: Some(", "),
        close: "]",
        control: &["[TOOL_CALLS]"],
    },
    Format {
        signs: &["<|tool_call|>"],
        shape: Shape::Object,
        triggers: &["<|tool_call|>"],
        leads: false,
        open: "[",
        head: OBJECT,
        middle: ARGUMENTS,
        tail: "}",
        next: Some(", "),
        close: "]",
        control: &["<|tool_call|>"],
    },
    Format {
        signs: &["<tool_call>"],
        shape: Shape::Object,
        triggers: &["<tool_call>"],
        leads: false,
        open: "",
        head: "\n{\"name\": \"",
        middle: ARGUMENTS,
        tail: "}\n</tool_call>",
        next: Some("\n<tool_call>"),
        close: "",
        control: &["<tool_call>", "</tool_call>"],
    },
    Format {
        signs: &["<|python_tag|>", "\"parameters\": dictionary"],
        shape: Shape::Object,
        triggers: &["<|python_tag|>"],
        leads: true,
        open: "",
        head: OBJECT,
        middle: PARAMETERS,
        tail: "}",
        next: None,
        close: "",
        control: &["<|python_tag|>"],
    },
];

/// Calls of models whose template knows no tools, or none that this table has. A message describes the tools to them.
pub(super) static GENERIC: Format = Format {
    signs: &[],
    shape: Shape::Object,
    triggers: &[],
    leads: true,
    open: "",
    head: OBJECT,
    middle: PARAMETERS,
    tail: "}",
    next: None,
    close: "",
    control: &[],
};

/// How a model with this template writes calls. `None` if its template knows no tools.
pub(super) fn detect(template: &str) -> Option<&'static Format> {
    let mut formats = std::iter::once(&HARMONY).chain(&FORMATS);
    formats.find(|format| format.is_of(template)).filter(|_| template.contains("tools"))
}

impl Format {
    /// Whether a model with this template is of the family.
    pub fn is_of(&self, template: &str) -> bool {
        self.signs.iter().any(|sign| template.contains(sign))
    }
}

/// How a model reasons before it answers, as its prompt leaves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Thinking {
    /// Not between tags.
    Never,
    /// Between `<think>` and `</think>`, if it wants to.
    Maybe,
    /// The prompt ended after `<think>`.
    Begun,
}

pub(super) const THINK: &str = "<think>";
pub(super) const THOUGHT: &str = "</think>";

impl Thinking {
    /// How a model with this template reasons after this prompt.
    pub fn of(template: &str, prompt: &str) -> Thinking {
        if !template.contains(THOUGHT) {
            return Thinking::Never;
        }
        if prompt.trim_end().ends_with(THINK) { Thinking::Begun } else { Thinking::Maybe }
    }
}

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tool {
    pub name: String,
    description: Option<String>,
    parameters: Option<Value>,
}

/// What a request says of a function.
#[derive(Deserialize)]
struct Described {
    name: String,
    description: Option<String>,
    parameters: Option<Value>,
}

impl Tool {
    /// Reads the tools of a request, whose functions are in a field `function`, or without one as in `/v1/responses`.
    pub fn read(tools: &[Value]) -> Fallible<Vec<Tool>> {
        if tools.len() > MAX_TOOLS {
            return Err(Failure::field(
                "tools",
                format!("expected at most {MAX_TOOLS}, got {}", tools.len()),
            ));
        }
        let mut read: Vec<Tool> = Vec::new();
        for (index, tool) in tools.iter().enumerate() {
            let at = format!("tools[{index}]");
            if tool["type"] != "function" {
                return Err(Failure::field(&at, format!("expected the type function, got {}", tool["type"])));
            }
            let function = tool.get("function").unwrap_or(tool);
            let Described { name, description, parameters } =
                Described::deserialize(function).map_err(|error| Failure::field(&at, error))?;
            let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
            if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(is_name) {
                let expected =
                    format!("expected a name of 1 to {MAX_NAME} letters, digits, `_`, `-` and `.`");
                return Err(Failure::field(&at, format!("{expected}, got {name:?}")));
            }
            if read.iter().any(|tool| tool.name == name) {
                return Err(Failure::field(&at, format!("two functions have the name {name}")));
            }
            let parameters = parameters.filter(|parameters| !parameters.is_null());
            if let Some(got) = parameters.as_ref().filter(|parameters| !parameters.is_object()) {
                return Err(Failure::field(&at, format!("expected an object as parameters, got {got}")));
            }
            read.push(Tool { name, description, parameters });
        }
        Ok(read)
    }

    /// The tool as templates expect it.
    pub fn json(&self) -> Value {
        let mut function = json!({ "name": self.name });
        if let Some(description) = &self.description {
            function["description"] = description.clone().into();
        }
        function["parameters"] =
            self.parameters.clone().unwrap_or_else(|| json!({ "type": "object", "properties": {} }));
        json!({ "type": "function", "function": function })
    }

    /// The schema of its arguments, which are an object.
    fn schema(&self) -> Value {
        let Some(Value::Object(mut schema)) = self.parameters.clone() else {
            return json!({ "type": "object", "properties": {}, "additionalProperties": false });
        };
        schema.entry("type").or_insert_with(|| "object".into());
        Value::Object(schema)
    }
}

/// Which functions an answer calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Choice {
    /// None.
    None,
    /// Any, or none.
    Auto,
    /// At least one.
    Required,
    /// This one.
    Named(String),
}

impl Choice {
    /// Reads `tool_choice`.
    pub fn read(choice: &Value, tools: &[Tool]) -> Fallible<Choice> {
        let name = choice["function"]["name"].as_str().or(choice["name"].as_str());
        let choice = match (choice.as_str(), name) {
            _ if choice.is_null() && tools.is_empty() => Choice::None,
            _ if choice.is_null() => Choice::Auto,
            (Some("none"), _) => Choice::None,
            (Some("auto"), _) => Choice::Auto,
            (Some("required"), _) => Choice::Required,
            (None, Some(name)) if choice["type"] == "function" => Choice::Named(name.to_owned()),
            _ => {
                let expected = "expected none, auto, required or a function";
                return Err(Failure::field("tool_choice", format!("{expected}, got {choice}")));
            }
        };
        match &choice {
            Choice::Named(name) if !tools.iter().any(|tool| tool.name == *name) => {
                Err(Failure::field("tool_choice", format!("no function of `tools` has the name {name}")))
            }
            Choice::Required if tools.is_empty() => {
                Err(Failure::field("tool_choice", "expected `tools`, got none"))
            }
            Choice::Auto if tools.is_empty() => Ok(Choice::None),
            _ => Ok(choice),
        }
    }
}

/// What an answer must look like.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    pub format: &'static Format,
    pub tools: &'a [Tool],
    pub choice: &'a Choice,
    /// Whether several calls are allowed.
    pub is_parallel: bool,
    pub thinking: Thinking,
    /// The schema of an answer that calls nothing.
    pub schema: Option<&'a Value>,
}

/// A text of a grammar in Lark's syntax.
fn literal(text: &str) -> String {
    Value::from(text).to_string()
}

/// The literal of texts that follow each other.
fn joined(texts: &[&str]) -> String {
    literal(&texts.concat())
}

impl Plan<'_> {
    /// The rule of the answer.
    pub fn rule(&self) -> Fallible<Rule> {
        let Plan { format, choice, thinking, .. } = *self;
        let (may_answer, may_call) = (matches!(choice, Choice::Auto | Choice::None), *choice != Choice::None);
        if may_answer && may_call && self.schema.is_some() && format.leads && format.shape == Shape::Object {
            let message =
                "expected no schema beside tools that may be called, since this model's calls are plain JSON";
            return Err(Failure::field("response_format", message));
        }
        let called = |tool: &&Tool| !matches!(choice, Choice::Named(name) if *name != tool.name);
        let mut schemas = Vec::new();
        let mut calls = String::new();
        for (index, tool) in self.tools.iter().filter(called).enumerate() {
            let begin = joined(&[format.head, &tool.name, format.middle]);
            let tail = if format.tail.is_empty() { String::new() } else { literal(format.tail) };
            let or = if index > 0 { "    | " } else { "call: " };
            // Writing to a text cannot fail.
            let _ = writeln!(calls, "{or}{begin} @arguments{index} {tail}");
            schemas.push((format!("arguments{index}"), tool.schema().to_string()));
        }
        let mut content = "TEXT";
        if let Some(schema) = self.schema {
            content = "@content";
            let mut schema = schema.clone();
            if let Some(schema) = schema.as_object_mut() {
                schema.entry("x-guidance").or_insert_with(|| json!({ "whitespace_flexible": false }));
            }
            schemas.push(("content".into(), schema.to_string()));
        }
        let more = match format.next.filter(|_| self.is_parallel && !matches!(choice, Choice::Named(_))) {
            Some(next) => format!("({} call)*", literal(next)),
            None => String::new(),
        };
        let part = |text: &str| if text.is_empty() { String::new() } else { literal(text) };
        let mut grammar = String::from("TEXT: /(.|\\n)*/\n");
        if may_call {
            let (open, close) = (part(format.open), part(format.close));
            let _ = writeln!(grammar, "{calls}calls: {open} call {more} {close}");
        }
        if format.shape == Shape::Channel {
            let last = match (may_call, may_answer) {
                (true, true) => "(calls | final)",
                (true, false) => "calls",
                (false, _) => "final",
            };
            let note = |channel| joined(&["<|channel|>", channel, "<|message|>"]);
            let (analysis, commentary) = (note("analysis"), note("commentary"));
            let _ = writeln!(grammar, "start: note* {last}");
            let _ = writeln!(grammar, "note: ({analysis} | {commentary}) noted \"<|start|>assistant\"");
            let _ = writeln!(grammar, "noted[lazy]: TEXT \"<|end|>\"");
            let _ = writeln!(grammar, "final: {} {content}", note("final"));
            return Ok(Rule::Structured { grammar, schemas });
        }
        grammar.push_str(match thinking {
            Thinking::Never => "start: answer\n",
            Thinking::Maybe => "start: (\"<think>\" thought)? answer\n",
            Thinking::Begun => "start: thought answer\n",
        });
        if thinking != Thinking::Never {
            grammar.push_str("thought: thinking /\\n{0,2}/\nthinking[lazy]: TEXT \"</think>\"\n");
        }
        if !may_call {
            let _ = writeln!(grammar, "answer: {content}");
            return Ok(Rule::Structured { grammar, schemas });
        }
        let triggers: Vec<String> = format.triggers.iter().map(|trigger| literal(trigger)).collect();
        let trigger = triggers.join(" | ");
        match (format.leads, may_answer) {
            (true, false) if triggers.is_empty() => grammar.push_str("answer: calls\n"),
            (true, false) => _ = writeln!(grammar, "answer: ({trigger})? calls"),
            (false, false) => _ = writeln!(grammar, "answer: ({trigger}) calls"),
            // A text that begins like a call is a call.
            (true, true) => {
                let begins: Vec<String> =
                    triggers.iter().map(String::as_str).chain(["\"{\""]).map(str::to_owned).collect();
                let optional = if triggers.is_empty() { String::new() } else { format!("({trigger})?") };
                let _ = writeln!(grammar, "answer: {optional} calls | PLAIN");
                let _ = writeln!(grammar, "PLAIN: ~(({}) /(.|\\n)*/)", begins.join(" | "));
            }
            (false, true) => {
                let _ = writeln!(grammar, "answer: before calls | {content}");
                let before = if self.schema.is_some() { "" } else { "BEFORE " };
                let _ = writeln!(grammar, "before[lazy]: {before}({trigger})");
                // What begins like reasoning is no text before a call.
                let before = match thinking {
                    Thinking::Maybe => "~(\"<think>\" /(.|\\n)*/)",
                    _ => "TEXT",
                };
                let _ = writeln!(grammar, "BEFORE: {before}");
            }
        }
        Ok(Rule::Structured { grammar, schemas })
    }
}

/// A message that describes tools to a model whose template does not.
pub(super) fn description(tools: &[Tool]) -> String {
    let mut text = String::from("These functions can be called:\n");
    for tool in tools {
        let _ = writeln!(text, "{}", tool.json()["function"]);
    }
    text.push_str("To call one, answer with nothing but JSON of this form: ");
    text.push_str("{\"name\": the function's name, \"parameters\": its arguments as an object}");
    text
}

/// A call as models of [`GENERIC`] write it.
pub(super) fn written(name: &str, arguments: &Value) -> String {
    format!("{}{name}{}{arguments}{}", GENERIC.head, GENERIC.middle, GENERIC.tail)
}

/// An id for a call. Some templates want nine letters and digits.
pub(super) fn call_id() -> String {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut number = crate::basics::random();
    let mut id = String::new();
    for _ in 0..9 {
        id.push(char::from(DIGITS[(number % 36) as usize]));
        number /= 36;
    }
    id
}
