//! PURE. The configuration as written in TOML: reads tables by the list in `keys`, and notes everything that is wrong.

use std::cell::RefCell;
use std::ops::Range;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::Diagnostic;
use super::keys::{Default, FILE, Key, Kind, Table};

/// A place in the file, in bytes.
pub(super) type Span = Range<usize>;

/// Where all that is found is noted.
#[derive(Debug, std::default::Default)]
pub(super) struct Notes {
    list: RefCell<Vec<Diagnostic>>,
}

impl Notes {
    /// Notes one.
    pub(super) fn push(&self, diagnostic: Diagnostic) {
        self.list.borrow_mut().push(diagnostic);
    }

    /// All of them.
    pub(super) fn into_list(self) -> Vec<Diagnostic> {
        self.list.into_inner()
    }
}

/// A string and its place.
#[derive(Clone, Debug)]
pub(super) struct Text<'a> {
    pub(super) value: &'a str,
    pub(super) span: Span,
}

/// One table of the file. Its readers give the value, or the default of `keys` where there is none or a wrong one.
#[derive(Clone, Debug)]
pub(super) struct Section<'a> {
    /// The last part of its path: `web` of `[listeners.web]`.
    pub(super) name: &'a str,
    /// Where its name stands.
    pub(super) span: Span,
    /// As written between brackets: `listeners.web`.
    path: String,
    notes: &'a Notes,
    table: &'static Table,
    values: Option<&'a DeTable<'a>>,
}

/// What a section is called.
struct Named<'a> {
    name: &'a str,
    path: String,
    span: Span,
}

