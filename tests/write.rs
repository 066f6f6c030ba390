//! Files that Halite writes: they read back, and nothing else is accepted.

use std::sync::Arc;

use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::gguf::Gguf;
use halite::gguf::write::{Encoded, Writer};
use halite::kernels::formats::Format;
use halite::map::Source;
use halite::model::ProgramOptions;
use halite::session::{OutputKind, Run, Session, SessionOptions};
use halite::synth::{Formats, SHAPES, Synth, shape};
use halite::tokenizer::EncodeOptions;
use halite::{Model, Tokenizer};

#[test]
fn written_files_read_back() {
    for alignment in [8, 32, 4096] {
        let mut w = Writer::new(alignment).unwrap();
        let entries: [(&str, Encoded); 10] = [
            ("u8", 200u8.into()),
            ("i16", (-300i16).into()),
            ("f32", 1.5f32.into()),
            ("bool", true.into()),
            ("text", "a\u{2581}b".into()),
            ("u64", u64::MAX.into()),
            ("i32s", (&[-7i32, 8][..]).into()),
            ("f32s", (&[0.5f32, -0.5][..]).into()),
            ("texts", (&["".to_owned(), "two".to_owned()][..]).into()),
            ("nothing", (&[0u32; 0][..]).into()),
        ];
        for (key, value) in entries {
            w.entry(key, value).unwrap();
        }
        w.tensor("odd", &[3], Format::F32).unwrap();
        w.tensor("blocks", &[64, 3, 2], Format::Q4_0).unwrap();
        w.tensor("last", &[5, 1, 1, 2], Format::I8).unwrap();
        let data: Vec<Vec<u8>> = [12, 216, 10].iter().map(|&n| (1..=n).collect()).collect();
        let mut sources = data.iter();
        let mut file = Vec::new();
        w.write(&mut file, &mut |_, out| out.write_all(sources.next().unwrap())).unwrap();

        let gguf = Gguf::from_source(Source::from_bytes("written", &file)).unwrap();
        let metadata: Vec<(String, String)> =
            gguf.metadata().iter().map(|(key, value)| (key.clone(), gguf.display_value(value))).collect();
        let expected = [
            ("general.alignment", alignment.to_string().as_str()),
            ("u8", "200"),
            ("i16", "-300"),
            ("f32", "1.5"),
            ("bool", "true"),
            ("text", "\"a\u{2581}b\""),
            ("u64", "18446744073709551615"),
            ("i32s", "2 × I32 [-7, 8]"),
            ("f32s", "2 × F32 [0.5, -0.5]"),
            ("texts", "2 × String [\"\", \"two\"]"),
            ("nothing", "0 × U32 []"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(metadata, expected);
        let tensors: Vec<_> = gguf.tensors().map(|t| (t.record.clone(), t.region().unwrap())).collect();
        for ((record, region), data) in tensors.iter().zip(&data) {
            assert_eq!(region.mapped().unwrap(), data, "{}", record.name);
            assert_eq!(record.bytes.start % alignment as usize, 0);
        }
        let shapes: Vec<_> = tensors.iter().map(|(r, _)| (r.name.as_str(), &r.dims[..], r.format)).collect();
        assert_eq!(
            shapes,
            [
                ("odd", &[3][..], Format::F32),
                ("blocks", &[64, 3, 2], Format::Q4_0),
                ("last", &[5, 1, 1, 2], Format::I8)
            ]
        );
        assert_eq!(file.len() % alignment as usize, 0);
    }
}

#[test]
fn what_does_not_read_back_is_refused() {
    let mut w = Writer::new(32).unwrap();
    w.tensor("t", &[32], Format::Q4_0).unwrap();
    let long = "n".repeat(65);
    let too_large = "1 to 4 dimensions, a row length that is a multiple of 1 and less than 2^63 bytes";
    let rows = [
        (Writer::new(48).err(), "GGUF alignment: expected a power of two from 8 to 1048576, got 48".to_owned()),
        (w.entry("general.alignment", 32u32).err(), "GGUF metadata key: expected each once, got `general.alignment` twice".into()),
        (w.entry("", 1u8).err(), "GGUF metadata key: expected 1 to 65535 bytes without control characters, got \"\"".into()),
        (w.tensor("t", &[32], Format::F32).err(), "GGUF tensor name: expected each once, got `t` twice".into()),
        (
            w.tensor(&long, &[32], Format::F32).err(),
            format!("GGUF tensor name: expected 1 to 64 bytes without control characters, got \"{long}\""),
        ),
        (
            w.tensor("a", &[48, 32], Format::Q4_0).err(),
            "GGUF tensor: expected 1 to 4 dimensions, a row length that is a multiple of 32 and less than 2^63 bytes, \
             got `a` [48, 32] of Q4_0"
                .into(),
        ),
        (w.tensor("b", &[], Format::F32).err(), format!("GGUF tensor: expected {too_large}, got `b` [] of F32")),
        (w.tensor("c", &[4, 0], Format::F32).err(), format!("GGUF tensor: expected {too_large}, got `c` [4, 0] of F32")),
        (
            w.tensor("d", &[1; 5], Format::F32).err(),
            format!("GGUF tensor: expected {too_large}, got `d` [1, 1, 1, 1, 1] of F32"),
        ),
        (
            w.tensor("e", &[1 << 40, 1 << 40], Format::F32).err(),
            format!("GGUF tensor: expected {too_large}, got `e` [1099511627776, 1099511627776] of F32"),
        ),
    ];
    for (error, message) in rows {
        assert_eq!(error.map(|e| e.to_string()), Some(message));
    }
    for bytes in [17, 19] {
        let error = w.write(&mut Vec::new(), &mut |_, out| out.write_all(&vec![0; bytes])).unwrap_err();
        assert_eq!(error.to_string(), format!("data of tensor `t`: expected 18 bytes, got {bytes}"));
    }
}

fn file(name: &str, weights: Format, output: Format, seed: u64) -> Vec<u8> {
    let mut file = Vec::new();
    Synth::new(shape(name).unwrap(), Formats::of(weights).output(output), seed)
        .unwrap()
        .write(&mut file)
        .unwrap();
    file
}

/// Parameters as published with each model.
#[test]
fn named_shapes_have_their_models_sizes() {
    let published = [
        ("llama-1.1b", 1_100_048_384),
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("mistral-7b", 7_241_732_096),
        ("mixtral-8x7b", 46_702_792_704),
        ("deepseek-v2-lite", 15_706_484_224),
        ("mamba-1.4b", 1_372_178_432),
    ];
    let formats = Formats::of(Format::Q4_0);
    for (name, parameters) in published {
        let synth = Synth::new(shape(name).unwrap(), formats, 0).unwrap();
        let got: u64 = synth.tensors().iter().map(|t| t.dims.iter().product::<u64>()).sum();
        assert_eq!(got, parameters, "{name}");
    }
    for shape in SHAPES {
        let longest = Formats::of(Format::Q4_K).output(Format::Q6_K);
        for layers in [shape.block_count.min(6), shape.block_count] {
            let shape = shape.clone().block_count(layers);
            let model = Synth::new(&shape, longest, 0).and_then(|synth| synth.model());
            // Other programs read sizes as unsigned integers.
            for (key, value) in model.as_ref().into_iter().flat_map(|model| model.gguf().metadata()) {
                let is_signed = ["I32", "I64"].contains(&&format!("{:?}", value.kind)[..]);
                assert!(!is_signed || key.starts_with("tokenizer."), "{}: {key}: {value:?}", shape.name);
            }
            let program = model.and_then(|model| model.program(ProgramOptions::default(), 512));
            assert!(program.is_ok(), "{}, {layers} layers: {program:?}", shape.name);
        }
    }
}

#[test]
fn synthetic_models_run_in_every_format() {
    let backend: Arc<dyn Backend> = Arc::new(Cpu::with_threads(2).unwrap());
    let mut formats = 0;
    for &format in Format::ALL {
        let plain_integer = matches!(format, Format::I8 | Format::I16 | Format::I32 | Format::I64);
        let made = Synth::new(shape("tiny").unwrap(), Formats::of(format), 0);
        assert_eq!(made.is_err(), plain_integer, "{}", format.name());
        if plain_integer {
            continue;
        }
        formats += 1;
        for name in ["tiny", "tiny-moe"] {
            let bytes = file(name, format, Format::Q6_K, 1);
            let model = Arc::new(Model::from_source(Source::from_bytes(name, &bytes)).unwrap());
            let tokenizer = Tokenizer::from_gguf(model.gguf()).unwrap().unwrap();
            let tokens = tokenizer.encode("hello world", EncodeOptions::default());
            assert_eq!(tokenizer.decode(&tokens, false), " hello world");
            let mut session = Session::new(&model, &backend, &SessionOptions::default()).unwrap();
            let sequence = session.add_sequence();
            session.step(&[Run::new(sequence, &tokens)], OutputKind::Logits).unwrap();
            let logits = session.logits();
            let range = |f: fn(f32, f32) -> f32| logits.iter().copied().reduce(f).unwrap();
            let (min, max) = (range(f32::min), range(f32::max));
            assert!(logits.iter().all(|x| x.is_finite()), "{name} {}", format.name());
            assert!(max - min > 0.1 && max.max(-min) < 20.0, "{name} {}: {min} to {max}", format.name());
            let mean = weights_mean(&model);
            assert!(mean.abs() < 0.001, "{name} {}: weights have a mean of {mean}", format.name());
        }
    }
    assert_eq!(formats, 31);
}

/// The mean of the first expert's or layer's matrix that is not part of attention.
fn weights_mean(model: &Model) -> f32 {
    let tensor = model.gguf().tensors().find(|t| t.record.name.starts_with("blk.0.ffn_up")).unwrap();
    let mut values = vec![0.0; tensor.record.dims.iter().product::<u64>() as usize];
    tensor.record.format.dequantize(tensor.region().unwrap().mapped().unwrap(), &mut values).unwrap();
    values.iter().sum::<f32>() / values.len() as f32
}

#[test]
fn a_seed_gives_one_file() {
    let make = |seed| file("tiny", Format::Q4_0, Format::Q8_0, seed);
    assert!(make(7) == make(7) && make(7) != make(8));
}

#[test]
fn shapes_that_are_none_are_refused() {
    let formats = Formats::of(Format::Q4_0);
    let tiny = || shape("tiny").unwrap().clone();
    for bad in [
        tiny().head_count(0),
        tiny().head_count_kv(0),
        tiny().vocab_size(0),
        tiny().head_count_kv(u32::MAX).embedding_length(u32::MAX).head_count(1),
    ] {
        assert!(matches!(Synth::new(&bad, formats, 0), Err(halite::Error::Argument { .. })), "{bad:?}");
    }
}

#[test]
fn rows_that_are_not_whole_blocks_are_refused() {
    let shape = shape("tiny").unwrap().clone().feed_forward_length(320);
    let error = Synth::new(&shape, Formats::of(Format::Q4_K).output(Format::Q6_K), 0).unwrap_err();
    assert_eq!(
        error.to_string(),
        "GGUF tensor: expected 1 to 4 dimensions, a row length that is a multiple of 256 and less than 2^63 bytes, \
         got `blk.0.ffn_down.weight` [320, 256] of Q4_K"
    );
}
