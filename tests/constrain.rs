//! Output held to a rule is what the rule says, whatever the model and its vocabulary.
#![cfg(feature = "constrain")]

use std::ops::ControlFlow;
use std::sync::Arc;

use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::constrain::{Guide, Rule};
use halite::generate::{Constraint, Decoding, Finish, GenerateOptions, Generation};
use halite::gguf::Gguf;
use halite::map::Source;
use halite::sampler::SamplerOptions;
use halite::session::{Session, SessionOptions};
use halite::speculate::{Drafter, PromptLookup};
use halite::tokenizer::EncodeOptions;
use halite::{Error, Model, Tokenizer};
use serde_json::Value;

struct Austen {
    session: Session,
    tokenizer: Tokenizer,
}

impl Austen {
    fn new() -> Austen {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/austen/halite-austen.gguf");
        let model = Arc::new(Model::open(path).unwrap());
        let tokenizer = Tokenizer::from_gguf(model.gguf()).unwrap().unwrap();
        let backend: Arc<dyn Backend> = Arc::new(Cpu::with_threads(2).unwrap());
        let options = SessionOptions::default().context(256).batch(32).outputs(8);
        let session = Session::new(&model, &backend, &options).unwrap();
        Austen { session, tokenizer }
    }

    fn write(
        &mut self,
        rule: &Rule,
        sampler: SamplerOptions,
        drafter: Option<&mut dyn Drafter>,
    ) -> Generation {
        let mut guide = Guide::new(&self.tokenizer, rule).unwrap();
        let options = GenerateOptions::default().max_tokens(200).sampler(sampler).ignore_end(true);
        let prompt = self.tokenizer.encode("Her name was", options.encode);
        let sequence = self.session.add_sequence();
        let mut decoding = Decoding::default().constraint(&mut guide);
        decoding.drafter = drafter.map(|d| d as _);
        let generation =
            self.session.generate_in(sequence, &self.tokenizer, &prompt, &options, decoding, |_| {
                ControlFlow::Continue(())
            });
        self.session.remove(sequence).unwrap();
        generation.unwrap()
    }
}

const SCHEMA: &str = r##"{
    "type": "object",
    "properties": {
        "name": { "type": "string", "maxLength": 12 },
        "age": { "type": "integer", "minimum": 16, "maximum": 99 },
        "moods": { "type": "array", "items": { "$ref": "#/$defs/mood" }, "minItems": 2, "maxItems": 3 }
    },
    "required": ["name", "age", "moods"],
    "additionalProperties": false,
    "$defs": { "mood": { "enum": ["glad", "vexed", "é\"\n"] } }
}"##;

fn check_json(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"));
    assert_eq!(value.as_object().unwrap().len(), 3, "{text}");
    assert!(value["name"].as_str().unwrap().chars().count() <= 12, "{text}");
    assert!((16..=99).contains(&value["age"].as_u64().unwrap()), "{text}");
    let moods = value["moods"].as_array().unwrap();
    assert!((2..=3).contains(&moods.len()), "{text}");
    assert!(moods.iter().all(|m| ["glad", "vexed", "é\"\n"].contains(&m.as_str().unwrap())), "{text}");
}

#[test]
fn the_built_in_model_writes_json() {
    let mut austen = Austen::new();
    let rule = Rule::JsonSchema(SCHEMA.into());
    for seed in 0..6 {
        let temperature = if seed == 0 { 0.0 } else { 1.5 };
        let sampler = SamplerOptions::default().temperature(temperature).seed(seed);
        let plain = austen.write(&rule, sampler.clone(), None);
        assert_eq!(plain.finish, Finish::End, "{}", plain.text);
        check_json(&plain.text);
        let drafted = austen.write(&rule, sampler, Some(&mut PromptLookup::new(7)));
        assert_eq!((drafted.tokens, drafted.text), (plain.tokens, plain.text));
    }
}

