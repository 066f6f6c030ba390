//! Read-only bytes of weights: a mapped file, or memory that outlives the program.
//!
//! A mapping depends on its file. [`Source::verify`] compares the file with its state at the time of mapping,
//! so that a session detects a file that shrank or was rewritten. For whole programs, [`exit_on_bus_error`]
//! turns the signal of a shrunken file into a message and a clean exit.

use std::fs::{File, Metadata, OpenOptions};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};

/// Where bytes come from.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    Mapped { map: memmap2::Mmap, file: File, opened: Metadata },
    Static(&'static [u8]),
    Owned(Vec<u64>, usize),
}

impl Source {
    /// Maps a file read-only.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened or mapped.
    pub fn open(path: &Path) -> Result<Arc<Source>> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        let (file, opened) = open_regular(path).map_err(io)?;
        #[allow(unsafe_code)]
        // SAFETY: the map is read-only and private to this value. Another process may still change the file:
        // readers treat the bytes as untrusted, and `verify` detects the change.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
        // On systems with huge pages for files, this saves page faults and TLB misses. Elsewhere it does
        // nothing.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let bytes = Bytes::Mapped { map, file, opened };
        Ok(Arc::new(Source { path: path.to_owned(), bytes }))
    }

    /// Wraps bytes of the program, such as a model embedded with `include_bytes!`. `name` appears in
    /// messages.
    pub fn from_static(name: &str, bytes: &'static [u8]) -> Arc<Source> {
        Arc::new(Source { path: name.into(), bytes: Bytes::Static(bytes) })
    }

    /// Copies bytes from memory, aligned for every format. `name` appears in messages.
    pub fn from_bytes(name: &str, bytes: &[u8]) -> Arc<Source> {
        let mut words = vec![0u64; bytes.len().div_ceil(8)];
        bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..bytes.len()].copy_from_slice(bytes);
        Arc::new(Source { path: name.into(), bytes: Bytes::Owned(words, bytes.len()) })
    }

    /// The path or name, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped { map, .. } => map,
            Bytes::Static(bytes) => bytes,
            Bytes::Owned(words, len) => &bytemuck::cast_slice(words)[..*len],
        }
    }

    /// Checks that a mapped file is unchanged. Another file under the same name is no change: the map keeps
    /// the old one.
    ///
    /// # Errors
    /// [`Error::FileChanged`] if the file's length changed, or its times show a write.
    pub fn verify(&self) -> Result<()> {
        let Bytes::Mapped { file, opened, .. } = &self.bytes else { return Ok(()) };
        let now = file.metadata().map_err(|source| Error::Io { path: self.path.clone(), source })?;
        let changed = |detail| Err(Error::FileChanged { path: self.path.clone(), detail });
        if now.len() != opened.len() {
            return changed(format!("it had {} bytes, it has {}", opened.len(), now.len()));
        }
        if now.modified().ok() != opened.modified().ok() {
            return changed("it was written to".into());
        }
        #[cfg(unix)]
        if self.was_written_behind_its_time(opened, &now) {
            return changed("it was written to, and its time stamp set back".into());
        }
        Ok(())
    }

    /// Whether a file's status change has no visible reason: links, permissions, owner or name.
    #[cfg(unix)]
    fn was_written_behind_its_time(&self, opened: &Metadata, now: &Metadata) -> bool {
        use std::os::unix::fs::MetadataExt;
        let status = |m: &Metadata| (m.ctime(), m.ctime_nsec());
        let reasons = |m: &Metadata| (m.nlink(), m.mode(), m.uid(), m.gid());
        let place = |m: &Metadata| (m.dev(), m.ino());
        let is_in_place = || std::fs::metadata(&self.path).is_ok_and(|there| place(&there) == place(now));
        status(now) != status(opened) && reasons(now) == reasons(opened) && is_in_place()
    }
}

/// Opens a regular file. Rejects all others, since opening a pipe would wait for its other end.
fn open_regular(path: &Path) -> std::io::Result<(File, Metadata)> {
    let regular = |metadata: Metadata| match metadata.is_file() {
        true => Ok(metadata),
        false => Err(std::io::Error::other("not a regular file")),
    };
    regular(std::fs::metadata(path)?)?;
    let mut options = OpenOptions::new();
    options.read(true);
    // Another file may have replaced it meanwhile; opening that one does not wait, either.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
    let file = options.open(path)?;
    let metadata = regular(file.metadata()?)?;
    Ok((file, metadata))
}

/// Reads a regular file of limited size.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, is not a regular file, or has more than `most_bytes`.
pub fn read(path: &Path, most_bytes: u64) -> Result<Vec<u8>> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let (file, _) = open_regular(path).map_err(io)?;
    let mut bytes = Vec::new();
    // The length may change during the read.
    file.take(most_bytes.saturating_add(1)).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > most_bytes {
        return Err(io(std::io::Error::other(format!("expected at most {most_bytes} bytes, got more"))));
    }
    Ok(bytes)
}

/// A range of a [`Source`]: one tensor's bytes.
#[derive(Debug, Clone)]
pub struct Region {
    source: Arc<Source>,
    start: usize,
    end: usize,
}

impl Region {
    /// Returns the bytes `range` of `source`, or `None` if the range is outside.
    pub fn new(source: &Arc<Source>, range: std::ops::Range<usize>) -> Option<Region> {
        source.bytes().get(range.clone())?;
        Some(Region { source: source.clone(), start: range.start, end: range.end })
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // The range was checked against this source, whose length never changes.
        self.source.bytes().get(self.start..self.end).unwrap_or(&[])
    }

    /// Returns the bytes `range` of this region, or `None` if the range is outside.
    pub fn part(&self, range: std::ops::Range<usize>) -> Option<Region> {
        self.bytes().get(range.clone())?;
        Some(Region {
            source: self.source.clone(),
            start: self.start + range.start,
            end: self.start + range.end,
        })
    }

    /// The source of the bytes.
    pub fn source(&self) -> &Arc<Source> {
        &self.source
    }
}

/// Installs a signal handler: a read past the end of a mapped file that shrank ends the process with a
/// message and exit code 74. For whole programs, such as the command; a library's user decides for the
/// process.
#[cfg(unix)]
#[allow(unsafe_code)]
pub fn exit_on_bus_error() {
    extern "C" fn on_bus_error(_: libc::c_int) {
        let message = b"halite: a model file shrank while it was in use; its results are not valid\n";
        // SAFETY: write and _exit are async-signal-safe, and the message is static.
        unsafe {
            libc::write(2, message.as_ptr().cast(), message.len());
            libc::_exit(74);
        }
    }
    let handler: extern "C" fn(libc::c_int) = on_bus_error;
    // SAFETY: the handler has the type that `signal` requires and calls only async-signal-safe functions.
    unsafe {
        libc::signal(libc::SIGBUS, handler as libc::sighandler_t);
    }
}

/// Ignores the signal of a write beyond the process's file size limit, so that the write fails with an error,
/// as on a full disk. For whole programs, as [`exit_on_bus_error`].
#[cfg(unix)]
#[allow(unsafe_code)]
pub fn fail_on_file_size() {
    // SAFETY: ignoring a signal runs no code of ours.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}
