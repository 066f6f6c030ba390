//! The methods of Python's str, list and dict that do not modify the value.

use std::sync::Arc;

use super::eval::{CallArgs, Run};
use super::filters::whole;
use super::text::Heap;
use super::value::{Fallible, Value, is_space};

const TEXT: [&str; 43] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "upper",
    "zfill",
];

/// Whether a value has a method.
pub fn has(value: &Value, name: &str) -> bool {
    match value {
        Value::Str(_) => TEXT.contains(&name),
        Value::List(_) => matches!(name, "index" | "count"),
        Value::Dict(_) => matches!(name, "get" | "items" | "keys" | "values" | "copy"),
        _ => false,
    }
}

/// Returns the lines of a text and their line ends, like `str.splitlines`.
pub fn lines(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let is_end =
            |c: char| matches!(c, '\n'..='\r' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
        let at = rest.find(is_end).unwrap_or(rest.len());
        let (line, after) = rest.split_at(at);
        let end = if after.starts_with("\r\n") { 2 } else { after.chars().next().map_or(0, char::len_utf8) };
        rest = &after[end..];
        Some((line, &after[..end]))
    })
}

/// Converts a required argument to a text.
fn text(value: Option<Value>, name: &str) -> Fallible<Arc<str>> {
    match value {
        Some(Value::Str(text)) => Ok(text),
        Some(value) => Err(format!("{name}: expected a str, got a {}", value.kind())),
        None => Err(format!("{name}: expected a str")),
    }
}

fn number(value: Option<Value>, name: &str, default: i64) -> Fallible<i64> {
    Ok(whole(value, name)?.unwrap_or(default))
}

