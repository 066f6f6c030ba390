//! Reads an answer as it is generated: its reasoning, its text and its calls.

use super::tools::{Format, HARMONY, Shape, THINK, THOUGHT, Thinking};

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Event {
    /// A piece of the text.
    Content(String),
    /// A piece of the reasoning.
    Reasoning(String),
    /// The beginning of a call.
    Call { index: usize, name: String },
    /// A piece of a call's arguments.
    Arguments { call: usize, text: String },
}

/// What a piece of text is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Content,
    Reasoning,
    Arguments,
}

#[derive(Debug)]
enum State {
    /// Before the answer, or before what follows its reasoning.
    Start,
    Content,
    Reasoning,
    /// Before a call or after one, with whether a trigger was read.
    Between(bool),
    /// In a name that a text ends.
    Name(&'static str),
    Object(Object),
    /// In the arguments of a named call.
    Arguments(Scan),
    /// In what says which channel a message is on.
    Header,
    Body(Kind),
}

/// What begins a message on a channel, and what ends one.
const MESSAGE: &str = "<|message|>";
const BEGINS: [&str; 3] = ["<|channel|>", "<|start|>", " to="];
const ENDS: [&str; 5] = ["<|end|>", "<|start|>", "<|channel|>", "<|call|>", "<|return|>"];
const FUNCTIONS: &str = "functions.";

/// What may stand between calls.
const BETWEEN: [&str; 4] = [",", ";", "[", "]"];

/// Turns the pieces of a text into events.
#[derive(Debug)]
pub(super) struct Parser {
    /// How calls are written, if there may be any.
    format: Option<&'static Format>,
    thinking: Thinking,
    state: State,
    /// Text that is not read yet.
    rest: String,
    /// White space that counts only if text follows.
    space: String,
    /// Whether text of the current part was read.
    has_begun: bool,
    /// Whether reasoning ended, after which white space does not count.
    has_thought: bool,
    calls: usize,
    events: Vec<Event>,
}

impl Parser {
    /// Reads an answer on channels if `has_channels`, with calls in this format.
    pub fn new(format: Option<&'static Format>, has_channels: bool, thinking: Thinking) -> Parser {
        let state = match thinking {
            _ if has_channels => State::Start,
            Thinking::Begun => State::Reasoning,
            Thinking::Never if format.is_none() => State::Content,
            _ => State::Start,
        };
        let format = format.or(has_channels.then_some(&HARMONY));
        let (rest, space, events) = Default::default();
        Parser {
            format,
            thinking,
            state,
            rest,
            space,
            has_begun: false,
            has_thought: false,
            calls: 0,
            events,
        }
    }

    /// Reads a piece.
    pub fn push(&mut self, text: &str) -> Vec<Event> {
        self.rest.push_str(text);
        while self.step(false) {}
        std::mem::take(&mut self.events)
    }

    /// Reads what is left at the end of the answer.
    pub fn finish(&mut self) -> Vec<Event> {
        while self.step(true) {}
        match std::mem::replace(&mut self.state, State::Content) {
            State::Content | State::Body(Kind::Content) => {
                let space = std::mem::take(&mut self.space);
                self.event(Kind::Content, space);
            }
            State::Object(object) if object.name.is_none() => self.event(Kind::Content, object.raw),
            // The token that ends the call ended the answer.
            State::Body(Kind::Arguments) => self.no_arguments(),
            _ => {}
        }
        std::mem::take(&mut self.events)
    }

