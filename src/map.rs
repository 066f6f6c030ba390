//! Read-only bytes of weights: a mapped file, a file that is read on demand, or memory that outlives the
//! program.
//!
//! A mapping depends on its file. [`Source::verify`] compares the file with its state at the time of mapping,
//! so that a session detects a file that shrank or was rewritten. For whole programs, [`exit_on_bus_error`]
//! turns the signal of a shrunken file into a message and a clean exit.

use std::borrow::Cow;
use std::fs::{File, Metadata, OpenOptions};
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::memory::zeroed;
use crate::stream::Stream;

/// The bytes of a page: what direct reads start at and end at a multiple of.
pub(crate) const PAGE_BYTES: u64 = 4096;

/// Where bytes come from.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    Mapped {
        map: memmap2::Mmap,
        file: File,
        opened: Metadata,
    },
    /// The file's first bytes; the others are read when they are needed.
    Unmapped {
        start: Vec<u8>,
        file: File,
        opened: Metadata,
    },
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

    /// Opens a file without mapping it, and reads its first `start_bytes`. The others are read when they are
    /// needed.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened or read.
    pub fn open_unmapped(path: &Path, start_bytes: u64) -> Result<Arc<Source>> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        let (file, opened) = open_regular(path).map_err(io)?;
        let mut start = zeroed(start_bytes.min(opened.len()), "the header of a file")?;
        read_file(&file, 0, &mut start).map_err(io)?;
        Ok(Arc::new(Source { path: path.to_owned(), bytes: Bytes::Unmapped { start, file, opened } }))
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
        Source::from_words(name, words, bytes.len())
    }

    /// Takes the first `bytes` bytes of words, or as many as there are. `name` appears in messages.
    pub fn from_words(name: &str, words: Vec<u64>, bytes: usize) -> Arc<Source> {
        let bytes = bytes.min(words.len().saturating_mul(8));
        Arc::new(Source { path: name.into(), bytes: Bytes::Owned(words, bytes) })
    }

    /// The path or name, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All bytes, or the first ones of a file that is not mapped.
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped { map, .. } => map,
            Bytes::Unmapped { start, .. } => start,
            Bytes::Static(bytes) => bytes,
            Bytes::Owned(words, len) => &bytemuck::cast_slice(words)[..*len],
        }
    }

    /// The number of all bytes.
    pub fn len(&self) -> u64 {
        match &self.bytes {
            Bytes::Unmapped { opened, .. } => opened.len(),
            _ => self.bytes().len() as u64,
        }
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The file, unless the bytes are the program's own.
    pub(crate) fn file(&self) -> Option<&File> {
        match &self.bytes {
            Bytes::Mapped { file, .. } | Bytes::Unmapped { file, .. } => Some(file),
            Bytes::Static(_) | Bytes::Owned(..) => None,
        }
    }

    /// Reads the bytes from `offset` on from the file, not through a map.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::FileChanged`] if the file has fewer bytes.
    pub fn read_at(&self, offset: u64, dst: &mut [u8]) -> Result<()> {
        let end = offset.saturating_add(dst.len() as u64);
        let shrank = || Error::FileChanged {
            path: self.path.clone(),
            detail: format!("bytes {offset}..{end} are beyond its end"),
        };
        if let Some(file) = self.file() {
            return match read_file(file, offset, dst) {
                Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Err(shrank()),
                Err(source) => Err(Error::Io { path: self.path.clone(), source }),
                Ok(()) => Ok(()),
            };
        }
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = self.bytes().get(start..start.saturating_add(dst.len())).ok_or_else(shrank)?;
        dst.copy_from_slice(bytes);
        Ok(())
    }

    /// Reads a range of bytes as [`Source::read_at`] does, piece by piece.
    ///
    /// # Errors
    /// As [`Source::read_at`].
    pub fn read_pieces(&self, range: Range<u64>, each: &mut dyn FnMut(&[u8])) -> Result<()> {
        const PIECE_BYTES: u64 = 1 << 20;
        let mut piece = zeroed(PIECE_BYTES.min(range.end.saturating_sub(range.start)), "a part of a file")?;
        let mut at = range.start;
        while at < range.end {
            // No more than the piece has.
            let bytes = &mut piece[..(range.end - at).min(PIECE_BYTES) as usize];
            self.read_at(at, bytes)?;
            each(bytes);
            at += bytes.len() as u64;
        }
        Ok(())
    }

    /// Opens the file a second time, for reads that bypass the system's cache, if the file system has them.
    pub(crate) fn open_direct(&self) -> Option<File> {
        #[cfg(target_os = "linux")]
        {
            use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
            let here = self.file()?.metadata().ok()?;
            let flags = libc::O_DIRECT | libc::O_NONBLOCK;
            let file = OpenOptions::new().read(true).custom_flags(flags).open(&self.path).ok()?;
            let there = file.metadata().ok()?;
            // Another file may have taken its name.
            ((here.dev(), here.ino()) == (there.dev(), there.ino())).then_some(file)
        }
        #[cfg(not(target_os = "linux"))]
        None
    }

    /// Checks that a file is unchanged. Another file under the same name is no change: the map keeps
    /// the old one.
    ///
    /// # Errors
    /// [`Error::FileChanged`] if the file's length changed, or its times show a write.
    pub fn verify(&self) -> Result<()> {
        let (Bytes::Mapped { file, opened, .. } | Bytes::Unmapped { file, opened, .. }) = &self.bytes else {
            return Ok(());
        };
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

/// Fills `dst` with a file's bytes from `offset` on.
pub(crate) fn read_file(file: &File, offset: u64, dst: &mut [u8]) -> std::io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_exact_at(file, dst, offset);
    #[cfg(windows)]
    {
        let mut done = 0;
        while done < dst.len() {
            let at = offset + done as u64;
            match std::os::windows::fs::FileExt::seek_read(file, &mut dst[done..], at)? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                n => done += n,
            }
        }
        Ok(())
    }
    #[cfg(not(any(unix, windows)))]
    {
        let _ = (file, offset, dst);
        Err(std::io::ErrorKind::Unsupported.into())
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

/// Zeroed memory in a file without a name, which is gone with the process.
#[derive(Debug)]
pub(crate) struct Spilled {
    map: memmap2::MmapMut,
    #[cfg_attr(not(target_os = "linux"), allow(dead_code, reason = "only Linux is told"))]
    kept_bytes: usize,
}

impl Spilled {
    /// Makes the file in a folder, and maps it. `kept_bytes` of it stay in memory.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn new(folder: &Path, bytes: u64, kept_bytes: u64) -> Result<Spilled> {
        let io = |source| Error::Io { path: folder.to_owned(), source };
        let file = unnamed(folder).map_err(io)?;
        // Blocks are reserved now: a full drive would otherwise end the process at a write to the map.
        reserve(&file, bytes).map_err(io)?;
        #[allow(unsafe_code)]
        // SAFETY: nobody else can open the file, since it has no name.
        let map = unsafe { memmap2::MmapMut::map_mut(&file) }.map_err(io)?;
        Ok(Spilled { map, kept_bytes: usize::try_from(kept_bytes).unwrap_or(usize::MAX) })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map
    }

    /// Writes what is beyond the part that stays in memory to the drive, and frees the memory.
    pub fn release(&self) {
        // Advice is not vital: without it, the system frees memory when it needs some.
        #[cfg(target_os = "linux")]
        {
            let start = self.kept_bytes / PAGE_BYTES as usize * PAGE_BYTES as usize;
            if let Some(rest) = self.map.get(start..) {
                #[allow(unsafe_code)]
                // SAFETY: the range is inside the map, and the advice changes no byte.
                unsafe {
                    libc::madvise(rest.as_ptr().cast_mut().cast(), rest.len(), libc::MADV_PAGEOUT);
                }
            }
        }
    }
}

/// Creates a file without a name.
fn unnamed(folder: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::fs::OpenOptionsExt;
        if let Ok(file) = options.clone().custom_flags(libc::O_TMPFILE).mode(0o600).open(folder) {
            return Ok(file);
        }
    }
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = folder.join(format!(".halite-kv-{}-{count}", std::process::id()));
    let file = options.create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

/// Makes a file longer, with blocks on the drive for all of it.
fn reserve(file: &File, bytes: u64) -> std::io::Result<()> {
    file.set_len(bytes)?;
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd;
        let len = i64::try_from(bytes).map_err(std::io::Error::other)?;
        #[allow(unsafe_code)]
        // SAFETY: the descriptor is open, and the call touches no memory.
        match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, len) } {
            0 => {}
            code => return Err(std::io::Error::from_raw_os_error(code)),
        }
    }
    Ok(())
}

