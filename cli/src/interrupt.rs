//! Ctrl-C. The first one stops the current work within one op, so that the results so far can be shown and
//! saved. The second one, or one without such work, ends the command at once. Both remove unfinished files.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use halite::backend::Cancel;
use halite::output::{Output, Replace};

use super::Failure;

/// The exit code after Ctrl-C, as in shells.
pub const EXIT_CODE: u8 = 130;

/// The error of a command that Ctrl-C ended.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

struct State {
    /// Work that can be stopped.
    work: Option<Cancel>,
    interrupted: bool,
    /// Unfinished output files.
    unfinished: Vec<PathBuf>,
}

static STATE: Mutex<State> = Mutex::new(State { work: None, interrupted: false, unfinished: Vec::new() });

/// This lock is held only for short operations.
fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts to handle Ctrl-C.
pub fn listen() -> Result<(), Failure> {
    Ok(ctrlc::set_handler(|| {
        let mut state = state();
        if !state.interrupted
            && let Some(work) = &state.work
        {
            work.cancel();
            state.interrupted = true;
            return;
        }
        for file in &state.unfinished {
            let _ = std::fs::remove_file(file);
        }
        std::process::exit(EXIT_CODE.into());
    })?)
}

/// Lets Ctrl-C stop the work of `cancel` until this is dropped.
pub struct Work(Cancel);

impl Work {
    pub fn new(cancel: Cancel) -> Work {
        let mut state = state();
        (state.work, state.interrupted) = (Some(cancel.clone()), false);
        drop(state);
        Work(cancel)
    }

    /// Whether Ctrl-C was pressed since.
    pub fn interrupted(&self) -> bool {
        state().interrupted
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let mut state = state();
        (state.work, state.interrupted) = (None, false);
        self.0.reset();
    }
}

/// An output file, removed if Ctrl-C ends the command before it is complete.
pub struct File(Output);

impl File {
    pub fn create(target: &Path, replace: Replace, inputs: &[&Path]) -> Result<File, Failure> {
        // Ctrl-C waits until the new file is in the list.
        let mut state = state();
        let output = Output::create(target, replace, inputs)?;
        state.unfinished.extend(output.temporary().map(Path::to_owned));
        Ok(File(output))
    }

    /// Moves the complete file to its place.
    pub fn commit(self) -> Result<(), Failure> {
        Ok(self.0.commit()?)
    }
}

/// Writes a file.
pub fn write(target: &Path, replace: Replace, inputs: &[&Path], bytes: &[u8]) -> Result<(), Failure> {
    let mut out = File::create(target, replace, inputs)?;
    out.write_all(bytes).map_err(|e| format!("{}: {e}", target.display()))?;
    out.commit()
}

impl Write for File {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}
