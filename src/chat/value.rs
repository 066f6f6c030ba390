//! Python's values, and limits on creating and reading them.
//!
//! Lists and dicts are immutable, so a value can contain itself only through a namespace. A namespace value
//! is an index; the rendering owns the contents. So every value has a finite depth, which is limited when the
//! value is created.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Instant;

/// A result with the message of a template error.
pub type Fallible<T> = Result<T, String>;

/// Maximum units of work of a rendering: an evaluated node, an item or 16 bytes read.
const MAX_WORK: u64 = 20_000_000;

/// Maximum time of a rendering, and the units of work between checks of the clock.
const MAX_TIME: Duration = Duration::from_secs(1);
const CLOCK_PERIOD: u64 = 4096;

/// Maximum bytes of all texts and lists that a rendering creates, whether it keeps them or not.
const MAX_MEMORY: usize = 128 << 20;

/// Maximum bytes of a text.
pub const MAX_TEXT: usize = 16 << 20;

/// Maximum nesting of lists and dicts.
pub const MAX_DEPTH: u16 = 100;

/// Bytes counted for an item of a list and for an entry of a dict.
const ITEM: usize = 32;
const ENTRY: usize = 192;

#[derive(Debug, Clone)]
pub enum Value {
    /// An undefined value, with the name that was looked up.
    Undefined(Arc<str>),
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(Arc<str>),
    List(Rc<List>),
    Dict(Rc<Dict>),
    /// An index into the rendering's namespaces or macros.
    Namespace(usize),
    Macro(usize),
    Loop(Rc<Loop>),
    Method(Rc<(Value, String)>),
    Function(&'static str),
}

#[derive(Debug)]
pub struct List {
    pub items: Vec<Value>,
    pub tuple: bool,
    depth: u16,
}

impl List {
    /// Creates a list without counting its memory, for a caller that only reads it.
    pub fn of(value: Value) -> List {
        List { depth: value.depth().saturating_add(1), items: vec![value], tuple: false }
    }
}

#[derive(Debug)]
pub struct Dict {
    pub entries: Vec<(Value, Value)>,
    index: HashMap<Key, usize>,
    depth: u16,
}

impl Dict {
    pub fn find(&self, key: &Key) -> Option<&Value> {
        self.index.get(key).map(|&at| &self.entries[at].1)
    }

    pub fn text(&self, key: &Arc<str>) -> Option<&Value> {
        self.find(&Key::Str(key.clone()))
    }
}

/// The state of a `for` loop.
#[derive(Debug)]
pub struct Loop {
    pub id: usize,
    pub items: Rc<List>,
    pub index: std::cell::Cell<usize>,
    pub level: usize,
    /// Index into the rendering's recursive loops, if the loop is recursive.
    pub recursive: Option<usize>,
}

/// A value that can be a key of a dict. Keys are equal if and only if the values are equal.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Key {
    None,
    Undefined,
    Int(i64),
    Float(u64),
    Str(Arc<str>),
    Tuple(Vec<Key>),
    Other(u8, usize),
}

impl Value {
    pub fn text(text: &str) -> Value {
        Value::Str(text.into())
    }

    fn depth(&self) -> u16 {
        match self {
            Value::List(list) => list.depth,
            Value::Dict(dict) => dict.depth,
            Value::Loop(l) => l.items.depth.saturating_add(1),
            Value::Method(method) => method.0.depth().saturating_add(1),
            _ => 0,
        }
    }

    pub fn is_truthy(&self) -> bool {
        match self {
            Value::Undefined(_) | Value::None => false,
            Value::Bool(b) => *b,
            Value::Int(i) => *i != 0,
            Value::Float(f) => *f != 0.0,
            Value::Str(s) => !s.is_empty(),
            Value::List(list) => !list.items.is_empty(),
            Value::Dict(dict) => !dict.entries.is_empty(),
            _ => true,
        }
    }

    /// Returns Python's name of the type.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Undefined(_) => "undefined",
            Value::None => "None",
            Value::Bool(_) => "bool",
            Value::Int(_) => "int",
            Value::Float(_) => "float",
            Value::Str(_) => "str",
            Value::List(list) if list.tuple => "tuple",
            Value::List(_) => "list",
            Value::Dict(_) => "dict",
            Value::Namespace(_) => "namespace",
            Value::Macro(_) => "macro",
            Value::Loop(_) => "loop",
            Value::Method(_) | Value::Function(_) => "function",
        }
    }

    /// Returns an integer, or a bool as 0 or 1.
    pub fn int(&self) -> Option<i64> {
        match self {
            Value::Bool(b) => Some(i64::from(*b)),
            Value::Int(i) => Some(*i),
            _ => None,
        }
    }

    pub fn float(&self) -> Option<f64> {
        match self {
            Value::Float(f) => Some(*f),
            _ => self.int().map(|i| i as f64),
        }
    }

    pub fn defined(self) -> Fallible<Value> {
        match self {
            Value::Undefined(name) => Err(format!("{name:?} is undefined")),
            value => Ok(value),
        }
    }
}

