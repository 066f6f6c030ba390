//! Logits of small random models against llama.cpp's, within the CPU's bounds, on every path.

mod common;

use common::gpu;
use halite_testing::golden::{bound, check, committed, family_folders, folder};

#[test]
fn golden() {
    for without in [&[][..], &["integer"], &["subgroups"]] {
        let Some(backend) = gpu(without) else { return };
        check(&backend, &committed(), |file| Some(bound(file)));
        for dir in family_folders() {
            check(&backend, &dir, |_| Some(1e-7));
        }
        let Some(dir) = folder() else { continue };
        check(&backend, &dir.join("quants"), |file| Some(bound(file)));
    }
}