impl Run<'_> {
    pub fn method(&mut self, value: &Value, name: &str, args: CallArgs) -> Fallible<Value> {
        match value {
            Value::Str(text) => self.text_method(text, name, args),
            Value::Loop(l) => self.loop_method(l, name, args),
            Value::List(list) => {
                let [sought] = args.bind(["value"])?;
                let sought = sought.ok_or_else(|| format!("{name}: expected a value"))?;
                let mut count = 0;
                for (at, item) in list.items.iter().enumerate() {
                    if self.heap.meter.equal(item, &sought)? {
                        if name == "index" {
                            return Ok(Value::Int(at as i64));
                        }
                        count += 1;
                    }
                }
                if name == "index" {
                    Err("index: the value is not in the list".into())
                } else {
                    Ok(Value::Int(count))
                }
            }
            Value::Dict(dict) => {
                self.heap.meter.work(1)?;
                if name == "get" {
                    let [key, default] = args.bind(["key", "default"])?;
                    let key = self.heap.meter.key(&key.ok_or("get: expected a key")?)?;
                    return Ok(dict.find(&key).cloned().or(default).unwrap_or(Value::None));
                }
                let [] = args.bind([])?;
                self.heap.meter.items(dict.entries.len())?;
                let mut items = Vec::with_capacity(dict.entries.len());
                for (key, value) in &dict.entries {
                    items.push(match name {
                        "keys" => key.clone(),
                        "values" => value.clone(),
                        "items" => self.heap.meter.sequence(vec![key.clone(), value.clone()], true)?,
                        _ => return Ok(Value::Dict(dict.clone())),
                    });
                }
                self.heap.meter.list(items)
            }
            _ => Err(format!("a {} has no method {name:?}", value.kind())),
        }
    }

    fn text_method(&mut self, subject: &Arc<str>, name: &str, args: CallArgs) -> Fallible<Value> {
        let meter = &mut self.heap.meter;
        meter.read(subject.len())?;
        match name {
            "upper" | "lower" | "casefold" | "capitalize" | "swapcase" | "title" => {
                let [] = args.bind([])?;
                // Changing case triples the length at most.
                meter.text(subject.len())?;
                let cased = cased(subject, name);
                meter.str(&cased)
            }
            "strip" | "lstrip" | "rstrip" => {
                let [chars] = args.bind(["chars"])?;
                let chars = match chars {
                    None | Some(Value::None) => None,
                    chars => Some(text(chars, name)?),
                };
                if let Some(chars) = &chars {
                    meter.work((chars.len() / 16 + 1).saturating_mul(subject.len() / 16 + 1))?;
                }
                let strips = |c: char| chars.as_ref().map_or_else(|| is_space(c), |chars| chars.contains(c));
                let stripped = match name {
                    "strip" => subject.trim_matches(strips),
                    "lstrip" => subject.trim_start_matches(strips),
                    _ => subject.trim_end_matches(strips),
                };
                if stripped.len() == subject.len() {
                    return Ok(Value::Str(subject.clone()));
                }
                meter.str(stripped)
            }
            "split" | "rsplit" => {
                let [by, max_splits] = args.bind(["sep", "maxsplit"])?;
                let max_splits = usize::try_from(number(max_splits, name, -1)?).unwrap_or(usize::MAX);
                split(&mut self.heap, subject, by, max_splits, name == "rsplit")
            }
            "splitlines" => {
                let [keep] = args.bind(["keepends"])?;
                let keep = keep.is_some_and(|keep| keep.is_truthy());
                let whole = lines(subject).map(|(line, end)| (line, if keep { end } else { "" }));
                let mut items = Vec::new();
                for (line, end) in whole {
                    meter.memory(64 + line.len() + end.len())?;
                    items.push(Value::Str(format!("{line}{end}").into()));
                }
                meter.list(items)
            }
            "join" => {
                let [over] = args.bind(["iterable"])?;
                let list = self.iterate(&over.ok_or("join: expected an iterable")?)?;
                let mut out = String::new();
                for (i, item) in list.items.iter().enumerate() {
                    let Value::Str(item) = item else {
                        return Err(format!("join: expected a str, got a {}", item.kind()));
                    };
                    self.heap.meter.push(&mut out, if i > 0 { subject } else { "" })?;
                    self.heap.meter.push(&mut out, item)?;
                }
                Ok(Value::Str(out.into()))
            }
            "replace" => {
                let [old, new, count] = args.bind(["old", "new", "count"])?;
                // The filter `replace` also accepts values that are not texts.
                let old = self.heap.str(&old.ok_or("replace: expected a text to replace")?)?;
                let new = self.heap.str(&new.ok_or("replace: expected a replacement")?)?;
                let max_count = usize::try_from(number(count, name, -1)?).unwrap_or(usize::MAX);
                let found = subject.matches(&*old).take(max_count).count();
                let bytes =
                    (subject.len() - found * old.len()).saturating_add(found.saturating_mul(new.len()));
                self.heap.meter.text(bytes)?;
                self.heap.meter.work(found)?;
                Ok(Value::Str(subject.replacen(&*old, &new, max_count).into()))
            }
            "startswith" | "endswith" => {
                let [part, start, end] = args.bind(["prefix", "start", "end"])?;
                let whole = range(subject, start, end)?.map(|(from, to)| &subject[from..to]);
                let parts = match part {
                    Some(Value::List(list)) if list.tuple => list.items.clone(),
                    part => vec![Value::Str(text(part, name)?)],
                };
                for part in parts {
                    let part = text(Some(part), name)?;
                    meter.read(part.len())?;
                    let Some(whole) = whole else { continue };
                    if if name == "startswith" { whole.starts_with(&*part) } else { whole.ends_with(&*part) }
                    {
                        return Ok(Value::Bool(true));
                    }
                }
                Ok(Value::Bool(false))
            }
            "find" | "rfind" | "index" | "rindex" | "count" => {
                let [part, start, end] = args.bind(["sub", "start", "end"])?;
                let part = text(part, name)?;
                meter.read(part.len())?;
                let window = range(subject, start, end)?;
                if name == "count" {
                    let count = window.map_or(0, |(from, to)| subject[from..to].matches(&*part).count());
                    return Ok(Value::Int(count as i64));
                }
                let found = window.and_then(|(from, to)| {
                    let window = &subject[from..to];
                    let at = if name.starts_with('r') { window.rfind(&*part) } else { window.find(&*part) };
                    at.map(|at| subject[..from + at].chars().count() as i64)
                });
                match found {
                    Some(at) => Ok(Value::Int(at)),
                    None if name.ends_with("find") => Ok(Value::Int(-1)),
                    None => Err(format!("{name}: the text is not found")),
                }
            }
            "partition" | "rpartition" => {
                let [by] = args.bind(["sep"])?;
                let by = text(by, name)?;
                if by.is_empty() {
                    return Err(format!("{name}: the separator is empty"));
                }
                let parts = match name {
                    "partition" => subject.split_once(&*by).map_or([subject, "", ""], |(a, b)| [a, &*by, b]),
                    _ => subject.rsplit_once(&*by).map_or(["", "", subject], |(a, b)| [a, &*by, b]),
                };
                let parts = parts.into_iter().map(|part| meter.str(part)).collect::<Fallible<_>>()?;
                meter.sequence(parts, true)
            }
            "removeprefix" | "removesuffix" => {
                let [part] = args.bind(["prefix"])?;
                let part = text(part, name)?;
                let rest = match name {
                    "removeprefix" => subject.strip_prefix(&*part),
                    _ => subject.strip_suffix(&*part),
                };
                meter.str(rest.unwrap_or(subject))
            }
            "center" | "ljust" | "rjust" | "zfill" => {
                let [width, fill] = args.bind(["width", "fillchar"])?;
                let width = usize::try_from(number(width, name, 0)?).unwrap_or(0);
                let fill = if fill.is_some() { text(fill, name)? } else { " ".into() };
                if fill.chars().count() != 1 {
                    return Err(format!("{name}: expected one character to fill with"));
                }
                let length = subject.chars().count();
                let space = width.saturating_sub(length);
                let mut out = String::new();
                if name == "zfill" {
                    let sign = usize::from(subject.starts_with(['+', '-']));
                    meter.push(&mut out, &subject[..sign])?;
                    meter.push_many(&mut out, "0", space)?;
                    meter.push(&mut out, &subject[sign..])?;
                    return Ok(Value::Str(out.into()));
                }
                let left = match name {
                    "ljust" => 0,
                    "rjust" => space,
                    _ => space / 2 + (space & width & 1),
                };
                meter.push_many(&mut out, &fill, left)?;
                meter.push(&mut out, subject)?;
                meter.push_many(&mut out, &fill, space - left)?;
                Ok(Value::Str(out.into()))
            }
            "expandtabs" => {
                let [size] = args.bind(["tabsize"])?;
                let size = usize::try_from(number(size, name, 8)?).unwrap_or(0);
                let (mut out, mut column) = (String::new(), 0);
                for c in subject.chars() {
                    match c {
                        '\t' if size == 0 => {}
                        '\t' => {
                            meter.push_many(&mut out, " ", size - column % size)?;
                            column += size - column % size;
                        }
                        _ => {
                            column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
                            meter.push(&mut out, c.encode_utf8(&mut [0; 4]))?;
                        }
                    }
                }
                Ok(Value::Str(out.into()))
            }
            "format" => self.format(subject, args),
            _ => {
                let [] = args.bind([])?;
                Ok(Value::Bool(is(subject, name)))
            }
        }
    }

    /// Evaluates `subject.format(...)`. Fields are numbers or names, with attributes and items.
    fn format(&mut self, subject: &str, args: CallArgs) -> Fallible<Value> {
        let mut out = String::new();
        let mut rest = subject;
        let mut automatic = 0;
        while let Some(at) = rest.find(['{', '}']) {
            self.heap.meter.push(&mut out, &rest[..at])?;
            let (brace, after) = rest[at..].split_at(1);
            rest = after;
            if let Some(after) = rest.strip_prefix(brace) {
                self.heap.meter.push(&mut out, brace)?;
                rest = after;
                continue;
            }
            if brace == "}" {
                return Err("format: a single \"}\"".into());
            }
            let (field, after) = rest.split_once('}').ok_or("format: a field has no end")?;
            rest = after;
            let (field, layout) = field.split_once(':').unwrap_or((field, ""));
            let (field, conversion) = field.split_once('!').unwrap_or((field, ""));
            let (name, path) = field.split_at(field.find(['.', '[']).unwrap_or(field.len()));
            let found = if name.is_empty() {
                automatic += 1;
                args.positional.get(automatic - 1)
            } else if let Ok(index) = name.parse::<usize>() {
                args.positional.get(index)
            } else {
                args.named.iter().find(|(n, _)| **n == *name).map(|(_, value)| value)
            };
            let value = found.ok_or_else(|| format!("format: no value for {field:?}"))?.clone();
            let mut value = self.follow_field(value, path)?;
            match conversion {
                "" => {}
                "s" => value = Value::Str(self.heap.str(&value)?),
                "r" | "a" => {
                    let mut text = String::new();
                    self.heap.repr(&mut text, &value, 0)?;
                    value = Value::Str(text.into());
                }
                _ => return Err(format!("format: unknown conversion {conversion:?}")),
            }
            self.heap.formatted(&mut out, &value, layout)?;
        }
        self.heap.meter.push(&mut out, rest)?;
        Ok(Value::Str(out.into()))
    }

    /// The part of a value that a field's attributes and items name.
    fn follow_field(&mut self, mut value: Value, path: &str) -> Fallible<Value> {
        let mut rest = path;
        while !rest.is_empty() {
            if let Some(after) = rest.strip_prefix('.') {
                let (name, after) = after.split_at(after.find(['.', '[']).unwrap_or(after.len()));
                value = self.attribute(&value, name)?;
                rest = after;
            } else {
                let inside = rest.strip_prefix('[').ok_or("format: expected \".\" or \"[\" after \"]\"")?;
                let (key, after) = inside.split_once(']').ok_or("format: a field's item has no end")?;
                self.heap.meter.memory(key.len())?;
                let key = key.parse().map(Value::Int).unwrap_or(Value::text(key));
                value = self.item(&value, &key)?;
                rest = after;
            }
        }
        value.defined()
    }
}

