//! A cache of compiled shaders on disk, where the API supports it (Vulkan): one file per device, in the
//! user's folder.
//!
//! | Bytes | What |
//! |---|---|
//! | 8 | `HALITESH` |
//! | 4 | version: 1 |
//! | 8 | the device: XXH3 of its name, its driver and the API |
//! | rest | the driver's data |
//! | 8 | XXH3 of everything before |
//!
//! The hashes detect accidents: a damaged file, or another driver's, which is then ignored. They have no key,
//! and a driver may trust the data: anyone who can write to the folder may be able to run code in this
//! process.

use std::hash::Hasher as _;
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use twox_hash::xxhash3_64::Hasher;

use super::failed;
use halite::error::{Error, Result};
use halite::output::{Output, Replace};

/// The compiled shaders of a device, and their file.
#[derive(Debug)]
pub(super) struct Cache {
    cache: wgpu::PipelineCache,
    file: PathBuf,
    /// Identifies the device and its driver.
    device: u64,
    /// Checksum of the driver's data in the file, if there is one.
    kept: Mutex<Option<u64>>,
}

const MAGIC: &[u8; 8] = b"HALITESH";
const VERSION: u32 = 1;

/// Maximum bytes of a file.
const MAX_BYTES: u64 = 256 << 20;

fn checksum(bytes: &[u8]) -> u64 {
    let mut hasher = Hasher::new();
    hasher.write(bytes);
    hasher.finish()
}

/// Returns the first bytes of a device's file.
fn head(device: u64) -> Vec<u8> {
    [&MAGIC[..], &VERSION.to_le_bytes(), &device.to_le_bytes()].concat()
}

/// Returns the content of a device's file.
fn file_of(device: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = head(device);
    bytes.extend_from_slice(data);
    let sum = checksum(&bytes);
    bytes.extend_from_slice(&sum.to_le_bytes());
    bytes
}

/// Returns the driver's data in a file, if the file is intact and the device's.
fn whole(device: u64, bytes: &[u8]) -> Option<&[u8]> {
    let (start, sum) = bytes.split_last_chunk()?;
    let data = start.strip_prefix(&head(device)[..])?;
    (checksum(start) == u64::from_le_bytes(*sum)).then_some(data)
}

impl Cache {
    /// Reads a device's file in the folder. Ignores a damaged file.
    ///
    /// # Errors
    /// [`Error::Io`] if the file exists but cannot be read, [`Error::Backend`] if the device does not support
    /// a cache.
    pub fn open(device: &wgpu::Device, info: &wgpu::AdapterInfo, folder: &Path) -> Result<Cache> {
        let key = wgpu::util::pipeline_cache_key(info)
            .filter(|_| device.features().contains(wgpu::Features::PIPELINE_CACHE))
            .ok_or_else(|| {
                failed(format!("{} does not support a shader cache ({:?})", info.name, info.backend))
            })?;
        let file = folder.join(key);
        let io = |source| Error::Io { path: file.clone(), source };
        let mut bytes = Vec::new();
        match std::fs::metadata(&file) {
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            // Ignore anything that is not a regular file, or is too long.
            Ok(metadata) if !metadata.is_file() || metadata.len() > MAX_BYTES => {}
            _ => bytes = std::fs::read(&file).map_err(io)?,
        }
        let about = format!("{info:?}");
        let id = checksum(about.as_bytes());
        let kept = whole(id, &bytes);
        let descriptor = wgpu::PipelineCacheDescriptor {
            label: Some("halite"),
            data: kept,
            // Ignore another driver's data.
            fallback: true,
        };
        // SAFETY: `PipelineCache::get_data` returned the data, as the checksum shows, unless somebody with
        // write access to the folder forged it on purpose.
        #[allow(unsafe_code)]
        let cache = unsafe { device.create_pipeline_cache(&descriptor) };
        Ok(Cache { cache, file, device: id, kept: Mutex::new(kept.map(checksum)) })
    }

    pub fn of_pipelines(&self) -> &wgpu::PipelineCache {
        &self.cache
    }

    /// Writes the compiled shaders, if there are new ones. If others write at the same time, the last one
    /// wins.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn keep(&self) -> Result<()> {
        let Some(data) = self.cache.get_data() else { return Ok(()) };
        let sum = Some(checksum(&data));
        let mut kept = self.kept.lock().map_err(|_| failed("a thread failed while it kept shaders"))?;
        if *kept == sum {
            return Ok(());
        }
        let io = |source| Error::Io { path: self.file.clone(), source };
        if let Some(folder) = self.file.parent() {
            std::fs::create_dir_all(folder).map_err(io)?;
        }
        let mut out = Output::create(&self.file, Replace::Unmarked, &[])?;
        out.write_all(&file_of(self.device, &data)).map_err(io)?;
        out.commit()?;
        *kept = sum;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{file_of, whole};

    #[test]
    fn what_is_not_whole_is_nothing() {
        let bytes = file_of(7, b"compiled");
        assert_eq!(whole(7, &bytes), Some(&b"compiled"[..]));
        assert_eq!(whole(8, &bytes), None);
        for at in 0..bytes.len() {
            assert_eq!(whole(7, &bytes[..at]), None, "cut at {at}");
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            assert_eq!(whole(7, &flipped), None, "flipped at {at}");
        }
    }
}
