//! The golden set: models, logits and token vectors that are too large for the repository.

use std::path::{Path, PathBuf};

/// Its folder: `../shared/golden`, or where `HALITE_GOLDEN` says. `None` if it says `none`, or on a machine that happens not to have
/// it; in CI, or if a place was named, a folder that is missing is a failure.
pub fn folder() -> Option<PathBuf> {
    let named = std::env::var_os("HALITE_GOLDEN");
    let folder = named.clone().map_or_else(|| "../shared/golden".into(), PathBuf::from);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    if folder.is_dir() {
        return Some(folder);
    }
    let left_out = named.as_ref().is_some_and(|name| name == "none");
    let wanted = named.is_some() || std::env::var_os("CI").is_some();
    assert!(left_out || !wanted, "no golden set in {} (HALITE_GOLDEN=none leaves it out)", folder.display());
    eprintln!("skipped: what needs {}", folder.display());
    None
}
