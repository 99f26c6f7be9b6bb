//! What is wrong with a configuration, and how it is shown to a person.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet, renderer::DecorStyle};

/// So many diagnostics of one file are shown; the rest is counted.
pub const DIAGNOSTICS_MAX: usize = 100;

/// The columns that a source line and its marks may take before they are cut.
const WIDTH_COLUMNS: usize = 140;

/// Whether a configuration can be used in spite of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// It cannot.
    Error,
    /// It can; the operator should look.
    Warning,
}

/// One thing to say about the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// Error or warning.
    pub severity: Severity,
    /// What is wrong, in lower case, without a full stop.
    pub message: String,
    /// The bytes of the file that it is about; `None`: the file as a whole.
    pub span: Option<Range<usize>>,
    /// Said beside the underlined text; may be empty.
    pub label: String,
    /// Other places that have to do with it.
    pub also: Vec<(Range<usize>, String)>,
    /// What to do.
    pub help: Vec<String>,
    /// Holds only if the whole file could be read: dropped when its syntax is broken.
    pub needs_whole_file: bool,
}

impl Diagnostic {
    /// An error at `span`.
    pub fn error(span: &Range<usize>, message: impl Into<String>) -> Diagnostic {
        Diagnostic::new(Severity::Error, Some(span.clone()), message.into())
    }

    /// A warning at `span`.
    pub fn warning(span: &Range<usize>, message: impl Into<String>) -> Diagnostic {
        Diagnostic::new(Severity::Warning, Some(span.clone()), message.into())
    }

    /// An error of the file as a whole.
    pub fn file_error(message: impl Into<String>) -> Diagnostic {
        Diagnostic::new(Severity::Error, None, message.into())
    }

    fn new(severity: Severity, span: Option<Range<usize>>, message: String) -> Diagnostic {
        let (label, also, help) = (String::new(), Vec::new(), Vec::new());
        Diagnostic { severity, message, span, label, also, help, needs_whole_file: false }
    }

    /// The words beside the underlined text.
    pub fn label(mut self, label: impl Into<String>) -> Diagnostic {
        self.label = label.into();
        self
    }

    /// Points at another place.
    pub fn also(mut self, span: &Range<usize>, label: impl Into<String>) -> Diagnostic {
        self.also.push((span.clone(), label.into()));
        self
    }

    /// Adds what to do.
    pub fn help(mut self, help: impl Into<String>) -> Diagnostic {
        self.help.push(help.into());
        self
    }

    /// Drops it when the file's syntax is broken: what seems to be missing may stand in the broken part.
    pub fn if_whole(mut self) -> Diagnostic {
        self.needs_whole_file = true;
        self
    }
}

/// For whom diagnostics are rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Logs, JSON, pipes.
    Plain,
    /// A terminal: with colours.
    Terminal,
}

/// All that is to be said about one file, in the order of its lines.
#[derive(Clone, Debug)]
pub struct Diagnostics {
    file_name: String,
    text: String,
    list: Vec<Diagnostic>,
}

impl Diagnostics {
    /// Sorts them by their place in the file.
    pub fn new(file_name: &str, text: &str, mut list: Vec<Diagnostic>) -> Diagnostics {
        list.sort_by_key(|diagnostic| diagnostic.span.as_ref().map_or(0, |span| span.start));
        Diagnostics { file_name: file_name.to_owned(), text: text.to_owned(), list }
    }

    /// Nothing to say.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Each one.
    pub fn iter(&self) -> impl Iterator<Item = &Diagnostic> {
        self.list.iter()
    }

    /// Each one as a compiler would show it, without a final line break; `DIAGNOSTICS_MAX` at most, then how many more there are.
    pub fn render(&self, style: Style) -> Vec<String> {
        let mut rendered: Vec<String> =
            self.list.iter().take(DIAGNOSTICS_MAX).map(|diagnostic| self.render_one(diagnostic, style)).collect();
        if self.list.len() > DIAGNOSTICS_MAX {
            rendered.push(format!("... and {} more", self.list.len() - DIAGNOSTICS_MAX));
        }
        rendered
    }

    fn render_one(&self, diagnostic: &Diagnostic, style: Style) -> String {
        let level = match diagnostic.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let mut group = Group::with_title(level.primary_title(printable(&diagnostic.message)));
        match &diagnostic.span {
            Some(span) => {
                let mut annotation = AnnotationKind::Primary.span(self.visible(span));
                if !diagnostic.label.is_empty() {
                    annotation = annotation.label(printable(&diagnostic.label));
                }
                let also = diagnostic
                    .also
                    .iter()
                    .map(|(span, label)| AnnotationKind::Context.span(self.visible(span)).label(printable(label)));
                let snippet = Snippet::source(self.text.as_str()).path(self.file_name.as_str());
                group = group.element(snippet.annotation(annotation).annotations(also));
            }
            None => group = group.element(annotate_snippets::Origin::path(self.file_name.as_str())),
        }
        for help in &diagnostic.help {
            group = group.element(Level::HELP.message(printable(help)));
        }
        let renderer = match style {
            Style::Plain => Renderer::plain(),
            Style::Terminal => Renderer::styled(),
        };
        renderer.term_width(WIDTH_COLUMNS).decor_style(DecorStyle::Ascii).render(&[group]).trim_end().to_owned()
    }

    /// The part of a span that is worth underlining: its first line, within the text, on character boundaries.
    fn visible(&self, span: &Range<usize>) -> Range<usize> {
        let floor = |index: usize| (0..=index.min(self.text.len())).rev().find(|i| self.text.is_char_boundary(*i));
        let (start, mut end) = (floor(span.start).unwrap_or(0), floor(span.end).unwrap_or(0));
        if let Some(line) = self.text[start..end.max(start)].find('\n') {
            end = start + line.max(1);
        }
        start..end.max(start)
    }
}

/// Control characters from the file must not reach a terminal or break a log line.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(Style::Plain).join("\n\n"))
    }
}

/// Every error of a file; never empty.
#[derive(Clone, Debug)]
pub struct Errors(Diagnostics);

impl Errors {
    pub(super) fn new(diagnostics: Diagnostics) -> Errors {
        assert!(!diagnostics.is_empty(), "errors without an error");
        Errors(diagnostics)
    }
}

impl std::ops::Deref for Errors {
    type Target = Diagnostics;

    fn deref(&self) -> &Diagnostics {
        &self.0
    }
}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Errors {}

/// Why a file gave no configuration.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It could not be read.
    #[error("{}: {reason}; {next}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
        /// What to do.
        next: &'static str,
    },
    /// It was read and is wrong.
    #[error(transparent)]
    Invalid(#[from] Errors),
}

impl LoadError {
    /// How many errors there are.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        match self {
            LoadError::Read { .. } => 1,
            LoadError::Invalid(errors) => errors.len(),
        }
    }

    /// One element an error.
    pub fn render(&self, style: Style) -> Vec<String> {
        match self {
            LoadError::Read { .. } => vec![format!("error: {self}")],
            LoadError::Invalid(errors) => errors.render(style),
        }
    }
}
