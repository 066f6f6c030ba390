//! The page of a device, or of several side by side: HTML without scripts that loads nothing.

use serde_json::Value;

use super::metrics;
use super::roofline::{self, STYLE, THEME};
use super::{scaled, title};

const PAGE: &str = "\
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p, li, .soft { color: var(--soft); }
.wide { overflow-x: auto; } .wide svg { display: block; width: 100%; min-width: 34rem; }
.sides { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
table { border-collapse: collapse; font-size: 0.875rem; }
th, td { padding: 0.25rem 0.6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th.text, td.text { text-align: left; }
.tag { border: 1px solid var(--line); border-radius: 1rem; padding: 0 0.6rem; font-size: 0.8rem; }
.bars { width: 100%; } .bars td.bar { width: 60%; }
.bar div { height: 0.9rem; background: var(--c0); border-radius: 2px; }
.bar div.prefill { background: var(--c2); } .bar div.estimated { opacity: 0.5; }
";

/// Escapes a text for HTML and SVG. Control characters, which neither allows, are left out.
pub fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars().filter(|c| !c.is_control() && !matches!(c, '\u{fffe}' | '\u{ffff}')) {
        match c {
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '&' => out += "&amp;",
            '"' => out += "&quot;",
            c => out.push(c),
        }
    }
    out
}

/// Where a number comes from, by the clock that measured it.
fn provenance(clock: &Value) -> &'static str {
    match clock.as_str() {
        Some("simulated") => "simulated",
        Some("device") => "measured by the device's clock",
        Some(_) => "measured by the host's clock",
        None => "unknown",
    }
}

