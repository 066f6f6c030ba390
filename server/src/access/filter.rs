//! Rules on a text that comes in pieces.
//!
//! The result is that of the whole text, however it is split. A match that starts at a byte depends on the bytes of its rule's window and on
//! one character on each side. So the filter decides on a byte once it has that many bytes after it, and holds back the rest.

use std::ops::Range;
use std::sync::Arc;

use regex_automata::meta::Regex;
use regex_automata::{Anchored, Input};

use super::{Action, Denied};

/// Bytes of the longest character.
const CHAR_BYTES: usize = 4;

/// A rule on texts.
#[derive(Debug)]
pub(super) struct Rule {
    pub name: String,
    pub regex: Regex,
    /// Bytes of the longest match.
    pub window_bytes: usize,
    /// Whether the pattern alone has longer ones.
    pub is_cut: bool,
    pub action: Action,
    pub replacement: String,
}

/// What a filter lets through.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filtered {
    /// The next piece of the text, perhaps empty.
    pub text: String,
    /// A rule that ends the text here.
    pub denied: Option<Denied>,
}

/// A match.
#[derive(Debug, Clone)]
struct Found {
    bytes: Range<usize>,
    /// Whether it fills its window, and its end is not known.
    is_open: bool,
}

/// A filter of one text.
#[derive(Debug)]
pub struct OutputFilter {
    rules: Arc<[Rule]>,
    /// Text that is not decided on, after the character before it.
    buffer: String,
    /// Where the text that is not decided on starts.
    start: usize,
    /// Bytes after a byte that decide on it.
    ahead: usize,
    denied: Option<Denied>,
}

impl OutputFilter {
    pub(super) fn new(rules: Arc<[Rule]>) -> OutputFilter {
        let window = rules.iter().map(|rule| rule.window_bytes).max();
        let ahead = window.map_or(0, |window| window.saturating_add(CHAR_BYTES));
        OutputFilter { rules, buffer: String::new(), start: 0, ahead, denied: None }
    }

    /// Takes the next piece, and returns what is decided.
    pub fn push(&mut self, piece: &str) -> Filtered {
        if self.rules.is_empty() {
            return Filtered { text: piece.to_owned(), denied: None };
        }
        self.buffer.push_str(piece);
        match self.buffer.len().checked_sub(self.ahead) {
            Some(decided) => self.decide(decided),
            None => Filtered { text: String::new(), denied: self.denied.clone() },
        }
    }

    /// Returns what is left, at the text's end.
    pub fn finish(&mut self) -> Filtered {
        self.decide(self.buffer.len())
    }

    /// Decides on what starts up to a byte.
    fn decide(&mut self, decided: usize) -> Filtered {
        if self.denied.is_some() {
            self.buffer.clear();
            return Filtered { text: String::new(), denied: self.denied.clone() };
        }
        let mut text = String::new();
        // The next match of each rule, so that no rule searches a text twice.
        let mut next: Vec<Option<Found>> =
            self.rules.iter().map(|rule| rule.find(&self.buffer, self.start)).collect();
        loop {
            for (rule, next) in self.rules.iter().zip(&mut next) {
                if next.as_ref().is_some_and(|found| found.bytes.start < self.start) {
                    *next = rule.find(&self.buffer, self.start);
                }
            }
            let matches =
                self.rules.iter().zip(&next).filter_map(|(rule, next)| Some((rule, next.as_ref()?)));
            // Of those that start at the same byte, the first rule's.
            let first = matches.min_by_key(|(_, found)| found.bytes.start);
            let Some((rule, found)) = first.filter(|(_, found)| found.bytes.start <= decided) else { break };
            text.push_str(self.buffer.get(self.start..found.bytes.start).unwrap_or_default());
            if rule.action == Action::Deny || found.is_open {
                self.denied = Some(Denied::Rule { rule: rule.name.clone() });
                self.buffer.clear();
                self.start = 0;
                return Filtered { text, denied: self.denied.clone() };
            }
            text.push_str(&rule.replacement);
            self.start = found.bytes.end;
        }
        let end = self.buffer.floor_char_boundary(decided.max(self.start));
        text.push_str(self.buffer.get(self.start..end).unwrap_or_default());
        // Patterns look at the character before a match, and know the text's start.
        let keep = self.buffer.floor_char_boundary(end.saturating_sub(1));
        self.buffer.drain(..keep);
        self.start = end - keep;
        Filtered { text, denied: None }
    }
}

