//! `include/halite.h` is what the functions say.

use std::path::Path;

/// The files in the order of the header.
const FILES: &[&str] = &[
    "border",
    "log",
    "model",
    "tokenizer",
    "backend",
    "memory",
    "session",
    "grammar",
    "generate",
    "chat",
    "embed",
    "save",
];

fn made() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let files = FILES.iter().map(|name| root.join(format!("src/{name}.rs")));
    let builder = files.fold(cbindgen::Builder::new().with_config(config), cbindgen::Builder::with_src);
    let mut text = Vec::new();
    builder.generate().unwrap().write(&mut text);
    String::from_utf8(text).unwrap()
}

/// Compares with a committed file, or writes it.
fn compare(name: &str, text: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../include").join(name);
    if std::env::var_os("HALITE_WRITE_HEADER").is_some() {
        std::fs::write(&file, text).unwrap();
    }
    let committed = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(text == committed, "run HALITE_WRITE_HEADER=1 cargo test -p halite-capi --test header");
}

#[test]
fn the_header_and_the_list_of_symbols_are_those_of_the_functions() {
    let header = made();
    let declared = header.lines().filter(|line| line.starts_with("Halite") || line.starts_with("const"));
    let names = declared.filter_map(|line| line.split('(').next()?.split([' ', '*']).next_back());
    let mut symbols: Vec<&str> = names.filter(|name| name.starts_with("halite_")).collect();
    symbols.sort_unstable();
    compare("halite.h", &header);
    compare("halite.symbols", &(symbols.join("\n") + "\n"));
}
