//! The metrics of a device: numbers with paths, such as `decode.q4_k.gbps`, summed up from its ops.

use std::collections::BTreeMap;

use serde_json::Value;

/// Help for metric paths and assertions.
pub const HELP: &str = "\
Metrics:
  decode.FORMAT.UNIT   products with weights of a format, such as decode.q4_k.gbps, in a step of
                       the fewest tokens
  prefill.FORMAT.UNIT  the same in a step of the most tokens
  decode.OP.UNIT       all ops of a kind, such as decode.attend.us
  decode.us            all ops of a step that computes the most likely token
  ceilings.NAME        read_gbps, copy_gbps, integer_gops, float_gops or launch_us
Ops of a model count as often as they occur, with data from memory where that was measured.
Units: us (microseconds), gbps (gigabytes per second), gops (billions of operations per second)

Assertions: METRIC OPERATOR VALUE. OPERATOR is >=, <=, > or <. VALUE is a number, `baseline`, or
a product of both:
  --assert 'decode.q4_k.gbps >= 0.9*baseline' --assert 'ceilings.launch_us < 20'";

/// The sum of some ops.
#[derive(Default)]
struct Sum {
    seconds: f64,
    bytes: f64,
    operations: f64,
}

/// Returns all metrics of a device by path.
pub fn metrics(document: &Value) -> BTreeMap<String, f64> {
    let mut found = BTreeMap::new();
    let ceilings = &document["ceilings"];
    for (name, key, unit) in [
        ("read_gbps", "read_bytes_per_s", 1e9),
        ("copy_gbps", "copy_bytes_per_s", 1e9),
        ("integer_gops", "integer_ops_per_s", 1e9),
        ("float_gops", "float_ops_per_s", 1e9),
        ("launch_us", "launch_seconds", 1e-6),
    ] {
        if let Some(value) = ceilings[key].as_f64() {
            found.insert(format!("ceilings.{name}"), value / unit);
        }
    }
    let rows: &[Value] = document["ops"].as_array().map_or(&[], Vec::as_slice);
    let tokens = || rows.iter().filter_map(|row| row["tokens"].as_u64());
    let (fewest, most) = (tokens().min(), tokens().max());
    let phases = [("decode", fewest), ("prefill", most.filter(|_| most != fewest))];
    for (phase, tokens) in phases {
        let Some(tokens) = tokens else { continue };
        let mut sums: BTreeMap<String, Sum> = BTreeMap::new();
        for row in step(rows, tokens, fewest) {
            let count = row["count"].as_f64().unwrap_or(1.0);
            let number = |name: &str| count * row[name].as_f64().unwrap_or(0.0);
            let op = row["op"].as_str().unwrap_or("").to_lowercase();
            let mut names = vec![format!("{phase}.{op}.")];
            if ["matmul", "experts"].contains(&op.as_str()) {
                names.push(format!("{phase}.{}.", row["format"].as_str().unwrap_or("").to_lowercase()));
            }
            // A step computes the most likely token, or the most likely ones.
            if op != "topk" {
                names.push(format!("{phase}."));
            }
            for name in names {
                let sum = sums.entry(name).or_default();
                sum.seconds += number("seconds");
                sum.bytes += number("bytes");
                sum.operations += number("operations");
            }
        }
        for (name, sum) in sums.into_iter().filter(|(_, sum)| sum.seconds > 0.0) {
            found.insert(format!("{name}us"), 1e6 * sum.seconds);
            // Of a whole step, only the time.
            if name != format!("{phase}.") {
                found.insert(format!("{name}gbps"), sum.bytes / sum.seconds / 1e9);
                if sum.operations > 0.0 {
                    found.insert(format!("{name}gops"), sum.operations / sum.seconds / 1e9);
                }
            }
        }
    }
    found
}

/// Returns the rows of a step with so many tokens, one for each op: its first row, which is the cold one and
/// that of the first depth. An op on outputs was measured with `fewest` tokens only.
fn step(rows: &[Value], tokens: u64, fewest: Option<u64>) -> Vec<&Value> {
    let key = |row: &Value| ["op", "name", "format", "shape"].map(|name| row[name].clone());
    let mut found: Vec<&Value> = Vec::new();
    let of = |tokens: Option<u64>| rows.iter().filter(move |row| row["tokens"].as_u64() == tokens);
    for row in of(Some(tokens)).chain(of(fewest)) {
        if !found.iter().any(|known| key(known) == key(row)) {
            found.push(row);
        }
    }
    found
}

/// A Markdown table of the metrics of some devices; from the second on with their ratio to the first.
pub fn table(documents: &[Value]) -> String {
    let mut text = String::new();
    let (heads, rows) = cells(documents);
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    text += &line(&heads);
    text += &line(
        &heads
            .iter()
            .enumerate()
            .map(|(i, _)| if i == 0 { "---" } else { "---:" }.into())
            .collect::<Vec<_>>(),
    );
    rows.iter().for_each(|row| text += &line(row));
    text
}

/// The cells of [`table`]: headers and rows.
pub fn cells(documents: &[Value]) -> (Vec<String>, Vec<Vec<String>>) {
    let all: Vec<BTreeMap<String, f64>> = documents.iter().map(metrics).collect();
    let mut names: Vec<&String> = all.iter().flat_map(BTreeMap::keys).collect();
    names.sort();
    names.dedup();
    let mut heads = vec!["metric".to_owned()];
    for (i, document) in documents.iter().enumerate() {
        heads.push(super::title(document).replace('|', "/"));
        if i > 0 {
            heads.push("ratio".into());
        }
    }
    let row = |name: &&String| {
        let mut row = vec![name.to_string()];
        let first = all.first().and_then(|metrics| metrics.get(*name));
        for (i, metrics) in all.iter().enumerate() {
            let value = metrics.get(*name);
            row.push(value.map_or("-".into(), |value| number(*value)));
            if i > 0 {
                let ratio = value.zip(first).map(|(value, first)| format!("{:.2}", value / first));
                row.push(ratio.unwrap_or("-".into()));
            }
        }
        row
    };
    (heads, names.iter().map(row).collect())
}

/// Formats a number with four digits or so.
pub fn number(value: f64) -> String {
    let digits = if value.abs() >= 1000.0 {
        0
    } else if value.abs() >= 10.0 {
        1
    } else {
        3
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::super::tests::sample;
    use super::*;

    #[test]
    fn ops_add_up() {
        let found = metrics(&sample(1.0));
        let close = |name: &str, expected: f64| {
            let got = found.get(name).copied().unwrap_or(f64::NAN);
            assert!((got / expected - 1.0).abs() < 1e-9, "{name}: expected {expected}, got {got}: {found:?}");
        };
        // Two products, cold.
        close("decode.q4_k.us", 2.0);
        close("decode.q4_k.gbps", 1.0);
        close("decode.matmul.gops", 2.0);
        close("prefill.q4_k.gops", 250.0);
        // What has one row in every step counts in both.
        close("decode.us", 2.0 + 2.0 + 6.0);
        close("prefill.us", 8.0 + 2.0 + 6.0);
        close("ceilings.launch_us", 1.0);
        assert!(!found.contains_key("ceilings.float_gops") && !found.contains_key("decode.add.gops"));
        let table = table(&[sample(1.0), sample(2.0)]);
        assert!(table.contains("| decode.q4_k.gbps | 1.000 | 2.000 | 2.00 |"), "{table}");
    }
}
