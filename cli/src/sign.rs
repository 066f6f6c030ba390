//! `halite sign` and `halite verify`.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use clap::Args;
use halite::gguf::Gguf;
use halite::map;
use halite::output::Replace;
use halite_server::integrity::{Manifest, Trust, manifest_path, signature_path, verify_model};
use minisign::{SecretKey, SecretKeyBox};

use super::{Failure, interrupt, plain, print, progress};

/// Maximum bytes of a secret key.
const MAX_KEY_BYTES: u64 = 1 << 14;
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
    let wrong = |e: minisign::PError| format!("{}: {e}", path.display());
    let text = String::from_utf8(map::read(path, MAX_KEY_BYTES)?)
        .map_err(|e| format!("{}: expected a secret key of minisign: {e}", path.display()))?;
    let key = || SecretKeyBox::from_string(&text).map_err(wrong);
    match SecretKey::from_unencrypted_box(key()?) {
        Ok(key) => Ok(key),
        Err(_) if std::io::stdin().is_terminal() => Ok(SecretKey::from_box(key()?, None).map_err(wrong)?),
        Err(e) => Err(format!("{} (on a terminal, the command asks for a password)", wrong(e)).into()),
    }
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
    // The comment is signed, too.
    let comment =
        format!("halite manifest, {} files, {} tensors", manifest.files.len(), manifest.tensors.len());
    let signature = minisign::sign(None, &key, text.as_bytes(), Some(&comment), None)?;
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
