//! The roofline plot of a device, as SVG with classes, so that it follows the reader's light or dark theme.

use std::fmt::Write;

use serde_json::Value;

use super::html::escaped;
use super::scaled;

/// Colours and sizes of a plot. A page that holds the plot has [`THEME`] too.
pub const STYLE: &str = "\
.plot text { fill: var(--ink); font: 14px system-ui, sans-serif; }
.plot .small { font-size: 12px; fill: var(--soft); }
.plot .grid { stroke: var(--line); stroke-width: 1; }
.plot .roof { stroke: var(--ink); stroke-width: 1.5; fill: none; }
.plot .point { stroke: currentColor; stroke-width: 1.5; fill: currentColor; fill-opacity: 0.75; }
.plot .hollow { fill: none; }
.plot .f0 { color: var(--c0); } .plot .f1 { color: var(--c1); } .plot .f2 { color: var(--c2); }
.plot .f3 { color: var(--c3); } .plot .f4 { color: var(--c4); } .plot .f5 { color: var(--c5); }
.plot .key { color: var(--ink); }
";

/// Colours of both themes; those of formats are told apart by colour-blind people (Okabe & Ito 2008).
pub const THEME: &str = "\
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --soft: #5c5c5c; --line: #e0e0e0;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b0568f; --c4: #b07800; --c5: #3a8fc4; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --ink: #e8e8e8; --soft: #a4a8ad; --line: #33373c;
    --c0: #56b4e9; --c1: #ff8b4d; --c2: #2fcf9f; --c3: #e59ac6; --c4: #f0b429; --c5: #8ec9f0; }
}
";

/// Number of colours of formats.
const COLOURS: usize = 6;
/// The area of the plot within the drawing.
const LEFT: f64 = 84.0;
const TOP: f64 = 20.0;
const RIGHT: f64 = 700.0;
const BOTTOM: f64 = 420.0;

/// A decimal axis.
struct Axis {
    /// Logarithms of the ends.
    low: f64,
    high: f64,
    /// Their places in the drawing.
    from: f64,
    to: f64,
}

impl Axis {
    fn of(values: &[f64], from: f64, to: f64) -> Axis {
        let logs = values.iter().filter(|v| v.is_finite() && **v > 0.0).map(|v| v.log10());
        let (low, high) = logs.fold((f64::MAX, f64::MIN), |(a, b), v| (a.min(v), b.max(v)));
        let (low, high) = if low > high { (0.0, 1.0) } else { (low - 0.3, high + 0.3) };
        Axis { low, high, from, to }
    }

    fn at(&self, value: f64) -> f64 {
        let share = (value.log10() - self.low) / (self.high - self.low);
        self.from + share * (self.to - self.from)
    }

    /// The powers of ten on the axis; on a short axis also twice and five times these.
    fn ticks(&self) -> impl Iterator<Item = f64> {
        let between: &[f64] = if self.high - self.low > 2.5 { &[1.0] } else { &[1.0, 2.0, 5.0] };
        let powers = self.low.floor() as i32..=self.high.floor() as i32;
        let ticks = powers.flat_map(move |power| between.iter().map(move |n| n * 10f64.powi(power)));
        ticks.filter(|tick| (self.low..=self.high).contains(&tick.log10()))
    }
}

/// The step of a point.
#[derive(Clone, Copy, PartialEq)]
enum Mark {
    Decode,
    Between,
    Prefill,
}

impl Mark {
    fn of(tokens: u64, fewest: u64, most: u64) -> Mark {
        match tokens {
            tokens if tokens == fewest => Mark::Decode,
            tokens if tokens == most => Mark::Prefill,
            _ => Mark::Between,
        }
    }

