//! Where the client looks for the process, and what it says when that fails.

use super::*;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

fn args(config: &Path) -> Options {
    Options { admin: None, token_file: None, config: config.to_owned() }
}

/// Takes one request and answers it; returns what it read.
fn answering(mut stream: impl std::io::Read + Write + Send + 'static, answer: &'static str) -> String {
    let mut request = String::new();
    let mut reader = BufReader::new(&mut stream);
    while !request.ends_with("\r\n\r\n") && reader.read_line(&mut request).unwrap() > 0 {}
    let length = answer.len();
    write!(stream, "HTTP/1.1 {}\r\nContent-Length: {length}\r\n\r\n{answer}", answer.split(' ').next().unwrap())
        .unwrap();
    request
}

fn tcp_server(answer: &'static str) -> (String, JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (address, std::thread::spawn(move || answering(listener.accept().unwrap().0, answer)))
}

#[test]
fn looks_in_the_documented_order() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let config = path("preface.toml");
    fs::write(&config, "[admin]\nbind = \"127.0.0.1:5\"\n[listeners.web\nthis is = = broken").unwrap();
    for (name, port) in [("first", 3), ("second", 4)] {
        fs::create_dir(path(name)).unwrap();
        fs::write(path(name).join("preface.admin"), format!("127.0.0.1:{port}\n")).unwrap();
    }
    let mut args = args(&config);
    args.admin = Some("127.0.0.1:1".to_owned());
    let mut environment = Environment {
        admin: Some("127.0.0.1:2".to_owned()),
        token_file: None,
        runtime_directories: vec![path("missing"), path("first"), path("second")],
    };
    let mut found = Vec::new();
    let mut look = |args: &Options, environment: &Environment| {
        let client = args.client_in(environment.clone()).unwrap();
        found.push(client.to_string().replace(&directory.path().display().to_string(), "DIR"));
    };
    look(&args, &environment);
    args.admin = None;
    look(&args, &environment);
    environment.admin = None;
    look(&args, &environment);
    environment.runtime_directories.remove(1);
    look(&args, &environment);
    environment.runtime_directories.clear();
    look(&args, &environment);
    fs::write(&config, "[admin]\nbind = 7\n").unwrap();
    look(&args, &environment);
    fs::remove_file(&config).unwrap();
    look(&args, &environment);
    insta::assert_snapshot!(found.join("\n"), @r#"
    127.0.0.1:1 (from --admin)
    127.0.0.1:2 (from $PREFACE_ADMIN)
    127.0.0.1:3 (from DIR/first/preface.admin)
    127.0.0.1:4 (from DIR/second/preface.admin)
    127.0.0.1:5 (from [admin] bind in DIR/preface.toml)
    127.0.0.1:9900 (the default: DIR/preface.toml has no usable [admin] bind)
    127.0.0.1:9900 (the default: DIR/preface.toml cannot be read: No such file or directory (os error 2))
    "#);
}

#[test]
fn addresses_that_are_none_are_errors() {
    for (admin, variable, error) in [
        (Some("9900"), None, "--admin \"9900\" is not an address; write 127.0.0.1:9900 or unix:/path"),
        (None, Some("unix:x"), "$PREFACE_ADMIN \"unix:x\" is not an address; write 127.0.0.1:9900 or unix:/path"),
    ] {
        let args = Options { admin: admin.map(str::to_owned), ..args(Path::new("/nonexistent")) };
        let environment = Environment { admin: variable.map(str::to_owned), ..Environment::default() };
        assert_eq!(args.client_in(environment).unwrap_err().to_string(), error);
    }
}

#[test]
fn what_listens_everywhere_is_called_on_loopback() {
    for (bind, called) in [("0.0.0.0:9", "127.0.0.1:9"), ("[::]:9", "[::1]:9"), ("192.0.2.1:9", "192.0.2.1:9")] {
        assert_eq!(reachable(announce::parse(bind).unwrap()), announce::parse(called).unwrap());
    }
}

