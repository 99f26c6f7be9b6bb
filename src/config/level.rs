//! PURE. What `log.level` may be: in the file, and in `POST /log`.

use super::file::{nearest, quoted};

/// The levels of the log.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// What is wrong with a part of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}; {advice}")]
pub struct LevelError {
    /// The part, and what it is not.
    pub what: String,
    /// What to write.
    pub advice: String,
}

/// A part of what an `EnvFilter` takes: levels, and levels by module. A word alone is a level here, so that a
/// misspelt level is an error and not a module that never logs. Empty: nothing is wrong.
pub fn errors(level: &str) -> Vec<LevelError> {
    level.split(',').filter_map(|directive| error(directive.trim_matches(' '))).collect()
}

fn error(directive: &str) -> Option<LevelError> {
    let module =
        |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_:-".contains(&b));
    let (target, level) = directive.split_once('=').unwrap_or(("preface", directive));
    let known = LEVELS.contains(&level.to_ascii_lowercase().as_str());
    if known && module(target) {
        return None;
    }
    let wrong = if known { target } else { level };
    let what = format!("{wrong:?} is not a {} of the log", if known { "module" } else { "level" });
    let advice = match nearest(level, &LEVELS).filter(|_| !known) {
        Some(near) => format!("did you mean {near:?}?"),
        None => format!("levels: {}; by module: \"info,preface::health=debug\"", quoted(&LEVELS)),
    };
    Some(LevelError { what, advice })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_known_words_on_one_line() {
        for level in ["info", "DEBUG", "warn, preface::health=debug", "off,preface=trace"] {
            assert_eq!(errors(level), [], "{level}");
        }
        let advised: Vec<String> = errors("debgu,preface::pool=trace").iter().map(ToString::to_string).collect();
        assert_eq!(advised, ["\"debgu\" is not a level of the log; did you mean \"debug\"?"]);
        for level in ["", "info\n", "info\ndebug", "in\u{7}fo", "preface::health\n=info", "=info", "preface::health"] {
            assert_eq!(errors(level).len(), 1, "{level:?}");
        }
    }
}
