//! Options of config.json as tables: those with a key in GGUF files, and those of which one value is supported.

use serde_json::Value;

use super::folder::Json;
use crate::error::Result;
use crate::gguf::write::Writer;

/// An option: its key in the GGUF file without the architecture, its alternative keys in the folder, and its
/// type.
pub(super) type Key = (&'static str, &'static [&'static str], Kind);

#[derive(Clone, Copy)]
pub(super) enum Kind {
    U32,
    F32,
    Bool,
    Text,
}

#[derive(Clone, Copy)]
pub(super) enum Only {
    Text(&'static str),
    Bool(bool),
    Number(f64),
    /// A number where null means another one.
    Stated(f64),
    /// An empty list.
    Nothing,
    /// No value at all.
    Absent,
}

impl Kind {
    /// Writes the option `from` of a folder as the key of a file.
    pub(super) fn write(self, key: &str, config: &Json, from: &str, w: &mut Writer) -> Result<()> {
        match self {
            Kind::U32 => w.entry(key, config.u32(from)?),
            Kind::F32 => w.entry(key, config.f64(from)? as f32),
            Kind::Bool => w.entry(key, config.bool(from)? == Some(true)),
            Kind::Text => w.entry(key, config.str(from)?),
        }
    }
}

impl Only {
    fn is(self, value: &Value) -> bool {
        match self {
            Only::Text(only) => value == only,
            Only::Bool(only) => *value == only,
            Only::Number(only) | Only::Stated(only) => value.as_f64() == Some(only),
            Only::Nothing => value.as_array().is_some_and(Vec::is_empty),
            Only::Absent => value.is_null(),
        }
    }
}

impl std::fmt::Display for Only {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Only::Text(only) => f.write_str(only),
            Only::Bool(only) => only.fmt(f),
            Only::Number(only) | Only::Stated(only) => only.fmt(f),
            Only::Nothing => f.write_str("an empty list"),
            Only::Absent => f.write_str("null"),
        }
    }
}

/// Rejects other values of a family's options than the supported ones.
pub(super) fn check(config: &Json, options: &[(&str, Only)]) -> Result<()> {
    for (key, only) in options {
        let value = match only {
            Only::Stated(_) => config.value.get(key),
            _ => config.get(key),
        };
        if let Some(value) = value.filter(|value| !only.is(value)) {
            return Err(config.wrong(key, &only.to_string(), value));
        }
    }
    Ok(())
}

/// Rejects all values of a key but the supported one.
pub(super) fn only(json: &Json, key: &str, only: &Value) -> Result<()> {
    match json.get(key).filter(|value| *value != only) {
        Some(value) => Err(json.wrong(key, &only.to_string(), value)),
        None => Ok(()),
    }
}
