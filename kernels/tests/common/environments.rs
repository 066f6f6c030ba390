//! Floating-point environments that a host may have set.

use std::arch::asm;

/// Names and values of the control register: subnormals as zero on the way in and out, and each rounding mode.
#[cfg(target_arch = "x86_64")]
pub const ENVIRONMENTS: &[(&str, u64)] = &[
    ("default", 0x1f80),
    ("denormals are zero", 0x1fc0),
    ("flush to zero", 0x9f80),
    ("both", 0x9fc0),
    ("round down", 0x3f80),
    ("round up", 0x5f80),
    ("round to zero", 0x7f80),
    ("round to zero, both", 0xffc0),
];

/// Names and values of the control register: subnormals as zero, and each rounding mode.
#[cfg(target_arch = "aarch64")]
pub const ENVIRONMENTS: &[(&str, u64)] = &[
    ("default", 0),
    ("flush to zero", 1 << 24),
    ("round up", 1 << 22),
    ("round down", 2 << 22),
    ("round to zero", 3 << 22),
    ("round to zero, flush", 3 << 22 | 1 << 24),
];

/// The thread's control register, without the sticky flags.
#[cfg(target_arch = "x86_64")]
pub fn control() -> u64 {
    let mut control = 0u32;
    // SAFETY: stores four bytes to a place of four bytes.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut control) };
    u64::from(control & 0xffc0)
}

/// Sets the thread's control register.
#[cfg(target_arch = "x86_64")]
pub fn set_control(control: u64) {
    let control = control as u32;
    // SAFETY: the value is one of the above.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const control) };
}

/// The thread's control register.
#[cfg(target_arch = "aarch64")]
pub fn control() -> u64 {
    let control;
    // SAFETY: reads a register that every program may read.
    unsafe { asm!("mrs {}, fpcr", out(reg) control) };
    control
}

/// Sets the thread's control register.
#[cfg(target_arch = "aarch64")]
pub fn set_control(control: u64) {
    // SAFETY: the value is one of the above.
    unsafe { asm!("msr fpcr, {}", in(reg) control) };
}
