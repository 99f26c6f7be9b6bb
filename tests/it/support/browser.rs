//! A real browser, Chromium without a window, driven through chromedriver: JSON over HTTP (the W3C's WebDriver).

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::ports::free_port;
use super::{DEADLINE, Process, client, eventually, http, program};

/// A window with one page. Everything ends with it.
pub struct Browser {
    port: u16,
    session: String,
    _driver: Process,
    _profile: TempDir,
}

impl Browser {
    /// Starts one with an empty profile; it speaks to nobody but the pages that it is given.
    #[track_caller]
    pub fn start() -> Browser {
        let profile = tempfile::tempdir().expect("a temporary directory");
        let port = free_port();
        let driver = Process::start(
            Command::new(program("chromedriver"))
                .arg(format!("--port={port}"))
                // Whatever it keeps goes with the test.
                .env("HOME", profile.path())
                .env("TMPDIR", profile.path()),
        );
        let mut browser = Browser { port, session: String::new(), _driver: driver, _profile: profile };
        eventually("chromedriver is ready", || {
            client::connect((Ipv4Addr::LOCALHOST, port).into()).ok()?;
            (browser.call("GET", "/status", &Value::Null)["ready"] == true).then_some(())
        });
        let flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage \
             --disable-background-networking --disable-component-update --disable-sync --window-size=1300,900";
        let mut arguments: Vec<String> = flags.split_whitespace().map(str::to_owned).collect();
        arguments.push(format!("--user-data-dir={}", browser._profile.path().join("profile").display()));
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "browserName": "chrome",
            "goog:loggingPrefs": { "browser": "ALL" },
            "goog:chromeOptions": { "binary": program("chromium"), "args": arguments },
        } } });
        let session = browser.call("POST", "/session", &wanted);
        browser.session = session["sessionId"].as_str().unwrap_or_else(|| panic!("no session: {session}")).to_owned();
        browser
    }

    /// Loads a page.
    #[track_caller]
    pub fn open(&self, address: &str) {
        self.command("url", &json!({ "url": address }));
    }

    /// Shows pages as on a screen of this size, to somebody who prefers these colours: `light`, `dark`.
    #[track_caller]
    pub fn emulate(&self, width: u32, height: u32, colours: &str) {
        // Not as a phone: that one would shrink what is too wide until it fits.
        let screen = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.devtools("Emulation.setDeviceMetricsOverride", &screen);
        // They would take room from the page, but not in its picture.
        self.devtools("Emulation.setScrollbarsHidden", &json!({ "hidden": true }));
        let media = json!({ "features": [{ "name": "prefers-color-scheme", "value": colours }] });
        self.devtools("Emulation.setEmulatedMedia", &media);
    }

    /// Writes the whole page, however long, as it looks now to a PNG file.
    #[track_caller]
    pub fn screenshot(&self, file: &Path) {
        let taken = self.devtools("Page.captureScreenshot", &json!({ "captureBeyondViewport": true }));
        let encoded = taken["data"].as_str().unwrap_or_else(|| panic!("no screenshot: {taken}"));
        let mut decoder = Command::new(program("base64"))
            .arg("-d")
            .stdin(Stdio::piped())
            .stdout(File::create(file).unwrap_or_else(|error| panic!("{}: {error}", file.display())))
            .spawn()
            .expect("base64 starts");
        decoder.stdin.take().expect("it has one").write_all(encoded.as_bytes()).expect("it reads");
        assert!(decoder.wait().expect("it ends").success());
    }

    /// A command of Chromium's own, past WebDriver.
    #[track_caller]
    fn devtools(&self, command: &str, parameters: &Value) -> Value {
        self.command("goog/cdp/execute", &json!({ "cmd": command, "params": parameters }))
    }

    /// What a function body returns in the page.
    #[track_caller]
    pub fn run(&self, body: &str) -> Value {
        self.command("execute/sync", &json!({ "script": body, "args": [] }))
    }

    /// The text of everything that a selector finds, as a reader sees it.
    #[track_caller]
    pub fn text(&self, selector: &str) -> String {
        let found =
            self.run(&format!("return [...document.querySelectorAll({selector:?})].map(e => e.innerText).join('\\n')"));
        found.as_str().expect("text").to_owned()
    }

    /// Waits until the text of what a selector finds is as wanted.
    #[track_caller]
    pub fn wait_for(&self, selector: &str, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        eventually(&format!("{what} in {selector}"), || Some(self.text(selector)).filter(|text| wanted(text)))
    }

    /// Clicks as a person does: what covers the element, or hides it, fails.
    #[track_caller]
    pub fn click(&self, selector: &str) {
        let element = self.element(selector);
        self.command(&format!("element/{element}/click"), &json!({}));
    }

    /// Types into an element.
    #[track_caller]
    pub fn type_into(&self, selector: &str, text: &str) {
        let element = self.element(selector);
        self.command(&format!("element/{element}/value"), &json!({ "text": text }));
    }

    /// Everything that the console has said since the last question: errors of scripts, of the policy, of requests.
    #[track_caller]
    pub fn console(&self) -> Vec<String> {
        let lines = self.command("se/log", &json!({ "type": "browser" }));
        lines.as_array().expect("a list").iter().map(|line| line["message"].to_string()).collect()
    }

    #[track_caller]
    fn element(&self, selector: &str) -> String {
        let found = self.command("element", &json!({ "using": "css selector", "value": selector }));
        let id = found.as_object().and_then(|found| found.values().next()).and_then(Value::as_str);
        id.unwrap_or_else(|| panic!("no element: {found}")).to_owned()
    }

    #[track_caller]
    fn command(&self, path: &str, body: &Value) -> Value {
        self.call("POST", &format!("/session/{}/{path}", self.session), body)
    }

    #[track_caller]
    fn call(&self, method: &str, path: &str, body: &Value) -> Value {
        let mut stream = client::connect((Ipv4Addr::LOCALHOST, self.port).into()).expect("chromedriver listens");
        stream.set_read_timeout(Some(DEADLINE * 2)).expect("a time limit");
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let length = body.len().to_string();
        let headers = [("Content-Type", "application/json"), ("Content-Length", length.as_str())];
        http::send(&mut stream, method, path, &headers).expect("chromedriver takes a command");
        stream.write_all(body.as_bytes()).expect("chromedriver takes a command");
        let (status, mut said) = receive(stream).unwrap_or_else(|error| panic!("chromedriver, {path}: {error}"));
        assert_eq!(status, "200", "chromedriver, {path}: {}", said["value"]["message"]);
        said["value"].take()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The browser is the driver's child and ends with its session; the driver itself is killed.
        let Ok(mut stream) = client::connect((Ipv4Addr::LOCALHOST, self.port).into()) else { return };
        let path = format!("/session/{}", self.session);
        if stream.set_read_timeout(Some(DEADLINE)).is_ok() && http::send(&mut stream, "DELETE", &path, &[]).is_ok() {
            let _ = receive(stream);
        }
    }
}

