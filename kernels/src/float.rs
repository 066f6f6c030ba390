//! The floating-point environment that every kernel assumes: round to nearest even, subnormals kept, no
//! traps.
//!
//! A host may have another one on its thread. Audio software makes subnormals zero, and interval arithmetic
//! changes the rounding mode. Kernels would then give other bits, and bits that depend on the thread.

use core::marker::PhantomData;

/// Sets the calling thread to the default floating-point environment. Dropping it restores the host's.
#[derive(Debug)]
pub struct DefaultFloats {
    /// The host's control register, if it was not the default.
    host: Option<u64>,
    /// The register belongs to a thread.
    thread: PhantomData<*const ()>,
}

impl DefaultFloats {
    /// Sets the default environment.
    #[inline]
    pub fn set() -> Self {
        let control = control::read();
        let host = (control & control::MODES != control::DEFAULT).then_some(control);
        if host.is_some() {
            control::write(control::DEFAULT);
        }
        DefaultFloats { host, thread: PhantomData }
    }
}

impl Drop for DefaultFloats {
    #[inline]
    fn drop(&mut self) {
        if let Some(host) = self.host {
            control::write(host);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod control {
    use core::arch::asm;

    /// Everything in MXCSR but the sticky exception flags.
    pub const MODES: u64 = 0xffc0;
    /// All exceptions masked, round to nearest, subnormals kept.
    pub const DEFAULT: u64 = 0x1f80;

    #[inline]
    pub fn read() -> u64 {
        let mut control = 0u32;
        // SAFETY: stores four bytes to a place of four bytes; every x86-64 has the instruction.
        unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut control, options(nostack, preserves_flags)) };
        control.into()
    }

    #[inline]
    pub fn write(control: u64) {
        let control = control as u32;
        // SAFETY: the value is the default or was read from the register, so no reserved bit is set.
        unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const control, options(nostack, preserves_flags)) };
    }
}

#[cfg(target_arch = "aarch64")]
mod control {
    use core::arch::asm;

    /// Everything in FPCR.
    pub const MODES: u64 = u64::MAX;
    /// No traps, round to nearest, subnormals kept, NaNs propagated.
    pub const DEFAULT: u64 = 0;

    #[inline]
    pub fn read() -> u64 {
        let control;
        // SAFETY: reads a register that every program may read.
        unsafe { asm!("mrs {}, fpcr", out(reg) control, options(nostack, preserves_flags)) };
        control
    }

    #[inline]
    pub fn write(control: u64) {
        // SAFETY: the value is the default or was read from the register.
        unsafe { asm!("msr fpcr, {}", in(reg) control, options(nostack, preserves_flags)) };
    }
}

/// Cortex-M with a floating-point unit.
#[cfg(all(target_arch = "arm", target_os = "none", target_abi = "eabihf"))]
mod control {
    use core::arch::asm;

    /// Alternative half precision, default NaN, flush to zero (of f32 and f16), rounding mode in FPSCR.
    pub const MODES: u64 = 0x07c8_0000;
    /// Round to nearest, subnormals kept, NaNs propagated.
    pub const DEFAULT: u64 = 0;

    #[inline]
    pub fn read() -> u64 {
        let control: u32;
        // SAFETY: reads a register that every program may read.
        unsafe { asm!("vmrs {}, fpscr", out(reg) control, options(nostack)) };
        control.into()
    }

    #[inline]
    pub fn write(control: u64) {
        // SAFETY: the value is the default or was read from the register.
        unsafe { asm!("vmsr fpscr, {}", in(reg) control as u32, options(nostack)) };
    }
}

/// Elsewhere there is nothing to set.
#[cfg(not(any(
    target_arch = "x86_64",
    target_arch = "aarch64",
    all(target_arch = "arm", target_os = "none", target_abi = "eabihf")
)))]
mod control {
    pub const MODES: u64 = 0;
    pub const DEFAULT: u64 = 0;

    pub fn read() -> u64 {
        DEFAULT
    }

    pub fn write(_: u64) {}
}