fn cased(text: &str, name: &str) -> String {
    match name {
        "upper" => text.to_uppercase(),
        "lower" | "casefold" => text.to_lowercase(),
        _ => {
            let mut out = String::with_capacity(text.len());
            let mut starts = true;
            for c in text.chars() {
                let upper = match name {
                    "swapcase" => c.is_lowercase(),
                    _ => starts,
                };
                if upper {
                    out.extend(c.to_uppercase())
                } else {
                    out.extend(c.to_lowercase())
                }
                starts = name == "title" && !c.is_alphabetic();
            }
            out
        }
    }
}

/// Converts the arguments `start` and `end`, in characters, to a range of bytes.
fn range(text: &str, start: Option<Value>, end: Option<Value>) -> Fallible<Option<(usize, usize)>> {
    if start.is_none() && end.is_none() {
        return Ok(Some((0, text.len())));
    }
    let length = text.chars().count() as i64;
    let place = |at: i64| if at < 0 { at.saturating_add(length).max(0) } else { at };
    let (from, to) = (place(number(start, "start", 0)?), place(number(end, "end", length)?).min(length));
    if from > to {
        return Ok(None);
    }
    let byte = |n: i64| text.char_indices().nth(n as usize).map_or(text.len(), |(at, _)| at);
    Ok(Some((byte(from), byte(to))))
}

