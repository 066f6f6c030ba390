//! Numbers with their provenance, the table of keys that hold them, and the JSON Schema.
//!
//! A bare number, `clusters = 16`, inherits the `basis` and `source` of the nearest enclosing table that has
//! them. A number may also have its own:
//! `clock_hz = { value = 1.43e9, basis = "derived", source = "stated peaks / geometry" }`.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use toml::{Table, Value};

use super::Profile;

/// A number with its source and certainty.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Quantity {
    /// The number, in the unit of its key.
    pub value: f64,
    /// Certainty.
    pub basis: Basis,
    /// A name from the profile's `sources`, or the reasoning.
    pub source: String,
}

/// The certainty of a number, in decreasing order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Basis {
    /// Published by the maker; `source` cites the document.
    Datasheet,
    /// Measured on the chip; `source` cites the document.
    Measured,
    /// Derived from other numbers; `source` says how.
    Derived,
    /// A guess; `source` gives the reason.
    Guess,
}

impl Basis {
    /// All, in decreasing order of certainty.
    pub const ALL: [Basis; 4] = [Basis::Datasheet, Basis::Measured, Basis::Derived, Basis::Guess];

    /// Name in profiles.
    pub fn name(self) -> &'static str {
        match self {
            Basis::Datasheet => "datasheet",
            Basis::Measured => "measured",
            Basis::Derived => "derived",
            Basis::Guess => "guess",
        }
    }
}

impl JsonSchema for Quantity {
    fn schema_name() -> Cow<'static, str> {
        "Quantity".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let basis = generator.subschema_for::<Basis>();
        json_schema!({
            "description": "A number with the basis and source of the table around it, or with its own.",
            "anyOf": [
                { "type": "number" },
                {
                    "type": "object",
                    "properties": { "value": { "type": "number" }, "basis": basis, "source": { "type": "string" } },
                    "required": ["value"],
                    "additionalProperties": false,
                },
            ],
        })
    }
}

/// Unit and limits of a key's number.
#[derive(Debug)]
#[non_exhaustive]
pub struct Key {
    /// The key.
    pub name: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// The least number.
    pub min: f64,
    /// The largest number.
    pub max: f64,
    /// Whether it must be a whole number.
    pub whole: bool,
}

impl Key {
    /// Returns the key at the end of a number's path.
    pub fn of(path: &str) -> Option<&'static Key> {
        let name = path.rsplit('.').next()?;
        KEYS.iter().find(|key| key.name == name)
    }
}

