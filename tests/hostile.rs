//! Templates, grammars and schemas that mean harm end in a result or an error: soon, and in bounded memory.
#![cfg(all(feature = "chat", feature = "constrain"))]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use halite::chat::{Message, Template};
use halite::constrain::{Guide, Rule};
use halite::generate::Constraint;
use halite::{Error, Model, Tokenizer};

/// Counts the bytes that are held, and the most that were at once.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is the system allocator's; only counters are changed.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(held, Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One at a time, as memory is counted for all threads.
static ALONE: Mutex<()> = Mutex::new(());

fn tokenizer() -> Tokenizer {
    let model =
        Model::open(concat!(env!("CARGO_MANIFEST_DIR"), "/models/austen/halite-austen.gguf")).unwrap();
    Tokenizer::from_gguf(model.gguf()).unwrap().unwrap()
}

/// Runs one case and sees what it takes. The times are far above what is promised, for slow and busy machines.
fn bounded<T>(name: &str, most_bytes: usize, most_time: Duration, f: impl FnOnce() -> T) -> T {
    let before = HELD.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let start = Instant::now();
    let result = f();
    let (took, peak) = (start.elapsed(), PEAK.load(Ordering::Relaxed).saturating_sub(before));
    if std::env::var_os("SHOW").is_some() {
        eprintln!("{took:?} {} MB {name}", peak >> 20);
    }
    assert!(took < most_time, "{name}: {took:?}");
    assert!(peak < most_bytes, "{name}: {peak} bytes");
    result
}

fn files(folder: &str) -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/hostile").join(folder);
    let file = |path: std::path::PathBuf| {
        (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read_to_string(&path).unwrap())
    };
    let mut files: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| file(entry.unwrap().path())).collect();
    files.sort();
    assert!(files.len() > 20);
    files
}

#[test]
fn templates() {
    let _alone = ALONE.lock();
    let tokenizer = tokenizer();
    let rendered = ["generation", "int_of.jinja", "round.jinja", "slice_deep.jinja", "wide"];
    let mut cases = files("templates");
    let repeated = |part: &str, bytes: usize| part.repeat(bytes / part.len());
    for bytes in [100_000, 1_000_000] {
        for (before, part, after) in [
            ("{{ ", "-", "1 }}"),
            ("{{ ", "not ", "1 }}"),
            ("{{ 1", "|string", " }}"),
            ("{{ 1", "+1", " }}"),
            ("{{ 1", " ~ 1", " }}"),
            ("{{ 1", " if 1 else 1", " }}"),
            ("{{ 1", ".a", " }}"),
            ("{{ 1", "[1]", " }}"),
            ("{{ 1", "()", " }}"),
            ("{{ 1", " is string is string", " }}"),
            ("{{ 1", " < 1", " }}"),
            ("{{ 1", " ** 1", " }}"),
            ("{{ 1", " and 1", " }}"),
            ("{{ ", "(", ""),
            ("{{ ", "[", ""),
            ("{{ ", "{1:", ""),
            ("{{ ", "f(", ""),
            ("{{ 'a'|map(", "'map',", "'upper') }}"),
            ("{% if 0 %}", "{% elif 1 %}", "{% endif %}"),
            ("", "{% if 1 %}", ""),
            ("", "{% for x in 'a' %}", ""),
            ("", "{% macro m() %}", ""),
            ("", "{% set x %}", ""),
            ("{% set ", "(", ""),
            ("{% set ", "a,", "b = 1 %}"),
            ("{% macro m(", "a,", "b) %}{% endmacro %}{{ m() }}"),
            ("", "{{ 1 }}", ""),
            ("", "{", ""),
            ("", "{#", ""),
            ("{% raw %}", "{% endraw", ""),
            ("{{ '", "\\", ""),
            ("{{ dict(", "a=1,", ") }}"),
        ] {
            let text = format!("{before}{}{after}", repeated(part, bytes));
            cases.push((format!("{before}{part}… of {bytes} bytes"), text));
        }
    }
    // As deep as it may be: calls in calls, each with an expression that is deep too.
    let deep = format!("{}m(n){}", "[".repeat(40), "][0]".repeat(40));
    cases.push(("calls".into(), format!("{{% macro m(n) %}}{{{{ {deep} }}}}{{% endmacro %}}{{{{ m(1) }}}}")));
    let nested = format!("{}{{{{ m() }}}}{}", "{% if 1 %}".repeat(150), "{% endif %}".repeat(150));
    cases.push(("ifs".into(), format!("{{% macro m() %}}{nested}{{% endmacro %}}{{{{ m() }}}}")));
    cases.push(("loops".into(), "{% for x in 'a' recursive %}{{ loop(x) }}{% endfor %}".into()));
    cases.push(("filters".into(), format!("{{{{ 'a'|map({}'upper') }}}}", "'map',".repeat(900))));
    let mut values = String::from("{% set x = 1 %}");
    values.push_str(&"{% set x = [x, (x,), {'a': x}] %}".repeat(45));
    for use_of in [
        "x",
        "x|tojson",
        "x == x",
        "x < x",
        "x|string|length",
        "{x: 1}",
        "x in [x]",
        "[x, x]|sort",
        "[x]|unique|list",
    ] {
        cases.push((format!("wide values: {use_of}"), format!("{values}{{{{ {use_of} }}}}")));
    }
    for (name, template) in &cases {
        let messages = [Message::new("user", "hi")];
        let result = bounded(name, 256 << 20, Duration::from_secs(10), || {
            Template::new(template, &tokenizer).and_then(|template| template.render(&messages, true))
        });
        match result {
            Ok(text) => assert!(text.len() <= 16 << 20, "{name}"),
            Err(Error::Template(message)) => {
                assert!(message.len() < 2000 && message.contains("line "), "{name}: {message}");
                assert!(!rendered.contains(&&**name), "{name}: {message}");
            }
            Err(error) => panic!("{name}: {error}"),
        }
    }
}

