//! The requests of a simulated load: drawn from distributions, or read from a trace.

use std::collections::HashMap;
use std::io::Read;
use std::str::FromStr;

use halite::error::{Error, Result};
use halite::rng::SplitMix64;

/// A request of a load.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Request {
    /// Seconds from the start of the load.
    pub arrival_s: f64,
    /// Tokens of the prompt, at least one.
    pub prompt: u32,
    /// Tokens of the answer, at least one.
    pub generate: u32,
    /// What its prompt begins with, if others begin with it too.
    pub prefix: Option<Prefix>,
}

/// The beginning of a prompt that several requests share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    /// The group of requests that share it, counted from 0.
    pub group: u32,
    /// Its tokens.
    pub tokens: u32,
}

impl Request {
    /// A request whose prompt nobody shares.
    pub const fn new(arrival_s: f64, prompt: u32, generate: u32) -> Request {
        Request { arrival_s, prompt, generate, prefix: None }
    }
}

halite::setters!(Request { prefix: Option<Prefix> });

/// A distribution of lengths in tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Length {
    /// The same number.
    Fixed(u32),
    /// Every number from the first to the second, equally often.
    Uniform(u32, u32),
    /// A log-normal distribution with this median and 95th percentile, rounded to at least one.
    LogNormal(f64, f64),
}

/// Standard deviations from the median to the 95th percentile of a normal distribution.
const P95: f64 = 1.644_853_626_951_472_6;

impl Length {
    /// The largest number that it can give, if there is one.
    pub fn most(self) -> Option<u32> {
        match self {
            Length::Fixed(tokens) | Length::Uniform(_, tokens) => Some(tokens),
            Length::LogNormal(..) => None,
        }
    }

    fn draw(self, random: &mut SplitMix64) -> u32 {
        match self {
            Length::Fixed(tokens) => tokens,
            Length::Uniform(from, to) => {
                let count = f64::from(to - from) + 1.0;
                from + ((unit(random) * count) as u32).min(to - from)
            }
            Length::LogNormal(median, p95) => {
                // Box and Muller 1958.
                let radius = (-2.0 * (1.0 - unit(random)).ln()).sqrt();
                let normal = radius * (std::f64::consts::TAU * unit(random)).cos();
                let tokens = median * (normal * (p95 / median).ln() / P95).exp();
                // The cast saturates.
                (tokens.round() as u32).max(1)
            }
        }
    }
}

/// Returns a random number in [0, 1).
fn unit(random: &mut SplitMix64) -> f64 {
    (random.next() >> 11) as f64 / (1u64 << 53) as f64
}

impl FromStr for Length {
    type Err = Error;

    fn from_str(text: &str) -> Result<Length> {
        let bad = || {
            let expected = "a number from 1, uniform:A..B with A up to B, or lognormal:MEDIAN,P95 with 1 up to MEDIAN up to P95";
            Error::argument("length", expected, format!("`{text}`"))
        };
        let count = |text: &str| text.parse().ok().filter(|tokens| *tokens >= 1u32).ok_or_else(bad);
        if let Some(range) = text.strip_prefix("uniform:") {
            let (from, to) = range.split_once("..").ok_or_else(bad)?;
            let (from, to) = (count(from)?, count(to)?);
            return if from <= to { Ok(Length::Uniform(from, to)) } else { Err(bad()) };
        }
        if let Some(pair) = text.strip_prefix("lognormal:") {
            let (median, p95) = pair.split_once(',').ok_or_else(bad)?;
            let number = |text: &str| text.parse::<f64>().ok().filter(|n| n.is_finite()).ok_or_else(bad);
            let (median, p95) = (number(median)?, number(p95)?);
            return if 1.0 <= median && median <= p95 {
                Ok(Length::LogNormal(median, p95))
            } else {
                Err(bad())
            };
        }
        count(text).map(Length::Fixed)
    }
}

/// The lengths of prompts and answers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lengths {
    /// Of prompts, without a shared beginning.
    pub prompt: Length,
    /// Of answers.
    pub generate: Length,
}

/// Lengths by name, made up to have something to begin with: none was measured, so replace them by those of a trace.
pub const NAMED: [(&str, Lengths); 3] = [
    ("chat", Lengths { prompt: Length::LogNormal(300.0, 2000.0), generate: Length::LogNormal(200.0, 800.0) }),
    (
        "summarise",
        Lengths { prompt: Length::LogNormal(2500.0, 7000.0), generate: Length::LogNormal(150.0, 400.0) },
    ),
    ("code", Lengths { prompt: Length::LogNormal(1200.0, 5000.0), generate: Length::LogNormal(40.0, 300.0) }),
];