    fn draw(self, x: f64, y: f64, class: &str) -> String {
        match self {
            Mark::Decode => {
                format!(
                    r#"<rect class="point {class}" x="{:.1}" y="{:.1}" width="9" height="9">"#,
                    x - 4.5,
                    y - 4.5
                )
            }
            Mark::Between => {
                format!(r#"<path class="point {class}" d="M{x:.1} {:.1} l5.5 10 h-11 z">"#, y - 6.0)
            }
            Mark::Prefill => format!(r#"<circle class="point {class}" cx="{x:.1}" cy="{y:.1}" r="5">"#),
        }
    }

    fn end(self) -> &'static str {
        match self {
            Mark::Decode => "</rect>",
            Mark::Between => "</path>",
            Mark::Prefill => "</circle>",
        }
    }
}

/// Draws the ops of a device that multiply, under its ceilings: operations per byte against operations per
/// second. `alone`: as a file of its own.
pub fn svg(document: &Value, alone: bool) -> String {
    let rows: &[Value] = document["ops"].as_array().map_or(&[], Vec::as_slice);
    let number = |row: &Value, name: &str| row[name].as_f64().unwrap_or(0.0);
    let points: Vec<(&Value, f64, f64)> = rows
        .iter()
        .map(|row| (row, number(row, "operations") / number(row, "bytes"), number(row, "ops_per_s")))
        .filter(|(_, x, y)| x.is_finite() && *x > 0.0 && y.is_finite() && *y > 0.0)
        .collect();
    let ceiling = |name: &str| document["ceilings"][name].as_f64().filter(|rate| *rate > 0.0);
    let read = ceiling("read_bytes_per_s");
    let peaks: Vec<(&str, f64)> = [("integer", "integer_ops_per_s"), ("float", "float_ops_per_s")]
        .into_iter()
        .filter_map(|(name, key)| Some((name, ceiling(key)?)))
        .collect();
    let ridges = peaks.iter().filter_map(|(_, peak)| Some(peak / read?));
    let xs: Vec<f64> = points.iter().map(|p| p.1).chain(ridges).collect();
    let ys: Vec<f64> = points.iter().map(|p| p.2).chain(peaks.iter().map(|p| p.1)).collect();
    let (x, y) = (Axis::of(&xs, LEFT, RIGHT), Axis::of(&ys, BOTTOM, TOP));
    let mut formats: Vec<&str> = Vec::new();
    for (row, ..) in &points {
        let format = row["format"].as_str().unwrap_or("");
        if !formats.contains(&format) {
            formats.push(format);
        }
    }
    let tokens = || points.iter().filter_map(|(row, ..)| row["tokens"].as_u64());
    let (fewest, most) = (tokens().min().unwrap_or(1), tokens().max().unwrap_or(1));
    let keys = key(&formats, fewest, most);
    let height = BOTTOM + 56.0 + 22.0 * keys.len().div_ceil(KEYS_PER_LINE) as f64;

    let mut out = String::new();
    // Writing to a text does not fail.
    let _ = write!(
        out,
        r#"<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 720 {height}" role="img"><title>Roofline of {}</title>"#,
        escaped(&super::title(document))
    );
    if alone {
        let _ = write!(
            out,
            r#"<style>{THEME}{STYLE}</style><rect width="100%" height="100%" style="fill: var(--page)"/>"#
        );
    }
    for tick in x.ticks() {
        let at = x.at(tick);
        let _ = write!(
            out,
            r#"<line class="grid" x1="{at:.1}" x2="{at:.1}" y1="{TOP}" y2="{BOTTOM}"/><text class="small" x="{at:.1}" y="{}" text-anchor="middle">{}</text>"#,
            BOTTOM + 17.0,
            // Rounds off what multiplying by a power of ten leaves.
            tick as f32
        );
    }
    for tick in y.ticks() {
        let at = y.at(tick);
        let _ = write!(
            out,
            r#"<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{at:.1}" y2="{at:.1}"/><text class="small" x="{}" y="{:.1}" text-anchor="end">{}</text>"#,
            LEFT - 7.0,
            at + 4.0,
            scaled(tick, "OP/s").replace(".00", "").replace(".0", "")
        );
    }
    let _ = write!(
        out,
        r#"<text x="{}" y="{}" text-anchor="middle">operations per byte</text>"#,
        (LEFT + RIGHT) / 2.0,
        BOTTOM + 36.0
    );
    for (name, peak) in &peaks {
        let ridge = read.map_or(0.0, |read| peak / read).max(10f64.powf(x.low));
        let level = y.at(*peak);
        let _ = write!(
            out,
            r#"<path class="roof" d="M{RIGHT} {level:.1} H{:.1}"/><text class="small" x="{RIGHT}" y="{:.1}" text-anchor="end">{name}: {}</text>"#,
            x.at(ridge),
            level - 6.0,
            scaled(*peak, "OP/s")
        );
    }
    let highest = peaks.iter().map(|(_, peak)| *peak).fold(0.0, f64::max);
    if let Some(read) = read.filter(|_| highest > 0.0) {
        // From the lowest rate or the lowest intensity, whichever comes first, to the ridge.
        let first = (10f64.powf(x.low)).max(10f64.powf(y.low) / read);
        let (x1, y1) = (x.at(first), y.at(first * read));
        let (x2, y2) = (x.at(highest / read), y.at(highest));
        let _ = write!(
            out,
            r#"<path class="roof" d="M{x1:.1} {y1:.1} L{x2:.1} {y2:.1}"/><text class="small" x="{:.1}" y="{:.1}" text-anchor="end">read: {}</text>"#,
            (x1 + x2) / 2.0 - 8.0,
            (y1 + y2) / 2.0 - 4.0,
            scaled(read, "B/s")
        );
    }
    for (row, intensity, rate) in &points {
        let text = |name: &str| row[name].as_str().unwrap_or("");
        let colour = formats.iter().position(|f| *f == text("format")).unwrap_or(0) % COLOURS;
        let hollow = if text("cache") == "warm" { " hollow" } else { "" };
        let tokens = row["tokens"].as_u64().unwrap_or(1);
        let mark = Mark::of(tokens, fewest, most);
        let about = format!(
            "{} {} {} {}, {tokens} tokens, {}: {}, {}",
            text("op"),
            text("name"),
            text("format"),
            text("shape"),
            text("cache"),
            scaled(*rate, "OP/s"),
            scaled(number(row, "bytes_per_s"), "B/s"),
        );
        out += &mark.draw(x.at(*intensity), y.at(*rate), &format!("f{colour}{hollow}"));
        let _ = write!(out, "<title>{}</title>{}", escaped(&about), mark.end());
    }
    for (i, (mark, class, name)) in keys.iter().enumerate() {
        let at = (
            LEFT + (i % KEYS_PER_LINE) as f64 * (RIGHT - LEFT) / KEYS_PER_LINE as f64,
            BOTTOM + 62.0 + 22.0 * (i / KEYS_PER_LINE) as f64,
        );
        out += &mark.draw(at.0, at.1 - 4.0, class);
        let _ = write!(
            out,
            r#"{}<text class="small" x="{:.1}" y="{:.1}">{}</text>"#,
            mark.end(),
            at.0 + 11.0,
            at.1,
            escaped(name)
        );
    }
    out + "</svg>\n"
}

const KEYS_PER_LINE: usize = 4;

/// The legend: marks, their classes and what they mean.
fn key(formats: &[&str], fewest: u64, most: u64) -> Vec<(Mark, String, String)> {
    let of_format =
        |(i, format): (usize, &&str)| (Mark::Prefill, format!("f{}", i % COLOURS), format.to_string());
    let plural = |n: u64| if n == 1 { "1 token".into() } else { format!("{n} tokens") };
    let mut keys: Vec<_> = formats.iter().enumerate().map(of_format).collect();
    keys.push((Mark::Decode, "key".into(), plural(fewest)));
    if most != fewest {
        keys.push((Mark::Between, "key".into(), "between".into()));
        keys.push((Mark::Prefill, "key".into(), plural(most)));
    }
    keys.push((Mark::Prefill, "key hollow".into(), "hollow: from caches".into()));
    keys
}
