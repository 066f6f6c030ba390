//! Plug-ins: the example in C, its wrong copies, and libraries that are none.
#![cfg(all(target_os = "linux", feature = "plugin"))]

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// Compiles C to a shared library.
fn compile(folder: &Path, name: &str, text: &str) -> PathBuf {
    let (source, library) = (folder.join(format!("{name}.c")), folder.join(format!("{name}.so")));
    std::fs::write(&source, text).unwrap();
    let compiled = Command::new("cc")
        .args(["-std=c99", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-I"])
        .arg(format!("{ROOT}/include"))
        .arg("-o")
        .args([&library, &source])
        .arg("-lm")
        .status()
        .unwrap();
    assert!(compiled.success(), "{name}");
    library
}

/// The example with some texts replaced, each of which it has once.
fn chip(folder: &Path, name: &str, changes: &[(&str, &str)]) -> String {
    let mut text = std::fs::read_to_string(format!("{ROOT}/examples/chip-c/chip.c")).unwrap();
    for (from, to) in changes {
        assert_eq!(text.matches(from).count(), 1, "{from}");
        text = text.replace(from, to);
    }
    format!("plugin:{}", compile(folder, name, &text).display())
}

/// Runs the command; returns whether it succeeded, what it printed, and what it said on stderr.
fn halite(args: &[&str]) -> (bool, String, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_halite")).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (out.status.success(), text(out.stdout), text(out.stderr))
}

const RUN: [&str; 7] = ["run", "Once upon a time", "-n", "12", "--temp", "0", "--quiet"];

#[test]
fn the_example_runs_the_built_in_model_and_a_golden_file() {
    let folder = TempDir::new().unwrap();
    let chip = chip(folder.path(), "chip", &[]);
    let run = |more: &[&str]| halite(&[&RUN[..], more].concat());
    let (ok, want, _) = run(&["--backend", "cpu"]);
    assert!(ok && want.len() > 30, "{want}");
    assert_eq!(run(&["--backend", &chip]).1, want);
    // One op on the chip, the rest on the CPU; the report says so, op by op.
    let (ok, text, said) = run(&["--backend", &format!("{chip}:only=MatMul"), "--fill-gaps", "cpu"]);
    assert!(ok && text == want, "{text} {said}");
    for line in [
        "MatMul on chip-c",
        "Norm on cpu (not yet: the chip has no command for this Norm); 1024 bytes",
        "50 of 86 ops",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }
    let (ok, _, said) = run(&["--backend", &format!("{chip}:only=MatMul")]);
    assert!(
        !ok && said.contains("Attend in `blk.0`: not yet: the chip has no command for this Attend"),
        "{said}"
    );
    // Options are the plug-in's own.
    let (ok, _, said) = run(&["--backend", &format!("{chip}:colour=red")]);
    assert!(!ok && said.contains("colour"), "{said}");
    let (ok, _, said) = run(&["--backend", &format!("{chip}:memory=1")]);
    assert!(!ok && said.contains("out of memory"), "{said}");
    // All of the certificate, with a file of another family beside the built-in model.
    let out = folder.path().join("certificate");
    let golden = format!("{ROOT}/tests/data/golden/llama-IQ3_S.gguf");
    let (ok, text, said) = halite(&[
        "certify",
        "--backend",
        &chip,
        "--level",
        "smoke",
        "-o",
        out.to_str().unwrap(),
        "-m",
        &golden,
    ]);
    assert!(ok && text.contains(" 0 failed, 0 declared gaps"), "{text} {said}");
    for file in ["certificate.json", "certificate.xml", "certificate.html"] {
        assert!(out.join(file).metadata().unwrap().len() > 5000, "{file}");
    }
    // The same against itself is no regression; a gap is one.
    let json = out.join("certificate.json");
    let compare = ["--level", "smoke", "-o", out.to_str().unwrap(), "--compare", json.to_str().unwrap()];
    let with_gaps = format!("{chip}:only=MatMul");
    let (ok, text, _) = halite(&[&["certify", "--backend", &with_gaps][..], &compare].concat());
    assert!(!ok && text.contains("REGRESSION Norm"), "{text}");
}

/// Wrong kernels: the certificate fails, the bisection names the op, and what it writes fails alone on the chip and passes
/// on the CPU.
#[test]
fn wrong_kernels_are_found_and_named() {
    let wrong = [
        ("Rope", "float sine = sinf(angle)", "float sine = -sinf(angle)"),
        ("Norm", "/ (float)group + eps)", "/ (float)(group + 1) + eps)"),
        (
            "MatMul",
            "(float_of_half(weight[block].scale) * scales[block])",
            "(0.99f * float_of_half(weight[block].scale) * scales[block])",
        ),
    ];
    let folder = TempDir::new().unwrap();
    for (op, from, to) in wrong {
        let chip = chip(folder.path(), op, &[(from, to)]);
        let out = folder.path().join(op);
        let (ok, text, _) =
            halite(&["certify", "--backend", &chip, "--level", "smoke", "-o", out.to_str().unwrap()]);
        assert!(!ok && text.contains(&format!("{op} ")), "{text}");
        let case = out.join("case");
        let case = case.to_str().unwrap();
        let (ok, text, said) =
            halite(&["bisect", "--backend", &chip, "--against", "cpu", "-o", case, "--decode", "1"]);
        assert!(!ok && text.contains(&format!("{op} in segment `blk.0`")), "{text} {said}");
        assert!(
            text.contains("the first of chip-c and cpu is wrong") && text.contains("shrunk to"),
            "{text}"
        );
        let (ok, text, _) = halite(&["conform", "--backend", &chip, "--replay", case]);
        assert!(!ok && text.contains("FAIL"), "{text}");
        let (ok, text, _) = halite(&["conform", "--backend", "cpu", "--replay", case]);
        assert!(ok && text.contains("pass, same bits"), "{text}");
    }
    // The right one differs by rounding alone.
    let chip = chip(folder.path(), "right", &[]);
    let (ok, text, _) = halite(&["bisect", "--backend", &chip]);
    assert!(ok && text.contains("explained by rounding"), "{text}");
}

/// Plug-ins that break the interface give errors that say how.
#[test]
fn nonsense_is_an_error() {
    let folder = TempDir::new().unwrap();
    let error = |name: &str, text: &str| {
        let library = compile(folder.path(), name, text);
        let backend = format!("plugin:{}", library.display());
        let (ok, _, said) = halite(&["conform", "--backend", &backend, "--filter", "Add 1"]);
        assert!(!ok, "{name} was accepted");
        said
    };
    let header = "#include \"halite_backend.h\"\n#include <stdlib.h>\n#include <signal.h>\n";
    let entry = |body: &str| {
        format!(
            "{header}const HaliteBackend *halite_backend(const HaliteHost *host) {{ (void)host; {body} }}"
        )
    };
    for (name, text, want) in [
        ("empty", "int x;".to_owned(), "does not export `halite_backend`"),
        ("null", entry("return NULL;"), "does not work with version 1 of the interface"),
        ("odd", entry("return (const HaliteBackend *)1;"), "an address that is not aligned"),
        ("crash", entry("return (const HaliteBackend *)64;"), "crashed with signal 11"),
        ("abort", entry("abort();"), "crashed with signal 6"),
        ("exits", entry("exit(3);"), "ended the process with status 3"),
        (
            "version",
            entry("static HaliteBackend b = {sizeof b, 7}; return &b;"),
            "is of version 7 of the interface, expected 1",
        ),
        ("small", entry("static HaliteBackend b = {8, 1}; return &b;"), "its table has 8 bytes"),
        (
            "lacks",
            entry("static HaliteBackend b = {sizeof b, 1}; return &b;"),
            "its table lacks open, close, caps",
        ),
    ] {
        let said = error(name, &text);
        assert!(said.contains(want), "{name}: {said}");
    }
    let (ok, _, said) = halite(&["conform", "--backend", "plugin:/nowhere/libchip.so"]);
    assert!(!ok && said.contains("there is no such file"), "{said}");
    let text = folder.path().join("text.so");
    std::fs::write(&text, "no library").unwrap();
    let (ok, _, said) = halite(&["conform", "--backend", &format!("plugin:{}", text.display())]);
    assert!(!ok && said.contains("is not a shared library"), "{said}");
    // Answers of the calls.
    for (name, from, to, want) in [
        ("caps", "HALITE_CONTRACT_CLOSE", "77", "contract 77 does not exist"),
        ("clock", "HALITE_CLOCK_HOST", "9", "clock 9 does not exist"),
        ("name", "\"chip-c\"", "\"chip\\nc\"", "its name has control characters"),
    ] {
        let chip = chip(folder.path(), name, &[(from, to)]);
        let (ok, text, said) = halite(&["conform", "--backend", &chip, "--filter", "Add 1"]);
        assert!(!ok && (text.contains(want) || said.contains(want)), "{name}: {text} {said}");
    }
}