#[test]
fn sends_what_the_guard_wants_over_tcp_and_unix() {
    let directory = tempfile::tempdir().unwrap();
    let token_file = directory.path().join("token");
    fs::write(&token_file, "s3cret\n").unwrap();
    let (address, server) = tcp_server("200 OK");
    let environment =
        Environment { admin: Some(address.clone()), token_file: Some(token_file), ..Environment::default() };
    let client = args(Path::new("/nonexistent")).client_in(environment).unwrap();
    let answer = client.post("/pools/a%20b/drain", Duration::from_secs(10)).unwrap();
    assert_eq!((answer.status, answer.text.as_str()), (200, "200 OK"));
    let request = server.join().unwrap().replace(&address, "ADDRESS").replace(env!("CARGO_PKG_VERSION"), "VERSION");
    insta::assert_snapshot!(request.replace("\r\n", "\n"), @r#"
    POST /pools/a%20b/drain HTTP/1.1
    host: ADDRESS
    user-agent: preface/VERSION
    x-preface: 1
    authorization: Bearer s3cret
    "#);

    let path = directory.path().join("admin.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || answering(listener.accept().unwrap().0, "503 stopping"));
    let environment = Environment { admin: Some(format!("unix:{}", path.display())), ..Environment::default() };
    let client = args(Path::new("/nonexistent")).client_in(environment).unwrap();
    let answer = client.get("/readyz", Duration::from_secs(10)).unwrap();
    assert_eq!((answer.status, answer.error().as_str()), (503, "the answer is 503 503 stopping"));
    assert!(server.join().unwrap().starts_with("GET /readyz HTTP/1.1\r\nhost: localhost\r\n"));
}

#[test]
fn a_refused_token_is_explained() {
    let directory = tempfile::tempdir().unwrap();
    let (file, config) = (directory.path().join("token"), directory.path().join("preface.toml"));
    fs::write(&file, "old").unwrap();
    let mut errors = Vec::new();
    let mut ask = |content: &str| {
        fs::write(&config, content).unwrap();
        let (address, server) = tcp_server("401");
        let environment = Environment { admin: Some(address.clone()), ..Environment::default() };
        let client = args(&config).client_in(environment).unwrap();
        let error = client.post("/reload", Duration::from_secs(10)).unwrap_err().to_string();
        errors.push(error.replace(&address, "ADDRESS").replace(&directory.path().display().to_string(), "DIR"));
        server.join().unwrap()
    };
    let request = ask(&format!("[admin]\ntoken_file = \"{}\"\n[pools.x\n= =", file.display()));
    assert!(request.contains("authorization: Bearer old\r\n"), "{request}");
    ask(&format!("[admin]\ntoken_file = \"{}/missing\"", directory.path().display()));
    ask("");
    insta::assert_snapshot!(errors.join("\n"), @r#"
    ADDRESS (from $PREFACE_ADMIN) refused the token of DIR/token: the answer is 401 401
    ADDRESS (from $PREFACE_ADMIN) wants a token, and DIR/missing cannot be used: No such file or directory (os error 2)
    ADDRESS (from $PREFACE_ADMIN) wants a token: name its file with --token-file FILE or $PREFACE_TOKEN_FILE
    "#);
}

#[test]
fn nobody_there_is_explained() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let environment = Environment { admin: Some(free.clone()), ..Environment::default() };
    let client = args(Path::new("/nonexistent")).client_in(environment).unwrap();
    let error = client.get("/readyz", Duration::from_secs(10)).unwrap_err().to_string().replace(&free, "ADDRESS");
    insta::assert_snapshot!(error, @"no preface answers on ADDRESS (from $PREFACE_ADMIN): Connection refused (os error 111); is preface running? name its address with --admin ADDR or $PREFACE_ADMIN");
    let environment = Environment { admin: Some("unix:/nonexistent/x".to_owned()), ..Environment::default() };
    let client = args(Path::new("/nonexistent")).client_in(environment).unwrap();
    let error = client.get("/readyz", Duration::from_secs(10)).unwrap_err().to_string();
    insta::assert_snapshot!(error, @"no preface answers on unix:/nonexistent/x (from $PREFACE_ADMIN): No such file or directory (os error 2); is preface running? name its address with --admin ADDR or $PREFACE_ADMIN");
}

#[test]
fn segments_are_encoded() {
    assert_eq!(encoded("[2001:db8::1]:80"), "%5B2001:db8::1%5D:80");
    assert_eq!(encoded("a/b c?ü"), "a%2Fb%20c%3F%C3%BC");
}
