//! Converts values to text: Python's `str` and `repr`, `json.dumps`, the operator `%` and `str.format`.

use std::rc::Rc;
use std::sync::Arc;

use super::value::{Fallible, List, Meter, Value};

/// Maximum digits after the decimal point. No float has more.
const MAX_PRECISION: usize = 1100;

/// Maximum depth of nested namespaces in output. A namespace can contain itself.
const MAX_DEPTH: usize = 200;

/// What values refer to, and what has been taken.
#[derive(Debug)]
pub struct Heap {
    pub meter: Meter,
    pub namespaces: Vec<Vec<(Arc<str>, Value)>>,
}

/// Formatting options of JSON.
pub struct Json<'a> {
    pub ascii: bool,
    pub indent: Option<String>,
    pub item: &'a str,
    pub key: &'a str,
    pub sort: bool,
}

impl Heap {
    /// Converts a value like Python's `str`.
    pub fn str(&mut self, value: &Value) -> Fallible<Arc<str>> {
        if let Value::Str(text) = value {
            return Ok(text.clone());
        }
        let mut out = String::new();
        self.write(&mut out, value)?;
        Ok(out.into())
    }

    /// Appends the result of [`Heap::str`].
    pub fn write(&mut self, out: &mut String, value: &Value) -> Fallible<()> {
        match value {
            Value::Str(text) => self.meter.push(out, text),
            Value::Undefined(_) => Ok(()),
            _ => self.repr(out, value, 0),
        }
    }

    pub fn repr(&mut self, out: &mut String, value: &Value, depth: usize) -> Fallible<()> {
        if depth > MAX_DEPTH {
            return Err(format!("writes a value that is deeper than {MAX_DEPTH} levels"));
        }
        self.meter.work(1)?;
        match value {
            Value::Undefined(_) => self.meter.push(out, "Undefined"),
            Value::None => self.meter.push(out, "None"),
            Value::Bool(b) => self.meter.push(out, if *b { "True" } else { "False" }),
            Value::Int(i) => self.meter.push(out, &i.to_string()),
            Value::Float(f) => self.meter.push(out, &float(*f)),
            Value::Str(text) => self.quote(out, text),
            Value::List(list) => {
                let (open, close) = match (list.tuple, list.items.len()) {
                    (true, 1) => ("(", ",)"),
                    (true, _) => ("(", ")"),
                    _ => ("[", "]"),
                };
                self.meter.push(out, open)?;
                for (i, item) in list.items.iter().enumerate() {
                    self.meter.push(out, if i > 0 { ", " } else { "" })?;
                    self.repr(out, item, depth + 1)?;
                }
                self.meter.push(out, close)
            }
            Value::Dict(dict) => self.pairs(out, &dict.entries, depth),
            Value::Namespace(id) => {
                self.meter.items(self.namespaces[*id].len())?;
                let entries = self.namespaces[*id].clone();
                let entries: Vec<_> = entries.into_iter().map(|(k, v)| (Value::Str(k), v)).collect();
                self.meter.push(out, "<Namespace ")?;
                self.pairs(out, &entries, depth)?;
                self.meter.push(out, ">")
            }
            Value::Macro(_) | Value::Loop(_) | Value::Method(_) | Value::Function(_) => {
                self.meter.push(out, &format!("<{}>", value.kind()))
            }
        }
    }

    fn pairs(&mut self, out: &mut String, entries: &[(Value, Value)], depth: usize) -> Fallible<()> {
        self.meter.push(out, "{")?;
        for (i, (key, value)) in entries.iter().enumerate() {
            self.meter.push(out, if i > 0 { ", " } else { "" })?;
            self.repr(out, key, depth + 1)?;
            self.meter.push(out, ": ")?;
            self.repr(out, value, depth + 1)?;
        }
        self.meter.push(out, "}")
    }

    fn quote(&mut self, out: &mut String, text: &str) -> Fallible<()> {
        let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
        let mut quoted = String::new();
        // An escape has at most ten characters.
        self.meter.read(text.len())?;
        self.meter.text(text.len())?;
        quoted.push(quote);
        for c in text.chars() {
            match c {
                '\n' => quoted.push_str("\\n"),
                '\r' => quoted.push_str("\\r"),
                '\t' => quoted.push_str("\\t"),
                '\\' => quoted.push_str("\\\\"),
                _ if c == quote => quoted.extend(['\\', c]),
                _ if is_printable(c) => quoted.push(c),
                _ => {
                    let code = c as u32;
                    quoted.push_str(&match code {
                        0..=0xff => format!("\\x{code:02x}"),
                        0x100..=0xffff => format!("\\u{code:04x}"),
                        _ => format!("\\U{code:08x}"),
                    });
                }
            }
            if quoted.len() > 4096 {
                self.meter.push(out, &quoted)?;
                quoted.clear();
            }
        }
        quoted.push(quote);
        self.meter.push(out, &quoted)
    }

