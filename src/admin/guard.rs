//! Who may ask what: no web page and no DNS rebinding reads or drains production, and nobody without the token where
//! one is set.
//!
//! A browser on an operator's machine can reach 127.0.0.1 for any page it shows. It cannot set `X-Preface` without a
//! CORS preflight that is never granted; a page that rebinds its name to 127.0.0.1 still sends its own name as `Host`.

use std::fs::File;
use std::hint::black_box;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};

use axum::Json;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::listener::Reach;

/// A token file is a line; what is longer is another file.
const TOKEN_BYTES_MAX: u64 = 4096;

/// What `[admin]` says about callers. Replaced as a whole by a reload.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// Holds the bearer token; read at each request, so that a rotated secret counts at once.
    pub token_file: Option<PathBuf>,
}

/// Why a call was refused.
#[derive(Debug)]
pub struct Refusal {
    status: StatusCode,
    error: String,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, error: impl Into<String>) -> Refusal {
        Refusal { status, error: error.into() }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(serde_json::json!({ "error": self.error }))).into_response();
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// May this caller read the status, the configuration and the metrics? On this machine everyone may: what they show is
/// in files and `ss` too, and scripts stay simple. From the network only with the token, because it maps the inside.
pub(super) async fn check_read(access: &Access, reach: Reach, headers: &HeaderMap) -> Result<(), Refusal> {
    match reach {
        Reach::Unix if !is_browser(headers) => Ok(()),
        Reach::Unix | Reach::Loopback => check_host(headers).map(|_| ()),
        Reach::Network => check_token(access, reach, headers).await,
    }
}

/// May this caller change something?
pub(super) async fn check_mutation(access: &Access, reach: Reach, headers: &HeaderMap) -> Result<(), Refusal> {
    if reach != Reach::Unix || is_browser(headers) {
        let host = check_host(headers)?;
        check_origin(host, headers)?;
    }
    if headers.get("x-preface").is_none_or(|value| value != "1") {
        return Err(Refusal::new(
            StatusCode::FORBIDDEN,
            "send the header X-Preface: 1 with calls that change something",
        ));
    }
    check_token(access, reach, headers).await
}

/// What curl sends as Host to a UNIX socket is made up. A browser comes there too, by `ssh -L PORT:SOCKET`: it says who
/// it is, and whose page asks.
fn is_browser(headers: &HeaderMap) -> bool {
    let agent = headers.get(header::USER_AGENT);
    headers.contains_key(header::ORIGIN)
        || headers.contains_key("sec-fetch-site")
        || agent.is_some_and(|agent| agent.as_bytes().starts_with(b"Mozilla/"))
}

fn check_host(headers: &HeaderMap) -> Result<&str, Refusal> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else {
        return Err(Refusal::new(StatusCode::BAD_REQUEST, "send exactly one Host header"));
    };
    let host = host.to_str().unwrap_or_default();
    let authority: Authority = host
        .parse()
        .map_err(|_| Refusal::new(StatusCode::BAD_REQUEST, "send a Host header of the form address:port"))?;
    let name = authority.host();
    let is_address = match name.strip_prefix('[').and_then(|name| name.strip_suffix(']')) {
        Some(name) => name.parse::<Ipv6Addr>().is_ok(),
        None => name.parse::<IpAddr>().is_ok(),
    };
    // All of it: "[::1].evil" has a host and something behind it.
    let is_whole = match host.strip_prefix(name) {
        Some(port) => port.is_empty() || port.strip_prefix(':').is_some_and(|port| port.parse::<u16>().is_ok()),
        None => false,
    };
    if is_whole && (is_address || name.eq_ignore_ascii_case("localhost")) {
        return Ok(host);
    }
    let error = format!("the Host {host:?} is neither an IP address nor localhost; call it by its address");
    Err(Refusal::new(StatusCode::FORBIDDEN, error))
}

