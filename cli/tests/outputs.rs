//! What the command writes, and what it leaves alone: files that exist, interrupted work, options that are wrong.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/austen/halite-austen.gguf");

fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_halite"));
    command.current_dir(folder).args(args).stdin(std::process::Stdio::null());
    command
}

fn halite(folder: &Path, args: &str) -> Output {
    command(folder, &args.split_whitespace().collect::<Vec<_>>()).output().unwrap()
}

/// The exit code and stderr.
fn failure(folder: &Path, args: &str) -> (i32, String) {
    let output = halite(folder, args);
    assert!(!output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stdout));
    assert!(output.stdout.is_empty(), "{args}: {}", String::from_utf8_lossy(&output.stdout));
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_prompt_that_does_not_fit_is_an_error_whatever_is_to_follow() {
    let folder = tempfile::tempdir().unwrap();
    let words = "word ".repeat(600);
    std::fs::write(folder.path().join("long.txt"), words).unwrap();
    for n in ["0", "4", "-1"] {
        let (code, error) = failure(folder.path(), &format!("run -q -n {n} --save s.kv --file long.txt"));
        assert_eq!(code, 1);
        assert!(error.contains("context full: 6") && error.contains("the session has 512"), "{error}");
        assert_eq!(names(folder.path()), ["long.txt"]);
    }
}

#[test]
fn inputs_and_files_of_other_kinds_are_never_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let model = std::fs::read(MODEL).unwrap();
    std::fs::write(at("m.gguf"), &model).unwrap();
    std::fs::write(at("notes.txt"), "mine").unwrap();
    std::fs::write(at("s.kv.part"), "mine").unwrap();
    for (args, why) in [
        ("run -m m.gguf --save m.gguf Once", "it is the input m.gguf"),
        ("run --save m.gguf Once", "is not a saved sequence"),
        ("run --save notes.txt Once", "is not a saved sequence"),
        ("run --save . Once", "is a folder"),
        ("logits --tokens 9999 -o notes.txt", "token id: expected below"),
        ("logits --tokens 99,x -o notes.txt", "token id: expected a number"),
        ("logits -m m.gguf --tokens 1 -o m.gguf", "it is the input "),
        ("logits --tokens 1 -o m.gguf", "is a model"),
        ("run --save none/s.kv Once", "there is no folder none"),
        ("logits --tokens 1 -o none/k.bin", "there is no folder none"),
        ("logits --tokens 1 --verify-on-load notes.txt -o notes.txt", "it is the input "),
        ("pack m.gguf notes.txt", "exists already"),
        ("pack m.gguf m.gguf", "exists already"),
        ("synth tiny notes.txt --format q8_0", "exists already"),
        ("convert . notes.txt", "exists already"),
        #[cfg(feature = "sim")]
        ("calibrate --seconds 1 -o notes.txt", "is not a profile"),
        #[cfg(feature = "sim")]
        ("calibrate --seconds 1 -o m.gguf", "is a model"),
        #[cfg(feature = "sim")]
        ("estimate -p maia-100 -m m.gguf --prompt 9 --generate 9 --trace notes.txt", "is not a trace"),
        #[cfg(feature = "sim")]
        (
            "estimate -p maia-100 -m m.gguf --prompt 9 --generate 9 --roofline notes.txt",
            "is not an SVG drawing",
        ),
        #[cfg(feature = "sim")]
        (
            "estimate -p maia-100 -m m.gguf --load poisson:1 --lengths 9/9 --csv notes.txt",
            "is not a table of requests",
        ),
    ] {
        let (_, error) = failure(folder.path(), args);
        assert!(error.contains(why), "{args}: {error}");
    }
    assert_eq!(names(folder.path()), ["m.gguf", "notes.txt", "s.kv.part"]);
    assert_eq!(std::fs::read(at("m.gguf")).unwrap(), model);
    // What may be written is, and only that.
    for args in [
        "run -q -n 2 --save s.kv Once",
        "run -q -n 2 --restore s.kv --save s.kv",
        "logits --tokens 1,2 -o k.bin",
        "logits --tokens 1,2,3 -o k.bin",
        "pack m.gguf p.gguf",
    ] {
        let output = halite(folder.path(), args);
        assert!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
    }
    assert_eq!(names(folder.path()), ["k.bin", "m.gguf", "notes.txt", "p.gguf", "s.kv", "s.kv.part"]);
    assert_eq!(std::fs::read(at("s.kv.part")).unwrap(), b"mine");
}

