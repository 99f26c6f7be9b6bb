//! What STYLE asks of the sources and a test can see: the modules' order, files without I/O, `unsafe`, and sizes.
//!
//! Each rule is a function from text to complaints. Above them stands what reads the sources, below them their tests.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::support::skip;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const FILE_LINES_MAX: usize = 600;
const FUNCTION_LINES_MAX: usize = 70;

/// What the repository has at its top, apart from dot files and licenses.
const TOP_LEVEL: [&str; 8] = ["Cargo.toml", "Cargo.lock", "README.md", "src", "config", "tests", "benches", "deploy"];

/// Files that decide, and so must keep their mark.
const MARKED_PURE: [&str; 10] = [
    "src/proxy_protocol/mod.rs",
    "src/proxy_protocol/v1.rs",
    "src/proxy_protocol/v2.rs",
    "src/termination.rs",
    "src/config/validate.rs",
    "src/config/diff.rs",
    "src/pool/balance.rs",
    "src/pool/source_hash.rs",
    "src/pool/header.rs",
    "src/health/state.rs",
];

/// Names that stand for a runtime, a clock, chance, files, sockets, threads or output.
const IMPURE: &str = "\
    tokio axum hyper hyper_util notify rustix libc socket2 tracing fastrand rand ulid SystemTime sleep fs File \
    TcpStream TcpListener UdpSocket UnixStream UnixListener UnixDatagram ToSocketAddrs to_socket_addrs stdin stdout \
    stderr print println eprint eprintln thread spawn env process UNIX_EPOCH";

/// Modules of ours that act.
const ACTING: [&str; 5] = ["net", "metrics", "drain", "log", "relay"];

/// A Rust source file, the path as seen from the repository.
struct Source {
    path: String,
    text: String,
}

impl Source {
    /// Everything but comments and literals.
    fn code(&self) -> String {
        blank_prose(&self.text)
    }

    /// The code that is compiled into the program.
    fn program(&self) -> String {
        blank_tests(&self.code())
    }

    fn is_program(&self) -> bool {
        self.path.starts_with("src/") && !self.path.ends_with("/tests.rs") && !self.path.ends_with("_tests.rs")
    }
}

fn sources() -> Vec<Source> {
    let mut found = Vec::new();
    for directory in ["src", "tests", "benches"] {
        walk(&Path::new(ROOT).join(directory), &mut found);
    }
    assert!(found.len() > 50, "{} sources: the walk has lost its way", found.len());
    found.sort_by(|one, other| one.path.cmp(&other.path));
    found
}

fn walk(directory: &Path, found: &mut Vec<Source>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("target") {
            walk(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.strip_prefix(ROOT).unwrap().to_str().unwrap().to_owned();
            found.push(Source { path: name, text: fs::read_to_string(&path).unwrap() });
        }
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(ROOT).join(path)).unwrap()
}

/// Puts every source for which `which` holds through a rule; a complaint is a line and what is wrong there.
#[track_caller]
fn hold(which: impl Fn(&Source) -> bool, rule: impl Fn(&Source) -> Vec<Complaint>) {
    let mut all = Vec::new();
    for source in sources().iter().filter(|source| which(source)) {
        all.extend(rule(source).into_iter().map(|(line, what)| format!("{}:{line}: {what}", source.path)));
    }
    assert!(all.is_empty(), "{}", all.join("\n"));
}

/// A line, counted from 1, and what is wrong there.
type Complaint = (usize, String);

#[test]
fn a_module_uses_only_those_above_it_in_the_list() {
    let modules = modules(&read("src/lib.rs"));
    assert!(modules.len() > 10, "{modules:?}");
    hold(Source::is_program, |source| upward(&modules, &source.path, &source.program()));
}

#[test]
fn pure_files_do_no_io_and_see_no_clock() {
    let modules = modules(&read("src/lib.rs"));
    let is_pure = |source: &Source| is_pure(&modules, &source.path, &source.text);
    let marked: BTreeSet<String> = sources().into_iter().filter(is_pure).map(|source| source.path).collect();
    let lost: Vec<&str> = MARKED_PURE.into_iter().filter(|path| !marked.contains(*path)).collect();
    assert!(lost.is_empty(), "without their mark PURE: {lost:?}");
    hold(is_pure, |source| impure(&source.path, &source.program()));
}

