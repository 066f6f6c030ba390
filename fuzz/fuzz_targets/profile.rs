//! Profiles of any text.
#![no_main]

#[allow(dead_code)]
#[path = "../../hw-profiles/tests/common/exercise.rs"]
mod exercise;

libfuzzer_sys::fuzz_target!(|text: &str| exercise::profile(text));