/// A saved sequence is the whole file, and an error names it.
#[test]
fn what_follows_a_saved_sequence_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("s.kv");
    assert!(halite(folder.path(), "run -q -n 2 --save s.kv Once").status.success());
    let mut bytes = std::fs::read(&file).unwrap();
    bytes.push(0);
    std::fs::write(&file, &bytes).unwrap();
    let (_, error) = failure(folder.path(), "run -q -n 2 --restore s.kv");
    assert!(error.contains("s.kv: expected nothing after"), "{error}");
    bytes[0] = b'h';
    std::fs::write(&file, &bytes).unwrap();
    let (_, error) = failure(folder.path(), "run -q -n 2 --restore s.kv");
    assert!(error.contains("s.kv: saved sequence: magic"), "{error}");
}

#[test]
fn options_that_are_wrong_leave_stdout_empty() {
    let folder = tempfile::tempdir().unwrap();
    for (args, why) in [
        ("run --temp=-1 Once", "temperature: expected 0 to 100, got -1"),
        ("run --top-p 2 Once", "top_p"),
        ("run -n -2 Once", "expected a whole number, or -1"),
        ("run --seed -2 Once", "expected a whole number, or -1"),
        ("perplexity --window 2 --file x.txt", "--window: expected at least 3 tokens, got 2"),
        ("perplexity --ctx 64 --file x.txt", "set its length with --window"),
        ("conform --filter rope", "--filter rope: no case has this in its name"),
        ("logits --tokens 1 -o y --threads 40000", "cannot start 40000 threads: expected at most 4096"),
        (
            "sign x.gguf --key x.txt",
            "x.txt: expected a secret key of minisign: its second line is 42 bytes, not 158",
        ),
        ("rerank -m x.gguf --top 0 a b", "invalid value '0' for '--top <N>'"),
        ("embed -m x.gguf --batch 0 a", "invalid value '0' for '--batch <N>'"),
        ("perplexity --file x.txt", "needs at least 512 tokens (--window), has "),
    ] {
        // Also a public key.
        let text = "Some words.\nRWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3\n";
        std::fs::write(folder.path().join("x.txt"), text).unwrap();
        let (_, error) = failure(folder.path(), args);
        assert!(error.contains(why), "{args}: {error}");
    }
}

#[test]
fn minus_one_is_random_unlimited_and_off() {
    let folder = tempfile::tempdir().unwrap();
    let run = |args: &str| {
        let output = halite(folder.path(), args);
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{args}: {error}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        (report, error)
    };
    let (first, said) = run("run --json --seed -1 -n 20 --top-k -1 Once");
    let seed = first["seed"].as_u64().unwrap();
    assert_eq!(said.trim(), format!("seed {seed}"));
    let (again, _) = run(&format!("run --json --seed {seed} -n 20 --top-k 0 Once"));
    assert_eq!(first["text"], again["text"]);
    let (other, _) = run("run --json --seed -1 -n 20 Once");
    assert_ne!(other["seed"].as_u64().unwrap(), seed);
    let (whole, _) = run("run --json -n -1 --ctx 40 --temp 0 --ignore-end Once");
    assert_eq!(whole["finish"], "context_full");
}

#[cfg(unix)]
mod interrupts {
    use super::*;
    use std::io::Read;
    use std::process::{Child, Stdio};
    use std::time::{Duration, Instant};