impl<'a> Section<'a> {
    /// The whole file.
    pub(super) fn file(notes: &'a Notes, values: &'a DeTable<'a>) -> Section<'a> {
        Section::new(notes, &FILE, Named { name: "", path: String::new(), span: 0..0 }, Some(values))
    }

    fn new(notes: &'a Notes, table: &'static Table, named: Named<'a>, values: Option<&'a DeTable<'a>>) -> Section<'a> {
        let Named { name, path, span } = named;
        let section = Section { name, span, path, notes, table, values };
        section.refuse_unknown_keys();
        section
    }

    /// Notes one.
    pub(super) fn note(&self, diagnostic: Diagnostic) {
        self.notes.push(diagnostic);
    }

    /// Whether the table itself was written.
    pub(super) fn is_written(&self) -> bool {
        self.values.is_some()
    }

    /// Where the value of a key stands, if it was written.
    pub(super) fn written(&self, name: &str) -> Option<Span> {
        debug_assert!(self.table.key(name).is_some(), "{name} is not a key of {}", self.table.name);
        self.values?.get(name).map(Spanned::span)
    }

    /// Where the value of a key stands, else the table's name.
    pub(super) fn span_of(&self, name: &str) -> Span {
        self.written(name).unwrap_or_else(|| self.span.clone())
    }

    /// A `Kind::Boolean`, if written.
    pub(super) fn boolean(&self, name: &str) -> Option<bool> {
        let value = self.value(name)?;
        match value.get_ref() {
            DeValue::Boolean(value) => Some(*value),
            _ => self.wrong_type(name, value, "true or false"),
        }
    }

    /// A `Kind::Integer`, if written or by default.
    pub(super) fn integer(&self, name: &str) -> Option<u64> {
        let key = self.key(name);
        let Kind::Integer(min, max) = key.kind else { unreachable!("{name} is an integer") };
        let read = self.value(name).and_then(|value| match value.get_ref() {
            DeValue::Integer(number) => {
                let parsed = i128::from_str_radix(number.as_str(), number.radix()).ok();
                let parsed = parsed.and_then(|n| u64::try_from(n).ok()).filter(|n| (min..=max).contains(n));
                if parsed.is_none() {
                    let message = format!("{name:?} must be a number from {min} to {max}");
                    self.note(Diagnostic::error(&value.span(), message).label("out of range"));
                }
                parsed
            }
            _ => self.wrong_type(name, value, &format!("a number from {min} to {max}")),
        });
        read.or(match key.default {
            Default::Integer(number) => Some(number),
            _ => None,
        })
    }

    /// A `Kind::Integer` with a default, as a size.
    pub(super) fn size(&self, name: &str) -> usize {
        usize::try_from(self.integer(name).unwrap_or(0)).expect("limited far below")
    }

    /// A `Kind::Integer` with a default, as a small number.
    pub(super) fn count(&self, name: &str) -> u32 {
        u32::try_from(self.integer(name).unwrap_or(0)).expect("limited far below")
    }

    /// Whether a `Kind::Word` is written and none of those that it may be.
    pub(super) fn word_is_wrong(&self, name: &str) -> bool {
        let Kind::Word { now, .. } = self.key(name).kind else { unreachable!("{name} is a word") };
        self.written(name).is_some() && !now.iter().any(|word| self.text_is(name, word))
    }

    /// Whether a key is written and is this string.
    pub(super) fn text_is(&self, name: &str, text: &str) -> bool {
        self.value(name).and_then(|value| value.get_ref().as_str()) == Some(text)
    }

    /// A `Kind::Duration`.
    pub(super) fn duration(&self, name: &str) -> Duration {
        self.duration_or_off(name).expect("only keys that can be off are")
    }

    /// A `Kind::Duration` or `Kind::DurationOrOff`; `None`: off.
    pub(super) fn duration_or_off(&self, name: &str) -> Option<Duration> {
        let key = self.key(name);
        let (min, max, can_be_off) = match key.kind {
            Kind::Duration(min, max) => (min, max, false),
            Kind::DurationOrOff(min, max) => (min, max, true),
            _ => unreachable!("{name} is a duration"),
        };
        let expected = match can_be_off {
            false => "a duration such as \"350s\" or \"1m 30s\"",
            true => "a duration such as \"60s\", or \"off\"",
        };
        let Default::Text(default) = key.default else { unreachable!("{name} has a default") };
        let default = humantime::parse_duration(default).expect("defaults are durations");
        let Some(value) = self.value(name) else { return Some(default) };
        let read = match value.get_ref() {
            DeValue::String(text) if can_be_off && text == "off" => return None,
            DeValue::String(text) => match humantime::parse_duration(text) {
                Ok(duration) if (min..=max).contains(&duration) => Some(duration),
                Ok(_) => {
                    let (min, max) = (in_days(min), in_days(max));
                    let message = format!("{name:?} must be from {min} to {max}");
                    self.note(Diagnostic::error(&value.span(), message).label("out of range"));
                    None
                }
                Err(error) => {
                    let message = format!("{name:?} must be {expected}");
                    let diagnostic = Diagnostic::error(&value.span(), message);
                    self.note(match text.strip_prefix('-') {
                        Some(positive) => diagnostic.label("negative").help(format!("write {positive:?}")),
                        None => diagnostic.label(duration_problem(&error)),
                    });
                    None
                }
            },
            DeValue::Integer(number) => {
                let diagnostic = Diagnostic::error(&value.span(), format!("{name:?} must be {expected}"));
                let diagnostic = diagnostic.label("a number without a unit");
                self.note(diagnostic.help(format!("if these are seconds, write \"{}s\"", number.as_str())));
                None
            }
            _ => self.wrong_type(name, value, expected),
        };
        Some(read.unwrap_or(default))
    }

    /// A `Kind::Word`: the one written, else the default, else "".
    pub(super) fn word(&self, name: &str) -> &'static str {
        let key = self.key(name);
        let Kind::Word { now, later } = key.kind else { unreachable!("{name} is a word") };
        let read = self.value(name).and_then(|value| match value.get_ref() {
            DeValue::String(text) => self.known_word(name, text, &value.span(), now, later),
            DeValue::Boolean(false) if now.contains(&"off") => {
                let diagnostic = Diagnostic::error(&value.span(), format!("{name:?} must be {}", one_of(now)));
                self.note(diagnostic.label("a boolean").help("write \"off\""));
                None
            }
            _ => self.wrong_type(name, value, &one_of(now)),
        });
        read.unwrap_or(match key.default {
            Default::Text(word) => word,
            _ => "",
        })
    }

    /// A `Kind::Words`: those written, each once, else the default.
    pub(super) fn words(&self, name: &str) -> Vec<&'static str> {
        let key = self.key(name);
        let Kind::Words { now, later } = key.kind else { unreachable!("{name} are words") };
        let default = match key.default {
            Default::Text(word) => vec![word],
            _ => Vec::new(),
        };
        let Some(value) = self.value(name) else { return default };
        let elements = match value.get_ref() {
            DeValue::Array(array) if array.is_empty() => {
                self.note(Diagnostic::error(&value.span(), format!("{name:?} must be {}", one_of(now))).label("empty"));
                return default;
            }
            DeValue::Array(array) => array.iter().collect(),
            _ => vec![value],
        };
        let mut words = Vec::new();
        for element in elements {
            let word = match element.get_ref() {
                DeValue::String(text) => self.known_word(name, text, &element.span(), now, later),
                _ => self.wrong_type(name, element, &format!("{}, or a list of them", one_of(now))),
            };
            match word {
                Some(word) if words.contains(&word) => {
                    self.note(Diagnostic::error(&element.span(), format!("{word:?} stands twice in {name:?}")));
                }
                Some(word) => words.push(word),
                None => {}
            }
        }
        if words.is_empty() { default } else { words }
    }

