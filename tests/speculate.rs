//! Drafted tokens change how many steps a text takes, and nothing else.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::backend::reference::Reference;
use halite::generate::{Decoding, Finish, GenerateOptions, Generation};
use halite::kernels::formats::Format;
use halite::model::ProgramOptions;
use halite::sampler::SamplerOptions;
use halite::session::{OutputKind, OutputTokens, Run, Session, SessionOptions};
use halite::speculate::{DraftModel, Drafter, PromptLookup};
use halite::{Error, Model, Result, Tokenizer};

fn open(file: &str) -> Arc<Model> {
    Arc::new(Model::open(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap())
}

fn austen() -> (Arc<Model>, Tokenizer) {
    let model = open("models/austen/halite-austen.gguf");
    let tokenizer = Tokenizer::from_gguf(model.gguf()).unwrap().unwrap();
    (model, tokenizer)
}

fn session(model: &Arc<Model>, backend: Arc<dyn Backend>, context: u32, kv_format: Format) -> Session {
    let program = ProgramOptions::default().kv_format(kv_format);
    let options = SessionOptions::default().context(context).batch(32).outputs(9).program(program);
    Session::new(model, &backend, &options).unwrap()
}

fn cpu() -> Arc<dyn Backend> {
    Arc::new(Cpu::with_threads(2).unwrap())
}

fn generate(
    session: &mut Session,
    tokenizer: &Tokenizer,
    options: &GenerateOptions,
    drafter: Option<&mut dyn Drafter>,
) -> Generation {
    let prompt = "She was happy, and he was happy. She was happy, and he was";
    let prompt = tokenizer.encode(prompt, options.encode);
    let sequence = session.add_sequence();
    let mut decoding = Decoding::default();
    decoding.drafter = drafter;
    let generation = session
        .generate_in(sequence, tokenizer, &prompt, options, decoding, |_| ControlFlow::Continue(()))
        .unwrap();
    // The sequence is the text, but for a last token that was not run.
    let text = [&prompt[..], &generation.tokens].concat();
    let have = session.tokens(sequence).unwrap();
    assert!(text.starts_with(have) && text.len() <= have.len() + 1);
    session.remove(sequence).unwrap();
    generation
}

/// Drafts what it is told the text is, wrong in every fifth token.
struct Oracle(Vec<u32>);

impl Drafter for Oracle {
    fn draft(&mut self, tokens: &[u32], most: usize, out: &mut Vec<u32>) -> Result<()> {
        let rest = self.0.iter().enumerate().skip(tokens.len()).take(most);
        out.extend(rest.map(|(i, &token)| if i % 5 == 0 { token ^ 1 } else { token }));
        Ok(())
    }
}

/// Every way of choosing tokens, every KV format, with what ends a text in the middle of a draft.
#[test]
fn drafts_do_not_change_the_text() {
    let (model, tokenizer) = austen();
    let greedy = GenerateOptions::default().max_tokens(60).ignore_end(true);
    let hot = |sampler| greedy.clone().sampler(sampler);
    let cases = [
        greedy.clone(),
        greedy.clone().max_tokens(1),
        greedy.clone().ignore_end(false).max_tokens(160),
        greedy.clone().stop(vec![" and".into()]),
        hot(SamplerOptions::default().temperature(0.9).seed(5)),
        hot(SamplerOptions::default().temperature(0.9).top_k(0).seed(6)),
        hot(SamplerOptions::default().repeat_penalty(1.2)),
    ];
    for kv in [Format::F16, Format::F32, Format::Q8_0] {
        let mut session = session(&model, cpu(), 256, kv);
        let mut used = 0;
        for options in &cases {
            let plain = generate(&mut session, &tokenizer, options, None);
            let mut oracle = Oracle([&plain.prompt_tokens[..], &plain.tokens].concat());
            for drafter in [&mut PromptLookup::new(8) as &mut dyn Drafter, &mut oracle] {
                let drafted = generate(&mut session, &tokenizer, options, Some(drafter));
                assert_eq!((&drafted.tokens, &drafted.text), (&plain.tokens, &plain.text), "{options:?}");
                assert_eq!(drafted.finish, plain.finish);
                assert_eq!(drafted.decode_tokens, plain.decode_tokens);
                assert_eq!(drafted.decode_steps + drafted.drafted.1, plain.decode_steps, "{options:?}");
                used += drafted.drafted.1;
            }
        }
        assert!(used > 100, "{used}");
    }
}

#[test]
fn a_draft_model_does_not_change_the_text() {
    let (model, tokenizer) = austen();
    let mut target = session(&model, cpu(), 256, Format::F16);
    let options = GenerateOptions::default().max_tokens(40).ignore_end(true);
    let plain = generate(&mut target, &tokenizer, &options, None);
    // The model itself is always right; with a coarser cache, and on another backend, nearly always.
    for (kv, backend, context) in [
        (Format::F16, cpu(), 256),
        (Format::Q8_0, cpu(), 256),
        (Format::F16, Arc::new(Reference::new()) as Arc<dyn Backend>, 30),
    ] {
        let mut draft = DraftModel::new(session(&model, backend, context, kv), &target, 4).unwrap();
        let drafted = generate(&mut target, &tokenizer, &options, Some(&mut draft));
        assert_eq!(drafted.tokens, plain.tokens);
        assert!(drafted.drafted.1 > 0);
        if kv == Format::F16 && context == 256 {
            assert_eq!(drafted.drafted.0, drafted.drafted.1);
            assert_eq!(drafted.decode_steps, 8);
        }
    }
    let other = session(&open("tests/data/golden/llama-Q4_0.gguf"), cpu(), 64, Format::F16);
    assert!(matches!(DraftModel::new(other, &target, 4), Err(Error::Argument { .. })));
}

/// A full context ends a text where it would without drafts.
#[test]
fn the_context_ends_both() {
    let (model, tokenizer) = austen();
    let mut session = session(&model, cpu(), 64, Format::F16);
    let options = GenerateOptions::default().max_tokens(500).ignore_end(true);
    let plain = generate(&mut session, &tokenizer, &options, None);
    let mut oracle = Oracle([&plain.prompt_tokens[..], &plain.tokens, &[3; 20]].concat());
    let drafted = generate(&mut session, &tokenizer, &options, Some(&mut oracle));
    assert_eq!((drafted.tokens, drafted.finish), (plain.tokens, Finish::ContextFull));
}

/// The outputs of a step over many tokens are those of steps over one, for other formats of weights.
#[test]
fn outputs_do_not_depend_on_the_step() {
    for file in ["llama-Q4_0", "llama-Q4_K_M", "llama-TQ1_0"] {
        let model = open(&format!("tests/data/golden/{file}.gguf"));
        let mut session = session(&model, cpu(), 128, Format::F16);
        let tokens: Vec<u32> = (1..=9).collect();
        let (one, all) = (session.add_sequence(), session.add_sequence());
        let mut single = Vec::new();
        for token in &tokens {
            let run = Run::new(one, std::slice::from_ref(token));
            session.step(&[run], OutputKind::ArgMax).unwrap();
            single.extend_from_slice(session.arg_max());
        }
        session.step(&[Run::new(all, &tokens).outputs(OutputTokens::All)], OutputKind::ArgMax).unwrap();
        assert_eq!(session.arg_max(), single, "{file}");
    }
}