    /// Appends JSON like Python's `json.dumps`.
    pub fn json(&mut self, out: &mut String, value: &Value, style: &Json, level: usize) -> Fallible<()> {
        self.meter.work(1)?;
        let line = |heap: &mut Heap, out: &mut String, level: usize| match &style.indent {
            Some(indent) => {
                heap.meter.push(out, "\n")?;
                heap.meter.push_many(out, indent, level)
            }
            None => Ok(()),
        };
        match value {
            Value::None => self.meter.push(out, "null"),
            Value::Bool(b) => self.meter.push(out, if *b { "true" } else { "false" }),
            Value::Int(i) => self.meter.push(out, &i.to_string()),
            Value::Float(f) => self.meter.push(out, &json_float(*f)),
            Value::Str(text) => self.json_text(out, text, style.ascii),
            Value::List(list) if list.items.is_empty() => self.meter.push(out, "[]"),
            Value::List(list) => {
                self.meter.push(out, "[")?;
                for (i, item) in list.items.iter().enumerate() {
                    self.meter.push(out, if i > 0 { style.item } else { "" })?;
                    line(self, out, level + 1)?;
                    self.json(out, item, style, level + 1)?;
                }
                line(self, out, level)?;
                self.meter.push(out, "]")
            }
            Value::Dict(dict) if dict.entries.is_empty() => self.meter.push(out, "{}"),
            Value::Dict(dict) => {
                let mut entries: Vec<&(Value, Value)> = dict.entries.iter().collect();
                if style.sort {
                    let keyed = entries.iter().map(|entry| (entry.0.clone(), *entry)).collect();
                    entries = self.meter.sort(keyed, false)?;
                }
                self.meter.push(out, "{")?;
                for (i, (key, value)) in entries.into_iter().enumerate() {
                    self.meter.push(out, if i > 0 { style.item } else { "" })?;
                    line(self, out, level + 1)?;
                    let key = match key {
                        Value::Str(text) => text.clone(),
                        Value::None => "null".into(),
                        Value::Bool(b) => (if *b { "true" } else { "false" }).into(),
                        Value::Int(i) => i.to_string().into(),
                        Value::Float(f) => json_float(*f).into(),
                        _ => return Err(format!("tojson: a {} cannot be a key", key.kind())),
                    };
                    self.json_text(out, &key, style.ascii)?;
                    self.meter.push(out, style.key)?;
                    self.json(out, value, style, level + 1)?;
                }
                line(self, out, level)?;
                self.meter.push(out, "}")
            }
            _ => Err(format!("tojson: a {} is not JSON", value.kind())),
        }
    }

    fn json_text(&mut self, out: &mut String, text: &str, ascii: bool) -> Fallible<()> {
        self.meter.read(text.len())?;
        self.meter.push(out, "\"")?;
        // Append characters that need no escape in one piece.
        let mut rest = text;
        while let Some(at) =
            rest.find(|c: char| c < ' ' || matches!(c, '"' | '\\') || (ascii && !c.is_ascii()))
        {
            self.meter.push(out, &rest[..at])?;
            let c = rest[at..].chars().next().unwrap_or_default();
            rest = &rest[at + c.len_utf8()..];
            let escape = match c {
                '"' => "\\\"".into(),
                '\\' => "\\\\".into(),
                '\n' => "\\n".into(),
                '\r' => "\\r".into(),
                '\t' => "\\t".into(),
                '\x08' => "\\b".into(),
                '\x0c' => "\\f".into(),
                _ => c
                    .encode_utf16(&mut [0; 2])
                    .iter()
                    .map(|unit| format!("\\u{unit:04x}"))
                    .collect::<String>(),
            };
            self.meter.push(out, &escape)?;
        }
        self.meter.push(out, rest)?;
        self.meter.push(out, "\"")
    }

