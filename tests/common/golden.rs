//! The golden set: models, with their logits or the vectors of their tokens.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use halite::backend::Backend;
use halite::embed::{EmbedOptions, Embedder};
use halite::kernels::formats::Format;
use halite::model::{Pooling, ProgramOptions};
use halite::session::{OutputKind, OutputTokens, Run, Session, SessionOptions};
use halite::{Error, Model};

/// Its folder: `../shared/golden`, or where `HALITE_GOLDEN` says. `None` if it says `none`, or on a machine that happens not to have
/// it; in CI, or if a place was named, a folder that is missing is a failure.
pub fn folder() -> Option<PathBuf> {
    let named = std::env::var_os("HALITE_GOLDEN");
    let folder = named.clone().map_or_else(|| "../shared/golden".into(), PathBuf::from);
    let folder = Path::new(crate::ROOT).join(folder);
    if folder.is_dir() {
        return Some(folder);
    }
    let left_out = named.as_ref().is_some_and(|name| name == "none");
    let wanted = named.is_some() || std::env::var_os("CI").is_some();
    assert!(left_out || !wanted, "no golden set in {} (HALITE_GOLDEN=none leaves it out)", folder.display());
    eprintln!("skipped: what needs {}", folder.display());
    None
}

/// The small set that is part of the repository.
pub fn committed() -> PathBuf {
    Path::new(crate::ROOT).join("tests/data/golden")
}

/// The folders of families: that of the small set, and that of the golden set where it is there.
pub fn family_folders() -> Vec<PathBuf> {
    [committed()].into_iter().chain(folder()).map(|dir| dir.join("families")).collect()
}

/// Models of all families of both sets.
pub fn families() -> Vec<PathBuf> {
    let files = family_folders().into_iter().flat_map(|dir| std::fs::read_dir(dir).unwrap());
    let files = files.map(|file| file.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|extension| extension == "gguf")).collect()
}

/// Tokens, and the logits of some positions, or an encoder's vectors.
pub struct Case {
    pub model: PathBuf,
    pub tokens: Vec<u32>,
    pub positions: Vec<usize>,
    pub rows: Vec<f32>,
    pub is_encoder: bool,
}

/// The cases of a folder, as its manifest lists them.
pub fn cases(dir: &Path) -> Vec<Case> {
    let manifest = std::fs::read(dir.join("manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let list =
        |v: &serde_json::Value| v.as_array().unwrap().iter().map(|v| v.as_u64().unwrap()).collect::<Vec<_>>();
    let case = |entry: &serde_json::Value| Case {
        model: dir.join(entry["model"].as_str().unwrap()),
        tokens: list(&entry["tokens"]).iter().map(|&t| t as u32).collect(),
        positions: list(&entry["positions"]).iter().map(|&p| p as usize).collect(),
        is_encoder: entry["vectors"].is_string(),
        rows: std::fs::read(dir.join(entry["logits"].as_str().or(entry["vectors"].as_str()).unwrap()))
            .unwrap()
            .as_chunks::<4>()
            .0
            .iter()
            .map(|&b| f32::from_le_bytes(b))
            .collect(),
    };
    manifest.as_array().unwrap().iter().map(case).collect()
}

/// Logits at every position, in one step.
pub fn logits(backend: &Arc<dyn Backend>, model: &Arc<Model>, tokens: &[u32]) -> Result<Vec<f32>, Error> {
    let n = tokens.len() as u32;
    let program = ProgramOptions::default().kv_format(Format::F32);
    let options = SessionOptions::default().context(n.max(256)).batch(n).outputs(n).program(program);
    let mut session = Session::new(model, backend, &options)?;
    let sequence = session.add_sequence();
    session.step(&[Run::new(sequence, tokens).outputs(OutputTokens::All)], OutputKind::Logits)?;
    Ok(session.logits().to_vec())
}

/// Vectors at every position.
pub fn vectors(backend: &Arc<dyn Backend>, model: &Arc<Model>, tokens: &[u32]) -> Result<Vec<f32>, Error> {
    let options = EmbedOptions::default().pooling(Pooling::None).normalize(false);
    Ok(Embedder::new(model, backend, &options)?.embed_tokens(&[tokens.to_vec()])?.concat())
}

/// Logits, or an encoder's vectors, at every position.
pub fn rows(backend: &Arc<dyn Backend>, case: &Case) -> Result<Vec<f32>, Error> {
    let model = Arc::new(Model::open(&case.model)?);
    let of = if case.is_encoder { vectors } else { logits };
    of(backend, &model, &case.tokens)
}

/// The normalised mean squared error of a case, or why it does not run.
pub fn nmse(backend: &Arc<dyn Backend>, case: &Case) -> Result<f64, Error> {
    let ours = rows(backend, case)?;
    let cols = case.rows.len() / case.positions.len();
    assert_eq!(ours.len(), cols * case.tokens.len());
    let (mut error, mut power) = (0.0, 0.0);
    for (row, &position) in case.rows.chunks_exact(cols).zip(&case.positions) {
        for (a, b) in ours[position * cols..][..cols].iter().zip(row) {
            error += f64::from(a - b).powi(2);
            power += f64::from(*b).powi(2);
        }
    }
    assert!(power > 0.0);
    Ok(error / power)
}

/// The bound of a file of the set, by its format.
pub fn bound(file: &str) -> f64 {
    match file {
        _ if file.contains("F16") && !file.contains("BF16") => 1e-6,
        _ if file.contains("BF16") => 5e-5,
        _ if file.contains("NVFP4") => 5e-3,
        _ => 1e-3,
    }
}

/// The bound of a family's file: `bound`, or more where the reference rounds. GELU to half precision may go the other way where
/// its input is next to a border, and Gemma 3n and 4 have it twice in each layer. The GELU of ModernBERT, Jina's models and Nomic's is that of the
/// error function, which the reference approximates. Of sparse gates, few elements remain, so that one makes a difference, which grows
/// from layer to layer.
pub fn family_bound(file: &str, bound: f64) -> f64 {
    match file {
        "gemma3n-shared.gguf" => 1e-3_f64.max(bound),
        "jina-bert-v3.gguf" | "nomic-bert-moe.gguf" => 1e-7_f64.max(bound),
        _ if file == "modern-bert.gguf" || file.starts_with("jina-bert-v2") => 1e-6_f64.max(bound),
        _ if file.starts_with("gemma4") || file.starts_with("gemma3n") => 1e-6_f64.max(bound),
        _ => bound,
    }
}

/// Runs the cases that `select` has a bound for, and fails with all that miss theirs.
pub fn check(backend: &Arc<dyn Backend>, dir: &Path, select: impl Fn(&str) -> Option<f64>) {
    let mut failures = Vec::new();
    let mut ran = 0;
    for case in cases(dir) {
        let file = case.model.file_name().unwrap().to_string_lossy().into_owned();
        let Some(bound) = select(&file) else { continue };
        ran += 1;
        match nmse(backend, &case) {
            Ok(nmse) => {
                eprintln!("{file}: {nmse:.2e} (bound {bound:.0e})");
                if nmse.is_nan() || nmse > bound {
                    failures.push(format!("{file}: {nmse:.3e} > {bound:.0e}"));
                }
            }
            Err(error) => failures.push(format!("{file}: {error}")),
        }
    }
    assert!(ran > 0, "no case in {}", dir.display());
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}
