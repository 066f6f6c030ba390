//! Parses tokens into statements and expressions, with Jinja2's grammar and limited depth.

use std::sync::Arc;

use super::lex::{SyntaxError, Token, lex};
use super::value::Fallible;

/// Maximum nesting of expressions and of statements.
const MAX_DEPTH: u16 = 200;

#[derive(Debug)]
pub struct Expr {
    pub line: u32,
    depth: u16,
    pub kind: Kind,
}

#[derive(Debug)]
pub enum Kind {
    Const(Const),
    Name(String),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Not(Box<Expr>),
    Negative(Box<Expr>),
    Positive(Box<Expr>),
    And(Box<(Expr, Expr)>),
    Or(Box<(Expr, Expr)>),
    Compare(Box<Expr>, Vec<(&'static str, Expr)>),
    Concat(Vec<Expr>),
    Binary(&'static str, Box<(Expr, Expr)>),
    /// Condition, value if true, value if false.
    If(Box<(Expr, Expr, Option<Expr>)>),
    Attribute(Box<Expr>, String),
    Item(Box<(Expr, Expr)>),
    Slice(Box<(Expr, [Option<Expr>; 3])>),
    Call(Box<Expr>, Arguments),
    Filter(Box<Expr>, Named),
    Test(Box<Expr>, Named),
}

#[derive(Debug)]
pub enum Const {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(Arc<str>),
}

#[derive(Debug, Default)]
pub struct Arguments {
    pub positional: Vec<Expr>,
    pub named: Vec<(String, Expr)>,
    /// `*list` and `**dict`.
    pub list: Option<Box<Expr>>,
    pub dict: Option<Box<Expr>>,
}

/// A filter or a test with its arguments.
#[derive(Debug)]
pub struct Named {
    pub name: String,
    pub arguments: Arguments,
}

#[derive(Debug)]
pub enum Target {
    Name(String),
    /// An attribute of a namespace.
    Attribute(String, String),
    Tuple(Vec<Target>),
}

#[derive(Debug)]
pub struct Macro {
    pub name: String,
    pub parameters: Vec<(String, Option<Expr>)>,
    pub body: Vec<Statement>,
    /// Whether the macro reads `varargs` and `kwargs`, and so accepts arguments without a parameter.
    pub variadic: [bool; 2],
}

#[derive(Debug)]
pub struct For {
    pub target: Target,
    pub over: Expr,
    pub filter: Option<Expr>,
    pub recursive: bool,
    pub body: Vec<Statement>,
    pub otherwise: Vec<Statement>,
}

#[derive(Debug)]
pub enum Statement {
    Text(String),
    Print(Expr),
    If(Vec<(Expr, Vec<Statement>)>, Vec<Statement>),
    For(Box<For>),
    Set(Target, Expr),
    SetBlock(Target, Vec<Named>, Vec<Statement>),
    With(Vec<(Target, Expr)>, Vec<Statement>),
    Macro(Macro),
    /// A `call` block: the call, and the body as a macro that it may call.
    Call(Box<(Expr, Macro)>),
    Filter(Vec<Named>, Vec<Statement>),
    /// A body with a scope of its own: `block`, `generation`, `autoescape false`.
    Scope(Vec<Statement>),
    Break,
    Continue,
    /// A statement that needs other templates, which do not exist; evaluating it is an error.
    Missing(&'static str, u32),
}

/// Parses a template.
pub fn parse(source: &str) -> Result<Vec<Statement>, SyntaxError> {
    let tokens = lex(source)?;
    let mut parser = Parser { tokens, at: 0, depth: 0, loops: 0, variadic: [false; 2] };
    parser.body(&[]).map_err(|message| (parser.line(), message))
}

struct Parser {
    tokens: Vec<(Token, u32)>,
    at: usize,
    depth: u16,
    /// Number of enclosing loops that `break` could end.
    loops: u32,
    /// Whether the current macro reads `varargs` and `kwargs`.
    variadic: [bool; 2],
}

impl Parser {
    fn token(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|(token, _)| token)
    }

    fn line(&self) -> u32 {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(1, |&(_, line)| line)
    }

    fn is_op(&self, op: &str) -> bool {
        matches!(self.token(), Some(Token::Op(o)) if *o == op)
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.token(), Some(Token::Name(n)) if n == name)
    }

    fn next_is(&self, test: impl Fn(&Token) -> bool) -> bool {
        self.tokens.get(self.at + 1).is_some_and(|(token, _)| test(token))
    }

    fn skip_op(&mut self, op: &str) -> bool {
        let is = self.is_op(op);
        self.at += usize::from(is);
        is
    }

    fn skip_name(&mut self, name: &str) -> bool {
        let is = self.is_name(name);
        self.at += usize::from(is);
        is
    }

    /// Skips the current token if it is one of `ops`, and returns it.
    fn skip_ops(&mut self, ops: &[&'static str]) -> Option<&'static str> {
        ops.iter().copied().find(|op| self.skip_op(op))
    }

    fn unexpected<T>(&self, expected: &str) -> Fallible<T> {
        let got = match self.token() {
            None => "the end of the template".into(),
            Some(Token::Text(_)) => "text".into(),
            Some(Token::PrintBegin) => "\"{{\"".into(),
            Some(Token::PrintEnd) => "\"}}\"".into(),
            Some(Token::BlockBegin) => "\"{%\"".into(),
            Some(Token::BlockEnd) => "\"%}\"".into(),
            Some(Token::Name(name)) => format!("{name:?}"),
            Some(Token::Str(_)) => "a string".into(),
            Some(Token::Int(_) | Token::Float(_)) => "a number".into(),
            Some(Token::Op(op)) => format!("{op:?}"),
        };
        Err(format!("expected {expected}, got {got}"))
    }

    fn expect_op(&mut self, op: &str) -> Fallible<()> {
        if self.skip_op(op) { Ok(()) } else { self.unexpected(&format!("{op:?}")) }
    }

    fn expect_name(&mut self, name: &str) -> Fallible<()> {
        if self.skip_name(name) { Ok(()) } else { self.unexpected(&format!("{name:?}")) }
    }

    fn expect(&mut self, token: &Token, text: &str) -> Fallible<()> {
        if self.token() != Some(token) {
            return self.unexpected(text);
        }
        self.at += 1;
        Ok(())
    }

    fn name(&mut self) -> Fallible<String> {
        let Some(Token::Name(name)) = self.token() else { return self.unexpected("a name") };
        let name = name.clone();
        self.at += 1;
        Ok(name)
    }

    /// Runs `part` one level deeper; too many levels are an error.
    fn nested<T>(&mut self, part: impl FnOnce(&mut Self) -> Fallible<T>) -> Fallible<T> {
        if self.depth >= MAX_DEPTH {
            return Err(format!("nested deeper than {MAX_DEPTH} levels"));
        }
        self.depth += 1;
        let result = part(self);
        self.depth -= 1;
        result
    }

    // Statements.

    /// Parses statements up to one of the words in `until`, or up to the end of the template.
    fn body(&mut self, until: &[&str]) -> Fallible<Vec<Statement>> {
        let mut statements = Vec::new();
        while let Some(token) = self.token() {
            match token {
                Token::Text(text) => {
                    statements.push(Statement::Text(text.clone()));
                    self.at += 1;
                }
                Token::PrintBegin => {
                    self.at += 1;
                    statements.push(Statement::Print(self.tuple(true, &[])?));
                    self.expect(&Token::PrintEnd, "\"}}\"")?;
                }
                Token::BlockBegin => {
                    self.at += 1;
                    if until.iter().any(|word| self.is_name(word)) {
                        return Ok(statements);
                    }
                    self.nested(|p| p.statement(&mut statements))?;
                    self.expect(&Token::BlockEnd, "\"%}\"")?;
                }
                _ => return self.unexpected("text or a tag"),
            }
        }
        match until.last() {
            None => Ok(statements),
            Some(word) => Err(format!("expected {word:?}, got the end of the template")),
        }
    }

    /// Parses the body of a statement, after its tag.
    fn block(&mut self, until: &[&str]) -> Fallible<Vec<Statement>> {
        self.skip_op(":");
        self.expect(&Token::BlockEnd, "\"%}\"")?;
        self.body(until)
    }

    /// Parses a body and its end tag.
    fn whole_block(&mut self, end: &str) -> Fallible<Vec<Statement>> {
        let body = self.block(&[end])?;
        self.expect_name(end)?;
        Ok(body)
    }

    /// Parses a body in which `break` cannot end the enclosing loops, because it runs elsewhere.
    fn isolated_block(&mut self, end: &str) -> Fallible<Vec<Statement>> {
        let loops = std::mem::take(&mut self.loops);
        let body = self.whole_block(end);
        self.loops = loops;
        body
    }

    fn statement(&mut self, into: &mut Vec<Statement>) -> Fallible<()> {
        let line = self.line();
        let word = self.name()?;
        into.push(match word.as_str() {
            "if" => self.if_statement()?,
            "for" => self.for_statement()?,
            "set" => self.set_statement()?,
            "with" => {
                let mut variables = Vec::new();
                while self.token() != Some(&Token::BlockEnd) {
                    if !variables.is_empty() {
                        self.expect_op(",")?;
                    }
                    let target = self.target(false)?;
                    self.expect_op("=")?;
                    variables.push((target, self.expression()?));
                }
                Statement::With(variables, self.whole_block("endwith")?)
            }
            "macro" => {
                let name = self.name()?;
                let parameters = self.parameters()?;
                Statement::Macro(self.macro_body(name, parameters, "endmacro")?)
            }
            "call" => {
                let parameters = if self.is_op("(") { self.parameters()? } else { Vec::new() };
                let call = self.expression()?;
                if !matches!(call.kind, Kind::Call(..)) {
                    return Err("expected a call after \"call\"".into());
                }
                Statement::Call(Box::new((call, self.macro_body("caller".into(), parameters, "endcall")?)))
            }
            "filter" => {
                let mut filters = vec![self.named()?];
                filters.extend(self.filters()?);
                Statement::Filter(filters, self.whole_block("endfilter")?)
            }
            // Marks text for training; it has no output of its own.
            "generation" => Statement::Scope(self.isolated_block("endgeneration")?),
            "block" => {
                let name = self.name()?;
                while self.skip_name("scoped") || self.skip_name("required") {}
                let body = self.isolated_block("endblock")?;
                self.skip_name(&name);
                Statement::Scope(body)
            }
            "autoescape" => {
                if !(self.skip_name("false") || self.skip_name("False")) {
                    return Err("autoescape can only be false".into());
                }
                Statement::Scope(self.whole_block("endautoescape")?)
            }
            "print" => {
                while self.token() != Some(&Token::BlockEnd) {
                    if matches!(into.last(), Some(Statement::Print(_))) {
                        self.skip_op(",");
                    }
                    let value = self.expression()?;
                    into.push(Statement::Print(value));
                }
                return Ok(());
            }
            "break" | "continue" if self.loops == 0 => return Err(format!("{word:?} outside of a loop")),
            "break" => Statement::Break,
            "continue" => Statement::Continue,
            "include" | "import" | "from" | "extends" => {
                while !matches!(self.token(), Some(Token::BlockEnd) | None) {
                    self.at += 1;
                }
                let words = ["include", "import", "from", "extends"];
                Statement::Missing(words.into_iter().find(|w| *w == word).unwrap_or("include"), line)
            }
            _ => return Err(format!("unknown tag {word:?}")),
        });
        Ok(())
    }

    fn macro_body(
        &mut self,
        name: String,
        parameters: Vec<(String, Option<Expr>)>,
        end: &str,
    ) -> Fallible<Macro> {
        let outer = std::mem::take(&mut self.variadic);
        let body = self.isolated_block(end)?;
        let variadic = std::mem::replace(&mut self.variadic, outer);
        Ok(Macro { name, parameters, body, variadic })
    }

    fn if_statement(&mut self) -> Fallible<Statement> {
        let mut branches = Vec::new();
        loop {
            let test = self.tuple(false, &[])?;
            branches.push((test, self.block(&["elif", "else", "endif"])?));
            if self.skip_name("elif") {
                continue;
            }
            let otherwise = if self.skip_name("else") { self.block(&["endif"])? } else { Vec::new() };
            self.expect_name("endif")?;
            return Ok(Statement::If(branches, otherwise));
        }
    }

    fn for_statement(&mut self) -> Fallible<Statement> {
        let target = self.target(false)?;
        self.expect_name("in")?;
        let over = self.tuple(false, &["recursive"])?;
        let filter = if self.skip_name("if") { Some(self.expression()?) } else { None };
        let recursive = self.skip_name("recursive");
        self.loops += 1;
        let body = self.block(&["else", "endfor"]);
        self.loops -= 1;
        let body = body?;
        let otherwise = if self.skip_name("else") { self.block(&["endfor"])? } else { Vec::new() };
        self.expect_name("endfor")?;
        Ok(Statement::For(Box::new(For { target, over, filter, recursive, body, otherwise })))
    }

    fn set_statement(&mut self) -> Fallible<Statement> {
        let target = self.target(true)?;
        if self.skip_op("=") {
            return Ok(Statement::Set(target, self.tuple(true, &[])?));
        }
        let filters = self.filters()?;
        Ok(Statement::SetBlock(target, filters, self.whole_block("endset")?))
    }

    fn parameters(&mut self) -> Fallible<Vec<(String, Option<Expr>)>> {
        let mut parameters: Vec<(String, Option<Expr>)> = Vec::new();
        self.expect_op("(")?;
        while !self.skip_op(")") {
            if !parameters.is_empty() {
                self.expect_op(",")?;
            }
            let name = self.name()?;
            let default = if self.skip_op("=") { Some(self.expression()?) } else { None };
            if default.is_none() && parameters.last().is_some_and(|(_, default)| default.is_some()) {
                return Err(format!("parameter {name:?} needs a default, as the one before it has one"));
            }
            parameters.push((name, default));
        }
        Ok(parameters)
    }

    /// Parses the target of an assignment: names, possibly in nested tuples.
    fn target(&mut self, attributes: bool) -> Fallible<Target> {
        let mut targets = Vec::new();
        loop {
            if self.skip_op("(") {
                targets.push(self.nested(|p| p.target(attributes))?);
                self.expect_op(")")?;
            } else {
                let name = self.name()?;
                if matches!(name.as_str(), "true" | "false" | "none" | "True" | "False" | "None") {
                    return Err(format!("cannot assign to {name:?}"));
                }
                let attribute = attributes && self.skip_op(".");
                targets.push(if attribute {
                    Target::Attribute(name, self.name()?)
                } else {
                    Target::Name(name)
                });
            }
            let more = self.skip_op(",");
            if !more && targets.len() == 1 {
                return Ok(targets.remove(0));
            }
            if !more || self.is_name("in") || self.is_op("=") || self.is_op(")") {
                return Ok(Target::Tuple(targets));
            }
        }
    }

    // Expressions.

    fn make(&self, line: u32, below: u16, kind: Kind) -> Fallible<Expr> {
        if below >= MAX_DEPTH {
            return Err(format!("an expression is deeper than {MAX_DEPTH} levels"));
        }
        Ok(Expr { line, depth: below + 1, kind })
    }

    fn make_pair(
        &self,
        line: u32,
        left: Expr,
        right: Expr,
        kind: impl FnOnce(Box<(Expr, Expr)>) -> Kind,
    ) -> Fallible<Expr> {
        self.make(line, left.depth.max(right.depth), kind(Box::new((left, right))))
    }

    fn make_all(&self, line: u32, items: Vec<Expr>, kind: fn(Vec<Expr>) -> Kind) -> Fallible<Expr> {
        self.make(line, deepest(&items), kind(items))
    }

    /// Parses one expression, or a tuple of expressions separated by commas.
    fn tuple(&mut self, conditional: bool, until: &[&str]) -> Fallible<Expr> {
        let line = self.line();
        let mut items = Vec::new();
        let mut is_tuple = false;
        loop {
            let ends = matches!(self.token(), Some(Token::PrintEnd | Token::BlockEnd) | None)
                || self.is_op(")")
                || until.iter().any(|word| self.is_name(word));
            if ends {
                break;
            }
            items.push(if conditional { self.expression()? } else { self.nested(Self::or)? });
            if !self.skip_op(",") {
                break;
            }
            is_tuple = true;
        }
        match items.pop() {
            None => self.unexpected("an expression"),
            Some(only) if !is_tuple => Ok(only),
            Some(last) => {
                items.push(last);
                self.make_all(line, items, Kind::Tuple)
            }
        }
    }

    fn expression(&mut self) -> Fallible<Expr> {
        self.nested(|p| {
            let line = p.line();
            let mut value = p.or()?;
            while p.skip_name("if") {
                let test = p.or()?;
                let other = if p.skip_name("else") { Some(p.expression()?) } else { None };
                let depth = value.depth.max(test.depth).max(other.as_ref().map_or(0, |o| o.depth));
                value = p.make(line, depth, Kind::If(Box::new((test, value, other))))?;
            }
            Ok(value)
        })
    }

    fn or(&mut self) -> Fallible<Expr> {
        self.chain("or", Self::and, Kind::Or)
    }

    fn and(&mut self) -> Fallible<Expr> {
        self.chain("and", Self::not, Kind::And)
    }

    /// Parses operands joined by a keyword, left-associative.
    fn chain(
        &mut self,
        word: &str,
        part: fn(&mut Self) -> Fallible<Expr>,
        kind: fn(Box<(Expr, Expr)>) -> Kind,
    ) -> Fallible<Expr> {
        let line = self.line();
        let mut left = part(self)?;
        while self.skip_name(word) {
            let right = part(self)?;
            left = self.make_pair(line, left, right, kind)?;
        }
        Ok(left)
    }

    fn not(&mut self) -> Fallible<Expr> {
        let line = self.line();
        if !self.skip_name("not") {
            return self.compare();
        }
        let value = self.nested(Self::not)?;
        self.make(line, value.depth, Kind::Not(Box::new(value)))
    }

    fn compare(&mut self) -> Fallible<Expr> {
        let line = self.line();
        let first = self.sum()?;
        let mut rest = Vec::new();
        loop {
            let op = if let Some(op) = self.skip_ops(&["==", "!=", "<=", ">=", "<", ">"]) {
                op
            } else if self.skip_name("in") {
                "in"
            } else if self.is_name("not") && self.next_is(|t| matches!(t, Token::Name(n) if n == "in")) {
                self.at += 2;
                "not in"
            } else {
                break;
            };
            rest.push((op, self.sum()?));
        }
        if rest.is_empty() {
            return Ok(first);
        }
        let depth = rest.iter().map(|(_, e)| e.depth).max().unwrap_or(0).max(first.depth);
        self.make(line, depth, Kind::Compare(Box::new(first), rest))
    }

    /// Parses operators of one precedence, left-associative.
    fn operators(
        &mut self,
        ops: &[&'static str],
        operand: fn(&mut Self) -> Fallible<Expr>,
    ) -> Fallible<Expr> {
        let line = self.line();
        let mut left = operand(self)?;
        while let Some(op) = self.skip_ops(ops) {
            let right = operand(self)?;
            left = self.make_pair(line, left, right, |pair| Kind::Binary(op, pair))?;
        }
        Ok(left)
    }

    fn sum(&mut self) -> Fallible<Expr> {
        self.operators(&["+", "-"], |p| {
            let line = p.line();
            let first = p.product()?;
            if !p.is_op("~") {
                return Ok(first);
            }
            let mut items = vec![first];
            while p.skip_op("~") {
                items.push(p.product()?);
            }
            p.make_all(line, items, Kind::Concat)
        })
    }

    fn product(&mut self) -> Fallible<Expr> {
        self.operators(&["*", "//", "/", "%"], |p| p.operators(&["**"], |p| p.unary(true)))
    }

    fn unary(&mut self, filters: bool) -> Fallible<Expr> {
        let line = self.line();
        let mut value = if let Some(op) = self.skip_ops(&["-", "+"]) {
            let value = self.nested(|p| p.unary(false))?;
            let kind = if op == "-" { Kind::Negative } else { Kind::Positive };
            self.make(line, value.depth, kind(Box::new(value)))?
        } else {
            self.primary()?
        };
        value = self.postfix(value)?;
        loop {
            let line = self.line();
            value = if !filters {
                break;
            } else if self.skip_op("|") {
                let filter = self.named()?;
                let depth = value.depth.max(filter.arguments.depth());
                self.make(line, depth, Kind::Filter(Box::new(value), filter))?
            } else if self.skip_name("is") {
                self.test(line, value)?
            } else if self.is_op("(") {
                self.call(line, value)?
            } else {
                break;
            };
        }
        Ok(value)
    }

    fn primary(&mut self) -> Fallible<Expr> {
        let line = self.line();
        let constant = |c| Ok(Expr { line, depth: 1, kind: Kind::Const(c) });
        let Some(token) = self.token().cloned() else { return self.unexpected("an expression") };
        self.at += 1;
        match token {
            Token::Name(name) => match name.as_str() {
                "true" | "True" => constant(Const::Bool(true)),
                "false" | "False" => constant(Const::Bool(false)),
                "none" | "None" => constant(Const::None),
                _ => {
                    self.variadic[0] |= name == "varargs";
                    self.variadic[1] |= name == "kwargs";
                    Ok(Expr { line, depth: 1, kind: Kind::Name(name) })
                }
            },
            Token::Str(mut text) => {
                while let Some(Token::Str(more)) = self.token() {
                    text.push_str(more);
                    self.at += 1;
                }
                constant(Const::Str(text.into()))
            }
            Token::Int(value) => constant(Const::Int(value)),
            Token::Float(value) => constant(Const::Float(value)),
            Token::Op("(") => {
                if self.skip_op(")") {
                    return Ok(Expr { line, depth: 1, kind: Kind::Tuple(Vec::new()) });
                }
                let value = self.nested(|p| p.tuple(true, &[]))?;
                self.expect_op(")")?;
                Ok(value)
            }
            Token::Op("[") => {
                let items = self.separated("]", Self::expression)?;
                self.make_all(line, items, Kind::List)
            }
            Token::Op("{") => {
                let pairs = self.separated("}", |p| {
                    let key = p.expression()?;
                    p.expect_op(":")?;
                    Ok((key, p.expression()?))
                })?;
                let depth = pairs.iter().map(|(k, v)| k.depth.max(v.depth)).max().unwrap_or(0);
                self.make(line, depth, Kind::Dict(pairs))
            }
            _ => {
                self.at -= 1;
                self.unexpected("an expression")
            }
        }
    }

    /// Parses items separated by commas, up to a closing bracket. A trailing comma is allowed.
    fn separated<T>(&mut self, close: &str, item: impl Fn(&mut Self) -> Fallible<T>) -> Fallible<Vec<T>> {
        let mut items = Vec::new();
        while !self.skip_op(close) {
            if !items.is_empty() {
                self.expect_op(",")?;
                if self.skip_op(close) {
                    break;
                }
            }
            items.push(item(self)?);
        }
        Ok(items)
    }

    fn postfix(&mut self, mut value: Expr) -> Fallible<Expr> {
        loop {
            let line = self.line();
            value = if self.skip_op(".") {
                let depth = value.depth;
                match self.token() {
                    Some(&Token::Int(index)) => {
                        self.at += 1;
                        let index = Expr { line, depth: 1, kind: Kind::Const(Const::Int(index)) };
                        self.make_pair(line, value, index, Kind::Item)?
                    }
                    _ => {
                        let name = self.name()?;
                        self.make(line, depth, Kind::Attribute(Box::new(value), name))?
                    }
                }
            } else if self.skip_op("[") {
                self.nested(|p| p.subscript(line, value))?
            } else if self.is_op("(") {
                self.call(line, value)?
            } else {
                return Ok(value);
            };
        }
    }

    fn subscript(&mut self, line: u32, value: Expr) -> Fallible<Expr> {
        let mut parts = [None, None, None];
        let mut colons = 0;
        loop {
            if self.skip_op(":") {
                colons += 1;
                if colons > 2 {
                    return self.unexpected("\"]\"");
                }
            } else if self.skip_op("]") {
                break;
            } else if parts[colons].is_none() {
                parts[colons] = Some(self.expression()?);
            } else {
                return self.unexpected("\"]\"");
            }
        }
        if colons > 0 {
            let depth = parts.iter().flatten().map(|e| e.depth).max().unwrap_or(0).max(value.depth);
            return self.make(line, depth, Kind::Slice(Box::new((value, parts))));
        }
        match parts {
            [Some(index), ..] => self.make_pair(line, value, index, Kind::Item),
            _ => Err("expected an index between the brackets".into()),
        }
    }

    fn call(&mut self, line: u32, value: Expr) -> Fallible<Expr> {
        let arguments = self.nested(Self::arguments)?;
        let depth = value.depth.max(arguments.depth());
        self.make(line, depth, Kind::Call(Box::new(value), arguments))
    }

    fn arguments(&mut self) -> Fallible<Arguments> {
        let mut arguments = Arguments::default();
        let mut first = true;
        self.expect_op("(")?;
        while !self.skip_op(")") {
            if !first {
                self.expect_op(",")?;
                if self.skip_op(")") {
                    break;
                }
            }
            first = false;
            let a = &mut arguments;
            if a.dict.is_some() {
                return self.unexpected("\")\" after **");
            }
            if self.skip_op("**") {
                a.dict = Some(Box::new(self.expression()?));
            } else if self.skip_op("*") {
                if a.list.is_some() {
                    return Err("two lists of arguments".into());
                }
                a.list = Some(Box::new(self.expression()?));
            } else if matches!(self.token(), Some(Token::Name(_))) && self.next_is(|t| *t == Token::Op("=")) {
                let name = self.name()?;
                self.at += 1;
                a.named.push((name, self.expression()?));
            } else if a.named.is_empty() && a.list.is_none() {
                a.positional.push(self.expression()?);
            } else {
                return self.unexpected("a named argument");
            }
        }
        Ok(arguments)
    }

    /// Parses the name and the arguments of a filter or a test.
    fn named(&mut self) -> Fallible<Named> {
        let name = self.dotted()?;
        let arguments = if self.is_op("(") { self.nested(Self::arguments)? } else { Arguments::default() };
        Ok(Named { name, arguments })
    }

    fn dotted(&mut self) -> Fallible<String> {
        let mut name = self.name()?;
        while self.skip_op(".") {
            name = format!("{name}.{}", self.name()?);
        }
        Ok(name)
    }

    fn filters(&mut self) -> Fallible<Vec<Named>> {
        let mut filters = Vec::new();
        while self.skip_op("|") {
            filters.push(self.named()?);
        }
        Ok(filters)
    }

    fn test(&mut self, line: u32, value: Expr) -> Fallible<Expr> {
        let not = self.skip_name("not");
        let name = self.dotted()?;
        let arguments = match self.token() {
            Some(Token::Op("(")) => self.nested(Self::arguments)?,
            Some(Token::Name(word)) if matches!(word.as_str(), "else" | "or" | "and") => Arguments::default(),
            Some(Token::Name(word)) if word == "is" => return Err("a test of a test".into()),
            Some(Token::Name(_) | Token::Str(_) | Token::Int(_) | Token::Float(_) | Token::Op("[" | "{")) => {
                let argument = self.nested(|p| {
                    let value = p.primary()?;
                    p.postfix(value)
                })?;
                Arguments { positional: vec![argument], ..Default::default() }
            }
            _ => Arguments::default(),
        };
        let depth = value.depth.max(arguments.depth());
        let test = self.make(line, depth, Kind::Test(Box::new(value), Named { name, arguments }))?;
        if not { self.make(line, test.depth, Kind::Not(Box::new(test))) } else { Ok(test) }
    }
}

impl Arguments {
    fn depth(&self) -> u16 {
        let others =
            self.named.iter().map(|(_, e)| e).chain(self.list.as_deref()).chain(self.dict.as_deref());
        others.map(|e| e.depth).max().unwrap_or(0).max(deepest(&self.positional))
    }
}

fn deepest(items: &[Expr]) -> u16 {
    items.iter().map(|e| e.depth).max().unwrap_or(0)
}