/// Counts the work and memory of a rendering. Every loop and every allocation is charged before it happens.
#[derive(Debug)]
pub struct Meter {
    work: u64,
    memory: usize,
    start: Instant,
    next_check: u64,
}

impl Meter {
    pub fn new() -> Meter {
        Meter { work: 0, memory: 0, start: Instant::now(), next_check: CLOCK_PERIOD }
    }

    pub fn work(&mut self, units: usize) -> Fallible<()> {
        self.work = self.work.saturating_add(units as u64);
        if self.work > MAX_WORK {
            return Err(format!("takes more than {MAX_WORK} steps"));
        }
        if self.work >= self.next_check {
            self.next_check = self.work + CLOCK_PERIOD;
            if self.start.elapsed() > MAX_TIME {
                return Err(format!("takes longer than {MAX_TIME:?}"));
            }
        }
        Ok(())
    }

    /// Charges for reading bytes.
    pub fn read(&mut self, bytes: usize) -> Fallible<()> {
        self.work(bytes / 16 + 1)
    }

    pub fn memory(&mut self, bytes: usize) -> Fallible<()> {
        self.memory = self.memory.saturating_add(bytes);
        if self.memory > MAX_MEMORY {
            return Err(too_large());
        }
        self.read(bytes)
    }

    /// Charges for a new text.
    pub fn text(&mut self, bytes: usize) -> Fallible<()> {
        if bytes > MAX_TEXT {
            return Err(format!("builds a text of more than {MAX_TEXT} bytes"));
        }
        self.memory(bytes)
    }

    /// Checks that a list of `count` items would fit, before its items are collected.
    pub fn check_items(&mut self, count: usize) -> Fallible<()> {
        if count.saturating_mul(ITEM) > MAX_MEMORY.saturating_sub(self.memory) {
            return Err(too_large());
        }
        self.work(count)
    }

    /// Charges for the memory of `count` items.
    pub fn items(&mut self, count: usize) -> Fallible<()> {
        self.memory(count.saturating_mul(ITEM))
    }

    pub fn push(&mut self, out: &mut String, text: &str) -> Fallible<()> {
        self.push_many(out, text, 1)
    }

    pub fn push_many(&mut self, out: &mut String, text: &str, times: usize) -> Fallible<()> {
        let bytes = text.len().saturating_mul(times);
        if bytes.saturating_add(out.len()) > MAX_TEXT {
            return Err(format!("builds a text of more than {MAX_TEXT} bytes"));
        }
        self.memory(bytes)?;
        out.extend(std::iter::repeat_n(text, times));
        Ok(())
    }

    pub fn str(&mut self, text: &str) -> Fallible<Value> {
        self.text(text.len())?;
        Ok(Value::text(text))
    }

    pub fn list(&mut self, items: Vec<Value>) -> Fallible<Value> {
        self.sequence(items, false)
    }

    pub fn sequence(&mut self, items: Vec<Value>, tuple: bool) -> Fallible<Value> {
        self.items(items.len() + 1)?;
        let depth = deepest(items.iter())?;
        Ok(Value::List(Rc::new(List { items, tuple, depth })))
    }

    /// Creates a dict. If keys are equal, the last value wins.
    pub fn dict(&mut self, pairs: Vec<(Value, Value)>) -> Fallible<Value> {
        self.memory((pairs.len() + 1).saturating_mul(ENTRY))?;
        let depth = deepest(pairs.iter().flat_map(|(k, v)| [k, v]))?;
        let mut entries: Vec<(Value, Value)> = Vec::with_capacity(pairs.len());
        let mut index: HashMap<Key, usize> = HashMap::with_capacity(pairs.len());
        for (key, value) in pairs {
            match index.entry(self.key(&key)?) {
                std::collections::hash_map::Entry::Occupied(at) => entries[*at.get()].1 = value,
                std::collections::hash_map::Entry::Vacant(at) => {
                    at.insert(entries.len());
                    entries.push((key, value));
                }
            }
        }
        Ok(Value::Dict(Rc::new(Dict { entries, index, depth })))
    }

    pub fn key(&mut self, value: &Value) -> Fallible<Key> {
        self.work(1)?;
        Ok(match value {
            Value::None => Key::None,
            Value::Undefined(_) => Key::Undefined,
            Value::Bool(b) => Key::Int(i64::from(*b)),
            Value::Int(i) => Key::Int(*i),
            Value::Float(f) if f.fract() == 0.0 && f.abs() < 9e18 => Key::Int(*f as i64),
            Value::Float(f) => Key::Float(f.to_bits()),
            Value::Str(s) => {
                self.read(s.len())?;
                Key::Str(s.clone())
            }
            Value::List(list) if list.tuple => {
                self.items(list.items.len())?;
                Key::Tuple(list.items.iter().map(|v| self.key(v)).collect::<Fallible<_>>()?)
            }
            Value::Namespace(id) => Key::Other(0, *id),
            Value::Macro(id) => Key::Other(1, *id),
            Value::Loop(l) => Key::Other(2, l.id),
            Value::Function(name) => Key::Other(3, name.as_ptr() as usize),
            Value::List(_) | Value::Dict(_) | Value::Method(_) => {
                return Err(format!("a {} cannot be a key", value.kind()));
            }
        })
    }

