//! The memory that loaded models share.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::engine::Refused;
use crate::replica::Replica;

/// A budget of bytes for all that is loaded. What takes from it is planned before it is allocated.
#[derive(Debug)]
pub(crate) struct Memory {
    limit_bytes: u64,
    used_bytes: Mutex<u64>,
    /// Whom to unload, where room lacks.
    replicas: Mutex<Vec<Weak<Replica>>>,
}

/// Bytes of a budget. They are free again once it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    memory: Arc<Memory>,
    bytes: u64,
}

impl Drop for Share {
    fn drop(&mut self) {
        *self.memory.used() -= self.bytes;
    }
}

impl Memory {
    pub fn new(limit_bytes: Option<u64>) -> Arc<Memory> {
        let (used_bytes, replicas) = Default::default();
        Arc::new(Memory { limit_bytes: limit_bytes.unwrap_or(u64::MAX), used_bytes, replicas })
    }

    fn used(&self) -> MutexGuard<'_, u64> {
        self.used_bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes in use, and the limit.
    pub fn bytes(&self) -> (u64, u64) {
        (*self.used(), self.limit_bytes)
    }

    /// Lets a replica be unloaded for others.
    pub fn share_with(&self, replica: &Arc<Replica>) {
        let mut replicas = self.replicas.lock().unwrap_or_else(PoisonError::into_inner);
        replicas.retain(|replica| replica.strong_count() > 0);
        replicas.push(Arc::downgrade(replica));
    }

    /// The replicas of all models, also of those that a new configuration no longer has.
    pub fn replicas(&self) -> Vec<Arc<Replica>> {
        let replicas = self.replicas.lock().unwrap_or_else(PoisonError::into_inner);
        replicas.iter().filter_map(Weak::upgrade).collect()
    }

    /// Takes bytes, on a thread that may wait; unloads idle replicas if need be, the one that was used longest ago first.
    ///
    /// # Errors
    /// [`Refused::Memory`] if those in use leave too little.
    pub fn take(self: &Arc<Self>, bytes: u64) -> Result<Share, Refused> {
        if bytes > self.limit_bytes {
            return Err(Refused::Memory { need_bytes: bytes, free_bytes: self.limit_bytes });
        }
        loop {
            let free_bytes = {
                let mut used = self.used();
                let free_bytes = self.limit_bytes.saturating_sub(*used);
                if bytes <= free_bytes {
                    *used += bytes;
                    return Ok(Share { memory: self.clone(), bytes });
                }
                free_bytes
            };
            let mut replicas = self.replicas();
            replicas.sort_by_key(|replica| std::cmp::Reverse(replica.idle()));
            let Some(unloaded) = replicas.iter().find_map(|replica| replica.unload()) else {
                return Err(Refused::Memory { need_bytes: bytes, free_bytes });
            };
            unloaded.engine.finish();
        }
    }
}
