//! `halite sign` and `halite verify`.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use base64::prelude::{BASE64_STANDARD, Engine};
use clap::Args;
use halite::gguf::Gguf;
use halite::map;
use halite::output::Replace;
use halite_server::integrity::{Manifest, Trust, manifest_path, signature_path, verify_model};
use minisign::{PublicKey, SecretKey, SecretKeyBox};

use super::{Failure, interrupt, plain, print, progress};

/// Maximum bytes of a secret key.
const MAX_KEY_BYTES: u64 = 1 << 14;
/// Bytes of a secret key, which begins with its algorithm, Ed25519.
const KEY_BYTES: usize = 158;
/// Where a secret key says how a password protects it: zeros if none does.
const KDF: std::ops::Range<usize> = 2..4;
/// What manifests and signatures begin with.
const MANIFEST: Replace = Replace::StartingWith(b"{", "a manifest");
const SIGNATURE: Replace = Replace::StartingWith(b"untrusted comment:", "a signature");

#[derive(Args)]
pub struct SignArgs {
    /// GGUF file (first file of a split model).
    model: PathBuf,
    /// Secret key, as `minisign -G` writes it. If it has a password, the command asks for it.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// Manifest to write; its signature gets the suffix .minisig [default: the model's name with .manifest.json].
    #[arg(long, value_name = "FILE")]
    manifest: Option<PathBuf>,
}

#[derive(Args)]
pub struct VerifyArgs {
    /// GGUF file (first file of a split model).
    model: PathBuf,
    /// Public key of minisign: the manifest must have a signature by it; may be repeated.
    #[arg(long, value_name = "FILE")]
    key: Vec<PathBuf>,
    /// Manifest [default: the model's name with .manifest.json].
    #[arg(long, value_name = "FILE")]
    manifest: Option<PathBuf>,
}

fn secret_key(path: &Path) -> Result<SecretKey, Failure> {
    let wrong = |what: String| format!("{}: expected a secret key of minisign: {what}", path.display());
    let text = String::from_utf8(map::read(path, MAX_KEY_BYTES)?).map_err(|e| wrong(e.to_string()))?;
    // After a comment, the second line is the key.
    let key = BASE64_STANDARD.decode(text.lines().nth(1).unwrap_or_default().trim());
    let key = key.map_err(|e| wrong(e.to_string()))?;
    if !key.starts_with(b"Ed") || key.len() != KEY_BYTES {
        return Err(wrong(format!(
            "its second line is {} bytes, not {KEY_BYTES} that begin with Ed",
            key.len()
        ))
        .into());
    }
    // Without a password, the command `minisign` writes no checksum, so the crate's reader of such files refuses them.
    if key.get(KDF) == Some(&[0, 0]) {
        return Ok(SecretKey::from_bytes(&key).map_err(|e| wrong(e.to_string()))?);
    }
    if !std::io::stdin().is_terminal() {
        return Err(wrong("it has a password, and there is no terminal to ask for it".into()).into());
    }
    let key = SecretKeyBox::from_string(&text).and_then(|key| key.into_secret_key(None));
    Ok(key.map_err(|e| wrong(e.to_string()))?)
}

pub fn sign(args: &SignArgs) -> Result<(), Failure> {
    let key = secret_key(&args.key)?;
    let path = args.manifest.clone().unwrap_or_else(|| manifest_path(&args.model));
    let signature_path = signature_path(&path);
    let inputs = [args.model.as_path(), &args.key];
    halite::output::check(&path, MANIFEST, &inputs)?;
    halite::output::check(&signature_path, SIGNATURE, &inputs)?;
    let gguf = Gguf::open_unmapped(&args.model)?;
    let file_bytes: u64 = gguf.parts().map(|(source, _)| source.len()).sum();
    let tensor_bytes: u64 = gguf.tensors().map(|tensor| tensor.record.bytes.len() as u64).sum();
    let bar = progress(file_bytes.saturating_add(tensor_bytes), "hashing");
    let manifest = Manifest::of(&gguf, &mut |bytes| bar.inc(bytes))?;
    bar.finish_and_clear();
    let mut text = serde_json::to_string_pretty(&manifest)?;
    text.push('\n');
    // With the public key, the signature is checked: a damaged key makes none.
    let public = PublicKey::from_secret_key(&key)?;
    // The comment is signed, too.
    let comment =
        format!("halite manifest, {} files, {} tensors", manifest.files.len(), manifest.tensors.len());
    let signature = minisign::sign(Some(&public), &key, text.as_bytes(), Some(&comment), None)?;
    interrupt::write(&path, MANIFEST, &inputs, text.as_bytes())?;
    interrupt::write(&signature_path, SIGNATURE, &inputs, signature.into_string().as_bytes())?;
    print(&format!("{}\n{}\n", plain(&path.to_string_lossy()), plain(&signature_path.to_string_lossy())))
}

pub fn verify(args: &VerifyArgs) -> Result<(), Failure> {
    let gguf = Gguf::open_unmapped(&args.model)?;
    let bar = progress(gguf.parts().map(|(source, _)| source.len()).sum(), "hashing");
    let trust = Trust { keys: args.key.clone(), require_signed: !args.key.is_empty() };
    // A manifest must be there: a hash alone verifies nothing.
    let manifest = args.manifest.clone().unwrap_or_else(|| manifest_path(&args.model));
    let verified = verify_model(&gguf, Some(&manifest), &trust, &mut |bytes| bar.inc(bytes))?;
    bar.finish_and_clear();
    let signed_by = verified
        .signed_by
        .map_or("no signature was checked: give --key".into(), |key| format!("signed by {key}"));
    print(&format!("the model is the one of its manifest; {signed_by}\nSHA-256 {}\n", verified.sha256))
}