#[test]
fn unsafe_stands_in_net_under_the_invariant_that_makes_it_sound() {
    hold(|_| true, |source| unsound(&source.path, &source.text));
}

#[test]
fn files_and_functions_have_a_size_that_one_can_read() {
    hold(Source::is_program, |source| long_file(&source.program()));
    hold(|_| true, |source| long_functions(&source.code()));
}

#[test]
fn every_file_says_what_it_owns() {
    hold(|_| true, |source| undescribed(&source.text));
}

#[test]
fn nothing_is_left_undone_and_no_test_is_switched_off() {
    hold(|_| true, |source| undone(&source.code()));
}

#[test]
fn tests_wait_for_events_and_do_not_sleep() {
    let has_tests = |source: &Source| !source.path.starts_with("tests/it/support/");
    hold(has_tests, |source| {
        let program = if source.is_program() { source.program() } else { String::new() };
        let of_tests = |line: usize| program.lines().nth(line - 1).is_none_or(|line| line == TEST_LINE);
        sleeps(&source.text).into_iter().filter(|&(line, _)| of_tests(line)).collect()
    });
}

#[test]
fn every_dependency_has_its_sentence() {
    for path in ["Cargo.toml", "tests/fuzz/Cargo.toml"] {
        let found = unexplained(&read(path));
        assert!(found.is_empty(), "{path}: {found:?}");
    }
}

#[test]
fn the_top_level_stays_short() {
    match Command::new("git").args(["ls-files", "-z"]).current_dir(ROOT).output() {
        Ok(output) if output.status.success() => {
            let listed = String::from_utf8(output.stdout).unwrap();
            let found = astray(listed.split_terminator('\0'));
            assert!(found.is_empty(), "at the top level, where they do not belong: {found:?}");
        }
        _ => skip("the_top_level_stays_short", "this is no git checkout"),
    }
}

// The rules.

/// A module of `lib.rs`, and whether its documentation says PURE.
#[derive(Debug, PartialEq)]
struct Module {
    name: String,
    pure: bool,
}

fn modules(lib: &str) -> Vec<Module> {
    let mut modules = Vec::new();
    let mut pure = false;
    for line in lib.lines() {
        if let Some(documentation) = line.strip_prefix("///") {
            pure |= documentation.starts_with(" PURE.");
        } else if let Some(name) = line.strip_prefix("pub mod ").and_then(|rest| rest.strip_suffix(';')) {
            modules.push(Module { name: name.to_owned(), pure: std::mem::take(&mut pure) });
        }
    }
    modules
}

/// `src/config/diff.rs` -> `["config", "diff"]`; nothing for the crate's root and for what is not in `src`.
fn module_path(path: &str) -> Vec<&str> {
    let inside = path.strip_prefix("src/").and_then(|path| path.strip_suffix(".rs")).unwrap_or("");
    let inside = inside.strip_suffix("/mod").unwrap_or(inside);
    inside.split('/').filter(|part| !["", "lib", "main"].contains(part)).collect()
}

fn upward(modules: &[Module], path: &str, program: &str) -> Vec<Complaint> {
    let Some(&own) = module_path(path).first() else { return Vec::new() };
    let place = |name: &str| modules.iter().position(|module| module.name == name);
    let Some(own_place) = place(own) else { return vec![(1, format!("lib.rs does not list {own}"))] };
    let wrong = uses(path, program).into_iter().filter_map(|(line, used)| match place(&used) {
        Some(place) if place <= own_place => None,
        Some(_) => Some((line, format!("{own} uses {used}, which lib.rs lists below it"))),
        None => Some((line, format!("crate::{used} is no module of lib.rs"))),
    });
    wrong.collect()
}

