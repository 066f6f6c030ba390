//! Folders of any configurations, vocabularies and weights.
#![no_main]

#[allow(dead_code)]
#[path = "../../tests/common/exercise.rs"]
mod exercise;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let folder = std::env::temp_dir().join(format!("halite-fuzz-{}", std::process::id()));
    exercise::folder(&folder, bytes);
});
