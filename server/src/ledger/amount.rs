//! Amounts of money, as whole billionths.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// Billionths in one.
const NANOS: u64 = 1_000_000_000;
/// Digits of a billionth after the point.
const DIGITS: usize = 9;

/// An amount of a currency in billionths, so that sums are exact. As text it is a decimal number: `0.15`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Amount {
    /// Billionths of the currency.
    pub nano: u64,
}

/// A text that is no amount.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected a decimal number with at most {DIGITS} digits after the point, below 18446744074, got {0:?}"
)]
pub struct NoAmount(String);

impl FromStr for Amount {
    type Err = NoAmount;

    fn from_str(text: &str) -> Result<Amount, NoAmount> {
        let parse = || {
            let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
            let is_number = |digits: &str| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
            if !is_number(whole) || !is_number(part) || part.len() > DIGITS {
                return None;
            }
            let whole: u64 = whole.parse().ok()?;
            let part: u64 = format!("{part:0<DIGITS$}").parse().ok()?;
            whole.checked_mul(NANOS)?.checked_add(part)
        };
        parse().map(|nano| Amount { nano }).ok_or_else(|| NoAmount(text.chars().take(40).collect()))
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (whole, part) = (self.nano / NANOS, self.nano % NANOS);
        if part == 0 {
            return write!(f, "{whole}");
        }
        let part = format!("{part:0DIGITS$}");
        write!(f, "{whole}.{}", part.trim_end_matches('0'))
    }
}

impl Serialize for Amount {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Amount, D::Error> {
        struct Decimal;
        impl Visitor<'_> for Decimal {
            type Value = Amount;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a decimal number")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Amount, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Amount, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Amount, E> {
                self.visit_str(&number.to_string())
            }

            // A float is shown with the digits that somebody wrote: the fewest that mean this float.
            fn visit_f64<E: de::Error>(self, number: f64) -> Result<Amount, E> {
                self.visit_str(&number.to_string())
            }
        }
        deserializer.deserialize_any(Decimal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_and_amounts_are_the_same() {
        for (text, nano) in [
            ("0", 0),
            ("1", NANOS),
            ("0.15", 150_000_000),
            ("0.000000001", 1),
            ("18446744073.709551615", u64::MAX),
        ] {
            let amount: Amount = text.parse().unwrap();
            assert_eq!((amount.nano, amount.to_string().as_str()), (nano, text));
            assert_eq!(serde_json::from_str::<Amount>(&format!("\"{text}\"")).unwrap(), amount);
        }
        for json in ["0.15", "\"0.150\"", "\"00.15\""] {
            assert_eq!(serde_json::from_str::<Amount>(json).unwrap().nano, 150_000_000, "{json}");
        }
        assert_eq!(serde_json::from_str::<Amount>("3").unwrap().nano, 3 * NANOS);
    }

    #[test]
    fn what_is_no_amount_is_refused() {
        for text in ["", ".", "1.", ".5", "-1", "+1", "1e3", "0.0000000001", "18446744074", "1,5", "1.2.3"] {
            assert!(text.parse::<Amount>().is_err(), "{text}");
        }
        assert!(serde_json::from_str::<Amount>("-0.5").is_err());
        assert!(serde_json::from_str::<Amount>("null").is_err());
    }
}
