//! Models and tokenizers.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use halite::chat::{Message, Template, encode};
use halite::gguf::{Gguf, Value};
use halite::map::Source;
use halite::model::Pooling;
use halite::session::footprint;
use halite::tokenizer::EncodeOptions;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::backend::BackendArgument;
use crate::error::{Failure, Fallible, Kind};
use crate::session::session_options;
use crate::work::{brief, work};

/// A GGUF file (the first one of a split model), or without a path the built-in model, a small one that
/// continues English prose. `memory` is the limit on the process, in bytes, for sessions of this model: the
/// file is not mapped then. `lora` has adapters: paths, or pairs of a path and a scale.
#[pyclass(module = "halite", frozen)]
pub struct Model {
    pub model: Arc<halite::Model>,
    pub memory: Option<u64>,
    /// Read when it is first needed.
    tokenizer: Mutex<Option<Arc<halite::Tokenizer>>>,
}

/// A low-rank adapter.
#[derive(FromPyObject)]
enum Adapter {
    Scaled(PathBuf, f32),
    Plain(PathBuf),
}

impl Model {
    fn of(model: halite::Model, memory: Option<u64>) -> Model {
        Model { model: Arc::new(model), memory, tokenizer: Mutex::default() }
    }

    /// The tokenizer, if the file has a vocabulary.
    pub fn optional_tokenizer(&self) -> Fallible<Option<Arc<halite::Tokenizer>>> {
        // A wait of at most one reading of the vocabulary, by a thread that does not wait for Python's lock.
        let mut tokenizer = self.tokenizer.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if tokenizer.is_none() {
            *tokenizer = halite::Tokenizer::from_gguf(self.model.gguf())?.map(Arc::new);
        }
        Ok(tokenizer.clone())
    }

    pub fn tokenizer(&self) -> Fallible<Arc<halite::Tokenizer>> {
        let none = || Failure::new(Kind::Unsupported, "this model file has no vocabulary: pass token ids");
        self.optional_tokenizer()?.ok_or_else(none)
    }

    /// The tokens of a chat, up to the start of the answer.
    pub fn prompt(
        &self,
        messages: &[(String, String)],
        template: Option<&str>,
        trusted: bool,
        is_open: bool,
    ) -> Fallible<Vec<u32>> {
        let tokenizer = self.tokenizer()?;
        let none = || {
            let message =
                "the model file has no chat template (tokenizer.chat_template); pass one as `template`";
            Failure::new(Kind::Unsupported, message)
        };
        let template = match template {
            Some(text) => Template::new(text, &tokenizer)?,
            None => Template::from_gguf(self.model.gguf(), &tokenizer)?.ok_or_else(none)?,
        };
        let message = |(role, content): &(String, String)| match trusted {
            true => Message::new(role, content),
            false => Message::new(role, &tokenizer.quote(content)),
        };
        let messages: Vec<Message> = messages.iter().map(message).collect();
        Ok(encode(&tokenizer, &template.render(&messages, is_open)?))
    }
}

/// Reads messages: dictionaries with a role and a content.
pub fn messages(messages: &Bound<'_, PyAny>) -> PyResult<Vec<(String, String)>> {
    let mut all = Vec::new();
    for message in messages.try_iter()? {
        let message = message?;
        let field = |name: &str| -> PyResult<String> {
            let value = message.get_item(name).map_err(|_| {
                Failure::argument("message", "a dictionary with `role` and `content`", format!("no `{name}`"))
            })?;
            let text: PyResult<String> = value.extract();
            text.map_err(|_| {
                Failure::argument("message", format!("a text as `{name}`"), value.get_type()).into()
            })
        };
        all.push((field("role")?, field("content")?));
    }
    Ok(all)
}

#[pymethods]
impl Model {
    #[new]
    #[pyo3(signature = (path = None, *, memory = None, lora = None))]
    fn new(
        py: Python<'_>,
        path: Option<PathBuf>,
        memory: Option<u64>,
        lora: Option<Vec<Adapter>>,
    ) -> PyResult<Model> {
        work(py, None, || {
            let open = |path: &PathBuf| match memory {
                None => Gguf::open(path),
                Some(_) => Gguf::open_unmapped(path),
            };
            let mut model = match &path {
                Some(path) => halite::Model::from_gguf(open(path)?)?,
                None => {
                    let source = Source::from_static("the built-in model", halite_models::AUSTEN);
                    halite::Model::from_source(source)?
                }
            };
            for adapter in lora.iter().flatten() {
                let (path, scale) = match adapter {
                    Adapter::Scaled(path, scale) => (path, *scale),
                    Adapter::Plain(path) => (path, 1.0),
                };
                model.apply_lora(open(path)?, scale)?;
            }
            Ok(Model::of(model, memory))
        })
    }

