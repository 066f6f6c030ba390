//! Compiled shaders on disk, where the API has them (Vulkan): a file for each device, in a folder that the user names.
//!
//! | Bytes | What |
//! |---|---|
//! | 8 | `HALITESH` |
//! | 4 | version: 1 |
//! | 8 | the device: XXH3 of its name, its driver and the API |
//! | rest | what the driver gave |
//! | 8 | XXH3 of everything before |
//!
//! The hashes find accidents: a damaged file, or one of another driver, which is then as good as none. They have no key, and a
//! driver may trust what it is given: whoever may write to the folder may run code in this process.

use std::hash::Hasher as _;
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use twox_hash::xxhash3_64::Hasher;

use super::failed;
use halite::error::{Error, Result};
use halite::output::{Output, Replace};

/// Compiled shaders of a device, and where they are kept.
#[derive(Debug)]
pub(super) struct Cache {
    cache: wgpu::PipelineCache,
    file: PathBuf,
    /// Tells devices and their drivers apart.
    device: u64,
    /// Checksum of what the driver gave for the file, if there is one.
    kept: Mutex<Option<u64>>,
}

const MAGIC: &[u8; 8] = b"HALITESH";
const VERSION: u32 = 1;

/// Most bytes of a file that are read.
const MAX_BYTES: u64 = 256 << 20;

fn checksum(bytes: &[u8]) -> u64 {
    let mut hasher = Hasher::new();
    hasher.write(bytes);
    hasher.finish()
}

/// How a device's file starts.
fn head(device: u64) -> Vec<u8> {
    [&MAGIC[..], &VERSION.to_le_bytes(), &device.to_le_bytes()].concat()
}

/// A device's file.
fn file_of(device: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = head(device);
    bytes.extend_from_slice(data);
    let sum = checksum(&bytes);
    bytes.extend_from_slice(&sum.to_le_bytes());
    bytes
}

/// What the driver gave, if a file is whole and the device's.
fn whole(device: u64, bytes: &[u8]) -> Option<&[u8]> {
    let (start, sum) = bytes.split_last_chunk()?;
    let data = start.strip_prefix(&head(device)[..])?;
    (checksum(start) == u64::from_le_bytes(*sum)).then_some(data)
}

impl Cache {
    /// Reads what the folder has for a device. What is damaged there is as good as nothing.
    ///
    /// # Errors
    /// [`Error::Io`] if a file is there and cannot be read, [`Error::Backend`] if the device has no such thing.
    pub fn open(device: &wgpu::Device, info: &wgpu::AdapterInfo, folder: &Path) -> Result<Cache> {
        let key = wgpu::util::pipeline_cache_key(info)
            .filter(|_| device.features().contains(wgpu::Features::PIPELINE_CACHE))
            .ok_or_else(|| failed(format!("{} keeps no compiled shaders ({:?})", info.name, info.backend)))?;
        let file = folder.join(key);
        let io = |source| Error::Io { path: file.clone(), source };
        let mut bytes = Vec::new();
        match std::fs::metadata(&file) {
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            // What is no file, or too long, is as good as none.
            Ok(metadata) if !metadata.is_file() || metadata.len() > MAX_BYTES => {}
            _ => bytes = std::fs::read(&file).map_err(io)?,
        }
        let about = format!("{info:?}");
        let id = checksum(about.as_bytes());
        let kept = whole(id, &bytes);
        let descriptor = wgpu::PipelineCacheDescriptor {
            label: Some("halite"),
            data: kept,
            // What is of another driver is left.
            fallback: true,
        };
        // SAFETY: the data is what `PipelineCache::get_data` returned, as the checksum shows, or somebody with the right to write
        // to the folder has taken pains to forge it.
        #[allow(unsafe_code)]
        let cache = unsafe { device.create_pipeline_cache(&descriptor) };
        Ok(Cache { cache, file, device: id, kept: Mutex::new(kept.map(checksum)) })
    }

    pub fn of_pipelines(&self) -> &wgpu::PipelineCache {
        &self.cache
    }

    /// Writes what was compiled, if something was. Others may do so at the same time: the last one stays.
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
