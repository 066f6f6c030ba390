//! The files of a folder: JSON files, and weights in one file or several. All of them are untrusted.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::Value;

use crate::error::{Error, Result, escaped};
use crate::gguf::printable;
use crate::map::{self, Source};

/// The file of all weights, and the index of several files.
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Maximum bytes of a text file. The largest published vocabularies have 33 million.
const MAX_TEXT_BYTES: u64 = 1 << 26;

/// Maximum weight of the values of a JSON file: an object weighs eight times as much as another value, as in
/// memory. The largest published vocabularies weigh two million.
const MAX_JSON_WEIGHT: usize = 1 << 22;

/// Maximum bytes of a safetensors header.
const MAX_HEADER_BYTES: u64 = 1 << 24;

/// Resolves the path of a file of the folder. A link may not lead out of the folder, because its target would
/// become part of a model that is passed on. The exception is the cache of the Hugging Face hub, in which
/// `models--NAME/snapshots/REVISION` is a folder of links to `models--NAME/blobs`.
fn inside(folder: &Path, name: &str) -> Result<PathBuf> {
    let path = folder.join(name);
    let real =
        |path: &Path| path.canonicalize().map_err(|source| Error::Io { path: path.to_owned(), source });
    let (root, target) = (real(folder)?, real(&path)?);
    let repository =
        root.parent().filter(|snapshots| snapshots.ends_with("snapshots")).and_then(Path::parent);
    let is_cache =
        |at: &&Path| at.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"models--"));
    let blobs = repository.filter(is_cache).map(|repository| repository.join("blobs"));
    if target.starts_with(&root) || blobs.is_some_and(|blobs| target.starts_with(blobs)) {
        return Ok(target);
    }
    let message = "a link that leads out of the folder: replace it by the file";
    Err(Error::Io { path, source: std::io::Error::other(message) })
}

/// How the small file begins that stands for a large one until Git LFS has loaded it.
const POINTER: &[u8] = b"version https://git-lfs";

fn no_pointer(path: &Path, bytes: &[u8]) -> Result<()> {
    match bytes.starts_with(POINTER) {
        true => Err(wrong(
            path,
            "expected the file itself, got a pointer of Git LFS: load it with `git lfs pull`",
        )),
        false => Ok(()),
    }
}

/// Rejects what looks like a model's folder, but is none.
pub(super) fn check(folder: &Path) -> Result<()> {
    if folder.is_file() {
        return Err(wrong(folder, "expected a folder with config.json and safetensors, got a file"));
    }
    if !has(folder, "config.json") && has(folder, "adapter_config.json") {
        let message =
            "expected a model with config.json, got an adapter (PEFT): merge it into its model first";
        return Err(wrong(folder, message));
    }
    Ok(())
}

/// Whether the folder has a file of that name, or a link.
pub(super) fn has(folder: &Path, name: &str) -> bool {
    folder.join(name).symlink_metadata().is_ok()
}

/// A file of the folder, of so many bytes at most.
pub(super) fn read_bytes(folder: &Path, name: &str, most: u64) -> Result<Vec<u8>> {
    let bytes = map::read(&inside(folder, name)?, most)?;
    no_pointer(&folder.join(name), &bytes)?;
    Ok(bytes)
}

/// A text file of the folder.
pub(super) fn read_text(folder: &Path, name: &str) -> Result<String> {
    let path = folder.join(name);
    let bytes = read_bytes(folder, name, MAX_TEXT_BYTES)?;
    String::from_utf8(bytes).map_err(|e| Error::Io { path, source: std::io::Error::other(e.utf8_error()) })
}

/// A JSON file of the folder.
pub(super) struct Json {
    path: PathBuf,
    pub(super) value: Value,
}

impl Json {
    pub(super) fn open(folder: &Path, name: &str) -> Result<Json> {
        let path = folder.join(name);
        let text = read_text(folder, name)?;
        let wrong = |e: &dyn std::fmt::Display| Error::Model(escaped(&format!("{}: {e}", path.display())));
        let weight = |byte| match byte {
            b'{' => 8,
            b'[' | b',' => 1,
            _ => 0,
        };
        if text.bytes().map(weight).sum::<usize>() > MAX_JSON_WEIGHT {
            return Err(wrong(&"it has too many values"));
        }
        let value = serde_json::from_str(&without_infinities(text)).map_err(|e| wrong(&e))?;
        Ok(Json { path, value })
    }

