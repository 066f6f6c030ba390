//! Saved sequences: a sequence with its KV cache as a file or as bytes.

use std::ffi::{c_char, c_void};

#[cfg(not(feature = "save"))]
use crate::border::Failure;
use crate::border::{Caller, Fallible, HaliteResult, call};
use crate::session::{HaliteSequence, HaliteSession, State, with};

#[cfg(feature = "save")]
mod built {
    use std::fs::File;
    use std::io::{self, BufReader, Read, Write};
    use std::path::Path;

    use halite::output::{Output, Replace};

    use super::*;

    pub fn to_file(state: &State, sequence: HaliteSequence, path: &Path) -> Fallible<()> {
        let id = state.sequence(sequence)?;
        let mut out = Output::create(path, Replace::SAVED_SEQUENCE, &[])?;
        state.session.save(id, &mut out)?;
        Ok(out.commit()?)
    }

    pub fn to_bytes(state: &State, sequence: HaliteSequence) -> Fallible<Vec<u8>> {
        let mut bytes = Growing(Vec::new());
        state.session.save(state.sequence(sequence)?, &mut bytes)?;
        Ok(bytes.0)
    }

    /// Bytes that grow while there is memory.
    struct Growing(Vec<u8>);

    impl Write for Growing {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.try_reserve(bytes.len()).map_err(io::Error::other)?;
            self.0.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    pub fn from_file(state: &mut State, path: &Path) -> Fallible<HaliteSequence> {
        let file = File::open(path).map_err(|source| halite::Error::Io { path: path.into(), source })?;
        restore(state, &mut BufReader::new(file))
    }

    pub fn from_bytes(state: &mut State, mut bytes: &[u8]) -> Fallible<HaliteSequence> {
        restore(state, &mut bytes)
    }

    fn restore(state: &mut State, from: &mut dyn Read) -> Fallible<HaliteSequence> {
        let id = state.session.restore(from)?;
        Ok(state.number(id))
    }
}

#[cfg(not(feature = "save"))]
mod built {
    use std::path::Path;

    use super::*;

    pub fn to_file(_: &State, _: HaliteSequence, _: &Path) -> Fallible<()> {
        Err(Failure::not_built("save"))
    }

    pub fn to_bytes(_: &State, _: HaliteSequence) -> Fallible<Vec<u8>> {
        Err(Failure::not_built("save"))
    }

    pub fn from_file(_: &mut State, _: &Path) -> Fallible<HaliteSequence> {
        Err(Failure::not_built("save"))
    }

    pub fn from_bytes(_: &mut State, _: &[u8]) -> Fallible<HaliteSequence> {
        Err(Failure::not_built("save"))
    }
}

/// Saves a sequence with its KV cache to a file, completely or not at all. It replaces no file but a saved
/// sequence. Threads: one at a time per session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_session_save_file(
    session: *const HaliteSession,
    sequence: HaliteSequence,
    path: *const c_char,
) -> HaliteResult {
    let work = |c: &Caller| with(session, |_, state| built::to_file(state, sequence, c.path(path)?));
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Saves a sequence with its KV cache to a buffer of bytes. Threads: one at a time per session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_session_save(
    session: *const HaliteSession,
    sequence: HaliteSequence,
    out: *mut c_void,
    capacity: usize,
    length: *mut usize,
) -> HaliteResult {
    let work = |c: &Caller| {
        with(session, |_, state| {
            let bytes = built::to_bytes(state, sequence)?;
            c.put_array(&bytes, out.cast::<u8>(), capacity, length).map(drop)
        })
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Adds the sequence that halite_session_save_file saved. Only from sources that you trust to decide what the
/// model says. Threads: one at a time per session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_session_restore_file(
    session: *mut HaliteSession,
    path: *const c_char,
    sequence: *mut HaliteSequence,
) -> HaliteResult {
    let work = |c: &Caller| {
        with(session, |_, state| {
            c.put("sequence", sequence, 0)?;
            c.put("sequence", sequence, built::from_file(state, c.path(path)?)?)
        })
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Adds the sequence that halite_session_save saved, as halite_session_restore_file. Threads: one at a time
/// per session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_session_restore(
    session: *mut HaliteSession,
    bytes: *const c_void,
    byte_count: usize,
    sequence: *mut HaliteSequence,
) -> HaliteResult {
    let work = |c: &Caller| {
        with(session, |_, state| {
            c.put("sequence", sequence, 0)?;
            let bytes = c.array("bytes", bytes.cast::<u8>(), byte_count)?;
            c.put("sequence", sequence, built::from_bytes(state, bytes)?)
        })
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}
