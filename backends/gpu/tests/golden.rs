//! Logits of small random models against llama.cpp's, within the CPU's bounds, on every path.

mod common;

use common::gpu;
use halite_testing::golden::{bound, check, committed, family_bound, family_folders, folder};

#[test]
fn golden() {
    // At once: where shaders run on the CPU, most of the time goes into compiling them, one by one.
    std::thread::scope(|scope| {
        for without in [&[][..], &["integer"], &["subgroups"]] {
            scope.spawn(move || path(without));
        }
    });
}

fn path(without: &[&str]) {
    let Some(backend) = gpu(without) else { return };
    check(&backend, &committed(), |file| Some(bound(file)));
    // Their weights are plain numbers, which all paths but that of reductions treat alike.
    for dir in family_folders().into_iter().filter(|_| without != ["integer"]) {
        check(&backend, &dir, |file| Some(family_bound(file, 1e-7)));
    }
    check(&backend, &committed().join("encoders"), |file| Some(family_bound(file, 1e-6)));
    if let Some(dir) = folder() {
        check(&backend, &dir.join("quants"), |file| Some(bound(file)));
    }
}