    /// Opens a GGUF file in memory, which is copied. The name appears in messages.
    #[staticmethod]
    #[pyo3(signature = (data, *, name = "the model in memory"))]
    fn from_bytes(py: Python<'_>, data: &[u8], name: &str) -> PyResult<Model> {
        work(py, None, || Ok(Model::of(halite::Model::from_source(Source::from_bytes(name, data))?, None)))
    }

    /// The name in the file.
    #[getter]
    fn name(&self) -> String {
        self.model.name()
    }

    /// Its architecture, such as "llama".
    #[getter]
    fn architecture(&self) -> &str {
        &self.model.hparams().architecture
    }

    /// Warnings about the file.
    #[getter]
    fn warnings(&self) -> Vec<String> {
        self.model.warnings().to_vec()
    }

    /// Its tokenizer.
    #[getter(tokenizer)]
    fn py_tokenizer(&self, py: Python<'_>) -> PyResult<Tokenizer> {
        work(py, None, || Ok(Tokenizer(self.tokenizer()?)))
    }

    /// Its hyper-parameters, under the names of their GGUF keys.
    #[getter]
    fn hyperparameters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (h, dict) = (self.model.hparams(), PyDict::new(py));
        dict.set_item("architecture", &h.architecture)?;
        dict.set_item("context_length", h.context_length)?;
        dict.set_item("embedding_length", h.embedding_length)?;
        dict.set_item("block_count", h.block_count)?;
        dict.set_item("feed_forward_length", &h.feed_forward_length)?;
        dict.set_item("head_count", &h.head_count)?;
        dict.set_item("head_count_kv", &h.head_count_kv)?;
        dict.set_item("key_length", h.key_length)?;
        dict.set_item("value_length", h.value_length)?;
        dict.set_item("vocab_size", h.vocab_size)?;
        dict.set_item("rope_dimension_count", h.rope_dimension_count)?;
        dict.set_item("rope_freq_base", h.rope_freq_base)?;
        dict.set_item("sliding_window", h.sliding_window)?;
        dict.set_item("expert_count", h.expert_count)?;
        dict.set_item("expert_used_count", h.expert_used_count)?;
        dict.set_item("pooling_type", h.pooling_type.map(pooling_name))?;
        Ok(dict)
    }

    /// Reads the file's metadata. Arrays, such as a vocabulary, become lists.
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (key, value) in self.model.gguf().metadata() {
            set_value(&dict, self.model.gguf(), key, value)?;
        }
        Ok(dict)
    }

    /// Returns the tokens of a chat's prompt, by the chat template of the file or another one. Messages are
    /// dictionaries with `role` and `content`. Control tokens in a content are plain text, unless it is
    /// `trusted`. `add_generation_prompt` opens the answer.
    #[pyo3(signature = (messages, *, template = None, trusted = false, add_generation_prompt = true))]
    fn chat_prompt(
        &self,
        py: Python<'_>,
        messages: &Bound<'_, PyAny>,
        template: Option<&str>,
        trusted: bool,
        add_generation_prompt: bool,
    ) -> PyResult<Vec<u32>> {
        let messages = self::messages(messages)?;
        work(py, None, || self.prompt(&messages, template, trusted, add_generation_prompt))
    }

    /// Returns the bytes of memory that a session with these options would need, and reads no weights. Within a
    /// limit, `streamed` are weights that stay in the file, `stream` is the memory for reading them, and `spilled`
    /// is the part of the KV cache that is kept in a file.
    #[pyo3(
        signature = (backend = BackendArgument::Name("cpu".into()), **options),
        text_signature = "($self, backend='cpu', **options)"
    )]
    fn footprint<'py>(
        &self,
        py: Python<'py>,
        backend: BackendArgument<'py>,
        options: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let backend = backend.open(py)?;
        let options = session_options(self, options)?;
        let need = work(py, None, || Ok(footprint(&self.model, &*backend, &options)?))?;
        let dict = PyDict::new(py);
        dict.set_item("weights", need.weight_bytes)?;
        dict.set_item("kv", need.kv_bytes)?;
        dict.set_item("scratch", need.scratch_bytes)?;
        dict.set_item("io", need.io_bytes)?;
        dict.set_item("streamed", need.streamed_bytes)?;
        dict.set_item("stream", need.stream_bytes)?;
        dict.set_item("spilled", need.spilled_bytes)?;
        Ok(dict)
    }

    fn __repr__(&self) -> String {
        format!("Model(name={:?}, architecture={:?})", self.name(), self.architecture())
    }
}