impl Rule {
    /// The first match from a byte on.
    fn find(&self, text: &str, mut from: usize) -> Option<Found> {
        if !self.is_cut {
            let found = self.regex.find(Input::new(text).range(from..))?;
            return Some(Found { bytes: found.range(), is_open: false });
        }
        while from < text.len() {
            // Longer ones do not count, so that a search costs no more than two windows.
            let step = text.ceil_char_boundary(from.saturating_add(self.window_bytes));
            let end = text.floor_char_boundary(step.saturating_add(self.window_bytes));
            let Some(found) = self.regex.find(Input::new(text).range(from..end)) else {
                from = step;
                continue;
            };
            let start = found.start();
            let end = text.floor_char_boundary(start.saturating_add(self.window_bytes));
            let within = Input::new(text).range(start..end).anchored(Anchored::Yes);
            if let Some(found) = self.regex.find(within) {
                return Some(Found { bytes: found.range(), is_open: found.end() == end && end < text.len() });
            }
            from = text.ceil_char_boundary(start + 1);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::{AccessError, Policy, PolicyConfig};
    use super::*;

    fn policy(rules: &str) -> Policy {
        let config: PolicyConfig = toml::from_str(rules).unwrap();
        Policy::new(&config).unwrap()
    }

    /// Rules of all kinds: with contexts, without bounds, that overlap.
    const RULES: &str = r#"
        [[output]]
        name = "card"
        pattern = '\b[0-9]{4}(-[0-9]{4}){1,3}\b'
        action = "redact"
        [[output]]
        name = "key"
        pattern = 'sk-[a-z]+'
        window_bytes = 12
        action = "redact"
        replacement = "sk-…"
        [[output]]
        name = "start"
        pattern = '^(no|none)\b'
        action = "redact"
        replacement = "yes"
        [[output]]
        name = "end"
        pattern = '[.!]$'
        action = "redact"
        replacement = "?"
        [[output]]
        name = "quoted"
        pattern = 'é[^é]*é'
        window_bytes = 9
        action = "redact"
        replacement = ""
        [[output]]
        name = "bomb"
        pattern = '(?i)bomb'
        action = "deny"
    "#;

    fn pieces<'t>(filter: &mut OutputFilter, pieces: impl Iterator<Item = &'t str>) -> Filtered {
        let mut whole = Filtered::default();
        for piece in pieces.map(Some).chain([None]) {
            let filtered = match piece {
                Some(piece) => filter.push(piece),
                None => filter.finish(),
            };
            assert!(whole.denied.is_none() || filtered.text.is_empty());
            whole.text += &filtered.text;
            whole.denied = whole.denied.or(filtered.denied);
        }
        whole
    }

    #[test]
    fn the_result_is_the_same_for_every_split() {
        let policy = policy(RULES);
        let deny = |rule: &str| Some(Denied::Rule { rule: rule.into() });
        for (text, want, denied) in [
            ("", "", None),
            ("plain words, and ünïcödé 🙂", "plain words, and ünïcödé 🙂", None),
            ("a 1234-5678 b", "a [redacted] b", None),
            ("a 1234-5678-9", "a [redacted]-9", None),
            ("a 1234-56789", "a 1234-56789", None),
            ("x1234-5678", "x1234-5678", None),
            ("no none", "yes none", None),
            ("none", "yes", None),
            ("nonesuch no", "nonesuch no", None),
            ("end. end!", "end. end?", None),
            ("my sk-abc sk-d", "my sk-… sk-…", None),
            ("sk-abcdefghi", "sk-…", None),
            ("so sk-abcdefghij x", "so ", deny("key")),
            ("éabé éabcdefghé é🙂é", " éabcdefgh🙂é", None),
            ("no bOmb.", "yes ", deny("bomb")),
            ("sk-bombbo", "sk-…", None),
            ("1234-5678-1234-5678-1234-5678", "[redacted]-[redacted]", None),
        ] {
            let chars: Vec<&str> = text.split_inclusive(|_| true).collect();
            // Every way to split the first characters, and the rest whole, by one, by two …
            for split in 0..1u32 << chars.len().min(10) {
                for rest in [1, 2, 3, 7, 100] {
                    let mut parts = Vec::new();
                    let mut part = String::new();
                    for (i, c) in chars.iter().enumerate() {
                        part += c;
                        if if i < 10 { split >> i & 1 == 1 } else { i % rest == 0 } {
                            parts.push(std::mem::take(&mut part));
                        }
                    }
                    parts.push(part);
                    let got = pieces(&mut policy.output(), parts.iter().map(String::as_str));
                    assert_eq!((got.text.as_str(), &got.denied), (want, &denied), "{parts:?}");
                }
            }
        }
    }

    #[test]
    fn random_texts_in_random_pieces_are_those_of_the_whole() {
        let policy = policy(RULES);
        let mut seed = 7u64;
        let mut below = |n: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as usize % n
        };
        let words = ["1234-5678", "sk-", "é", "a", "bo", "mb", "no", ".", "-12345", " ", "🙂", "1"];
        for _ in 0..3000 {
            let text: String = (0..below(40)).map(|_| words[below(words.len())]).collect();
            let whole = pieces(&mut policy.output(), std::iter::once(text.as_str()));
            let mut parts = Vec::new();
            let mut rest = text.as_str();
            while !rest.is_empty() {
                let (part, after) = rest.split_at(rest.ceil_char_boundary(1 + below(9)));
                parts.push(part);
                rest = after;
            }
            assert_eq!(pieces(&mut policy.output(), parts.iter().copied()), whole, "{parts:?}");
        }
    }

