//! The command on models that are made here: converted, adapted, embedded with, talked with, and cut short.

use std::sync::Arc;

use halite::Model;
use halite::backend::cpu::Cpu;
use halite::embed::cosine;
use halite::gguf::Gguf;
use halite_testing::bert;
use halite_testing::gguf::llama;
use halite_testing::lora::{TOKENS, adapter, floats, logits, open, randomised};

#[test]
fn the_command_writes_a_model() {
    let file = std::env::temp_dir().join(format!("halite-converted-{}.gguf", std::process::id()));
    let _ = std::fs::remove_file(&file);
    let folder = std::path::Path::new(halite_testing::ROOT).join("tests/data/convert/llama");
    let out = std::process::Command::new(env!("CARGO_BIN_EXE_halite"))
        .args(["convert", folder.to_str().unwrap(), file.to_str().unwrap(), "--format", "f32"])
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let model = Model::open(&file).unwrap();
    assert_eq!(model.hparams().architecture, "llama");
    std::fs::remove_file(file).unwrap();
}

#[test]
fn the_command_offers_the_formats_that_it_writes() {
    let of = |format: &str| {
        let out = std::process::Command::new(env!("CARGO_BIN_EXE_halite"))
            .args(["convert", ".", "none.gguf", "--format", format])
            .output()
            .unwrap();
        String::from_utf8(out.stderr).unwrap()
    };
    let error = of("none");
    assert!(error.contains("expected one of f32, f16") && error.contains("q8_0"), "{error}");
    assert!(!error.contains("i8") && !error.contains("iq2_s") && !error.contains("iq1_m"), "{error}");
    assert!(of("iq2_s").contains("needs a matrix of importance"));
}

