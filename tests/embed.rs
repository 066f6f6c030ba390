//! Encoders: a tiny BERT of random weights against its vectors in double precision (`scripts/embed.py`), from a folder of
//! safetensors to what the command prints.
#![cfg(feature = "convert")]

use std::path::Path;
use std::sync::Arc;

use halite::backend::Backend;
use halite::backend::reference::Reference;
use halite::embed::{EmbedOptions, Embedder, cosine};
use halite::kernels::formats::Format;
use halite::map::Source;
use halite::model::Pooling;
use halite::session::{Session, SessionOptions};
use halite::tokenizer::EncodeOptions;
use halite::{Error, Model};
use halite_testing::bert::*;
use halite_testing::golden;

#[test]
fn vectors_are_those_of_double_precision() {
    let backends: Vec<Arc<dyn Backend>> = vec![cpu(), Arc::new(Reference::new())];
    for backend in backends {
        let mut f32 = embedder(backend.clone(), Format::F32, EmbedOptions::default());
        let tokenizer = tokenizer(f32.model());
        for (text, ids, _) in expected() {
            assert_eq!(tokenizer.encode(&text, EncodeOptions::default()), ids, "{text}");
        }
        let got = f32.embed(&tokenizer, &texts()).unwrap();
        assert!(largest_difference(&got) < 1e-6, "{}", largest_difference(&got));
        let mut q8_0 = embedder(backend, Format::Q8_0, EmbedOptions::default());
        let got = q8_0.embed(&tokenizer, &texts()).unwrap();
        let difference = largest_difference(&got);
        assert!((1e-6..5e-2).contains(&difference), "{difference}");
    }
}

#[test]
fn which_texts_share_a_step_never_shows() {
    let mut together = embedder(cpu(), Format::F32, EmbedOptions::default());
    let tokenizer = tokenizer(together.model());
    let many: Vec<String> = texts().iter().cycle().take(150).cloned().collect();
    let all = together.embed(&tokenizer, &many).unwrap();
    let mut apart = embedder(cpu(), Format::F32, EmbedOptions::default().batch(80));
    assert_eq!(apart.embed(&tokenizer, &many).unwrap(), all);
    for (text, vector) in many.iter().zip(&all).take(8) {
        assert_eq!(&apart.embed(&tokenizer, &[text]).unwrap(), std::slice::from_ref(vector));
    }
}

#[test]
fn poolings_are_of_the_same_vectors() {
    let options = |pooling| EmbedOptions::default().pooling(pooling).normalize(false);
    let of = |pooling| {
        let mut embedder = embedder(cpu(), Format::F32, options(pooling));
        embedder.embed(&tokenizer(embedder.model()), &["a cat sat", "mat"]).unwrap()
    };
    let all = of(Pooling::None);
    assert_eq!(all.len(), 5 + 3);
    assert_eq!(of(Pooling::Cls), [&all[0], &all[5]].map(Clone::clone));
    assert_eq!(of(Pooling::Last), [&all[4], &all[7]].map(Clone::clone));
    for (mean, rows) in of(Pooling::Mean).iter().zip([&all[..5], &all[5..]]) {
        for (i, x) in mean.iter().enumerate() {
            let sum: f64 = rows.iter().map(|row| f64::from(row[i])).sum();
            assert_eq!(*x, (sum / rows.len() as f64) as f32);
        }
    }
    assert!((cosine(&all[0], &all[0]) - 1.0).abs() < 1e-12);
    assert_eq!(cosine(&[0.0], &[1.0]), 0.0);
}

#[test]
fn long_texts_are_cut_only_on_request() {
    let long = "cat ".repeat(90);
    let mut strict = embedder(cpu(), Format::F32, EmbedOptions::default());
    let tokenizer = tokenizer(strict.model());
    assert_eq!(strict.max_text_tokens(), 80);
    let error = strict.embed(&tokenizer, &["mat", &long]).unwrap_err().to_string();
    assert!(error.contains("at most 80") && error.contains("92 in text 1"), "{error}");
    let mut cutting = embedder(cpu(), Format::F32, EmbedOptions::default().truncate(true));
    let kept = "cat ".repeat(78);
    assert_eq!(cutting.embed(&tokenizer, &[long]).unwrap(), strict.embed(&tokenizer, &[kept]).unwrap());
    assert!(strict.embed_tokens(&[vec![]]).unwrap_err().to_string().contains("none in text 0"));
    assert!(strict.embed_tokens(&[vec![9999]]).unwrap_err().to_string().contains("token id"));
    strict.cancel_handle().cancel();
    assert!(matches!(strict.embed_tokens(&[vec![1]]), Err(Error::Cancelled)));
}

/// An activation that the family does not have is named.
#[test]
fn an_unknown_activation_is_an_error() {
    let mut bytes = std::fs::read(golden::committed().join("encoders/modern-bert-silu.gguf")).unwrap();
    let at = bytes.windows(4).position(|window| window == b"silu").unwrap();
    // That of the name comes first.
    let at = at + 4 + bytes[at + 4..].windows(4).position(|window| window == b"silu").unwrap();
    bytes[at..at + 4].copy_from_slice(b"relu");
    let model = Arc::new(Model::from_source(Source::from_bytes("test", &bytes)).unwrap());
    let error = Embedder::new(&model, &cpu(), &EmbedOptions::default()).unwrap_err().to_string();
    assert!(
        error.contains("`modern-bert.hidden_activation`: expected gelu or silu, got \"relu\""),
        "{error}"
    );
}

