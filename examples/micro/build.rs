//! Gives the linker the memory of the board, and the program the image of a model.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap());
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap());
    let board = match env::var("CARGO_CFG_TARGET_ARCH").as_deref() {
        Ok("arm") => "mps2-an386.x",
        _ => "riscv-virt.x",
    };
    let memory = here.join("memory").join(board);
    fs::copy(&memory, out.join("memory.x")).unwrap();
    println!("cargo:rustc-link-search={}", out.display());
    println!("cargo:rerun-if-changed={}", memory.display());

    println!("cargo:rerun-if-env-changed=HALITE_IMAGE");
    let image = env::var("HALITE_IMAGE").expect("HALITE_IMAGE names the image that `halite export` wrote");
    let image = fs::canonicalize(here.join(Path::new(&image))).expect("HALITE_IMAGE is a file");
    println!("cargo:rerun-if-changed={}", image.display());
    println!("cargo:rustc-env=HALITE_IMAGE={}", image.display());
    // Word 4 of the header: the words of memory that a session takes.
    let header = fs::read(&image).unwrap();
    let words = header.get(16..20).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes);
    println!("cargo:rustc-env=HALITE_MEMORY_WORDS={}", words.expect("an image has a header"));
}
