//! Sessions, their sequences, and steps.

use std::collections::HashMap;
use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use halite::backend::Cancel;
use halite::kernels::kv;
use halite::model::{ProgramOptions, TOP_K};
use halite::output::{Output, Replace};
use halite::session::{OutputKind, OutputTokens, Run, SequenceId, SessionOptions};
use numpy::{PyArray1, PyArray2, PyArrayMethods};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyTuple};

use crate::backend::BackendArgument;
use crate::error::{Failure, Fallible, Kind, named};
use crate::generate::{self, Generation, Given, Prompt, Running, TextStream};
use crate::model::{Model, messages};
use crate::work::{brief, closed, lock, work};

/// A session that its sequences and streams share.
pub struct Core {
    pub cancel: Cancel,
    pub tokenizer: Option<Arc<halite::Tokenizer>>,
    state: Mutex<Option<State>>,
    /// Sequences that nobody holds any more. The next call removes them.
    dropped: Mutex<Vec<u64>>,
}

pub struct State {
    pub session: halite::Session,
    sequences: HashMap<u64, Entry>,
    last: u64,
}

/// A sequence under a number that no other one of its session had.
struct Entry {
    id: SequenceId,
    /// Counts changes, so that a stream notices those that are not its own.
    changes: u64,
}

/// A locked session that is open.
pub struct Locked<'a>(MutexGuard<'a, Option<State>>);

impl Locked<'_> {
    pub fn state(&mut self) -> Fallible<&mut State> {
        self.0.as_mut().ok_or_else(|| closed(SESSION))
    }
}

const SESSION: &str = "session";

impl Core {
    /// Locks the session for one call.
    pub fn lock(&self) -> Fallible<Locked<'_>> {
        let mut locked = Locked(lock(SESSION, &self.state)?);
        let state = locked.state()?;
        let dropped =
            std::mem::take(&mut *self.dropped.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
        for number in dropped {
            if let Some(entry) = state.sequences.remove(&number) {
                state.session.remove(entry.id)?;
            }
        }
        Ok(locked)
    }

    /// Has a sequence removed that nobody holds any more.
    pub fn drop_later(&self, number: u64) {
        self.dropped.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(number);
    }

    /// Does work with a locked session. After a panic, the session is closed.
    pub fn work<T: Send>(
        &self,
        py: Python<'_>,
        locked: &mut Locked<'_>,
        f: impl FnOnce(&mut State) -> Fallible<T> + Send,
    ) -> PyResult<T> {
        let state = locked.state()?;
        let mut broken = false;
        let result = work(py, Some(&self.cancel), || {
            let mut armed = Armed(&mut broken, true);
            let result = f(state);
            armed.1 = false;
            result
        });
        if broken {
            *locked.0 = None;
        }
        result
    }

    /// Does brief work.
    fn brief<T>(&self, f: impl FnOnce(&mut State) -> Fallible<T>) -> Fallible<T> {
        let mut locked = self.lock()?;
        let state = locked.state()?;
        let result = brief(|| f(state));
        if matches!(&result, Err(failure) if failure.kind == Kind::Internal) {
            *locked.0 = None;
        }
        result
    }
}

/// Notes that work did not come to its end.
struct Armed<'a>(&'a mut bool, bool);

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        *self.0 = self.1;
    }
}

impl State {
    /// Gives a sequence a number.
    pub fn number(&mut self, id: SequenceId) -> u64 {
        self.last += 1;
        self.sequences.insert(self.last, Entry { id, changes: 0 });
        self.last
    }

    fn entry(&mut self, number: u64) -> Fallible<&mut Entry> {
        let removed = || Failure::argument("sequence", "one of this session", "one that was removed");
        self.sequences.get_mut(&number).ok_or_else(removed)
    }

    pub fn id(&mut self, number: u64) -> Fallible<SequenceId> {
        Ok(self.entry(number)?.id)
    }

