//! Evaluates statements and expressions.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use super::parse::{Arguments, Const, Expr, For, Kind, Macro, Named, Statement, Target};
use super::text::Heap;
use super::value::{Fallible, List, Loop, Meter, Value};

/// Maximum nesting of expressions, statements and calls. A recursive call takes several levels.
const MAX_DEPTH: usize = 1000;

/// Bytes counted for a scope and for a variable.
const SCOPE: usize = 256;

/// The state of one rendering.
pub struct Run<'a> {
    pub heap: Heap,
    scopes: Vec<Scope<'a>>,
    macros: Vec<(&'a Macro, usize)>,
    /// The recursive loops and their scopes; `None` after the end of the loop.
    recursive: Vec<Option<(&'a For, usize)>>,
    /// The last arguments of `loop.changed`, by loop.
    changed: HashMap<usize, Vec<Value>>,
    loops: usize,
    depth: usize,
    /// The line of the current statement.
    pub line: u32,
}

#[derive(Default)]
struct Scope<'a> {
    variables: HashMap<&'a str, Value>,
    outer: Option<usize>,
}

/// Evaluated arguments.
#[derive(Default)]
pub struct CallArgs {
    pub positional: Vec<Value>,
    pub named: Vec<(Arc<str>, Value)>,
}

#[derive(PartialEq)]
enum Flow {
    On,
    Break,
    Continue,
}

/// Built-in functions.
const FUNCTIONS: [&str; 5] = ["namespace", "range", "dict", "raise_exception", "strftime_now"];

impl CallArgs {
    /// Returns the arguments with these names, in this order. Other arguments are an error.
    pub fn bind<const N: usize>(self, names: [&str; N]) -> Fallible<[Option<Value>; N]> {
        let mut bound = [const { None }; N];
        if self.positional.len() > N {
            return Err(format!("expected at most {N} arguments, got {}", self.positional.len()));
        }
        for (slot, value) in bound.iter_mut().zip(self.positional) {
            *slot = Some(value);
        }
        for (name, value) in self.named {
            let at = names.iter().position(|n| **n == *name);
            let slot = at.map(|at| &mut bound[at]).filter(|slot| slot.is_none());
            *slot.ok_or_else(|| format!("unexpected argument {name:?}"))? = Some(value);
        }
        Ok(bound)
    }
}