    /// Calls so far.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Reads what can be read in one state. False if there is nothing.
    fn step(&mut self, is_end: bool) -> bool {
        match &mut self.state {
            State::Start => self.start(is_end),
            State::Content => {
                let triggers = self.format.filter(|format| !format.leads).map_or(&[][..], |f| f.triggers);
                match self.text(Kind::Content, triggers, is_end) {
                    Some(_) => self.enter(State::Between(true)),
                    None => false,
                }
            }
            State::Reasoning => match self.text(Kind::Reasoning, &[THOUGHT], is_end) {
                Some(_) => {
                    self.thinking = Thinking::Never;
                    self.has_thought = true;
                    self.enter(State::Start)
                }
                None => false,
            },
            State::Between(_) => self.between(is_end),
            State::Name(end) => {
                let Some(at) = self.rest.find(*end) else { return false };
                // Some models write an id after the name.
                let name = self.rest[..at].split('[').next().unwrap_or_default().trim().to_owned();
                self.rest.drain(..at + end.len());
                self.call(name);
                self.enter(State::Arguments(Scan::default()))
            }
            State::Object(_) => self.object(),
            State::Arguments(scan) => {
                let (length, is_done) = scan.feed(&self.rest);
                let text: String = self.rest.drain(..length).collect();
                self.arguments(text);
                if is_done {
                    self.no_arguments();
                    return self.enter(State::Between(false));
                }
                false
            }
            State::Header => {
                let Some(at) = self.rest.find(MESSAGE) else { return false };
                let header: String = self.rest.drain(..at + MESSAGE.len()).collect();
                let word = |after: &str| {
                    let rest = header.split_once(after)?.1;
                    rest.split(|c: char| c.is_whitespace() || c == '<').next()
                };
                let kind = match word("to=").and_then(|to| to.strip_prefix(FUNCTIONS)) {
                    Some(name) => {
                        self.call(name.to_owned());
                        Kind::Arguments
                    }
                    None if word("<|channel|>") == Some("analysis") => Kind::Reasoning,
                    None => Kind::Content,
                };
                self.enter(State::Body(kind))
            }
            State::Body(kind) => {
                let kind = *kind;
                match self.text(kind, &ENDS, is_end) {
                    // The beginning of the next message belongs to its header.
                    Some(end) => {
                        if kind == Kind::Arguments {
                            self.no_arguments();
                        }
                        self.rest.insert_str(0, if BEGINS.contains(&end) { end } else { "" });
                        self.enter(State::Header)
                    }
                    None => false,
                }
            }
        }
    }

    fn enter(&mut self, state: State) -> bool {
        self.state = state;
        self.space.clear();
        self.has_begun = false;
        true
    }

    fn start(&mut self, is_end: bool) -> bool {
        if self.has_thought {
            self.rest = self.rest.trim_start().to_owned();
            if self.rest.is_empty() && !is_end {
                return false;
            }
        }
        let text = self.rest.trim_start();
        let has_channels = self.format.is_some_and(|format| format.shape == Shape::Channel);
        let begins: Vec<(&str, bool)> = if has_channels {
            BEGINS.iter().map(|begin| (*begin, false)).collect()
        } else {
            let leads = self.format.filter(|format| format.leads);
            let think = (self.thinking == Thinking::Maybe).then_some((THINK, true));
            let object = leads.map(|_| ("{", false));
            let triggers = leads.map_or(&[][..], |format| format.triggers);
            think.into_iter().chain(object).chain(triggers.iter().map(|trigger| (*trigger, false))).collect()
        };
        for (begin, is_think) in &begins {
            // White space before a recipient is a part of its sign.
            let text = if begin.starts_with(' ') { &self.rest } else { text };
            if text.starts_with(begin) {
                let skipped = self.rest.len() - text.len() + if *is_think { begin.len() } else { 0 };
                let state = match (has_channels, is_think) {
                    (true, _) => State::Header,
                    (false, true) => State::Reasoning,
                    (false, false) => State::Between(false),
                };
                self.rest.drain(..skipped);
                return self.enter(state);
            }
        }
        let may_begin = |begin: &str| begin.starts_with(text) || begin.starts_with(&*self.rest);
        if !is_end && begins.iter().any(|(begin, _)| may_begin(begin)) {
            return false;
        }
        self.enter(State::Content)
    }