/// An answer, by its length: chromedriver keeps the connection, whatever it was asked.
fn receive(stream: TcpStream) -> io::Result<(String, Value)> {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line)?;
    let status = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut length = 0;
    while !line.trim().is_empty() {
        line.clear();
        stream.read_line(&mut line)?;
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().map_err(io::Error::other)?;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok((status, serde_json::from_slice(&body)?))
}

/// What `ssh -L PORT:SOCKET` does: a port on 127.0.0.1 that leads to a UNIX socket, for the life of the test process.
pub fn forward_to(socket: PathBuf) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let port = listener.local_addr().expect("it is bound").port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (Ok(near), Ok(far)) = (stream, UnixStream::connect(&socket)) else { continue };
            carry(near, far);
        }
    });
    port
}

fn carry(near: TcpStream, far: UnixStream) {
    let (Ok(mut near_read), Ok(mut far_read)) = (near.try_clone(), far.try_clone()) else { return };
    let (mut near, mut far) = (near, far);
    thread::spawn(move || {
        let _ = std::io::copy(&mut near_read, &mut far);
        let _ = far.shutdown(std::net::Shutdown::Write);
    });
    thread::spawn(move || {
        let _ = std::io::copy(&mut far_read, &mut near);
        let _ = near.shutdown(std::net::Shutdown::Both);
    });
}
