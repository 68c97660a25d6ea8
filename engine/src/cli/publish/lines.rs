//! The file or pipe, cut into lines.

use std::fs::File;
use std::io::{self, BufRead, Read};
use std::path::Path;

use anyhow::Context;

use super::totals::RejectedLine;
use crate::cli::Console;

/// Longest line sent; the server would refuse it too. A longer one is read over, not held.
pub const LINE_LEN_MAX: usize = 1_000_000;
/// Lines on the way from the reader.
pub const LINES_WAITING: usize = 4_096;

/// A line of the file.
pub enum Line {
    Text { number: u64, text: Vec<u8> },
    TooLong { number: u64 },
}

pub fn open(
    path: &Path,
    console: &mut Console,
) -> anyhow::Result<(Box<dyn BufRead + Send>, Option<u64>)> {
    if path == Path::new("-") {
        let input = console.input.take().context("stdin was read already")?;
        return Ok((input, None));
    }
    let failed = || format!("cannot read {}", path.display());
    let file = File::open(path).with_context(failed)?;
    let metadata = file.metadata().with_context(failed)?;
    anyhow::ensure!(!metadata.is_dir(), "cannot read {}: it is a directory", path.display());
    let len = metadata.is_file().then_some(metadata.len());
    Ok((Box::new(io::BufReader::with_capacity(1 << 20, file)), len))
}

/// Cuts the input into lines until it ends or `take` wants no more. Empty lines count but are not sent.
pub fn read_lines(
    mut input: Box<dyn BufRead + Send>,
    mut take: impl FnMut(io::Result<Line>) -> bool,
) {
    let mut number = 0;
    loop {
        number += 1;
        let line = match next_line(&mut input, number) {
            Ok(Some(Line::Text { text, .. })) if text.trim_ascii().is_empty() => continue,
            Ok(Some(line)) => Ok(line),
            Ok(None) => return,
            Err(error) => Err(error),
        };
        let last = line.is_err();
        if !take(line) || last {
            return;
        }
    }
}

fn next_line(input: &mut dyn BufRead, number: u64) -> io::Result<Option<Line>> {
    let mut text = Vec::new();
    let mut bounded = (&mut *input).take(LINE_LEN_MAX as u64 + 1);
    if bounded.read_until(b'\n', &mut text)? == 0 {
        return Ok(None);
    }
    if text.last() != Some(&b'\n') && text.len() > LINE_LEN_MAX {
        input.skip_until(b'\n')?;
        return Ok(Some(Line::TooLong { number }));
    }
    if text.last() != Some(&b'\n') {
        text.push(b'\n');
    }
    Ok(Some(Line::Text { number, text }))
}

/// Says what is wrong with a file that is not one event a line, before every line is rejected.
pub fn looks_like_lines(first: &[u8]) -> anyhow::Result<()> {
    match first.trim_ascii() {
        [b'[', ..] => anyhow::bail!(
            "the file begins with '[', so it looks like one JSON array; publish reads one event a \
             line, which \"jq -c '.[]'\" makes of it"
        ),
        b"{" => anyhow::bail!(
            "the first line is only '{{', so the events seem to stand on several lines each; publish \
             reads one event a line, which \"jq -c .\" makes of them"
        ),
        _ => Ok(()),
    }
}

/// What is said of a line that is read over.
pub fn too_long(number: u64) -> RejectedLine {
    RejectedLine {
        line: number,
        reason: "too_large".to_owned(),
        detail: format!("the line has more than {LINE_LEN_MAX} bytes; it was not sent"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_beyond_the_limit_are_read_over() {
        let mut text = b"{}\n".to_vec();
        text.extend(std::iter::repeat_n(b'x', LINE_LEN_MAX + 1));
        text.extend_from_slice(b"\n{}");
        let mut found = Vec::new();
        read_lines(Box::new(io::Cursor::new(text)), |line| {
            found.push(match line.unwrap() {
                Line::Text { number, text } => (number, text.len()),
                Line::TooLong { number } => (number, 0),
            });
            true
        });
        assert_eq!(found, [(1, 3), (2, 0), (3, 3)]);
    }

    #[test]
    fn other_forms_of_json_are_recognised() {
        assert!(looks_like_lines(b"[{\"id\":1}]\n").is_err());
        assert!(looks_like_lines(b"{\n").unwrap_err().to_string().contains("jq -c ."));
        assert!(looks_like_lines(b"{\"id\":1}\n").is_ok());
    }
}
