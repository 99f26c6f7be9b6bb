//! Reads a configuration file, the same for `check`, a start and every reload, and says what to do where that fails.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use super::error::LoadError;
use super::hints::Surroundings;
use super::{Parsed, parse_in};

/// The largest configuration file that is read.
pub const FILE_BYTES_MAX: u64 = 16 << 20;

/// Its bytes.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut content)?;
    match content.len() as u64 > FILE_BYTES_MAX {
        true => Err(io::Error::new(ErrorKind::FileTooLarge, format!("larger than {} MiB", FILE_BYTES_MAX >> 20))),
        false => Ok(content),
    }
}

/// What to say of a file that could not be read.
pub fn unreadable(path: &Path, error: &io::Error) -> LoadError {
    let failed = |reason: &str, next| LoadError::Read { path: path.to_owned(), reason: reason.to_owned(), next };
    if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) {
        return failed("no descriptor is left to read it with", "raise the limit (LimitNOFILE=, ulimit -n)");
    }
    match error.kind() {
        ErrorKind::NotFound => failed("no such file", "is its path right? `preface demo` needs no file"),
        ErrorKind::PermissionDenied => {
            failed("permission denied", "let the user that runs preface read it and its directory")
        }
        ErrorKind::IsADirectory => failed("is a directory", "name the file in it"),
        ErrorKind::FileTooLarge => failed(&error.to_string(), "name a configuration file"),
        _ => failed(&error.to_string(), "see whether it can be read with `cat`"),
    }
}

/// Its text, without the mark that some editors put at its beginning.
pub fn text(path: &Path, bytes: Vec<u8>) -> Result<String, LoadError> {
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + valid.iter().filter(|byte| **byte == b'\n').count();
        let next = "TOML is UTF-8: save it so, or name another file";
        LoadError::Read { path: path.to_owned(), reason: format!("not UTF-8 text (line {line})"), next }
    })?;
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok(text)
}

/// Reads a file and parses it.
pub fn load(path: &Path, around: &Surroundings) -> Result<Parsed, LoadError> {
    let text = text(path, read(path).map_err(|error| unreadable(path, &error))?)?;
    Ok(parse_in(&path.display().to_string(), &text, around)?)
}
