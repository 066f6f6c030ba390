//! Splits a template into tokens, with Jinja2's rules for white space around tags (`trim_blocks` and
//! `lstrip_blocks`).

use super::value::{Fallible, is_space};

#[derive(Debug, Clone, PartialEq)]
pub enum Token {
    /// Text outside of tags.
    Text(String),
    PrintBegin,
    PrintEnd,
    BlockBegin,
    BlockEnd,
    Name(String),
    Str(String),
    Int(i64),
    Float(f64),
    Op(&'static str),
}

/// A line number and an error message.
pub type SyntaxError = (u32, String);

/// Longer operators first, because the first match wins.
const OPERATORS: [&str; 25] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<",
    "=", ".", ":", "|", ",",
];

/// Splits a template into tokens with their line numbers.
pub fn lex(source: &str) -> Result<Vec<(Token, u32)>, SyntaxError> {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let source = source.strip_suffix('\n').unwrap_or(&source);
    let mut lexer = Lexer { source, at: 0, line: 1, counted: 0, tokens: Vec::new(), line_starts: true };
    lexer.run().map_err(|message| (lexer.line, message))?;
    Ok(lexer.tokens)
}

struct Lexer<'a> {
    source: &'a str,
    at: usize,
    line: u32,
    /// Byte offset up to which `line` is counted.
    counted: usize,
    tokens: Vec<(Token, u32)>,
    /// Whether the text after the last tag starts a line, because the tag removed the newline.
    line_starts: bool,
}

impl<'a> Lexer<'a> {
    fn run(&mut self) -> Fallible<()> {
        while self.at < self.source.len() {
            let rest = &self.source[self.at..];
            let tag = rest
                .match_indices('{')
                .find(|(i, _)| matches!(rest.as_bytes().get(i + 1), Some(b'%' | b'{' | b'#')));
            let Some((length, _)) = tag else {
                self.push(Token::Text(rest.into()));
                break;
            };
            let (text, kind) = (&rest[..length], rest.as_bytes()[length + 1]);
            let sign = rest.as_bytes().get(length + 2).copied().filter(|b| matches!(b, b'-' | b'+'));
            self.text(text, sign, kind != b'{');
            self.at += length + 2 + usize::from(sign.is_some());
            self.count();
            match kind {
                b'#' => self.comment()?,
                b'{' => {
                    self.push(Token::PrintBegin);
                    self.tag("}}")?;
                    self.push(Token::PrintEnd);
                }
                _ if self.raw()? => {}
                _ => {
                    self.push(Token::BlockBegin);
                    self.tag("%}")?;
                    self.push(Token::BlockEnd);
                }
            }
        }
        Ok(())
    }

    fn push(&mut self, token: Token) {
        self.tokens.push((token, self.line));
    }

    /// Advances `line` to the current position.
    fn count(&mut self) {
        self.line += self.source[self.counted..self.at].matches('\n').count() as u32;
        self.counted = self.at;
    }

    /// Pushes the text before a tag, without the white space that the tag strips.
    fn text(&mut self, text: &str, sign: Option<u8>, strips: bool) {
        let mut text = text;
        let line = text.rfind('\n').map_or(0, |at| at + 1);
        if sign == Some(b'-') {
            text = text.trim_end_matches(is_space);
        } else if sign.is_none()
            && strips
            && (line > 0 || self.line_starts)
            && text[line..].chars().all(is_space)
        {
            text = &text[..line];
        }
        if !text.is_empty() {
            self.push(Token::Text(text.into()));
        }
    }

    fn starts(&self, with: &str) -> bool {
        self.source[self.at..].starts_with(with)
    }

    fn skip_space(&mut self) {
        let rest = &self.source[self.at..];
        self.at += rest.len() - rest.trim_start_matches(is_space).len();
    }

    /// Skips the end of a tag and the white space that it strips; returns false if no tag ends here.
    fn end(&mut self, close: &str) -> bool {
        let rest = &self.source[self.at..];
        let sign = rest.as_bytes().first().copied().filter(|&b| b == b'-' || (b == b'+' && close != "}}"));
        if !rest[usize::from(sign.is_some())..].starts_with(close) {
            return false;
        }
        let from = self.at;
        self.at += usize::from(sign.is_some()) + close.len();
        match sign {
            Some(b'-') => self.skip_space(),
            None if close != "}}" && self.starts("\n") => self.at += 1,
            _ => {}
        }
        self.line_starts = self.source[from..self.at].ends_with('\n');
        true
    }

