//! Jinja2's filters and tests, except those that produce HTML, `pprint` and `random`.

use std::sync::Arc;

use super::eval::{CallArgs, Run};
use super::text::Json;
use super::value::{Fallible, Value, is_space};

/// Maximum digits of a text that is converted to an integer, as in Python.
const MAX_DIGITS: usize = 4300;

/// Converts an optional argument to an integer.
pub(super) fn whole(value: Option<Value>, name: &str) -> Fallible<Option<i64>> {
    match value {
        None | Some(Value::None) => Ok(None),
        Some(value) => {
            value.int().map(Some).ok_or_else(|| format!("{name}: expected an int, got a {}", value.kind()))
        }
    }
}

fn truth(value: Option<Value>) -> bool {
    value.is_some_and(|v| v.is_truthy())
}

/// An attribute path, such as `a.0.b`.
type Path = Vec<Value>;

impl Run<'_> {
    pub fn filter(&mut self, name: &str, value: Value, args: CallArgs) -> Fallible<Value> {
        self.heap.meter.work(1)?;
        // Filters such as `map` call other filters, so the depth is limited.
        self.nested(|run| run.any_filter(name, value, args))
    }

    fn any_filter(&mut self, name: &str, value: Value, args: CallArgs) -> Fallible<Value> {
        match name {
            "default" | "d" => {
                let [default, boolean] = args.bind(["default_value", "boolean"])?;
                let missing = matches!(value, Value::Undefined(_)) || (truth(boolean) && !value.is_truthy());
                Ok(if missing { default.unwrap_or(Value::text("")) } else { value })
            }
            "string" | "safe" => Ok(Value::Str(self.heap.str(&value)?)),
            "length" | "count" => self.length(&value).map(|n| Value::Int(n as i64)),
            "tojson" => self.json_filter(&value, args),
            "upper" | "lower" | "capitalize" | "title" | "trim" | "replace" | "indent" | "center"
            | "format" | "truncate" | "wordcount" | "escape" | "e" | "urlencode" => {
                self.text_filter(name, value, args)
            }
            "abs" | "int" | "float" | "round" => self.number_filter(name, value, args),
            // These filters accept every false value as an empty list.
            "map" | "select" | "reject" | "selectattr" | "rejectattr" if !value.is_truthy() => {
                self.heap.meter.list(Vec::new())
            }
            "map" => self.map(&value, args),
            "select" | "reject" => self.select(&value, args, name == "select", false),
            "selectattr" | "rejectattr" => self.select(&value, args, name == "selectattr", true),
            _ => self.list_filter(name, value, args),
        }
    }

    fn length(&mut self, value: &Value) -> Fallible<usize> {
        match value {
            Value::Str(text) => {
                self.heap.meter.read(text.len())?;
                Ok(text.chars().count())
            }
            Value::List(list) => Ok(list.items.len()),
            Value::Dict(dict) => Ok(dict.entries.len()),
            Value::Undefined(_) => Ok(0),
            Value::Loop(l) => Ok(l.items.items.len()),
            _ => Err(format!("a {} has no length", value.kind())),
        }
    }

    fn json_filter(&mut self, value: &Value, args: CallArgs) -> Fallible<Value> {
        let [ascii, indent, separators, sort] =
            args.bind(["ensure_ascii", "indent", "separators", "sort_keys"])?;
        let indent = match indent {
            None | Some(Value::None) => None,
            Some(Value::Str(text)) => Some(text.to_string()),
            Some(width) => {
                let width = width.int().ok_or("tojson: expected an int or a str as indent")?;
                let mut indent = String::new();
                self.heap.meter.push_many(&mut indent, " ", usize::try_from(width).unwrap_or(0))?;
                Some(indent)
            }
        };
        let (item, key) = match separators {
            None | Some(Value::None) => ((if indent.is_some() { "," } else { ", " }).into(), ": ".into()),
            Some(pair) => match &self.iterate(&pair)?.items[..] {
                [Value::Str(item), Value::Str(key)] => (item.clone(), key.clone()),
                _ => return Err("tojson: expected two strs as separators".into()),
            },
        };
        let style = Json { ascii: truth(ascii), indent, item: &item, key: &key, sort: truth(sort) };
        let mut out = String::new();
        self.heap.json(&mut out, value, &style, 0)?;
        Ok(Value::Str(out.into()))
    }

    fn text_filter(&mut self, name: &str, value: Value, args: CallArgs) -> Fallible<Value> {
        if name == "urlencode" {
            return self.url_encode(&value);
        }
        let text = self.heap.str(&value)?;
        match name {
            "upper" | "lower" | "capitalize" | "replace" => self.method(&Value::Str(text), name, args),
            "trim" => self.method(&Value::Str(text), "strip", args),
            "center" => {
                let [width] = args.bind(["width"])?;
                let positional = vec![width.unwrap_or(Value::Int(80))];
                self.method(&Value::Str(text), name, CallArgs { positional, ..CallArgs::default() })
            }
            "format" if args.named.is_empty() => {
                let arguments = self.heap.meter.sequence(args.positional, true)?;
                self.heap.percent(&text, &arguments)
            }
            "format" => {
                let pairs = args.named.into_iter().map(|(name, value)| (Value::Str(name), value)).collect();
                let arguments = self.heap.meter.dict(pairs)?;
                self.heap.percent(&text, &arguments)
            }
            "title" => {
                self.heap.meter.text(text.len().saturating_mul(3))?;
                let mut out = String::with_capacity(text.len());
                let mut starts = true;
                for c in text.chars() {
                    if starts {
                        out.extend(c.to_uppercase())
                    } else {
                        out.extend(c.to_lowercase())
                    }
                    starts = is_space(c) || "-({[<".contains(c);
                }
                Ok(Value::Str(out.into()))
            }
            "wordcount" => {
                self.heap.meter.read(text.len())?;
                let words = text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|w| !w.is_empty());
                Ok(Value::Int(words.count() as i64))
            }
            "indent" => {
                let [width, first, blank] = args.bind(["width", "first", "blank"])?;
                let indent = match width {
                    Some(Value::Str(text)) => text,
                    width => {
                        let mut indent = String::new();
                        let width = whole(width, name)?.unwrap_or(4);
                        self.heap.meter.push_many(&mut indent, " ", usize::try_from(width).unwrap_or(0))?;
                        indent.into()
                    }
                };
                let (first, blank) = (truth(first), truth(blank));
                let mut out = String::new();
                let text = format!("{text}\n");
                for (i, (line, _)) in super::methods::lines(&text).enumerate() {
                    self.heap.meter.push(&mut out, if i > 0 { "\n" } else { "" })?;
                    let indents = if i == 0 { first } else { blank || !line.is_empty() };
                    self.heap.meter.push(&mut out, if indents { &indent } else { "" })?;
                    self.heap.meter.push(&mut out, line)?;
                }
                Ok(Value::Str(out.into()))
            }
            "truncate" => {
                let [length, kill, end, leeway] = args.bind(["length", "killwords", "end", "leeway"])?;
                let length = whole(length, name)?.unwrap_or(255).max(0) as usize;
                let leeway = whole(leeway, name)?.unwrap_or(5).max(0) as usize;
                let end = self.heap.str(&end.unwrap_or(Value::text("...")))?;
                self.heap.meter.read(text.len())?;
                if text.chars().count() <= length.saturating_add(leeway) {
                    return Ok(Value::Str(text));
                }
                let keep = length.checked_sub(end.chars().count()).ok_or("truncate: the end is too long")?;
                let cut = text.char_indices().nth(keep).map_or(text.len(), |(at, _)| at);
                let mut kept = &text[..cut];
                if !truth(kill) {
                    kept = kept.rsplit_once(' ').map_or(kept, |(words, _)| words);
                }
                self.heap.meter.text(kept.len() + end.len())?;
                Ok(Value::Str(format!("{kept}{end}").into()))
            }
            _ => {
                let mut out = String::new();
                let mut rest = &*text;
                while let Some(at) = rest.find(['&', '<', '>', '\'', '"']) {
                    self.heap.meter.push(&mut out, &rest[..at])?;
                    let escape = match rest.as_bytes()[at] {
                        b'&' => "&amp;",
                        b'<' => "&lt;",
                        b'>' => "&gt;",
                        b'"' => "&#34;",
                        _ => "&#39;",
                    };
                    self.heap.meter.push(&mut out, escape)?;
                    rest = &rest[at + 1..];
                }
                self.heap.meter.push(&mut out, rest)?;
                Ok(Value::Str(out.into()))
            }
        }
    }

    fn url_encode(&mut self, value: &Value) -> Fallible<Value> {
        let mut out = String::new();
        let pairs = match value {
            Value::Dict(dict) => dict.entries.clone(),
            Value::List(list) => {
                let mut pairs = Vec::new();
                for item in &list.items {
                    match &self.iterate(item)?.items[..] {
                        [key, value] => pairs.push((key.clone(), value.clone())),
                        _ => return Err("urlencode: expected pairs".into()),
                    }
                }
                pairs
            }
            value => {
                let text = self.heap.str(value)?;
                self.url_quote(&mut out, &text, false)?;
                return Ok(Value::Str(out.into()));
            }
        };
        for (i, (key, value)) in pairs.iter().enumerate() {
            let (key, value) = (self.heap.str(key)?, self.heap.str(value)?);
            self.heap.meter.push(&mut out, if i > 0 { "&" } else { "" })?;
            self.url_quote(&mut out, &key, true)?;
            self.heap.meter.push(&mut out, "=")?;
            self.url_quote(&mut out, &value, true)?;
        }
        Ok(Value::Str(out.into()))
    }

    fn url_quote(&mut self, out: &mut String, text: &str, query: bool) -> Fallible<()> {
        self.heap.meter.text(text.len().saturating_mul(3))?;
        for byte in text.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => out.push(byte as char),
                b'/' if !query => out.push('/'),
                b' ' if query => out.push('+'),
                _ => out.push_str(&format!("%{byte:02X}")),
            }
        }
        self.heap.meter.push(out, "")
    }

    fn number_filter(&mut self, name: &str, value: Value, args: CallArgs) -> Fallible<Value> {
        let value = value.defined()?;
        match name {
            "abs" => match (value.int(), &value) {
                (Some(i), _) => i.checked_abs().map(Value::Int).ok_or("an integer is out of range".into()),
                (None, Value::Float(f)) => Ok(Value::Float(f.abs())),
                _ => Err(format!("abs: expected a number, got a {}", value.kind())),
            },
            "int" => {
                let [default, base] = args.bind(["default", "base"])?;
                let base = whole(base, name)?.unwrap_or(10);
                Ok(match self.read_int(&value, base)? {
                    Some(i) => Value::Int(i),
                    None => default.unwrap_or(Value::Int(0)),
                })
            }
            "float" => {
                let [default] = args.bind(["default"])?;
                let number = match &value {
                    Value::Str(text) => self.read_float(text)?,
                    value => value.float(),
                };
                Ok(number.map(Value::Float).unwrap_or(default.unwrap_or(Value::Float(0.0))))
            }
            _ => {
                let [precision, method] = args.bind(["precision", "method"])?;
                let precision = whole(precision, name)?.unwrap_or(0);
                let method = self.heap.str(&method.unwrap_or(Value::text("common")))?;
                let Some(f) = value.float() else {
                    return Err(format!("round: expected a number, got a {}", value.kind()));
                };
                // A float has no digits outside this range.
                let precision = precision.clamp(-400, 400) as i32;
                let scale = 10f64.powi(precision);
                let rounded = match &*method {
                    "common" => match value.int() {
                        Some(i) if precision >= 0 => return Ok(Value::Int(i)),
                        Some(i) => {
                            let step = 10i64.checked_pow(precision.unsigned_abs());
                            let Some(step) = step else { return Ok(Value::Int(0)) };
                            let (low, rest) = (i - i.rem_euclid(step), i.rem_euclid(step));
                            let up = rest * 2 > step || (rest * 2 == step && (low / step) % 2 != 0);
                            return Ok(Value::Int(if up { low.saturating_add(step) } else { low }));
                        }
                        None if precision >= 0 => format!("{f:.*}", precision as usize).parse().unwrap_or(f),
                        None if precision < -308 => 0.0 * f,
                        None => (f * scale).round_ties_even() / scale,
                    },
                    "ceil" => (f * scale).ceil() / scale,
                    "floor" => (f * scale).floor() / scale,
                    _ => return Err("round: the method must be common, ceil or floor".into()),
                };
                Ok(Value::Float(rounded))
            }
        }
    }

    /// Converts a value like Python's `int`, or else like `int(float(value))`.
    fn read_int(&mut self, value: &Value, base: i64) -> Fallible<Option<i64>> {
        let text = match value {
            Value::Str(text) => text.trim_matches(is_space),
            Value::Float(f) => return Ok(float_to_int(*f)),
            value => return Ok(value.int()),
        };
        self.heap.meter.read(text.len())?;
        if text.len() > MAX_DIGITS {
            return Ok(None);
        }
        let (sign, digits) = match text.strip_prefix('-') {
            Some(digits) => ("-", digits),
            None => ("", text.strip_prefix('+').unwrap_or(text)),
        };
        let lower = digits.to_ascii_lowercase();
        let mark = [("0x", 16), ("0o", 8), ("0b", 2)].into_iter().find(|(mark, _)| lower.starts_with(mark));
        let (digits, base) = match mark {
            Some((_, radix)) if base == radix || base == 0 => (&lower[2..], radix),
            _ => (&lower[..], if base == 0 { 10 } else { base }),
        };
        let clean = digits.replace('_', "");
        let spaced = digits.starts_with('_') || digits.ends_with('_') || digits.contains("__");
        let signed = clean.starts_with(['+', '-']);
        if (2..=36).contains(&base) && !spaced && !signed && !clean.is_empty() {
            let is_digit = |c: char| c.is_digit(base as u32);
            if clean.chars().all(is_digit) {
                let parsed = i64::from_str_radix(&format!("{sign}{clean}"), base as u32);
                return parsed.map(Some).map_err(|_| "int: an integer is out of range".into());
            }
        }
        Ok(self.read_float(text)?.and_then(float_to_int))
    }

    fn read_float(&mut self, text: &str) -> Fallible<Option<f64>> {
        self.heap.meter.read(text.len())?;
        let text = text.trim_matches(is_space);
        if text.starts_with('_') || text.ends_with('_') || text.contains("__") {
            return Ok(None);
        }
        Ok(text.replace('_', "").parse().ok())
    }

    fn list_filter(&mut self, name: &str, value: Value, args: CallArgs) -> Fallible<Value> {
        match name {
            "list" => {
                let list = self.iterate(&value)?;
                if list.tuple { self.copy(&list.items) } else { Ok(Value::List(list)) }
            }
            "first" | "last" => {
                let list = self.iterate(&value)?;
                let item = if name == "first" { list.items.first() } else { list.items.last() };
                match item {
                    Some(item) => Ok(item.clone()),
                    None => self.undefined("an item of nothing"),
                }
            }
            "join" => {
                let [between, attribute] = args.bind(["d", "attribute"])?;
                let between = self.heap.str(&between.unwrap_or(Value::text("")))?;
                let path = self.path(attribute)?;
                let list = self.iterate(&value)?;
                let mut out = String::new();
                for (i, item) in list.items.iter().enumerate() {
                    self.heap.meter.push(&mut out, if i > 0 { &between } else { "" })?;
                    let item = self.follow(item, &path, None)?;
                    self.heap.write(&mut out, &item)?;
                }
                Ok(Value::Str(out.into()))
            }
            "items" => match value {
                Value::Undefined(_) => self.heap.meter.list(Vec::new()),
                value @ Value::Dict(_) => self.method(&value, "items", args),
                value => Err(format!("items: expected a dict, got a {}", value.kind())),
            },
            "attr" => {
                let [name] = args.bind(["name"])?;
                let name = self.heap.str(&name.ok_or("attr: expected a name")?)?;
                match value {
                    Value::Dict(_) if !super::methods::has(&value, &name) => self.undefined(&name),
                    value => self.attribute(&value, &name),
                }
            }
            "reverse" => match &value {
                Value::Str(text) => {
                    self.heap.meter.text(text.len())?;
                    Ok(Value::Str(text.chars().rev().collect::<String>().into()))
                }
                value => {
                    let list = self.iterate(value)?;
                    self.heap.meter.check_items(list.items.len())?;
                    let items = list.items.iter().rev().cloned().collect();
                    self.heap.meter.list(items)
                }
            },
            "sort" => {
                let [reverse, case, attribute] = args.bind(["reverse", "case_sensitive", "attribute"])?;
                let sorted = self.sorted(&value, truth(case), attribute, truth(reverse))?;
                self.heap.meter.list(sorted)
            }
            "dictsort" => {
                let [case, by, reverse] = args.bind(["case_sensitive", "by", "reverse"])?;
                let Value::Dict(dict) = value.defined()? else {
                    return Err("dictsort: expected a dict".into());
                };
                let by = self.heap.str(&by.unwrap_or(Value::text("key")))?;
                let mut keyed = Vec::new();
                for (key, value) in &dict.entries {
                    let by = if &*by == "value" { value } else { key };
                    let by = if truth(case.clone()) { by.clone() } else { self.folded(by)? };
                    keyed.push((by, self.heap.meter.sequence(vec![key.clone(), value.clone()], true)?));
                }
                let sorted = self.heap.meter.sort(keyed, truth(reverse))?;
                self.heap.meter.list(sorted)
            }
            "unique" | "min" | "max" => {
                let [case, attribute] = args.bind(["case_sensitive", "attribute"])?;
                let path = self.path(attribute)?;
                let list = self.iterate(&value)?;
                let mut seen = std::collections::HashSet::new();
                let mut kept: Vec<(Value, Value)> = Vec::new();
                for item in &list.items {
                    let key = self.follow(item, &path, None)?;
                    let key = if truth(case.clone()) { key } else { self.folded(&key)? };
                    let keep = match kept.first() {
                        _ if name == "unique" => {
                            self.heap.meter.memory(64)?;
                            seen.insert(self.heap.meter.key(&key)?)
                        }
                        None => true,
                        Some((best, _)) => self.compare(if name == "min" { "<" } else { ">" }, &key, best)?,
                    };
                    if keep {
                        self.heap.meter.items(1)?;
                        if name != "unique" {
                            kept.clear();
                        }
                        kept.push((key, item.clone()));
                    }
                }
                match name {
                    "unique" => self.heap.meter.list(kept.into_iter().map(|(_, item)| item).collect()),
                    _ => match kept.pop() {
                        Some((_, item)) => Ok(item),
                        None => self.undefined("an item of nothing"),
                    },
                }
            }
            "sum" => {
                let [attribute, start] = args.bind(["attribute", "start"])?;
                let path = self.path(attribute)?;
                let mut total = start.unwrap_or(Value::Int(0));
                let list = self.iterate(&value)?;
                for item in &list.items {
                    let item = self.follow(item, &path, None)?;
                    total = self.binary("+", total.defined()?, item)?;
                }
                Ok(total)
            }
            "batch" | "slice" => self.parts(name, &value, args),
            "groupby" => {
                let [attribute, default, case] = args.bind(["attribute", "default", "case_sensitive"])?;
                let path = self.path(attribute)?;
                let list = self.iterate(&value)?;
                self.heap.meter.items(list.items.len().saturating_mul(2))?;
                let mut keyed = Vec::new();
                for item in &list.items {
                    let key = self.follow(item, &path, default.as_ref())?;
                    let by = if truth(case.clone()) { key.clone() } else { self.folded(&key)? };
                    keyed.push((by.clone(), (by, key, item.clone())));
                }
                let mut groups: Vec<(Value, Value, Vec<Value>)> = Vec::new();
                for (by, key, item) in self.heap.meter.sort(keyed, false)? {
                    match groups.last_mut() {
                        Some(group) if self.heap.meter.equal(&group.0, &by)? => group.2.push(item),
                        _ => groups.push((by, key, vec![item])),
                    }
                }
                let mut out = Vec::new();
                for (_, key, items) in groups {
                    let items = self.heap.meter.list(items)?;
                    out.push(self.heap.meter.sequence(vec![key, items], true)?);
                }
                self.heap.meter.list(out)
            }
            _ => Err(format!("no filter {name:?}")),
        }
    }

    fn copy(&mut self, items: &[Value]) -> Fallible<Value> {
        self.heap.meter.check_items(items.len())?;
        self.heap.meter.list(items.to_vec())
    }

    /// The filters `batch` (lists of n items) and `slice` (n lists).
    fn parts(&mut self, name: &str, value: &Value, args: CallArgs) -> Fallible<Value> {
        let [count, fill] = args.bind([if name == "batch" { "linecount" } else { "slices" }, "fill_with"])?;
        let count = whole(count, name)?.and_then(|c| usize::try_from(c).ok()).filter(|&c| c > 0);
        let count = count.ok_or_else(|| format!("{name}: expected a positive number"))?;
        let fill = fill.filter(|fill| !matches!(fill, Value::None));
        let list = self.iterate(value)?;
        let mut out = Vec::new();
        if name == "batch" {
            for chunk in list.items.chunks(count) {
                let missing = if fill.is_some() { count - chunk.len() } else { 0 };
                self.heap.meter.check_items(chunk.len().saturating_add(missing))?;
                let mut items = chunk.to_vec();
                items.extend(std::iter::repeat_n(&fill, missing).flatten().cloned());
                out.push(self.heap.meter.list(items)?);
            }
        } else {
            let (size, extra) = (list.items.len() / count, list.items.len() % count);
            self.heap.meter.items(count.saturating_mul(2))?;
            let mut at = 0;
            for i in 0..count {
                let end = at + size + usize::from(i < extra);
                self.heap.meter.items(end - at + 1)?;
                let mut items = list.items[at..end].to_vec();
                items.extend(fill.clone().filter(|_| i >= extra));
                out.push(self.heap.meter.list(items)?);
                at = end;
            }
        }
        self.heap.meter.list(out)
    }

    fn sorted(
        &mut self,
        value: &Value,
        case: bool,
        attribute: Option<Value>,
        reverse: bool,
    ) -> Fallible<Vec<Value>> {
        let paths = match attribute {
            Some(Value::Str(text)) if text.contains(',') => {
                self.heap.meter.items(text.len())?;
                let paths = text.split(',').map(|part| self.path(Some(Value::text(part))));
                paths.collect::<Fallible<Vec<Path>>>()?
            }
            attribute => vec![self.path(attribute)?],
        };
        let list = self.iterate(value)?;
        self.heap.meter.items(list.items.len().saturating_mul(2))?;
        let mut keyed = Vec::new();
        for item in &list.items {
            let mut key = Vec::new();
            for path in &paths {
                let part = self.follow(item, path, None)?;
                key.push(if case { part } else { self.folded(&part)? });
            }
            let key = match key.len() {
                1 => key.remove(0),
                _ => self.heap.meter.list(key)?,
            };
            keyed.push((key, item.clone()));
        }
        self.heap.meter.sort(keyed, reverse)
    }

    /// Converts a text to lower case; returns other values unchanged.
    fn folded(&mut self, value: &Value) -> Fallible<Value> {
        let Value::Str(text) = value else { return Ok(value.clone()) };
        self.heap.meter.text(text.len())?;
        Ok(Value::Str(text.to_lowercase().into()))
    }

    fn path(&mut self, attribute: Option<Value>) -> Fallible<Path> {
        match attribute {
            None | Some(Value::None) => Ok(Vec::new()),
            Some(Value::Str(text)) => {
                self.heap.meter.items(text.len())?;
                let part = |part: &str| part.parse().map(Value::Int).unwrap_or(Value::text(part));
                Ok(text.split('.').map(part).collect())
            }
            Some(value) => Ok(vec![value]),
        }
    }

    fn follow(&mut self, item: &Value, path: &Path, default: Option<&Value>) -> Fallible<Value> {
        let mut item = item.clone();
        for part in path {
            item = self.item(&item, part)?;
            if let (Value::Undefined(_), Some(default)) = (&item, default) {
                item = default.clone();
            }
        }
        Ok(item)
    }

    fn map(&mut self, value: &Value, mut args: CallArgs) -> Fallible<Value> {
        let mut out = Vec::new();
        if args.positional.is_empty() {
            let [attribute, default] = args.bind(["attribute", "default"])?;
            let path = self.path(Some(attribute.ok_or("map: expected a filter or an attribute")?))?;
            let list = self.iterate(value)?;
            self.heap.meter.items(list.items.len())?;
            for item in &list.items {
                out.push(self.follow(item, &path, default.as_ref())?);
            }
        } else {
            let list = self.iterate(value)?;
            let filter = self.heap.str(&args.positional.remove(0))?;
            self.heap.meter.items(list.items.len())?;
            for item in &list.items {
                let args = self.copy_args(&args)?;
                out.push(self.filter(&filter, item.clone(), args)?);
            }
        }
        self.heap.meter.list(out)
    }

    fn copy_args(&mut self, args: &CallArgs) -> Fallible<CallArgs> {
        self.heap.meter.items(args.positional.len() + 2 * args.named.len())?;
        Ok(CallArgs { positional: args.positional.clone(), named: args.named.clone() })
    }

    fn select(
        &mut self,
        value: &Value,
        mut args: CallArgs,
        keep: bool,
        by_attribute: bool,
    ) -> Fallible<Value> {
        let list = self.iterate(value)?;
        let path = match by_attribute {
            true if args.positional.is_empty() => return Err("expected an attribute".into()),
            true => {
                let attribute = args.positional.remove(0);
                self.path(Some(attribute))?
            }
            false => Vec::new(),
        };
        let test: Option<Arc<str>> = match args.positional.is_empty() {
            true => None,
            false => Some(self.heap.str(&args.positional.remove(0))?),
        };
        let mut kept = Vec::new();
        for item in &list.items {
            let part = self.follow(item, &path, None)?;
            let passes = match &test {
                None => part.is_truthy(),
                Some(test) => {
                    let args = self.copy_args(&args)?;
                    self.test(test, &part, args)?
                }
            };
            if passes == keep {
                self.heap.meter.items(1)?;
                kept.push(item.clone());
            }
        }
        self.heap.meter.list(kept)
    }

    pub fn test(&mut self, name: &str, value: &Value, args: CallArgs) -> Fallible<bool> {
        self.heap.meter.work(1)?;
        let compare = match name {
            "eq" | "equalto" | "==" => Some("=="),
            "ne" | "!=" => Some("!="),
            "lt" | "lessthan" | "<" => Some("<"),
            "le" | "<=" => Some("<="),
            "gt" | "greaterthan" | ">" => Some(">"),
            "ge" | ">=" => Some(">="),
            "in" => Some("in"),
            _ => None,
        };
        let [argument] = args.bind([if name == "divisibleby" { "num" } else { "other" }])?;
        if compare.is_some() || matches!(name, "sameas" | "divisibleby") {
            let other = argument.ok_or_else(|| format!("{name}: expected a value to compare with"))?;
            return match (name, compare) {
                (_, Some(op)) => self.compare(op, value, &other),
                ("sameas", _) => Ok(value.kind() == other.kind() && self.heap.meter.equal(value, &other)?),
                _ => {
                    let (a, b) = (value.int(), other.int());
                    let rest = a.zip(b).and_then(|(a, b)| a.checked_rem(b));
                    rest.map(|rest| rest == 0).ok_or("divisibleby: expected two ints, and not 0".into())
                }
            };
        }
        if argument.is_some() {
            return Err(format!("{name}: expected no arguments"));
        }
        let integer = |value: &Value| match (value.int(), value) {
            (Some(i), _) => Ok(i % 2 == 0),
            (None, Value::Float(f)) => Ok(f % 2.0 == 0.0),
            _ => Err(format!("{name}: expected a number, got a {}", value.kind())),
        };
        Ok(match name {
            "defined" => !matches!(value, Value::Undefined(_)),
            "undefined" => matches!(value, Value::Undefined(_)),
            "none" => matches!(value, Value::None),
            "boolean" => matches!(value, Value::Bool(_)),
            "true" => matches!(value, Value::Bool(true)),
            "false" => matches!(value, Value::Bool(false)),
            "integer" => matches!(value, Value::Int(_)),
            "float" => matches!(value, Value::Float(_)),
            "number" => value.float().is_some(),
            "string" => matches!(value, Value::Str(_)),
            "mapping" => matches!(value, Value::Dict(_)),
            "sequence" => {
                matches!(value, Value::Str(_) | Value::List(_) | Value::Dict(_) | Value::Undefined(_))
            }
            "iterable" => matches!(
                value,
                Value::Str(_) | Value::List(_) | Value::Dict(_) | Value::Undefined(_) | Value::Loop(_)
            ),
            "callable" => matches!(
                value,
                Value::Macro(_)
                    | Value::Method(_)
                    | Value::Function(_)
                    | Value::Undefined(_)
                    | Value::Loop(_)
            ),
            "odd" => !integer(value)?,
            "even" => integer(value)?,
            "escaped" => false,
            "lower" | "upper" => {
                let text = self.heap.str(value)?;
                self.heap.meter.read(text.len())?;
                let (case, other) = match name {
                    "lower" => {
                        (char::is_lowercase as fn(char) -> bool, char::is_uppercase as fn(char) -> bool)
                    }
                    _ => (char::is_uppercase as fn(char) -> bool, char::is_lowercase as fn(char) -> bool),
                };
                text.chars().any(case) && !text.chars().any(other)
            }
            _ => return Err(format!("no test {name:?}")),
        })
    }
}

fn float_to_int(f: f64) -> Option<i64> {
    (f.is_finite() && f.abs() < 9.2e18).then_some(f as i64)
}