/// A range of a [`Source`]: one tensor's bytes.
#[derive(Debug, Clone)]
pub struct Region {
    source: Arc<Source>,
    range: Range<u64>,
    stream: Option<Arc<Stream>>,
}

impl Region {
    /// Returns the bytes `range` of `source`, or `None` if the range is outside.
    pub fn new(source: &Arc<Source>, range: Range<usize>) -> Option<Region> {
        let range = range.start as u64..range.end as u64;
        let inside = range.start <= range.end && range.end <= source.len();
        inside.then(|| Region { source: source.clone(), range, stream: None })
    }

    /// The number of bytes.
    pub fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Returns the bytes, if they are in memory: mapped, or the program's own. Those of a region that is
    /// streamed are not.
    pub fn mapped(&self) -> Option<&[u8]> {
        let in_memory = self.stream.is_none() && !matches!(self.source.bytes, Bytes::Unmapped { .. });
        // The range was checked against this source, whose length never changes.
        in_memory.then(|| self.source.bytes().get(self.range.start as usize..self.range.end as usize))?
    }

    /// Returns the bytes, read from the file if they are not in memory.
    ///
    /// # Errors
    /// As [`Source::read_at`]; [`Error::OutOfMemory`] if there is no room for them.
    pub fn load(&self) -> Result<Cow<'_, [u8]>> {
        match self.mapped() {
            Some(bytes) => Ok(Cow::Borrowed(bytes)),
            None => {
                let mut bytes = zeroed(self.len(), "a tensor")?;
                self.source.read_at(self.range.start, &mut bytes)?;
                Ok(Cow::Owned(bytes))
            }
        }
    }

    /// Copies the bytes from `offset` on to `dst`, through the file.
    ///
    /// # Errors
    /// As [`Source::read_at`]; [`Error::Argument`] for bytes outside the region.
    pub fn read_at(&self, offset: u64, dst: &mut [u8]) -> Result<()> {
        let end = offset.saturating_add(dst.len() as u64);
        if end > self.len() {
            let expected = format!("inside 0..{}", self.len());
            return Err(Error::argument("range of a tensor", expected, format!("{offset}..{end}")));
        }
        self.source.read_at(self.range.start + offset, dst)
    }

    /// Returns the bytes `range` of this region, or `None` if the range is outside.
    pub fn part(&self, range: Range<usize>) -> Option<Region> {
        let range = range.start as u64..range.end as u64;
        let inside = range.start <= range.end && range.end <= self.len();
        let start = self.range.start;
        let (source, stream) = (self.source.clone(), self.stream.clone());
        inside.then(|| Region { source, range: start + range.start..start + range.end, stream })
    }

    /// Returns this region, to be read through a stream while an op runs. Bytes of the program's own stay in
    /// memory.
    pub fn through(&self, stream: &Arc<Stream>) -> Region {
        Region { stream: self.source.file().map(|_| stream.clone()), ..self.clone() }
    }

    /// The stream through which an op reads the region.
    pub fn stream(&self) -> Option<&Arc<Stream>> {
        self.stream.as_ref()
    }

    /// The range in its source.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
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
