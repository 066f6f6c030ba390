//! Measures a machine's peak rates, the ceilings of the roofline model (Williams, Waterman & Patterson 2009).
//!
//! Three loops that do one thing only: reading memory, fused multiply-adds in registers, integer dot products
//! in registers. They use the operations of [`Isa`] that kernels are made of, so their rates are what a
//! perfect kernel would have on this instruction set, not what other instructions might give.

#![allow(clippy::needless_range_loop, reason = "loops by index over vectors are what inlines; see `isa`")]

use core::hint::black_box;

use crate::isa::{Isa, WithIsa, kernels};

/// Bytes that [`Read`] reads between two looks at its loop counter.
pub const READ_BYTES: usize = 512;

/// Places of a buffer that are read in turns, as kernels read several rows: memory gives more than to one
/// reader.
const STREAMS: usize = 4;

/// A kernel: adds up all vectors of a buffer, several times over. What is left after a multiple of four runs
/// is not read.
#[derive(Debug, Clone, Copy)]
pub struct Read<'a> {
    /// The buffer; it is read fastest at an address that is a multiple of 64.
    pub runs: &'a [[u8; READ_BYTES]],
    /// How often it is read.
    pub passes: u64,
}

kernels!(Read<'_>, Fma, Dot);

impl WithIsa for Read<'_> {
    /// Bytes read.
    type Out = u64;
    #[inline(always)]
    fn call<I: Isa>(self, isa: I) -> u64 {
        let part = self.runs.len() / STREAMS;
        let mut acc = [isa.splat_i(0); READ_BYTES / 64];
        for _ in 0..self.passes {
            let (low, high) = black_box(self.runs).split_at(2 * part);
            let ((a, b), (c, d)) = (low.split_at(part), high.split_at(part));
            for (((a, b), c), d) in a.iter().zip(b).zip(c).zip(d) {
                for run in [a, b, c, d] {
                    let lines = run.as_chunks::<64>().0;
                    for i in 0..acc.len() {
                        acc[i] = isa.add_i(acc[i], isa.load_words(&lines[i]));
                    }
                }
            }
        }
        keep(isa, acc);
        (STREAMS * part * READ_BYTES) as u64 * self.passes
    }
}

/// Independent sums of the arithmetic loops: enough to hide an operation's latency, and few enough for the
/// registers. Vectors are half as wide where there are no wide tiles, so there are twice as many of them.
const WIDE_SUMS: usize = 12;
const SUMS: usize = 5;

/// A kernel: fused multiply-adds whose operands stay in registers.
#[derive(Debug, Clone, Copy)]
pub struct Fma {
    /// Turns of the loop.
    pub passes: u64,
}

/// A kernel: dot products of bytes whose operands stay in registers or, where those are few, in the first
/// cache.
#[derive(Debug, Clone, Copy)]
pub struct Dot {
    /// Turns of the loop.
    pub passes: u64,
}

impl WithIsa for Fma {
    /// Operations done; a multiply-add is two.
    type Out = u64;
    #[inline(always)]
    fn call<I: Isa>(self, isa: I) -> u64 {
        let work = if I::WIDE_TILES { fma::<I, WIDE_SUMS> } else { fma::<I, SUMS> };
        work(isa, self.passes)
    }
}

impl WithIsa for Dot {
    /// Operations done; a multiply-add is two.
    type Out = u64;
    #[inline(always)]
    fn call<I: Isa>(self, isa: I) -> u64 {
        let work = if I::WIDE_TILES { dot::<I, WIDE_SUMS> } else { dot::<I, SUMS> };
        work(isa, self.passes)
    }
}

#[inline(always)]
fn fma<I: Isa, const N: usize>(isa: I, passes: u64) -> u64 {
    // Sums go towards 2: no infinity, nothing denormal.
    let (half, one) = (isa.splat(black_box(0.5)), isa.splat(black_box(1.0)));
    let mut acc = [one; N];
    for i in 0..N {
        acc[i] = isa.splat(black_box(i as f32));
    }
    for _ in 0..passes {
        for i in 0..N {
            acc[i] = isa.fma(acc[i], half, one);
        }
    }
    black_box(&acc);
    2 * 16 * N as u64 * passes
}

