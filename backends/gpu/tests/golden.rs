//! Logits of small random models against llama.cpp's, within the CPU's bounds, on every path.

mod common;

use common::gpu;
use halite_testing::golden::{bound, check, committed, family_bound, family_folders, folder};

#[test]
fn golden() {
    for without in [&[][..], &["integer"], &["subgroups"]] {
        let Some(backend) = gpu(without) else { return };
        check(&backend, &committed(), |file| Some(bound(file)));
        // Their weights are plain numbers, which all paths but that of reductions treat alike.
        for dir in family_folders().into_iter().filter(|_| without != ["integer"]) {
            check(&backend, &dir, |file| Some(family_bound(file, 1e-7)));
        }
        check(&backend, &committed().join("encoders"), |file| Some(family_bound(file, 1e-6)));
        let Some(dir) = folder() else { continue };
        check(&backend, &dir.join("quants"), |file| Some(bound(file)));
    }
}
