//! Whether a model is the one that somebody vouches for.
//!
//! A [`Manifest`] lists the SHA-256 of a model's files and of each tensor. A detached signature in minisign's format says who wrote it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use halite::gguf::Gguf;
use halite::kernels::formats::Layout;
use halite::map::{self, Source};
use minisign_verify::{PublicKey, Signature};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::basics::hex;

/// Maximum bytes of a manifest: some 250 for each of a million tensors.
const MAX_MANIFEST_BYTES: u64 = 1 << 28;
/// Maximum bytes of a signature or a public key.
const MAX_SIGNATURE_BYTES: u64 = 1 << 14;
/// The version of manifests.
const VERSION: u32 = 1;

/// Why a model is not what it should be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IntegrityError {
    /// A file cannot be read.
    #[error(transparent)]
    File(#[from] halite::Error),
    /// A manifest, a signature or a key is malformed.
    #[error("{path}: {what}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A signature is needed, and missing.
    #[error("{0}: expected a signature, got none; sign the model with `halite sign`")]
    Unsigned(PathBuf),
    /// No trusted key made the signature.
    #[error("{signature}: not a signature of {manifest} by a trusted key: {why}")]
    Untrusted {
        /// The manifest.
        manifest: PathBuf,
        /// The signature.
        signature: PathBuf,
        /// What was wrong with the key that came closest.
        why: String,
    },
    /// The model differs.
    #[error("{path}: {what}: expected {expected}, got {got}")]
    Differs {
        /// The model's file.
        path: PathBuf,
        /// What differs first: a tensor, or what there is beside tensors.
        what: String,
        /// What the manifest says.
        expected: String,
        /// What the file has.
        got: String,
    },
}

/// The SHA-256 of a model's files and tensors, in hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The version of this format.
    pub version: u32,
    /// The files, in order.
    pub files: Vec<FileEntry>,
    /// The tensors, in the files' order.
    pub tensors: Vec<TensorEntry>,
}

/// A file of a model. Its name is not checked: files may be renamed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// The name without folders.
    pub name: String,
    /// Bytes of the file.
    pub bytes: u64,
    /// The SHA-256 of all of them.
    pub sha256: String,
}

/// A tensor of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    /// Its name.
    pub name: String,
    /// How its elements are stored, as `halite inspect --tensors` names it.
    pub r#type: String,
    /// Its dimensions, row length first.
    pub shape: Vec<u64>,
    /// Where its bytes start in their file.
    pub offset: u64,
    /// Bytes that it has.
    pub bytes: u64,
    /// The SHA-256 of its bytes.
    pub sha256: String,
}

/// Whom to trust.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trust {
    /// Files with public keys of minisign. Any one may have signed.
    #[serde(default)]
    pub keys: Vec<PathBuf>,
    /// Whether a model without a signature is refused.
    #[serde(default)]
    pub require_signed: bool,
}

/// A model that was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// The SHA-256 of its file; of several files, that of their SHA-256s (32 bytes each) in order.
    pub sha256: String,
    /// The public key that signed its manifest, as minisign writes it.
    pub signed_by: Option<String>,
}

/// The manifest of a model, where none is named: `model.gguf.manifest.json`.
pub fn manifest_path(model: &Path) -> PathBuf {
    with_suffix(model, ".manifest.json")
}

