//! Assertions on metrics: `METRIC OPERATOR VALUE`.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Failure;
use super::metrics::{metrics, number};

/// A metric compared with a number, or with the baseline's value of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Assertion {
    text: String,
    metric: String,
    operator: Operator,
    factor: f64,
    /// Whether the value is `factor` times the baseline's.
    of_baseline: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Operator {
    AtLeast,
    AtMost,
    Above,
    Below,
}

impl Operator {
    /// Longer ones first, so that the first one found in a text is the whole of it.
    const ALL: [(&'static str, Operator); 4] =
        [(">=", Operator::AtLeast), ("<=", Operator::AtMost), (">", Operator::Above), ("<", Operator::Below)];

    /// Whether it holds. Nothing holds for NaN.
    fn holds(self, a: f64, b: f64) -> bool {
        match self {
            Operator::AtLeast => a >= b,
            Operator::AtMost => a <= b,
            Operator::Above => a > b,
            Operator::Below => a < b,
        }
    }
}

impl Assertion {
    /// Parses an assertion; the help of the command has the grammar.
    pub fn parse(text: &str) -> Result<Assertion, String> {
        let expected =
            |what: &str| format!("expected {what} in `{text}`, as in `decode.q4_k.gbps >= 0.9*baseline`");
        let found = Operator::ALL.iter().find_map(|(name, operator)| {
            let (metric, value) = text.split_once(name)?;
            Some((metric.trim(), *operator, value.trim()))
        });
        let (metric, operator, value) = found.ok_or_else(|| expected(">=, <=, > or <"))?;
        let is_path = |c: char| c.is_ascii_alphanumeric() || "._+".contains(c);
        if metric.is_empty() || !metric.chars().all(is_path) {
            return Err(expected("the path of a metric on the left"));
        }
        let (mut factor, mut of_baseline) = (None, false);
        for part in value.split('*').map(str::trim) {
            match part.parse::<f64>() {
                Ok(number) if number.is_finite() && factor.is_none() => factor = Some(number),
                _ if part == "baseline" && !of_baseline => of_baseline = true,
                _ => return Err(expected("a number, `baseline` or a product of both on the right")),
            }
        }
        let (text, metric) = (text.to_owned(), metric.to_owned());
        Ok(Assertion { text, metric, operator, factor: factor.unwrap_or(1.0), of_baseline })
    }

    /// Checks a device. Returns the failing values, if it fails.
    fn check(&self, document: &Value, baseline: Option<&Value>) -> Result<Option<String>, Failure> {
        let value = |document: &Value, whose: &str| -> Result<f64, Failure> {
            let metrics = metrics(document);
            let known = || metrics.keys().cloned().collect::<Vec<_>>().join(", ");
            let value = metrics.get(&self.metric).copied();
            Ok(value.ok_or_else(|| {
                format!("--assert `{}`: {whose} has no metric {}; it has {}", self.text, self.metric, known())
            })?)
        };
        let got = value(document, "the file")?;
        let (limit, of) = match (self.of_baseline, baseline) {
            (false, _) => (self.factor, String::new()),
            (true, Some(baseline)) => {
                let base = value(baseline, "the baseline")?;
                (self.factor * base, format!(" (baseline {})", number(base)))
            }
            (true, None) => {
                return Err(format!(
                    "--assert `{}`: `baseline` needs --compare, with the baseline first",
                    self.text
                )
                .into());
            }
        };
        let failed = !self.operator.holds(got, limit);
        Ok(failed.then(|| format!("`{}`: got {}, limit {}{of}", self.text, number(got), number(limit))))
    }
}

/// Checks all assertions; the error has a line for each that fails.
pub fn check(
    assertions: &[Assertion],
    files: &[PathBuf],
    documents: &[Value],
    compare: bool,
) -> Result<(), Failure> {
    let baseline = documents.first().filter(|_| compare);
    let mut failures = Vec::new();
    for (file, document) in files.iter().zip(documents).skip(usize::from(compare)) {
        for assertion in assertions {
            let name = |why: String| format!("{}: {why}", Path::display(file));
            let checked = assertion.check(document, baseline).map_err(|e| name(e.to_string()))?;
            failures.extend(checked.map(name));
        }
    }
    match failures.as_slice() {
        [] => Ok(()),
        failures => Err(format!("assertions failed\n{}", failures.join("\n")).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::sample;
    use super::*;

    #[test]
    fn the_grammar() {
        let parse =
            |text: &str| Assertion::parse(text).map(|a| (a.metric, a.operator, a.factor, a.of_baseline));
        let path = || "decode.q4_k.gbps".to_owned();
        for text in ["decode.q4_k.gbps >= 0.9*baseline", "decode.q4_k.gbps>=baseline * 0.9"] {
            assert_eq!(parse(text), Ok((path(), Operator::AtLeast, 0.9, true)));
        }
        assert_eq!(parse("decode.q4_k.gbps < 3e2"), Ok((path(), Operator::Below, 300.0, false)));
        assert_eq!(parse("decode.q4_k.gbps > baseline"), Ok((path(), Operator::Above, 1.0, true)));
        assert_eq!(parse("a <= 1"), Ok(("a".into(), Operator::AtMost, 1.0, false)));
        for text in [
            "",
            "a",
            "a = 1",
            "a >= ",
            ">= 1",
            "a b >= 1",
            "a >= 1*2",
            "a >= base",
            "a >= 1*baseline*baseline",
            "a >= nan",
            "a >> 1",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn failures_have_values() {
        let files = ["base.json", "new.json"].map(PathBuf::from);
        let run = |text: &str, speed: f64, compare: bool| {
            let documents = [sample(1.0), sample(speed)];
            let skip = usize::from(!compare);
            check(&[Assertion::parse(text).unwrap()], &files[skip..], &documents[skip..], compare)
                .map_err(|e| e.to_string())
        };
        assert_eq!(run("decode.q4_k.gbps >= 0.9*baseline", 0.95, true), Ok(()));
        let error = run("decode.q4_k.gbps >= 0.9*baseline", 0.5, true).unwrap_err();
        let expected =
            "new.json: `decode.q4_k.gbps >= 0.9*baseline`: got 0.500, limit 0.900 (baseline 1.000)";
        assert!(error.contains(expected), "{error}");
        assert_eq!(run("decode.us < 6", 2.0, false), Ok(()));
        let error = run("decode.q5_k.gbps > 1", 1.0, false).unwrap_err();
        assert!(error.contains("has no metric decode.q5_k.gbps; it has ceilings.copy_gbps, "), "{error}");
        assert!(run("decode.us < baseline", 1.0, false).unwrap_err().contains("--compare"));
    }
}