/// All keys with numbers. A key means the same in every table.
pub(super) static KEYS: &[Key] = &[
    real("clock_hz", "Hz", 1e6, 1e10),
    count("clusters", "clusters", 1.0, 4096.0),
    count("tiles_per_cluster", "tiles", 1.0, 4096.0),
    count("units_per_tile", "units", 1.0, 256.0),
    count("rows", "rows", 1.0, 4096.0),
    count("columns", "columns", 1.0, 4096.0),
    real("depth_per_cycle", "products per cycle", 1.0 / 256.0, 4096.0),
    real("ops_per_cycle", "operations per cycle", 0.125, 65536.0),
    real("dense_ops_per_s", "operations/s", 1e6, 1e18),
    real("sparse_ops_per_s", "operations/s", 1e6, 1e18),
    real("pj_per_op", "pJ", 1e-4, 1e3),
    real("fill_cycles", "cycles", 0.0, 1e5),
    real("min_issue_cycles", "cycles", 0.0, 1e5),
    real("open_cycles", "cycles", 0.0, 1e5),
    real("dependent_cycles", "cycles", 0.0, 1e5),
    real("exp_cycles", "cycles", 0.125, 1e3),
    real("rsqrt_cycles", "cycles", 0.125, 1e3),
    real("divide_cycles", "cycles", 0.125, 1e3),
    real("quantize_cycles", "cycles", 0.125, 1e3),
    count("accumulator_bytes", "bytes", 4.0, 1e9),
    count("capacity_bytes", "bytes", 64.0, 1e14),
    real("read_bytes_per_s", "bytes/s", 1e6, 1e15),
    real("write_bytes_per_s", "bytes/s", 1e6, 1e15),
    real("latency_ns", "ns", 0.0, 1e6),
    count("banks", "banks", 1.0, 65536.0),
    count("line_bytes", "bytes", 1.0, 65536.0),
    real("achievable_fraction", "of 1", 0.05, 1.0),
    real("pj_per_byte", "pJ", 1e-3, 1e4),
    count("engines", "engines", 1.0, 4096.0),
    real("bytes_per_s", "bytes/s", 1e6, 1e14),
    real("setup_ns", "ns", 0.0, 1e6),
    real("descriptor_ns", "ns", 0.0, 1e5),
    real("half_rate_run_bytes", "bytes", 0.0, 1e6),
    count("max_dimensions", "dimensions", 1.0, 16.0),
    count("queue_entries", "descriptors", 1.0, 65536.0),
    real("link_bytes_per_cycle", "bytes per cycle", 0.125, 65536.0),
    real("hop_cycles", "cycles", 0.0, 1e4),
    real("semaphore_ns", "ns", 0.0, 1e6),
    real("barrier_ns", "ns", 0.0, 1e7),
    real("kernel_ns", "ns", 0.0, 1e9),
    real("graph_kernel_ns", "ns", 0.0, 1e9),
    real("step_ns", "ns", 0.0, 1e9),
    real("host_bytes_per_s", "bytes/s", 1e5, 1e13),
    count("chips", "chips", 2.0, 1e6),
    count("links", "links", 1.0, 4096.0),
    real("link_bytes_per_s", "bytes/s", 1e6, 1e13),
    real("tdp_w", "W", 1e-3, 1e5),
    real("provisioned_w", "W", 1e-3, 1e5),
    real("idle_w", "W", 0.0, 1e5),
    real("usd_per_hour", "US$/h", 1e-4, 1e4),
    real("chip_usd", "US$", 0.1, 1e7),
    real("lifetime_years", "years", 0.5, 30.0),
    real("usd_per_kwh", "US$/kWh", 1e-3, 10.0),
    real("utilisation_fraction", "of 1", 0.01, 1.0),
    real("compute_fraction", "of 1", 0.01, 1.0),
    real("memory_fraction", "of 1", 0.01, 1.0),
    real("overhead_ns", "ns", 0.0, 1e9),
    real("hop_ns", "ns", 0.0, 1e7),
    real("small_fraction", "of 1", 0.01, 1.0),
    real("bulk_ns", "ns", 0.0, 1e7),
    real("bulk_fraction", "of 1", 0.01, 1.0),
    real("direct_ns", "ns", 0.0, 1e7),
    real("direct_fraction", "of 1", 0.01, 1.0),
    real("cache_fraction", "of 1", 0.01, 1.0),
    real("resident_fraction", "of 1", 0.0, 1.0),
    real("wave_ns", "ns", 0.0, 1e6),
    real("split_ns", "ns", 0.0, 1e6),
    real("item_ns", "ns", 0.0, 1e6),
    real("block_ns", "ns", 0.0, 1e6),
    real("tile_bytes_per_s", "bytes/s", 1e6, 1e13),
    real("overlap_exponent", "of the times", 1.0, 1e3),
    count("threads", "threads", 1.0, 4096.0),
    real("op_ns", "ns", 0.0, 1e9),
    real("integer_ops_per_s", "operations/s", 1e6, 1e18),
    real("float_ops_per_s", "operations/s", 1e6, 1e18),
    real("row_bytes_per_s", "bytes/s", 1e6, 1e15),
    real("attend_bytes_per_s", "bytes/s", 1e6, 1e15),
    real("attend_ops_per_s", "operations/s", 1e6, 1e18),
    real("copy_bytes_per_s", "bytes/s", 1e6, 1e15),
    real("weight_bytes_per_s", "bytes/s", 1e6, 1e15),
    real("product_ops_per_s", "operations/s", 1e6, 1e18),
    count("points", "measurements", 1.0, 1e9),
    real("mean_error_fraction", "of 1", 0.0, 10.0),
    real("worst_error_fraction", "of 1", 0.0, 1e3),
    real("small_error_fraction", "of 1", 0.0, 10.0),
    real("memory_error_fraction", "of 1", 0.0, 10.0),
    real("compute_error_fraction", "of 1", 0.0, 10.0),
    real("low_ratio", "of the predicted time", 1e-3, 1e3),
    real("high_ratio", "of the predicted time", 1e-3, 1e3),
    real("coverage_fraction", "of 1", 0.0, 1.0),
];

const fn real(name: &'static str, unit: &'static str, min: f64, max: f64) -> Key {
    Key { name, unit, min, max, whole: false }
}

const fn count(name: &'static str, unit: &'static str, min: f64, max: f64) -> Key {
    Key { name, unit, min, max, whole: true }
}