/// Which modules of the crate's root are named, by `crate::` or by as many `super::` as lead there.
fn uses(path: &str, program: &str) -> Vec<(usize, String)> {
    let tokens = tokens(program);
    let token = |at: usize| tokens.get(at).map_or("", |&(_, text)| text);
    let depth = module_path(path).len();
    let (mut braces, mut inline) = (0, Vec::new());
    let mut found = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let line = tokens[at].0;
        match token(at) {
            "{" => {
                braces += 1;
                if at > 1 && token(at - 2) == "mod" {
                    inline.push(braces);
                }
            }
            "}" => {
                if inline.last() == Some(&braces) {
                    inline.pop();
                }
                braces -= 1;
            }
            "crate" if token(at + 1) == "::" => found.extend(heads(&tokens[at + 2..]).map(|head| (line, head))),
            "super" => {
                let mut supers = 1;
                while token(at + 1) == "::" && token(at + 2) == "super" {
                    (supers, at) = (supers + 1, at + 2);
                }
                if supers >= depth + inline.len() && token(at + 1) == "::" {
                    found.extend(heads(&tokens[at + 2..]).map(|head| (line, head)));
                }
            }
            _ => {}
        }
        at += 1;
    }
    found
}

/// The first names of a path or of a group of paths: `a` of `a::b`, `a` and `c` of `{a::{b, d}, c}`.
fn heads(tokens: &[(usize, &str)]) -> impl Iterator<Item = String> {
    let mut heads = Vec::new();
    let mut depth = 0;
    for (at, &(_, text)) in tokens.iter().enumerate() {
        match text {
            "{" => depth += 1,
            "}" => depth -= 1,
            "," => {}
            name if depth == 0 || (depth == 1 && ["{", ","].contains(&tokens[at - 1].1)) => heads.push(name.to_owned()),
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    heads.into_iter()
}

fn is_pure(modules: &[Module], path: &str, text: &str) -> bool {
    let of_pure_module =
        module_path(path).first().is_some_and(|own| modules.iter().any(|module| module.name == *own && module.pure));
    path.starts_with("src/") && (of_pure_module || text.starts_with("//! PURE."))
}

fn impure(path: &str, program: &str) -> Vec<Complaint> {
    let tokens = tokens(program);
    let mut found = Vec::new();
    for (at, &(line, text)) in tokens.iter().enumerate() {
        let after = |sign: &str| at > 0 && tokens[at - 1].1 == sign;
        let looks_at_clock = text == "now" && after("::") || text == "elapsed" && after(".");
        if IMPURE.split(' ').any(|name| name == text) || looks_at_clock {
            found.push((line, format!("{text} in a file marked PURE")));
        }
    }
    let acting = uses(path, program).into_iter().filter(|(_, used)| ACTING.contains(&used.as_str()));
    found.extend(acting.map(|(line, used)| (line, format!("a file marked PURE uses {used}"))));
    found
}

fn unsound(path: &str, text: &str) -> Vec<Complaint> {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let mut found = Vec::new();
    for (line, _) in tokens(&blank_prose(text)).into_iter().filter(|&(_, text)| text == "unsafe") {
        let mut above = lines[..line - 1].iter().rev().take_while(|line| line.starts_with("//"));
        if !path.starts_with("src/net/") {
            found.push((line, "unsafe outside src/net/".to_owned()));
        } else if !above.any(|line| line.starts_with("// SAFETY:")) {
            found.push((line, "unsafe without a // SAFETY: just above".to_owned()));
        }
    }
    found
}

fn long_file(program: &str) -> Vec<Complaint> {
    let count = program.lines().filter(|line| *line != TEST_LINE).count();
    if count <= FILE_LINES_MAX {
        return Vec::new();
    }
    vec![(count, format!("{count} lines without the tests; {FILE_LINES_MAX} are the limit"))]
}

fn long_functions(code: &str) -> Vec<Complaint> {
    let tokens = tokens(code);
    let mut found = Vec::new();
    for (at, &(line, text)) in tokens.iter().enumerate() {
        let Some(&(_, name)) = tokens.get(at + 1) else { continue };
        if text != "fn" || !name.starts_with(is_word) {
            continue;
        }
        let Some(&(last, _)) = tokens[at..].get(item_end(tokens[at..].iter().map(|&(_, text)| text))) else { continue };
        let count = last - line + 1;
        if count > FUNCTION_LINES_MAX {
            found.push((line, format!("{name} has {count} lines; {FUNCTION_LINES_MAX} are the limit")));
        }
    }
    found
}

fn undescribed(text: &str) -> Vec<Complaint> {
    if text.starts_with("//! ") {
        return Vec::new();
    }
    vec![(1, "the first line is no //! that says what the file owns".to_owned())]
}

fn undone(code: &str) -> Vec<Complaint> {
    let tokens = tokens(code);
    let mut found = Vec::new();
    for window in tokens.windows(3) {
        let [(line, first), (_, second), (_, third)] = window else { unreachable!("windows of 3") };
        match (*first, *second, *third) {
            ("todo" | "unimplemented" | "dbg", "!", _) => found.push((*line, format!("{first}!"))),
            ("#", "[", "ignore") => found.push((*line, "#[ignore]".to_owned())),
            _ => {}
        }
    }
    found
}

fn sleeps(text: &str) -> Vec<Complaint> {
    let lines: Vec<&str> = text.lines().collect();
    let says_why = |line: usize| lines[line.saturating_sub(2)..line].iter().any(|line| line.contains("// SLEEP: "));
    let mut found = Vec::new();
    for window in tokens(&blank_prose(text)).windows(2) {
        let (line, name) = window[0];
        if (name == "sleep" || name == "sleep_until") && window[1].1 == "(" && !says_why(line) {
            found.push((line, "sleeps: wait for the event, or say `// SLEEP: why` just above".to_owned()));
        }
    }
    found
}

fn unexplained(manifest: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut section = "";
    let mut above = "";
    for line in manifest.lines() {
        let explained = above.starts_with("# ") && above.ends_with('.');
        above = line;
        if let Some(header) = line.strip_prefix('[') {
            section = header.trim_end_matches(']');
            if section.contains("dependencies.") && !explained {
                found.push(section.to_owned());
            }
        } else if let Some((name, _)) = line.split_once(['=', '.'])
            && !line.starts_with([' ', '#', ']', '"'])
            && section.ends_with("dependencies")
            && !explained
        {
            found.push(name.trim().to_owned());
        }
    }
    found
}

fn astray<'a>(listed: impl Iterator<Item = &'a str>) -> BTreeSet<&'a str> {
    let top = listed.map(|path| path.split('/').next().unwrap_or(path));
    top.filter(|name| !TOP_LEVEL.contains(name) && !name.starts_with('.') && !name.starts_with("LICENSE")).collect()
}

