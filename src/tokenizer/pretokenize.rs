//! Pre-tokenizers: they split text into words before byte-level BPE. Each kind of `tokenizer.ggml.pre` is a
//! row of a table.

use regex_automata::meta::Regex;
use regex_automata::{Anchored, Input};

use crate::error::{Error, Result};
use crate::gguf::printable;

/// A kind of pre-tokenizer.
struct Kind {
    names: &'static [&'static str],
    /// Applied in turn, each to the pieces of the previous one.
    patterns: &'static [&'static str],
    /// Whether a word that is itself a token skips the merges.
    ignore_merges: bool,
    /// Whether texts begin with the begin-of-text token by default.
    add_bos: bool,
    /// Whether the vocabulary spells words as they are, not byte by byte.
    as_text: bool,
}

/// GPT-2's words.
pub(crate) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
/// Llama 3's words; the arguments are the repetition of digits and what may follow punctuation.
macro_rules! llama3 {
    ($digits:literal) => {
        llama3!($digits, r"[\r\n]*")
    };
    ($digits:literal, $after:literal) => {
        concat!(llama3!(@words $digits, $after), r"|\s+(?!\S)|\s+")
    };
    (@words $digits:literal, $after:literal) => {
        concat!(
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
            $digits,
            r"| ?[^\s\p{L}\p{N}]+",
            $after,
            r"|\s*[\r\n]+"
        )
    };
}
/// What cuts runs of spaces into the longest power of two that leaves one to the next word (Jais 2).
macro_rules! powers {
    () => {
        concat!(
            r"|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)",
            r"|\s{1,2}(?!\S)|\s{1}"
        )
    };
}
/// Words split between lower and upper case. The arguments are a suffix (Mistral's Tekken has none) and the
/// repetition of digits.
macro_rules! cased {
    ($ending:expr, $digits:literal) => {
        concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            $ending,
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
            $ending,
            r"|\p{N}",
            $digits,
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
}
/// What may be at the end of cased words: English contractions.
macro_rules! contractions {
    () => {
        "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?"
    };
}
/// Chinese characters (Unicode 16, script Han).
macro_rules! han {
    () => {
        concat!(
            r"\x{2E80}-\x{2E99}\x{2E9B}-\x{2EF3}\x{2F00}-\x{2FD5}\x{3005}\x{3007}\x{3021}-\x{3029}\x{3038}-\x{303B}",
            r"\x{3400}-\x{4DBF}\x{4E00}-\x{9FFF}\x{F900}-\x{FA6D}\x{FA70}-\x{FAD9}\x{16FE2}\x{16FE3}",
            r"\x{16FF0}\x{16FF1}\x{20000}-\x{2A6DF}\x{2A700}-\x{2B739}\x{2B740}-\x{2B81D}\x{2B820}-\x{2CEA1}",
            r"\x{2CEB0}-\x{2EBE0}\x{2EBF0}-\x{2EE5D}\x{2F800}-\x{2FA1D}\x{30000}-\x{3134A}\x{31350}-\x{323AF}"
        )
    };
}
/// A word of BLOOM: what lies between spaces and punctuation.
const BETWEEN_PUNCTUATION: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";
/// Letters with case, as in DeepSeek's list; letters that Unicode normalisation would change are escaped.
const DEEPSEEK_LETTERS: &str = concat!(
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\x{1F7D}",
    r"ᾀ-ᾴᾶ-ᾼ\x{1FBE}ῂ-ῄῆ-ῌῐ-\x{1FD3}ῖ-\x{1FDB}ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\x{2126}ℨ\x{212A}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ",
    r"𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
);

/// The patterns of published models (in `tokenizer.json`) and llama.cpp's default, by their names in GGUF
/// files.
const KINDS: &[Kind] = &[
    Kind {
        names: &["default"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
        ..PLAIN
    },
    Kind {
        names: &[
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "gigachat",
            "exaone4",
            "a.x-4.0",
            "mellum",
            "trillion",
            "modern-bert",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
            "jina-v2-code",
            "granite-docling",
        ],
        patterns: &[GPT2],
        ..PLAIN
    },
    Kind {
        names: &["llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2", "midm-2.0"],
        patterns: &[llama3!("{1,3}")],
        ignore_merges: true,
        add_bos: true,
        ..PLAIN
    },
    Kind {
        names: &["jais-2"],
        patterns: &[concat!(llama3!(@words "{1,3}", r"[\r\n]*"), powers!())],
        ..PLAIN
    },
    Kind { names: &["dbrx", "smaug-bpe", "chatglm-bpe"], patterns: &[llama3!("{1,3}")], ..PLAIN },
    Kind { names: &["glm4", "glm5"], patterns: &[llama3!("{1,3}")], ignore_merges: true, ..PLAIN },
    Kind {
        names: &[
            "qwen2",
            "deepseek-r1-qwen",
            "stablelm2",
            "megrez",
            "hunyuan",
            "kormo",
            "f2llmv2",
            "bailingmoe",
            "bailingmoe2",
            "llada-moe",
            "grok-2",
            "solar-open",
        ],
        patterns: &[llama3!("")],
        ..PLAIN
    },
    Kind {
        names: &["qwen35"],
        patterns: &[concat!(
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}",
            r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )],
        ..PLAIN
    },
    Kind { names: &["gemma4"], patterns: &[r"[^\n]+|\n+"], add_bos: true, as_text: true, ..PLAIN },
    Kind {
        names: &["exaone-moe"],
        patterns: &[concat!(
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
            r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
        )],
        ..PLAIN
    },
    Kind { names: &["minicpm5"], patterns: &[r"\p{N}{1,3}", llama3!("+")], ignore_merges: true, ..PLAIN },
    Kind { names: &["laguna"], patterns: &[r"[^\n]+|\n+", llama3!("")], ..PLAIN },
    Kind { names: &["seed-coder"], patterns: &[llama3!("", "")], ..PLAIN },
    Kind {
        names: &[
            "starcoder",
            "refact",
            "command-r",
            "smollm",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        patterns: &[r"\p{N}", GPT2],
        ..PLAIN
    },
    Kind { names: &["falcon"], patterns: &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"], ..PLAIN },
    Kind {
        names: &["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"],
        patterns: &[cased!(contractions!(), "{1,3}")],
        ..PLAIN
    },
    Kind { names: &["tekken"], patterns: &[cased!("", "")], ignore_merges: true, add_bos: true, ..PLAIN },
    Kind {
        names: &["youtu"],
        patterns: &[
            concat!(
                r"[\x{AC00}-\x{D7A3}\x{3131}-\x{318E}]+",
                r"|[！…“”‘’—：；，\x{3001}-\x{303F}\x{FE30}-\x{FE4F}]+|[\x{3105}-\x{312F}]+",
                r"|[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+"
            ),
            cased!(contractions!(), ""),
        ],
        ignore_merges: true,
        ..PLAIN
    },
    Kind {
        names: &["kimi-k2"],
        patterns: &[concat!(
            "[",
            han!(),
            r"]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^",
            han!(),
            r"]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^",
            han!(),
            "]]+",
            contractions!(),
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^",
            han!(),
            r"]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^",
            han!(),
            "]]*",
            contractions!(),
            r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )],
        ..PLAIN
    },
    Kind { names: &["bloom", "gpt3-finnish", "poro-chat"], patterns: &[BETWEEN_PUNCTUATION], ..PLAIN },
    Kind { names: &["viking"], patterns: &[BETWEEN_PUNCTUATION, r"\p{N}"], ..PLAIN },
    Kind {
        names: &["deepseek-llm"],
        patterns: &[
            r"[\r\n]",
            DEEPSEEK_LETTERS,
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
            r"\s+$",
            r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+",
            r"\p{N}+",
        ],
        ..PLAIN
    },
    Kind {
        names: &["deepseek-coder"],
        patterns: &[
            r"[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+",
            r"\p{N}",
        ],
        ..PLAIN
    },
    Kind {
        names: &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        patterns: &[
            r"\p{N}{1,3}",
            r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
            concat!(
                r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*",
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
        ],
        ..PLAIN
    },
];

/// The defaults of a kind.
const PLAIN: Kind = Kind { names: &[], patterns: &[], ignore_merges: false, add_bos: false, as_text: false };

/// Returns the name in GGUF files of the kind with these patterns.
#[cfg(feature = "convert")]
pub(crate) fn name_of(patterns: &[String], ignore_merges: bool) -> Option<&'static str> {
    let kind = KINDS.iter().find(|kind| kind.patterns == patterns && kind.ignore_merges == ignore_merges);
    kind.and_then(|kind| kind.names.first().copied())
}

/// The part of patterns that leaves the last of several spaces to the next word, if there is one.
const SPACES: &str = r"|\s+(?!\S)";
/// The same in powers of two, and the largest of them.
const POWERS: &str = powers!();
const LARGEST_POWER: usize = 512;

/// Splits text into words.
#[derive(Debug)]
pub(super) struct Pretokenizer {
    patterns: Vec<Pattern>,
    pub(super) ignore_merges: bool,
    pub(super) add_bos: bool,
    pub(super) as_text: bool,
}

impl Pretokenizer {
    /// Finds the kind that files call `name`. An unknown kind is an error: a guess would give wrong tokens.
    pub(super) fn new(name: &str) -> Result<Pretokenizer> {
        let Some(kind) = KINDS.iter().find(|kind| kind.names.contains(&name)) else {
            let known: Vec<&str> = KINDS.iter().flat_map(|kind| kind.names).copied().collect();
            let name = printable(name.as_bytes());
            let message = format!("pre-tokenizer {name} is not supported ({})", known.join(", "));
            return Err(Error::Tokenizer(message));
        };
        let patterns = kind.patterns.iter().map(|pattern| {
            Pattern::new(pattern)
                .map_err(|e| Error::Tokenizer(format!("pre-tokenizer `{name}`: `{pattern}`: {e}")))
        });
        Ok(Pretokenizer {
            patterns: patterns.collect::<Result<_>>()?,
            ignore_merges: kind.ignore_merges,
            add_bos: kind.add_bos,
            as_text: kind.as_text,
        })
    }

    /// Calls `f` with every word, in order; together the words are the text.
    pub(super) fn split<'t>(&self, text: &'t str, f: &mut dyn FnMut(&'t str)) {
        split(&self.patterns, text, f);
    }
}

/// A pattern as an automaton, which takes time proportional to the text. A backtracking search, which
/// look-ahead needs, would exceed its limits in long runs of spaces.
#[derive(Debug)]
struct Pattern {
    /// The pattern without [`SPACES`] or [`POWERS`] at its end, and, if it had that, a pattern for runs of spaces.
    regex: Regex,
    /// Whether it had [`POWERS`].
    in_powers: bool,
}

impl Pattern {
    fn new(pattern: &str) -> Result<Pattern, Box<regex_automata::meta::BuildError>> {
        // A remaining single space is a match or lies between matches, which gives the same words.
        let words = pattern.strip_suffix(r"|\s+").unwrap_or(pattern).strip_suffix(SPACES);
        let in_powers = pattern.strip_suffix(POWERS);
        let regex = match words.or(in_powers) {
            Some(words) => Regex::new_many(&[words, r"\s+"]),
            None => Regex::new(pattern),
        };
        Ok(Pattern { regex: regex?, in_powers: in_powers.is_some() })
    }

    /// Finds the first match from a byte of the text on. It is several words if it is a run of spaces, and these are cut in powers.
    fn find(&self, text: &str, from: usize) -> Option<(std::ops::Range<usize>, bool)> {
        let input = Input::new(text).range(from..);
        // Most words follow each other directly. An anchored search is faster, because the start is known.
        let here = self.regex.find(input.clone().anchored(Anchored::Yes));
        let found = here.or_else(|| self.regex.find(input))?;
        let (start, mut end) = (found.start(), found.end());
        let is_run = found.pattern().as_usize() == 1;
        if is_run && end < text.len() {
            // The last one belongs to the next word.
            let last = text[start..end].chars().next_back().map_or(0, char::len_utf8);
            if start + last < end {
                end -= last;
            }
        }
        Some((start..end, is_run && self.in_powers))
    }
}

/// Calls `f` with the pieces of a run of spaces: each the longest power of two that is left.
fn in_powers<'t>(mut run: &'t str, f: &mut dyn FnMut(&'t str)) {
    let mut left = run.chars().count();
    while left > 0 {
        let taken = LARGEST_POWER.min(1 << left.ilog2());
        let end = run.char_indices().nth(taken).map_or(run.len(), |(at, _)| at);
        f(&run[..end]);
        (run, left) = (&run[end..], left - taken);
    }
}

fn split<'t>(patterns: &[Pattern], text: &'t str, f: &mut dyn FnMut(&'t str)) {
    let Some((pattern, rest)) = patterns.split_first() else {
        if !text.is_empty() {
            f(text);
        }
        return;
    };
    let mut end = 0;
    while let Some((found, is_several)) = pattern.find(text, end) {
        split(rest, &text[end..found.start], f);
        match is_several {
            true => in_powers(&text[found.clone()], &mut |word| split(rest, word, f)),
            false => split(rest, &text[found.clone()], f),
        }
        end = found.end;
    }
    split(rest, &text[end..], f);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(name: &str, text: &'static str) -> Vec<&'static str> {
        let mut words = Vec::new();
        Pretokenizer::new(name).unwrap().split(text, &mut |word| words.push(word));
        words
    }

    #[test]
    fn every_kind_splits_a_text_into_itself() {
        const TEXT: &str = "Hello WORLD's  tokenIZER\r\n\n\tx=12345; 你好ÀÉ e\u{301}!! …/ 'll\u{a0}\u{3000} ";
        for name in KINDS.iter().flat_map(|kind| kind.names) {
            assert_eq!(words(name, TEXT).concat(), TEXT, "{name}");
        }
    }

    /// A run of spaces is cut in the same places however long it is.
    #[test]
    fn long_runs_of_spaces_are_cut_as_short_ones() {
        // Lines are words in vocabularies that spell them as they are.
        for kind in KINDS.iter().filter(|kind| !kind.as_text) {
            let name = kind.names[0];
            let pre = Pretokenizer::new(name).unwrap();
            for space in [" ", "\n", " \n", "\n "] {
                let lengths = |times: usize| {
                    let text = format!("one{}two 12345 they'll!", space.repeat(times));
                    let mut words = Vec::new();
                    pre.split(&text, &mut |word| words.push(word.to_owned()));
                    words.retain(|word| word.chars().any(|c| !c.is_whitespace()));
                    words
                };
                assert_eq!(lengths(60_000), lengths(5), "{name} {space:?}");
            }
            let text = " ".repeat(1_100_000) + "two";
            let (mut words, mut bytes) = (0, 0);
            pre.split(&text, &mut |word| (words, bytes) = (words + 1, bytes + word.len()));
            let most = if pre.patterns[0].in_powers { text.len() / LARGEST_POWER + 10 } else { 3 };
            assert_eq!((words <= most, bytes), (true, text.len()), "{name}");
        }
    }

    #[test]
    fn kinds_differ_in_numbers_case_and_punctuation() {
        const TEXT: &str = "HelloWorld's 12345!/\n";
        for (name, want) in [
            ("gpt-2", &["HelloWorld", "'s", " 12345", "!/", "\n"][..]),
            ("llama-bpe", &["HelloWorld", "'s", " ", "123", "45", "!/\n"]),
            ("qwen2", &["HelloWorld", "'s", " ", "1", "2", "3", "4", "5", "!/\n"]),
            ("starcoder", &["HelloWorld", "'s", " ", "1", "2", "3", "4", "5", "!/", "\n"]),
            ("seed-coder", &["HelloWorld", "'s", " ", "1", "2", "3", "4", "5", "!/", "\n"]),
            ("gpt-4o", &["Hello", "World's", " ", "123", "45", "!/\n"]),
            ("tekken", &["Hello", "World", "'s", " ", "1", "2", "3", "4", "5", "!/\n"]),
            ("falcon", &["HelloWorld", "'", "s", " ", "123", "45", "!/", "\n"]),
            ("deepseek-llm", &["HelloWorld", "'", "s", " ", "12345", "!/", "\n"]),
            ("deepseek-coder", &["HelloWorld", "'", "s", " ", "1", "2", "3", "4", "5", "!/", "\n"]),
            ("deepseek-v3", &["HelloWorld", "'s", " ", "123", "45", "!/\n"]),
            ("qwen35", &["HelloWorld", "'s", " ", "1", "2", "3", "4", "5", "!/\n"]),
            ("gemma4", &["HelloWorld's 12345!/", "\n"]),
            ("jais-2", &["HelloWorld", "'s", " ", "123", "45", "!/\n"]),
            ("kimi-k2", &["Hello", "World's", " ", "123", "45", "!/\n"]),
            ("bloom", &["HelloWorld's", " 12345", "!", "/", "\n"]),
        ] {
            assert_eq!(words(name, TEXT), want, "{name}");
        }
    }
}
