//! Logits of small random models against llama.cpp's, within the bounds that come with them.
//!
//! The full set lies beside a checkout; see `common/golden.rs`. A small set is part of the repository.

use std::path::Path;
use std::sync::Arc;

use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::backend::reference::Reference;
use halite_testing::golden::{self, bound, committed, family_bound, family_folders, folder};

fn check(dir: &Path, select: impl Fn(&str) -> Option<f64>) {
    golden::check(&(Arc::new(Cpu::with_threads(2).unwrap()) as Arc<dyn Backend>), dir, select);
}

#[test]
fn the_committed_set() {
    check(&committed(), |file| Some(bound(file)));
}

#[test]
fn families() {
    for dir in family_folders() {
        check(&dir, |file| Some(family_bound(file, 1e-8)));
    }
}

#[test]
fn families_by_definition() {
    let reference = Arc::new(Reference::new()) as Arc<dyn Backend>;
    golden::check(&reference, &committed().join("families"), |file| Some(family_bound(file, 1e-8)));
}

#[test]
fn encoders() {
    let cpu = Arc::new(Cpu::with_threads(2).unwrap()) as Arc<dyn Backend>;
    for backend in [cpu, Arc::new(Reference::new())] {
        golden::check(&backend, &committed().join("encoders"), |file| Some(family_bound(file, 1e-8)));
    }
}

/// More positions than those of a chunk of attention.
#[test]
fn long() {
    check(&committed().join("long"), |file| Some(family_bound(file, 1e-8)));
}

#[test]
fn quants() {
    let Some(dir) = folder() else { return };
    check(&dir.join("quants"), |file| Some(bound(file)));
}
