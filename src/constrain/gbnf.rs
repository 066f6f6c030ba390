//! Translates grammars from GBNF, llama.cpp's syntax, to Lark's.
//!
//! Each character becomes a separate terminal. Longer terminals would match greedily, unlike GBNF: in
//! `[a-z]* "z"`, no letter would remain for the `z`.

use std::collections::HashMap;
use std::fmt::Write;

type Parsed<T> = Result<T, String>;

/// Largest number of repetitions.
const MAX_REPEATS: u32 = 100_000;

/// Whether a grammar's first rule is written with `::=`.
pub fn is_gbnf(text: &str) -> bool {
    let mut reader = Reader::new(text, 0);
    reader.space();
    !reader.name().is_empty() && {
        reader.space();
        reader.rest.starts_with("::=")
    }
}

/// Translates a grammar for llguidance. Rules get numbers as names, because the languages allow different
/// names.
pub fn to_lark(text: &str, max_nesting: usize, max_rules: usize) -> Parsed<String> {
    let mut reader = Reader::new(text, max_nesting);
    let mut rules = String::new();
    let mut defined = HashMap::new();
    reader.space();
    while !reader.rest.is_empty() {
        let line = reader.line();
        let name = reader.name();
        if name.is_empty() {
            return reader.expected("a rule's name");
        }
        reader.space();
        if !reader.skip("::=") {
            return reader.expected("\"::=\"");
        }
        if defined.insert(name, line).is_some() {
            return Err(format!("line {line}: rule {name:?} is defined twice"));
        }
        if defined.len() > max_rules {
            return Err(format!("expected at most {max_rules} rules"));
        }
        let number = reader.number(name);
        let _ = write!(rules, "r{number}: ");
        reader.alternatives(&mut rules, 0)?;
        rules.push('\n');
    }
    let missing = reader.used.iter().find(|(name, _)| !defined.contains_key(**name));
    if let Some((name, (_, line))) = missing {
        return Err(format!("line {line}: rule {name:?} is not defined"));
    }
    let Some((root, _)) = reader.used.get("root") else { return Err("there is no rule \"root\"".into()) };
    Ok(format!("start: r{root}\n{rules}"))
}

struct Reader<'a> {
    text: &'a str,
    rest: &'a str,
    /// Each rule's number, and the line where it is first seen.
    used: HashMap<&'a str, (usize, usize)>,
    max_nesting: usize,
}