/// The `basis` and `source` of the enclosing tables.
#[derive(Clone, Default)]
struct Provenance {
    basis: Option<Value>,
    source: Option<Value>,
}

impl Provenance {
    /// Removes them from a table; inherits those that it lacks.
    fn take(&self, table: &mut Table) -> Provenance {
        Provenance {
            basis: table.remove("basis").or_else(|| self.basis.clone()),
            source: table.remove("source").or_else(|| self.source.clone()),
        }
    }
}

/// Maximum numbers and texts of a file, and maximum bytes of a key, of a name and of another text. Each
/// number gets a path of names and keys, and a copy of its source.
const MAX_VALUES: usize = 4096;
const MAX_NAME_BYTES: usize = 64;
const MAX_TEXT_BYTES: usize = 1 << 10;

/// Rejects characters that a terminal obeys instead of showing, and line breaks where there may be one line only.
fn check_printable(what: &str, text: &str, has_lines: bool) -> Result<(), String> {
    let turns = |c: char| matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
    let bad = |c: &char| (c.is_control() && !(has_lines && matches!(c, '\n' | '\t'))) || turns(*c);
    match text.chars().find(bad) {
        Some(c) => Err(format!("{what}: expected printable characters, got {}", c.escape_unicode())),
        None => Ok(()),
    }
}

/// A fault of the number at a path.
pub(super) struct Fault {
    pub path: String,
    pub text: String,
}

/// Rejects a file that would become too large when resolved.
pub(super) fn check_size(file: &Table) -> Result<(), String> {
    fn check_table(table: &Table, left: &mut usize) -> Result<(), String> {
        table.iter().try_for_each(|(key, value)| {
            if key.len() > MAX_NAME_BYTES {
                let got = key.len();
                return Err(format!("a key: expected at most {MAX_NAME_BYTES} bytes, got {got}"));
            }
            check_printable("a key", key, false)?;
            check_value(key, value, left)
        })
    }
    fn check_value(key: &str, value: &Value, left: &mut usize) -> Result<(), String> {
        let fewer = left.checked_sub(1);
        *left = fewer.ok_or_else(|| format!("{key}: expected at most {MAX_VALUES} values in all"))?;
        match value {
            Value::String(text) => {
                let max = if key == "name" { MAX_NAME_BYTES } else { MAX_TEXT_BYTES };
                let wrong = || format!("{key}: expected at most {max} bytes, got {}", text.len());
                if text.len() > max { Err(wrong()) } else { check_printable(key, text, key != "name") }
            }
            // Numbers below inherit these.
            _ if matches!(key, "basis" | "source") => Err(format!("{key}: expected a text")),
            Value::Array(items) => items.iter().try_for_each(|item| check_value(key, item, left)),
            Value::Table(table) => check_table(table, left),
            _ => Ok(()),
        }
    }
    check_table(file, &mut { MAX_VALUES })
}

/// Resolves the provenance of every number of a file. Returns the faults of single numbers.
pub(super) fn resolve(file: &mut Table) -> Vec<Fault> {
    let mut faults = Vec::new();
    let around = Provenance::default().take(file);
    // Skip `sources`: its keys are the profile's own, and its values are texts.
    let cited: Vec<String> = match file.get("sources") {
        Some(Value::Table(sources)) => sources.keys().cloned().collect(),
        _ => Vec::new(),
    };
    for (key, value) in file.iter_mut().filter(|(key, _)| *key != "sources") {
        resolve_value(value, key, key, &around, &cited, &mut faults);
    }
    faults
}

fn resolve_value(
    value: &mut Value,
    path: &str,
    key: &str,
    around: &Provenance,
    cited: &[String],
    faults: &mut Vec<Fault>,
) {
    match value {
        Value::Array(items) => {
            for (i, item) in items.iter_mut().enumerate() {
                resolve_value(item, &item_path(path, i, item), key, around, cited, faults);
            }
        }
        Value::Table(table) if !table.contains_key("value") => {
            let own = around.take(table);
            for (key, value) in table.iter_mut() {
                resolve_value(value, &format!("{path}.{key}"), key, &own, cited, faults);
            }
        }
        Value::Table(quantity) => {
            let own = around.take(quantity);
            number(quantity, path, key, own, cited, faults);
        }
        Value::Integer(_) | Value::Float(_) => {
            let mut quantity = Table::from_iter([("value".to_owned(), value.clone())]);
            number(&mut quantity, path, key, around.clone(), cited, faults);
            *value = Value::Table(quantity);
        }
        _ => {}
    }
}