#[test]
fn the_command_prints_the_vectors() {
    let file = std::env::temp_dir().join(format!("halite-bert-{}.gguf", std::process::id()));
    let run = |args: &[&str]| {
        let out = std::process::Command::new(env!("CARGO_BIN_EXE_halite")).args(args).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    let (file_name, folder_name) = (file.to_str().unwrap(), bert::folder());
    run(&["convert", folder_name.to_str().unwrap(), file_name, "--format", "f32"]);
    let texts = bert::texts();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let printed = run(&[&["embed", "-m", file_name], &texts[..]].concat());
    let printed: serde_json::Value = serde_json::from_str(&printed).unwrap();
    let vectors: Vec<Vec<f32>> = serde_json::from_value(printed["embeddings"].clone()).unwrap();
    assert!(bert::largest_difference(&vectors) < 1e-6);
    // A limit on memory changes no bit.
    let limited = run(&[&["embed", "--memory", "64", "-m", file_name], &texts[..]].concat());
    assert_eq!(serde_json::from_str::<serde_json::Value>(&limited).unwrap(), printed);
    let table = run(&["embed", "-m", file_name, "--compare", texts[0], texts[1]]);
    let cell = format!("{:8.4}", cosine(&vectors[0], &vectors[1]));
    let rows: Vec<&str> = table.lines().collect();
    assert!(rows[0].starts_with(&format!("  1.0000{cell}  a cat sat")), "{table}");
    assert!(rows[1].starts_with(&format!("{cell}  1.0000")), "{table}");
    std::fs::remove_file(file).unwrap();
}

#[test]
fn the_command_takes_adapters() {
    let base = randomised(llama());
    let path = |name: &str| std::env::temp_dir().join(format!("halite-lora-{}-{name}", std::process::id()));
    let (model, first, out) = (path("model.gguf"), path("first.gguf"), path("logits"));
    std::fs::write(&model, base.bytes()).unwrap();
    std::fs::write(&first, adapter(&base, "llama", 2, 11).bytes()).unwrap();
    let tokens = TOKENS.map(|t| t.to_string()).join(",");
    let adapter = format!("{}:0.25", first.display());
    let args = ["logits", "--kv", "f32", "--tokens", &tokens, "--lora", &adapter];
    let run = std::process::Command::new(env!("CARGO_BIN_EXE_halite"))
        .args(args)
        .arg("-m")
        .arg(&model)
        .arg("-o")
        .arg(&out)
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let mut expected = open(&base);
    expected.apply_lora(Gguf::open(&first).unwrap(), 0.25).unwrap();
    let expected = logits(expected, Arc::new(Cpu::with_threads(2).unwrap()));
    assert_eq!(floats(&std::fs::read(&out).unwrap()), expected);
    [model, first, out].iter().for_each(|path| std::fs::remove_file(path).unwrap());
}

/// A message without an answer is dropped, and the chat goes on; with room made where it is asked for.
#[test]
fn a_chat_goes_on() {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let template = std::env::temp_dir().join(format!("halite-chat-goes-on-{}.jinja", std::process::id()));
    let source = "{% for m in messages %}{% if m.content == 'boom' %}{{ raise_exception('no \\x1b[31m') }}{% endif %}\
                  {{ m.role }}: {{ m.content }}\n{% endfor %}";
    std::fs::write(&template, source).unwrap();
    let chat = |arguments: &[&str], stdin: &[u8]| {
        let mut child = Command::new(env!("CARGO_BIN_EXE_halite"))
            .args(["chat", "-q", "--temp", "0", "--system", "Speak.", "--template"])
            .arg(&template)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(stdin).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.success(), text(output.stdout), text(output.stderr))
    };
    let alone = chat(&["-n", "4"], b"Why?\n");
    assert!(alone.0 && alone.2.is_empty(), "{}", alone.2);
    // What is dropped leaves no trace in what comes after.
    let (success, out, errors) = chat(&["-n", "4"], b"\xff\xfe\nboom\n\nWhy?\n");
    assert_eq!((success, out), (false, alone.1));
    assert!(errors.contains("not UTF-8") && errors.contains(r"no \u{1b}[31m"), "{errors}");
    assert!(errors.contains("2 messages were dropped"), "{errors}");
    let line = "A line that takes some of the few positions.\n";
    let (success, _, errors) = chat(&["-n", "8", "--ctx", "64"], line.repeat(5).as_bytes());
    assert!(!success && errors.contains("--drop-oldest"), "{errors}");
    let (success, out, errors) =
        chat(&["-n", "8", "--ctx", "64", "--drop-oldest"], line.repeat(5).as_bytes());
    let said = errors.lines().all(|line| line.ends_with("the oldest turn was dropped"));
    assert!(success && said && !errors.is_empty() && !out.is_empty(), "{errors}");
    // What fits in no way is dropped even then, and only that.
    let text = format!("{}\nWhy?\n", line.trim().repeat(20));
    let (success, out, errors) = chat(&["-n", "4", "--ctx", "64", "--drop-oldest"], text.as_bytes());
    assert!(
        !success && errors.contains("context full") && errors.contains("1 message was dropped"),
        "{errors}"
    );
    assert!(!out.is_empty());
    std::fs::remove_file(&template).unwrap();
}

/// A model that shrinks under a running command ends it with an error or exit code 74, never with a bare
/// signal.
#[cfg(unix)]
#[test]
fn a_file_that_shrinks_under_the_command() {
    use std::io::Read;
    use std::process::{Command, Stdio};

    let folder = tempfile::tempdir().unwrap();
    // Long enough a context for the command to be at it still when the file shrinks.
    let bytes = llama().set("llama.context_length", 1u32 << 16).bytes();
    // What is cut off within a page reads as zeros; where a page is gone, reading it is a bus error.
    for left in [bytes.len() as u64 - 1, 0] {
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, &bytes).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_halite"))
            .args(["run", "--ctx", "65536", "-n", "65000", "--ignore-end", "--temp", "0", "--model"])
            .args([path.as_os_str(), "ab".as_ref()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // The prompt comes out once the model is mapped.
        let mut prompt = [0; 2];
        let mut stdout = child.stdout.take().unwrap();
        stdout.read_exact(&mut prompt).unwrap();
        assert_eq!(&prompt, b"ab");
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(left).unwrap();
        std::io::copy(&mut stdout, &mut std::io::sink()).unwrap();
        let output = child.wait_with_output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        match output.status.code() {
            Some(74) => assert!(message.contains("a model file shrank while it was in use"), "{message}"),
            Some(1) => assert!(message.contains("the file changed while it was mapped"), "{message}"),
            _ => panic!("{}: {message}", output.status),
        }
        println!("{left} bytes left: {message}");
    }
}