    /// Reads text up to one of these marks, and returns the mark.
    fn text(&mut self, kind: Kind, marks: &[&'static str], is_end: bool) -> Option<&'static str> {
        let found = marks.iter().filter_map(|mark| Some((self.rest.find(mark)?, *mark)));
        if let Some((at, mark)) = found.min_by_key(|(at, mark)| (*at, std::cmp::Reverse(mark.len()))) {
            let text: String = self.rest.drain(..at).collect();
            self.rest.drain(..mark.len());
            self.piece(kind, text);
            return Some(mark);
        }
        // A mark may have begun.
        let open = |at: usize| marks.iter().any(|mark| mark.starts_with(&self.rest[at..]));
        let starts = self.rest.char_indices().map(|(at, _)| at);
        let longest = marks.iter().map(|mark| mark.len()).max().unwrap_or(0);
        let recent = self.rest.len().saturating_sub(longest);
        let safe = match is_end {
            true => self.rest.len(),
            false => starts.skip_while(|at| *at < recent).find(|at| open(*at)).unwrap_or(self.rest.len()),
        };
        let text: String = self.rest.drain(..safe).collect();
        self.piece(kind, text);
        None
    }

    /// Tells a piece of text, without white space at its end until more text follows.
    fn piece(&mut self, kind: Kind, text: String) {
        if kind == Kind::Content && self.format.is_none() && self.thinking == Thinking::Never {
            return self.event(kind, text);
        }
        let mut text = std::mem::take(&mut self.space) + &text;
        if kind != Kind::Content && !self.has_begun {
            text = text.trim_start().to_owned();
        }
        let kept = text.trim_end().len();
        self.space = text.split_off(kept);
        self.has_begun |= !text.is_empty();
        self.event(kind, text);
    }

    fn event(&mut self, kind: Kind, text: String) {
        if text.is_empty() {
            return;
        }
        self.events.push(match kind {
            Kind::Content => Event::Content(text),
            Kind::Reasoning => Event::Reasoning(text),
            Kind::Arguments => Event::Arguments { call: self.calls.saturating_sub(1), text },
        });
    }

    fn call(&mut self, name: String) {
        self.events.push(Event::Call { index: self.calls, name });
        self.calls += 1;
        self.has_begun = false;
    }

    fn arguments(&mut self, text: String) {
        self.has_begun |= !text.is_empty();
        self.event(Kind::Arguments, text);
    }

    /// A call without arguments has none, which is an object too.
    fn no_arguments(&mut self) {
        if !std::mem::replace(&mut self.has_begun, true) {
            self.event(Kind::Arguments, "{}".into());
        }
    }

    fn between(&mut self, is_end: bool) -> bool {
        let Some(format) = self.format else { return self.enter(State::Content) };
        self.rest = self.rest.trim_start().to_owned();
        if self.rest.starts_with('{') {
            return self.enter(State::Object(Object::default()));
        }
        let skipped = || format.control.iter().chain(format.triggers).chain(&BETWEEN);
        if !is_end && skipped().any(|text| text.len() > self.rest.len() && text.starts_with(&*self.rest)) {
            return false;
        }
        if let Some(text) = skipped().find(|text| self.rest.starts_with(**text)) {
            self.rest.drain(..text.len());
            if format.triggers.contains(text) {
                self.state = State::Between(true);
            }
            return true;
        }
        match (format.shape, &self.state) {
            _ if self.rest.is_empty() => false,
            (Shape::Named(end), State::Between(true)) => self.enter(State::Name(end)),
            _ => self.enter(State::Content),
        }
    }

    fn object(&mut self) -> bool {
        let State::Object(object) = &mut self.state else { return false };
        let before = self.rest.len();
        let told = object.read(&mut self.rest);
        for event in told {
            match event {
                Told::Name(name) => self.call(name),
                Told::Arguments(text) => self.arguments(text),
                // An object without a name is text, and so is what follows.
                told @ (Told::End | Told::Malformed) => {
                    let State::Object(object) = std::mem::replace(&mut self.state, State::Content) else {
                        return false;
                    };
                    let is_call = object.name.is_some() && matches!(told, Told::End);
                    self.closed(object);
                    return self.enter(if is_call { State::Between(false) } else { State::Content });
                }
            }
        }
        self.rest.len() < before
    }

    /// Ends an object: one without a name is text.
    fn closed(&mut self, object: Object) {
        match object.name {
            Some(_) => self.no_arguments(),
            None => self.event(Kind::Content, object.raw),
        }
    }
}

/// Finds the end of a JSON value, byte by byte.
#[derive(Debug, Default)]
struct Scan {
    depth: usize,
    is_text: bool,
    is_escaped: bool,
    has_begun: bool,
}

impl Scan {
    /// How many bytes of a text are of the value, and whether it ends there.
    fn feed(&mut self, text: &str) -> (usize, bool) {
        for (at, byte) in text.bytes().enumerate() {
            match byte {
                _ if self.is_escaped => self.is_escaped = false,
                b'\\' if self.is_text => self.is_escaped = true,
                b'"' => {
                    self.is_text = !self.is_text;
                    self.has_begun = true;
                    if !self.is_text && self.depth == 0 {
                        return (at + 1, true);
                    }
                }
                _ if self.is_text => {}
                b'{' | b'[' => {
                    self.depth += 1;
                    self.has_begun = true;
                }
                b'}' | b']' if self.depth > 0 => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return (at + 1, true);
                    }
                }
                b'}' | b']' | b',' if self.depth == 0 => return (at, true),
                byte if byte.is_ascii_whitespace() => {
                    if self.has_begun && self.depth == 0 {
                        return (at, true);
                    }
                }
                _ => self.has_begun = true,
            }
        }
        (text.len(), false)
    }
}

/// The object of a call.
#[derive(Debug, Default)]
struct Object {
    stage: Stage,
    name: Option<String>,
    /// Arguments that came before the name.
    held: String,
    /// All that was read before the name.
    raw: String,
}

#[derive(Debug, Default)]
enum Stage {
    #[default]
    Open,
    Key,
    Colon(Slot),
    Value(Slot, Scan, String),
}

/// What a key of a call's object is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Name,
    Arguments,
    Other,
}