/// Completes and checks one number.
fn number(
    quantity: &mut Table,
    path: &str,
    key: &str,
    provenance: Provenance,
    cited: &[String],
    faults: &mut Vec<Fault>,
) {
    let mut fault = |text: String| faults.push(Fault { path: path.to_owned(), text });
    let value = match quantity.get("value") {
        Some(Value::Integer(i)) => *i as f64,
        Some(Value::Float(f)) => *f,
        // The schema reports this better.
        _ => return,
    };
    quantity.insert("value".into(), Value::Float(value));
    if let Some(Key { unit, min, max, whole, .. }) = KEYS.iter().find(|k| k.name == key) {
        // Written so that NaN fails.
        if !(value >= *min && value <= *max) {
            fault(format!("{path} = {value:?} {unit}: expected from {min:?} to {max:?} {unit}"));
        } else if *whole && value.fract() != 0.0 {
            fault(format!("{path} = {value:?} {unit}: expected a whole number"));
        }
    }
    let basis = provenance.basis.as_ref().and_then(Value::as_str);
    let source = provenance.source.as_ref().and_then(Value::as_str);
    match (basis, source) {
        (Some("datasheet" | "measured"), Some(source)) if !cited.iter().any(|c| c == source) => {
            let some = &cited[..cited.len().min(16)];
            fault(format!("{path}: source `{source}` is not in [sources], which has {some:?}"));
        }
        (Some(_), Some("")) => fault(format!("{path}: source is empty")),
        (Some(_), Some(_)) => {}
        (basis, _) => {
            let what = if basis.is_none() { "basis" } else { "source" };
            fault(format!("{path} = {value:?}: `{what}` is missing here and in all enclosing tables"));
        }
    }
    let missing = || Value::String(Basis::Guess.name().into());
    quantity.insert("basis".into(), provenance.basis.unwrap_or_else(missing));
    quantity.insert("source".into(), provenance.source.unwrap_or_else(|| Value::String(String::new())));
}

/// The JSON Schema of a profile.
pub fn schema() -> Schema {
    let mut schema = schemars::schema_for!(Profile);
    let Some(root) = schema.as_object_mut() else { return schema };
    let basis = serde_json::json!({ "$ref": "#/$defs/Basis", "description": "Of all bare numbers below." });
    let source = serde_json::json!({ "type": "string", "description": "Of all bare numbers below." });
    let complete = |properties: &mut serde_json::Map<String, serde_json::Value>| {
        for key in KEYS {
            let Some(property) = properties.get_mut(key.name).and_then(|p| p.as_object_mut()) else {
                continue;
            };
            let said = property.get("description").and_then(|d| d.as_str()).unwrap_or_default();
            let unit = format!("{said} [{}, from {:?} to {:?}]", key.unit, key.min, key.max);
            property.insert("description".into(), unit.trim().into());
        }
        properties.insert("basis".into(), basis.clone());
        properties.insert("source".into(), source.clone());
    };
    if let Some(properties) = root.get_mut("properties").and_then(|p| p.as_object_mut()) {
        complete(properties);
    }
    if let Some(defs) = root.get_mut("$defs").and_then(|d| d.as_object_mut()) {
        let tables = defs.values_mut().filter_map(|d| d.get_mut("properties")?.as_object_mut());
        tables.for_each(complete);
    }
    schema
}

/// Returns every number of a resolved file with its path, such as `memory.hbm.latency_ns`.
pub(super) fn list(file: &Table) -> Vec<(String, Quantity)> {
    let mut out = Vec::new();
    file.iter().for_each(|(key, value)| collect(value, key, &mut out));
    out
}

/// Returns the path of an item of a list: by its name, if it has one.
fn item_path(path: &str, index: usize, item: &Value) -> String {
    match item.get("name").and_then(Value::as_str) {
        Some(name) => format!("{path}.{name}"),
        None => format!("{path}.{index}"),
    }
}

fn collect(value: &Value, path: &str, out: &mut Vec<(String, Quantity)>) {
    match value {
        Value::Table(table) if table.contains_key("value") => {
            out.extend(value.clone().try_into().ok().map(|quantity| (path.to_owned(), quantity)));
        }
        Value::Table(table) => table.iter().for_each(|(key, v)| collect(v, &format!("{path}.{key}"), out)),
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, item)| collect(item, &item_path(path, i, item), out));
        }
        _ => {}
    }
}
