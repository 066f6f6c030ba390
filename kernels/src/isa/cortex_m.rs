//! Instructions of Cortex-M that `core` lacks.

/// The floating-point unit's multiply-add. (Cortex-R, which has 64-bit atomics, may lack it.) Rust does not yet let `asm!`
/// name the unit's registers, so this is a function in assembler.
#[cfg(all(target_abi = "eabihf", not(target_has_atomic = "64")))]
pub mod fpu {
    core::arch::global_asm!(
        ".pushsection .text.halite_fma, \"ax\", %progbits",
        ".fpu fpv4-sp-d16",
        ".weak halite_fma",
        ".type halite_fma, %function",
        ".thumb_func",
        "halite_fma:",
        "vfma.f32 s2, s0, s1",
        "vmov.f32 s0, s2",
        "bx lr",
        ".popsection",
    );

    unsafe extern "C" {
        // SAFETY: arithmetic on its arguments, in registers that a call may change. Every Cortex-M that passes f32 in
        // registers has FPv4 or FPv5, which have the instruction.
        safe fn halite_fma(a: f32, b: f32, c: f32) -> f32;
    }

    /// `a * b + c`, rounded once.
    #[inline(always)]
    pub fn fma(a: f32, b: f32, c: f32) -> f32 {
        halite_fma(a, b, c)
    }
}

/// The dot product of sixteen codes with sixteen others: two products an instruction.
#[cfg(feature = "dsp")]
#[inline(always)]
pub fn dot(w: &[i8; 16], x: &[i8; 16]) -> i32 {
    let mut sum = 0;
    for (w, x) in w.as_chunks::<4>().0.iter().zip(x.as_chunks::<4>().0) {
        let (w, x) = (w.map(|code| code as u8), x.map(|code| code as u8));
        // SAFETY: arithmetic on registers; the feature promises the instructions.
        unsafe {
            core::arch::asm!(
                "sxtb16 {a}, {w}",
                "sxtb16 {b}, {x}",
                "smlad {sum}, {a}, {b}, {sum}",
                "sxtb16 {a}, {w}, ror #8",
                "sxtb16 {b}, {x}, ror #8",
                "smlad {sum}, {a}, {b}, {sum}",
                w = in(reg) u32::from_le_bytes(w),
                x = in(reg) u32::from_le_bytes(x),
                sum = inout(reg) sum,
                a = out(reg) _,
                b = out(reg) _,
                options(pure, nomem, nostack),
            );
        }
    }
    sum
}