    fn known_word(
        &self,
        name: &str,
        text: &str,
        span: &Span,
        now: &[&'static str],
        later: &[&'static str],
    ) -> Option<&'static str> {
        let found = now.iter().copied().find(|word| *word == text);
        if found.is_none() {
            self.note(match later.contains(&text) {
                true => not_supported(span, &format!("{name} = {text:?}"))
                    .help(format!("what works today: {}", quoted(now))),
                false => unknown_word(span, name, text, now),
            });
        }
        found
    }

    /// A `Kind::Text`: the one written, else the default.
    pub(super) fn text(&self, name: &str) -> Option<Text<'a>> {
        let key = self.key(name);
        let Kind::Text(expected) = key.kind else { unreachable!("{name} is a text") };
        let read = self.value(name).and_then(|value| match value.get_ref() {
            DeValue::String(text) => Some(Text { value: text, span: value.span() }),
            _ => self.wrong_type(name, value, expected),
        });
        read.or(match key.default {
            Default::Text(value) => Some(Text { value, span: self.span.clone() }),
            _ => None,
        })
    }

    /// A `Kind::Texts`: those written, else the default.
    pub(super) fn texts(&self, name: &str) -> Vec<Text<'a>> {
        let key = self.key(name);
        let Kind::Texts(expected) = key.kind else { unreachable!("{name} are texts") };
        let Some(value) = self.value(name) else {
            return match key.default {
                Default::Texts(list) => list.iter().map(|value| Text { value, span: self.span.clone() }).collect(),
                _ => Vec::new(),
            };
        };
        let elements = match value.get_ref() {
            DeValue::Array(array) => array.iter().collect(),
            _ => vec![value],
        };
        let texts = elements.into_iter().filter_map(|element| match element.get_ref() {
            DeValue::String(text) => Some(Text { value: text, span: element.span() }),
            _ => self.wrong_type(name, element, expected),
        });
        texts.collect()
    }

    /// A `Kind::Table`; one that was not written reads as all defaults.
    pub(super) fn table(&self, name: &'static str) -> Section<'a> {
        let key = self.key(name);
        let Kind::Table(table) = key.kind else { unreachable!("{name} is a table") };
        let entry = self.values.and_then(|values| values.get_key_value(name));
        let values = entry.and_then(|(_, value)| match value.get_ref() {
            DeValue::Table(values) => Some(values),
            _ => self.wrong_type(name, value, &format!("a table: [{}]", self.below(name))),
        });
        let span = entry.map_or_else(|| self.span.clone(), |(key, _)| key.span());
        Section::new(self.notes, table, Named { name, path: self.below(name), span }, values)
    }

    /// A `Kind::Named`: the tables by name.
    pub(super) fn named(&self, name: &str) -> Vec<Section<'a>> {
        let key = self.key(name);
        let Kind::Named(table) = key.kind else { unreachable!("{name} are named tables") };
        let Some(value) = self.value(name) else { return Vec::new() };
        let DeValue::Table(entries) = value.get_ref() else {
            return self.wrong_type(name, value, &format!("tables by name: [{}]", table.name)).unwrap_or_default();
        };
        let sections = entries.iter().filter_map(|(key, value)| match value.get_ref() {
            DeValue::Table(values) => {
                let path = format!("{}.{}", self.below(name), toml_key(key.get_ref()));
                let named = Named { name: key.get_ref(), path, span: key.span() };
                Some(Section::new(self.notes, table, named, Some(values)))
            }
            _ => {
                let known = table.key(key.get_ref()).is_some();
                let message = format!("{name:?} holds tables by name: [{}]", table.name);
                let diagnostic = Diagnostic::error(&key.span(), message).label("not a table");
                self.note(match known {
                    true => diagnostic.help(format!("give it a name: [{name}.main] and {} below it", key.get_ref())),
                    false => diagnostic,
                });
                None
            }
        });
        sections.collect()
    }

    /// A `Kind::List` or `Kind::ListOrTexts`: each element as a table or as the string that it is.
    pub(super) fn list(&self, name: &'static str) -> Option<Vec<Element<'a>>> {
        let key = self.key(name);
        let (table, texts) = match key.kind {
            Kind::List(table) => (table, false),
            Kind::ListOrTexts(table) => (table, true),
            _ => unreachable!("{name} is a list"),
        };
        let value = self.value(name)?;
        let expected = if texts { "a list of strings or tables" } else { "a list of tables" };
        let DeValue::Array(array) = value.get_ref() else { return self.wrong_type(name, value, expected) };
        let elements = array.iter().filter_map(|element| match element.get_ref() {
            DeValue::Table(values) => {
                let named = Named { name, path: self.below(name), span: element.span() };
                Some(Element::Table(Section::new(self.notes, table, named, Some(values))))
            }
            DeValue::String(text) if texts => Some(Element::Text(Text { value: text, span: element.span() })),
            _ => self.wrong_type(name, element, expected),
        });
        Some(elements.collect())
    }

    /// Where a list without elements stands.
    pub(super) fn empty_list(&self, name: &str) -> Option<Span> {
        let value = self.value(name)?;
        value.get_ref().as_array().filter(|array| array.is_empty()).map(|_| value.span())
    }

    /// Elements of a list as written, whatever they are.
    pub(super) fn list_len(&self, name: &str) -> usize {
        self.value(name).and_then(|value| value.get_ref().as_array()).map_or(0, |array| array.len())
    }

    /// Notes that a required key is not there, unless it is.
    pub(super) fn require(&self, name: &str, what: &str, example: &str) {
        if self.written(name).is_some() {
            return;
        }
        let diagnostic = Diagnostic::error(&self.span, format!("{what} has no {name:?}")).if_whole();
        self.note(diagnostic.label(format!("{name:?} is missing")).help(format!("for example: {name} = {example}")));
    }

    fn below(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    fn key(&self, name: &str) -> &'static Key {
        self.table.key(name).unwrap_or_else(|| panic!("{name} is not a key of [{}]", self.table.name))
    }

    fn value(&self, name: &str) -> Option<&'a Spanned<DeValue<'a>>> {
        self.values?.get(name)
    }

    fn wrong_type<T>(&self, name: &str, value: &Spanned<DeValue<'_>>, expected: &str) -> Option<T> {
        let is = match value.get_ref() {
            DeValue::String(_) => "a string",
            DeValue::Integer(_) => "a number",
            DeValue::Float(_) => "a number with a fraction",
            DeValue::Boolean(_) => "a boolean",
            DeValue::Datetime(_) => "a date or time",
            DeValue::Array(_) => "a list",
            DeValue::Table(_) => "a table",
        };
        let diagnostic = Diagnostic::error(&value.span(), format!("{name:?} must be {expected}"));
        let diagnostic = diagnostic.label(format!("this is {is}"));
        self.note(match (value.get_ref(), self.table.key(name).map(|key| &key.kind)) {
            (DeValue::String(text), Some(Kind::ListOrTexts(_))) => {
                diagnostic.help(format!("write a list: {name} = [{text:?}]"))
            }
            (DeValue::Integer(number), _) if name == "expect_status" => {
                diagnostic.help(format!("write it in quotes: {name} = \"{}\"", number.as_str()))
            }
            (DeValue::Boolean(true), Some(Kind::Word { now, .. })) if now.contains(&"v2") => {
                diagnostic.help("write \"v2\", or \"v1\" where the upstream knows no other")
            }
            _ => diagnostic,
        });
        None
    }

    fn refuse_unknown_keys(&self) {
        for (key, _) in self.values.into_iter().flatten() {
            let name = key.get_ref().as_ref();
            match self.table.key(name) {
                Some(Key { kind: Kind::Later, .. }) => self.note(not_supported(&key.span(), &format!("{name:?}"))),
                Some(_) => {}
                None => self.note(self.unknown_key(name, &key.span())),
            }
        }
    }

    fn unknown_key(&self, name: &str, span: &Span) -> Diagnostic {
        let place = if self.path.is_empty() { "the file" } else { &format!("[{}]", self.path) };
        let mut diagnostic = Diagnostic::error(span, format!("unknown key {name:?} in {place}")).label("unknown");
        // Below a broken table header keys seem to be the file's.
        diagnostic.needs_whole_file = self.path.is_empty();
        let known: Vec<&str> =
            self.table.keys.iter().filter(|key| !matches!(key.kind, Kind::Later)).map(|key| key.name).collect();
        if let Some(near) = nearest(name, &known) {
            return diagnostic.help(format!("did you mean {near:?}?"));
        }
        let mut places = Vec::new();
        tables_with(&FILE, name, &mut places);
        if !places.is_empty() {
            return diagnostic.help(format!("{name:?} belongs into {}", places.join(" or ")));
        }
        diagnostic.help(format!("known keys: {}", known.join(", ")))
    }
}

