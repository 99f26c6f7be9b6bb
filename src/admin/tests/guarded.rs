//! Who is let in: by address, by header, by token.

use super::*;

/// Each line: what is asked, with which headers, of which server; and how it is answered.
#[tokio::test]
async fn refuses_what_a_web_page_or_a_stranger_could_send() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| -> PathBuf {
        let path = directory.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let with_token = |path: PathBuf| Access { token_file: Some(path) };
    let open = served("127.0.0.1:0", Access::default());
    let token = served("127.0.0.1:0", with_token(file("token", "s3cret\n")));
    let empty = served("127.0.0.1:0", with_token(file("empty", "\n")));
    let missing = served("127.0.0.1:0", with_token("/nonexistent/token".into()));
    let network = served("0.0.0.0:0", with_token(file("token", "s3cret\n")));
    let careless = served("0.0.0.0:0", Access::default());
    let unix = served(&format!("unix:{}/admin.sock", directory.path().display()), Access::default());

    let post = "POST /reload\nX-Preface: 1\nHost: ";
    let right = "Authorization: Bearer s3cret";
    let table = [
        ("open", &open, format!("{post}127.0.0.1:9900")),
        ("open", &open, format!("{post}[::1]:9900")),
        ("open", &open, format!("{post}localhost")),
        ("open", &open, format!("{post}LB.example:80")),
        ("open", &open, format!("{post}127.0.0.1:9900\nOrigin: http://127.0.0.1:9900")),
        ("open", &open, format!("{post}127.0.0.1:9900\nOrigin: https://127.0.0.1:9900")),
        ("open", &open, "POST /reload\nHost: localhost".to_owned()),
        ("open", &open, "POST /reload\nHost: localhost\nX-Preface: 2".to_owned()),
        ("open", &open, "POST /pools/ingress/disable\nHost: localhost".to_owned()),
        ("open", &open, "POST /pools/ingress/upstreams/a/disable\nHost: localhost".to_owned()),
        ("open", &open, "POST /reload\nX-Preface: 1".to_owned()),
        ("open", &open, format!("{post}localhost\nHost: localhost")),
        ("open", &open, format!("{post}a b")),
        ("open", &open, format!("{post}rebound.example:9900")),
        ("open", &open, format!("{post}localhost.rebound.example")),
        ("open", &open, format!("{post}127.0.0.1.rebound.example")),
        ("open", &open, format!("{post}rebound.example@127.0.0.1")),
        ("open", &open, format!("{post}127.0.0.1:9900\nOrigin: http://127.0.0.1:8080")),
        ("open", &open, format!("{post}127.0.0.1:9900\nOrigin: null")),
        ("open", &open, "GET /config\nHost: localhost".to_owned()),
        ("open", &open, "GET /config\nHost: rebound.example".to_owned()),
        ("token", &token, format!("{post}localhost\n{right}")),
        ("token", &token, format!("{post}localhost\nAuthorization: bearer  s3cret")),
        ("token", &token, format!("{post}localhost")),
        ("token", &token, format!("{post}localhost\nAuthorization: Bearer s3cre")),
        ("token", &token, format!("{post}localhost\nAuthorization: Basic s3cret")),
        ("token", &token, format!("{post}rebound.example\n{right}")),
        ("token", &token, format!("POST /reload\nHost: localhost\n{right}")),
        ("token", &token, "GET /config\nHost: localhost".to_owned()),
        ("empty", &empty, format!("{post}localhost\nAuthorization: Bearer ")),
        ("missing", &missing, format!("{post}localhost\n{right}")),
        ("network", &network, "GET /config\nHost: lb.example".to_owned()),
        ("network", &network, format!("GET /metrics\nHost: lb.example\n{right}")),
        ("network", &network, "GET /readyz\nHost: lb.example".to_owned()),
        ("careless", &careless, format!("{post}localhost")),
        ("unix", &unix, format!("{post}whatever")),
        ("unix", &unix, format!("{post}rebound.example\nOrigin: http://rebound.example")),
    ];
    let mut outcome = String::new();
    for (name, admin, request) in table {
        let (status, body) = admin.ask(&request.replacen('\n', " HTTP/1.1\n", 1)).await;
        let error = serde_json::from_str::<Value>(&body).unwrap_or_default();
        let error = error["error"].as_str().unwrap_or_default();
        // The played control thread refuses every second reload: asked it was all the same.
        let answer = if status == 422 { "200".to_owned() } else { format!("{status} {error}") };
        outcome.push_str(format!("{name}: {} -> {answer}", request.replace('\n', " | ")).trim_end());
        outcome.push('\n');
    }
    insta::assert_snapshot!(outcome);
    assert_eq!(unix.ask("POST /reload HTTP/1.1\nHost: whatever").await.0, 403, "X-Preface is needed there too");
}

#[tokio::test]
async fn a_host_is_an_address_as_a_whole() {
    let admin = served("127.0.0.1:0", Access::default());
    for (host, status) in [
        ("[::1]", 200),
        ("[::1]:9900", 200),
        ("[::1].rebound.example", 403),
        ("[::1]9900", 403),
        ("[127.0.0.1]", 403),
        ("127.0.0.1:99999", 403),
    ] {
        assert_eq!(admin.ask(&format!("GET /config HTTP/1.1\nHost: {host}")).await.0, status, "{host}");
    }
}

#[tokio::test]
async fn a_browser_on_a_forwarded_unix_socket_reads_under_an_address_alone() {
    let directory = tempfile::tempdir().unwrap();
    let unix = served(&format!("unix:{}/admin.sock", directory.path().display()), Access::default());
    for (headers, status) in [
        ("Host: whatever", 200),
        ("Host: localhost:9900\nUser-Agent: Mozilla/5.0 (X11)", 200),
        ("Host: 127.0.0.1:9900\nUser-Agent: Mozilla/5.0 (X11)\nSec-Fetch-Site: same-origin", 200),
        ("Host: rebound.example\nUser-Agent: Mozilla/5.0 (X11)", 403),
        ("Host: rebound.example\nOrigin: http://rebound.example", 403),
        ("Host: rebound.example\nSec-Fetch-Site: same-origin", 403),
    ] {
        assert_eq!(unix.ask(&format!("GET /config HTTP/1.1\n{headers}")).await.0, status, "{headers}");
    }
}

#[tokio::test]
async fn a_token_and_its_rotation_count_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("token");
    std::fs::write(&path, "old").unwrap();
    let admin = served("127.0.0.1:0", Access::default());
    let old = "POST /reload HTTP/1.1\nHost: localhost\nX-Preface: 1\nAuthorization: Bearer old";
    let new = "POST /reload HTTP/1.1\nHost: localhost\nX-Preface: 1\nAuthorization: Bearer new";
    assert_eq!(admin.ask(new).await.0, 200, "no token is asked for");
    admin.access.store(Arc::new(Access { token_file: Some(path.clone()) }));
    assert_eq!((admin.ask(new).await.0, admin.ask(old).await.0), (401, 422));
    std::fs::write(&path, "new").unwrap();
    assert_eq!((admin.ask(new).await.0, admin.ask(old).await.0), (200, 401));
}
