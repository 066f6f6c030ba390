//! Keys and kinds of values in a file against the schema: every fault with its line, not the first alone.

use std::collections::BTreeMap;

use serde_json::Value as Json;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::quantity::schema;

/// Maximum characters of a key or a value in a fault.
const MAX_SHOWN: usize = 64;
/// How alike two keys are, from 0 to 1, if one is a slip of the pen.
const ALIKE: f64 = 0.85;

/// Returns the faults of a file that is TOML, in the order of its lines.
pub(super) fn faults(text: &str) -> Vec<String> {
    let Ok(table) = DeTable::parse(text) else { return Vec::new() };
    let schema = schema().to_value();
    let mut walk = Walk { text, schema: &schema, faults: Vec::new() };
    walk.table(table.get_ref(), 0, &schema, "");
    walk.faults.sort();
    walk.faults.into_iter().map(|(line, fault)| format!("line {line}: {fault}")).collect()
}

/// Returns the line of each value of a file that is TOML, by its path.
pub(super) fn lines(text: &str) -> BTreeMap<String, usize> {
    fn walk(value: &Spanned<DeValue<'_>>, path: String, all: &mut Vec<(usize, String)>) {
        match value.get_ref() {
            DeValue::Table(table) => {
                table.iter().for_each(|(key, value)| walk(value, format!("{path}.{}", key.get_ref()), all));
            }
            DeValue::Array(items) => {
                items.iter().enumerate().for_each(|(n, item)| walk(item, item_path(&path, n, item), all));
            }
            _ => {}
        }
        all.push((value.span().start, path));
    }
    let mut all = Vec::new();
    if let Ok(table) = DeTable::parse(text) {
        table.get_ref().iter().for_each(|(key, value)| walk(value, key.get_ref().to_string(), &mut all));
    }
    all.sort();
    let (mut line, mut from) = (1, 0);
    let numbered = all.into_iter().map(|(at, path)| {
        line += text.as_bytes().get(from..at).unwrap_or(&[]).iter().filter(|byte| **byte == b'\n').count();
        from = at;
        (path, line)
    });
    numbered.collect()
}

/// The path of an item of a list: by its name, if it has one.
fn item_path(path: &str, index: usize, item: &Spanned<DeValue<'_>>) -> String {
    let name = item.get_ref().as_table().and_then(|table| table.get("name")?.get_ref().as_str());
    format!("{path}.{}", name.map_or_else(|| index.to_string(), str::to_owned))
}

struct Walk<'a> {
    text: &'a str,
    schema: &'a Json,
    faults: Vec<(usize, String)>,
}

impl<'a> Walk<'a> {
    fn fault(&mut self, at: usize, fault: String) {
        let line = 1 + self.text.bytes().take(at).filter(|byte| *byte == b'\n').count();
        self.faults.push((line, fault));
    }

