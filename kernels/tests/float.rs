//! The host's floating-point environment never shows in a result, and is left as it was.
#![cfg(all(feature = "std", any(target_arch = "x86_64", target_arch = "aarch64")))]

use halite_kernels::float::DefaultFloats;
use halite_kernels::formats::F16;
use halite_kernels::pool::Pool;

#[path = "common/environments.rs"]
mod environments;
use environments::{ENVIRONMENTS, control, set_control};

/// What no compiler computes ahead of time.
fn opaque<T>(x: T) -> T {
    std::hint::black_box(x)
}

/// A quotient that rounds, and a product of a subnormal. Not inlined, or it might be computed in another environment than where
/// it stands.
#[inline(never)]
fn probe() -> (u32, u32) {
    ((opaque(1.0f32) / opaque(-3.0)).to_bits(), (opaque(f32::from_bits(3)) * opaque(2.0)).to_bits())
}

/// The environment as the library sets and restores it.
#[test]
fn every_environment_becomes_the_default_and_comes_back() {
    let want = probe();
    let mut differ = 0;
    for &(name, environment) in ENVIRONMENTS {
        let host = control();
        set_control(environment);
        let outside = probe();
        let guard = DefaultFloats::set();
        let inside = probe();
        drop(guard);
        let (after, left) = (probe(), control());
        set_control(host);
        assert_eq!(inside, want, "{name}");
        assert_eq!((after, left), (outside, environment), "{name}");
        differ += u32::from(outside != want);
    }
    assert!(differ >= 3, "the environments are seen by the probe");
}

#[test]
fn workers_and_the_caller_compute_alike() {
    let want = probe();
    for &(name, environment) in ENVIRONMENTS {
        let host = control();
        set_control(environment);
        // Threads inherit the environment of the thread that starts them.
        let pool = Pool::new(3).unwrap();
        let found = std::sync::Mutex::new(Vec::new());
        pool.run(64, &|_| {
            std::thread::yield_now();
            found.lock().unwrap().push(probe());
        });
        let left = control();
        set_control(host);
        assert_eq!(found.into_inner().unwrap(), [want; 64], "{name}");
        assert_eq!(left, environment, "{name}");
    }
}

#[test]
fn half_precision_is_the_same_in_every_environment() {
    let floats: Vec<f32> =
        (0..=u16::MAX).map(|bits| f32::from_bits(u32::from(bits) << 16 | u32::from(bits) & 0x7fff)).collect();
    let all = || {
        let values = (0..=u16::MAX).map(|bits| opaque(F16::from_bits(bits)));
        let values = values.map(|x| halite_kernels::math::f16_to_f32(x.to_bits()).to_bits());
        let back = floats.iter().map(|&x| u32::from(F16::from_f32(opaque(x)).to_bits()));
        values.chain(back).collect::<Vec<_>>()
    };
    let want = all();
    for &(name, environment) in ENVIRONMENTS {
        let host = control();
        set_control(environment);
        let got = all();
        set_control(host);
        assert!(got == want, "{name}");
    }
}

/// Ties of f32, values next to them, subnormal results, overflow and what is not finite.
#[test]
fn multiplications_and_additions_are_rounded_once() {
    let mut state = 1u64;
    let mut draw = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 32) as u32
    };
    let check = |a: f32, b: f32, c: f32| {
        let want = a.mul_add(b, c);
        for got in [halite_kernels::math::fma(a, b, c), halite_kernels::math::fma_by_integers(a, b, c)] {
            assert!(
                got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(),
                "{a:e} {b:e} {c:e}: {got:e}, {want:e}"
            );
        }
    };
    for _ in 0..2_000_000 {
        check(f32::from_bits(draw()), f32::from_bits(draw()), f32::from_bits(draw()));
        // Exponents that meet, and a product that is a power of two: half of the last place of `c`, or nearly.
        let near = |bits: u32, exponent: u32| f32::from_bits(bits & 0x807f_ffff | exponent << 23);
        let (e, c) = (draw() % 250 + 2, draw());
        check(near(draw(), 127), near(draw(), e), near(c, (e + draw() % 5).min(254)));
        let (half, sign) = (draw() % 60, draw() & 0x8000_0000);
        let power = |e: u32, low: u32| f32::from_bits(sign | e << 23 | low);
        check(power(127, draw() % 3), power(100 + half, 0), near(c, (124 + half).min(254)));
        // Subnormal sums.
        check(power(64, draw() % 3), power(40 + half % 30, draw() % 3), f32::from_bits(draw() & 0x80ff_ffff));
    }
}