    /// Counts a change of a sequence, and returns its id and the count.
    pub fn change(&mut self, number: u64) -> Fallible<(SequenceId, u64)> {
        let entry = self.entry(number)?;
        entry.changes += 1;
        Ok((entry.id, entry.changes))
    }

    /// The changes of a sequence so far.
    pub fn changes(&mut self, number: u64) -> Fallible<u64> {
        Ok(self.entry(number)?.changes)
    }

    pub fn remove(&mut self, number: u64) -> Fallible<()> {
        let id = self.id(number)?;
        self.session.remove(id)?;
        self.sequences.remove(&number);
        Ok(())
    }
}

/// Reads the options of a session.
pub fn session_options(model: &Model, options: Option<&Bound<'_, PyDict>>) -> PyResult<SessionOptions> {
    let mut read = SessionOptions::default().memory(model.memory);
    for (key, value) in options.into_iter().flatten() {
        let (key, py) = (key.extract::<String>()?, value.py());
        if value.is_none() {
            continue;
        }
        let set = match key.as_str() {
            "context" => value.extract().map(|n: u32| read.context = Some(n)),
            "batch" => value.extract().map(|n| read.batch = n),
            "outputs" => value.extract().map(|n| read.outputs = n),
            "sequences" => value.extract().map(|n| read.sequences = n),
            "rewind" => value.extract().map(|n| read.rewind = n),
            "memory" => value.extract().map(|n: u64| read.memory = Some(n)),
            "spill" => value.extract().map(|path: PathBuf| read.spill = Some(path)),
            "kv_format" => value.extract().and_then(|name: String| {
                let found = kv::formats().find(|format| format.name().eq_ignore_ascii_case(&name));
                let names = || kv::formats().map(|f| f.name().to_lowercase()).collect::<Vec<_>>().join(", ");
                let unknown = || Failure::argument("kv_format", names(), halite::error::escaped(&name));
                read.program = ProgramOptions::default().kv_format(found.ok_or_else(unknown)?);
                Ok(())
            }),
            other => return Err(PyTypeError::new_err(format!("a session has no option `{other}`"))),
        };
        set.map_err(|error| named(py, &key, error))?;
    }
    Ok(read)
}

/// A model on a backend, with its sequences and their KV cache. Opening it reserves all its memory. One
/// thread at a time may use it. In a `with` statement it is closed at the end.
#[pyclass(module = "halite", frozen)]
pub struct Session {
    core: Arc<Core>,
    model: Py<Model>,
    positions: u32,
    batch: u32,
    outputs: u32,
}

/// A sequence of tokens in a session. It is removed when nothing holds it any more.
#[pyclass(module = "halite", frozen)]
pub struct Sequence {
    core: Arc<Core>,
    number: u64,
}

impl Drop for Sequence {
    fn drop(&mut self) {
        self.core.drop_later(self.number);
    }
}

/// Tokens that continue a sequence in a step.
struct Continued {
    sequence: u64,
    tokens: Vec<u32>,
    outputs: OutputTokens,
}

/// The most likely tokens and their logits.
type Top<'py> = (Bound<'py, PyArray2<u32>>, Bound<'py, PyArray2<f32>>);

impl Session {
    /// The number of a sequence of this session.
    fn number(&self, sequence: &Bound<'_, Sequence>) -> Fallible<u64> {
        let sequence = sequence.get();
        if Arc::ptr_eq(&sequence.core, &self.core) {
            return Ok(sequence.number);
        }
        Err(Failure::argument("sequence", "one of this session", "that of another session"))
    }

