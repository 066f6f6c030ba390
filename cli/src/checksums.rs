//! SHA-256 checksums of a model's files, in the format of `sha256sum`. A list from a trusted source makes
//! files from an untrusted source safe to identify.

use std::ffi::OsStr;
use std::path::Path;

use halite::gguf::Gguf;
use halite::map::{self, Source};
use halite::output::Replace;
use sha2::{Digest, Sha256};

use super::{Failure, interrupt, progress};

/// Maximum bytes of a list of checksums.
const MAX_BYTES: u64 = 1 << 20;
/// The name without folders and the SHA-256 of each file.
fn hashes<'g>(gguf: &'g Gguf) -> Result<Vec<(&'g OsStr, String)>, Failure> {
    let sources: Vec<&'g Source> = gguf.parts().map(|(source, _)| &**source).collect();
    let total = sources.iter().map(|source| source.len()).sum();
    let bar = progress(total, "hashing");
    let hash = |source: &&'g Source| {
        let mut hasher = Sha256::new();
        // Not through a map: within a limit on memory, there is none.
        source.read_pieces(0..source.len(), &mut |bytes| {
            hasher.update(bytes);
            bar.inc(bytes.len() as u64);
        })?;
        let hex = format!("{:x}", hasher.finalize());
        Ok((source.path().file_name().unwrap_or_default(), hex))
    };
    let hashes = sources.iter().map(hash).collect();
    bar.finish_and_clear();
    hashes
}

/// Writes the checksums of a model's files to a new file.
pub fn write(gguf: &Gguf, path: &Path) -> Result<(), Failure> {
    let mut text = Vec::new();
    for (name, hash) in hashes(gguf)? {
        let name = name.as_encoded_bytes();
        if name.iter().any(|byte| matches!(byte, b'\\' | b'\n' | b'\r')) {
            return Err("--checksums: a file name contains a line break or a backslash".into());
        }
        text.extend([hash.as_bytes(), b"  ", name, b"\n"].concat());
    }
    interrupt::write(path, Replace::Nothing, &[], &text)
}

/// Fails if a file of the model is not in the list, or has another hash.
pub fn check(gguf: &Gguf, path: &Path) -> Result<(), Failure> {
    let text = map::read(path, MAX_BYTES)?;
    let listed = |name: &OsStr| {
        let mut lines = text.split(|byte| *byte == b'\n');
        // Two spaces, or a space and a star (sha256sum's binary mode).
        lines.find_map(|line| match line.split_at_checked(64)? {
            (hash, [b' ', b' ' | b'*', rest @ ..]) if rest == name.as_encoded_bytes() => Some(hash),
            _ => None,
        })
    };
    for (name, got) in hashes(gguf)? {
        let shown = name.to_string_lossy();
        let Some(expected) = listed(name) else {
            return Err(format!("{}: no SHA-256 of {shown}", path.display()).into());
        };
        if !expected.eq_ignore_ascii_case(got.as_bytes()) {
            let expected = String::from_utf8_lossy(expected);
            return Err(format!("{shown}: expected SHA-256 {expected}, got {got}").into());
        }
    }
    Ok(())
}