    #[test]
    fn no_more_is_held_back_than_a_window() {
        let policy = policy("[[output]]\nname = 'x'\npattern = 'secret'\naction = 'redact'");
        let mut filter = policy.output();
        let mut out = 0;
        for n in 1..=100 {
            out += filter.push("é").text.len();
            assert!(2 * n - out <= "secret".len() + CHAR_BYTES + 1);
        }
        assert!(policy.output().push("").text.is_empty());
        // Without rules, nothing is.
        assert_eq!(self::policy("").output().push("secret").text, "secret");
    }

    #[test]
    fn prompts_have_rules_of_their_own() {
        let policy = policy(
            "[[input]]\nname = 'mail'\npattern = '[a-z]{1,20}@[a-z]{1,20}'\naction = 'redact'\nreplacement = 'MAIL'
            [[input]]\nname = 'no'\npattern = 'forbidden'\naction = 'deny'",
        );
        assert_eq!(policy.input("ask ada@example now").unwrap(), "ask MAIL now");
        assert_eq!(policy.input("a forbidden word"), Err(Denied::Rule { rule: "no".into() }));
        // A text of many matches and one of none takes time in proportion to its length.
        assert_eq!(policy.input(&"a@b ".repeat(50_000)).unwrap(), "MAIL ".repeat(50_000));
        assert_eq!(policy.output().push("forbidden").text, "forbidden");
    }

    #[test]
    fn patterns_that_cannot_be_streamed_are_refused() {
        for (rule, why) in [
            ("pattern = 'a+'", "does not bound"),
            ("pattern = '.*x'", "does not bound"),
            ("pattern = 'a*'\nwindow_bytes = 9", "the empty text"),
            ("pattern = '$'", "the empty text"),
            ("pattern = '[a&&b]'", "can match"),
            ("pattern = 'a+'\nwindow_bytes = 5000", "1 to 4096 bytes"),
            ("pattern = 'a+'\nwindow_bytes = 0", "1 to 4096 bytes"),
            ("pattern = 'a{5000}'", "1 to 4096 bytes"),
            ("pattern = '('", "unclosed group"),
            (r"pattern = '(\pL{1000}){1000}'", "1 to 4096 bytes"),
            (
                r"pattern = '(\pL{1000}){1000}'
               window_bytes = 9",
                "building NFA",
            ),
        ] {
            let text = format!("[[output]]\nname = 'r'\naction = 'deny'\n{rule}");
            let config: PolicyConfig = toml::from_str(&text).unwrap();
            let error = Policy::new(&config).unwrap_err();
            assert!(matches!(&error, AccessError::Rule { name, .. } if name == "r"));
            assert!(error.to_string().contains(why), "{rule}: {error}");
        }
        let many = "[[input]]\nname = 'r'\naction = 'deny'\npattern = 'a'\n".repeat(257);
        assert!(Policy::new(&toml::from_str(&many).unwrap()).is_err());
        assert!(toml::from_str::<PolicyConfig>("unknown = 1").is_err());
    }
}