/// A decoder whose file has a pooling: its vectors times its embedding table are llama.cpp's logits.
#[test]
fn decoders_embed_if_their_file_has_a_pooling() {
    let case = golden::cases(&golden::committed().join("embedding")).remove(0);
    let model = Arc::new(Model::open(&case.model).unwrap());
    let options = EmbedOptions::default().pooling(Pooling::None).normalize(false);
    let mut all = Embedder::new(&model, &cpu(), &options).unwrap();
    let vectors = all.embed_tokens(std::slice::from_ref(&case.tokens)).unwrap();
    let table = model.gguf().tensor("token_embd.weight").unwrap().rows().unwrap();
    let table: Vec<f32> = table.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    let (mut error, mut power) = (0.0, 0.0);
    let rows = case.rows.chunks_exact(model.hparams().vocab_size as usize);
    for (row, &position) in rows.zip(&case.positions) {
        for (embedding, want) in table.chunks_exact(all.dimension()).zip(row) {
            let products = embedding.iter().zip(&vectors[position]).map(|(a, b)| f64::from(a * b));
            error += (products.sum::<f64>() - f64::from(*want)).powi(2);
            power += f64::from(*want).powi(2);
        }
    }
    assert!(error / power < 1e-8, "{:e}", error / power);

    let mut last = Embedder::new(&model, &cpu(), &EmbedOptions::default()).unwrap();
    assert_eq!(last.pooling(), Pooling::Last);
    let texts = [case.tokens[..40].to_vec(), case.tokens.clone()];
    let got = last.embed_tokens(&texts).unwrap();
    for (vector, at) in got.iter().zip([39, 95]) {
        assert!((cosine(vector, &vectors[at]) - 1.0).abs() < 1e-6, "{at}");
    }
    assert!(Session::new(&model, &cpu(), &SessionOptions::default().context(64)).is_err());
}

#[test]
fn encoders_and_decoders_are_not_confused() {
    let bert = converted(&folder(), Format::F16).unwrap();
    let error = Session::new(&bert, &cpu(), &SessionOptions::default().context(64));
    assert!(error.unwrap_err().to_string().contains("Embedder"));
    let austen = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/austen/halite-austen.gguf");
    let austen = Arc::new(Model::open(austen).unwrap());
    let error = Embedder::new(&austen, &cpu(), &EmbedOptions::default());
    assert!(error.unwrap_err().to_string().contains("`llama.pooling_type`"));
}

#[test]
fn what_cannot_be_converted_is_named() {
    let copy = std::env::temp_dir().join(format!("halite-bert-{}", std::process::id()));
    std::fs::create_dir_all(copy.join("1_Pooling")).unwrap();
    let names =
        ["config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt", "1_Pooling/config.json"];
    for (name, from, to, says) in [
        ("config.json", "\"bert\"", "\"t5\"", "expected one of arcee, bert, "),
        ("config.json", "\"gelu\"", "\"relu\"", "expected gelu"),
        ("config.json", "\"layer_norm_eps\"", "\"eps\"", "layer_norm_eps"),
        ("config.json", "{", "", "config.json"),
        ("vocab.txt", "[SEP]", "[END]", "[SEP]"),
        (
            "1_Pooling/config.json",
            "\"pooling_mode_cls_token\": false",
            "\"pooling_mode_cls_token\": true",
            "cls_token",
        ),
    ] {
        for name in names {
            std::fs::copy(folder().join(name), copy.join(name)).unwrap();
        }
        let text = std::fs::read_to_string(copy.join(name)).unwrap();
        assert!(text.contains(from));
        std::fs::write(copy.join(name), text.replacen(from, to, 1)).unwrap();
        let error = converted(&copy, Format::F32).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let mut weights = std::fs::read(folder().join("model.safetensors")).unwrap();
    let at = weights.windows(6).position(|w| w == b"pooler").unwrap();
    weights[at] = b'c';
    std::fs::copy(folder().join(names[0]), copy.join(names[0])).unwrap();
    std::fs::copy(folder().join(names[3]), copy.join(names[3])).unwrap();
    std::fs::copy(folder().join(names[4]), copy.join(names[4])).unwrap();
    std::fs::write(copy.join(names[1]), &weights).unwrap();
    let error = converted(&copy, Format::F32).unwrap_err().to_string();
    assert!(error.contains("cooler"), "{error}");
    std::fs::write(copy.join(names[1]), &weights[..weights.len() / 2]).unwrap();
    let error = converted(&copy, Format::F32).unwrap_err().to_string();
    assert!(error.contains("model.safetensors"), "{error}");
    std::fs::remove_dir_all(&copy).unwrap();
    // 32 elements are no block of 256.
    let error = converted(&folder(), Format::Q4_K).unwrap_err().to_string();
    assert!(error.contains("Q4_K"), "{error}");
}
