//! Blocks as the bytes that a file holds: structs that are laid over mapped pages without a copy.

/// A type that is nothing but its bytes, so that any byte slice may be read as a slice of it.
///
/// # Safety
/// The type has alignment 1, no padding and no invalid bit pattern.
pub unsafe trait Bytes: Copy + 'static {
    /// The whole values at the front of `bytes`; a remainder is left out.
    #[inline]
    fn cast(bytes: &[u8]) -> &[Self] {
        let count = bytes.len() / size_of::<Self>();
        // SAFETY: `count` values lie inside `bytes`, and the trait promises that any bytes at any address are
        // values.
        unsafe { core::slice::from_raw_parts(bytes.as_ptr().cast(), count) }
    }

    /// As [`Bytes::cast`], to write.
    #[inline]
    fn cast_mut(bytes: &mut [u8]) -> &mut [Self] {
        let count = bytes.len() / size_of::<Self>();
        // SAFETY: as in `cast`, and a value has no padding, so writing one leaves every byte initialised.
        unsafe { core::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), count) }
    }

    /// The bytes of `values`.
    #[inline]
    fn bytes_of(values: &[Self]) -> &[u8] {
        // SAFETY: a value is nothing but its bytes, all of them initialised.
        unsafe { core::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
    }

    /// As [`Bytes::bytes_of`], to write.
    #[inline]
    fn bytes_of_mut(values: &mut [Self]) -> &mut [u8] {
        // SAFETY: as in `bytes_of`, and any bytes are a value.
        unsafe { core::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
    }
}

// SAFETY: a byte.
unsafe impl Bytes for u8 {}
// SAFETY: a byte.
unsafe impl Bytes for i8 {}
// SAFETY: an array has its element's alignment and no padding between elements.
unsafe impl<T: Bytes, const N: usize> Bytes for [T; N] {}

/// Declares a block: its fields in file order. Every field must be [`Bytes`], which makes the struct `Bytes`.
macro_rules! layout {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)+ }) => {
        $(#[$meta])*
        #[allow(non_camel_case_types, reason = "formats keep their published names")]
        #[repr(C)]
        #[derive(Clone, Copy, Debug)]
        pub struct $name { $($(#[$field_meta])* pub $field: $type,)+ }

        // SAFETY: `repr(C)`, and the bound holds every field to `Bytes`: alignment 1, hence no padding.
        unsafe impl $crate::formats::bytes::Bytes for $name where $($type: $crate::formats::bytes::Bytes),+ {}
    };
}
pub(crate) use layout;