    /// What a file of the folder says in another form.
    pub(super) fn made(folder: &Path, name: &str, value: Value) -> Json {
        Json { path: folder.join(name), value }
    }

    /// The same with values of keys that it lacks, as JSON has them. A null is a value: no window, say.
    pub(super) fn with(&self, defaults: &[(&str, &str)]) -> Json {
        let mut value = self.value.clone();
        for (key, text) in defaults {
            let lacks = value.get(key).is_none();
            if let (true, Some(object), Ok(default)) =
                (lacks, value.as_object_mut(), serde_json::from_str(text))
            {
                object.insert((*key).to_owned(), default);
            }
        }
        Json { path: self.path.clone(), value }
    }

    /// Opens an optional JSON file. A missing file has no keys.
    pub(super) fn open_if_there(folder: &Path, name: &str) -> Result<Json> {
        match has(folder, name) {
            true => Json::open(folder, name),
            false => Ok(Json { path: folder.join(name), value: Value::Null }),
        }
    }

    /// The value of a key; `None` if it is null.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.value.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn wrong(&self, key: &str, expected: &str, got: impl std::fmt::Display) -> Error {
        let got: String = got.to_string().chars().filter(|c| !c.is_control()).take(256).collect();
        Error::Model(format!("{}: key `{key}`: expected {expected}, got {got}", self.path.display()))
    }

    pub(super) fn missing(&self, key: &str, expected: &str) -> Error {
        self.wrong(key, expected, self.value.get(key).unwrap_or(&Value::Null))
    }

    pub(super) fn str(&self, key: &str) -> Result<&str> {
        self.value.get(key).and_then(Value::as_str).ok_or_else(|| self.missing(key, "a text"))
    }

    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>> {
        let value =
            self.get(key).map(|value| value.as_bool().ok_or_else(|| self.missing(key, "true or false")));
        value.transpose()
    }

    pub(super) fn u32(&self, key: &str) -> Result<u32> {
        self.optional_u32(key)?.ok_or_else(|| self.missing(key, "a whole number"))
    }

    pub(super) fn optional_u32(&self, key: &str) -> Result<Option<u32>> {
        let number = |value: &Value| value.as_u64().and_then(|n| n.try_into().ok());
        let value = self.get(key).map(|v| number(v).ok_or_else(|| self.missing(key, "a whole number")));
        value.transpose()
    }

    /// Returns a finite number.
    pub(super) fn optional_f64(&self, key: &str) -> Result<Option<f64>> {
        let number = |value: &Value| value.as_f64().filter(|x| (*x as f32).is_finite());
        let value = self.get(key).map(|v| number(v).ok_or_else(|| self.missing(key, "a number")));
        value.transpose()
    }

    pub(super) fn f64(&self, key: &str) -> Result<f64> {
        self.optional_f64(key)?.ok_or_else(|| self.missing(key, "a number"))
    }

    /// Returns a list of finite numbers.
    pub(super) fn optional_f32s(&self, key: &str) -> Result<Option<Vec<f32>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = |x: &Value| x.as_f64().map(|x| x as f32).filter(|x| x.is_finite());
        let list: Option<Vec<f32>> = value.as_array().and_then(|list| list.iter().map(number).collect());
        list.map(Some).ok_or_else(|| self.missing(key, "a list of numbers"))
    }

    /// Returns the object of a key as a `Json`, whose errors name the key.
    pub(super) fn object(&self, key: &str) -> Result<Option<Json>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(object)) => {
                let path = PathBuf::from(format!("{} ({key})", self.path.display()));
                Ok(Some(Json { path, value: Value::Object(object.clone()) }))
            }
            Some(_) => Err(self.missing(key, "an object")),
        }
    }
}

/// Python writes numbers that JSON lacks. They become null.
fn without_infinities(text: String) -> String {
    const LACKING: [&str; 3] = ["-Infinity", "Infinity", "NaN"];
    if !LACKING.iter().any(|number| text.contains(number)) {
        return text;
    }
    let (mut out, mut rest) = (String::with_capacity(text.len()), text.as_str());
    let (mut in_text, mut escaped) = (false, false);
    while let Some(c) = rest.chars().next() {
        if let Some(number) = LACKING.iter().find(|number| !in_text && rest.starts_with(**number)) {
            out.push_str("null");
            rest = &rest[number.len()..];
            continue;
        }
        in_text ^= c == '"' && !escaped;
        escaped = c == '\\' && !escaped;
        out.push(c);
        rest = &rest[c.len_utf8()..];
    }
    out
}