impl<'a> Run<'a> {
    pub fn new() -> Run<'a> {
        Run {
            heap: Heap { meter: Meter::new(), namespaces: Vec::new() },
            scopes: vec![Scope::default()],
            macros: Vec::new(),
            recursive: Vec::new(),
            changed: HashMap::new(),
            loops: 0,
            depth: 0,
            line: 1,
        }
    }

    /// Renders a template.
    pub fn template(&mut self, body: &'a [Statement], variables: Vec<(&'a str, Value)>) -> Fallible<String> {
        self.scopes[0].variables.extend(variables);
        let mut out = String::new();
        self.body(body, 0, &mut out)?;
        Ok(out)
    }

    pub fn nested<T>(&mut self, part: impl FnOnce(&mut Self) -> Fallible<T>) -> Fallible<T> {
        if self.depth >= MAX_DEPTH {
            return Err(format!("runs nested deeper than {MAX_DEPTH} levels"));
        }
        self.depth += 1;
        let result = part(self)?;
        self.depth -= 1;
        Ok(result)
    }

    // Scopes.

    /// Runs `part` in a new scope. Frees the scope afterwards, unless a macro captured it.
    fn scoped<T>(&mut self, outer: usize, part: impl FnOnce(&mut Self, usize) -> Fallible<T>) -> Fallible<T> {
        let (scope, macros) = (self.scopes.len(), self.macros.len());
        self.heap.meter.work(4)?;
        self.scopes.push(Scope { outer: Some(outer), ..Scope::default() });
        let result = part(self, scope)?;
        if self.macros.len() == macros {
            self.scopes.truncate(scope);
        } else {
            self.heap.meter.memory(SCOPE * (1 + self.scopes[scope].variables.len()))?;
        }
        Ok(result)
    }

    fn set(&mut self, scope: usize, name: &'a str, value: Value) -> Fallible<()> {
        self.heap.meter.work(1)?;
        self.scopes[scope].variables.insert(name, value);
        Ok(())
    }

    fn get(&mut self, scope: usize, name: &str) -> Fallible<Value> {
        let mut at = Some(scope);
        while let Some(scope) = at {
            self.heap.meter.work(1)?;
            let scope = &self.scopes[scope];
            if let Some(value) = scope.variables.get(name) {
                return Ok(value.clone());
            }
            at = scope.outer;
        }
        match FUNCTIONS.iter().find(|function| **function == name) {
            Some(function) => Ok(Value::Function(function)),
            None => self.undefined(name),
        }
    }

    pub fn undefined(&mut self, name: &str) -> Fallible<Value> {
        self.heap.meter.memory(name.len() + 32)?;
        Ok(Value::Undefined(name.into()))
    }

    fn assign(&mut self, scope: usize, target: &'a Target, value: Value) -> Fallible<()> {
        match target {
            Target::Name(name) => self.set(scope, name, value),
            Target::Attribute(name, attribute) => {
                let Value::Namespace(id) = self.get(scope, name)? else {
                    return Err(format!("{name:?} is no namespace, so its attributes cannot be set"));
                };
                self.set_attribute(id, attribute, value)
            }
            Target::Tuple(targets) => {
                let list = self.iterate(&value)?;
                if list.items.len() != targets.len() {
                    return Err(format!("expected {} values, got {}", targets.len(), list.items.len()));
                }
                for (target, value) in targets.iter().zip(&list.items) {
                    self.assign(scope, target, value.clone())?;
                }
                Ok(())
            }
        }
    }

    fn set_attribute(&mut self, namespace: usize, name: &str, value: Value) -> Fallible<()> {
        let entries = &mut self.heap.namespaces[namespace];
        self.heap.meter.work(1 + entries.len() / 16)?;
        match entries.iter_mut().find(|(n, _)| **n == *name) {
            Some(entry) => entry.1 = value,
            None => {
                self.heap.meter.memory(128 + name.len())?;
                entries.push((name.into(), value));
            }
        }
        Ok(())
    }

    // Statements.

    fn body(&mut self, body: &'a [Statement], scope: usize, out: &mut String) -> Fallible<Flow> {
        self.nested(|run| {
            for statement in body {
                let flow = run.statement(statement, scope, out)?;
                if flow != Flow::On {
                    return Ok(flow);
                }
            }
            Ok(Flow::On)
        })
    }

    fn statement(&mut self, statement: &'a Statement, scope: usize, out: &mut String) -> Fallible<Flow> {
        self.heap.meter.work(1)?;
        match statement {
            Statement::Text(text) => self.heap.meter.push(out, text)?,
            Statement::Print(value) => {
                let value = self.expr(value, scope)?;
                self.heap.write(out, &value)?;
            }
            Statement::If(branches, otherwise) => {
                for (test, body) in branches {
                    if self.expr(test, scope)?.is_truthy() {
                        return self.body(body, scope, out);
                    }
                }
                return self.body(otherwise, scope, out);
            }
            Statement::For(l) => return self.for_statement(l, scope, out),
            Statement::Set(target, value) => {
                let value = self.expr(value, scope)?;
                self.assign(scope, target, value)?;
            }
            Statement::Scope(body) => return self.scoped(scope, |run, scope| run.body(body, scope, out)),
            Statement::Break => return Ok(Flow::Break),
            Statement::Continue => return Ok(Flow::Continue),
            _ => return self.block_statement(statement, scope, out),
        }
        Ok(Flow::On)
    }

    fn block_statement(
        &mut self,
        statement: &'a Statement,
        scope: usize,
        out: &mut String,
    ) -> Fallible<Flow> {
        match statement {
            Statement::SetBlock(target, filters, body) => {
                let value = self.captured(body, filters, scope)?.1;
                self.assign(scope, target, value)?;
            }
            Statement::Filter(filters, body) => {
                let (flow, value) = self.captured(body, filters, scope)?;
                self.heap.write(out, &value)?;
                return Ok(flow);
            }
            Statement::With(variables, body) => {
                return self.scoped(scope, |run, inner| {
                    for (target, value) in variables {
                        let value = run.expr(value, scope)?;
                        run.assign(inner, target, value)?;
                    }
                    run.body(body, inner, out)
                });
            }
            Statement::Macro(definition) => {
                let value = self.define(definition, scope)?;
                self.set(scope, &definition.name, value)?;
            }
            Statement::Call(call) => {
                let (call, body) = &**call;
                let Kind::Call(callee, arguments) = &call.kind else { return Err("expected a call".into()) };
                let callee = self.expr(callee, scope)?;
                let mut args = self.arguments(arguments, scope)?;
                args.named.push(("caller".into(), self.define(body, scope)?));
                let value = self.call(callee, args)?;
                self.heap.write(out, &value)?;
            }
            Statement::Missing(what, line) => {
                self.line = *line;
                return Err(format!("{what}: there are no other templates"));
            }
            _ => {}
        }
        Ok(Flow::On)
    }

    fn define(&mut self, definition: &'a Macro, scope: usize) -> Fallible<Value> {
        self.heap.meter.memory(64)?;
        self.macros.push((definition, scope));
        Ok(Value::Macro(self.macros.len() - 1))
    }

    /// Returns the output of a body after its filters.
    fn captured(
        &mut self,
        body: &'a [Statement],
        filters: &'a [Named],
        scope: usize,
    ) -> Fallible<(Flow, Value)> {
        let mut text = String::new();
        let flow = self.scoped(scope, |run, scope| run.body(body, scope, &mut text))?;
        let mut value = Value::Str(text.into());
        for filter in filters {
            let args = self.arguments(&filter.arguments, scope)?;
            value = self.filter(&filter.name, value, args)?;
        }
        Ok((flow, value))
    }

    fn for_statement(&mut self, l: &'a For, scope: usize, out: &mut String) -> Fallible<Flow> {
        let over = self.expr(&l.over, scope)?;
        let recursive = l.recursive.then_some(self.recursive.len());
        if l.recursive {
            self.heap.meter.memory(32)?;
            self.recursive.push(Some((l, scope)));
        }
        let flow = self.run_loop(l, &over, scope, recursive, 0, out)?;
        if let Some(at) = recursive {
            self.recursive[at] = None;
        }
        Ok(flow)
    }

    fn run_loop(
        &mut self,
        l: &'a For,
        over: &Value,
        scope: usize,
        recursive: Option<usize>,
        level: usize,
        out: &mut String,
    ) -> Fallible<Flow> {
        let mut items = self.iterate(over)?;
        if let Some(filter) = &l.filter {
            let mut kept = Vec::new();
            for item in &items.items {
                let keep = self.scoped(scope, |run, scope| {
                    run.assign(scope, &l.target, item.clone())?;
                    run.expr(filter, scope)
                })?;
                if keep.is_truthy() {
                    self.heap.meter.items(1)?;
                    kept.push(item.clone());
                }
            }
            items = self.owned(kept)?;
        }
        if items.items.is_empty() {
            return self.scoped(scope, |run, scope| run.body(&l.otherwise, scope, out));
        }
        self.loops += 1;
        let state = Loop { id: self.loops, items, index: 0.into(), level, recursive };
        let state = Rc::new(state);
        for (index, item) in state.items.items.iter().enumerate() {
            state.index.set(index);
            let flow = self.scoped(scope, |run, scope| {
                run.set(scope, "loop", Value::Loop(state.clone()))?;
                run.assign(scope, &l.target, item.clone())?;
                run.body(&l.body, scope, out)
            })?;
            if flow == Flow::Break {
                break;
            }
        }
        Ok(Flow::On)
    }

    fn owned(&mut self, items: Vec<Value>) -> Fallible<Rc<List>> {
        match self.heap.meter.list(items)? {
            Value::List(list) => Ok(list),
            _ => Err("expected a list".into()),
        }
    }

    /// Returns the items of an iterable value.
    pub fn iterate(&mut self, value: &Value) -> Fallible<Rc<List>> {
        match value {
            Value::List(list) => Ok(list.clone()),
            Value::Dict(dict) => self.owned(dict.entries.iter().map(|(key, _)| key.clone()).collect()),
            Value::Str(text) => {
                let mut buffer = [0; 4];
                let mut items = Vec::new();
                for c in text.chars() {
                    self.heap.meter.memory(64)?;
                    items.push(Value::text(c.encode_utf8(&mut buffer)));
                }
                self.owned(items)
            }
            Value::Undefined(_) => self.owned(Vec::new()),
            _ => Err(format!("a {} cannot be iterated over", value.kind())),
        }
    }

    // Calls.

    fn arguments(&mut self, arguments: &'a Arguments, scope: usize) -> Fallible<CallArgs> {
        let mut args = CallArgs::default();
        for value in &arguments.positional {
            args.positional.push(self.expr(value, scope)?);
        }
        if let Some(list) = &arguments.list {
            let list = self.expr(list, scope)?;
            let list = self.iterate(&list)?;
            self.heap.meter.items(list.items.len())?;
            args.positional.extend(list.items.iter().cloned());
        }
        for (name, value) in &arguments.named {
            self.heap.meter.memory(64)?;
            args.named.push((name.as_str().into(), self.expr(value, scope)?));
        }
        if let Some(dict) = &arguments.dict {
            let Value::Dict(dict) = self.expr(dict, scope)? else {
                return Err("expected a dict after **".into());
            };
            self.heap.meter.items(dict.entries.len())?;
            for (key, value) in &dict.entries {
                let Value::Str(key) = key else { return Err("expected names as keys after **".into()) };
                args.named.push((key.clone(), value.clone()));
            }
        }
        Ok(args)
    }

    pub fn call(&mut self, callee: Value, args: CallArgs) -> Fallible<Value> {
        self.nested(|run| match callee {
            Value::Macro(id) => run.call_macro(id, args),
            Value::Method(method) => run.method(&method.0, &method.1, args),
            Value::Function(name) => run.function(name, args),
            Value::Loop(l) => {
                let [over] = args.bind(["iterable"])?;
                let started = l.recursive.and_then(|at| run.recursive[at].map(|(l, scope)| (at, l, scope)));
                let (at, definition, scope) = started.ok_or("this loop is not recursive, or is over")?;
                let over = over.ok_or("expected an iterable")?;
                let mut out = String::new();
                run.run_loop(definition, &over, scope, Some(at), l.level + 1, &mut out)?;
                Ok(Value::Str(out.into()))
            }
            value => Err(format!("a {} cannot be called", value.defined()?.kind())),
        })
    }

    fn call_macro(&mut self, id: usize, args: CallArgs) -> Fallible<Value> {
        let (definition, outer) = self.macros[id];
        let mut out = String::new();
        self.scoped(outer, |run, scope| {
            let mut positional = args.positional.into_iter();
            let mut named = args.named;
            let caller = named.iter().position(|(n, _)| **n == *"caller").map(|at| named.remove(at).1);
            if let Some(caller) = caller {
                run.set(scope, "caller", caller)?;
            }
            for (name, default) in &definition.parameters {
                let by_name = named.iter().position(|(n, _)| **n == **name);
                let value = match (positional.next(), by_name, default) {
                    (Some(_), Some(_), _) => return Err(format!("two values for {name:?}")),
                    (Some(value), ..) => value,
                    (None, Some(at), _) => named.remove(at).1,
                    (None, None, Some(default)) => run.expr(default, scope)?,
                    (None, None, None) => run.undefined(name)?,
                };
                run.set(scope, name, value)?;
            }
            let (positional, [list, dict]) = (positional.collect::<Vec<_>>(), definition.variadic);
            if (!list && !positional.is_empty()) || (!dict && !named.is_empty()) {
                return Err(format!("{}: too many arguments", definition.name));
            }
            if list {
                let list = run.heap.meter.sequence(positional, true)?;
                run.set(scope, "varargs", list)?;
            }
            if dict {
                let pairs = named.into_iter().map(|(name, value)| (Value::Str(name), value)).collect();
                let dict = run.heap.meter.dict(pairs)?;
                run.set(scope, "kwargs", dict)?;
            }
            run.body(&definition.body, scope, &mut out)
        })?;
        Ok(Value::Str(out.into()))
    }

    fn function(&mut self, name: &str, args: CallArgs) -> Fallible<Value> {
        match name {
            "namespace" => {
                let Value::Dict(dict) = self.make_dict(args)? else { return Err("expected a dict".into()) };
                self.heap.meter.memory(64)?;
                self.heap.namespaces.push(Vec::new());
                let id = self.heap.namespaces.len() - 1;
                for (key, value) in &dict.entries {
                    let key = self.heap.str(key)?;
                    self.set_attribute(id, &key, value.clone())?;
                }
                Ok(Value::Namespace(id))
            }
            "dict" => self.make_dict(args),
            "range" => {
                let numbers = args.positional.iter().map(|v| v.int().ok_or("range: expected ints"));
                let numbers = numbers.collect::<Result<Vec<i64>, _>>()?;
                let (start, stop, step) = match numbers[..] {
                    [stop] => (0, stop, 1),
                    [start, stop] => (start, stop, 1),
                    [start, stop, step] if step != 0 => (start, stop, step),
                    _ => return Err("range: expected start, stop and a step that is not 0".into()),
                };
                let span = (i128::from(stop) - i128::from(start)) * i128::from(step.signum());
                let step_size = i128::from(step).abs();
                let count = ((span + step_size - 1) / step_size).max(0);
                if count > 100_000 {
                    return Err("range: more than 100000 numbers".into());
                }
                self.heap.meter.check_items(count as usize)?;
                let numbers = (0..count as i64).map(|i| Value::Int(start + i * step)).collect();
                self.heap.meter.list(numbers)
            }
            "raise_exception" => {
                let [message] = args.bind(["message"])?;
                let message = self.heap.str(&message.unwrap_or(Value::None))?;
                Err(message.to_string())
            }
            _ => {
                let [format] = args.bind(["format"])?;
                let Some(Value::Str(format)) = format else {
                    return Err("strftime_now: expected a format".into());
                };
                let now = super::strftime_now(&format)?;
                self.heap.meter.str(&now)
            }
        }
    }

    fn make_dict(&mut self, args: CallArgs) -> Fallible<Value> {
        let mut pairs = Vec::new();
        match &args.positional[..] {
            [] => {}
            [Value::Dict(dict)] => {
                self.heap.meter.items(dict.entries.len())?;
                pairs.extend(dict.entries.iter().cloned());
            }
            [value] => {
                let list = self.iterate(value)?;
                for item in &list.items {
                    let pair = self.iterate(item)?;
                    let [key, value] = &pair.items[..] else { return Err("dict: expected pairs".into()) };
                    pairs.push((key.clone(), value.clone()));
                }
            }
            _ => return Err("dict: expected one value".into()),
        }
        pairs.extend(args.named.into_iter().map(|(name, value)| (Value::Str(name), value)));
        self.heap.meter.dict(pairs)
    }

    // Expressions.

    fn expr(&mut self, e: &'a Expr, scope: usize) -> Fallible<Value> {
        self.line = e.line;
        self.heap.meter.work(1)?;
        match &e.kind {
            Kind::Const(Const::None) => Ok(Value::None),
            Kind::Const(Const::Bool(b)) => Ok(Value::Bool(*b)),
            Kind::Const(Const::Int(i)) => Ok(Value::Int(*i)),
            Kind::Const(Const::Float(f)) => Ok(Value::Float(*f)),
            Kind::Const(Const::Str(text)) => Ok(Value::Str(text.clone())),
            Kind::Name(name) => self.get(scope, name),
            _ => self.nested(|run| run.operation(e, scope)),
        }
    }

    fn all(&mut self, items: &'a [Expr], scope: usize) -> Fallible<Vec<Value>> {
        items.iter().map(|item| self.expr(item, scope)).collect()
    }

    fn operation(&mut self, e: &'a Expr, scope: usize) -> Fallible<Value> {
        match &e.kind {
            Kind::List(items) => {
                let items = self.all(items, scope)?;
                self.heap.meter.list(items)
            }
            Kind::Tuple(items) => {
                let items = self.all(items, scope)?;
                self.heap.meter.sequence(items, true)
            }
            Kind::Not(value) => Ok(Value::Bool(!self.expr(value, scope)?.is_truthy())),
            Kind::And(pair) => {
                let left = self.expr(&pair.0, scope)?;
                if left.is_truthy() { self.expr(&pair.1, scope) } else { Ok(left) }
            }
            Kind::Or(pair) => {
                let left = self.expr(&pair.0, scope)?;
                if left.is_truthy() { Ok(left) } else { self.expr(&pair.1, scope) }
            }
            Kind::If(parts) => {
                let (test, value, other) = &**parts;
                match (self.expr(test, scope)?.is_truthy(), other) {
                    (true, _) => self.expr(value, scope),
                    (false, Some(other)) => self.expr(other, scope),
                    (false, None) => self.undefined("the other value of an if"),
                }
            }
            Kind::Attribute(value, name) => {
                let value = self.expr(value, scope)?;
                self.attribute(&value, name)
            }
            Kind::Item(pair) => {
                let value = self.expr(&pair.0, scope)?;
                let key = self.expr(&pair.1, scope)?;
                self.item(&value, &key)
            }
            Kind::Call(callee, arguments) => {
                let callee = self.expr(callee, scope)?;
                let args = self.arguments(arguments, scope)?;
                self.line = e.line;
                self.call(callee, args)
            }
            Kind::Filter(value, filter) => {
                let value = self.expr(value, scope)?;
                let args = self.arguments(&filter.arguments, scope)?;
                self.line = e.line;
                self.filter(&filter.name, value, args)
            }
            Kind::Test(value, test) => {
                let value = self.expr(value, scope)?;
                let args = self.arguments(&test.arguments, scope)?;
                self.line = e.line;
                Ok(Value::Bool(self.test(&test.name, &value, args)?))
            }
            _ => self.arithmetic(e, scope),
        }
    }

    fn arithmetic(&mut self, e: &'a Expr, scope: usize) -> Fallible<Value> {
        match &e.kind {
            Kind::Dict(pairs) => {
                let pair =
                    |(key, value): &'a (Expr, Expr)| Ok((self.expr(key, scope)?, self.expr(value, scope)?));
                let pairs = pairs.iter().map(pair).collect::<Fallible<Vec<_>>>()?;
                self.heap.meter.dict(pairs)
            }
            Kind::Negative(value) | Kind::Positive(value) => {
                let negative = matches!(e.kind, Kind::Negative(_));
                let value = self.expr(value, scope)?.defined()?;
                match (value.int(), &value) {
                    (Some(i), _) if negative => i.checked_neg().map(Value::Int).ok_or_else(out_of_range),
                    (Some(i), _) => Ok(Value::Int(i)),
                    (None, Value::Float(f)) => Ok(Value::Float(if negative { -f } else { *f })),
                    _ => Err(format!("a {} has no sign", value.kind())),
                }
            }
            Kind::Concat(items) => {
                let mut out = String::new();
                for item in items {
                    let item = self.expr(item, scope)?;
                    self.heap.write(&mut out, &item)?;
                }
                Ok(Value::Str(out.into()))
            }
            Kind::Compare(first, rest) => {
                let mut left = self.expr(first, scope)?;
                for (op, right) in rest {
                    let right = self.expr(right, scope)?;
                    if !self.compare(op, &left, &right)? {
                        return Ok(Value::Bool(false));
                    }
                    left = right;
                }
                Ok(Value::Bool(true))
            }
            Kind::Binary(op, pair) => {
                let left = self.expr(&pair.0, scope)?;
                let right = self.expr(&pair.1, scope)?;
                self.line = e.line;
                self.binary(op, left.defined()?, right)
            }
            Kind::Slice(parts) => {
                let (value, bounds) = &**parts;
                let value = self.expr(value, scope)?;
                let mut numbers = [None; 3];
                for (number, bound) in numbers.iter_mut().zip(bounds) {
                    let Some(bound) = bound else { continue };
                    let bound = self.expr(bound, scope)?;
                    match bound.int() {
                        _ if matches!(bound, Value::None) => {}
                        None if !matches!(value, Value::Undefined(_)) => return self.undefined("a slice"),
                        at => *number = at,
                    }
                }
                self.slice(&value, numbers)
            }
            _ => Err("unknown expression".into()),
        }
    }

    pub fn compare(&mut self, op: &str, left: &Value, right: &Value) -> Fallible<bool> {
        use std::cmp::Ordering::{Equal, Greater, Less};
        let meter = &mut self.heap.meter;
        Ok(match op {
            "==" => meter.equal(left, right)?,
            "!=" => !meter.equal(left, right)?,
            "in" => self.contains(right, left)?,
            "not in" => !self.contains(right, left)?,
            "<" => meter.order(left, right)? == Some(Less),
            ">" => meter.order(left, right)? == Some(Greater),
            "<=" => matches!(meter.order(left, right)?, Some(Less | Equal)),
            _ => matches!(meter.order(left, right)?, Some(Greater | Equal)),
        })
    }

    fn contains(&mut self, all: &Value, one: &Value) -> Fallible<bool> {
        match all {
            Value::Str(text) => {
                let Value::Str(part) = one else {
                    return Err(format!("a {} cannot be in a str", one.kind()));
                };
                self.heap.meter.read(text.len() + part.len())?;
                Ok(text.contains(&**part))
            }
            Value::Dict(dict) => Ok(dict.find(&self.heap.meter.key(one)?).is_some()),
            _ => {
                let list = self.iterate(all)?;
                for item in &list.items {
                    if self.heap.meter.equal(item, one)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
        }
    }

    pub fn binary(&mut self, op: &str, left: Value, right: Value) -> Fallible<Value> {
        if let (Some(a), Some(b)) = (left.int(), right.int()) {
            return integers(op, a, b);
        }
        if let (Some(a), Some(b)) = (left.float(), right.float()) {
            return floats(op, a, b);
        }
        match (op, &left, &right) {
            ("%", Value::Str(text), _) => {
                let text = text.clone();
                return self.heap.percent(&text, &right);
            }
            ("+", Value::Str(a), Value::Str(b)) => {
                self.heap.meter.text(a.len() + b.len())?;
                let mut text = String::with_capacity(a.len() + b.len());
                text.extend([&**a, &**b]);
                return Ok(Value::Str(text.into()));
            }
            ("+", Value::List(a), Value::List(b)) if a.tuple == b.tuple => {
                self.heap.meter.check_items(a.items.len() + b.items.len())?;
                let items = a.items.iter().chain(&b.items).cloned().collect();
                return self.heap.meter.sequence(items, a.tuple);
            }
            ("*", Value::Str(_) | Value::List(_), times) | ("*", times, Value::Str(_) | Value::List(_))
                if times.int().is_some() =>
            {
                let times = usize::try_from(times.int().unwrap_or(0)).unwrap_or(0);
                let whole = if matches!(left, Value::Str(_) | Value::List(_)) { &left } else { &right };
                match whole {
                    Value::Str(text) => {
                        self.heap.meter.text(text.len().saturating_mul(times))?;
                        return Ok(Value::Str(text.repeat(times).into()));
                    }
                    Value::List(list) => {
                        self.heap.meter.check_items(list.items.len().saturating_mul(times))?;
                        let mut items = Vec::with_capacity(list.items.len() * times);
                        // Repeating an empty list would loop without being charged.
                        for _ in 0..if list.items.is_empty() { 0 } else { times } {
                            items.extend(list.items.iter().cloned());
                        }
                        return self.heap.meter.sequence(items, list.tuple);
                    }
                    _ => {}
                }
            }
            _ => {}
        }
        let right = right.defined()?;
        Err(format!("no operator {op:?} for a {} and a {}", left.kind(), right.kind()))
    }

    fn slice(&mut self, value: &Value, [start, stop, step]: [Option<i64>; 3]) -> Fallible<Value> {
        let step = step.unwrap_or(1);
        if step == 0 {
            return Err("a slice's step is 0".into());
        }
        let length = match value {
            Value::Str(text) => {
                self.heap.meter.read(text.len())?;
                text.chars().count()
            }
            Value::List(list) => list.items.len(),
            Value::Undefined(name) => return Err(format!("{name:?} is undefined")),
            _ => return self.undefined("a slice"),
        };
        let count = length as i64;
        let (low, high) = if step > 0 { (0, count) } else { (-1, count - 1) };
        let place = |at: Option<i64>, default: i64| match at {
            None => default,
            Some(at) if at < 0 => at.saturating_add(count).clamp(low, high),
            Some(at) => at.clamp(low, high),
        };
        let (first, end) = if step > 0 {
            (place(start, 0), place(stop, count))
        } else {
            (place(start, count - 1), place(stop, -1))
        };
        let size = step.unsigned_abs() as usize;
        let span = if step > 0 { end - first } else { first - end }.max(0) as usize;
        let taken = span.div_ceil(size);
        match value {
            Value::Str(text) if step == 1 => {
                let at = |n: i64| text.char_indices().nth(n as usize).map_or(text.len(), |(at, _)| at);
                let (from, to) = if taken == 0 { (0, 0) } else { (at(first), at(end)) };
                self.heap.meter.str(&text[from..to])
            }
            Value::Str(text) => {
                self.heap.meter.memory(length.saturating_mul(4))?;
                self.heap.meter.text(taken.saturating_mul(4))?;
                let chars: Vec<char> = text.chars().collect();
                let index = |i: usize| (first + i as i64 * step) as usize;
                Ok(Value::Str((0..taken).map(|i| chars[index(i)]).collect::<String>().into()))
            }
            Value::List(list) => {
                self.heap.meter.check_items(taken)?;
                let index = |i: usize| (first + i as i64 * step) as usize;
                let items = (0..taken).map(|i| list.items[index(i)].clone()).collect();
                self.heap.meter.sequence(items, list.tuple)
            }
            _ => self.undefined("a slice"),
        }
    }

    /// Evaluates `value[key]`.
    pub fn item(&mut self, value: &Value, key: &Value) -> Fallible<Value> {
        let found = match (value, key) {
            (Value::Undefined(name), _) => return Err(format!("{name:?} is undefined")),
            (Value::Dict(dict), _) => match self.heap.meter.key(key) {
                Ok(key) => dict.find(&key).cloned(),
                Err(error) if matches!(key, Value::List(_) | Value::Dict(_)) => return Err(error),
                Err(error) => return Err(error),
            },
            (Value::List(list), _) if key.int().is_some() => {
                let at = place(key.int().unwrap_or(0), list.items.len());
                at.and_then(|at| list.items.get(at)).cloned()
            }
            (Value::Str(text), _) if key.int().is_some() => {
                self.heap.meter.read(text.len())?;
                let at = place(key.int().unwrap_or(0), text.chars().count());
                let c = at.and_then(|at| text.chars().nth(at));
                c.map(|c| Value::text(c.encode_utf8(&mut [0; 4])))
            }
            _ => None,
        };
        match (found, key) {
            (Some(found), _) => Ok(found),
            (None, Value::Str(name)) => match self.member(value, name)? {
                Some(member) => Ok(member),
                None => self.undefined(name),
            },
            (None, _) => {
                let mut name = String::new();
                self.heap.repr(&mut name, key, 0)?;
                self.undefined(&name)
            }
        }
    }

    /// Evaluates `value.name`.
    pub fn attribute(&mut self, value: &Value, name: &str) -> Fallible<Value> {
        if let Value::Undefined(of) = value {
            return Err(format!("{of:?} is undefined"));
        }
        if let Some(member) = self.member(value, name)? {
            return Ok(member);
        }
        if let Value::Dict(dict) = value {
            self.heap.meter.memory(name.len())?;
            if let Some(found) = dict.text(&name.into()) {
                return Ok(found.clone());
            }
        }
        self.undefined(name)
    }

    /// Returns a method or attribute that the value's type defines.
    fn member(&mut self, value: &Value, name: &str) -> Fallible<Option<Value>> {
        let number = |n: usize| Some(Value::Int(n as i64));
        Ok(match value {
            Value::Namespace(id) => {
                let entries = &self.heap.namespaces[*id];
                self.heap.meter.work(1 + entries.len() / 16)?;
                entries.iter().find(|(n, _)| **n == *name).map(|(_, value)| value.clone())
            }
            Value::Loop(l) => {
                let (index, length) = (l.index.get(), l.items.items.len());
                match name {
                    "index" => number(index + 1),
                    "index0" => number(index),
                    "revindex" => number(length - index),
                    "revindex0" => number(length - index - 1),
                    "first" => Some(Value::Bool(index == 0)),
                    "last" => Some(Value::Bool(index + 1 == length)),
                    "length" => number(length),
                    "depth" => number(l.level + 1),
                    "depth0" => number(l.level),
                    "previtem" | "nextitem" => {
                        let at = if name == "nextitem" { Some(index + 1) } else { index.checked_sub(1) };
                        match at.and_then(|at| l.items.items.get(at)) {
                            Some(item) => Some(item.clone()),
                            None => Some(self.undefined(name)?),
                        }
                    }
                    "cycle" | "changed" => Some(self.bound(value, name)?),
                    _ => None,
                }
            }
            _ if super::methods::has(value, name) => Some(self.bound(value, name)?),
            _ => None,
        })
    }

    fn bound(&mut self, value: &Value, name: &str) -> Fallible<Value> {
        self.heap.meter.memory(96)?;
        Ok(Value::Method(Rc::new((value.clone(), name.into()))))
    }

    pub fn loop_method(&mut self, l: &Loop, name: &str, args: CallArgs) -> Fallible<Value> {
        if name == "cycle" {
            let count = args.positional.len();
            let at = l.index.get().checked_rem(count).ok_or("cycle: expected values")?;
            return Ok(args.positional[at].clone());
        }
        let last = self.changed.remove(&l.id);
        let mut same = last.as_ref().is_some_and(|last| last.len() == args.positional.len());
        for (a, b) in last.iter().flatten().zip(&args.positional) {
            same = same && self.heap.meter.equal(a, b)?;
        }
        self.heap.meter.items(args.positional.len() + 4)?;
        self.changed.insert(l.id, args.positional);
        Ok(Value::Bool(!same))
    }
}

/// Converts a Python index, which may count from the end, to an index from the start.
fn place(at: i64, length: usize) -> Option<usize> {
    let at = if at < 0 { at.checked_add(i64::try_from(length).ok()?)? } else { at };
    usize::try_from(at).ok()
}

fn out_of_range() -> String {
    "an integer is out of range".into()
}

fn integers(op: &str, a: i64, b: i64) -> Fallible<Value> {
    let whole = |value: Option<i64>| value.map(Value::Int).ok_or_else(out_of_range);
    let zero = || "division by zero".to_string();
    match op {
        "+" => whole(a.checked_add(b)),
        "-" => whole(a.checked_sub(b)),
        "*" => whole(a.checked_mul(b)),
        "//" | "%" | "/" if b == 0 => Err(zero()),
        "//" => whole(a.checked_div(b).map(|q| q - i64::from(a % b != 0 && (a < 0) != (b < 0)))),
        "%" => whole(a.checked_rem(b).map(|r| if r != 0 && (r < 0) != (b < 0) { r + b } else { r })),
        "**" if b >= 0 => whole(u32::try_from(b).ok().and_then(|b| a.checked_pow(b))),
        _ => floats(op, a as f64, b as f64),
    }
}

fn floats(op: &str, a: f64, b: f64) -> Fallible<Value> {
    Ok(Value::Float(match op {
        "+" => a + b,
        "-" => a - b,
        "*" => a * b,
        "//" | "%" | "/" if b == 0.0 => return Err("division by zero".into()),
        "/" => a / b,
        "//" => (a / b).floor(),
        "%" => a - (a / b).floor() * b,
        _ => a.powf(b),
    }))
}