    fn comment(&mut self) -> Fallible<()> {
        let length = self.source[self.at..].find("#}").ok_or("a comment has no end")?;
        let sign = self.source[self.at..self.at + length].ends_with(['-', '+']);
        self.at += length - usize::from(sign);
        self.end("#}");
        self.count();
        Ok(())
    }

    /// Reads a raw block; returns false if none starts here.
    fn raw(&mut self) -> Fallible<bool> {
        let word = |rest: &'a str, word: &str| {
            let rest = rest.trim_start_matches(is_space).strip_prefix(word)?;
            Some(rest.trim_start_matches(is_space))
        };
        let Some(rest) = word(&self.source[self.at..], "raw") else { return Ok(false) };
        let body = match (rest.strip_prefix("-%}"), rest.strip_prefix("%}")) {
            (Some(body), _) => body.trim_start_matches(is_space),
            (_, Some(body)) => body,
            _ => return Ok(false),
        };
        self.at = self.source.len() - body.len();
        // The text before `endraw` is stripped like text before any tag.
        self.line_starts = self.source[..self.at].ends_with('\n');
        for (length, _) in body.match_indices("{%") {
            let sign = body.as_bytes().get(length + 2).copied().filter(|b| matches!(b, b'-' | b'+'));
            let Some(rest) = word(&body[length + 2 + usize::from(sign.is_some())..], "endraw") else {
                continue;
            };
            let at = self.source.len() - rest.len();
            let before = self.at;
            self.at = at;
            if self.end("%}") {
                let (end, line_starts) = (self.at, self.line_starts);
                self.line_starts = self.source[..before].ends_with('\n');
                self.text(&body[..length], sign, true);
                (self.at, self.line_starts) = (end, line_starts);
                self.count();
                return Ok(true);
            }
            self.at = before;
        }
        Err("a raw block has no end".into())
    }

    /// Reads the tokens of a tag, including its end.
    fn tag(&mut self, close: &str) -> Fallible<()> {
        let mut open = Vec::new();
        loop {
            self.skip_space();
            self.count();
            if open.is_empty() && self.end(close) {
                return Ok(());
            }
            let rest = &self.source[self.at..];
            let Some(first) = rest.chars().next() else { return Err("a tag has no end".into()) };
            let word = |c: char| c.is_alphanumeric() || c == '_';
            if first.is_ascii_digit() {
                self.number()?;
            } else if word(first) {
                if first.is_numeric() {
                    return Err(format!("expected a name, got {first:?}"));
                }
                let length = rest.find(|c| !word(c)).unwrap_or(rest.len());
                self.push(Token::Name(rest[..length].into()));
                self.at += length;
            } else if matches!(first, '\'' | '"') {
                self.string(first)?;
            } else {
                let operator = OPERATORS.iter().find(|operator| rest.starts_with(**operator));
                let operator = *operator.ok_or_else(|| format!("unexpected {first:?}"))?;
                match operator {
                    "(" => open.push(")"),
                    "[" => open.push("]"),
                    "{" => open.push("}"),
                    ")" | "]" | "}" if open.pop() != Some(operator) => {
                        return Err(format!("unexpected {operator:?}"));
                    }
                    _ => {}
                }
                self.push(Token::Op(operator));
                self.at += operator.len();
            }
        }
    }

    fn number(&mut self) -> Fallible<()> {
        let bytes = &self.source.as_bytes()[self.at..];
        let digits = |from: usize, digit: fn(&u8) -> bool| {
            let mut at = from;
            while bytes.get(at).is_some_and(digit)
                || (at > from && bytes.get(at) == Some(&b'_') && bytes.get(at + 1).is_some_and(digit))
            {
                at += 1;
            }
            at
        };
        let clean = |from: usize, to: usize| {
            self.source[self.at + from..self.at + to].chars().filter(|&c| c != '_').collect::<String>()
        };
        let radix = match bytes.get(..2) {
            Some(b"0x" | b"0X") => Some((16, u8::is_ascii_hexdigit as fn(&u8) -> bool)),
            Some(b"0o" | b"0O") => Some((8, (|b: &u8| matches!(b, b'0'..=b'7')) as fn(&u8) -> bool)),
            Some(b"0b" | b"0B") => Some((2, (|b: &u8| matches!(b, b'0' | b'1')) as fn(&u8) -> bool)),
            _ => None,
        };
        let range = || "an integer is out of range".to_string();
        if let Some((radix, digit)) = radix {
            let end = digits(2, digit);
            if end > 2 {
                let value = i64::from_str_radix(&clean(2, end), radix).map_err(|_| range())?;
                self.push(Token::Int(value));
                self.at += end;
                return Ok(());
            }
        }
        let whole = digits(0, u8::is_ascii_digit);
        let mut end = whole;
        let after_dot = self.source[..self.at].ends_with('.');
        if !after_dot && bytes.get(end) == Some(&b'.') && bytes.get(end + 1).is_some_and(u8::is_ascii_digit) {
            end = digits(end + 1, u8::is_ascii_digit);
        }
        if !after_dot && matches!(bytes.get(end), Some(b'e' | b'E')) {
            let sign = usize::from(matches!(bytes.get(end + 1), Some(b'+' | b'-')));
            let exponent = digits(end + 1 + sign, u8::is_ascii_digit);
            if exponent > end + 1 + sign {
                end = exponent;
            }
        }
        let text = clean(0, end);
        let token = if end > whole {
            Token::Float(text.parse().map_err(|_| format!("{text:?} is no number"))?)
        } else if text.starts_with('0') && text.bytes().any(|b| b != b'0') {
            return Err("an integer starts with 0".into());
        } else {
            Token::Int(text.parse().map_err(|_| range())?)
        };
        self.push(token);
        self.at += end;
        Ok(())
    }

    /// Reads a string literal with Python's escapes.
    fn string(&mut self, quote: char) -> Fallible<()> {
        let rest = &self.source[self.at + 1..];
        let mut text = String::new();
        let mut chars = rest.char_indices();
        let mut high = None;
        while let Some((at, c)) = chars.next() {
            if c == quote {
                self.push(Token::Str(text));
                self.at += 1 + at + 1;
                return Ok(());
            }
            if c != '\\' {
                text.push(c);
                continue;
            }
            let Some((at, c)) = chars.next() else { break };
            let code = |from: usize, length: usize| {
                let digits = rest.get(from..from + length).ok_or("an escape is cut short")?;
                u32::from_str_radix(digits, 16).map_err(|_| format!("{digits:?} is no code of a character"))
            };
            let (code, length) = match c {
                'n' => (10, 0),
                't' => (9, 0),
                'r' => (13, 0),
                'a' => (7, 0),
                'b' => (8, 0),
                'f' => (12, 0),
                'v' => (11, 0),
                '\\' | '\'' | '"' => (c as u32, 0),
                '\n' => continue,
                'x' => (code(at + 1, 2)?, 2),
                'u' => (code(at + 1, 4)?, 4),
                'U' => (code(at + 1, 8)?, 8),
                '0'..='7' => {
                    let digits = rest[at..].bytes().take(3).take_while(|b| matches!(b, b'0'..=b'7')).count();
                    (u32::from_str_radix(&rest[at..at + digits], 8).unwrap_or(0), digits - 1)
                }
                _ => {
                    text.extend(['\\', c]);
                    continue;
                }
            };
            if length > 0 {
                chars.nth(length - 1);
            }
            match (high.take(), code) {
                (None, 0xd800..=0xdbff) if rest[at + 1 + length..].starts_with("\\u") => high = Some(code),
                (Some(high), 0xdc00..=0xdfff) => {
                    let joined = 0x10000 + ((high - 0xd800) << 10) + (code - 0xdc00);
                    text.extend(char::from_u32(joined));
                }
                (_, code) => {
                    text.push(char::from_u32(code).ok_or_else(|| format!("{code:#x} is no character"))?);
                }
            }
        }
        Err("a string has no end".into())
    }
}
