//! Bytes to text as they come.

/// Joins the bytes of tokens into text: a character that is split over tokens appears when it is
/// complete, and bytes that are not UTF-8 appear as U+FFFD.
#[derive(Default)]
pub struct StreamDecoder {
    /// The beginning of a character, at most three bytes.
    rest: Vec<u8>,
}

impl StreamDecoder {
    /// Takes the bytes of the next token and returns the text that is complete with them.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.rest.extend_from_slice(bytes);
        let mut text = String::new();
        let mut done = 0;
        for chunk in self.rest.utf8_chunks() {
            text.push_str(chunk.valid());
            done += chunk.valid().len();
            let invalid = chunk.invalid();
            let unfinished = done + invalid.len() == self.rest.len()
                && std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
            if !invalid.is_empty() && !unfinished {
                text.push(char::REPLACEMENT_CHARACTER);
                done += invalid.len();
            }
        }
        self.rest.drain(..done);
        text
    }

    /// Ends the text: a character that never became complete appears as U+FFFD.
    pub fn finish(&mut self) -> String {
        let rest = std::mem::take(&mut self.rest);
        String::from_utf8_lossy(&rest).into_owned()
    }
}