#[inline(always)]
fn dot<I: Isa, const N: usize>(isa: I, passes: u64) -> u64 {
    // Every dot is 0, so that no sum overflows, but the compiler knows neither side.
    let mut x = [1u8; 64];
    for pair in x.as_chunks_mut::<2>().0 {
        pair[1] = -1i8 as u8;
    }
    let mut codes = [isa.splat_i(0); N];
    for i in 0..N {
        codes[i] = isa.splat_i(black_box(0x0101_0101 * i as i32));
    }
    let mut acc = [isa.splat_i(0); N];
    for _ in 0..passes {
        // Read anew each turn: where a dot takes several instructions, none can move out of the loop.
        let x = isa.load_words(black_box(&x));
        for i in 0..N {
            acc[i] = isa.dot4::<false>(acc[i], codes[i], x);
        }
    }
    keep(isa, acc);
    2 * 4 * 16 * N as u64 * passes
}

/// Makes the compiler believe that sums are needed, from here on only: sums that it can see have an address
/// are stored each turn.
#[inline(always)]
fn keep<I: Isa, const N: usize>(isa: I, acc: [I::I; N]) {
    let mut sum = isa.splat_i(0);
    for i in 0..N {
        sum = isa.add_i(sum, acc[i]);
    }
    let mut words = [0; 64];
    isa.store_words(sum, &mut words);
    black_box(words);
}

#[cfg(feature = "std")]
pub use measure::{copy_bytes_per_s, dots_per_s, flops_per_s, read_bytes_per_s};

#[cfg(feature = "std")]
mod measure {
    use std::hint::black_box;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Mutex, PoisonError};
    use std::time::{Duration, Instant};

    use super::{Dot, Fma, READ_BYTES, Read};
    use crate::isa::Cpu;
    use crate::pool::Pool;

    /// Minimum time of a measurement: a shorter one measures the start of threads.
    const SHORTEST: Duration = Duration::from_millis(5);
    /// Time to search for the best measurement.
    const SEARCH: Duration = Duration::from_millis(400);

    /// Bytes per second that all threads of `pool` together read of a buffer, each its own part again and
    /// again. A buffer of some KiB a thread measures the first cache, one that no cache holds the memory.
    pub fn read_bytes_per_s(cpu: Cpu, pool: &Pool, buffer: &[u8]) -> f64 {
        // Vectors that straddle cache lines would take two reads each.
        let runs = buffer.get(buffer.as_ptr().align_offset(64)..).unwrap_or(&[]).as_chunks::<READ_BYTES>().0;
        let part = runs.len() / pool.threads();
        peak(pool, |task, passes| cpu.run(Read { runs: &runs[task * part..(task + 1) * part], passes }))
    }

    /// Bytes per second that all threads of `pool` together copy from one half of their parts of a buffer to
    /// the other: as many are read as are written.
    pub fn copy_bytes_per_s(pool: &Pool, buffer: &mut [u8]) -> f64 {
        let part = (buffer.len() / pool.threads()).max(2);
        let parts: Vec<_> = buffer.chunks_exact_mut(part).map(Mutex::new).collect();
        peak(pool, |task, passes| {
            let Some(part) = parts.get(task) else { return 0 };
            // Each thread has its own: nobody waits.
            let mut part = part.lock().unwrap_or_else(PoisonError::into_inner);
            let half = part.len() / 2;
            let (from, to) = part.split_at_mut(half);
            for _ in 0..passes {
                black_box(&mut *to)[..half].copy_from_slice(black_box(from));
            }
            half as u64 * passes
        })
    }

    /// Floating-point operations per second of fused multiply-adds, on all threads of `pool` together; a
    /// multiply-add is two.
    pub fn flops_per_s(cpu: Cpu, pool: &Pool) -> f64 {
        peak(pool, |_, passes| cpu.run(Fma { passes }))
    }

    /// Integer operations per second of byte dot products, on all threads of `pool` together; a multiply-add
    /// is two.
    pub fn dots_per_s(cpu: Cpu, pool: &Pool) -> f64 {
        peak(pool, |_, passes| cpu.run(Dot { passes }))
    }

    /// The best rate of `work(task, passes)`, which returns the work done, over all threads.
    fn peak(pool: &Pool, work: impl Fn(usize, u64) -> u64 + Sync) -> f64 {
        let (mut passes, mut best, search) = (1u64, 0.0f64, Instant::now());
        loop {
            let done = AtomicU64::new(0);
            let start = Instant::now();
            pool.run(pool.threads(), &|task| {
                done.fetch_add(work(task, passes), Ordering::Relaxed);
            });
            let elapsed = start.elapsed();
            if elapsed >= SHORTEST {
                best = best.max(done.into_inner() as f64 / elapsed.as_secs_f64());
            } else {
                passes = passes.saturating_mul(2);
            }
            if search.elapsed() >= SEARCH {
                return best;
            }
        }
    }
}
