//! `include/halite_backend.h` is what the structs say.

use std::path::Path;

#[test]
fn the_header_is_that_of_the_structs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let made =
        cbindgen::Builder::new().with_src(root.join("src/abi.rs")).with_config(config).generate().unwrap();
    let mut text = Vec::new();
    made.write(&mut text);
    let text = String::from_utf8(text).unwrap();
    let header = root.join("../../include/halite_backend.h");
    if std::env::var_os("HALITE_WRITE_HEADER").is_some() {
        std::fs::write(&header, &text).unwrap();
    }
    let committed = std::fs::read_to_string(&header).unwrap_or_default();
    assert!(text == committed, "run HALITE_WRITE_HEADER=1 cargo test -p halite-plugin --test header");
}
