//! Atomic file writes.
//!
//! An [`Output`] writes to a temporary file in the target's folder. [`Output::commit`] syncs it to disk and
//! renames it to the target, with the target's permissions. Until then the target stays unchanged, whatever
//! goes wrong.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::error::{Error, Result};

/// What an output may replace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Replace {
    /// No file: the target must not exist.
    Nothing,
    /// A file of the same kind, which starts with these bytes after white space, or an empty file.
    StartingWith(&'static [u8], &'static str),
    /// A file that is not a model or a saved sequence: for outputs without a magic number.
    Unmarked,
}

/// First bytes and names of files that hold a model or a sequence.
const MODEL: (&[u8], &str) = (b"GGUF", "a model");
const SEQUENCE: (&[u8], &str) = (b"HALITEKV", "a saved sequence");

impl Replace {
    /// A saved sequence.
    pub const SAVED_SEQUENCE: Replace = Replace::StartingWith(SEQUENCE.0, SEQUENCE.1);
}

/// A file being written.
#[derive(Debug)]
pub struct Output {
    target: PathBuf,
    /// `None` if the target is not a regular file, such as a pipe, which is written directly.
    replace: Option<Replace>,
    file: BufWriter<Sink>,
}

#[derive(Debug)]
enum Sink {
    Beside(NamedTempFile),
    Direct(File),
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Sink::Beside(file) => file.as_file_mut().write(bytes),
            Sink::Direct(file) => file.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Checks that a file may be written, before the work for it starts. `inputs` are the work's input files;
/// none of them may be the target.
///
/// # Errors
/// [`Error::Output`] if the file may not be replaced, [`Error::Io`] if it cannot be examined.
pub fn check(target: &Path, replace: Replace, inputs: &[&Path]) -> Result<()> {
    let refused = |why: String| Err(Error::Output { path: target.to_owned(), why });
    let io = |source| Error::Io { path: target.to_owned(), source };
    let metadata = match std::fs::metadata(target) {
        Ok(metadata) => metadata,
        // Do not follow a dangling link.
        Err(e) if e.kind() == io::ErrorKind::NotFound && std::fs::symlink_metadata(target).is_err() => {
            let folder = folder(target);
            return match folder.is_dir() {
                true => Ok(()),
                false => refused(format!("there is no folder {}", folder.display())),
            };
        }
        Err(e) => return Err(io(e)),
    };
    if metadata.is_dir() {
        return refused("it is a folder".into());
    }
    if !metadata.is_file() {
        return Ok(());
    }
    let same = |input: &&&Path| {
        let place = |path: &Path| path.canonicalize().ok();
        place(input).is_some_and(|input| place(target) == Some(input))
    };
    if let Some(input) = inputs.iter().find(same) {
        return refused(format!("it is the input {}", input.display()));
    }
    let mut start = Vec::new();
    let read = File::open(target).and_then(|file| file.take(64).read_to_end(&mut start));
    match replace {
        Replace::Nothing => return refused("it exists already".into()),
        // A file that cannot be read is not known to be of the kind.
        _ if read.is_err() => return read.map(drop).map_err(io),
        Replace::StartingWith(mark, kind) => {
            let start = start.trim_ascii_start();
            if !start.is_empty() && !start.starts_with(mark) {
                return refused(format!("it exists and is not {kind}; remove it, or choose another name"));
            }
        }
        Replace::Unmarked => {
            if let Some((_, kind)) = [MODEL, SEQUENCE].iter().find(|(mark, _)| start.starts_with(mark)) {
                return refused(format!("it exists and is {kind}; remove it, or choose another name"));
            }
        }
    }
    Ok(())
}

impl Output {
    /// Starts to write a file, after [`check`].
    ///
    /// # Errors
    /// As [`check`]; [`Error::Io`] if no temporary file can be created beside the target.
    pub fn create(target: &Path, replace: Replace, inputs: &[&Path]) -> Result<Output> {
        check(target, replace, inputs)?;
        // Write to the target of a link, and keep the link.
        let target = target.canonicalize().unwrap_or_else(|_| target.to_owned());
        let io = |source| Error::Io { path: target.clone(), source };
        if target.exists() && !target.is_file() {
            let file = File::options().write(true).open(&target).map_err(io)?;
            return Ok(Output { target, replace: None, file: BufWriter::new(Sink::Direct(file)) });
        }
        let mut builder = tempfile::Builder::new();
        builder.prefix(".halite-").suffix(".part");
        // As for any new file, minus the user's mask.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let file = builder.tempfile_in(folder(&target)).map_err(io)?;
        if let Ok(metadata) = std::fs::metadata(&target) {
            file.as_file().set_permissions(metadata.permissions()).map_err(io)?;
        }
        Ok(Output { target, replace: Some(replace), file: BufWriter::new(Sink::Beside(file)) })
    }

    /// The temporary file; `None` if the bytes go directly to the target.
    pub fn temporary(&self) -> Option<&Path> {
        match self.file.get_ref() {
            Sink::Beside(file) => Some(file.path()),
            Sink::Direct(_) => None,
        }
    }

