//! Errors as Python's exceptions.

use std::any::Any;

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};

/// What a caller can do about an error: each is an exception class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Other,
    OutOfMemory,
    Unsupported,
    InvalidArgument,
    Malformed,
    File,
    ContextFull,
    Cancelled,
    Busy,
    Closed,
    Internal,
}

/// The classes in the order of [`Kind`]: name, the class of Python that they also are, and documentation.
const CLASSES: [(&str, &str, &str); 11] = [
    ("Error", "Exception", "An error of Halite: all others are of this class."),
    ("OutOfMemory", "MemoryError", "Memory, or a limit on it, does not suffice."),
    ("Unsupported", "NotImplementedError", "The model, or an op of it on this backend, is not supported."),
    ("InvalidArgument", "ValueError", "An argument is wrong."),
    (
        "Malformed",
        "ValueError",
        "A file, a template, a grammar or a saved sequence is malformed, or does not fit the model.",
    ),
    ("FileError", "OSError", "A file cannot be read or written."),
    ("ContextFull", "Exception", "The sequences do not fit in the session's memory."),
    ("Cancelled", "Exception", "Another thread cancelled the work."),
    ("Busy", "Exception", "Another thread uses the object."),
    ("Closed", "Exception", "The object is closed."),
    ("InternalError", "RuntimeError", "Halite has an error in its code. Sessions that it met are closed."),
];

static TYPES: PyOnceLock<Vec<Py<PyType>>> = PyOnceLock::new();

/// An error that becomes an exception.
#[derive(Debug)]
pub struct Failure {
    pub kind: Kind,
    pub message: String,
}

pub type Fallible<T> = Result<T, Failure>;

impl Failure {
    pub fn new(kind: Kind, message: impl Into<String>) -> Failure {
        Failure { kind, message: message.into() }
    }

    pub fn argument(what: &str, expected: impl std::fmt::Display, got: impl std::fmt::Display) -> Failure {
        Failure::new(Kind::InvalidArgument, format!("{what}: expected {expected}, got {got}"))
    }

    /// The error of a panic.
    pub fn panic(payload: &(dyn Any + Send)) -> Failure {
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        Failure::new(Kind::Internal, format!("panic: {}", text.unwrap_or("without a message")))
    }
}

impl From<halite::Error> for Failure {
    fn from(error: halite::Error) -> Failure {
        use halite::Error as E;
        let kind = match &error {
            E::Io { .. } | E::Output { .. } | E::FileChanged { .. } => Kind::File,
            E::Gguf { .. } | E::Model(_) | E::Tokenizer(_) | E::Template(_) | E::Constraint(_) => {
                Kind::Malformed
            }
            E::Program(_) | E::Profile { .. } | E::Saved { .. } => Kind::Malformed,
            E::Architecture { .. } | E::Unsupported { .. } => Kind::Unsupported,
            E::Argument { .. } => Kind::InvalidArgument,
            E::OutOfMemory { .. } => Kind::OutOfMemory,
            E::ContextFull { .. } | E::WindowsFull { .. } | E::StatesFull { .. } => Kind::ContextFull,
            E::Cancelled => Kind::Cancelled,
            _ => Kind::Other,
        };
        Failure::new(kind, error.to_string())
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> PyErr {
        Python::attach(|py| match TYPES.get(py).and_then(|types| types.get(failure.kind as usize)) {
            Some(class) => PyErr::from_type(class.bind(py).clone(), failure.message),
            None => pyo3::exceptions::PyRuntimeError::new_err(failure.message),
        })
    }
}

/// Names the argument in an error of reading it.
pub fn named(py: Python<'_>, name: &str, error: PyErr) -> PyErr {
    let message = format!("{name}: {}", error.value(py));
    match error.is_instance_of::<pyo3::exceptions::PyTypeError>(py) {
        true => pyo3::exceptions::PyTypeError::new_err(message),
        false => Failure::new(Kind::InvalidArgument, message).into(),
    }
}

/// Makes the classes, and adds them to the module.
pub fn add_to(m: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = m.py();
    let types = TYPES.get_or_try_init(py, || {
        let (builtins, make) = (py.import("builtins")?, py.get_type::<PyType>());
        let mut types: Vec<Py<PyType>> = Vec::new();
        for (name, also, doc) in CLASSES {
            let also = builtins.getattr(also)?;
            let bases = match types.first() {
                None => PyTuple::new(py, [also])?,
                Some(base) if also.is(builtins.getattr("Exception")?) => {
                    PyTuple::new(py, [base.bind(py).as_any()])?
                }
                Some(base) => PyTuple::new(py, [base.bind(py).as_any(), &also])?,
            };
            let content = PyDict::new(py);
            content.set_item("__module__", "halite")?;
            content.set_item("__doc__", doc)?;
            types.push(make.call1((name, bases, content))?.cast_into::<PyType>()?.unbind());
        }
        PyResult::Ok(types)
    })?;
    CLASSES.iter().zip(types).try_for_each(|((name, ..), class)| m.add(*name, class.bind(py)))
}