    /// Reads runs: tuples of a sequence, tokens and perhaps which tokens have outputs.
    fn runs(&self, runs: &Bound<'_, PyAny>) -> PyResult<Vec<Continued>> {
        let mut all = Vec::new();
        for run in runs.try_iter()? {
            let run = run?.cast_into::<PyTuple>()?;
            let (sequence, tokens, outputs): (Bound<'_, Sequence>, Vec<u32>, String) = match run.len() {
                2 => {
                    let (sequence, tokens) = run.extract()?;
                    (sequence, tokens, "last".into())
                }
                _ => run.extract()?,
            };
            let outputs = match outputs.as_str() {
                "last" => OutputTokens::Last,
                "all" => OutputTokens::All,
                "none" => OutputTokens::None,
                other => return Err(Failure::argument("outputs", "last, all or none", other).into()),
            };
            all.push(Continued { sequence: self.number(&sequence)?, tokens, outputs });
        }
        Ok(all)
    }

    /// Runs a step, and passes its results on before another thread can run one.
    fn run<'py, T>(
        &self,
        py: Python<'py>,
        runs: &Bound<'py, PyAny>,
        kind: OutputKind,
        results: impl FnOnce(&halite::Session) -> PyResult<T>,
    ) -> PyResult<T> {
        let runs = self.runs(runs)?;
        let mut locked = self.core.lock()?;
        self.core.work(py, &mut locked, |state| {
            let mut step = Vec::new();
            for run in &runs {
                let (id, _) = state.change(run.sequence)?;
                step.push(Run::new(id, &run.tokens).outputs(run.outputs));
            }
            Ok(state.session.step(&step, kind)?)
        })?;
        results(&locked.state()?.session)
    }
}

/// Copies rows to an array of NumPy's.
fn rows<'py, T: numpy::Element>(
    py: Python<'py>,
    all: &[T],
    cols: usize,
) -> PyResult<Bound<'py, PyArray2<T>>> {
    PyArray1::from_slice(py, all).reshape([all.len() / cols.max(1), cols])
}

fn logits<'py>(py: Python<'py>, session: &halite::Session) -> PyResult<Bound<'py, PyArray2<f32>>> {
    rows(py, session.logits(), session.model().hparams().vocab_size as usize)
}