    /// Moves the complete file to the target.
    ///
    /// # Errors
    /// [`Error::Io`]; the target then stays unchanged, and the written bytes are lost.
    pub fn commit(self) -> Result<()> {
        let Output { target, replace, file } = self;
        let io = |source| Error::Io { path: target.clone(), source };
        match file.into_inner().map_err(|e| io(e.into_error()))? {
            Sink::Direct(_) => Ok(()),
            Sink::Beside(file) => {
                // Sync before the rename: otherwise a power cut could lose both files.
                file.as_file().sync_all().map_err(io)?;
                let put = match replace {
                    Some(Replace::Nothing) => file.persist_noclobber(&target),
                    _ => file.persist(&target),
                };
                put.map_err(|e| io(e.error))?;
                // Sync the name itself. Some file systems do not support this; the file is in place all the
                // same.
                #[cfg(unix)]
                let _ = File::open(folder(&target)).and_then(|folder| folder.sync_all());
                Ok(())
            }
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// The folder of a file.
fn folder(file: &Path) -> &Path {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(target: &Path, replace: Replace, bytes: &[u8]) -> Result<()> {
        let mut out = Output::create(target, replace, &[])?;
        out.write_all(bytes).unwrap();
        out.commit()
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    const KIND: Replace = Replace::SAVED_SEQUENCE;

    #[test]
    fn a_file_is_replaced_whole_or_stays() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("s.kv");
        std::fs::write(folder.path().join("s.kv.part"), "somebody's").unwrap();
        write(&target, KIND, b"HALITEKV one").unwrap();
        // Dropped, not committed.
        let mut out = Output::create(&target, KIND, &[]).unwrap();
        out.write_all(&[0; 100_000]).unwrap();
        assert_eq!(names(folder.path()).len(), 3);
        drop(out);
        assert_eq!(std::fs::read(&target).unwrap(), b"HALITEKV one");
        write(&target, KIND, b"HALITEKV two").unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"HALITEKV two");
        assert_eq!(names(folder.path()), ["s.kv", "s.kv.part"]);
        assert_eq!(std::fs::read(folder.path().join("s.kv.part")).unwrap(), b"somebody's");
    }

    #[test]
    fn what_is_of_another_kind_or_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let (model, text, empty) = (file("m", b"GGUF..."), file("t", b"words"), file("e", b""));
        let saved = file("s", b"HALITEKV.");
        for (target, replace, allowed) in [
            (&model, KIND, false),
            (&text, KIND, false),
            (&empty, KIND, true),
            (&saved, KIND, true),
            (&model, Replace::Unmarked, false),
            (&saved, Replace::Unmarked, false),
            (&text, Replace::Unmarked, true),
            (&empty, Replace::Nothing, false),
            (&folder.path().to_owned(), Replace::Unmarked, false),
        ] {
            let checked = check(target, replace, &[]);
            assert_eq!(checked.is_ok(), allowed, "{} {replace:?}: {checked:?}", target.display());
        }
        let other = folder.path().join(".").join("s");
        assert!(check(&saved, KIND, &[&model]).is_ok());
        assert!(matches!(check(&saved, KIND, &[&model, &other]), Err(Error::Output { .. })));
    }

    #[cfg(unix)]
    #[test]
    fn permissions_and_links_stay() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let folder = tempfile::tempdir().unwrap();
        let (target, link) = (folder.path().join("a"), folder.path().join("link"));
        write(&target, KIND, b"HALITEKV").unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        let fresh = folder.path().join("fresh");
        File::create(&fresh).unwrap();
        assert_eq!(mode(&target), mode(&fresh));
        std::fs::set_permissions(&target, PermissionsExt::from_mode(0o640)).unwrap();
        symlink("a", &link).unwrap();
        write(&link, KIND, b"HALITEKV 2").unwrap();
        assert_eq!(mode(&target), 0o640);
        assert!(link.symlink_metadata().unwrap().is_symlink());
        assert_eq!(std::fs::read(&target).unwrap(), b"HALITEKV 2");
        // A link to nothing is not written through.
        let lost = folder.path().join("lost");
        symlink("/nonexistent/file", &lost).unwrap();
        assert!(write(&lost, KIND, b"HALITEKV").is_err());
    }

    #[test]
    fn many_writers_leave_one_whole_file() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("s");
        std::thread::scope(|scope| {
            for n in 0..8u8 {
                let target = &target;
                scope.spawn(move || {
                    for _ in 0..20 {
                        write(target, KIND, &[b"HALITEKV", &[n; 50_000][..]].concat()).unwrap();
                    }
                });
            }
        });
        let bytes = std::fs::read(&target).unwrap();
        assert_eq!(bytes.len(), 50_008);
        assert!(bytes[8..].iter().all(|b| *b == bytes[8]));
        assert_eq!(names(folder.path()), ["s"]);
    }
}