fn tag(text: &str) -> String {
    format!(r#"<span class="tag">{}</span>"#, escaped(text))
}

/// A table; the first `texts` columns are texts.
fn table(heads: &[&str], texts: usize, rows: &[Vec<String>]) -> String {
    let class = |i: usize| if i < texts { r#" class="text""# } else { "" };
    let line = |tag: &str, cells: &[String]| {
        let cells = cells.iter().enumerate();
        let cells = cells.map(|(i, cell)| format!("<{tag}{}>{}</{tag}>", class(i), escaped(cell)));
        format!("<tr>{}</tr>\n", cells.collect::<String>())
    };
    let heads: Vec<String> = heads.iter().map(|&head| head.into()).collect();
    let body: String = rows.iter().map(|row| line("td", row)).collect();
    format!("<div class=\"wide\"><table>\n{}{body}</table></div>\n", line("th", &heads))
}

/// The page of one device, or a page that compares several with the first.
pub fn page(documents: &[Value], tests: &[Value]) -> String {
    let name = match documents {
        [one] => title(one),
        many => many.iter().map(title).collect::<Vec<_>>().join(" and "),
    };
    let mut body = format!("<h1>{}</h1>\n", escaped(&name));
    if documents.len() > 1 {
        let (heads, rows) = metrics::cells(documents);
        let heads: Vec<&str> = heads.iter().map(String::as_str).collect();
        body += "<h2>Side by side</h2>\n<p>Ratios are to the first device.</p>\n";
        body += &table(&heads, 1, &rows);
        let sides = documents.iter().map(|document| {
            format!(
                "<section>\n<h2>{}</h2>\n{}{}<div class=\"wide\">{}</div>\n</section>\n",
                escaped(&title(document)),
                facts(document),
                ceilings(document),
                roofline::svg(document, false)
            )
        });
        body += &format!("<div class=\"sides\">\n{}</div>\n{}", sides.collect::<String>(), models(tests));
    }
    if let [document] = documents {
        body += &facts(document);
        body += &ceilings(document);
        body += "<h2>Roofline</h2>\n<p>Each mark is an op that multiplies. The slope is the rate of reading, \
                 flat lines are the peaks.</p>\n";
        body += &format!("<div class=\"wide\">{}</div>\n", roofline::svg(document, false));
        body += &models(tests);
        body += &ops(document);
    }
    body += ORIGINS;
    format!(
        "<!DOCTYPE html>\n<html xmlns=\"http://www.w3.org/1999/xhtml\" lang=\"en\">\n<head>\n\
         <meta charset=\"utf-8\"/>\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <title>{}</title>\n<style>\n{THEME}{STYLE}{PAGE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n",
        escaped(&name)
    )
}

/// What was measured: device, machine and versions.
fn facts(document: &Value) -> String {
    let text = |value: &Value| match value {
        Value::Null => "unknown".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let machine = &document["machine"];
    let bytes = |value: &Value| value.as_u64().map_or("unknown".into(), crate::bytes);
    let rows = [
        ("Backend", text(&document["backend"])),
        ("Device", text(&document["device"])),
        ("Ops of", document["model"].as_str().unwrap_or("a list").into()),
        (
            "Host",
            format!(
                "{}, {} cores, {} of memory, last cache {}, {}",
                text(&machine["cpu"]),
                text(&machine["cores"]),
                bytes(&machine["memory_bytes"]),
                bytes(&machine["cache_bytes"]),
                text(&machine["os"])
            ),
        ),
        ("Halite", format!("{}, {}", text(&document["halite"]), text(&document["date"]))),
    ];
    let row = |(name, value): &(&str, String)| {
        format!("<tr><td class=\"text soft\">{name}</td><td class=\"text\">{}</td></tr>\n", escaped(value))
    };
    let rows: String = rows.iter().map(row).collect();
    let tag = tag(provenance(&document["clock"]).split(' ').next().unwrap_or(""));
    format!("<p>{tag}</p>\n<div class=\"wide\"><table>\n{rows}</table></div>\n")
}

fn ceilings(document: &Value) -> String {
    let c = &document["ceilings"];
    let (kind, clock) = match c["by"].as_str() {
        Some("kernels") => ("by its own kernels", &document["clock"]),
        _ => ("by the CPU's instructions", &Value::Null),
    };
    let from = if clock.is_null() { "measured by the host's clock" } else { provenance(clock) };
    let rows: Vec<Vec<String>> = [
        ("Read", "read_bytes_per_s", "B/s"),
        ("Copy", "copy_bytes_per_s", "B/s"),
        ("Integer products", "integer_ops_per_s", "OP/s"),
        ("Float products", "float_ops_per_s", "OP/s"),
        ("Smallest op", "launch_seconds", "s"),
    ]
    .into_iter()
    .filter_map(|(name, key, unit)| {
        let how = if key == "launch_seconds" { provenance(&document["clock"]) } else { from };
        Some(vec![name.into(), scaled(c[key].as_f64()?, unit), how.into()])
    })
    .collect();
    if rows.is_empty() {
        return String::new();
    }
    format!("<h2>Ceilings, {kind}</h2>\n{}", table(&["", "rate", "from"], 1, &rows))
}

/// Bars of whole models.
fn models(tests: &[Value]) -> String {
    let number = |row: &Value, name: &str| row[name].as_f64().unwrap_or(0.0);
    let mut out = String::new();
    for (phase, tokens) in [("decode", "generated_tokens"), ("prefill", "prompt_tokens")] {
        let rows: Vec<&Value> = tests.iter().filter(|row| number(row, tokens) > 0.0).collect();
        let rates = ["median_tokens_per_s", "predicted_tokens_per_s"];
        let largest = rows.iter().flat_map(|row| rates.map(|rate| number(row, rate))).fold(0.0, f64::max);
        if largest <= 0.0 {
            continue;
        }
        let mut lines = String::new();
        for row in rows {
            for (rate, class) in rates.into_iter().zip(["", " estimated"]) {
                let value = number(row, rate);
                if value <= 0.0 {
                    continue;
                }
                let text = |name: &str| escaped(row[name].as_str().unwrap_or("?"));
                let from = if class.is_empty() { provenance(&row["clock"]) } else { "estimated" };
                lines += &format!(
                    "<tr><td class=\"text\">{} {} on {}</td><td class=\"bar\"><div class=\"{phase}{class}\" style=\"width: {:.1}%\"></div></td><td>{}</td><td class=\"text soft\">{from}</td></tr>\n",
                    text("model"),
                    text("test"),
                    text("backend"),
                    100.0 * value / largest,
                    metrics::number(value),
                );
            }
        }
        out += &format!(
            "<h2>Whole models, {phase}, tokens per second</h2>\n<div class=\"wide\"><table class=\"bars\">\n{lines}</table></div>\n"
        );
    }
    out
}

fn ops(document: &Value) -> String {
    let rows: &[Value] = document["ops"].as_array().map_or(&[], Vec::as_slice);
    let heads = [
        "op",
        "name",
        "format",
        "shape",
        "cache",
        "bound",
        "from",
        "tokens",
        "depth",
        "count",
        "time",
        "± %",
        "bytes",
        "operations",
        "bytes/s",
        "operations/s",
        "% of ceiling",
    ];
    let cells = |row: &Value| {
        let text = |name: &str| row[name].as_str().unwrap_or("-").to_owned();
        let whole = |name: &str| row[name].to_string();
        let number = |name: &str, unit: &str| {
            row[name].as_f64().filter(|x| *x > 0.0).map_or("-".into(), |x| scaled(x, unit))
        };
        let percent = |name: &str, factor: f64| {
            row[name].as_f64().map_or("-".into(), |share| format!("{:.1}", factor * share))
        };
        let from = provenance(&row["clock"]).split(' ').next().unwrap_or("").to_owned();
        vec![
            text("op"),
            text("name"),
            text("format"),
            text("shape"),
            text("cache"),
            text("bound"),
            from,
            whole("tokens"),
            whole("depth"),
            whole("count"),
            number("seconds", "s"),
            percent("spread", 50.0),
            number("bytes", "B"),
            number("operations", "OP"),
            number("bytes_per_s", "B/s"),
            number("ops_per_s", "OP/s"),
            percent("roofline_percent", 1.0),
        ]
    };
    let rows: Vec<Vec<String>> = rows.iter().map(cells).collect();
    let gaps = document["gaps"].as_array().map_or(&[][..], Vec::as_slice);
    let gaps: String =
        gaps.iter().filter_map(Value::as_str).map(|gap| format!("<li>{}</li>\n", escaped(gap))).collect();
    let gaps = if gaps.is_empty() {
        gaps
    } else {
        format!("<h2>Ops that it does not run</h2>\n<ul>\n{gaps}</ul>\n")
    };
    format!("<h2>Ops</h2>\n{}{gaps}", table(&heads, 7, &rows))
}

/// What the words for provenance mean.
const ORIGINS: &str = "\
<h2>Where the numbers come from</h2>
<ul>
<li><b>measured</b>: timed on the device, by its own clock or by the host's, as each number says</li>
<li><b>simulated</b>: the time that a model of the chip computes; no such chip ran</li>
<li><b>estimated</b>: predicted from a profile, without running anything</li>
<li>Bytes and operations are counted from shapes: each byte once per op, a multiply-add as two operations.</li>
<li><b>cold</b>: weights and KV cache come from memory; <b>warm</b>: the same buffers again and again, from caches if they
fit. Rates from caches can exceed the ceilings.</li>
<li>Ceilings by its own kernels are what the backend reaches with its best op, not what the hardware can do.</li>
</ul>
";