/// The name of a pooling.
pub fn pooling_name(pooling: Pooling) -> &'static str {
    match pooling {
        Pooling::Mean => "mean",
        Pooling::Cls => "cls",
        Pooling::Last => "last",
        Pooling::Rank => "rank",
        _ => "none",
    }
}

/// Adds a value of the metadata to a dictionary.
fn set_value(dict: &Bound<'_, PyDict>, gguf: &Gguf, key: &str, value: &Value) -> PyResult<()> {
    // A read as another type is an error, and the next type is tried.
    if value.array_len.is_some() {
        if let Ok(Some(texts)) = gguf.optional_strings(key) {
            let texts = texts.iter().map(String::from_utf8_lossy);
            return dict.set_item(key, texts.collect::<Vec<_>>());
        }
        if let Ok(Some(integers)) = gguf.optional_integers(key) {
            return dict.set_item(key, integers.map(|v| v as i64).collect::<Vec<_>>());
        }
        if let Ok(Some(floats)) = gguf.optional_f32s(key) {
            return dict.set_item(key, floats);
        }
    } else {
        if let Ok(Some(text)) = gguf.optional_str(key) {
            return dict.set_item(key, text);
        }
        if let Ok(Some(flag)) = gguf.optional_bool(key) {
            return dict.set_item(key, flag);
        }
        if let Ok(Some(integer)) = gguf.optional_u64(key) {
            return dict.set_item(key, integer);
        }
    }
    // Numbers are shown with all their digits.
    let shown = gguf.display_value(value);
    if let Ok(integer) = shown.parse::<i64>() {
        return dict.set_item(key, integer);
    }
    match shown.parse::<f64>() {
        Ok(float) => dict.set_item(key, float),
        Err(_) => dict.set_item(key, shown),
    }
}

/// Text to tokens and back, by the vocabulary of a model.
#[pyclass(module = "halite", frozen)]
pub struct Tokenizer(pub Arc<halite::Tokenizer>);

#[pymethods]
impl Tokenizer {
    /// Returns the tokens of a text. `add_special` adds the begin- and end-of-text tokens that the vocabulary
    /// defines; `parse_special` reads control tokens in the text, which only a trusted text should contain.
    #[pyo3(signature = (text, *, add_special = true, parse_special = false))]
    fn encode(
        &self,
        py: Python<'_>,
        text: &str,
        add_special: bool,
        parse_special: bool,
    ) -> PyResult<Vec<u32>> {
        let options = EncodeOptions::default().add_special(add_special).parse_special(parse_special);
        Ok(py.detach(|| brief(|| Ok(self.0.encode(text, options))))?)
    }

    /// Returns the text of tokens; with `special`, control tokens are shown.
    #[pyo3(signature = (tokens, *, special = false))]
    fn decode(&self, py: Python<'_>, tokens: Vec<u32>, special: bool) -> PyResult<String> {
        Ok(py.detach(|| {
            brief(|| {
                self.0.check(&tokens)?;
                Ok(self.0.decode(&tokens, special))
            })
        })?)
    }

    /// Returns the bytes of a token, which need not be whole characters.
    fn token_bytes<'py>(&self, py: Python<'py>, token: u32) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = brief(|| {
            self.0.check(&[token])?;
            let mut bytes = Vec::new();
            self.0.decode_token(token, true, &mut bytes);
            Ok(bytes)
        })?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// Whether a token ends a text.
    fn is_end(&self, token: u32) -> bool {
        self.0.is_end(token)
    }

    /// Quotes a text, so that `parse_special` reads no control tokens in it.
    fn quote(&self, text: &str) -> String {
        self.0.quote(text)
    }

    /// The begin-of-text token.
    #[getter]
    fn bos(&self) -> Option<u32> {
        self.0.bos()
    }

    /// The end-of-text token.
    #[getter]
    fn eos(&self) -> Option<u32> {
        self.0.eos()
    }

    /// Warnings about the vocabulary.
    #[getter]
    fn warnings(&self) -> Vec<String> {
        self.0.warnings().to_vec()
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }
}