// Reading Rust, as far as the rules need it.

fn is_word(char: char) -> bool {
    char.is_alphanumeric() || char == '_'
}

/// The same text with spaces for comments and for what stands in quotes; lines stay where they are.
fn blank_prose(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    let mut in_word = false;
    while let Some(first) = rest.chars().next() {
        let prose = if in_word { quoted(rest) } else { raw(rest).or_else(|| quoted(rest)) };
        let (length, blank) = prose.map_or((first.len_utf8(), false), |length| (length, true));
        let (taken, after) = rest.split_at(length);
        if blank {
            code.extend(taken.chars().map(|char| if char == '\n' { '\n' } else { ' ' }));
        } else {
            code.push(first);
        }
        in_word = !blank && is_word(first);
        rest = after;
    }
    code
}

/// The length of the comment, string or character at the start of `text`.
fn quoted(text: &str) -> Option<usize> {
    let mut chars = text.char_indices().skip(1);
    match text.as_bytes() {
        [b'/', b'/', ..] => Some(text.find('\n').unwrap_or(text.len())),
        [b'/', b'*', ..] => {
            let mut depth = 0;
            let mut at = 0;
            while at < text.len() {
                let step = match &text.as_bytes()[at..] {
                    [b'/', b'*', ..] => 1,
                    [b'*', b'/', ..] => -1,
                    _ => 0,
                };
                depth += step;
                at += if step == 0 { 1 } else { 2 };
                if depth == 0 {
                    break;
                }
            }
            Some(at)
        }
        [b'"', ..] => loop {
            match chars.next() {
                Some((_, '\\')) => drop(chars.next()),
                Some((at, '"')) => break Some(at + 1),
                Some(_) => {}
                None => break Some(text.len()),
            }
        },
        // A lifetime is a quote too; a character has its second one.
        [b'\'', b'\\', _, ..] => text[3..].find('\'').map(|at| at + 4),
        [b'\'', ..] => {
            chars.next()?;
            chars.next().filter(|&(_, char)| char == '\'').map(|(at, _)| at + 1)
        }
        _ => None,
    }
}

