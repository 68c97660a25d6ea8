//! Reads server-sent events (WHATWG HTML, "Server-sent events") from a blocking reader. Lines end in
//! LF or CR LF; a lone CR, which no server of ours sends, is not taken for an end.

use std::io::{self, BufRead, BufReader, Read};

/// Largest line or event, in bytes: an org's snapshot fits many times.
const EVENT_LEN_MAX: usize = 64 << 20;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Its kind; `message` when it names none.
    pub kind: String,
    /// Its data.
    pub data: String,
}

/// A stream of events.
pub struct Events<R> {
    reader: BufReader<R>,
    /// Taken over from `id` only where an event ends: one that was cut off must be sent again.
    last_id: Option<String>,
    id: Option<String>,
    first: bool,
}

impl<R: Read> Events<R> {
    /// Reads from a body. `last_id` is the id of the last event seen before, if any.
    pub fn new(body: R, last_id: Option<String>) -> Events<R> {
        Events { reader: BufReader::new(body), id: last_id.clone(), last_id, first: true }
    }

    /// The id to resume after.
    pub fn last_id(&self) -> Option<&str> {
        self.last_id.as_deref()
    }

    /// The next event; none at the end. An event cut off by the end is dropped, as the standard says.
    ///
    /// # Errors
    /// When reading fails or an event is too large.
    pub fn next(&mut self) -> io::Result<Option<Event>> {
        let (mut kind, mut data, mut has_data) = (String::new(), String::new(), false);
        while let Some(line) = self.line()? {
            if line.is_empty() {
                self.last_id.clone_from(&self.id);
                if !has_data {
                    kind.clear();
                    continue;
                }
                if kind.is_empty() {
                    kind.push_str("message");
                }
                return Ok(Some(Event { kind, data }));
            }
            let (field, value) = line.split_once(':').unwrap_or((&line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "event" => value.clone_into(&mut kind),
                "data" => {
                    if has_data {
                        data.push('\n');
                    }
                    has_data = true;
                    if data.len() + value.len() > EVENT_LEN_MAX {
                        return Err(too_large());
                    }
                    data.push_str(value);
                }
                "id" if !value.contains('\0') => {
                    self.id = (!value.is_empty()).then(|| value.to_owned());
                }
                // Comments have an empty field; unknown fields are ignored. Our own back-off is
                // steadier than the server's `retry`.
                _ => {}
            }
        }
        Ok(None)
    }

    fn line(&mut self) -> io::Result<Option<String>> {
        let mut bytes = Vec::new();
        let limit = EVENT_LEN_MAX as u64 + 1;
        self.reader.by_ref().take(limit).read_until(b'\n', &mut bytes)?;
        if bytes.pop_if(|last| *last == b'\n').is_none() {
            return match bytes.len() > EVENT_LEN_MAX {
                true => Err(too_large()),
                false => Ok(None),
            };
        }
        bytes.pop_if(|last| *last == b'\r');
        let line = String::from_utf8(bytes)
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "an event is not UTF-8"))?;
        let first = std::mem::take(&mut self.first);
        Ok(Some(match line.strip_prefix('\u{feff}') {
            Some(rest) if first => rest.to_owned(),
            _ => line,
        }))
    }
}

fn too_large() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "an event has more than 64 MiB")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(text: &[u8]) -> (Vec<(String, String)>, Option<String>) {
        let mut events = Events::new(text, None);
        let mut found = Vec::new();
        while let Ok(Some(event)) = events.next() {
            found.push((event.kind, event.data));
        }
        (found, events.last_id().map(str::to_owned))
    }

    #[test]
    fn fields_are_read_as_the_standard_says() {
        let text = "\u{feff}: hello\nid: 3-7\nevent:change\ndata: {\"a\":\ndata:  1}\n\n\
                    data\r\n\r\nevent: x\n\nretry: 5\nid: 3-8\ndata: y\n\nid: 3-9\ndata: cut off";
        let (events, last) = all(text.as_bytes());
        let pair = |kind: &str, data: &str| (kind.to_owned(), data.to_owned());
        assert_eq!(
            events,
            [pair("change", "{\"a\":\n 1}"), pair("message", ""), pair("message", "y")]
        );
        assert_eq!(last.as_deref(), Some("3-8"), "the event cut off must be asked for again");
    }

    #[test]
    fn an_empty_id_forgets() {
        assert_eq!(all(b"id: 1\ndata: a\n\nid\ndata: b\n\n").1, None);
        assert_eq!(all(b"id: 1\ndata: a\n\nid: a\0b\ndata: b\n\n").1.as_deref(), Some("1"));
    }

    proptest! {
        #[test]
        fn no_bytes_lead_to_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            all(&bytes);
        }

        #[test]
        fn what_is_framed_is_read_back(data in "[^\r\n\0]{0,20}", kind in "[a-z]{1,8}") {
            let text = format!("event: {kind}\ndata: {data}\n\n");
            prop_assert_eq!(all(text.as_bytes()).0, vec![(kind, data)]);
        }
    }
}