#[test]
fn rules() {
    let _alone = ALONE.lock();
    let tokenizer = tokenizer();
    let mut cases: Vec<(String, Rule)> = Vec::new();
    for (name, text) in files("rules") {
        let rule = if name.ends_with(".json") { Rule::JsonSchema(text) } else { Rule::grammar(&text) };
        cases.push((name, rule));
    }
    let chain = |count: usize, define: &dyn Fn(usize) -> String| (0..count).map(define).collect::<String>();
    for count in [1000, 1990, 4000, 100_000] {
        let rules = chain(count, &|i| format!("a{i}: a{}\n", i + 1));
        cases.push((format!("{count} rules"), Rule::Grammar(format!("start: a0\n{rules}a{count}: \"x\"\n"))));
        let words = chain(count, &|i| format!("A{i}: \"x\" A{}\n", i + 1));
        cases.push((format!("{count} words"), Rule::Grammar(format!("start: A0\n{words}A{count}: \"x\"\n"))));
        let rules = chain(count, &|i| format!("a{i} ::= a{}\n", i + 1));
        cases.push((
            format!("{count} in GBNF"),
            Rule::Gbnf(format!("root ::= a0\n{rules}a{count} ::= \"x\"\n")),
        ));
        let names = chain(count, &|i| format!("\"n{i}\", "));
        cases.push((
            format!("{count} names"),
            Rule::JsonSchema(format!(r#"{{"type":"object","required":[{names}"z"]}}"#)),
        ));
        let properties = chain(count, &|i| format!("\"n{i}\": {{\"type\": \"integer\"}}, "));
        let schema = format!(r#"{{"type":"object","properties":{{{properties}"z":true}}}}"#);
        cases.push((format!("{count} properties"), Rule::JsonSchema(schema)));
        for (what, before, after) in
            [("references", "", ""), ("lists", r#"{"items":"#, "}"), ("all", r#"{"allOf":["#, "]}")]
        {
            let definitions =
                chain(count, &|i| format!("\"a{i}\":{before}{{\"$ref\":\"#/$defs/a{}\"}}{after},", i + 1));
            let schema = format!(
                "{{\"$ref\":\"#/$defs/a0\",\"$defs\":{{{definitions}\"a{count}\":{{\"type\":\"integer\"}}}}}}"
            );
            cases.push((format!("{count} {what} in Lark"), Rule::Grammar(format!("start: %json {schema}"))));
            cases.push((format!("{count} {what}"), Rule::JsonSchema(schema)));
        }
        cases.push((format!("{count} enums"), Rule::JsonSchema(format!("{{\"enum\":[{names}1]}}"))));
        let brackets = format!("{}\"a\"{}", "(".repeat(count), ")".repeat(count));
        cases.push((format!("{count} brackets"), Rule::Grammar(format!("start: {brackets}"))));
        cases.push((format!("{count} brackets in GBNF"), Rule::Gbnf(format!("root ::= {brackets}"))));
        cases.push((
            format!("{count} stars in GBNF"),
            Rule::Gbnf(format!("root ::= \"a\"{}", "*".repeat(count))),
        ));
        cases.push((
            format!("{count} maybes in GBNF"),
            Rule::Gbnf(format!("root ::= {}", "\"a\"? ".repeat(count))),
        ));
        let groups = format!("{}a{}", "(".repeat(count), ")".repeat(count));
        cases.push((format!("{count} groups"), Rule::Regex(groups)));
        cases.push((format!("{count} stars"), Rule::Regex(format!("a{}", "*".repeat(count)))));
        let list = format!("{}1{}", "[".repeat(count), "]".repeat(count));
        cases.push((format!("{count} lists"), Rule::JsonSchema(format!("{{\"const\":{list}}}"))));
    }
    for regex in [
        "(.*a){20}",
        "(a|b|ab)*c(.*a){30}.*",
        "((((a{1000}){1000}){1000}){1000}){1000}",
        ".{0,50000}x.{0,50000}",
    ] {
        cases.push((regex.into(), Rule::Regex(regex.into())));
    }
    for (name, rule) in &cases {
        let result = bounded(name, 512 << 20, Duration::from_secs(30), || {
            let mut guide = Guide::new(&tokenizer, rule)?;
            for _ in 0..4 {
                let allowed = guide.allowed()?;
                let Some(token) = (0..tokenizer.len() as u32).find(|&token| allowed.token(token)) else {
                    break;
                };
                guide.accept(token)?;
            }
            Ok(())
        });
        match result {
            Ok(()) => {}
            Err(Error::Constraint(message)) => assert!(message.len() < 2000, "{name}: {message}"),
            Err(error) => panic!("{name}: {error}"),
        }
    }
}
