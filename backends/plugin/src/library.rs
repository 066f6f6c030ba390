//! A loaded plug-in: the handshake, and its table of calls.

use std::ffi::c_char;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::path::Path;

use halite::kernels::formats::{Activation, Format, Kind};

use crate::abi::*;
use crate::encode::size;

/// Longest name and version of a plug-in, without the zero at the end.
const NAME_BYTES: usize = 63;

/// A library with its calls. It is never unloaded: it may have threads, and others may hold what it exports.
pub struct Library {
    pub calls: HaliteBackend,
    pub name: String,
    pub version: String,
    _library: ManuallyDrop<libloading::Library>,
}

impl Library {
    /// Loads a library, and asks for its calls.
    pub fn load(file: &Path) -> Result<Library, String> {
        if !file.is_file() {
            return Err("there is no such file".into());
        }
        // A name without a folder would be searched for in the system's folders.
        let path = std::path::absolute(file).map_err(|e| e.to_string())?;
        // SAFETY: whoever names a plug-in trusts what it does when it is loaded.
        let library = unsafe { libloading::Library::new(path) };
        let library = ManuallyDrop::new(library.map_err(|e| format!("is not a shared library: {e}"))?);
        // SAFETY: the interface defines the type of this function.
        let entry = unsafe { library.get::<HaliteBackendEntry>("halite_backend") };
        let entry = entry.map_err(|_| "is no plug-in: it does not export `halite_backend`".to_owned())?;
        // SAFETY: the table of the host lives as long as the process.
        let table = unsafe { entry(&HOST) };
        // SAFETY: the interface promises a table that stays valid.
        let calls = unsafe { read_table(table) }?;
        // SAFETY: the interface promises texts that end in a zero.
        let (name, version) = unsafe { (text(calls.name, NAME_BYTES), text(calls.version, NAME_BYTES)) };
        let name = name.map_err(|why| format!("its name {why}"))?;
        let version = version.map_err(|why| format!("its version {why}"))?;
        Ok(Library { calls, name, version, _library: library })
    }
}

/// Copies the table of calls, and checks it.
///
/// # Safety
/// `table` is null, or points to the first field of a table of the size that it states.
unsafe fn read_table(table: *const HaliteBackend) -> Result<HaliteBackend, String> {
    if table.is_null() {
        return Err(format!("does not work with version {HALITE_ABI_VERSION} of the interface"));
    }
    if !table.is_aligned() {
        return Err("`halite_backend` returned an address that is not aligned".into());
    }
    // SAFETY: the two fields are at the same place in every version.
    let (bytes, version) = unsafe { ((*table).struct_bytes as usize, (*table).abi_version) };
    if version != HALITE_ABI_VERSION {
        return Err(format!("is of version {version} of the interface, expected {HALITE_ABI_VERSION}"));
    }
    let most = size_of::<HaliteBackend>();
    if !(16..=16 * most).contains(&bytes) {
        return Err(format!("its table has {bytes} bytes, expected {most}"));
    }
    // A smaller table is that of an older plug-in, which does not have the last calls.
    let mut calls = MaybeUninit::<HaliteBackend>::zeroed();
    // SAFETY: both have so many bytes, and zero is valid for every field.
    let calls = unsafe {
        std::ptr::copy_nonoverlapping(table.cast::<u8>(), calls.as_mut_ptr().cast(), bytes.min(most));
        calls.assume_init()
    };
    let required = [
        ("open", calls.open.is_some()),
        ("close", calls.close.is_some()),
        ("caps", calls.caps.is_some()),
        ("supports", calls.supports.is_some()),
        ("alloc", calls.alloc.is_some()),
        ("release", calls.release.is_some()),
        ("write", calls.write.is_some()),
        ("read", calls.read.is_some()),
        ("prepare", calls.prepare.is_some()),
        ("free_plan", calls.free_plan.is_some()),
        ("scratch_bytes", calls.scratch_bytes.is_some()),
        ("submit", calls.submit.is_some()),
        ("wait", calls.wait.is_some()),
    ];
    let missing: Vec<_> = required.iter().filter(|(_, there)| !there).map(|(name, _)| *name).collect();
    if missing.is_empty() { Ok(calls) } else { Err(format!("its table lacks {}", missing.join(", "))) }
}

/// Reads a text of at most `most` bytes.
///
/// # Safety
/// `text` is null, or points to bytes up to a zero.
pub unsafe fn text(text: *const c_char, most: usize) -> Result<String, String> {
    if text.is_null() {
        return Err("is missing".into());
    }
    let mut bytes = Vec::new();
    for at in 0..=most {
        // SAFETY: no zero was found before.
        match unsafe { *text.add(at) } as u8 {
            0 if bytes.is_empty() => return Err("is empty".into()),
            0 => {
                let text = String::from_utf8(bytes).map_err(|_| "is not UTF-8".to_owned())?;
                let bad = text.chars().any(char::is_control);
                return if bad { Err("has control characters".into()) } else { Ok(text) };
            }
            byte => bytes.push(byte),
        }
    }
    Err(format!("is longer than {most} bytes"))
}

/// What plug-ins get from this host.
static HOST: HaliteHost = HaliteHost {
    struct_bytes: size::<HaliteHost>(),
    abi_version: HALITE_ABI_VERSION,
    dequantize: Some(dequantize),
    row_bytes: Some(row_bytes),
    block_len: Some(block_len),
    activation_format: Some(activation_format),
};

unsafe extern "C" fn dequantize(
    format: HaliteFormat,
    blocks: *const u8,
    out: *mut f32,
    count: u64,
) -> HaliteStatus {
    let bytes = row_bytes(format, count) as usize;
    let Ok(format) = Format::from_id(format) else { return HALITE_ARGUMENT };
    if count == 0 {
        return HALITE_OK;
    }
    if blocks.is_null() || out.is_null() || bytes == 0 {
        return HALITE_ARGUMENT;
    }
    // SAFETY: the interface asks for that many bytes and elements.
    let (blocks, out) = unsafe {
        (std::slice::from_raw_parts(blocks, bytes), std::slice::from_raw_parts_mut(out, count as usize))
    };
    if format.dequantize(blocks, out).is_ok() { HALITE_OK } else { HALITE_ARGUMENT }
}

extern "C" fn block_len(format: HaliteFormat) -> u32 {
    Format::from_id(format).map_or(0, |format| format.block_len() as u32)
}

extern "C" fn activation_format(format: HaliteFormat) -> HaliteFormat {
    match Format::from_id(format).map(Format::kind) {
        Ok(Kind::Quantised { activation: Activation::Q8_0, .. }) => Format::Q8_0.id(),
        Ok(Kind::Quantised { activation: Activation::Q8_K, .. }) => Format::Q8_K.id(),
        _ => HALITE_F32,
    }
}

extern "C" fn row_bytes(format: HaliteFormat, count: u64) -> u64 {
    let Ok(format) = Format::from_id(format) else { return 0 };
    let Ok(count) = usize::try_from(count) else { return 0 };
    format.row_bytes(count).map_or(0, |bytes| bytes as u64)
}