    /// Evaluates `text % arguments`.
    pub fn percent(&mut self, text: &str, arguments: &Value) -> Fallible<Value> {
        let single = Rc::new(List::of(arguments.clone()));
        let (list, is_tuple) = match arguments {
            Value::List(list) if list.tuple => (list.clone(), true),
            _ => (single, false),
        };
        let mut items = list.items.iter();
        let mut next = || items.next().cloned().ok_or("not enough values for a format");
        let mut out = String::new();
        let mut rest = text;
        let mut named = false;
        while let Some(at) = rest.find('%') {
            self.meter.push(&mut out, &rest[..at])?;
            rest = &rest[at + 1..];
            let mut picked = None;
            if let Some(after) = rest.strip_prefix('(') {
                let end = after.find(')').ok_or("a format's key has no end")?;
                let Value::Dict(dict) = arguments else {
                    return Err("a format with keys needs a dict".into());
                };
                let key = &after[..end];
                picked = Some(dict.text(&key.into()).cloned().ok_or_else(|| format!("no key {key:?}"))?);
                named = true;
                rest = &after[end + 1..];
            }
            let mut spec = Spec { align: '>', fill: ' ', ..Spec::default() };
            let mut zero = false;
            while let Some(flag) = rest.chars().next().filter(|c| "#0- +".contains(*c)) {
                match flag {
                    '#' => spec.alternate = true,
                    '0' => zero = true,
                    '-' => spec.align = '<',
                    ' ' if spec.sign.is_none() => spec.sign = Some(' '),
                    '+' => spec.sign = Some('+'),
                    _ => {}
                }
                rest = &rest[1..];
            }
            let mut number = |rest: &mut &str| -> Fallible<Option<i64>> {
                if let Some(after) = rest.strip_prefix('*') {
                    *rest = after;
                    return next()?.int().map(Some).ok_or_else(|| "* wants an int".into());
                }
                digits(rest).map(|n| n.map(|n| n as i64))
            };
            if let Some(width) = number(&mut rest)? {
                if width < 0 {
                    spec.align = '<';
                }
                spec.width = width.unsigned_abs() as usize;
            }
            if let Some(after) = rest.strip_prefix('.') {
                rest = after;
                spec.precision = Some(usize::try_from(number(&mut rest)?.unwrap_or(0)).unwrap_or(0));
            }
            rest = rest.strip_prefix(['l', 'h', 'L']).unwrap_or(rest);
            let kind = rest.chars().next().ok_or("a format has no end")?;
            rest = &rest[kind.len_utf8()..];
            if kind == '%' {
                self.meter.push(&mut out, "%")?;
                continue;
            }
            let value = match picked {
                Some(value) => value,
                None => next()?,
            };
            if zero && spec.align != '<' && !matches!(kind, 's' | 'r' | 'a' | 'c') {
                (spec.align, spec.fill) = ('=', '0');
            }
            match kind {
                's' => {
                    let text = self.str(&value)?;
                    self.padded(&mut out, "", spec.cut(&text), &spec)?;
                }
                'r' | 'a' => {
                    let mut text = String::new();
                    self.repr(&mut text, &value, 0)?;
                    self.padded(&mut out, "", spec.cut(&text), &spec)?;
                }
                'c' => {
                    let c = match &value {
                        Value::Str(s) => Some(s.to_string()).filter(|s| s.chars().count() == 1),
                        Value::Int(i) => u32::try_from(*i).ok().and_then(char::from_u32).map(String::from),
                        _ => None,
                    };
                    self.padded(&mut out, "", &c.ok_or("%c wants a character")?, &spec)?;
                }
                'd' | 'i' | 'u' => {
                    let value = match value {
                        Value::Float(f) if f.abs() < 9e18 => Value::Int(f as i64),
                        value => value,
                    };
                    self.number(&mut out, &value, 'd', &spec)?;
                }
                'x' | 'X' | 'o' | 'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
                    self.number(&mut out, &value, kind, &spec)?;
                }
                _ => return Err(format!("unknown format %{kind}")),
            }
        }
        self.meter.push(&mut out, rest)?;
        let whole = matches!(arguments, Value::Dict(_) | Value::List(_)) && !is_tuple;
        if !named && !whole && items.next().is_some() {
            return Err("too many values for a format".into());
        }
        Ok(Value::Str(out.into()))
    }

    /// Appends a number in format `d`, `x`, `o`, `b`, `e`, `f`, `g` or `%`.
    fn number(&mut self, out: &mut String, value: &Value, kind: char, spec: &Spec) -> Fallible<()> {
        let wrong = || format!("a {} cannot be formatted as %{kind}", value.kind());
        let precision = spec.precision.unwrap_or(6);
        if spec.precision.is_some_and(|p| p > MAX_PRECISION) {
            return Err(format!("formats more than {MAX_PRECISION} digits"));
        }
        let (negative, mut digits) = match kind {
            'd' | 'x' | 'X' | 'o' | 'b' => {
                let i = value.int().ok_or_else(wrong)?;
                let n = i.unsigned_abs();
                let (digits, mark) = match kind {
                    'x' => (format!("{n:x}"), "0x"),
                    'X' => (format!("{n:X}"), "0X"),
                    'o' => (format!("{n:o}"), "0o"),
                    'b' => (format!("{n:b}"), "0b"),
                    _ => (n.to_string(), ""),
                };
                let zeros = spec.precision.unwrap_or(0).saturating_sub(digits.len());
                let mark = if spec.alternate { mark } else { "" };
                (i < 0, format!("{mark}{}{digits}", "0".repeat(zeros)))
            }
            _ => {
                let f = value.float().ok_or_else(wrong)?;
                let positive = f.abs();
                let digits = match kind {
                    _ if f.is_nan() => "nan".into(),
                    _ if f.is_infinite() => "inf".into(),
                    'f' | 'F' => format!("{positive:.precision$}"),
                    '%' => format!("{:.precision$}%", positive * 100.0),
                    'e' | 'E' => exponent(positive, precision),
                    _ => general(positive, precision, spec.alternate),
                };
                let upper = kind.is_ascii_uppercase();
                (f.is_sign_negative() && !f.is_nan(), if upper { digits.to_uppercase() } else { digits })
            }
        };
        if let Some(separator) = spec.thousands {
            let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
            for at in (1..end).rev().filter(|at| (end - at) % 3 == 0) {
                digits.insert(at, separator);
            }
        }
        let sign = match spec.sign {
            _ if negative => "-",
            Some('+') => "+",
            Some(' ') => " ",
            _ => "",
        };
        self.padded(out, sign, &digits, spec)
    }

    /// Appends a text, padded to the width of its field.
    fn padded(&mut self, out: &mut String, sign: &str, text: &str, spec: &Spec) -> Fallible<()> {
        self.meter.read(text.len())?;
        let space = spec.width.saturating_sub(sign.len() + text.chars().count());
        let fill = String::from(spec.fill);
        let (left, inner, right) = match spec.align {
            '<' => (0, 0, space),
            '^' => (space / 2, 0, space - space / 2),
            '=' => (0, space, 0),
            _ => (space, 0, 0),
        };
        self.meter.push_many(out, &fill, left)?;
        self.meter.push(out, sign)?;
        self.meter.push_many(out, &fill, inner)?;
        self.meter.push(out, text)?;
        self.meter.push_many(out, &fill, right)
    }

    /// Appends a value, formatted by a format specification: the part of a field after the colon.
    pub fn formatted(&mut self, out: &mut String, value: &Value, text: &str) -> Fallible<()> {
        if text.is_empty() {
            return self.write(out, value);
        }
        let number = value.float().is_some() && !matches!(value, Value::Bool(_));
        let (mut spec, kind) = Spec::parse(text)?;
        if spec.align == '\0' {
            spec.align = if number { '>' } else { '<' };
        }
        match (value, kind) {
            (Value::Str(text), None | Some('s')) => {
                let text = text.clone();
                self.padded(out, "", spec.cut(&text), &spec)
            }
            (Value::Int(_), None) => self.number(out, value, 'd', &spec),
            (Value::Float(f), None) if spec.precision.is_none() => {
                let sign = if f.is_sign_negative() { "-" } else { "" };
                self.padded(out, sign, &float(f.abs()), &spec)
            }
            (Value::Int(_) | Value::Float(_) | Value::Bool(_), Some(kind)) => {
                self.number(out, value, if kind == 'n' { 'd' } else { kind }, &spec)
            }
            (Value::Float(_), None) => self.number(out, value, 'g', &spec),
            _ => Err(format!("format: a {} has no format {text:?}", value.kind())),
        }
    }
}