fn check_origin(host: &str, headers: &HeaderMap) -> Result<(), Refusal> {
    for origin in headers.get_all(header::ORIGIN) {
        let origin = origin.to_str().unwrap_or_default();
        let authority = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        if authority.is_none_or(|authority| !authority.eq_ignore_ascii_case(host)) {
            let error = format!("a page of {origin:?} may not call this; use `preface` or curl");
            return Err(Refusal::new(StatusCode::FORBIDDEN, error));
        }
    }
    Ok(())
}

async fn check_token(access: &Access, reach: Reach, headers: &HeaderMap) -> Result<(), Refusal> {
    let Some(path) = access.token_file.clone() else {
        return match reach {
            Reach::Unix | Reach::Loopback => Ok(()),
            // Validation refuses such a configuration; if it ever comes here, it stays shut.
            Reach::Network => Err(Refusal::new(
                StatusCode::FORBIDDEN,
                "the admin address can be reached from the network: set [admin] token_file",
            )),
        };
    };
    let read = tokio::task::spawn_blocking({
        let path = path.clone();
        move || read_token(&path)
    });
    let token = read.await.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(|error| {
        tracing::warn!(event = "admin_token", file = %path.display(), %error, "the token file cannot be used");
        let error = format!("the file of [admin] token_file cannot be used: {error}; until it can, calls are refused");
        Refusal::new(StatusCode::FORBIDDEN, error)
    })?;
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let given = match (values.next().and_then(|value| bearer(value.as_bytes())), values.next()) {
        (Some(given), None) => given,
        _ => {
            let error =
                "send Authorization: Bearer and the token; `preface` takes it from --token-file or $PREFACE_TOKEN_FILE";
            return Err(Refusal::new(StatusCode::UNAUTHORIZED, error));
        }
    };
    if !is_equal(given, token.as_bytes()) {
        return Err(Refusal::new(StatusCode::UNAUTHORIZED, "that is not the token in the file of [admin] token_file"));
    }
    Ok(())
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked("bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

/// The token of a file: its content without white space around it. Empty is an error, never "no token".
pub fn read_token(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(TOKEN_BYTES_MAX + 1).read_to_string(&mut text)?;
    let token = text.trim();
    let problem = if text.len() as u64 > TOKEN_BYTES_MAX {
        "it is longer than 4096 bytes"
    } else if token.is_empty() {
        "it is empty"
    } else if token.contains(|c: char| c.is_ascii_control()) {
        "it has more than one line"
    } else {
        return Ok(token.to_owned());
    };
    Err(io::Error::new(io::ErrorKind::InvalidData, problem))
}

/// Takes as long for the first wrong byte as for the last: how long depends on `given` alone. `token` isn't empty.
fn is_equal(given: &[u8], token: &[u8]) -> bool {
    let mut difference = usize::from(given.len() != token.len());
    for (index, byte) in given.iter().enumerate() {
        difference |= usize::from(byte ^ black_box(token[index % token.len()]));
    }
    black_box(difference) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_compared_whole() {
        for (given, token, equal) in [
            ("secret", "secret", true),
            ("secreT", "secret", false),
            ("", "secret", false),
            ("secretsecret", "secret", false),
        ] {
            assert_eq!(is_equal(given.as_bytes(), token.as_bytes()), equal, "{given}");
        }
    }

    #[test]
    fn a_token_file_is_one_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        let read = |content: &str| {
            std::fs::write(&path, content).unwrap();
            read_token(&path).map_err(|error| error.to_string())
        };
        assert_eq!(read("s3cret\n"), Ok("s3cret".to_owned()));
        assert_eq!(read(" \n"), Err("it is empty".to_owned()));
        assert_eq!(read("a\nb\n"), Err("it has more than one line".to_owned()));
        assert_eq!(read(&"x".repeat(4097)), Err("it is longer than 4096 bytes".to_owned()));
        assert!(read_token(Path::new("/nonexistent")).is_err());
    }
}
