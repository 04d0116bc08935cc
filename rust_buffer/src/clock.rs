//! The unit of the caller's clock.

/// Microseconds of the caller's clock.
pub type Micros = i64;

/// Microseconds of `seconds` of the caller's clock.
pub fn micros(seconds: f64) -> Micros {
    (seconds * 1e6) as Micros
}