/// The length of the raw string at the start of `text`.
fn raw(text: &str) -> Option<usize> {
    let prefix = ["r", "br", "cr"]
        .into_iter()
        .find(|prefix| text.strip_prefix(prefix).is_some_and(|rest| rest.trim_start_matches('#').starts_with('"')))?;
    let rest = &text[prefix.len()..];
    let hashes = rest.len() - rest.trim_start_matches('#').len();
    let open = prefix.len() + hashes + 1;
    let close = format!("\"{}", "#".repeat(hashes));
    Some(text[open..].find(&close).map_or(text.len(), |at| open + at + close.len()))
}

/// What `blank_tests` makes of each line of a test.
const TEST_LINE: &str = "\u{b7}";

/// The same code without the items under `#[cfg(test)]`.
fn blank_tests(code: &str) -> String {
    const MARK: &str = "#[cfg(test)]";
    let mut program = String::with_capacity(code.len());
    let mut rest = code;
    while let Some(at) = rest.find(MARK) {
        program.push_str(&rest[..at]);
        let item = &rest[at + MARK.len()..];
        let pieces: Vec<(usize, &str)> =
            item.char_indices().map(|(at, char)| (at, &item[at..at + char.len_utf8()])).collect();
        let end = pieces.get(item_end(pieces.iter().map(|&(_, piece)| piece))).map_or(item.len(), |&(at, _)| at + 1);
        let lines = item[..end].matches('\n').count();
        program.push_str(&format!("{TEST_LINE}\n").repeat(lines));
        program.push_str(TEST_LINE);
        rest = &item[end..];
    }
    program + rest
}

/// Where the item that begins here ends: at its `;`, or at the brace that closes its body.
fn item_end<'a>(mut tokens: impl Iterator<Item = &'a str>) -> usize {
    let (mut depth, mut braces) = (0, 0);
    let end = tokens.position(|token| {
        match token {
            "(" | "[" => depth += 1,
            ")" | "]" => depth -= 1,
            "{" => braces += 1,
            "}" => braces -= 1,
            _ => {}
        }
        depth <= 0 && braces <= 0 && (token == "}" || token == ";")
    });
    end.unwrap_or(usize::MAX)
}

/// Words, `::` and single signs, each with its line.
fn tokens(code: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    for (index, mut rest) in code.lines().enumerate() {
        loop {
            rest = rest.trim_start();
            let Some(first) = rest.chars().next() else { break };
            let length = match rest.find(|char| !is_word(char)).unwrap_or(rest.len()) {
                0 if rest.starts_with("::") => 2,
                0 => first.len_utf8(),
                word => word,
            };
            let (token, after) = rest.split_at(length);
            found.push((index + 1, token));
            rest = after;
        }
    }
    found
}

mod tests {
    use super::*;

    const LIB: &str =
        "//! The map.\n\n/// PURE. Bytes.\npub mod codec;\n/// Acts.\npub mod net;\n/// Acts.\npub mod pool;\n";

    /// The lines that a rule complains about.
    fn lines(found: Vec<Complaint>) -> Vec<usize> {
        found.into_iter().map(|(line, _)| line).collect()
    }

    fn upward_lines(path: &str, code: &str) -> Vec<usize> {
        lines(upward(&modules(LIB), path, &blank_tests(&blank_prose(code))))
    }

