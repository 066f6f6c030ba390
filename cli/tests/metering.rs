//! `halite usage`, `ledger`, `keys`, `sign` and `verify`.
#![cfg(feature = "serve")]

use std::path::Path;
use std::process::{Command, Output};

use halite_server::ledger::{Durability, Entry, Ledger, Receipt};

fn halite(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_halite")).args(args).output().unwrap()
}

/// What a command prints that succeeds.
fn text(args: &[&str]) -> String {
    let output = halite(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What a command says that fails.
fn error(args: &[&str]) -> String {
    let output = halite(args);
    assert!(!output.status.success(), "{args:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn show(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn usage_is_summed_up_and_the_ledger_verified() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let mut ledger = Ledger::open(&path, Durability::Normal).unwrap();
    for (client, tokens) in [("ada, \"the\" client", 5), ("bob\u{1b}[31m", 7), ("ada, \"the\" client", 6)] {
        let mut receipt = Receipt::default();
        receipt.client = client.into();
        receipt.currency = "EUR".into();
        receipt.completion_tokens = tokens;
        receipt.cost_nano = tokens * 100_000_000;
        ledger.append(&[Entry::receipt(&receipt).unwrap()]).unwrap();
    }
    let file = show(&path);
    let table = text(&["usage", "--ledger", file]);
    assert!(table.contains("1.1 EUR") && table.contains("0.7 EUR") && !table.contains('\u{1b}'), "{table}");
    let csv = text(&["usage", "--ledger", file, "--by", "client,day", "--csv"]);
    assert!(csv.starts_with("client,day,currency,requests,"), "{csv}");
    assert!(csv.contains("\n\"ada, \"\"the\"\" client\",20"), "{csv}");
    let json: serde_json::Value =
        serde_json::from_str(&text(&["usage", "--ledger", file, "--since", "2020-01-01", "--json"])).unwrap();
    assert_eq!((&json[0]["completion_tokens"], &json[1]["cost_nano"]), (&11.into(), &700_000_000.into()));
    assert_eq!(text(&["usage", "--ledger", file, "--until", "2020-01-01"]), "no receipts\n");
    assert!(error(&["usage", "--ledger", file, "--by", "colour"]).contains("expected one of client"));

    let verified = text(&["ledger", "verify", file]);
    let (_, head) = verified.trim_end().rsplit_once(' ').unwrap();
    assert!(verified.starts_with("3 entries, 1 to 3,"), "{verified}");
    text(&["ledger", "verify", file, "--head", head]);
    assert!(error(&["ledger", "verify", file, "--head", "00"]).contains("no entry up to here has the hash"));
    assert_eq!(text(&["ledger", "retain", file, "--days", "1"]), "0 entries removed\n");
    let none = folder.path().join("none");
    error(&["ledger", "retain", show(&none), "--days", "1"]);
    assert!(!none.exists());
}

#[test]
fn a_new_key_is_the_one_whose_hash_is_listed() {
    let output = halite(&["keys", "new", "--client", "ada \"x\""]);
    let [toml, said] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    let secret = said.lines().last().unwrap();
    assert!(!toml.contains(secret));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("clients.toml");
    std::fs::write(&path, toml).unwrap();
    let clients = halite_server::access::read_clients(&path).unwrap();
    let access = halite_server::access::Access::new(clients, None).unwrap();
    let caller = access.check(Some(&format!("Bearer {secret}")), None).unwrap();
    assert_eq!(caller.client().name(), "ada \"x\"");
    error(&["keys", "new", "--client", ""]);
}

#[test]
fn a_signed_model_is_verified_and_a_changed_tensor_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let (model, secret, public, other) =
        (file("model.gguf"), file("key.sec"), file("key.pub"), file("other.pub"));
    std::fs::write(&model, halite_models::AUSTEN).unwrap();
    let pair = minisign::KeyPair::generate_unencrypted_keypair().unwrap();
    std::fs::write(&secret, pair.sk.to_box(None).unwrap().into_string()).unwrap();
    std::fs::write(&public, pair.pk.to_box().unwrap().into_string()).unwrap();
    let stranger = minisign::KeyPair::generate_unencrypted_keypair().unwrap();
    std::fs::write(&other, stranger.pk.to_box().unwrap().into_string()).unwrap();

    let model_name = show(&model);
    assert!(error(&["verify", model_name]).contains("manifest.json"));
    text(&["sign", model_name, "--key", show(&secret)]);
    // Once more: both files are replaced.
    text(&["sign", model_name, "--key", show(&secret)]);
    let verified = text(&["verify", model_name, "--key", show(&other), "--key", show(&public)]);
    assert!(verified.contains("signed by RW"), "{verified}");
    assert!(text(&["verify", model_name]).contains("no signature was checked"));
    let refused = error(&["verify", model_name, "--key", show(&other)]);
    assert!(refused.contains("not a signature of"), "{refused}");

    let mut bytes = halite_models::AUSTEN.to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&model, &bytes).unwrap();
    let refused = error(&["verify", model_name, "--key", show(&public)]);
    assert!(refused.contains("tensor `") && refused.contains("SHA-256"), "{refused}");

    // A manifest that was changed after it was signed.
    text(&["sign", model_name, "--key", show(&secret)]);
    let manifest = file("model.gguf.manifest.json");
    let changed = std::fs::read_to_string(&manifest).unwrap().replacen("version", "version ", 1);
    std::fs::write(&manifest, changed).unwrap();
    assert!(error(&["verify", model_name, "--key", show(&public)]).contains("not a signature of"));
}
