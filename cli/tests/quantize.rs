//! `halite quantize` and `halite imatrix`, run as processes.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn halite(folder: &Path, args: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_halite")).current_dir(folder).args(args.split(' ')).output().unwrap()
}

fn text(folder: &Path, args: &str) -> String {
    let output = halite(folder, args);
    assert!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn failure(folder: &Path, args: &str) -> String {
    let output = halite(folder, args);
    assert!(!output.status.success() && output.stdout.is_empty(), "{args}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_model_becomes_smaller() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("a.gguf"), halite_models::AUSTEN).unwrap();
    let words = "They were not so happy as she had expected them to be. ".repeat(20);
    std::fs::write(folder.join("text"), words).unwrap();
    let report = text(folder, "imatrix a.gguf text -o i.gguf --window 64 --limit 200");
    assert!(report.starts_with("35 matrices, 3 pieces of 64 tokens"), "{report}");

    let what = "expected a model, got a matrix of importance, with which a model is quantised (general.type `imatrix`)";
    let inspected = text(folder, "inspect i.gguf");
    assert!(inspected.contains(what) && !inspected.contains("use:"), "{inspected}");
    for command in [
        "run -m i.gguf",
        "perplexity -m i.gguf -f text",
        "pack i.gguf p.gguf",
        "quantize i.gguf q.gguf --format q8_0",
    ] {
        let error = failure(folder, command);
        assert!(error.contains(what), "{command}: {error}");
    }

    let table = text(folder, "quantize a.gguf b.gguf --format Q4_K_M --imatrix i.gguf --threads 1");
    assert!(table.starts_with("tensor"), "{table}");
    let row = table.lines().find(|line| line.starts_with("blk.0.ffn_up.weight")).unwrap();
    assert!(row.contains("Q8_0     Q4_K") && row.ends_with("by importance"), "{row}");
    assert!(!text(folder, "run -m b.gguf hi -n 4 --temp 0").is_empty());

    let json = text(folder, "quantize a.gguf c.gguf --format q4_0 --tensor attn_v=q8_0 --json");
    let report: Value = serde_json::from_str(&json).unwrap();
    let tensors = report["tensors"].as_array().unwrap();
    let of = |name: &str| tensors.iter().find(|tensor| tensor["name"] == name).unwrap();
    assert_eq!(of("blk.0.attn_v.weight")["to"], "Q8_0");
    assert!(of("blk.0.attn_v.weight")["error"].is_null());
    assert_eq!(of("blk.0.attn_q.weight")["to"], "Q4_0");
    let size = |name: &str| std::fs::metadata(folder.join(name)).unwrap().len();
    assert!(report["to_bytes"].as_u64().unwrap() < size("c.gguf") && size("c.gguf") < size("a.gguf"));

    let again = failure(folder, "quantize a.gguf b.gguf --format q4_0");
    assert!(again.contains("b.gguf: not written: it exists already"), "{again}");
    let wrong = failure(folder, "quantize b.gguf d.gguf --format q4_0");
    assert!(wrong.contains("its errors would add up"), "{wrong}");
    let wrong = failure(folder, "quantize a.gguf d.gguf --format q4_k_x");
    assert!(wrong.contains("expected one of f32, f16"), "{wrong}");
    let wrong = failure(folder, "quantize a.gguf d.gguf --format q4_0 --imatrix a.gguf");
    assert!(wrong.contains("expected a matrix of importance"), "{wrong}");
    let wrong = failure(folder, "imatrix a.gguf text -o d.gguf --window 9999");
    assert!(wrong.contains("text: needs at least 9999 tokens (--window), has "), "{wrong}");
    // A mistake leaves no file behind.
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), 5);
}
