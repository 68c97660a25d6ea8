//! Tables and figures for people. Columns are separated by spaces only, without colours or frames,
//! so that they read the same in a terminal, a log and a pipe.

use std::io::{self, Write};

use comfy_table::{Cell, CellAlignment, Table as Grid, presets};
use meterr_connectors::api::Figures;
use meterr_operators::ids::Positions;
use meterr_operators::money::Atto;

/// A table of text and figures.
pub struct Table {
    grid: Grid,
    right: Vec<bool>,
}

impl Table {
    /// A table with these columns; those that begin with `>` hold figures and stand to the right.
    pub fn new(columns: &[&str]) -> Table {
        let mut grid = Grid::new();
        grid.load_preset(presets::NOTHING).force_no_tty();
        let right: Vec<bool> = columns.iter().map(|name| name.starts_with('>')).collect();
        let names = columns.iter().map(|name| name.trim_start_matches('>').to_uppercase());
        grid.set_header(cells(names, &right));
        for column in grid.column_iter_mut() {
            column.set_padding((0, 2));
        }
        Table { grid, right }
    }

    /// Adds a row. Control characters are shown escaped, since names and bytes come from outside and
    /// must not drive the terminal.
    pub fn row(&mut self, values: impl IntoIterator<Item = String>) {
        self.grid.add_row(cells(values.into_iter().map(|value| harmless(&value)), &self.right));
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.grid.row_count()
    }

    /// Whether it has no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Prints it.
    ///
    /// # Errors
    /// When the output fails.
    pub fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        for line in self.grid.lines() {
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

fn cells(values: impl Iterator<Item = String>, right: &[bool]) -> Vec<Cell> {
    let right = right.iter().copied().chain(std::iter::repeat(false));
    let alignment = |right| if right { CellAlignment::Right } else { CellAlignment::Left };
    values.zip(right).map(|(value, r)| Cell::new(value).set_alignment(alignment(r))).collect()
}

/// Text with its control characters escaped.
pub fn harmless(text: &str) -> String {
    if !text.chars().any(char::is_control) {
        return text.to_owned();
    }
    let mut shown = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match c.is_control() {
            true => shown.extend(c.escape_default()),
            false => shown.push(c),
        }
    }
    shown
}

/// Positions without those of shards that nothing has come to: they need no waiting for, and there
/// may be hundreds.
pub fn busy_positions(mut positions: Positions) -> String {
    positions.shards.retain(|(_, position)| *position > 0);
    if positions.shards.is_empty() && positions.control.is_none() {
        return "the beginning".to_owned();
    }
    positions.to_string()
}

/// A count with its thousands set apart: `1,234,567`.
pub fn count(n: i64) -> String {
    let digits = n.unsigned_abs().to_string();
    let mut shown = String::with_capacity(digits.len() + digits.len() / 3 + 1);
    if n < 0 {
        shown.push('-');
    }
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            shown.push(',');
        }
        shown.push(digit);
    }
    shown
}

/// A cost in USD, exact; a dash when nothing in it is priced.
pub fn cost(cost: Option<Atto>) -> String {
    cost.map_or_else(|| "-".to_owned(), |cost| cost.to_string())
}

type FigureOf = fn(&Figures) -> i64;

/// Columns of counts that are shown only where a row has any.
const OPTIONAL: [(&str, FigureOf); 9] = [
    (">cached", |f| f.cached_input_tokens),
    (">cache write", |f| f.cache_write_tokens),
    (">cache write 1h", |f| f.cache_write_1h_tokens),
    (">reasoning", |f| f.reasoning_tokens),
    (">audio in", |f| f.audio_input_tokens),
    (">audio out", |f| f.audio_output_tokens),
    (">images", |f| f.images),
    (">searches", |f| f.searches),
    (">unpriced", |f| f.unpriced_events),
];

/// A table of figures: `labels` name the first columns, each row has as many texts.
pub fn figures(labels: &[&str], rows: &[(Vec<String>, Figures)]) -> Table {
    let shown: Vec<_> =
        OPTIONAL.iter().filter(|(_, of)| rows.iter().any(|(_, f)| of(f) != 0)).collect();
    let mut columns = labels.to_vec();
    columns.extend([">events", ">input", ">output"]);
    columns.extend(shown.iter().map(|(name, _)| *name));
    columns.push(">cost usd");
    let mut table = Table::new(&columns);
    for (labels, f) in rows {
        let counts = [f.events, f.input_tokens, f.output_tokens];
        let more = shown.iter().map(|(_, of)| of(f));
        let counts = counts.into_iter().chain(more).map(count);
        table.row(labels.iter().cloned().chain(counts).chain([cost(f.cost)]));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(table: &Table) -> String {
        let mut out = Vec::new();
        table.print(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn figures_stand_to_the_right_and_empty_columns_are_left_out() {
        let figures_of = |events, unpriced_events, cost| Figures {
            events,
            unpriced_events,
            cost,
            input_tokens: 1_234_567,
            ..Figures::default()
        };
        let rows = [
            (vec!["2026-01-02".into(), "a".into()], figures_of(1, 0, Some(Atto::usd(3)))),
            (vec!["2026-01-03".into(), "bb".into()], figures_of(1_000, 7, None)),
        ];
        assert_eq!(
            printed(&figures(&["window", "user"], &rows)),
            "WINDOW      USER  EVENTS      INPUT  OUTPUT  UNPRICED  COST USD\n\
             2026-01-02  a          1  1,234,567       0         0         3\n\
             2026-01-03  bb     1,000  1,234,567       0         7         -\n"
        );
    }

    #[test]
    fn names_from_outside_cannot_drive_the_terminal() {
        let mut table = Table::new(&["name"]);
        table.row(["\x1b[31mred\n".to_owned()]);
        assert_eq!(printed(&table), "NAME\n\\u{1b}[31mred\\n\n");
    }

    #[test]
    fn thousands_are_set_apart() {
        let shown = [0, 999, 1_000, -1_234_567, i64::MIN].map(count);
        assert_eq!(shown, ["0", "999", "1,000", "-1,234,567", "-9,223,372,036,854,775,808"]);
    }
}