#[pymethods]
impl Session {
    #[new]
    #[pyo3(
        signature = (model, backend = BackendArgument::Name("cpu".into()), **options),
        text_signature = "(model, backend='cpu', **options)"
    )]
    fn new(
        py: Python<'_>,
        model: Py<Model>,
        backend: BackendArgument<'_>,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Session> {
        let backend = backend.open(py)?;
        let options = session_options(model.get(), options)?;
        let (session, tokenizer) = work(py, None, || {
            let session = halite::Session::new(&model.get().model, &backend, &options)?;
            Ok((session, model.get().optional_tokenizer()?))
        })?;
        let (positions, batch, outputs) = (session.positions(), session.batch(), session.outputs());
        let cancel = session.cancel_handle();
        let state = Mutex::new(Some(State { session, sequences: HashMap::new(), last: 0 }));
        let core = Arc::new(Core { cancel, tokenizer, state, dropped: Mutex::default() });
        Ok(Session { core, model, positions, batch, outputs })
    }

    /// The model.
    #[getter]
    fn model(&self, py: Python<'_>) -> Py<Model> {
        self.model.clone_ref(py)
    }

    /// Positions of the KV cache, which all sequences share.
    #[getter]
    fn context(&self) -> u32 {
        self.positions
    }

    /// Most tokens of a step.
    #[getter]
    fn batch(&self) -> u32 {
        self.batch
    }

    /// Most outputs of a step.
    #[getter]
    fn outputs(&self) -> u32 {
        self.outputs
    }

    /// Adds an empty sequence.
    fn add(&self) -> PyResult<Sequence> {
        let number = self.core.brief(|state| {
            let id = state.session.add_sequence();
            Ok(state.number(id))
        })?;
        Ok(Sequence { core: self.core.clone(), number })
    }

    /// Adds a sequence that `Sequence.save` saved: its bytes, or the path of a file. Only from sources that
    /// you trust to decide what the model says.
    fn restore(&self, py: Python<'_>, saved: &Bound<'_, PyAny>) -> PyResult<Sequence> {
        let mut locked = self.core.lock()?;
        let number = match saved.cast::<PyBytes>() {
            Ok(bytes) => {
                let mut bytes = bytes.as_bytes();
                self.core.work(py, &mut locked, |state| {
                    let id = state.session.restore(&mut bytes)?;
                    Ok(state.number(id))
                })?
            }
            Err(_) => {
                let path: PathBuf = saved.extract()?;
                self.core.work(py, &mut locked, |state| {
                    let file = File::open(&path);
                    let file = file.map_err(|source| halite::Error::Io { path: path.clone(), source })?;
                    let id = state.session.restore(&mut BufReader::new(file))?;
                    Ok(state.number(id))
                })?
            }
        };
        Ok(Sequence { core: self.core.clone(), number })
    }

    /// Runs one step, in which each run continues its sequence, and returns the logits: a row for each
    /// output. A run is a tuple of a sequence and tokens, and perhaps "last", "all" or "none": which tokens
    /// have outputs. On an error, no sequence changes.
    fn step<'py>(&self, py: Python<'py>, runs: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        self.run(py, runs, OutputKind::Logits, |session| logits(py, session))
    }

    /// As `step`, and returns the most likely token of each output.
    fn arg_max<'py>(&self, py: Python<'py>, runs: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArray1<u32>>> {
        self.run(py, runs, OutputKind::ArgMax, |session| Ok(PyArray1::from_slice(py, session.arg_max())))
    }

    /// As `step`, and returns the 256 most likely tokens of each output and their logits.
    fn top_k<'py>(&self, py: Python<'py>, runs: &Bound<'py, PyAny>) -> PyResult<Top<'py>> {
        self.run(py, runs, OutputKind::TopK, |session| {
            let (ids, logits) = session.top_k();
            let k = session.model().hparams().vocab_size.min(TOP_K) as usize;
            Ok((rows(py, ids, k)?, rows(py, logits, k)?))
        })
    }

    /// Runs tokens of a sequence in as many steps as they need, and returns the last one's logits as one row.
    fn prefill<'py>(
        &self,
        py: Python<'py>,
        sequence: &Bound<'py, Sequence>,
        tokens: Vec<u32>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let number = self.number(sequence)?;
        if tokens.is_empty() {
            return Err(Failure::argument("tokens", "at least one", 0).into());
        }
        let mut locked = self.core.lock()?;
        self.core.work(py, &mut locked, |state| {
            let (id, _) = state.change(number)?;
            Ok(state.session.prefill(id, &tokens, OutputKind::Logits)?)
        })?;
        logits(py, &locked.state()?.session)
    }

    /// Generates text after a prompt, a text or tokens. With a sequence, it keeps the common prefix of the
    /// sequence and the prompt, and the sequence then holds the text.
    #[pyo3(signature = (prompt, *, sequence = None, **options))]
    fn generate(
        &self,
        py: Python<'_>,
        prompt: Prompt,
        sequence: Option<&Bound<'_, Sequence>>,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Generation> {
        let given = Given::read(py, options)?;
        let number = sequence.map(|sequence| self.number(sequence)).transpose()?;
        let mut locked = self.core.lock()?;
        self.core.work(py, &mut locked, |state| generate::whole(&self.core, state, number, prompt, given))
    }

    /// As `generate`, but returns an iterator of pieces of the text, each of whole characters.
    #[pyo3(signature = (prompt, *, sequence = None, **options))]
    fn stream(
        &self,
        py: Python<'_>,
        prompt: Prompt,
        sequence: Option<&Bound<'_, Sequence>>,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<TextStream> {
        let given = Given::read(py, options)?;
        let number = sequence.map(|sequence| self.number(sequence)).transpose()?;
        let mut locked = self.core.lock()?;
        let running = self
            .core
            .work(py, &mut locked, |state| Running::new(&self.core, state, number, prompt, given))?;
        Ok(TextStream::new(running))
    }

    /// Answers a chat by the model's template, or another one. Messages are dictionaries with `role` and
    /// `content`. With a sequence, the next turn runs only what is new.
    #[pyo3(signature = (messages, *, template = None, trusted = false, sequence = None, **options))]
    fn chat(
        &self,
        py: Python<'_>,
        messages: &Bound<'_, PyAny>,
        template: Option<&str>,
        trusted: bool,
        sequence: Option<&Bound<'_, Sequence>>,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Generation> {
        let messages = self::messages(messages)?;
        let mut given = Given::read(py, options)?;
        given.options.special = true;
        let number = sequence.map(|sequence| self.number(sequence)).transpose()?;
        let model = self.model.get();
        let mut locked = self.core.lock()?;
        self.core.work(py, &mut locked, |state| {
            let prompt = Prompt::Tokens(model.prompt(&messages, template, trusted, true)?);
            let generation = generate::whole(&self.core, state, number, prompt, given)?;
            Ok(generation.into_answer())
        })
    }

    /// Stops the work of the session within one op: steps raise `Cancelled`, generations end. It holds for
    /// later work, too, until `reset`. Any thread may call it at any time.
    fn cancel(&self) {
        self.core.cancel.cancel();
    }

    /// Takes back `cancel`.
    fn reset(&self) {
        self.core.cancel.reset();
    }

    /// Closes the session and frees its memory. Closing it twice is no error.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let state = lock(SESSION, &self.core.state)?.take();
        py.detach(|| drop(state));
        Ok(())
    }

    fn __enter__(this: Py<Session>) -> Py<Session> {
        this
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        _class: &Bound<'_, PyAny>,
        _error: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        self.close(py)
    }
}

