//! The shape of the sources: layers, purity, `unsafe`, sizes, first lines, what stands at the top level.
//!
//! Each rule is a function from a file's text to what is wrong with it, and has a test that shows it finding something.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Before the tests of a file.
const FILE_LINES_MAX: usize = 600;
const FUNCTION_LINES_MAX: usize = 70;

/// Files and directories of `src/` that decide and do not act, whether or not they still say so themselves.
const PURE: [&str; 8] = [
    "src/proxy_protocol/",
    "src/termination.rs",
    "src/config/validate.rs",
    "src/config/diff.rs",
    "src/config/keys.rs",
    "src/config/schema.rs",
    "src/pool/balance.rs",
    "src/health/state.rs",
];

/// What pure code does not name: time, chance, files, sockets, threads, the runtime, the terminal.
const IMPURE: [&str; 17] = [
    "tokio",
    "fastrand",
    "rand::",
    "ulid::Ulid::new",
    "std::fs",
    "std::io",
    "std::env",
    "std::process",
    "std::thread",
    "std::time::SystemTime",
    "Instant::now",
    "SystemTime::now",
    "TcpStream",
    "TcpListener",
    "UdpSocket",
    "tracing::",
    "println!",
];

/// `write!` into a `Vec` needs this trait; no byte leaves the process by it.
const FORMATTING: &str = "use std::io::Write as _;";

/// Where a test may sleep, and why it is no wait for an event.
const SLEEPS: [(&str, &str); 4] = [
    ("tests/it/hostile.rs", "a slow client is what is tested"),
    ("tests/it/support/mod.rs", "`eventually` polls for what only polling can show"),
    ("tests/it/traffic.rs", "a slow peer is what is tested"),
    ("src/health/probe.rs", "a thread that does something else is what is tested"),
];

/// Everything that may stand beside `src/`.
const TOP_LEVEL: [&str; 18] = [
    ".ci",
    ".dockerignore",
    ".gitattributes",
    ".github",
    ".gitignore",
    ".rustfmt.toml",
    "CHANGELOG.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "README.md",
    "benches",
    "config",
    "deploy",
    "docs",
    "src",
    "tests",
];

/// One Rust file of the repository.
struct Source {
    /// From the top, with `/`.
    path: String,
    text: String,
    /// The text with comments and the insides of strings blanked; each byte stays where it is.
    code: String,
}

impl Source {
    fn new(path: &str, text: &str) -> Source {
        Source { path: path.to_owned(), text: text.to_owned(), code: code(text) }
    }

    /// Where its unit tests begin.
    fn tests(&self) -> usize {
        let start = self.text.find("#[cfg(test)]\nmod ").or_else(|| self.text.find("#[cfg(test)]\n#[path"));
        start.unwrap_or(self.text.len())
    }

    fn is_pure(&self) -> bool {
        PURE.iter().any(|pure| self.path.starts_with(pure)) || self.text.starts_with("//! PURE")
    }

    /// Where it is, for a message.
    fn at(&self, line: usize) -> String {
        format!("{}:{}", self.path, line + 1)
    }
}

#[test]
fn the_sources_are_tidy() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources: Vec<Source> = ["src", "tests", "benches"].iter().flat_map(|top| sources_in(&root.join(top))).collect();
    assert!(sources.len() > 50, "found only {} files", sources.len());
    for pure in PURE {
        assert!(
            sources.iter().any(|source| source.path.starts_with(pure)),
            "{pure} is gone: where do its rules stand now?"
        );
    }
    let order = module_order(&std::fs::read_to_string(root.join("src/lib.rs")).expect("src/lib.rs is there"));
    assert!(order.len() > 15, "{order:?}");
    let rules = [first_line, impure, unsafe_blocks, long_file, long_functions, unfinished, sleeping];
    let mut wrong: Vec<String> = sources.iter().flat_map(|source| rules.iter().flat_map(|rule| rule(source))).collect();
    wrong.extend(sources.iter().flat_map(|source| upward(source, &order)));
    wrong.extend(strangers(&top_level(root)));
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

