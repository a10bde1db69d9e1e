//! What is wrong with a policy file, where, and what to write instead.

use miette::{GraphicalReportHandler, GraphicalTheme, LabeledSpan, MietteDiagnostic, NamedSource, Report};
use serde::Serialize;

/// Place in a file, both counted from 1, columns in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Position {
    pub line: u32,
    pub column: u32,
}

impl Position {
    /// `None`: the parser did not know the place.
    pub fn of(location: serde_saphyr::Location) -> Option<Position> {
        let line = u32::try_from(location.line()).ok().filter(|line| *line > 0)?;
        Some(Position { line, column: u32::try_from(location.column()).unwrap_or(u32::MAX).max(1) })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    Error,
    Warning,
}

/// One finding about a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    pub severity: Severity,
    /// Set where the finding is in another file than the policy (a ToolHive
    /// profile that it names).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub position: Option<Position>,
    /// `profiles.github.egress[1]`; empty for the file as a whole.
    pub path: String,
    pub message: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
}

impl Diagnostic {
    pub fn error(position: Option<Position>, path: impl Into<String>, message: impl Into<String>) -> Self {
        Diagnostic {
            severity: Severity::Error,
            file: None,
            position,
            path: path.into(),
            message: message.into(),
            help: None,
        }
    }

    pub fn warning(position: Option<Position>, path: impl Into<String>, message: impl Into<String>) -> Self {
        Diagnostic { severity: Severity::Warning, ..Self::error(position, path, message) }
    }

    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// One line, as compilers write it: `policy.yaml:3:7: error: …`.
    pub fn line(&self, policy_file: &str) -> String {
        let file = self.file.as_deref().unwrap_or(policy_file);
        let severity = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        let place = match self.position {
            Some(p) => format!("{file}:{}:{}", p.line, p.column),
            None => file.to_owned(),
        };
        let path = if self.path.is_empty() { String::new() } else { format!("{}: ", self.path) };
        let help = self.help.as_ref().map(|h| format!(" ({h})")).unwrap_or_default();
        format!("{place}: {severity}: {path}{}{help}", self.message)
    }
}

/// Findings shown in full; the rest is counted.
pub const SHOWN: usize = 20;

/// The findings with the lines they are about. `source` is the policy file's
/// text, empty if it could not be read.
pub fn render(findings: &[Diagnostic], name: &str, source: &str, color: bool) -> String {
    let theme = if color { GraphicalTheme::unicode() } else { GraphicalTheme::unicode_nocolor() };
    let handler = GraphicalReportHandler::new_themed(theme).with_width(110).with_context_lines(1);
    let starts = line_starts(source);
    let mut text = String::new();
    for finding in findings.iter().take(SHOWN) {
        let title = if finding.path.is_empty() {
            finding.message.clone()
        } else {
            format!("{}: {}", finding.path, finding.message)
        };
        let mut diagnostic = MietteDiagnostic::new(title).with_severity(match finding.severity {
            Severity::Error => miette::Severity::Error,
            Severity::Warning => miette::Severity::Warning,
        });
        if let Some(help) = &finding.help {
            diagnostic = diagnostic.with_help(help.clone());
        }
        let span = finding.position.filter(|_| finding.file.is_none()).and_then(|p| span(source, &starts, p));
        let report = if let Some((at, length)) = span {
            // Only the lines around: a policy may have a hundred thousand.
            let line = starts.partition_point(|start| *start <= at) - 1;
            let first = starts[line.saturating_sub(2)];
            let last = starts.get(line + 3).copied().unwrap_or(source.len());
            let excerpt = &source[first..last];
            let diagnostic = diagnostic.with_label(LabeledSpan::at(at - first..at - first + length, "here"));
            Report::new(diagnostic).with_source_code(NamedSource::new(
                name,
                Excerpt { text: excerpt.to_owned(), first_line: line.saturating_sub(2) },
            ))
        } else {
            text.push_str(&finding.line(name));
            text.push('\n');
            continue;
        };
        // Writing to a String fails only if a Display impl does.
        let _ = handler.render_report(&mut text, report.as_ref());
    }
    if findings.len() > SHOWN {
        text.push_str(&format!("… and {} more\n", findings.len() - SHOWN));
    }
    text
}

/// Part of a file that still knows its line numbers.
struct Excerpt {
    text: String,
    first_line: usize,
}

impl miette::SourceCode for Excerpt {
    fn read_span<'a>(
        &'a self,
        span: &miette::SourceSpan,
        before: usize,
        after: usize,
    ) -> Result<Box<dyn miette::SpanContents<'a> + 'a>, miette::MietteError> {
        let inner = self.text.as_str().read_span(span, before, after)?;
        Ok(Box::new(miette::MietteSpanContents::new(
            inner.data(),
            *inner.span(),
            inner.line() + self.first_line,
            inner.column(),
            inner.line_count(),
        )))
    }
}

fn line_starts(source: &str) -> Vec<usize> {
    let newlines = source.bytes().enumerate().filter(|(_, b)| *b == b'\n').map(|(at, _)| at + 1);
    std::iter::once(0).chain(newlines).collect()
}

/// Byte offset and length of the word at a position.
fn span(source: &str, starts: &[usize], position: Position) -> Option<(usize, usize)> {
    let start = *starts.get(position.line as usize - 1)?;
    let line = source[start..].lines().next().unwrap_or("");
    let column = position.column as usize - 1;
    let within = line.char_indices().nth(column).map_or(line.len(), |(at, _)| at);
    let rest = &line[within..];
    let length = rest.find([',', ' ', ']', '}', '#']).unwrap_or(rest.len());
    Some((start + within, length))
}
