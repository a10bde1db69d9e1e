//! Printing: colours only where they are wanted, no panic when the reader of a
//! pipe has gone.

use super::Output;
use crate::collect::Style;
use serde_json::Value;
use std::io::{self, IsTerminal, Write};

pub(super) fn color() -> bool {
    io::stdout().is_terminal() && crate::collect::wants_color()
}

pub(super) fn style(output: Output) -> Style {
    match output {
        Output::Table => Style::Table { color: color() },
        Output::Json => Style::Json,
    }
}

pub(super) fn text(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

pub(super) fn json(value: &Value) -> anyhow::Result<()> {
    text(&format!("{value:#}\n"))
}

/// A table with columns as wide as they need to be; the last one is free.
#[derive(Default)]
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new<const N: usize>(headings: [&str; N]) -> Table {
        Table { rows: vec![headings.map(str::to_owned).to_vec()] }
    }

    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    pub(super) fn print(&self) -> anyhow::Result<()> {
        text(&self.render())
    }

    pub(super) fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |i: usize| self.rows.iter().filter_map(|r| r.get(i)).map(|c| c.chars().count()).max();
        let widths: Vec<usize> = (0..columns).map(|i| width(i).unwrap_or(0)).collect();
        let mut out = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(&format!("{cell:<width$}  "));
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(["A", "B"]);
        table.row(["größer".to_owned(), "x".to_owned()]);
        assert_eq!(table.render(), "A       B\ngrößer  x\n");
    }
}