fn sources_in(directory: &Path) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut sources = Vec::new();
    let mut entries: Vec<PathBuf> = std::fs::read_dir(directory)
        .expect("a directory of sources")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    entries.sort();
    for entry in entries {
        if entry.is_dir() && !entry.ends_with("target") {
            sources.extend(sources_in(&entry));
        } else if entry.extension().is_some_and(|extension| extension == "rs") {
            let path = entry.strip_prefix(root).expect("inside the repository").to_string_lossy().replace('\\', "/");
            sources.push(Source::new(&path, &std::fs::read_to_string(&entry).expect("a source is UTF-8")));
        }
    }
    sources
}

/// The modules of `src/lib.rs`, bottom first.
fn module_order(lib: &str) -> Vec<String> {
    let modules = lib.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'));
    modules.map(str::to_owned).collect()
}

fn code(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let begins = matches!(next, '/' | '"' | '\'' | 'r' | 'b');
        let blank = begins.then(|| comment(rest).or_else(|| string(rest, code.chars().last()))).flatten();
        if let Some(length) = blank {
            code.extend(rest[..length].bytes().map(|skipped| if skipped == b'\n' { '\n' } else { ' ' }));
            rest = &rest[length..];
        } else {
            code.push(next);
            rest = &rest[next.len_utf8()..];
        }
    }
    code
}

/// Length of the comment that begins here.
fn comment(text: &str) -> Option<usize> {
    if text.starts_with("//") {
        return Some(text.find('\n').unwrap_or(text.len()));
    }
    text.starts_with("/*").then(|| text.find("*/").map_or(text.len(), |end| end + 2))
}

/// Length of the string or character that begins here; `before` tells a raw string from a name that ends in `r`.
fn string(text: &str, before: Option<char>) -> Option<usize> {
    let in_name = before.is_some_and(|before| before.is_alphanumeric() || before == '_');
    let raw = text.strip_prefix("br").or_else(|| text.strip_prefix('r')).filter(|_| !in_name);
    if let Some(hashes) = raw.map(|raw| &raw[..raw.len() - raw.trim_start_matches('#').len()])
        && let Some(body) = raw.and_then(|raw| raw[hashes.len()..].strip_prefix('"'))
    {
        let end = format!("\"{hashes}");
        return Some(text.len() - body.len() + body.find(&end).map_or(body.len(), |at| at + end.len()));
    }
    if let Some(character) = text.strip_prefix('\'') {
        // A lifetime has no closing quote so soon.
        let mut characters = character.char_indices();
        let (_, first) = characters.next()?;
        if first == '\\' {
            return text[3..].find('\'').map(|at| at + 4);
        }
        return characters.next().filter(|&(_, second)| second == '\'').map(|(at, _)| at + 2);
    }
    let body = text.strip_prefix('"')?;
    let mut escaped = false;
    for (at, character) in body.char_indices() {
        match character {
            '"' if !escaped => return Some(at + 2),
            _ => escaped = character == '\\' && !escaped,
        }
    }
    Some(text.len())
}

/// Modules of the crate that a line of code names, seen from a module path: `crate::x`, `crate::{x, y}`, `super::x`.
fn named_modules(code: &str, inside: &[&str]) -> Vec<(usize, String)> {
    let mut named = Vec::new();
    for (at, _) in code.match_indices("crate::").chain(code.match_indices("super::")) {
        let before = code[..at].chars().last();
        if before.is_some_and(|before| before.is_alphanumeric() || before == '_' || before == '$')
            || code[..at].ends_with("super::")
        {
            continue;
        }
        let mut path = &code[at..];
        let mut depth = inside.len();
        if let Some(rest) = path.strip_prefix("crate::") {
            (path, depth) = (rest, 0);
        }
        while let Some(rest) = path.strip_prefix("super::") {
            (path, depth) = (rest, depth.saturating_sub(1));
        }
        let line = code[..at].matches('\n').count();
        if depth == 0 {
            named.extend(first_names(path).into_iter().map(|name| (line, name)));
        }
    }
    named
}