#[pymethods]
impl Sequence {
    /// Its tokens.
    #[getter]
    fn tokens(&self) -> PyResult<Vec<u32>> {
        Ok(self.core.brief(|state| {
            let id = state.id(self.number)?;
            Ok(state.session.tokens(id)?.to_vec())
        })?)
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(self.core.brief(|state| {
            let id = state.id(self.number)?;
            Ok(state.session.len(id)? as usize)
        })?)
    }

    // An empty sequence is a sequence.
    fn __bool__(&self) -> bool {
        true
    }

    /// Copies the sequence. The two share memory until one of them goes on.
    fn fork(&self) -> PyResult<Sequence> {
        let number = self.core.brief(|state| {
            let from = state.id(self.number)?;
            let id = state.session.fork(from)?;
            Ok(state.number(id))
        })?;
        Ok(Sequence { core: self.core.clone(), number })
    }

    /// Truncates the sequence to so many tokens; a longer length changes nothing.
    fn truncate(&self, length: u32) -> PyResult<()> {
        Ok(self.core.brief(|state| {
            let (id, _) = state.change(self.number)?;
            Ok(state.session.truncate(id, length)?)
        })?)
    }

    /// Removes the sequence, and frees its memory for others.
    fn remove(&self) -> PyResult<()> {
        Ok(self.core.brief(|state| state.remove(self.number))?)
    }

    /// Saves the sequence with its KV cache: to a file, which may replace a saved sequence and nothing else,
    /// or without a path to the bytes that it returns.
    #[pyo3(signature = (path = None))]
    fn save<'py>(&self, py: Python<'py>, path: Option<PathBuf>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let mut locked = self.core.lock()?;
        let bytes = self.core.work(py, &mut locked, |state| {
            let id = state.id(self.number)?;
            let Some(path) = path else {
                let mut bytes = Vec::new();
                state.session.save(id, &mut bytes)?;
                return Ok(Some(bytes));
            };
            let mut out = Output::create(&path, Replace::SAVED_SEQUENCE, &[])?;
            state.session.save(id, &mut out)?;
            out.commit()?;
            Ok(None)
        })?;
        Ok(bytes.map(|bytes| PyBytes::new(py, &bytes)))
    }
}