fn split(
    heap: &mut Heap,
    subject: &str,
    by: Option<Value>,
    max_splits: usize,
    from_end: bool,
) -> Fallible<Value> {
    let by = match by {
        None | Some(Value::None) => None,
        by => Some(text(by, "split")?),
    };
    let mut items = Vec::new();
    let mut rest = if by.is_some() {
        subject
    } else if from_end {
        subject.trim_end_matches(is_space)
    } else {
        subject.trim_start_matches(is_space)
    };
    if by.as_ref().is_some_and(|by| by.is_empty()) {
        return Err("split: the separator is empty".into());
    }
    if by.is_none() && rest.is_empty() {
        return heap.meter.list(items);
    }
    loop {
        let cut = match (&by, from_end) {
            _ if items.len() == max_splits => None,
            (Some(by), false) => rest.split_once(&**by),
            (Some(by), true) => rest.rsplit_once(&**by),
            (None, false) => rest.split_once(is_space).map(|(a, b)| (a, b.trim_start_matches(is_space))),
            (None, true) => rest.rsplit_once(is_space).map(|(a, b)| (a.trim_end_matches(is_space), b)),
        };
        let (piece, after) = match cut {
            Some((a, b)) if from_end => (b, Some(a)),
            Some((a, b)) => (a, Some(b)),
            None => (rest, None),
        };
        heap.meter.memory(64 + piece.len())?;
        items.push(Value::text(piece));
        match after {
            // White space at the end of the text does not separate.
            Some("") if by.is_none() => break,
            Some(after) => rest = after,
            None => break,
        }
    }
    if from_end {
        items.reverse();
    }
    heap.meter.list(items)
}

fn is(text: &str, name: &str) -> bool {
    let all = |test: fn(char) -> bool| !text.is_empty() && text.chars().all(test);
    match name {
        "isalnum" => all(char::is_alphanumeric),
        "isalpha" => all(char::is_alphabetic),
        "isascii" => text.is_ascii(),
        "isdecimal" | "isdigit" | "isnumeric" => all(char::is_numeric),
        "isspace" => all(is_space),
        "isprintable" => !text.chars().any(char::is_control),
        "isidentifier" => {
            all(|c| c.is_alphanumeric() || c == '_') && !text.starts_with(|c: char| c.is_numeric())
        }
        "islower" => text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase),
        "isupper" => text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase),
        _ => {
            let mut cased = false;
            let mut any = false;
            let right = text.chars().all(|c| {
                let right = if c.is_uppercase() { !cased } else { !c.is_lowercase() || cased };
                cased = c.is_uppercase() || c.is_lowercase();
                any |= cased;
                right
            });
            any && right
        }
    }
}