#[test]
fn expressions_and_grammars() {
    let mut austen = Austen::new();
    for seed in 0..4 {
        let sampler = SamplerOptions::default().temperature(1.0).seed(seed);
        let text =
            austen.write(&Rule::Regex("(Emma|Anne) has [0-9]{2} cats\\.".into()), sampler.clone(), None).text;
        let rest = text.strip_prefix("Emma has ").or(text.strip_prefix("Anne has ")).unwrap();
        let number = rest.strip_suffix(" cats.").unwrap();
        assert!(number.len() == 2 && number.parse::<u32>().is_ok(), "{text}");
        let grammar = "start: sum\nsum: NUMBER | \"(\" sum \"+\" sum \")\"\nNUMBER: /[1-9]/\n";
        let sum = austen.write(&Rule::Grammar(grammar.into()), sampler, None);
        if sum.finish == Finish::End {
            let count = |c: char| sum.text.matches(c).count();
            assert_eq!((count('('), count('(')), (count(')'), count('+')), "{}", sum.text);
        }
    }
}

#[test]
fn a_grammar_holds_schemas() {
    let mut austen = Austen::new();
    let schema = r#"{"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}}, "required": ["a", "b"], "additionalProperties": false}"#;
    let structured = |schema: &str| Rule::Structured {
        grammar: "start: before @flags \">\"\nbefore[lazy]: /(.|\\n){0,20}/ \"<\"".into(),
        schemas: vec![("flags".into(), schema.into())],
    };
    let text = austen.write(&structured(schema), SamplerOptions::default().temperature(0.0), None).text;
    let json = text.split_once('<').unwrap().1.strip_suffix('>').unwrap();
    assert!(json.starts_with("{\"a\": ") && json.contains(", \"b\": "), "{text}");
    let many = format!("[{}0]", "0, ".repeat(20_000));
    for wrong in ["{", "{\"type\": \"nothing\"}", &many] {
        let guide = Guide::new(&austen.tokenizer, &structured(wrong));
        assert!(matches!(guide, Err(Error::Constraint(_))), "{}", &wrong[..wrong.len().min(40)]);
    }
}