    #[test]
    fn reads_the_list_of_modules() {
        let module = |name: &str, pure| Module { name: name.to_owned(), pure };
        assert_eq!(modules(LIB), [module("codec", true), module("net", false), module("pool", false)]);
    }

    #[test]
    fn blanks_comments_and_quotes() {
        for (text, code) in [
            ("a // b\nc", "a     \nc"),
            ("a /* b /* c */ d */ e", "a                   e"),
            (r#"f("a \" // b", x)"#, "f(           , x)"),
            ("f(r#\"a \" b\"#, br\"\\\")", "f(          ,      )"),
            ("r#fn(x)", "r#fn(x)"),
            (r"['a', '\'', '\u{7d}', '{', b'\\']", "[   ,     ,         ,    , b    ]"),
            ("fn f<'a>(x: &'a str, y: 'b')", "fn f<'a>(x: &'a str, y:    )"),
            ("\"two\nlines\" x", "    \n       x"),
        ] {
            assert_eq!(blank_prose(text), code, "{text}");
        }
    }

    #[test]
    fn blanks_tests_and_keeps_the_lines() {
        let code = "use a;\n#[cfg(test)]\n#[path = 1]\nmod b;\nfn c() {}\n#[cfg(test)]\nmod tests {\n    fn d() { [1; 2] }\n}\nfn e() {}";
        assert_eq!(
            blank_tests(code),
            "use a;\n\u{b7}\n\u{b7}\n\u{b7}\nfn c() {}\n\u{b7}\n\u{b7}\n\u{b7}\n\u{b7}\nfn e() {}"
        );
    }

    #[test]
    fn upward_imports_are_found_in_every_spelling() {
        for code in [
            "use crate::pool::Pool;",
            "use crate::{codec, pool::Pool};",
            "use crate::{codec::{self, v1}, pool};",
            "fn f() { crate::pool::pick() }",
            "use super::pool::Pool;",
            "pub(crate) fn f(pool: &super::pool::Pool) {}",
            "mod inner { use super::super::pool; }",
            "use crate::nowhere;",
            "use crate::*;",
        ] {
            assert_eq!(upward_lines("src/net/mod.rs", &format!("//! Net.\n{code}")), [2], "{code}");
        }
        assert_eq!(upward_lines("src/net/listen.rs", "use super::super::{codec, pool};"), [1]);
        assert_eq!(upward_lines("src/unlisted.rs", ""), [1]);
    }

    #[test]
    fn downward_imports_and_those_of_tests_are_right() {
        for code in [
            "use crate::codec;",
            "use crate::net::listen;",
            "use crate::{codec::pool, net};",
            "// use crate::pool;\nconst TEXT: &str = \"crate::pool\";",
            "pub(crate) mod pool;\npub(in crate::net) fn f() {}",
            "mod inner { use super::pool; }",
            "#[cfg(test)]\nmod tests { use crate::pool; }",
            "#[cfg(test)]\nuse crate::pool;",
        ] {
            assert!(upward_lines("src/net/mod.rs", code).is_empty(), "{code}");
        }
        assert!(upward_lines("src/net/listen.rs", "use super::pool; mod inner { use super::super::pool; }").is_empty());
        assert!(upward_lines("src/main.rs", "crate::pool").is_empty());
    }

    #[test]
    fn purity_is_marked_in_the_file_or_in_the_list() {
        let modules = modules(LIB);
        assert!(is_pure(&modules, "src/codec/v1.rs", "//! Version 1."));
        assert!(is_pure(&modules, "src/pool/balance.rs", "//! PURE. Who is next."));
        assert!(!is_pure(&modules, "src/pool/mod.rs", "//! Upstreams.\n//! PURE. No."));
        assert!(!is_pure(&modules, "tests/it/codec.rs", "//! Tests."));
    }

    #[test]
    fn io_clocks_and_chance_are_impure() {
        for code in [
            "use std::fs;",
            "use std::{env, net::IpAddr};",
            "use tokio::time;",
            "let now = Instant::now();",
            "start.elapsed()",
            "let number = fastrand::u64(..);",
            "println!();",
            "use crate::net::check;",
            "use super::super::log::line;",
        ] {
            assert_eq!(lines(impure("src/pool/balance.rs", &format!("\n{code}"))), [2], "{code}");
        }
        for code in
            ["fn due(now: Instant) -> bool", "use std::net::SocketAddr;", "use crate::config::Pool;", "io::Error"]
        {
            assert!(impure("src/pool/balance.rs", code).is_empty(), "{code}");
        }
    }

    #[test]
    fn unsafe_needs_its_place_and_its_reason() {
        let reason = "// SAFETY: it is\n// so.\nlet a = unsafe { b() };";
        assert_eq!(lines(unsound("src/pool/mod.rs", reason)), [3]);
        assert!(unsound("src/net/mod.rs", reason).is_empty());
        assert!(unsound("src/pool/mod.rs", "#![forbid(unsafe_code)] // unsafe").is_empty());
        for text in
            ["unsafe { b() }", "// SAFETY: it is so.\n\nunsafe { b() }", "// SAFETY: of a.\na();\nunsafe { b() }"]
        {
            assert_eq!(lines(unsound("src/net/mod.rs", text)), [text.lines().count()], "{text}");
        }
    }

    #[test]
    fn sizes_have_limits() {
        assert!(long_file(&"x\n".repeat(600)).is_empty());
        assert_eq!(long_file(&"x\n".repeat(601)).len(), 1);
        let tested = format!("{}#[cfg(test)]\nmod tests {{\n{}}}\n", "x\n".repeat(600), "y\n".repeat(100));
        assert!(long_file(&blank_tests(&tested)).is_empty());
        let function =
            |lines: usize| format!("trait A {{ fn a(); }}\nfn b(c: [u8; 2]) {{\n{}}}\n", "if c {}\n".repeat(lines - 2));
        assert!(long_functions(&function(70)).is_empty());
        assert_eq!(lines(long_functions(&function(71))), [2]);
    }

    #[test]
    fn first_lines_gaps_and_switched_off_tests_are_seen() {
        assert!(undescribed("//! Owns this.\n").is_empty());
        assert_eq!(undescribed("").len() + undescribed("\n//! Owns this.").len() + undescribed("//!\n").len(), 3);
        assert_eq!(lines(undone("todo!();\nunimplemented!();\n#[ignore]\n#[ignore = ]\ndbg!(a)")), [1, 2, 3, 4, 5]);
        assert!(undone(&blank_prose("// todo!\nlet todo = 1; \"unimplemented!()\"; #[must_use]")).is_empty());
    }

    #[test]
    fn a_sleep_says_why() {
        assert_eq!(lines(sleeps("a();\nstd::thread::sleep(A);")), [2]);
        assert_eq!(lines(sleeps("// A comment.\ntokio::time::sleep(A).await;")), [2]);
        assert!(sleeps("// SLEEP: the peer is slow.\nsleep(A);\nsleep(B); // SLEEP: the same.").is_empty());
        assert!(sleeps("use std::thread::sleep;\n// sleep(A)\nasleep(B);").is_empty());
    }

    #[test]
    fn dependencies_without_a_sentence_are_found() {
        let manifest = "[package]\nname = 1\n[dependencies]\n# Why.\na = 1\nb = 1\n# No sentence\nc.workspace = true\n\
            [dev-dependencies]\n\nd = 1\n[target.x.dependencies.e]\nversion = 1\n[profile.dev]\ndebug = 1\n";
        assert_eq!(unexplained(manifest), ["b", "c", "d", "target.x.dependencies.e"]);
    }

    #[test]
    fn entries_at_the_top_are_listed() {
        let listed = ["Cargo.toml", ".ci/run", "src/lib.rs", "LICENSE-MIT", "scripts/a", "scripts/b", "notes.md"];
        assert_eq!(Vec::from_iter(astray(listed.into_iter())), ["notes.md", "scripts"]);
    }
}