    /// Follows references, and leaves out null, which TOML does not have.
    fn resolve(&self, node: &'a Json) -> &'a Json {
        if let Some(name) = node.get("$ref").and_then(|name| name.as_str()?.strip_prefix("#/$defs/")) {
            return self
                .schema
                .get("$defs")
                .and_then(|defs| defs.get(name))
                .map_or(node, |node| self.resolve(node));
        }
        let some = |node: &&Json| node.get("type").is_none_or(|kind| kind != "null");
        match node
            .get("anyOf")
            .and_then(Json::as_array)
            .map(|all| all.iter().filter(some).collect::<Vec<_>>())
        {
            Some(one) if one.len() == 1 => self.resolve(one[0]),
            _ => node,
        }
    }

    fn table(&mut self, table: &DeTable<'_>, at: usize, node: &'a Json, path: &str) {
        let inside = |key: &str| if path.is_empty() { shown(key) } else { format!("{path}.{}", shown(key)) };
        let properties = node.get("properties").and_then(Json::as_object);
        let others = node.get("additionalProperties").filter(|others| others.is_object());
        for (key, value) in table.iter() {
            let (name, start) = (key.get_ref().as_ref(), key.span().start);
            match properties.and_then(|p| p.get(name)).or(others) {
                Some(node) => self.value(value, node, &inside(name)),
                None => {
                    let known = properties.into_iter().flat_map(|p| p.keys());
                    let near = known.map(|key| (strsim::jaro_winkler(key, name), key));
                    let near = near.filter(|(alike, _)| *alike >= ALIKE).max_by(|a, b| a.0.total_cmp(&b.0));
                    let hint = near.map_or(String::new(), |(_, key)| format!(", did you mean `{key}`?"));
                    self.fault(start, format!("{}: unknown key{hint}", inside(name)));
                }
            }
        }
        let required = node.get("required").and_then(Json::as_array).into_iter().flatten();
        for name in required.filter_map(Json::as_str).filter(|name| !table.contains_key(*name)) {
            self.fault(at, format!("{}: missing", inside(name)));
        }
    }

    fn value(&mut self, value: &Spanned<DeValue<'_>>, node: &'a Json, path: &str) {
        let node = self.resolve(node);
        let at = value.span().start;
        let alternatives = node.get("anyOf").and_then(Json::as_array);
        let nodes: Vec<&Json> = alternatives.map_or(vec![node], |all| all.iter().collect());
        let Some(node) =
            nodes.iter().map(|node| self.resolve(node)).find(|node| is_kind(value.get_ref(), node))
        else {
            let kinds: Vec<&str> = nodes.iter().map(|node| kind(self.resolve(node))).collect();
            self.fault(at, format!("{path}: expected {}, got {}", kinds.join(" or "), got(value.get_ref())));
            return;
        };
        match value.get_ref() {
            DeValue::Table(table) => self.table(table, at, node, path),
            DeValue::Array(items) => {
                let Some(of) = node.get("items") else { return };
                for (n, item) in items.iter().enumerate() {
                    let name = match item.get_ref() {
                        DeValue::Table(table) => {
                            table.get("name").and_then(|name| name.get_ref().as_str().map(shown))
                        }
                        _ => None,
                    };
                    self.value(item, of, &format!("{path}.{}", name.unwrap_or_else(|| n.to_string())));
                }
            }
            DeValue::String(text) => {
                let texts = texts(node);
                if !texts.is_empty() && !texts.contains(&text.as_ref()) {
                    self.fault(
                        at,
                        format!("{path}: expected one of {}, got `{}`", texts.join(", "), shown(text)),
                    );
                }
            }
            _ => {}
        }
    }
}

/// The texts that a value may have, if not any.
fn texts(node: &Json) -> Vec<&str> {
    let listed = |key: &str| node.get(key).and_then(Json::as_array).into_iter().flatten();
    let one = listed("oneOf").flat_map(|node| {
        node.get("const").into_iter().chain(node.get("enum").and_then(Json::as_array).into_iter().flatten())
    });
    listed("enum").chain(one).filter_map(Json::as_str).collect()
}

fn kind(node: &Json) -> &str {
    match node.get("type").and_then(Json::as_str) {
        Some("object") => "a table",
        Some("array") => "a list",
        Some("number") => "a number",
        Some("integer") => "a whole number",
        Some("boolean") => "true or false",
        _ => "a text",
    }
}

fn is_kind(value: &DeValue<'_>, node: &Json) -> bool {
    let found = match value {
        DeValue::Table(_) => "a table",
        DeValue::Array(_) => "a list",
        DeValue::Float(_) => "a number",
        DeValue::Integer(_) => return matches!(kind(node), "a number" | "a whole number"),
        DeValue::Boolean(_) => "true or false",
        _ => "a text",
    };
    found == kind(node)
}

fn got(value: &DeValue<'_>) -> String {
    match value {
        DeValue::Table(_) => "a table".into(),
        DeValue::Array(_) => "a list".into(),
        DeValue::Boolean(value) => value.to_string(),
        DeValue::String(text) => format!("\"{}\"", shown(text)),
        DeValue::Integer(number) => shown(number.as_str()),
        DeValue::Float(number) => shown(number.as_str()),
        DeValue::Datetime(date) => shown(&date.to_string()),
    }
}

/// A key or a text, cut to a length.
fn shown(text: &str) -> String {
    let cut: String = text.chars().take(MAX_SHOWN).collect();
    if cut.len() < text.len() { format!("{cut}…") } else { cut }
}
