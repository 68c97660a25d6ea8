//! Where a command reads and writes. Tests put memory in the place of the terminal.

use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::path::Path;

use anyhow::Context;
use serde_json::Value;

/// Input, outputs, and which of them are terminals.
pub struct Console {
    /// Standard input. Taken by a command that reads it on a thread of its own.
    pub input: Option<Box<dyn BufRead + Send>>,
    /// Results.
    pub out: Box<dyn Write>,
    /// Everything else.
    pub err: Box<dyn Write>,
    /// Whether questions can be asked and answered.
    pub interactive: bool,
    /// Whether `err` is a terminal, where a progress bar makes sense.
    pub progress: bool,
}

impl Console {
    /// The process's own.
    pub fn of_process() -> Console {
        let stderr = io::stderr().is_terminal();
        Console {
            input: Some(Box::new(io::BufReader::new(io::stdin()))),
            out: Box::new(io::BufWriter::new(io::stdout())),
            err: Box::new(io::stderr()),
            interactive: stderr && io::stdin().is_terminal(),
            progress: stderr,
        }
    }

    /// Prints JSON on one line.
    ///
    /// # Errors
    /// When the output fails.
    pub fn json(&mut self, value: &Value) -> io::Result<()> {
        writeln!(self.out, "{value}")?;
        self.out.flush()
    }

    /// Asks a question that takes yes or no; anything but yes is no.
    ///
    /// # Errors
    /// When the terminal fails.
    pub fn confirmed(&mut self, question: &str) -> io::Result<bool> {
        self.out.flush()?;
        write!(self.err, "{question} [y/N] ")?;
        self.err.flush()?;
        let mut answer = String::new();
        if let Some(input) = &mut self.input {
            // A line of a person's answer; bounded as all input is.
            input.take(1024).read_line(&mut answer)?;
        }
        Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
    }

    /// Reads a whole file, or standard input where the path is `-`, up to `len_max` bytes.
    ///
    /// # Errors
    /// When it cannot be read, or is larger.
    pub fn read(&mut self, path: &Path, len_max: u64) -> anyhow::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        if path == Path::new("-") {
            let input = self.input.take().context("stdin was read already")?;
            input.take(len_max + 1).read_to_end(&mut bytes).context("cannot read stdin")?;
        } else {
            let failed = || format!("cannot read {}", path.display());
            let file = std::fs::File::open(path).with_context(failed)?;
            file.take(len_max + 1).read_to_end(&mut bytes).with_context(failed)?;
        }
        if bytes.len() as u64 > len_max {
            anyhow::bail!("{} has more than {len_max} bytes", path.display());
        }
        Ok(bytes)
    }
}
