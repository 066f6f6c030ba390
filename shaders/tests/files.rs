//! The table of files is what the folders have.

use std::path::{Path, PathBuf};

use halite_shaders::{FILES, file};

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files(&path, found),
            false if path.extension().is_some_and(|e| e == "wgsl") => found.push(path),
            false => {}
        }
    }
}

#[test]
fn every_file_is_in_the_table() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    files(root, &mut paths);
    assert_eq!(paths.len(), FILES.len());
    for path in paths {
        let name = path.strip_prefix(root).unwrap().with_extension("");
        let name = name.to_str().unwrap().replace('\\', "/");
        assert_eq!(file(&name), Some(std::fs::read_to_string(&path).unwrap().as_str()), "{name}");
    }
    assert_eq!(file("none"), None);
}