/// The signature of a manifest: `model.gguf.manifest.json.minisig`, which minisign finds by itself.
pub fn signature_path(manifest: &Path) -> PathBuf {
    with_suffix(manifest, ".minisig")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

/// The SHA-256 of a part of a file.
fn sha256(
    source: &Source,
    range: std::ops::Range<u64>,
    progress: &mut dyn FnMut(u64),
) -> Result<[u8; 32], IntegrityError> {
    let mut hasher = Sha256::new();
    source.read_pieces(range, &mut |bytes| {
        hasher.update(bytes);
        progress(bytes.len() as u64);
    })?;
    Ok(hasher.finalize().into())
}

/// The SHA-256 of each file.
fn file_hashes(gguf: &Gguf, progress: &mut dyn FnMut(u64)) -> Result<Vec<[u8; 32]>, IntegrityError> {
    gguf.parts().map(|(source, _)| sha256(source, 0..source.len(), progress)).collect()
}

/// The hash of a model with these files.
fn model_hash(files: &[[u8; 32]]) -> String {
    match files {
        [one] => hex(one),
        several => hex(&Sha256::digest(several.concat())),
    }
}

impl Manifest {
    /// Reads all bytes of a model, twice. `progress` is told how many were read.
    ///
    /// # Errors
    /// [`IntegrityError::File`].
    pub fn of(gguf: &Gguf, progress: &mut dyn FnMut(u64)) -> Result<Manifest, IntegrityError> {
        let hashes = file_hashes(gguf, progress)?;
        let file = |((source, _), hash): ((&std::sync::Arc<Source>, _), &[u8; 32])| FileEntry {
            name: source.path().file_name().unwrap_or_default().to_string_lossy().into_owned(),
            bytes: source.len(),
            sha256: hex(hash),
        };
        let files = gguf.parts().zip(&hashes).map(file).collect();
        let tensors = tensors(gguf, progress).collect::<Result<_, _>>()?;
        Ok(Manifest { version: VERSION, files, tensors })
    }

    /// Reads a manifest's file.
    fn parse(path: &Path, bytes: &[u8]) -> Result<Manifest, IntegrityError> {
        let wrong = |what: String| IntegrityError::Malformed { path: path.to_owned(), what };
        let manifest: Manifest = serde_json::from_slice(bytes).map_err(|e| wrong(e.to_string()))?;
        match manifest.version {
            VERSION => Ok(manifest),
            got => Err(wrong(format!("expected version {VERSION}, got {got}"))),
        }
    }
}

/// The tensors of a model, hashed one by one.
fn tensors(
    gguf: &Gguf,
    progress: &mut dyn FnMut(u64),
) -> impl Iterator<Item = Result<TensorEntry, IntegrityError>> {
    let records = gguf.parts().flat_map(|(source, header)| header.tensors.iter().map(move |r| (source, r)));
    records.map(|(source, record)| {
        let range = record.bytes.start as u64..record.bytes.end as u64;
        let interleaved = match record.layout {
            Layout::Rows => "",
            Layout::Interleaved => " interleaved",
        };
        Ok(TensorEntry {
            name: record.name.clone(),
            r#type: format!("{}{interleaved}", record.format.name()),
            shape: record.dims.clone(),
            offset: range.start,
            bytes: range.end - range.start,
            sha256: hex(&sha256(source, range, progress)?),
        })
    })
}

/// Checks an open model against its manifest, if there is one, and the manifest against its signature. The manifest is `manifest`, or the
/// one beside the model. `progress` is told of bytes that were read.
///
/// # Errors
/// [`IntegrityError`]: also if `manifest` is given and does not exist, or if `trust` wants a signature and there is none.
pub fn verify_model(
    gguf: &Gguf,
    manifest: Option<&Path>,
    trust: &Trust,
    progress: &mut dyn FnMut(u64),
) -> Result<Verified, IntegrityError> {
    let path = manifest.map_or_else(|| manifest_path(gguf.path()), Path::to_owned);
    let hashes = |progress| file_hashes(gguf, progress);
    if manifest.is_none() && !trust.require_signed && !path.exists() {
        return Ok(Verified { sha256: model_hash(&hashes(progress)?), signed_by: None });
    }
    let bytes = match map::read(&path, MAX_MANIFEST_BYTES) {
        Err(_) if manifest.is_none() && !path.exists() => return Err(IntegrityError::Unsigned(path)),
        read => read?,
    };
    // Nothing of the manifest is used before its signature was checked.
    let signed_by = signer(&path, &bytes, trust)?;
    let manifest = Manifest::parse(&path, &bytes)?;
    let hashes = hashes(progress)?;
    let is_same =
        manifest.files.iter().map(|file| &file.sha256).eq(&hashes.iter().map(|h| hex(h)).collect::<Vec<_>>());
    match is_same {
        true => Ok(Verified { sha256: model_hash(&hashes), signed_by }),
        false => Err(difference(gguf, &manifest, &hashes)?),
    }
}

/// The trusted key that signed a manifest.
fn signer(manifest: &Path, bytes: &[u8], trust: &Trust) -> Result<Option<String>, IntegrityError> {
    let path = signature_path(manifest);
    if !path.exists() {
        return match trust.require_signed {
            true => Err(IntegrityError::Unsigned(manifest.to_owned())),
            false => Ok(None),
        };
    }
    // Without keys, nobody's signature says more than none.
    if trust.keys.is_empty() && !trust.require_signed {
        return Ok(None);
    }
    let read = |path: &Path| {
        let wrong = |what: String| IntegrityError::Malformed { path: path.to_owned(), what };
        String::from_utf8(map::read(path, MAX_SIGNATURE_BYTES)?).map_err(|e| wrong(e.to_string()))
    };
    let malformed = |path: &Path, what: &str, e: minisign_verify::Error| {
        let what = format!("expected {what} of minisign: {e}");
        IntegrityError::Malformed { path: path.to_owned(), what }
    };
    let signature = Signature::decode(&read(&path)?).map_err(|e| malformed(&path, "a signature", e))?;
    let mut why = "there are no trusted keys".to_owned();
    for file in &trust.keys {
        let text = read(file)?;
        let key = PublicKey::decode(&text).map_err(|e| malformed(file, "a public key", e))?;
        match key.verify(bytes, &signature, false) {
            // After a comment, the second line is the key.
            Ok(()) => return Ok(text.lines().nth(1).map(str::to_owned)),
            Err(e) => why = format!("{}: {e}", file.display()),
        }
    }
    Err(IntegrityError::Untrusted { manifest: manifest.to_owned(), signature: path, why })
}

/// What a model differs in: the first tensor, or else what lies beside tensors.
fn difference(
    gguf: &Gguf,
    manifest: &Manifest,
    hashes: &[[u8; 32]],
) -> Result<IntegrityError, IntegrityError> {
    let differs = |what: String, expected: String, got: String| IntegrityError::Differs {
        path: gguf.path().to_owned(),
        what,
        expected,
        got,
    };
    let mut expected = manifest.tensors.iter();
    for got in tensors(gguf, &mut |_| {}) {
        let got = got?;
        let Some(expected) = expected.next() else {
            return Ok(differs(format!("tensor `{}`", got.name), "no such tensor".into(), "one".into()));
        };
        if *expected != got {
            let what = format!("tensor `{}`", expected.name);
            return Ok(differs(what, shown(expected), shown(&got)));
        }
    }
    if let Some(lacking) = expected.next() {
        return Ok(differs(format!("tensor `{}`", lacking.name), shown(lacking), "no such tensor".into()));
    }
    let expected: Vec<&str> = manifest.files.iter().map(|file| file.sha256.as_str()).collect();
    let got: Vec<String> = hashes.iter().map(|hash| hex(hash)).collect();
    let what = "all tensors are the same, but not the metadata; SHA-256".into();
    Ok(differs(what, expected.join(", "), got.join(", ")))
}

/// A tensor in a line.
fn shown(tensor: &TensorEntry) -> String {
    let TensorEntry { name, r#type, shape, offset, bytes, sha256 } = tensor;
    format!("`{name}` {type} {shape:?}, {bytes} bytes at {offset}, SHA-256 {sha256}", r#type = r#type)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(folder: &Path) -> PathBuf {
        let path = folder.join("model.gguf");
        std::fs::write(&path, halite_models::AUSTEN).unwrap();
        path
    }

    fn verify(path: &Path, manifest: Option<&Path>, trust: &Trust) -> Result<Verified, IntegrityError> {
        verify_model(&Gguf::open(path).unwrap(), manifest, trust, &mut |_| {})
    }

    #[test]
    fn the_first_difference_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = model(folder.path());
        let any = Trust::default();
        let sha256 = hex(&Sha256::digest(halite_models::AUSTEN));
        assert_eq!(verify(&path, None, &any).unwrap(), Verified { sha256: sha256.clone(), signed_by: None });

        let manifest = Manifest::of(&Gguf::open(&path).unwrap(), &mut |_| {}).unwrap();
        let beside = manifest_path(&path);
        std::fs::write(&beside, serde_json::to_vec(&manifest).unwrap()).unwrap();
        assert_eq!(verify(&path, None, &any).unwrap().sha256, sha256);
        assert_eq!(manifest.files[0].sha256, sha256);

        let (second, last) = (&manifest.tensors[1], manifest.tensors.last().unwrap());
        let metadata = halite_models::AUSTEN.windows(12).position(|w| w == b"general.name").unwrap();
        for (at, name) in [
            (second.offset, second.name.as_str()),
            (last.offset + last.bytes - 1, &last.name),
            (metadata as u64 + 24, "not the metadata"),
        ] {
            let mut bytes = halite_models::AUSTEN.to_vec();
            bytes[at as usize] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
            let error = verify(&path, None, &any).unwrap_err();
            assert!(matches!(&error, IntegrityError::Differs { what, .. } if what.contains(name)), "{error}");
        }
        std::fs::write(&beside, "{}").unwrap();
        assert!(matches!(verify(&path, None, &any), Err(IntegrityError::Malformed { .. })));
        let none = folder.path().join("none");
        assert!(matches!(verify(&path, Some(&none), &any), Err(IntegrityError::File(_))));
    }

    #[test]
    fn a_signature_is_needed_where_it_is_required() {
        let folder = tempfile::tempdir().unwrap();
        let path = model(folder.path());
        let required = Trust { require_signed: true, ..Trust::default() };
        assert!(matches!(verify(&path, None, &required), Err(IntegrityError::Unsigned(_))));
        let manifest = Manifest::of(&Gguf::open(&path).unwrap(), &mut |_| {}).unwrap();
        let beside = manifest_path(&path);
        std::fs::write(&beside, serde_json::to_vec(&manifest).unwrap()).unwrap();
        assert!(matches!(verify(&path, None, &required), Err(IntegrityError::Unsigned(_))));
        std::fs::write(signature_path(&beside), "words").unwrap();
        assert!(matches!(verify(&path, None, &required), Err(IntegrityError::Malformed { .. })));
    }
}