/// One element of a list.
#[derive(Clone, Debug)]
pub(super) enum Element<'a> {
    /// Written in full.
    Table(Section<'a>),
    /// The short form.
    Text(Text<'a>),
}

/// A year is 365 days here, and not humantime's 365.25.
fn in_days(duration: Duration) -> String {
    match duration.as_secs() {
        seconds if seconds > 86_400 && seconds.is_multiple_of(86_400) => format!("{} days", seconds / 86_400),
        _ => humantime::format_duration(duration).to_string(),
    }
}

fn duration_problem(error: &humantime::DurationError) -> String {
    use humantime::DurationError;
    match error {
        DurationError::UnknownUnit { unit, .. } if unit.is_empty() => "a number without a unit".to_owned(),
        DurationError::UnknownUnit { unit, .. } => format!("unknown unit {unit:?}: it takes ms, s, m, h, days"),
        DurationError::NumberOverflow => "too large".to_owned(),
        DurationError::Empty => "empty".to_owned(),
        _ => "not a number with a unit".to_owned(),
    }
}

fn tables_with(table: &'static Table, name: &str, found: &mut Vec<String>) {
    if table.key(name).is_some_and(|key| !matches!(key.kind, Kind::Later)) && !table.name.is_empty() {
        let place = format!("[{}]", table.name);
        if !found.contains(&place) {
            found.push(place);
        }
    }
    for table in table.keys.iter().filter_map(|key| key.kind.table()) {
        tables_with(table, name, found);
    }
}

/// A part of the design that has not been built yet.
pub(super) fn not_supported(span: &Span, what: &str) -> Diagnostic {
    Diagnostic::error(span, format!("{what} is not supported yet")).label("not in this version")
}

fn unknown_word(span: &Span, name: &str, word: &str, known: &[&str]) -> Diagnostic {
    let diagnostic = Diagnostic::error(span, format!("{name:?} must be {}", one_of(known)));
    // As other programs shorten it: "leastconn".
    let simple = |word: &str| word.to_lowercase().replace(['-', '_', ' '], "");
    let is_longer = |known: &&&str| word.len() > 2 && simple(known).starts_with(&simple(word));
    let longer: Vec<&str> = known.iter().filter(is_longer).copied().collect();
    let only = if let [only] = longer[..] { Some(only) } else { None };
    match nearest(word, known).or(only) {
        Some(near) => diagnostic.label("unknown").help(format!("did you mean {near:?}?")),
        None => diagnostic.label("unknown"),
    }
}

/// The known word that a typing error would turn into this one.
pub(super) fn nearest<'k>(word: &str, known: &[&'k str]) -> Option<&'k str> {
    let simple = |word: &str| word.to_lowercase().replace(['-', ' ', '.'], "_");
    let word = simple(word);
    let distance = |known: &str| strsim::osa_distance(&word, &simple(known));
    let near = known.iter().copied().map(|known| (distance(known), known)).min_by_key(|(distance, _)| *distance);
    let longest = |known: &str| word.chars().count().max(known.chars().count());
    near.filter(|(distance, known)| *distance <= longest(known) / 3).map(|(_, known)| known)
}

/// Quoted where TOML wants it.
fn toml_key(name: &str) -> String {
    let bare = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if bare { name.to_owned() } else { format!("{name:?}") }
}

fn one_of(words: &[&str]) -> String {
    if words.len() == 1 { quoted(words) } else { format!("one of {}", quoted(words)) }
}

/// `"a", "b"`
pub(super) fn quoted(words: &[&str]) -> String {
    words.iter().map(|word| format!("{word:?}")).collect::<Vec<_>>().join(", ")
}
