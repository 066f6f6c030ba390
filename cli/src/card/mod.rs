//! `halite card`: cards of devices, and comparisons of them, from what `halite bench --ops` measured.

mod assert;
mod html;
mod metrics;
mod roofline;

use std::path::{Path, PathBuf};

use clap::Args;
use halite::output::{self, Replace};
use serde_json::Value;

use super::{Failure, interrupt, plain, print, read_text};
use assert::Assertion;

/// The kind of the JSON that `halite bench --ops` writes.
pub const KIND: &str = "halite ops";

/// Reads the JSON of `halite bench --ops -o json`. Prints its metrics, writes a page, or compares devices.
#[derive(Args)]
#[command(after_help = metrics::HELP)]
pub struct CardArgs {
    /// Results of `halite bench --ops -o json`; with --compare several, the first is the baseline.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Put the devices of all files side by side.
    #[arg(long)]
    compare: bool,
    /// Write a page (.html), or the roofline plot of one device (.svg), instead of printing metrics.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Results of `halite bench -o json` to show in the page; may be repeated.
    #[arg(long, value_name = "FILE")]
    card_bench: Vec<PathBuf>,
    /// Fail unless this holds for every file, or with --compare for every file but the baseline; may be
    /// repeated.
    #[arg(long, value_name = "EXPR", value_parser = Assertion::parse)]
    assert: Vec<Assertion>,
}

pub fn card(args: &CardArgs) -> Result<(), Failure> {
    if args.files.len() > 1 && !args.compare {
        return Err("card: expected one file, or several with --compare".into());
    }
    if args.files.len() < 2 && args.compare {
        return Err("card: --compare needs at least two files, the baseline first".into());
    }
    let documents = args.files.iter().map(|file| document(file)).collect::<Result<Vec<_>, _>>()?;
    match &args.output {
        Some(file) => {
            let inputs: Vec<&Path> =
                args.files.iter().chain(&args.card_bench).map(PathBuf::as_path).collect();
            Target::new(file, &args.card_bench, &inputs)?.write(&documents)?;
        }
        None => print(&plain(&metrics::table(&documents)))?,
    }
    assert::check(&args.assert, &args.files, &documents, args.compare)
}

fn json(file: &Path) -> Result<Value, Failure> {
    let text = read_text(file)?;
    Ok(serde_json::from_str(&text).map_err(|e| format!("{}: expected JSON: {e}", file.display()))?)
}

fn document(file: &Path) -> Result<Value, Failure> {
    let document = json(file)?;
    match document["kind"] == KIND {
        true => Ok(document),
        false => Err(format!(
            "{}: expected the results of `halite bench --ops -o json`, got other JSON",
            file.display()
        )
        .into()),
    }
}

/// The results of `halite bench -o json`: an array of tests.
fn tests(file: &Path) -> Result<Vec<Value>, Failure> {
    match json(file)? {
        Value::Array(rows) if rows.iter().all(|row| row["test"].is_string()) => Ok(rows),
        _ => {
            Err(format!("{}: expected the results of `halite bench -o json`, got other JSON", file.display())
                .into())
        }
    }
}

/// A file to write a card to.
pub struct Target {
    file: PathBuf,
    replace: Replace,
    tests: Vec<Value>,
}

/// Files that a card may replace.
const HTML: Replace = Replace::StartingWith(b"<!DOCTYPE html>", "an HTML page");
const SVG: Replace = Replace::StartingWith(b"<svg", "an SVG drawing");

impl Target {
    /// Checks that the file may be written, and reads the results to show, before the work starts.
    pub fn new(file: &Path, benches: &[PathBuf], inputs: &[&Path]) -> Result<Target, Failure> {
        let ends = |end: &str| file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(end));
        let replace = match () {
            () if ends("html") => HTML,
            () if ends("svg") => SVG,
            () => return Err(format!("{}: expected a file name in .html or .svg", file.display()).into()),
        };
        output::check(file, replace, inputs)?;
        let mut all = Vec::new();
        for bench in benches {
            all.extend(tests(bench)?);
        }
        Ok(Target { file: file.to_owned(), replace, tests: all })
    }

    /// Writes the card of one device, or a page that compares several.
    pub fn write(&self, documents: &[Value]) -> Result<(), Failure> {
        let text = match (self.replace, documents) {
            (HTML, documents) => html::page(documents, &self.tests),
            (_, [document]) => roofline::svg(document, true),
            (_, _) => return Err("card: a drawing shows one device: write an .html page to compare".into()),
        };
        interrupt::write(&self.file, self.replace, &[], text.as_bytes())
    }
}

/// Names a device for people.
fn title(document: &Value) -> String {
    let text = |name: &str| document[name].as_str().unwrap_or("?");
    format!("{} ({})", text("backend"), text("device"))
}