impl FromStr for Lengths {
    type Err = Error;

    /// Parses a name of [`NAMED`], or `PROMPT/ANSWER`.
    fn from_str(text: &str) -> Result<Lengths> {
        if let Some((_, lengths)) = NAMED.iter().find(|(name, _)| *name == text) {
            return Ok(*lengths);
        }
        let Some((prompt, generate)) = text.split_once('/') else {
            let names = NAMED.map(|(name, _)| name).join(", ");
            let expected = format!("{names}, or PROMPT/ANSWER, such as lognormal:300,2000/uniform:50..200");
            return Err(Error::argument("lengths", expected, format!("`{text}`")));
        };
        Ok(Lengths { prompt: prompt.parse()?, generate: generate.parse()? })
    }
}

/// Where requests come from.
#[derive(Debug, Clone, PartialEq)]
pub enum Source {
    /// Poisson arrivals, at each of these rates in requests per second.
    Poisson(Vec<f64>),
    /// A trace in a file.
    File(String),
}

/// The most rates of a sweep.
const MOST_RATES: usize = 64;

impl FromStr for Source {
    type Err = Error;

    /// Parses `poisson:RATE,…`, where `A..B` stands for `A`, `2 A`, `4 A` and so on to `B`; or a file's name.
    fn from_str(text: &str) -> Result<Source> {
        let Some(list) = text.strip_prefix("poisson:") else { return Ok(Source::File(text.into())) };
        let bad = |got: &str| {
            let expected =
                format!("up to {MOST_RATES} rates above 0 in requests/s, such as 4 or 1,2,4 or 1..64");
            Error::argument("load", expected, format!("`{got}`"))
        };
        let rate = |text: &str| {
            text.parse::<f64>().ok().filter(|r| *r > 0.0 && r.is_finite()).ok_or_else(|| bad(text))
        };
        let mut rates = Vec::new();
        for item in list.split(',') {
            let (from, to) = match item.split_once("..") {
                Some((from, to)) => (rate(from)?, rate(to)?),
                None => (rate(item)?, rate(item)?),
            };
            if from > to {
                return Err(bad(item));
            }
            let mut next = from;
            while next < to && rates.len() < MOST_RATES {
                rates.push(next);
                next *= 2.0;
            }
            rates.push(to);
        }
        if rates.len() > MOST_RATES {
            return Err(bad(list));
        }
        rates.sort_by(f64::total_cmp);
        rates.dedup();
        Ok(Source::Poisson(rates))
    }
}

/// What is drawn for requests.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Draw {
    /// Number of requests.
    pub requests: u32,
    /// The same seed gives the same requests.
    pub seed: u64,
    /// Lengths of prompts and answers.
    pub lengths: Lengths,
    /// Tokens that each prompt begins with, in addition to its length; 0: no shared beginning.
    pub prefix: u32,
    /// Number of different beginnings.
    pub groups: u32,
    /// The most tokens of a prompt and its answer.
    pub context: u32,
}

halite::setters!(const Draw { prefix: u32, groups: u32, context: u32 });

impl Draw {
    /// Requests without shared beginnings.
    pub const fn new(requests: u32, seed: u64, lengths: Lengths, context: u32) -> Draw {
        Draw { requests, seed, lengths, prefix: 0, groups: 1, context }
    }

    /// Draws requests with Poisson arrivals of a rate in requests per second. Returns how many were cut to the context too.
    /// All rates have the same requests, only closer or farther apart.
    ///
    /// # Errors
    /// [`Error::Argument`] for a rate or a number that is not above 0, and for lengths with bounds beyond the context.
    pub fn poisson(&self, rate: f64) -> Result<(Vec<Request>, u32)> {
        if !(rate > 0.0 && rate.is_finite()) {
            return Err(Error::argument("rate", "above 0 requests/s", rate));
        }
        if self.requests == 0 || self.groups == 0 {
            return Err(Error::argument("requests and groups", "at least 1", 0));
        }
        let Lengths { prompt, generate } = self.lengths;
        // One without a bound takes at least a token.
        let least = u64::from(prompt.most().unwrap_or(1)) + u64::from(generate.most().unwrap_or(1));
        let least = least + u64::from(self.prefix);
        if least > self.context.into() {
            let expected = format!("at most the context of {} tokens", self.context);
            return Err(Error::argument("prompt, prefix and answer", expected, least));
        }
        let mut random = SplitMix64::new(self.seed);
        let (mut now, mut cut) = (0.0, 0);
        let mut requests = Vec::new();
        for _ in 0..self.requests {
            now -= (1.0 - unit(&mut random)).ln() / rate;
            let (prompt, generate) = (prompt.draw(&mut random), generate.draw(&mut random));
            let group = ((unit(&mut random) * f64::from(self.groups)) as u32).min(self.groups - 1);
            let prefix = (self.prefix > 0).then_some(Prefix { group, tokens: self.prefix });
            let room = self.context - self.prefix;
            // A prompt that fills the context leaves a token to the answer.
            let kept = prompt.min(room - self.lengths.generate.most().unwrap_or(1).min(room - 1));
            let answer = generate.min(room - kept);
            cut += u32::from(kept < prompt || answer < generate);
            requests.push(Request { arrival_s: now, prompt: self.prefix + kept, generate: answer, prefix });
        }
        Ok((requests, cut))
    }
}

