//! The status page: one document that holds its style and its script, and a policy that lets it load nothing else.

use std::sync::LazyLock;

use axum::http::header::{self, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};

/// What a browser may do with the page: run the one script and the one style whose SHA-256 stand here, and call the admin
/// API that it came from. Nothing may frame it: its buttons drain production. A test says what the hashes must be.
const POLICY: &str = "default-src 'none'; \
    script-src 'sha256-gzA/L8kDecqZJ0zlXzn4Tt2JV7eaC7YZsEJNXKi8zSU='; \
    style-src 'sha256-fsJ8V+u6YKiAmUNjmydTnpp4VF8G/uDG6701lkT/n8g='; \
    img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const STYLE: &str = include_str!("page/style.css");
const SCRIPT: &str = include_str!("page/script.js");

static DOCUMENT: LazyLock<String> =
    LazyLock::new(|| include_str!("page/index.html").replace("{style}", STYLE).replace("{script}", SCRIPT));

/// The page. It holds nothing of this process: what it shows it asks for, with the token where one is needed.
pub(super) fn page() -> Response {
    let headers: [(HeaderName, HeaderValue); 6] = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8")),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
        (header::VARY, HeaderValue::from_static("accept")),
    ];
    (headers, DOCUMENT.as_str()).into_response()
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    /// As a browser computes it, by a program that everybody has.
    fn hash(text: &str) -> String {
        let command = "openssl dgst -sha256 -binary | openssl base64 -A";
        let mut shell = Command::new("sh")
            .args(["-c", command])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a shell");
        shell.stdin.take().expect("it is piped").write_all(text.as_bytes()).expect("it is taken");
        let output = shell.wait_with_output().expect("it ends");
        String::from_utf8(output.stdout).expect("base64 is ASCII")
    }

    #[test]
    fn the_policy_names_the_script_and_the_style_that_are_there() {
        for (directive, text) in [("script-src", SCRIPT), ("style-src", STYLE)] {
            let due = format!("{directive} 'sha256-{}';", hash(text));
            assert!(POLICY.contains(&due), "write {due} into POLICY");
        }
    }

    #[test]
    fn the_page_loads_nothing_and_writes_no_html() {
        for banned in
            ["src=", "@import", "url(", "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("]
        {
            assert!(!DOCUMENT.contains(banned), "{banned}");
        }
        assert_eq!(DOCUMENT.matches("</script>").count(), 1, "the script would end early");
        assert!(DOCUMENT.contains(SCRIPT) && DOCUMENT.contains(STYLE), "whole, or the hashes don't hold");
    }
}