/// Formats a number with three digits and a decimal prefix.
fn scaled(value: f64, unit: &str) -> String {
    const PREFIXES: [(f64, &str); 9] = [
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
        (1.0, ""),
        (1e-3, "m"),
        (1e-6, "µ"),
        (1e-9, "n"),
    ];
    if value == 0.0 || !value.is_finite() {
        return format!("{value} {unit}");
    }
    let found = PREFIXES.iter().find(|(factor, _)| value.abs() >= *factor);
    let (factor, prefix) = found.copied().unwrap_or((1e-9, "n"));
    let number = value / factor;
    let digits = if number.abs() >= 100.0 {
        0
    } else if number.abs() >= 10.0 {
        1
    } else {
        2
    };
    format!("{number:.digits$} {prefix}{unit}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Results of two products and an addition, in two steps.
    pub fn sample(speed: f64) -> Value {
        let row = |op: &str, format: &str, tokens: u32, cache: &str, seconds: f64, operations: f64| {
            json!({
                "op": op, "name": "x<&\">", "format": format, "shape": "8x8", "tokens": tokens, "depth": 0,
                "count": 2, "cache": cache, "clock": "device", "seconds": seconds / speed, "spread": 0.1,
                "bytes": 1000, "operations": operations,
                "bytes_per_s": 1000.0 * speed / seconds, "ops_per_s": operations * speed / seconds,
                "roofline_percent": 50.0, "bound": "memory",
            })
        };
        json!({
            "kind": KIND, "halite": "1", "date": "2026-01-01", "backend": "gpu", "device": "a <b> & \"c\"",
            "clock": "device", "model": "m",
            "machine": { "cpu": "c", "cores": 2, "memory_bytes": 1u64 << 34, "os": "linux" },
            "ceilings": {
                "by": "kernels", "read_bytes_per_s": 2e9, "copy_bytes_per_s": 1e9,
                "integer_ops_per_s": 1e12, "float_ops_per_s": null, "launch_seconds": 1e-6,
            },
            "ops": [
                row("MatMul", "Q4_K", 1, "cold", 1e-6, 2000.0), row("MatMul", "Q4_K", 1, "warm", 0.5e-6, 2000.0),
                row("MatMul", "Q4_K", 512, "cold", 4e-6, 1e6), row("Add", "F32", 1, "warm", 1e-6, 0.0),
                row("ArgMax", "F32", 1, "warm", 3e-6, 0.0),
            ],
            "gaps": ["TopK in `head`: not yet: <later>"],
        })
    }

    #[test]
    fn numbers_for_people() {
        assert_eq!(scaled(1.234e12, "B/s"), "1.23 TB/s");
        assert_eq!(scaled(99.5e-6, "s"), "99.5 µs");
        assert_eq!(scaled(512.0, "B"), "512 B");
        assert_eq!(scaled(0.0, "s"), "0 s");
    }

    #[test]
    fn cards_are_valid_xml() {
        let tests = [json!({ "model": "a&b", "test": "tg128", "backend": "gpu", "clock": "device",
            "generated_tokens": 128, "prompt_tokens": 0, "median_tokens_per_s": 20.0,
            "predicted_tokens_per_s": 22.0 })];
        let empty = json!({ "kind": KIND, "ops": [] });
        for documents in [vec![sample(1.0)], vec![sample(1.0), sample(2.0)], vec![empty]] {
            let page = html::page(&documents, &tests);
            let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
            let parsed = roxmltree::Document::parse_with_options(&page, options);
            let parsed = parsed.unwrap_or_else(|e| panic!("{e}\n{page}"));
            // Nothing is loaded from elsewhere, and nothing runs.
            for node in parsed.descendants() {
                assert!(!["script", "link", "img", "iframe"].contains(&node.tag_name().name()));
                assert!(node.attributes().all(|a| !a.name().starts_with("on") && a.name() != "href"));
            }
            assert!(!page.contains("url(") && !page.contains("@import"));
            for document in &documents {
                let drawing = roofline::svg(document, true);
                roxmltree::Document::parse(&drawing).unwrap_or_else(|e| panic!("{e}\n{drawing}"));
            }
        }
        let page = html::page(&[sample(1.0)], &tests);
        for expected in ["measured", "estimated", "a &lt;b&gt; &amp; &quot;c&quot;", "2.00 GB/s", "Q4_K"] {
            assert!(page.contains(expected), "{expected}\n{page}");
        }
        let mut simulated = sample(1.0);
        simulated["clock"] = "simulated".into();
        simulated["ops"].as_array_mut().unwrap().iter_mut().for_each(|op| op["clock"] = "simulated".into());
        assert!(html::page(&[simulated], &[]).contains(">simulated<"));
    }
}
