//! JSON that callers give to a template.

use super::value::{Fallible, MAX_DEPTH, Meter, Value};

/// A value of JSON: what messages and a template's variables hold beside texts.
#[derive(Debug, Clone, PartialEq)]
pub enum Json {
    /// `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// Another number.
    Float(f64),
    /// A text.
    Text(String),
    /// An array.
    List(Vec<Json>),
    /// An object, in this order. If names are equal, the last one wins.
    Object(Vec<(String, Json)>),
}

impl Json {
    /// Returns the template's value, charged like one that the template creates.
    pub(super) fn value(&self, meter: &mut Meter, depth: u16) -> Fallible<Value> {
        if depth > MAX_DEPTH {
            return Err(format!("nests values deeper than {MAX_DEPTH} levels"));
        }
        meter.work(1)?;
        Ok(match self {
            Json::Null => Value::None,
            Json::Bool(b) => Value::Bool(*b),
            Json::Int(i) => Value::Int(*i),
            Json::Float(f) => Value::Float(*f),
            Json::Text(text) => meter.str(text)?,
            Json::List(items) => {
                meter.check_items(items.len())?;
                let items = items.iter().map(|item| item.value(meter, depth + 1)).collect::<Fallible<_>>()?;
                meter.list(items)?
            }
            Json::Object(entries) => {
                let pairs = entries
                    .iter()
                    .map(|(name, value)| Ok((meter.str(name)?, value.value(meter, depth + 1)?)));
                let pairs = pairs.collect::<Fallible<_>>()?;
                meter.dict(pairs)?
            }
        })
    }
}
