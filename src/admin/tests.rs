//! The admin server on real sockets, with a control thread that the test plays.

mod guarded;

use std::net::SocketAddr;
use std::path::PathBuf;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::*;
use crate::config::AdminBind;
use crate::control::{self, Command, ReloadReport, SetAdminReply, UpgradeReport};

struct Served {
    address: AdminBind,
    probes: Arc<Probes>,
    access: Arc<ArcSwap<Access>>,
    stop: Option<oneshot::Sender<()>>,
    server: JoinHandle<()>,
}

impl Served {
    fn tcp(&self) -> SocketAddr {
        match &self.address {
            AdminBind::Tcp(address) => SocketAddr::new("127.0.0.1".parse().unwrap(), address.port()),
            AdminBind::Unix(_) => panic!("bound to a UNIX socket"),
        }
    }

    /// The answer's status and body to a request line and headers, `\n` between them.
    async fn ask(&self, request: &str) -> (u16, String) {
        let request = format!("{}\nConnection: close\n\n", request.trim_end()).replace('\n', "\r\n");
        let answer = match &self.address {
            AdminBind::Tcp(_) => exchange(TcpStream::connect(self.tcp()).await.unwrap(), &request).await,
            AdminBind::Unix(path) => exchange(UnixStream::connect(path).await.unwrap(), &request).await,
        };
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    async fn stop(mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        self.server.await.unwrap();
    }
}

async fn exchange(mut stream: impl AsyncReadExt + AsyncWriteExt + Unpin, request: &str) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

fn served_by(bind: AdminBind, access: Access, scope: Scope, control: Handle) -> Served {
    let listener = super::bind(&bind).unwrap();
    let address = listener.address().unwrap();
    let probes = Arc::new(Probes::new(1, Instant::now()));
    let access = Arc::new(ArcSwap::from_pointee(access));
    let state = State { control, probes: probes.clone(), access: access.clone(), scope };
    let (stop, stopped) = oneshot::channel::<()>();
    let server = tokio::spawn(serve(listener, state, async move {
        let _ = stopped.await;
    }));
    Served { address, probes, access, stop: Some(stop), server }
}

fn served(bind: &str, access: Access) -> Served {
    served_by(announce::parse(bind).unwrap(), access, Scope::All, played_control())
}

fn upgraded() -> UpgradeReport {
    UpgradeReport {
        outcome: UpgradeOutcome::Upgraded,
        pid: 4711,
        version: "0.2.0".to_owned(),
        open: 3,
        errors: Vec::new(),
        duration_ms: 48.6,
    }
}

/// A control thread that refuses every second reload, beginning with the second.
fn played_control() -> Handle {
    let (handle, mut commands) = control::channel();
    tokio::spawn(async move {
        let mut reloads = 0;
        while let Some(command) = commands.recv().await {
            match command {
                Command::Upgrade(reply) => drop(reply.send(upgraded())),
                Command::Reload(trigger, reply) => {
                    reloads += 1;
                    let _ = reply.send(Arc::new(report(trigger, reloads % 2 == 0)));
                }
                Command::SetAdmin(order, reply) => {
                    let _ = reply.send(played_order(&order));
                }
                Command::Status(reply) => {
                    let _ = reply.send(json!({ "pools": {} }));
                }
                Command::History(reply) => {
                    let _ = reply.send(json!({ "interval_s": 5, "times": [] }));
                }
                Command::Config(reply) => {
                    let _ = reply.send(json!({ "runtime": { "workers": 2 } }));
                }
                Command::Metrics(reply) => {
                    let _ = reply.send("preface_ready 1\n".to_owned());
                }
                Command::Connections(_, reply) => drop(reply.send((vec![], 0))),
                Command::Tap(_, reply) => drop(reply.send(vec![])),
                Command::EndConnection(id, _, reply) => drop(reply.send(id == "01KAGY7W9K3W5T8Q4R2M6N0PZX")),
                Command::SetLogLevel(level, _, reply) => {
                    let _ = reply.send(if level == "loud" { Err("not understood".to_owned()) } else { Ok(()) });
                }
                Command::Follow(..) => {}
                Command::Knows(_, reply) => drop(reply.send(Ok(()))),
                Command::Observed(_) | Command::LookedUp(_) | Command::ConnectsFailed(_) => {}
            }
        }
    });
    handle
}

fn report(trigger: ReloadTrigger, refused: bool) -> ReloadReport {
    ReloadReport {
        time: "2026-11-21T04:38:00Z".to_owned(),
        trigger: trigger.as_str(),
        outcome: if refused { ReloadOutcome::Refused } else { ReloadOutcome::Applied },
        pending: Vec::new(),
        changes: if refused { vec![] } else { vec!["pool ingress: 1 upstream added".to_owned()] },
        errors: if refused { vec!["no pool named \"ingres\"".to_owned()] } else { vec![] },
        warnings: vec![],
        duration_ms: 1.5,
    }
}

fn played_order(order: &SetAdmin) -> Result<SetAdminReply, SetAdminError> {
    if order.pool != "ingress" {
        return Err(SetAdminError::UnknownPool { name: order.pool.clone(), known: "ingress".to_owned() });
    }
    let address = match order.address.as_deref() {
        None => "10.0.0.30:80",
        Some("[2001:db8::1]:80") => "[2001:db8::1]:80",
        Some(other) => {
            let known = "[2001:db8::1]:80".to_owned();
            return Err(SetAdminError::UnknownUpstream {
                pool: "ingress".to_owned(),
                address: other.to_owned(),
                known,
            });
        }
    };
    // What was asked comes back as the number of connections.
    let open = order.timeout.map_or(0, |timeout| timeout.as_secs()) + if order.by == "command line" { 1000 } else { 0 };
    Ok(SetAdminReply { upstreams: vec![(address.parse().unwrap(), open)] })
}

#[tokio::test]
async fn answers_reads() {
    let admin = served("127.0.0.1:0", Access::default());
    let host = format!("Host: {}", admin.tcp());
    for (path, body) in [
        ("/", INDEX),
        ("/metrics", "preface_ready 1\n"),
        ("/status", "{\n  \"pools\": {}\n}\n"),
        ("/config", "{\n  \"runtime\": {\n    \"workers\": 2\n  }\n}\n"),
    ] {
        assert_eq!(admin.ask(&format!("GET {path} HTTP/1.1\n{host}")).await, (200, body.to_owned()));
    }
    assert_eq!(admin.ask(&format!("GET /nothing HTTP/1.1\n{host}")).await.0, 404);
    assert_eq!(admin.ask(&format!("GET /reload HTTP/1.1\n{host}")).await.0, 405);
    admin.stop().await;
}

#[tokio::test]
async fn reload_answers_with_what_changed_or_with_the_errors() {
    let admin = served("127.0.0.1:0", Access::default());
    let request = "POST /reload HTTP/1.1\nHost: localhost\nX-Preface: 1";
    let (status, body) = admin.ask(request).await;
    assert_eq!(status, 200);
    insta::assert_snapshot!(body, @r#"
    {
      "changes": [
        "pool ingress: 1 upstream added"
      ],
      "duration_ms": 1.5,
      "errors": [],
      "outcome": "applied",
      "pending": [],
      "time": "2026-11-21T04:38:00Z",
      "trigger": "admin",
      "warnings": []
    }
    "#);
    let (status, body) = admin.ask(request).await;
    assert_eq!(status, 422);
    assert!(body.contains(r#""no pool named \"ingres\"""#), "{body}");
}

#[tokio::test]
async fn orders_reach_the_control_thread() {
    let admin = served("127.0.0.1:0", Access::default());
    let order = async |path: &str| {
        let (status, body) = admin.ask(&format!("POST {path} HTTP/1.1\nHost: localhost\nX-Preface: 1")).await;
        format!("{status} {}", serde_json::from_str::<Value>(&body).unwrap())
    };
    let mut answers = Vec::new();
    for path in [
        "/pools/ingress/drain",
        "/pools/ingress/drain?timeout=1m30s",
        "/pools/ingress/upstreams/%5B2001:db8::1%5D:80/disable",
        "/pools/ingress/upstreams/[2001:db8::1]:80/enable",
        "/pools/ingress/upstreams/10.0.0.99:80/drain",
        "/pools/other/enable",
        "/pools/ingress/explode",
        "/pools/%ff%fe/drain",
        "/pools/ingress/upstreams/%ff/drain",
        "/pools/ingress/drain?timeout=soon",
        "/pools/ingress/drain?time=30s",
        "/pools/ingress/disable?timeout=30s",
    ] {
        answers.push(format!("{path}\n  {}", order(path).await));
    }
    insta::assert_snapshot!(answers.join("\n"), @r#"
    /pools/ingress/drain
      200 {"admin":"draining","pool":"ingress","upstreams":[{"address":"10.0.0.30:80","open":0}]}
    /pools/ingress/drain?timeout=1m30s
      200 {"admin":"draining","pool":"ingress","upstreams":[{"address":"10.0.0.30:80","open":90}]}
    /pools/ingress/upstreams/%5B2001:db8::1%5D:80/disable
      200 {"admin":"disabled","pool":"ingress","upstreams":[{"address":"[2001:db8::1]:80","open":0}]}
    /pools/ingress/upstreams/[2001:db8::1]:80/enable
      200 {"admin":"enabled","pool":"ingress","upstreams":[{"address":"[2001:db8::1]:80","open":0}]}
    /pools/ingress/upstreams/10.0.0.99:80/drain
      404 {"error":"no upstream \"10.0.0.99:80\" in pool \"ingress\"; upstreams: [2001:db8::1]:80"}
    /pools/other/enable
      404 {"error":"no pool named \"other\"; pools: ingress"}
    /pools/ingress/explode
      404 {"error":"no order \"explode\"; orders: drain, disable, enable"}
    /pools/%ff%fe/drain
      400 {"error":"the path is not UTF-8 where it is percent-encoded"}
    /pools/ingress/upstreams/%ff/drain
      400 {"error":"the path is not UTF-8 where it is percent-encoded"}
    /pools/ingress/drain?timeout=soon
      400 {"error":"\"soon\" is not a time (expected number at 0); write 30s or 1h30m"}
    /pools/ingress/drain?time=30s
      400 {"error":"the only parameter is timeout, once: ?timeout=30s"}
    /pools/ingress/disable?timeout=30s
      400 {"error":"only drain has a timeout: disable resets at once, enable resets nothing"}
    "#);

    let request =
        format!("POST /pools/ingress/drain HTTP/1.1\nHost: localhost\nX-Preface: 1\nUser-Agent: {COMMAND_LINE_AGENT}");
    assert!(admin.ask(&request).await.1.contains("\"open\": 1000"), "said to come from the command line");
}

#[tokio::test]
async fn probes_answer_while_the_control_thread_is_stuck() {
    let (control, _commands_that_nobody_takes) = control::channel();
    let admin = served_by(announce::parse("0.0.0.0:0").unwrap(), Access::default(), Scope::Probes, control);
    let get = async |path: &str| admin.ask(&format!("GET {path} HTTP/1.1\nHost: pod.example")).await;
    assert_eq!(get("/readyz").await, (503, "no configuration is loaded yet\n".to_owned()));
    admin.probes.set_configured();
    admin.probes.set_listening();
    assert_eq!(get("/readyz").await, (200, "ok\n".to_owned()));
    admin.probes.set_stopping();
    assert_eq!(get("/readyz").await, (503, "stopping\n".to_owned()));
    assert_eq!(get("/livez").await, (200, "ok\n".to_owned()));
    admin.stop().await;
}

/// A path as it may be asked for.
fn concrete(path: &str) -> String {
    let parts = [
        ("{pool}", "ingress"),
        ("{order}", "drain"),
        ("{address}", "%5B2001:db8::1%5D:80"),
        ("{id}", "01KAGY7W9K3W5T8Q4R2M6N0PZX"),
        ("/log", "/log?level=debug"),
    ];
    let path = parts.iter().fold(path.to_owned(), |path, (part, value)| path.replace(part, value));
    assert!(!path.contains('{'), "{path}: the test does not know what to ask for");
    path
}

/// The status that a request gets. A stream has no end, so no more than the head is read.
async fn status_of(admin: &Served, request: &str) -> u16 {
    let request = format!("{}\nConnection: close\n\n", request.trim_end()).replace('\n', "\r\n");
    let mut head = String::new();
    match &admin.address {
        AdminBind::Tcp(_) => read_status(TcpStream::connect(admin.tcp()).await.unwrap(), &request, &mut head).await,
        AdminBind::Unix(path) => read_status(UnixStream::connect(path).await.unwrap(), &request, &mut head).await,
    }
    head.split(' ').nth(1).unwrap().parse().unwrap()
}

async fn read_status(mut stream: impl AsyncReadExt + AsyncWriteExt + Unpin, request: &str, head: &mut String) {
    stream.write_all(request.as_bytes()).await.unwrap();
    while !head.contains("\r\n") {
        let mut part = [0; 256];
        let count = stream.read(&mut part).await.unwrap();
        assert!(count > 0, "{request} got {head:?}");
        head.push_str(&String::from_utf8_lossy(&part[..count]));
    }
}

/// What a caller leaves out or gets wrong.
const CALLERS: [(&str, &str); 7] = [
    ("right", "Host: 127.0.0.1:9900\nX-Preface: 1\nAuthorization: Bearer s3cret"),
    ("without a token", "Host: 127.0.0.1:9900\nX-Preface: 1"),
    ("with another token", "Host: 127.0.0.1:9900\nX-Preface: 1\nAuthorization: Bearer guess"),
    ("a form of a web page", "Host: 127.0.0.1:9900\nAuthorization: Bearer s3cret"),
    (
        "a page elsewhere",
        "Host: 127.0.0.1:9900\nX-Preface: 1\nAuthorization: Bearer s3cret\nOrigin: http://evil.example",
    ),
    ("a name that was rebound", "Host: evil.example\nX-Preface: 1\nAuthorization: Bearer s3cret"),
    ("a rebound page", "Host: evil.example\nX-Preface: 1\nAuthorization: Bearer s3cret\nOrigin: http://evil.example"),
];

/// Who is let in: for each way in and each caller, `.` open, `r` read, `c` change.
const LET_IN: [(&str, [&str; 7]); 6] = [
    ("loopback", [".rc", ".rc", ".rc", ".r", ".r", ".", "."]),
    ("loopback, token", [".rc", ".r", ".r", ".r", ".r", ".", "."]),
    ("network, token", [".rc", ".", ".", ".r", ".r", ".r", ".r"]),
    ("network, no token", [".", ".", ".", ".", ".", ".", "."]),
    ("unix", [".rc", ".rc", ".rc", ".r", ".r", ".rc", "."]),
    ("unix, token", [".rc", ".r", ".r", ".r", ".r", ".rc", "."]),
];

/// Every route there is, those of tomorrow included, against everyone who may call.
#[tokio::test]
async fn each_route_lets_in_whom_its_guard_lets_in() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    std::fs::write(&file, "s3cret\n").unwrap();
    let socket = |name: &str| format!("unix:{}/{name}", directory.path().display());
    for (place, callers) in LET_IN {
        let bind = match place.split(',').next().unwrap() {
            "loopback" => "127.0.0.1:0".to_owned(),
            "network" => "0.0.0.0:0".to_owned(),
            _ => socket(&place.replace(", ", "-")),
        };
        let token_file = place.ends_with(", token").then(|| file.clone());
        let admin = served(&bind, Access { token_file });
        for ((caller, headers), let_in) in CALLERS.into_iter().zip(callers) {
            for Route { path, method, guard, .. } in routes() {
                let status = status_of(&admin, &format!("{method} {} HTTP/1.1\n{headers}", concrete(path))).await;
                let is_in = let_in.contains(match guard {
                    Guard::Open => '.',
                    Guard::Read => 'r',
                    Guard::Change => 'c',
                });
                let what = format!("{place}: {method} {path}, {caller}: {status}");
                // 422: the played control thread refuses every second reload. 503: not ready.
                assert_eq!(is_in, [200, 422, 503].contains(&status), "{what}");
                assert_eq!(!is_in, [401, 403].contains(&status), "{what}");
            }
        }
        admin.stop().await;
    }
}

#[test]
fn what_is_no_get_is_a_change_and_the_list_of_paths_is_whole() {
    for Route { path, method, guard, .. } in routes() {
        assert_eq!(guard == Guard::Change, method != Method::GET, "{path}");
        let shown = path.replace("{id}", "ID").replace("{pool}", "POOL").replace("{address}", "ADDRESS");
        let shown = shown.replace("/{order}", "/drain");
        let listed = INDEX.lines().any(|line| line.starts_with(method.as_str()) && line.contains(&shown));
        assert!(listed || path == "/", "GET / does not name {method} {path}");
    }
}

#[tokio::test]
async fn on_the_probes_address_is_nothing_but_probes() {
    let (control, mut commands) = control::channel();
    tokio::spawn(async move {
        while let Some(command) = commands.recv().await {
            let Command::Metrics(reply) = command else { panic!("a probe asks for nothing but metrics") };
            let _ = reply.send(String::new());
        }
    });
    let admin = served_by(announce::parse("0.0.0.0:0").unwrap(), Access::default(), Scope::Probes, control);
    let mut open = Vec::new();
    for Route { path, .. } in routes() {
        for method in [Method::GET, Method::POST, Method::DELETE, Method::PUT] {
            let request = format!("{method} {} HTTP/1.1\nHost: pod.example\nX-Preface: 1", concrete(path));
            match (status_of(&admin, &request).await, &method) {
                (200 | 503, &Method::GET) => open.push(path),
                (status, _) => assert!([404, 405].contains(&status), "{request}: {status}"),
            }
        }
    }
    assert_eq!(open, ["/livez", "/readyz", "/metrics"]);
    admin.stop().await;
}

#[tokio::test]
async fn stuck_clients_make_room_for_new_ones_and_hold_up_nothing() {
    let admin = served("127.0.0.1:0", Access::default());
    let mut stuck = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        let mut stream = TcpStream::connect(admin.tcp()).await.unwrap();
        stream.write_all(b"GET /readyz HTTP/1.1\r\nX-Slow: ").await.unwrap();
        stuck.push(stream);
    }
    assert_eq!(admin.ask("GET /livez HTTP/1.1\nHost: localhost").await.0, 200);
    let mut nothing = [0; 1];
    let closed = stuck[0].read(&mut nothing).await;
    assert!(matches!(closed, Ok(0) | Err(_)), "the oldest made room: {closed:?}");
    admin.stop().await;
    let closed = stuck[1].read(&mut nothing).await;
    assert!(matches!(closed, Ok(0) | Err(_)), "a stop closes the rest: {closed:?}");
}

#[tokio::test]
async fn long_heads_and_bodies_are_refused_or_left_unread() {
    let admin = served("127.0.0.1:0", Access::default());
    let head = format!("GET /livez HTTP/1.1\nHost: localhost\nX-Long: {}", "x".repeat(HEAD_BYTES_MAX));
    assert_eq!(admin.ask(&head).await.0, 431);
    let body = "POST /reload HTTP/1.1\nHost: localhost\nX-Preface: 1\nContent-Length: 1000000000000";
    assert_eq!(admin.ask(body).await.0, 200);
}

#[tokio::test]
async fn a_browser_gets_the_page_and_everything_else_the_list_of_paths() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("token");
    std::fs::write(&path, "s3cret").unwrap();
    let access = Access { token_file: Some(path) };
    let admin = served("0.0.0.0:0", access);
    let browser = "GET / HTTP/1.1\nHost: lb.example\nAccept: text/html,application/xhtml+xml";
    let (status, page) = admin.ask(browser).await;
    assert_eq!(status, 200, "a browser has no token before the page has asked for it");
    assert!(page.starts_with("<!doctype html>"), "{page}");
    let (status, paths) = admin.ask("GET / HTTP/1.1\nHost: lb.example\nAccept: */*").await;
    assert_eq!((status, paths.as_str()), (200, INDEX));
    assert_eq!(admin.ask("GET /events HTTP/1.1\nHost: lb.example").await.0, 401);
}

/// A follower, past its first event.
async fn follower(admin: &Served) -> (TcpStream, String) {
    let mut stream = TcpStream::connect(admin.tcp()).await.unwrap();
    stream.write_all(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let text = read_until(&mut stream, "data: ").await;
    (stream, text)
}

async fn read_until(stream: &mut TcpStream, what: &str) -> String {
    let mut text = String::new();
    let mut bytes = [0; 4096];
    while !text.contains(what) {
        let count = stream.read(&mut bytes).await.unwrap();
        if count == 0 {
            break;
        }
        text.push_str(&String::from_utf8_lossy(&bytes[..count]));
    }
    text
}

#[tokio::test]
async fn events_are_built_once_for_all_who_follow_and_end_with_the_server() {
    let (control, mut commands) = control::channel();
    let built = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    tokio::spawn({
        let built = Arc::clone(&built);
        async move {
            while let Some(command) = commands.recv().await {
                let Command::Status(reply) = command else { continue };
                let number = built.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let _ = reply.send(json!({ "number": number, "line\n": "a\nb" }));
            }
        }
    });
    let admin = served_by(announce::parse("127.0.0.1:0").unwrap(), Access::default(), Scope::All, control);
    let (mut first, text) = follower(&admin).await;
    assert!(text.contains("content-type: text/event-stream\r\n"), "{text}");
    assert!(text.contains("event: status\ndata: {\"line\\n\":\"a\\nb\",\"number\":0}\n\n"), "{text}");
    let mut others = Vec::new();
    for _ in 1..events::FOLLOWERS_MAX {
        others.push(follower(&admin).await.0);
    }
    let (status, text) = admin.ask("GET /events HTTP/1.1\nHost: localhost").await;
    assert_eq!(status, 503, "one too many: {text}");
    assert!(text.contains("16 pages follow already"), "{text}");
    let next = read_until(&mut first, "data: ").await;
    let count = built.load(std::sync::atomic::Ordering::Relaxed);
    assert!(count < events::FOLLOWERS_MAX && next.contains("\"number\":"), "{count} built, {next}");
    admin.stop().await;
    assert!(read_until(&mut first, "\r\n0\r\n\r\n").await.contains("0\r\n\r\n"), "a stream ends in good order");
}