/// `x::y` names x; `{x::y, z}` names x and z.
fn first_names(path: &str) -> Vec<String> {
    let name = |text: &str| text.chars().take_while(|one| one.is_alphanumeric() || *one == '_').collect::<String>();
    let Some(group) = path.strip_prefix('{') else { return vec![name(path)] };
    let (mut names, mut depth, mut start) = (Vec::new(), 0, 0);
    for (at, one) in group.char_indices() {
        match one {
            '{' => depth += 1,
            ',' | '}' if depth == 0 => {
                names.push(name(group[start..at].trim_start()));
                start = at + 1;
                if one == '}' {
                    break;
                }
            }
            '}' => depth -= 1,
            _ => {}
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

/// Names of modules that stand below the file's own in `src/lib.rs`.
fn upward(source: &Source, order: &[String]) -> Vec<String> {
    let Some(path) = source.path.strip_prefix("src/").and_then(|path| path.strip_suffix(".rs")) else {
        return Vec::new();
    };
    let inside: Vec<&str> = path.trim_end_matches("/mod").split('/').collect();
    let Some(own) = order.iter().position(|module| module == inside[0]) else { return Vec::new() };
    let with_tests = [&inside[..], &["tests"]].concat();
    let (before, tests) = source.code.split_at(source.tests());
    let first_line_of_tests = before.matches('\n').count();
    let mut named = named_modules(before, &inside);
    let tests = named_modules(tests, &with_tests);
    named.extend(tests.into_iter().map(|(line, name)| (line + first_line_of_tests, name)));
    let above = |name: &String| order.iter().position(|module| module == name).is_some_and(|at| at > own);
    let wrong = named.into_iter().filter(|(_, name)| above(name));
    wrong.map(|(line, name)| format!("{}: {} uses {name}, which stands above it", source.at(line), inside[0])).collect()
}

fn first_line(source: &Source) -> Vec<String> {
    let missing = !source.text.starts_with("//! ");
    missing
        .then(|| format!("{}: the first line does not say with `//!` what the file owns", source.at(0)))
        .into_iter()
        .collect()
}

fn impure(source: &Source) -> Vec<String> {
    if !source.is_pure() {
        return Vec::new();
    }
    let code = &source.code[..source.tests()];
    let found = code.lines().enumerate().flat_map(|(line, text)| {
        let text = if text == FORMATTING { "" } else { text };
        let named = IMPURE.iter().filter(move |word| names(text, word));
        named.map(move |word| format!("{}: a pure file names {word}", source.at(line)))
    });
    found.collect()
}

/// Does the line name this path, and not one that merely ends or begins like it?
fn names(line: &str, word: &str) -> bool {
    let part_of_name = |one: char| one.is_alphanumeric() || one == '_';
    line.match_indices(word).any(|(at, _)| {
        let after = line[at + word.len()..].chars().next();
        let whole = word.ends_with([':', '!']) || !after.is_some_and(part_of_name);
        whole && !line[..at].chars().last().is_some_and(part_of_name)
    })
}

fn unsafe_blocks(source: &Source) -> Vec<String> {
    let lines: Vec<&str> = source.text.lines().collect();
    let mut wrong = Vec::new();
    for (line, _) in source.code.lines().enumerate().filter(|(_, text)| names(text, "unsafe")) {
        if !source.path.starts_with("src/net/") {
            wrong.push(format!("{}: `unsafe` outside src/net/", source.at(line)));
        }
        let comment = lines[..line].iter().rev().take_while(|above| above.trim_start().starts_with("//"));
        if !comment.into_iter().any(|above| above.trim_start().starts_with("// SAFETY:")) {
            wrong.push(format!("{}: `unsafe` without a `// SAFETY:` above it", source.at(line)));
        }
    }
    wrong
}

fn long_file(source: &Source) -> Vec<String> {
    let lines = source.text[..source.tests()].lines().count();
    let long = lines > FILE_LINES_MAX;
    long.then(|| format!("{}: {lines} lines before its tests, {FILE_LINES_MAX} at most", source.path))
        .into_iter()
        .collect()
}

/// Lines of code, without blank ones, comments and what long strings hold (tables, snapshots).
///
/// rustfmt puts the closing brace under the line on which a function begins.
fn long_functions(source: &Source) -> Vec<String> {
    let lines: Vec<&str> = source.code.lines().map(str::trim_end).collect();
    let mut wrong = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let words = line.trim_start();
        let begins = ["fn ", "pub ", "pub(", "async ", "const ", "unsafe ", "extern "];
        let one_line = line.ends_with(';') || line.ends_with('}');
        if one_line || !names(line, "fn") || !begins.iter().any(|begin| words.starts_with(begin)) {
            continue;
        }
        let closing = format!("{}}}", &line[..line.len() - words.len()]);
        let end = lines[start..].iter().position(|line| *line == closing).unwrap_or_default();
        let length = lines[start..=start + end].iter().filter(|line| !line.is_empty()).count();
        if length > FUNCTION_LINES_MAX {
            wrong.push(format!("{}: a function of {length} lines, {FUNCTION_LINES_MAX} at most", source.at(start)));
        }
    }
    wrong
}

fn unfinished(source: &Source) -> Vec<String> {
    let found = source.code.lines().enumerate().flat_map(|(line, text)| {
        let marks = ["todo!", "unimplemented!", "dbg!"].into_iter().filter(move |mark| names(text, mark));
        let marks = marks.chain(text.contains("#[ignore").then_some("#[ignore]"));
        marks.map(move |mark| format!("{}: {mark}", source.at(line)))
    });
    found.collect()
}

fn sleeping(source: &Source) -> Vec<String> {
    let start = if source.path.starts_with("src/") { source.tests() } else { 0 };
    if SLEEPS.iter().any(|(path, _)| *path == source.path) {
        return Vec::new();
    }
    let first = source.text[..start].matches('\n').count();
    let found = source.code[start..].lines().enumerate().filter(|(_, text)| text.contains("thread::sleep"));
    found.map(|(line, _)| format!("{}: a test sleeps; wait for the event", source.at(first + line))).collect()
}

/// What git has at the top; without git, what is there.
fn top_level(root: &Path) -> BTreeSet<String> {
    let listed = Command::new("git").arg("-C").arg(root).args(["ls-files", "-z"]).output();
    match listed {
        Ok(listed) if listed.status.success() && !listed.stdout.is_empty() => {
            let files = String::from_utf8_lossy(&listed.stdout).into_owned();
            files
                .split('\0')
                .filter_map(|file| file.split('/').next())
                .filter(|top| !top.is_empty())
                .map(str::to_owned)
                .collect()
        }
        _ => {
            let entries = std::fs::read_dir(root).expect("the repository is there");
            let names = entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned());
            names.filter(|name| ![".git", "target"].contains(&name.as_str())).collect()
        }
    }
}

fn strangers(top_level: &BTreeSet<String>) -> Vec<String> {
    let strangers = top_level.iter().filter(|entry| !TOP_LEVEL.contains(&entry.as_str()));
    strangers.map(|entry| format!("{entry}: does not belong at the top level")).collect()
}

mod finds {
    use super::*;

    fn assert_finds(rule: fn(&Source) -> Vec<String>, path: &str, text: &str, expected: &[&str]) {
        let found = rule(&Source::new(path, text));
        assert_eq!(found.len(), expected.len(), "{found:?}");
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.contains(expected), "{found:?} is not about {expected:?}");
        }
    }

    #[test]
    fn comments_and_strings_are_no_code() {
        let text = "let a = \"x // \\\" crate::b\"; // crate::c\nlet c = '\"'; /* crate::d\n */ let r = r#\"\"crate::e\"#; fn f<'a>(x: &'a u8) {}\n";
        let code = code(text);
        assert_eq!(code.len(), text.len());
        assert_eq!(code.matches('\n').count(), text.matches('\n').count());
        assert!(!code.contains("crate") && code.contains("fn f<'a>(x: &'a u8) {}"), "{code}");
    }

    #[test]
    fn upward_imports() {
        let order: Vec<String> = module_order("/// Low.\npub mod low;\npub mod middle;\npub mod high;\n");
        let found = |path: &str, text: &str| upward(&Source::new(path, text), &order).len();
        for (text, count) in [
            ("use crate::low::X;", 0),
            ("use crate::middle::X;", 0),
            ("use crate::high::X;", 1),
            ("use crate::{low, high::{self, Y}, middle};", 1),
            ("fn f() { crate::high::g() }", 1),
            ("use super::inner;", 0),
            ("use super::super::high;", 1),
            ("// crate::high\nlet x = \"crate::high\";", 0),
            (
                "#[cfg(test)]\nmod tests {\n    use crate::high;\n    use super::super::inner;\n    use super::super::super::high;\n}",
                2,
            ),
        ] {
            assert_eq!(found("src/middle/file.rs", text), count, "{text}");
        }
        assert_eq!(found("src/middle/mod.rs", "use super::high;"), 1);
        assert_eq!(found("src/middle.rs", "use super::high;"), 1);
        assert_eq!(found("src/high.rs", "use crate::low; use crate::{middle, high};"), 0);
        assert_eq!(found("src/main.rs", "use crate::high;"), 0);
        let line = upward(&Source::new("src/low.rs", "//! Low.\n\nuse crate::high;\n"), &order).remove(0);
        assert_eq!(line, "src/low.rs:3: low uses high, which stands above it");
    }

    #[test]
    fn impure_words() {
        assert_finds(
            impure,
            "src/pool/balance.rs",
            "use std::time::Instant;\nlet x = Instant::now();\n",
            &["Instant::now"],
        );
        assert_finds(
            impure,
            "src/proxy_protocol/new.rs",
            "use std::io::Read;\nuse tokio::net;\n",
            &["std::io", "tokio"],
        );
        assert_finds(impure, "src/other.rs", "//! PURE. Rules.\nlet n = fastrand::u32(..);\n", &["fastrand"]);
        assert_finds(impure, "src/other.rs", "//! Acts.\nuse tokio::net;\n", &[]);
        assert_finds(
            impure,
            "src/other.rs",
            "//! PURE.\n// tokio\nlet tokio_like = 1;\n#[cfg(test)]\nmod tests { use std::fs; }\n",
            &[],
        );
    }

    #[test]
    fn unsafe_code() {
        let good = "//! Net.\n// SAFETY: the pointer\n// is valid.\nunsafe { f() }\n";
        assert_finds(unsafe_blocks, "src/net/x.rs", good, &[]);
        assert_finds(unsafe_blocks, "src/relay.rs", good, &["outside"]);
        assert_finds(unsafe_blocks, "src/net/x.rs", "//! Net.\nlet x = unsafe { f() };\n", &["SAFETY"]);
        assert_finds(unsafe_blocks, "src/net/x.rs", "//! Nothing unsafe.\nlet unsafely = \"unsafe\";\n", &[]);
    }

    #[test]
    fn sizes() {
        let lines = |count: usize| "    x();\n".repeat(count);
        assert_finds(long_file, "src/x.rs", &lines(600), &[]);
        assert_finds(long_file, "src/x.rs", &lines(601), &["601 lines"]);
        assert_finds(long_file, "src/x.rs", &format!("{}#[cfg(test)]\nmod tests {{\n{}", lines(600), lines(600)), &[]);
        let function = |count| format!("pub(crate) async fn f(\n    x: u8,\n) {{\n{}}}\n", lines(count));
        assert_finds(long_functions, "src/x.rs", &function(66), &[]);
        assert_finds(long_functions, "src/x.rs", &function(67), &["71 lines"]);
        let method = format!("impl X {{\n    fn f() {{\n{}    }}\n    fn g() {{}}\n}}\n", lines(69));
        assert_finds(long_functions, "src/x.rs", &method, &["x.rs:2: a function of 71 lines"]);
    }

    #[test]
    fn unfinished_and_sleeping_code() {
        assert_finds(
            unfinished,
            "src/x.rs",
            "todo!();\nunimplemented!();\n#[ignore]\n// todo!()\n",
            &["todo", "unim", "ignore"],
        );
        let sleeps = "fn wait() { std::thread::sleep(x) }\n";
        assert_finds(sleeping, "tests/it/x.rs", sleeps, &["x.rs:1: a test sleeps"]);
        assert_finds(sleeping, "src/x.rs", sleeps, &[]);
        let in_tests = format!("//! X.\n#[cfg(test)]\nmod tests {{\n    {sleeps}}}\n");
        assert_finds(sleeping, "src/x.rs", &in_tests, &["x.rs:4: a test sleeps"]);
    }

    #[test]
    fn first_lines_and_strangers() {
        assert_finds(first_line, "src/x.rs", "//! Owns x.\n", &[]);
        assert_finds(first_line, "src/x.rs", "use x;\n//! Owns x.\n", &["src/x.rs:1"]);
        let top = |names: &[&str]| strangers(&names.iter().map(|&name| name.to_owned()).collect());
        assert!(top(&["src", "tests", "Cargo.toml", ".ci"]).is_empty());
        assert_eq!(top(&["src", "notes.txt"]), ["notes.txt: does not belong at the top level"]);
    }
}