#[test]
fn rules_that_make_no_sense_are_errors() {
    let tokenizer = Austen::new().tokenizer;
    for rule in [
        Rule::JsonSchema("{".into()),
        Rule::JsonSchema(r#"{"type": "nothing"}"#.into()),
        Rule::JsonSchema(r#"{"type": "integer", "minimum": 3, "maximum": 2}"#.into()),
        Rule::JsonSchema(r#"{"$ref": "https://example.com/schema"}"#.into()),
        Rule::Regex("(".into()),
        Rule::Grammar("start: nothing".into()),
        Rule::Grammar("".into()),
    ] {
        assert!(matches!(Guide::new(&tokenizer, &rule), Err(Error::Constraint(_))), "{rule:?}");
    }
}

/// Which texts a grammar in GBNF has, character by character.
#[test]
fn grammars_in_gbnf() {
    let bytes = halite_testing::gguf::llama().bytes();
    let gguf = Gguf::from_source(Source::from_bytes("llama", &bytes)).unwrap();
    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap().unwrap();
    // Its texts have only a, b and bytes, so that each text is tokens one way or another.
    let has = |grammar: &str, text: &str| {
        let rule = Rule::grammar(grammar);
        assert!(matches!(rule, Rule::Gbnf(_)), "{grammar}");
        let mut guide = Guide::new(&tokenizer, &rule).unwrap_or_else(|e| panic!("{grammar}: {e}"));
        let bytes: Vec<u8> = text.bytes().collect();
        for byte in bytes {
            let token = (0..tokenizer.len() as u32).find(|&token| {
                let mut out = Vec::new();
                tokenizer.decode_token(token, false, &mut out);
                out == [byte]
            });
            let token = token.unwrap_or_else(|| panic!("no token for {byte}"));
            if !guide.allowed().unwrap().token(token) {
                return false;
            }
            guide.accept(token).unwrap();
        }
        guide.allowed().unwrap().end
    };
    for (grammar, texts, others) in [
        ("root ::= \"ab\"", &["ab"][..], &["a", "abb", "b"][..]),
        // What repeats leaves what follows.
        ("root ::= [a-z]* \"b\" | \"a\"", &["b", "ab", "bbb", "a"], &["", "ba"]),
        ("# first\nroot ::= x (\n  \"a\" # here\n | x\n) \nx ::= \"b\"", &["ba", "bb"], &["b", "ab"]),
        ("root ::= \"a\"\n  | \"b\"", &["a", "b"], &["ab"]),
        ("root ::= \"a\"{2} \"b\"{1,2}", &["aab", "aabb"], &["ab", "aabbb"]),
        ("root ::= \"a\"{2,} \"b\"{0,1}", &["aa", "aaab"], &["a", "aabb"]),
        ("root ::= \"a\"+ \"b\"?", &["a", "aab"], &["", "b"]),
        ("root ::= [^a] . ", &["ba", "bb"], &["aa", "b"]),
        ("root ::= [^\\x00-\\x60b\\]\\-]", &["a"], &["b"]),
        ("root ::= [\\u0061\\U00000062]{2}", &["ab", "ba"], &["a"]),
        ("a-1 ::= \"a\"\nroot ::= a-1 Root2\nRoot2 ::= \"b\"", &["ab"], &["a"]),
        ("root ::= \"a\" root \"b\" | \"\"", &["", "ab", "aabb"], &["a", "aab"]),
        ("root ::= | \"a\"", &["", "a"], &["b"]),
    ] {
        texts.iter().for_each(|text| assert!(has(grammar, text), "{grammar}: {text}"));
        others.iter().for_each(|text| assert!(!has(grammar, text), "{grammar}: {text}"));
    }
    for (grammar, fault) in [
        ("root ::= x", "line 1: rule \"x\" is not defined"),
        ("a ::= \"a\"", "no rule \"root\""),
        ("root ::= \"a\"\nroot ::= \"b\"", "line 2: rule \"root\" is defined twice"),
        ("root ::= \"a", "line 1: expected a closing quote"),
        ("root ::= [z-a]", "is empty"),
        ("root ::= (\"a\"", "expected \")\""),
        ("root ::= \"a\"{2,1}", "a number from 2"),
        ("root ::= \"a\"{999999999}", "a number from 0"),
        ("root ::= \"\\q\"", "an escape of GBNF"),
        ("root ::= <think>", "single tokens"),
        ("root ::= \"a\" )", "expected a rule's name"),
    ] {
        let error = Guide::new(&tokenizer, &Rule::grammar(grammar)).unwrap_err().to_string();
        assert!(error.starts_with("constraint: GBNF: ") && error.contains(fault), "{grammar}: {error}");
    }
    assert!(matches!(Rule::grammar("// a comment\nstart: \"::=\""), Rule::Grammar(_)));
}

/// A text that a rule allows is allowed token by token, and may end where it ends: for each kind of vocabulary.
#[test]
fn every_kind_of_vocabulary() {
    let unigram = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/unigram.gguf")).unwrap();
    for (name, bytes) in [
        ("spm", halite_testing::gguf::llama().bytes()),
        ("bpe", halite_testing::gguf::bpe().bytes()),
        ("wordpiece", halite_testing::gguf::wordpiece().bytes()),
        ("unigram", unigram),
    ] {
        let gguf = Gguf::from_source(Source::from_bytes(name, &bytes)).unwrap();
        let tokenizer = Tokenizer::from_gguf(&gguf).unwrap().unwrap();
        let plain = EncodeOptions::default().add_special(false);
        let tokens = tokenizer.encode("ab", plain);
        let text = tokenizer.decode(&tokens, false);
        assert!(text.contains("ab") && !tokens.is_empty(), "{name}: {text:?}");
        let mut guide = Guide::new(&tokenizer, &Rule::Regex(format!("{text}|{text}q"))).unwrap();
        for &token in &tokens {
            let allowed = guide.allowed().unwrap();
            assert!(allowed.token(token) && !allowed.end, "{name}");
            assert!(!allowed.token(tokenizer.len() as u32));
            guide.accept(token).unwrap();
        }
        assert!(guide.allowed().unwrap().end, "{name}");
    }
}
