//! Setters of structs that grow.

/// Writes a setter for each of these fields: `setters!(Options { field: Type, … })`.
///
/// Structs of options are `#[non_exhaustive]`, so a new option breaks no program. Outside of their crate they
/// start as a default, and setters change it: `SessionOptions::default().context(4096).sequences(2)`. The type
/// is that of the argument, and converts into the field's; `impl Into<Option<u32>>` takes a number as well as an
/// option. With `const` before the name, setters also work in constants, and take the field's own type.
#[macro_export]
macro_rules! setters {
    (const $options:ident { $($field:ident: $type:ty),+ $(,)? }) => {
        impl $options {
            $(
                #[doc = concat!("Sets `", stringify!($field), "`.")]
                #[must_use]
                pub const fn $field(mut self, $field: $type) -> Self {
                    self.$field = $field;
                    self
                }
            )+
        }
    };
    ($options:ident { $($field:ident: $type:ty),+ $(,)? }) => {
        impl $options {
            $(
                #[doc = concat!("Sets `", stringify!($field), "`.")]
                #[must_use]
                pub fn $field(mut self, $field: $type) -> Self {
                    self.$field = $field.into();
                    self
                }
            )+
        }
    };
}