    /// Sends the signal of Ctrl-C.
    fn interrupt(child: &Child) {
        signal(child, "-INT");
    }

    fn signal(child: &Child, name: &str) {
        let sent = Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    fn start(folder: &Path, args: &str) -> Child {
        let mut command = command(folder, &args.split_whitespace().collect::<Vec<_>>());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Waits for a file to appear, so that work is under way.
    fn appears(folder: &Path, what: &str) {
        let start = Instant::now();
        while !names(folder).iter().any(|name| name.contains(what)) {
            assert!(start.elapsed() < Duration::from_secs(60), "no {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn a_prompt_is_counted_and_saved_as_far_as_it_came() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("long.txt"), "It was a truth. ".repeat(20_000)).unwrap();
        // Steps of one token: Ctrl-C comes between them.
        let args = "run --json --ctx 1000000 --batch 1 -n 5 --save s.kv --file long.txt";
        // On a busy machine it may come before the work.
        let output = [1, 4, 16, 60].into_iter().find_map(|seconds| {
            let child = start(folder.path(), args);
            std::thread::sleep(Duration::from_secs(seconds));
            interrupt(&child);
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(130));
            (!output.stdout.is_empty()).then_some(output)
        });
        let output = output.expect("work that goes on");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("interrupted"), "{said}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["finish"], "cancelled");
        let all = report["prompt_tokens"].as_array().unwrap().len() as u64;
        let ran = report["prefill_tokens"].as_u64().unwrap();
        assert!(ran > 0 && ran < all / 2, "{ran} of {all}");
        let restored = halite(folder.path(), "run --json --ctx 1000000 -n 0 --restore s.kv");
        let restored: Value = serde_json::from_slice(&restored.stdout).unwrap();
        assert_eq!(restored["prompt_tokens"].as_array().unwrap().len() as u64, ran);
    }

    #[test]
    fn unfinished_files_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        for (args, name) in [
            ("synth llama-2-7b big.gguf --format q8_0", "-INT"),
            ("synth llama-2-7b big.gguf --format q8_0", "-TERM"),
            ("logits --ctx 200000 -o k.bin --tokens ", "-INT"),
        ] {
            let args = if args.ends_with("--tokens ") {
                format!("{args}{}", "1,".repeat(50_000) + "1")
            } else {
                args.into()
            };
            let mut child = start(folder.path(), &args);
            appears(folder.path(), ".part");
            signal(&child, name);
            assert_eq!(child.wait().unwrap().code(), Some(130));
            assert!(names(folder.path()).is_empty(), "{:?}", names(folder.path()));
        }
    }

    /// A limit of file sizes is an error as a full disk is.
    #[test]
    fn a_file_that_may_not_grow_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let script = format!("ulimit -f 1000; {} pack {MODEL} p.gguf", env!("CARGO_BIN_EXE_halite"));
        let output = Command::new("bash").current_dir(&folder).args(["-c", &script]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(names(folder.path()).is_empty());
    }

    /// The first Ctrl-C waits for a reader that does not read; the second one does not.
    #[test]
    fn the_second_one_ends_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let mut child = start(folder.path(), "run --ctx 1000000 -n 1000000 --ignore-end Once");
        // It speaks, and then nobody reads until the pipe is full.
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 8]).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        interrupt(&child);
        std::thread::sleep(Duration::from_millis(100));
        interrupt(&child);
        let start = Instant::now();
        assert_eq!(child.wait().unwrap().code(), Some(130));
        assert!(start.elapsed() < Duration::from_secs(20));
    }
}

#[test]
fn inspect_says_what_a_file_is_for() {
    let folder = tempfile::tempdir().unwrap();
    let output = halite(folder.path(), &format!("inspect --json {MODEL}"));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["made_for"], "text completion");
    let output = halite(folder.path(), &format!("run -m {MODEL} -n 2 Once"));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no chat template"));
}