/// The columns of a trace; the last two may be missing.
const COLUMNS: [&str; 5] =
    ["arrival_s", "prompt_tokens", "generated_tokens", "prefix_tokens", "prefix_group"];

/// Reads a trace: CSV with the columns `arrival_s`, `prompt_tokens` and `generated_tokens`, and, for prompts that begin alike,
/// `prefix_tokens` and `prefix_group` (any text). Requests are put in the order of arrival. `origin` names the file in errors.
///
/// # Errors
/// [`Error::Argument`] with the line, the column, what was expected and what is there.
pub fn read(origin: &str, input: impl Read, context: u32) -> Result<Vec<Request>> {
    let fail = |place: &str, expected: &str, got: &str| {
        Error::argument("trace", expected, format!("{got} ({origin}{place})"))
    };
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).comment(Some(b'#')).from_reader(input);
    let malformed = |error: csv::Error| {
        let line = error.position().map_or_else(String::new, |p| format!(", line {}", p.line()));
        fail(&line, "CSV with as many fields in each line as names", &error.to_string())
    };
    let names = reader.headers().map_err(malformed)?.clone();
    if let Some(unknown) = names.iter().find(|name| !COLUMNS.contains(name)) {
        return Err(fail(", line 1", &format!("columns {}", COLUMNS.join(", ")), &format!("`{unknown}`")));
    }
    let place = |column: &str| names.iter().position(|name| name == column);
    if let Some(missing) = COLUMNS[..3].iter().find(|column| place(column).is_none()) {
        return Err(fail(", line 1", &format!("a column `{missing}`"), &format!("`{}`", join(&names))));
    }
    let places = COLUMNS.map(place);
    let mut groups: HashMap<String, u32> = HashMap::new();
    let mut requests = Vec::new();
    for record in reader.records() {
        let record = record.map_err(malformed)?;
        let line = record.position().map_or(0, csv::Position::line);
        let field = |column: usize| places[column].and_then(|i| record.get(i)).unwrap_or("");
        let wrong = |column: usize, expected: &str| {
            let place = format!(", line {line}, column {}", COLUMNS[column]);
            fail(&place, expected, &format!("`{}`", field(column)))
        };
        let arrival_s = field(0).parse().ok().filter(|s: &f64| *s >= 0.0 && s.is_finite());
        let arrival_s = arrival_s.ok_or_else(|| wrong(0, "seconds from 0"))?;
        let count = |column: usize, least: u32| {
            let tokens = field(column).parse().ok().filter(|tokens| (least..=context).contains(tokens));
            tokens.ok_or_else(|| wrong(column, &format!("a number from {least} to the context of {context}")))
        };
        let (prompt, generate) = (count(1, 1)?, count(2, 1)?);
        if u64::from(prompt) + u64::from(generate) > context.into() {
            let expected = format!("at most {} beside the prompt, within the context", context - prompt);
            return Err(wrong(2, &expected));
        }
        let shared = if field(3).is_empty() { 0 } else { count(3, 0)? };
        if shared > prompt {
            return Err(wrong(3, &format!("at most the prompt's {prompt}")));
        }
        let prefix = (shared > 0).then(|| {
            let next = groups.len() as u32;
            let group = *groups.entry(field(4).to_owned()).or_insert(next);
            Prefix { group, tokens: shared }
        });
        requests.push(Request { arrival_s, prompt, generate, prefix });
    }
    if requests.is_empty() {
        return Err(fail("", "at least one request", "none"));
    }
    requests.sort_by(|a, b| a.arrival_s.total_cmp(&b.arrival_s));
    Ok(requests)
}

fn join(names: &csv::StringRecord) -> String {
    names.iter().collect::<Vec<_>>().join(",")
}