/// The mapped files of a folder's weights.
pub(super) struct Files {
    files: Vec<(PathBuf, Arc<Source>)>,
    /// Other files, and what stands before their names.
    beside: Vec<(PathBuf, Arc<Source>, String)>,
    /// The file of each tensor according to the index, if there is one.
    index: Option<BTreeMap<String, usize>>,
}

impl Files {
    /// Opens the folder's weights, and other files with a text before the names of their tensors.
    pub(super) fn open(folder: &Path, others: &[(String, String)]) -> Result<Files> {
        let open =
            |name: &str| -> Result<_> { Ok((folder.join(name), Source::open(&inside(folder, name)?)?)) };
        let mut beside = Vec::new();
        for (name, prefix) in others {
            let (path, source) = open(name)?;
            beside.push((path, source, prefix.clone()));
        }
        if has(folder, SINGLE) || !has(folder, INDEX) {
            let older = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
            if let Some(name) = older.into_iter().find(|name| has(folder, name) && !has(folder, SINGLE)) {
                let message = format!("expected {SINGLE}, got {name} alone: save the model as safetensors");
                return Err(wrong(folder, &message));
            }
            return Ok(Files { files: vec![open(SINGLE)?], beside, index: None });
        }
        let json = Json::open(folder, INDEX)?;
        let map = json.value.get("weight_map").and_then(Value::as_object);
        let map = map.ok_or_else(|| json.missing("weight_map", "an object"))?;
        let (mut files, mut places, mut index) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
        for (tensor, file) in map {
            let name = file.as_str().filter(|name| is_plain(name));
            let name = name.ok_or_else(|| json.wrong("weight_map", "names of files in the folder", file))?;
            let place = match places.get(name) {
                Some(&place) => place,
                None => {
                    files.push(open(name)?);
                    places.insert(name, files.len() - 1);
                    files.len() - 1
                }
            };
            index.insert(tensor.clone(), place);
        }
        Ok(Files { files, beside, index: Some(index) })
    }

    /// Returns all tensors by name.
    pub(super) fn tensors(&self) -> Result<BTreeMap<String, TensorView<'_>>> {
        let mut all = BTreeMap::new();
        for (place, (path, source)) in self.files.iter().enumerate() {
            for (name, view) in views(path, source)? {
                if let Some(index) = &self.index
                    && index.get(&name) != Some(&place)
                {
                    let name = printable(name.as_bytes());
                    return Err(wrong(path, &format!("{INDEX} lists tensor `{name}` in another file")));
                }
                all.insert(name, view);
            }
        }
        for (path, source, prefix) in &self.beside {
            for (name, view) in views(path, source)? {
                if all.insert(format!("{prefix}{name}"), view).is_some() {
                    let name = printable(name.as_bytes());
                    return Err(wrong(path, &format!("tensor `{name}` is also in another file")));
                }
            }
        }
        let mut names = self.index.iter().flat_map(BTreeMap::keys);
        match names.find(|name| !all.contains_key(*name)) {
            Some(name) => {
                let name = printable(name.as_bytes());
                Err(Error::Model(format!("{INDEX} lists tensor `{name}`, but no file has it")))
            }
            None => Ok(all),
        }
    }
}

fn wrong(path: &Path, message: &str) -> Error {
    Error::Model(escaped(&format!("{}: {message}", path.display())))
}

/// Returns the tensors of a file.
fn views<'s>(path: &Path, source: &'s Source) -> Result<Vec<(String, TensorView<'s>)>> {
    no_pointer(path, source.bytes())?;
    let header = source.bytes().first_chunk().map_or(0, |len| u64::from_le_bytes(*len));
    if header > MAX_HEADER_BYTES {
        let message = format!("expected at most {MAX_HEADER_BYTES} bytes of header, got {header}");
        return Err(wrong(path, &message));
    }
    let tensors = SafeTensors::deserialize(source.bytes()).map_err(|e| wrong(path, &e.to_string()))?;
    Ok(tensors.tensors())
}

/// Whether a name refers to a file directly in the folder.
pub(super) fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(std::path::Component::Normal(part)), None) if part == name)
        && !name.contains(['/', '\\', '\0'])
}