    pub fn equal(&mut self, a: &Value, b: &Value) -> Fallible<bool> {
        self.work(1)?;
        if let (Some(a), Some(b)) = (a.int(), b.int()) {
            return Ok(a == b);
        }
        if let (Some(a), Some(b)) = (a.float(), b.float()) {
            return Ok(a == b);
        }
        Ok(match (a, b) {
            (Value::Undefined(_), Value::Undefined(_)) | (Value::None, Value::None) => true,
            (Value::Str(a), Value::Str(b)) => {
                self.read(a.len().min(b.len()))?;
                a == b
            }
            (Value::List(a), Value::List(b)) => {
                if Rc::ptr_eq(a, b) {
                    return Ok(true);
                }
                if a.tuple != b.tuple || a.items.len() != b.items.len() {
                    return Ok(false);
                }
                for (a, b) in a.items.iter().zip(&b.items) {
                    if !self.equal(a, b)? {
                        return Ok(false);
                    }
                }
                true
            }
            (Value::Dict(a), Value::Dict(b)) => {
                if a.entries.len() != b.entries.len() {
                    return Ok(false);
                }
                for (key, value) in &a.entries {
                    let Some(other) = b.find(&self.key(key)?) else { return Ok(false) };
                    if !self.equal(value, other)? {
                        return Ok(false);
                    }
                }
                true
            }
            (Value::Namespace(a), Value::Namespace(b)) | (Value::Macro(a), Value::Macro(b)) => a == b,
            (Value::Loop(a), Value::Loop(b)) => a.id == b.id,
            (Value::Function(a), Value::Function(b)) => a == b,
            _ => false,
        })
    }

    pub fn order(&mut self, a: &Value, b: &Value) -> Fallible<Option<Ordering>> {
        self.work(1)?;
        if let (Some(a), Some(b)) = (a.int(), b.int()) {
            return Ok(Some(a.cmp(&b)));
        }
        if let (Some(a), Some(b)) = (a.float(), b.float()) {
            return Ok(a.partial_cmp(&b));
        }
        match (a, b) {
            (Value::Undefined(name), _) | (_, Value::Undefined(name)) => {
                Err(format!("{name:?} is undefined"))
            }
            (Value::Str(a), Value::Str(b)) => {
                self.read(a.len().min(b.len()))?;
                Ok(Some(a.cmp(b)))
            }
            (Value::List(a), Value::List(b)) if a.tuple == b.tuple => {
                for (x, y) in a.items.iter().zip(&b.items) {
                    if !self.equal(x, y)? {
                        return self.order(x, y);
                    }
                }
                Ok(Some(a.items.len().cmp(&b.items.len())))
            }
            _ => Err(format!("cannot order a {} and a {}", a.kind(), b.kind())),
        }
    }

    /// Stable sort by the first element of each pair.
    pub fn sort<T>(&mut self, mut items: Vec<(Value, T)>, reverse: bool) -> Fallible<Vec<T>> {
        self.items(items.len().saturating_mul(4))?;
        let mut order: Vec<usize> = (0..items.len()).collect();
        let mut other = order.clone();
        let mut width = 1;
        while width < order.len() {
            for start in (0..order.len()).step_by(2 * width) {
                let middle = (start + width).min(order.len());
                let end = (start + 2 * width).min(order.len());
                let (mut left, mut right) = (start, middle);
                for slot in &mut other[start..end] {
                    let from_right = left == middle
                        || (right < end && {
                            let (l, r) = (&items[order[left]].0, &items[order[right]].0);
                            let (a, b) = if reverse { (l, r) } else { (r, l) };
                            self.order(a, b)? == Some(Ordering::Less)
                        });
                    let next = if from_right { &mut right } else { &mut left };
                    *slot = order[*next];
                    *next += 1;
                }
            }
            std::mem::swap(&mut order, &mut other);
            width *= 2;
        }
        let mut slots: Vec<Option<T>> = items.drain(..).map(|(_, item)| Some(item)).collect();
        Ok(order.into_iter().filter_map(|at| slots[at].take()).collect())
    }
}

fn too_large() -> String {
    format!("builds texts and lists of more than {MAX_MEMORY} bytes")
}

fn deepest<'a>(values: impl Iterator<Item = &'a Value>) -> Fallible<u16> {
    let depth = values.map(Value::depth).max().unwrap_or(0) + 1;
    if depth > MAX_DEPTH {
        return Err(format!("nests values deeper than {MAX_DEPTH} levels"));
    }
    Ok(depth)
}

/// Whether a character is white space, like Python's `str.isspace`.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}
