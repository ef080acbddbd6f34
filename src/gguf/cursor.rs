//! A position in the header of a file; every read checks that its bytes are there.

#![warn(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::ops::Range;

use super::value::ValueType;
use crate::bad_file;
use crate::error::Result;

/// Longest string that is accepted, in bytes.
pub(super) const MAX_STRING: u64 = 64 << 20;
/// Most elements that an array may have.
const MAX_ARRAY: u64 = 64 << 20;

/// Reads little-endian numbers, strings and arrays one after the other.
pub(super) struct Cursor<'a> {
    /// The whole file.
    pub(super) bytes: &'a [u8],
    /// Where the next read begins; never past the end.
    pub(super) pos: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn left(&self) -> u64 {
        self.bytes.len().saturating_sub(self.pos) as u64
    }

    pub(super) fn take(&mut self, n: u64, what: &str) -> Result<&'a [u8]> {
        let (start, left) = (self.pos, self.left());
        let end = usize::try_from(n).ok().and_then(|n| start.checked_add(n));
        let Some((bytes, end)) = end.and_then(|end| Some((self.bytes.get(start..end)?, end)))
        else {
            bad_file!("truncated: {what} at byte {start} has {n} bytes, the file has {left} left");
        };
        self.pos = end;
        Ok(bytes)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32> {
        let bytes = self.take(4, what)?;
        Ok(u32::from_le_bytes(bytes.try_into().unwrap_or_default()))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64> {
        let bytes = self.take(8, what)?;
        Ok(u64::from_le_bytes(bytes.try_into().unwrap_or_default()))
    }

    pub(super) fn string(&mut self, what: &str, max: u64) -> Result<&'a [u8]> {
        let start = self.pos;
        let len = self.u64(what)?;
        if len > max {
            bad_file!("{what} at byte {start}: length {len}, allowed {max}");
        }
        self.take(len, what)
    }

    /// The element type, length and place of an array that is checked to be complete.
    pub(super) fn array(&mut self, key: &str) -> Result<(ValueType, usize, Range<usize>)> {
        let start = self.pos;
        let id = self.u32("array element type")?;
        let len = self.u64("array length")?;
        let element = match ValueType::from_id(id) {
            Some(ValueType::Array) => {
                bad_file!("key \"{key}\" at byte {start}: arrays of arrays are not supported")
            }
            Some(element) => element,
            None => bad_file!(
                "key \"{key}\" at byte {start}: unknown array element type {id}; allowed 0..=12"
            ),
        };
        let min = element.size().unwrap_or(8) as u64;
        // Divided, not multiplied: a product of two numbers from a file can wrap.
        let fit = self.left().checked_div(min).unwrap_or(0).min(MAX_ARRAY);
        if len > fit {
            bad_file!(
                "key \"{key}\" at byte {start}: array of {len} x {min} bytes; in the remaining {} \
                 bytes {fit} elements are allowed",
                self.left()
            );
        }
        let begin = self.pos;
        match element {
            ValueType::String => {
                for _ in 0..len {
                    self.string("string in an array", MAX_STRING)?;
                }
            }
            _ => {
                let bytes = self.take(len.saturating_mul(min), "array")?;
                if element == ValueType::Bool && bytes.iter().any(|b| *b > 1) {
                    bad_file!("key \"{key}\" at byte {start}: bools must be 0 or 1");
                }
            }
        }
        Ok((element, len as usize, begin..self.pos))
    }
}