/// A parsed format specification.
#[derive(Default)]
struct Spec {
    fill: char,
    align: char,
    sign: Option<char>,
    alternate: bool,
    width: usize,
    thousands: Option<char>,
    precision: Option<usize>,
}

impl Spec {
    fn parse(text: &str) -> Fallible<(Spec, Option<char>)> {
        let mut spec = Spec { fill: ' ', ..Spec::default() };
        let mut rest = text;
        let chars: Vec<char> = text.chars().take(2).collect();
        let is_align = |c: Option<&char>| c.is_some_and(|c| "<>=^".contains(*c));
        if is_align(chars.get(1)) {
            (spec.fill, spec.align) = (chars[0], chars[1]);
            rest = &rest[chars[0].len_utf8() + 1..];
        } else if is_align(chars.first()) {
            spec.align = chars[0];
            rest = &rest[1..];
        }
        if let Some(sign) = rest.chars().next().filter(|c| "+- ".contains(*c)) {
            spec.sign = Some(sign);
            rest = &rest[1..];
        }
        if let Some(after) = rest.strip_prefix('#') {
            (spec.alternate, rest) = (true, after);
        }
        if rest.starts_with('0') && spec.align == '\0' {
            (spec.fill, spec.align) = ('0', '=');
        }
        spec.width = digits(&mut rest)?.unwrap_or(0);
        if let Some(separator) = rest.chars().next().filter(|c| matches!(c, ',' | '_')) {
            spec.thousands = Some(separator);
            rest = &rest[1..];
        }
        if let Some(after) = rest.strip_prefix('.') {
            rest = after;
            spec.precision = Some(digits(&mut rest)?.ok_or("format: a precision has no digits")?);
        }
        let mut rest = rest.chars();
        let kind = rest.next();
        if rest.next().is_some() || kind.is_some_and(|k| !"sdxXobeEfFgGn%".contains(k)) {
            return Err(format!("format: unknown format {text:?}"));
        }
        Ok((spec, kind))
    }