impl<'a> Reader<'a> {
    fn new(text: &'a str, max_nesting: usize) -> Reader<'a> {
        Reader { text, rest: text, used: HashMap::new(), max_nesting }
    }

    fn line(&self) -> usize {
        1 + self.text[..self.text.len() - self.rest.len()].matches('\n').count()
    }

    fn expected<T>(&self, what: &str) -> Parsed<T> {
        let got = self.rest.chars().next().map_or("the end".into(), |c| format!("{c:?}"));
        Err(format!("line {}: expected {what}, got {got}", self.line()))
    }

    /// Skips space and comments.
    fn space(&mut self) {
        loop {
            self.rest = self.rest.trim_start();
            if !self.rest.starts_with('#') {
                return;
            }
            self.rest = self.rest.find(['\n', '\r']).map_or("", |end| &self.rest[end..]);
        }
    }

    fn skip(&mut self, text: &str) -> bool {
        let after = self.rest.strip_prefix(text);
        self.rest = after.unwrap_or(self.rest);
        after.is_some()
    }

    fn name(&mut self) -> &'a str {
        let end = self.rest.find(|c: char| !c.is_ascii_alphanumeric() && !matches!(c, '-' | '_'));
        let (name, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
        self.rest = rest;
        name
    }

    fn number(&mut self, name: &'a str) -> usize {
        let (next, line) = (self.used.len(), self.line());
        self.used.entry(name).or_insert((next, line)).0
    }

    fn alternatives(&mut self, out: &mut String, depth: usize) -> Parsed<()> {
        if depth > self.max_nesting {
            return Err(format!("line {}: more than {} open brackets", self.line(), self.max_nesting));
        }
        loop {
            self.sequence(out, depth)?;
            if !self.skip("|") {
                return Ok(());
            }
            out.push_str(" | ");
        }
    }

    fn sequence(&mut self, out: &mut String, depth: usize) -> Parsed<()> {
        let mut empty = true;
        loop {
            self.space();
            let mut item = String::new();
            match self.rest.chars().next() {
                Some('"') => self.string(&mut item)?,
                Some('[') => self.class(&mut item)?,
                Some('.') => {
                    self.skip(".");
                    item.push_str(r"/[\x{0}-\x{10FFFF}]/");
                }
                Some('(') => {
                    self.skip("(");
                    item.push('(');
                    self.alternatives(&mut item, depth + 1)?;
                    if !self.skip(")") {
                        return self.expected("\")\"");
                    }
                    item.push(')');
                }
                Some(c) if c.is_ascii_alphanumeric() || matches!(c, '-' | '_') => {
                    let before = self.rest;
                    let name = self.name();
                    self.space();
                    // The next rule's name is not a part of this one.
                    if self.rest.starts_with("::=") {
                        self.rest = before;
                        break;
                    }
                    let _ = write!(item, "r{}", self.number(name));
                }
                Some('<' | '!') => {
                    return self.expected("no rules for single tokens, which are not supported");
                }
                None | Some('|' | ')') => break,
                Some(_) => return self.expected("a part of a rule"),
            }
            self.space();
            for count in 0.. {
                let Some(repeats) = self.repeats()? else { break };
                if count > self.max_nesting {
                    return Err(format!(
                        "line {}: more than {} repetitions of one part",
                        self.line(),
                        self.max_nesting
                    ));
                }
                item = format!("({item}){repeats}");
                self.space();
            }
            out.push_str(if empty { "" } else { " " });
            out.push_str(&item);
            empty = false;
        }
        if empty {
            out.push_str("\"\"");
        }
        Ok(())
    }

    fn repeats(&mut self) -> Parsed<Option<String>> {
        for sign in ["*", "+", "?"] {
            if self.skip(sign) {
                return Ok(Some(sign.into()));
            }
        }
        if !self.skip("{") {
            return Ok(None);
        }
        let Some(min) = self.count(0)? else { return self.expected("a number") };
        let repeats = match self.skip(",") {
            false => format!("{{{min}}}"),
            true => self.count(min)?.map_or(format!("{{{min},}}"), |max| format!("{{{min},{max}}}")),
        };
        if self.skip("}") { Ok(Some(repeats)) } else { self.expected("\"}\"") }
    }

    /// A number, if there is one.
    fn count(&mut self, min: u32) -> Parsed<Option<u32>> {
        self.space();
        let end = self.rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.rest.len());
        let (digits, rest) = self.rest.split_at(end);
        let number = digits.parse().ok().filter(|n| (min..=MAX_REPEATS).contains(n));
        if !digits.is_empty() && number.is_none() {
            return self.expected(&format!("a number from {min} to {MAX_REPEATS}"));
        }
        self.rest = rest;
        self.space();
        Ok(number)
    }

    fn string(&mut self, out: &mut String) -> Parsed<()> {
        self.skip("\"");
        let mut empty = true;
        out.push('(');
        while !self.skip("\"") {
            let c = self.character()?;
            let _ = write!(out, "{}/\\x{{{:X}}}/", if empty { "" } else { " " }, c as u32);
            empty = false;
        }
        out.push_str(if empty { "\"\")" } else { ")" });
        Ok(())
    }

    fn class(&mut self, out: &mut String) -> Parsed<()> {
        self.skip("[");
        out.push_str(if self.skip("^") { "/[^" } else { "/[" });
        let mut empty = true;
        while !self.skip("]") {
            let from = self.character()?;
            let mut to = from;
            if self.rest.starts_with('-') && !self.rest.starts_with("-]") {
                self.skip("-");
                to = self.character()?;
            }
            if to < from {
                return Err(format!("line {}: the range from {from:?} to {to:?} is empty", self.line()));
            }
            let _ = write!(out, "\\x{{{:X}}}-\\x{{{:X}}}", from as u32, to as u32);
            empty = false;
        }
        if empty {
            return Err(format!("line {}: a class without characters", self.line()));
        }
        out.push_str("]/");
        Ok(())
    }

    /// A character of a string or a class.
    fn character(&mut self) -> Parsed<char> {
        let Some(c) = self.rest.chars().next() else { return self.expected("a closing quote or bracket") };
        self.rest = &self.rest[c.len_utf8()..];
        if c != '\\' {
            return Ok(c);
        }
        let Some(c) = self.rest.chars().next() else { return self.expected("an escape") };
        let digits = match c {
            'x' => 2,
            'u' => 4,
            'U' => 8,
            _ => 0,
        };
        let plain = match c {
            't' => '\t',
            'r' => '\r',
            'n' => '\n',
            '\\' | '"' | '[' | ']' | '-' | '^' => c,
            _ if digits > 0 => {
                let code = self.rest.get(1..1 + digits).and_then(|code| u32::from_str_radix(code, 16).ok());
                let Some(c) = code.and_then(char::from_u32) else {
                    return self.expected(&format!("{digits} hexadecimal digits of a character's code"));
                };
                c
            }
            _ => return self.expected("an escape of GBNF"),
        };
        self.rest = &self.rest[c.len_utf8() + digits..];
        Ok(plain)
    }
}
