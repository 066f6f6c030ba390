//! Tries a plug-in in a child process, so that one that crashes takes only the child down.

use std::path::Path;

/// Loads a plug-in in a child process.
///
/// # Errors
/// What loading says, or how the child ended.
#[cfg(not(unix))]
pub fn try_in_a_child(_: &Path) -> Result<(), String> {
    Ok(())
}

/// Loads a plug-in in a child process.
///
/// # Errors
/// What loading says, or how the child ended.
#[cfg(unix)]
pub fn try_in_a_child(file: &Path) -> Result<(), String> {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    use std::time::{Duration, Instant};

    use crate::library::Library;

    /// How long loading may take.
    const LIMIT: Duration = Duration::from_secs(10);
    let system = |what: &str| format!("{what}: {}", std::io::Error::last_os_error());
    let mut ends = [0; 2];
    // SAFETY: `ends` has room for two descriptors.
    if unsafe { libc::pipe(ends.as_mut_ptr()) } != 0 {
        return Err(system("pipe"));
    }
    // SAFETY: nobody else owns the new descriptors.
    let [from_child, to_parent] = ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) });
    // SAFETY: the child loads the library, writes to the pipe and exits; it returns to no caller.
    match unsafe { libc::fork() } {
        -1 => Err(system("fork")),
        0 => {
            if let Err(why) = Library::load(file) {
                let _ = File::from(to_parent).write_all(why.as_bytes());
            }
            // SAFETY: ends the child at once, without the parent's exit handlers.
            unsafe { libc::_exit(0) }
        }
        child => {
            drop(to_parent);
            let end = Instant::now() + LIMIT;
            let mut poll = libc::pollfd { fd: from_child.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // The pipe closes when the child ends, however it ends.
            let ready = loop {
                let left = end.saturating_duration_since(Instant::now()).as_millis() as i32;
                // SAFETY: one descriptor.
                let ready = unsafe { libc::poll(&mut poll, 1, left) };
                if ready >= 0 || std::io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
                    break ready;
                }
            };
            let mut why = String::new();
            if ready > 0 {
                let _ = File::from(from_child).take(4096).read_to_string(&mut why);
            } else {
                // SAFETY: the child is this function's own, and was not waited for.
                unsafe { libc::kill(child, libc::SIGKILL) };
            }
            let mut status = 0;
            // SAFETY: as above.
            while unsafe { libc::waitpid(child, &mut status, 0) } == -1
                && std::io::Error::last_os_error().raw_os_error() == Some(libc::EINTR)
            {}
            match () {
                () if ready <= 0 => Err(format!("loading it took more than {} s", LIMIT.as_secs())),
                () if !why.is_empty() => Err(why),
                () if libc::WIFSIGNALED(status) => {
                    Err(format!("loading it crashed with signal {}", libc::WTERMSIG(status)))
                }
                () if libc::WEXITSTATUS(status) != 0 => {
                    Err(format!("loading it ended the process with status {}", libc::WEXITSTATUS(status)))
                }
                () => Ok(()),
            }
        }
    }
}