    /// Cuts a text to the precision.
    fn cut<'a>(&self, text: &'a str) -> &'a str {
        let end = self.precision.and_then(|n| text.char_indices().nth(n));
        end.map_or(text, |(end, _)| &text[..end])
    }
}

fn digits(rest: &mut &str) -> Fallible<Option<usize>> {
    let length = rest.bytes().take_while(u8::is_ascii_digit).count();
    let (number, after) = rest.split_at(length);
    *rest = after;
    if number.is_empty() {
        return Ok(None);
    }
    number.parse().map(Some).map_err(|_| format!("{number} is too large a width"))
}

/// Whether a character is printable, like Python's `str.isprintable`. `escape_debug` has the tables.
fn is_printable(c: char) -> bool {
    // `escape_debug` escapes combining characters only at the start of a text.
    !['a', c].iter().collect::<String>().escape_debug().nth(1).is_some_and(|first| first == '\\' && c != '\\')
        || matches!(c, '\'' | '"')
}

/// Formats a float like Python's `repr`: the shortest digits that parse to the same number.
pub fn float(f: f64) -> String {
    if f.is_nan() {
        return "nan".into();
    }
    if f.is_infinite() {
        return if f > 0.0 { "inf" } else { "-inf" }.into();
    }
    let scientific = format!("{f:e}");
    let (mantissa, power) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let power: i32 = power.parse().unwrap_or(0);
    if (-4..16).contains(&power) {
        let plain = f.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    format!("{mantissa}e{}{:02}", if power < 0 { '-' } else { '+' }, power.abs())
}

fn json_float(f: f64) -> String {
    match float(f).as_str() {
        "nan" => "NaN".into(),
        "inf" => "Infinity".into(),
        "-inf" => "-Infinity".into(),
        text => text.into(),
    }
}

fn exponent(f: f64, precision: usize) -> String {
    let text = format!("{f:.precision$e}");
    let (mantissa, power) = text.split_once('e').unwrap_or((&text, "0"));
    let power: i32 = power.parse().unwrap_or(0);
    format!("{mantissa}e{}{:02}", if power < 0 { '-' } else { '+' }, power.abs())
}

fn general(f: f64, precision: usize, keep_zeros: bool) -> String {
    let precision = precision.max(1);
    let text = exponent(f, precision - 1);
    let (mantissa, power_text) = text.split_once('e').unwrap_or((&text, "0"));
    let power: i64 = power_text.parse().unwrap_or(0);
    let trim = |digits: &str| match digits.contains('.') && !keep_zeros {
        true => digits.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => digits.to_string(),
    };
    if power < -4 || power >= precision as i64 {
        return format!("{}e{power_text}", trim(mantissa));
    }
    trim(&format!("{f:.*}", (precision as i64 - 1 - power) as usize))
}
