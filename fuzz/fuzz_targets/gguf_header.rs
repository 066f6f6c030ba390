//! The header parser on any bytes.
#![no_main]

#[allow(dead_code)]
#[path = "../../tests/common/exercise.rs"]
mod exercise;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| exercise::header(bytes));
