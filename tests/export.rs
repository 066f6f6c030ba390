//! Images for microcontrollers: the same bits as a session, on every family and format; and no image can make a step
//! panic.
#![cfg(feature = "export")]

use std::path::Path;
use std::sync::Arc;

use halite::export::{ExportOptions, export};
use halite::kernels::formats::Format;
use halite::model::{Pooling, ProgramOptions};
use halite::program::Op;
use halite::session::{OutputKind, OutputTokens, Run};
use halite::{Backend, Cpu, EmbedOptions, Embedder, Model, Session, SessionOptions, Tokenizer};
use halite_micro::{Error, Image, greedy};
use halite_testing::bert;
use halite_testing::golden::{cases, committed, family_folders, folder, rows};

const CONTEXT: u32 = 256;

fn image(model: &Model, tokens: u32, kv: Format) -> Vec<u32> {
    let program = ProgramOptions::default().kv_format(kv);
    let options = ExportOptions::default().context(CONTEXT).tokens(tokens).program(program);
    export(model, &options).unwrap().0
}

fn cpu() -> Arc<dyn Backend> {
    Arc::new(Cpu::with_threads(2).unwrap())
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// Logits of every position from a session.
fn expected(model: &Arc<Model>, tokens: &[u32], kv: Format) -> Vec<f32> {
    let n = tokens.len() as u32;
    let program = ProgramOptions::default().kv_format(kv);
    let options = SessionOptions::default().context(CONTEXT).batch(n).outputs(n).program(program);
    let mut session = Session::new(model, &cpu(), &options).unwrap();
    let sequence = session.add_sequence();
    session.step(&[Run::new(sequence, tokens).outputs(OutputTokens::All)], OutputKind::Logits).unwrap();
    session.logits().to_vec()
}

fn austen() -> Arc<Model> {
    let path = Path::new(halite_testing::ROOT).join("models/austen/halite-austen.gguf");
    Arc::new(Model::open(path).unwrap())
}

fn words(bytes: usize) -> Vec<u32> {
    vec![!0; bytes]
}

/// Compares all positions, in steps of one token and of several.
fn same(model: &Arc<Model>, kv: Format, name: &str) {
    let vocabulary = model.hparams().vocab_size;
    let tokens: Vec<u32> = (0..200).map(|i| (2 + 7 * i) % vocabulary).collect();
    let expected = expected(model, &tokens, kv);
    let row = |position: usize| bits(&expected[position * vocabulary as usize..][..vocabulary as usize]);
    for most in [1, 37] {
        let image = image(model, most as u32, kv);
        let image = Image::new(bytemuck::cast_slice(&image)).unwrap();
        image.verify().unwrap();
        let mut memory = words(image.memory_words());
        let mut session = halite_micro::Session::new(image, &mut memory).unwrap();
        let mut done = 0;
        for tokens in tokens.chunks(most) {
            done += tokens.len();
            let logits = session.step(tokens).unwrap();
            assert_eq!(bits(logits), row(done - 1), "{name}, steps of {most}, position {}", done - 1);
        }
    }
}

#[test]
fn all_families_give_the_same_bits() {
    for case in family_folders().iter().flat_map(|dir| cases(dir)) {
        let (model, name) = (Arc::new(Model::open(&case.model).unwrap()), case.model.display().to_string());
        let program = model.program(ProgramOptions::default(), CONTEXT).unwrap();
        let lacks = |op: &Op| match op {
            Op::Conv { .. }
            | Op::Recur { .. }
            | Op::Slice { .. }
            | Op::Mul { .. }
            | Op::Join { .. }
            | Op::BlockMatMul { .. }
            | Op::Spread { .. }
            | Op::Mix { .. }
            | Op::Attend { growth: Some(_), .. } => true,
            Op::Route { bias, groups, scales, .. } => bias.is_some() || groups.is_some() || scales.is_some(),
            _ => false,
        };
        if let Some((_, op)) = program.ops().find(|(_, op)| lacks(op)) {
            let error = export(&model, &ExportOptions::default().context(CONTEXT)).unwrap_err().to_string();
            assert!(error.contains(&format!("{} in an image", op.name())), "{name}: {error}");
            continue;
        }
        same(&model, Format::F16, &name);
    }
}

#[test]
fn decoders_that_give_vectors_are_refused() {
    let model = Model::open(committed().join("embedding/qwen3-embedding.gguf")).unwrap();
    let error = export(&model, &ExportOptions::default().context(64)).unwrap_err().to_string();
    assert!(error.contains("no decoder that gives vectors"), "{error}");
}

#[test]
fn all_formats_give_the_same_bits() {
    for case in cases(&committed()) {
        same(&Arc::new(Model::open(&case.model).unwrap()), Format::Q8_0, &case.model.display().to_string());
    }
}

#[test]
fn the_built_in_model_gives_the_same_bits() {
    for kv in [Format::F32, Format::Q4_0] {
        same(&austen(), kv, "austen");
    }
}

/// Layers with a window keep pages for no more than they see.
#[test]
fn windows_keep_few_pages() {
    let Some(dir) = folder() else { return };
    let path = dir.join("families/gemma3.gguf");
    let model = Arc::new(Model::open(path).unwrap());
    let program = model.program(ProgramOptions::default(), CONTEXT).unwrap();
    let windowed: Vec<u32> = program.states.iter().filter_map(|state| state.window).collect();
    assert!(!windowed.is_empty() && windowed.len() < program.states.len());
    let all = program.kv_bytes(|_| (CONTEXT / 64).into());
    let (_, size) = export(&model, &ExportOptions::default().context(CONTEXT)).unwrap();
    assert!(windowed.iter().all(|&window| window < 64), "{windowed:?}");
    let kept = program.kv_bytes(|window| window.map_or(CONTEXT / 64, |_| 2).into());
    assert_eq!(size.kv_bytes, kept);
    assert!(kept < all);

    let words_of_image = image(&model, 1, Format::F16);
    let image = Image::new(bytemuck::cast_slice(&words_of_image)).unwrap();
    let mut memory = words(image.memory_words());
    let mut session = halite_micro::Session::new(image, &mut memory).unwrap();
    let tokens: Vec<u32> = (0..200).map(|i| i % model.hparams().vocab_size).collect();
    session.prefill(&tokens).unwrap();
    // What the window showed at the start is gone, but the last page and the one before are there.
    let refused = session.rewind(10).unwrap_err();
    let first = 128 + windowed.iter().max().unwrap() - 1;
    assert_eq!(refused, Error::Rewind { expected: (first, 200), got: 10 });
    assert_eq!(session.rewind(201).unwrap_err(), Error::Rewind { expected: (first, 200), got: 201 });
    // Pages hold the last positions that were written, not those of the sequence as it is now.
    session.prefill(&tokens[..50]).unwrap();
    session.rewind(first).unwrap();
    session.step(&tokens[..1]).unwrap();
    assert!(matches!(session.rewind(70), Err(Error::Rewind { .. })));
    session.rewind(first).unwrap();
    let again = bits(session.prefill(&tokens[first as usize..]).unwrap());
    session.rewind(0).unwrap();
    assert_eq!(bits(session.prefill(&tokens).unwrap()), again);
}

#[test]
fn an_encoder_gives_the_same_bits() {
    let model = bert::converted(&bert::folder(), Format::Q8_0).unwrap();
    let text: Vec<u32> = vec![2, 5, 4, 9, 7, 3];
    let context = model.hparams().context_length.min(CONTEXT);
    let (image, _) = export(&model, &ExportOptions::default().context(context)).unwrap();
    let image = Image::new(bytemuck::cast_slice(&image)).unwrap();
    let mut memory = words(image.memory_words());
    let mut session = halite_micro::Session::new(image, &mut memory).unwrap();
    let options = EmbedOptions::default().pooling(Pooling::None).normalize(false);
    let mut embedder = Embedder::new(&model, &cpu(), &options).unwrap();
    // Each step is a text of its own.
    for text in [&text[..], &text[..3]] {
        let expected = embedder.embed_tokens(&[text.to_vec()]).unwrap();
        assert_eq!(bits(session.step(text).unwrap()), bits(&expected.concat()));
        assert_eq!(bits(session.prefill(text).unwrap()), bits(&expected.concat()));
    }
    assert!(matches!(session.rewind(1), Err(Error::Rewind { .. })));
    let refused = session.prefill(&vec![1; context as usize + 1]).unwrap_err();
    assert_eq!(refused, Error::Tokens { at_most: context, got: context as usize + 1 });
}

#[test]
fn windows_that_end_after_a_token_give_the_same_bits() {
    for case in cases(&committed().join("encoders")) {
        let (model, name) = (Arc::new(Model::open(&case.model).unwrap()), case.model.display().to_string());
        let (image, _) = export(&model, &ExportOptions::default().context(CONTEXT)).unwrap();
        let image = Image::new(bytemuck::cast_slice(&image)).unwrap();
        let mut memory = words(image.memory_words());
        let mut session = halite_micro::Session::new(image, &mut memory).unwrap();
        let expected = rows(&cpu(), &case).unwrap();
        assert_eq!(bits(session.prefill(&case.tokens).unwrap()), bits(&expected), "{name}");
    }
}

/// A step is refused without a change to the sequence.
#[test]
fn wrong_steps_are_refused() {
    let words_of_image = image(&austen(), 4, Format::F16);
    let image = Image::new(bytemuck::cast_slice(&words_of_image)).unwrap();
    let needed = image.memory_words();
    let mut short = words(needed - 1);
    let refused = halite_micro::Session::new(image, &mut short).unwrap_err();
    assert_eq!(refused, Error::Memory { expected: needed as u32, got: needed - 1 });
    let mut memory = words(needed);
    let mut session = halite_micro::Session::new(image, &mut memory).unwrap();
    assert_eq!(session.step(&[]).unwrap_err(), Error::Tokens { at_most: 4, got: 0 });
    assert_eq!(session.prefill(&[]).unwrap_err(), Error::Tokens { at_most: 4, got: 0 });
    assert_eq!(session.step(&[1; 5]).unwrap_err(), Error::Tokens { at_most: 4, got: 5 });
    assert_eq!(session.step(&[1, 2048]).unwrap_err(), Error::Token { at: 1, got: 2048, below: 2048 });
    assert_eq!(session.prefill(&[1; 257]).unwrap_err(), Error::Context { at_most: 256, got: 257 });
    assert_eq!(session.position(), 0);
    session.prefill(&[1; 255]).unwrap();
    assert_eq!(session.step(&[1, 2]).unwrap_err(), Error::Context { at_most: 256, got: 257 });
    session.step(&[1]).unwrap();
    assert_eq!(session.position(), 256);
    assert_eq!(session.step(&[1]).unwrap_err(), Error::Context { at_most: 256, got: 257 });
}

/// The image has the texts of tokens and knows which ones end a text.
#[test]
fn texts_are_those_of_the_tokenizer() {
    let model = austen();
    let tokenizer = Tokenizer::from_gguf(model.gguf()).unwrap().unwrap();
    let words_of_image = image(&model, 16, Format::F16);
    let image = Image::new(bytemuck::cast_slice(&words_of_image)).unwrap();
    for id in 0..tokenizer.len() as u32 + 2 {
        let mut text = Vec::new();
        tokenizer.decode_token(id, false, &mut text);
        assert_eq!(image.text(id), text, "token {id}");
        assert_eq!(image.is_end(id), tokenizer.is_end(id), "token {id}");
    }
    let mut memory = words(image.memory_words());
    let mut session = halite_micro::Session::new(image, &mut memory).unwrap();
    let prompt = tokenizer.encode("Once upon a time", Default::default());
    let (mut token, mut text) = (greedy(session.prefill(&prompt).unwrap()).unwrap(), Vec::new());
    for _ in 0..32 {
        text.extend_from_slice(image.text(token));
        token = greedy(session.step(&[token]).unwrap()).unwrap();
    }
    let options = halite::GenerateOptions::default()
        .max_tokens(32)
        .sampler(halite::SamplerOptions::default().temperature(0.0));
    let mut same = String::new();
    Session::new(&model, &cpu(), &SessionOptions::default())
        .unwrap()
        .generate(&tokenizer, "Once upon a time", &options, |piece| {
            same.push_str(piece);
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(String::from_utf8(text).unwrap(), same);
}

#[test]
fn options_are_checked() {
    let model = austen();
    for (options, message) in [
        (ExportOptions::default().context(0), "context: expected 1 to 512, the context of the model, got 0"),
        (
            ExportOptions::default().context(513),
            "context: expected 1 to 512, the context of the model, got 513",
        ),
        (ExportOptions::default().tokens(0), "tokens of a step: expected 1 to 256, the context, got 0"),
        (ExportOptions::default().tokens(257), "tokens of a step: expected 1 to 256, the context, got 257"),
    ] {
        assert_eq!(export(&model, &options).unwrap_err().to_string(), message);
    }
}

/// Words of everything but weights are changed in several ways: an image is refused, or runs.
#[test]
fn damaged_images_are_refused_or_run() {
    let mut models = vec![bert::converted(&bert::folder(), Format::F32).unwrap()];
    if let Some(dir) = folder() {
        for family in ["mixtral", "gpt-oss", "gemma3", "phi3-longrope"] {
            models.push(Arc::new(Model::open(dir.join(format!("families/{family}.gguf"))).unwrap()));
        }
    }
    let (mut refused, mut ran) = (0, 0);
    for model in models {
        let context = model.hparams().context_length.min(130);
        let options = ExportOptions::default().context(context).tokens(3.min(context));
        let (mut image, _) = export(&model, &options).unwrap();
        let header = *Image::new(bytemuck::cast_slice(&image)).unwrap().header();
        let mut memory = Vec::new();
        let mut check = |image: &[u32]| {
            let Ok(image) = Image::new(bytemuck::cast_slice(image)) else {
                refused += 1;
                return;
            };
            ran += 1;
            if image.memory_words() > 1 << 19 {
                return;
            }
            memory.resize(memory.len().max(image.memory_words()), 0);
            let mut session = halite_micro::Session::new(image, &mut memory).unwrap();
            for tokens in [&[0][..], &[0, 0]] {
                let _ = session.step(tokens);
            }
            let _ = (session.rewind(1), image.text(1), image.is_end(3));
        };
        let places = (0..32)
            .chain(header.ops.first..header.ops.first + header.ops.len)
            .chain(header.tensors.first..header.tensors.first + 7 * header.tensors.len)
            .chain(header.states.first..header.states.first + 9 * header.states.len);
        // Not all of them: that would take minutes.
        for place in places.step_by(11).map(|place| place as usize) {
            let before = image[place];
            let near = [before ^ 1, before.wrapping_add(1), before.wrapping_sub(1), before.wrapping_mul(2)];
            for value in near.into_iter().chain([0, 1, 1 << 20, !0, !0 - 3]) {
                image[place] = value;
                check(&image);
            }
            image[place] = before;
        }
        for len in (0..image.len()).step_by((image.len() / 50).max(1)) {
            check(&image[..len]);
        }
    }
    assert!(refused > 100 && ran > 100, "{refused} refused, {ran} ran");
}

#[test]
fn bytes_that_are_no_image_say_why() {
    let words_of_image = image(&austen(), 1, Format::F16);
    let bytes: &[u8] = bytemuck::cast_slice(&words_of_image);
    assert_eq!(Image::new(&bytes[1..]).unwrap_err(), Error::Misaligned);
    assert_eq!(Image::new(&bytes[..0]).unwrap_err(), Error::NotAnImage);
    assert_eq!(Image::new(&bytes[8..]).unwrap_err(), Error::NotAnImage);
    let (expected, got) = (bytes.len() as u32, bytes.len() - 4);
    assert_eq!(Image::new(&bytes[..got]).unwrap_err(), Error::Truncated { expected, got });
    let mut other = words_of_image.clone();
    other[1] = 1;
    let refused = Image::new(bytemuck::cast_slice(&other)).unwrap_err();
    assert_eq!(refused, Error::Version { expected: 2, got: 1 });
    // A changed weight is found on request.
    let mut damaged = words_of_image.clone();
    damaged[words_of_image.len() / 2] ^= 1;
    let image = Image::new(bytemuck::cast_slice(&damaged)).unwrap();
    assert!(matches!(image.verify(), Err(Error::Checksum { .. })));
}
