//! What formats have in common: formats of one shape share the code that multiplies their expanded tiles.

use super::Activation;

/// How a format's codes are scaled, and what their bytes are in kernels.
pub trait Shape {
    /// The format to which activations are quantised for a dot product.
    const ACTIVATION: Activation;
    /// Values that share one f32 scale, and so one fused multiply-add in a dot product.
    const GROUP: usize;
    /// Values that share one integer sub-scale, where `GROUP` is 256; 256: it is one for all.
    const SUB: usize;
    /// Whether the code bytes in kernels are signed; unsigned ones are at most 127.
    const SIGNED: bool;
    /// The number by which code bytes in kernels exceed the codes.
    const OFFSET: i32;
    /// Whether values have a minimum added.
    const HAS_MIN: bool;
}

/// Short blocks: an f32 scale for each `LEN` values.
#[derive(Debug)]
pub struct Groups<const LEN: usize, C>(core::marker::PhantomData<C>);

/// Super-blocks: an f32 scale for 256 values, an integer sub-scale for each `SUB` of them.
#[derive(Debug)]
pub struct SuperBlock<const SUB: usize, C>(core::marker::PhantomData<C>);

/// What codes are in kernels.
pub trait Codes {
    /// See [`Shape::SIGNED`].
    const SIGNED: bool = false;
    /// See [`Shape::OFFSET`].
    const OFFSET: i32 = 0;
    /// See [`Shape::HAS_MIN`].
    const HAS_MIN: bool = false;
}

/// Signed codes.
#[derive(Debug)]
pub struct Signed;

impl Codes for Signed {
    const SIGNED: bool = true;
}

/// Signed codes that are raised by `OFFSET`, and so unsigned.
#[derive(Debug)]
pub struct Raised<const OFFSET: i32>;

impl<const OFFSET: i32> Codes for Raised<OFFSET> {
    const OFFSET: i32 = OFFSET;
}

/// Unsigned codes, and a minimum.
#[derive(Debug)]
pub struct WithMin;

impl Codes for WithMin {
    const HAS_MIN: bool = true;
}

impl<const LEN: usize, C: Codes> Shape for Groups<LEN, C> {
    const ACTIVATION: Activation = Activation::Q8_0;
    const GROUP: usize = LEN;
    const SUB: usize = LEN;
    const SIGNED: bool = C::SIGNED;
    const OFFSET: i32 = C::OFFSET;
    const HAS_MIN: bool = C::HAS_MIN;
}

impl<const SUB: usize, C: Codes> Shape for SuperBlock<SUB, C> {
    const ACTIVATION: Activation = Activation::Q8_K;
    const GROUP: usize = 256;
    const SUB: usize = SUB;
    const SIGNED: bool = C::SIGNED;
    const OFFSET: i32 = C::OFFSET;
    const HAS_MIN: bool = C::HAS_MIN;
}