/// The keys of a call's object.
const KEYS: [(&str, Slot); 3] =
    [("name", Slot::Name), ("arguments", Slot::Arguments), ("parameters", Slot::Arguments)];

enum Told {
    Name(String),
    Arguments(String),
    End,
    Malformed,
}

impl Object {
    /// Takes text, as far as it is of the object.
    fn take(&mut self, rest: &mut String, length: usize) -> String {
        let text: String = rest.drain(..length).collect();
        if self.name.is_none() {
            self.raw.push_str(&text);
        }
        text
    }

    /// Reads one part.
    fn read(&mut self, rest: &mut String) -> Vec<Told> {
        if !matches!(self.stage, Stage::Value(..)) {
            let spaces = rest.len() - rest.trim_start().len();
            self.take(rest, spaces);
        }
        let Some(first) = rest.chars().next() else { return Vec::new() };
        let stage = std::mem::take(&mut self.stage);
        self.stage = match (stage, first) {
            (Stage::Open, '{') | (Stage::Key, ',') => {
                self.take(rest, 1);
                Stage::Key
            }
            (Stage::Key, '}') => {
                self.take(rest, 1);
                return vec![Told::End];
            }
            (Stage::Key, '"') => {
                let (length, is_done) = Scan::default().feed(rest);
                if !is_done {
                    self.stage = Stage::Key;
                    return Vec::new();
                }
                let key: String = serde_json::from_str(&self.take(rest, length)).unwrap_or_default();
                Stage::Colon(
                    KEYS.iter().find(|(name, _)| *name == key).map_or(Slot::Other, |(_, slot)| *slot),
                )
            }
            (Stage::Colon(slot), ':') => {
                self.take(rest, 1);
                Stage::Value(slot, Scan::default(), String::new())
            }
            (Stage::Value(slot, scan, text), _) => return self.value(slot, scan, text, rest),
            _ => return vec![Told::Malformed],
        };
        Vec::new()
    }

    /// Reads a value, of which `text` is there.
    fn value(&mut self, slot: Slot, mut scan: Scan, mut text: String, rest: &mut String) -> Vec<Told> {
        if !scan.has_begun {
            let spaces = rest.len() - rest.trim_start().len();
            self.take(rest, spaces);
        }
        let (length, is_done) = scan.feed(rest);
        let piece = self.take(rest, length);
        let mut told = Vec::new();
        match (slot, &self.name) {
            // The arguments of a known function need not wait.
            (Slot::Arguments, Some(_)) if !piece.is_empty() => told.push(Told::Arguments(piece)),
            (Slot::Name | Slot::Arguments, None) => text.push_str(&piece),
            _ => {}
        }
        self.stage = match is_done {
            false => Stage::Value(slot, scan, text),
            true => {
                match (slot, &self.name) {
                    (Slot::Name, None) => told = self.named(&text),
                    (Slot::Arguments, None) => self.held = text,
                    _ => {}
                }
                Stage::Key
            }
        };
        told
    }

    fn named(&mut self, text: &str) -> Vec<Told> {
        let Ok(name) = serde_json::from_str::<String>(text) else { return Vec::new() };
        self.name = Some(name.clone());
        let held = std::mem::take(&mut self.held);
        let arguments = (!held.is_empty()).then_some(Told::Arguments(held));
        std::iter::once(Told::Name(name)).chain(arguments).collect()
    }
}

/// A whole answer.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Said {
    pub content: String,
    pub reasoning: String,
    /// Names and arguments.
    pub calls: Vec<(String, String)>,
}

impl Said {
    /// Adds a part.
    pub fn add(&mut self, event: Event) {
        match event {
            Event::Content(text) => self.content.push_str(&text),
            Event::Reasoning(text) => self.reasoning.push_str(&text),
            Event::Call { name, .. } => self.calls.push((name, String::new())),
            Event::Arguments { call, text } => {
                if let Some((_, arguments)) = self.calls.get_mut(call) {
                    arguments.push_str(&text);
                }
            }
        }
    }
}
