//! Compiled shaders on disk, where the API has them (Vulkan): a file for each device, in a folder that the user names.
//!
//! A file is what the driver gave, and its checksum. Another driver, or another version, makes nothing of it; wgpu sees to that.

use std::hash::Hasher as _;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use twox_hash::xxhash3_64::Hasher;

use super::failed;
use crate::error::{Error, Result};

/// Compiled shaders of a device, and where they are kept.
#[derive(Debug)]
pub(super) struct Cache {
    cache: wgpu::PipelineCache,
    file: PathBuf,
    /// Checksum of what the file holds.
    kept: Mutex<u64>,
}

fn checksum(bytes: &[u8]) -> u64 {
    let mut hasher = Hasher::new();
    hasher.write(bytes);
    hasher.finish()
}

/// What a file holds, and its checksum, if it is whole.
fn whole(bytes: &[u8]) -> Option<(&[u8], u64)> {
    let (data, sum) = bytes.split_last_chunk()?;
    let sum = u64::from_le_bytes(*sum);
    (checksum(data) == sum).then_some((data, sum))
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
        let bytes = match std::fs::read(&file) {
            Err(e) if e.kind() == ErrorKind::NotFound => Vec::new(),
            read => read.map_err(|source| Error::Io { path: file.clone(), source })?,
        };
        let kept = whole(&bytes);
        let descriptor = wgpu::PipelineCacheDescriptor {
            label: Some("halite"),
            data: kept.map(|kept| kept.0),
            // What is of another driver is left.
            fallback: true,
        };
        // SAFETY: the data is what `PipelineCache::get_data` returned, as the checksum shows, or somebody with the right to write
        // to the folder has taken pains to forge it.
        #[allow(unsafe_code)]
        let cache = unsafe { device.create_pipeline_cache(&descriptor) };
        Ok(Cache { cache, file, kept: Mutex::new(kept.map_or(0, |kept| kept.1)) })
    }

    pub fn of_pipelines(&self) -> &wgpu::PipelineCache {
        &self.cache
    }

    /// Writes what was compiled, if something was. Others may do so at the same time: the last one stays.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn keep(&self) -> Result<()> {
        let Some(mut data) = self.cache.get_data() else { return Ok(()) };
        let sum = checksum(&data);
        let mut kept = self.kept.lock().map_err(|_| failed("a thread failed while it kept shaders"))?;
        if *kept == sum {
            return Ok(());
        }
        data.extend_from_slice(&sum.to_le_bytes());
        let written = self.file.with_extension(std::process::id().to_string());
        let put = || {
            if let Some(folder) = self.file.parent() {
                std::fs::create_dir_all(folder)?;
            }
            std::fs::write(&written, &data)?;
            std::fs::rename(&written, &self.file)
        };
        put().map_err(|source| Error::Io { path: self.file.clone(), source })?;
        *kept = sum;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{checksum, whole};

    #[test]
    fn what_is_not_whole_is_nothing() {
        let mut bytes = b"compiled".to_vec();
        let sum = checksum(&bytes);
        bytes.extend_from_slice(&sum.to_le_bytes());
        assert_eq!(whole(&bytes), Some((&b"compiled"[..], sum)));
        for at in 0..bytes.len() {
            assert_eq!(whole(&bytes[..at]), None, "cut at {at}");
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            assert_eq!(whole(&flipped), None, "flipped at {at}");
        }
    }
}
