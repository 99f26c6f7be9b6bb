//! The admin API over HTTP: probes, metrics, status, and the operator's orders, all of it questions to the control thread.

pub mod announce;
mod events;
pub mod guard;
mod listener;
mod look;
mod page;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use axum::Router;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, Request, State as Shared};
use axum::handler::Handler;
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, delete, get, post};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};

pub use guard::{Access, read_token};
pub use listener::{Listener, adopt, bind};

use crate::control::probes::Probes;
use crate::control::{Handle, ReloadOutcome, ReloadTrigger, SetAdmin, SetAdminError, Stopped, UpgradeOutcome};
use crate::metrics;
use crate::pool::AdminState;
use events::Events;
use guard::Refusal;
use listener::{Reach, Stream};

/// Open connections; a new one beyond takes the place of the oldest, so that stuck clients never shut out a probe.
pub const CONNECTIONS_MAX: usize = 64;

/// A request's head has to be there within this long; an idle connection is closed after it.
const HEAD_TIMEOUT: Duration = Duration::from_secs(20);

/// Of a request's head. Bodies aren't read at all: no call has one.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// A connection takes no further request after this long.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(300);

/// And has this long to take the answer to its last one.
const FINISH_TIMEOUT: Duration = Duration::from_secs(30);

/// Answers under way when the server stops have this long.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// A request may be on its way over a connection that is only just open: it is answered within this long after a stop.
const LAST_REQUESTS: Duration = Duration::from_millis(300);

/// The control thread has this long for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// Longest time that a drain may be given: a year, as for every duration of the configuration.
const ORDER_TIMEOUT_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// Accepting goes on this long after it failed: descriptors come back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// `User-Agent` of `preface reload`, `drain` and the like.
pub const COMMAND_LINE_AGENT: &str = concat!("preface/", env!("CARGO_PKG_VERSION"));

/// What `GET /` answers to everything but a browser, which gets the page.
const INDEX: &str = "\
preface admin API; a browser gets the status page here

GET  /livez      200 while the control loop and every worker turn
GET  /readyz     200 while configured, listening and not stopping
GET  /metrics    Prometheus
GET  /status     listeners, pools, upstreams, the last reload (JSON)
GET  /history    rates and latencies of the last ten minutes (JSON)
GET  /connections?listener=&pool=&client=CIDR&id=&limit=    open connections (JSON)
GET  /tap?listener=&pool=&client=CIDR&id=&limit=            the last ones with the header that was sent; &follow=1: new ones
GET  /events     the status once a second (Server-Sent Events)
GET  /config     the configuration in force (JSON)
POST /reload     load the configuration file again
POST /upgrade    start the program again and hand it every listener; connections stay
POST /pools/POOL/drain?timeout=30s               nothing new; open connections stay, at most that long
POST /pools/POOL/disable                         nothing new; open connections are reset
POST /pools/POOL/enable                          as configured
POST /pools/POOL/upstreams/ADDRESS/drain|disable|enable
DELETE /connections/ID                           reset one connection
POST /log?level=debug                            until a reload changes log.level

POST and DELETE need the header X-Preface: 1, and Authorization: Bearer where a token is set:
curl -X POST -H 'X-Preface: 1' http://127.0.0.1:9900/reload
";

/// What the server answers from.
#[derive(Clone, Debug)]
pub struct State {
    /// To the control thread.
    pub control: Handle,
    /// Read directly: they must answer while the control thread is stuck.
    pub probes: Arc<Probes>,
    /// Who may ask what; a reload stores another one.
    pub access: Arc<ArcSwap<Access>>,
    /// What is served.
    pub scope: Scope,
}

/// What a server serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Everything, guarded: `[admin] bind`.
    All,
    /// `/livez`, `/readyz` and `/metrics` alone, to everyone: `[admin] probe_bind`.
    Probes,
}

/// Serve until `stop`; then answers under way have a second.
pub async fn serve(listener: impl Into<Arc<Listener>>, state: State, stop: impl Future<Output = ()>) {
    let listener = listener.into();
    let events = Events::new(state.control.clone());
    let service = TowerToHyperService::new(router(state, events.clone(), listener.reach()));
    let (stopping, stopped) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut by_age: VecDeque<AbortHandle> = VecDeque::new();
    tokio::pin!(stop);
    loop {
        let stream = tokio::select! {
            stream = listener.accept() => stream,
            () = &mut stop => break,
        };
        let Ok(stream) = stream else {
            sleep(ACCEPT_PAUSE).await;
            continue;
        };
        while connections.try_join_next().is_some() {}
        by_age.retain(|connection| !connection.is_finished());
        if by_age.len() >= CONNECTIONS_MAX
            && let Some(oldest) = by_age.pop_front()
        {
            oldest.abort();
        }
        by_age.push_back(connections.spawn(serve_connection(stream, service.clone(), stopped.clone())));
    }
    events.stop();
    drop((listener, stopping));
    let _ = timeout(STOP_TIMEOUT, async { while connections.join_next().await.is_some() {} }).await;
}

async fn serve_connection(
    stream: Box<dyn Stream>,
    service: TowerToHyperService<Router>,
    mut stopped: watch::Receiver<()>,
) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        _ = connection.as_mut() => return,
        () = sleep(CONNECTION_AGE_MAX) => {}
        // Closed at once, a connection would be reset under the first bytes of its request. A new process that takes this
        // one's place listens at the same address: nobody must notice.
        _ = stopped.changed() => {
            if timeout(LAST_REQUESTS, connection.as_mut()).await.is_ok() {
                return;
            }
        }
    }
    connection.as_mut().graceful_shutdown();
    let _ = timeout(FINISH_TIMEOUT, connection).await;
}

#[derive(Clone, Debug)]
struct Server {
    state: State,
    events: Events,
    reach: Reach,
}

/// What a route asks of its caller. There is no other way to a route than through these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guard {
    /// Nothing: probes, and the page, which asks for the token itself.
    Open,
    /// `guard::check_read`: it shows addresses and what the inside looks like.
    Read,
    /// `guard::check_mutation`.
    Change,
}

/// One call of the API.
struct Route {
    path: &'static str,
    method: Method,
    guard: Guard,
    /// Is it there, and open, on `[admin] probe_bind`?
    is_probe: bool,
    handler: MethodRouter<Server>,
}

impl Route {
    fn open<T: 'static>(path: &'static str, handler: impl Handler<T, Server>) -> Route {
        Route { path, method: Method::GET, guard: Guard::Open, is_probe: false, handler: get(handler) }
    }

    fn read<T: 'static>(path: &'static str, handler: impl Handler<T, Server>) -> Route {
        Route { guard: Guard::Read, ..Route::open(path, handler) }
    }

    fn post<T: 'static>(path: &'static str, handler: impl Handler<T, Server>) -> Route {
        Route { path, method: Method::POST, guard: Guard::Change, is_probe: false, handler: post(handler) }
    }

    fn delete<T: 'static>(path: &'static str, handler: impl Handler<T, Server>) -> Route {
        Route { path, method: Method::DELETE, guard: Guard::Change, is_probe: false, handler: delete(handler) }
    }

    fn also_a_probe(self) -> Route {
        Route { is_probe: true, ..self }
    }
}

/// The whole API. The tests hold each of these against the guard.
fn routes() -> Vec<Route> {
    vec![
        Route::open("/", index),
        Route::open("/livez", livez).also_a_probe(),
        Route::open("/readyz", readyz).also_a_probe(),
        Route::read("/metrics", metrics).also_a_probe(),
        Route::read("/status", status),
        Route::read("/history", history),
        Route::read("/connections", look::connections),
        Route::read("/tap", look::tap),
        Route::read("/events", follow),
        Route::read("/config", config),
        Route::post("/reload", reload),
        Route::post("/upgrade", upgrade),
        Route::post("/log", look::set_log_level),
        Route::delete("/connections/{id}", look::end_connection),
        Route::post("/pools/{pool}/{order}", order_pool),
        Route::post("/pools/{pool}/upstreams/{address}/{order}", order_upstream),
    ]
}

fn router(state: State, events: Events, reach: Reach) -> Router {
    let scope = state.scope;
    let server = Server { state, events, reach };
    let mut all = Router::new();
    for Route { path, method, guard, is_probe, handler } in routes() {
        // Whatever is no GET changes something.
        let guard = if method == Method::GET { guard } else { Guard::Change };
        let handler = match (scope, guard) {
            (Scope::Probes, _) if !is_probe => continue,
            (Scope::Probes, _) | (Scope::All, Guard::Open) => handler,
            (Scope::All, Guard::Read) => {
                handler.route_layer(middleware::from_fn_with_state(server.clone(), guard_read))
            }
            (Scope::All, Guard::Change) => {
                handler.route_layer(middleware::from_fn_with_state(server.clone(), guard_mutation))
            }
        };
        all = all.route(path, handler);
    }
    all.fallback(|| async { Refusal::new(StatusCode::NOT_FOUND, "no such path; GET / lists them") })
        .method_not_allowed_fallback(|| async {
            Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "not with this method; GET / lists what there is")
        })
        .with_state(server)
}

async fn guard_read(Shared(server): Shared<Server>, request: Request, next: Next) -> Response {
    let access = server.state.access.load_full();
    match guard::check_read(&access, server.reach, request.headers()).await {
        Ok(()) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    }
}

async fn guard_mutation(Shared(server): Shared<Server>, request: Request, next: Next) -> Response {
    let access = server.state.access.load_full();
    match guard::check_mutation(&access, server.reach, request.headers()).await {
        Ok(()) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    }
}

async fn livez(Shared(server): Shared<Server>) -> (StatusCode, String) {
    probe(server.state.probes.live(Instant::now()))
}

async fn readyz(Shared(server): Shared<Server>) -> (StatusCode, String) {
    probe(server.state.probes.ready())
}

fn probe(result: Result<(), impl std::fmt::Display>) -> (StatusCode, String) {
    match result {
        Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    }
}

async fn metrics(Shared(server): Shared<Server>) -> Result<impl IntoResponse, Refusal> {
    let text = answer(server.state.control.metrics()).await?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text))
}

/// Without the guard, so that a browser, which cannot show a token yet, comes as far as being asked for it.
async fn index(headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    if accept.contains("text/html") { page::page() } else { ([(header::VARY, "accept")], INDEX).into_response() }
}

async fn follow(Shared(server): Shared<Server>) -> Result<Response, Refusal> {
    server.events.follow()
}

async fn status(Shared(server): Shared<Server>) -> Result<Response, Refusal> {
    Ok(pretty(StatusCode::OK, &answer(server.state.control.status()).await?))
}

async fn history(Shared(server): Shared<Server>) -> Result<Response, Refusal> {
    let value = answer(server.state.control.history()).await?;
    // Not for people: ten minutes of columns, without a line for each number.
    Ok(([(header::CONTENT_TYPE, "application/json")], format!("{value}\n")).into_response())
}

async fn config(Shared(server): Shared<Server>) -> Result<Response, Refusal> {
    Ok(pretty(StatusCode::OK, &answer(server.state.control.config()).await?))
}

async fn reload(Shared(server): Shared<Server>) -> Result<Response, Refusal> {
    let report = answer(server.state.control.reload(ReloadTrigger::Admin)).await?;
    let status = match report.outcome {
        ReloadOutcome::Applied | ReloadOutcome::Unchanged => StatusCode::OK,
        ReloadOutcome::Refused => StatusCode::UNPROCESSABLE_ENTITY,
    };
    Ok(pretty(status, &serde_json::to_value(&*report).expect("a report has string keys only")))
}

async fn upgrade(Shared(server): Shared<Server>) -> Result<Response, Refusal> {
    let report = answer(server.state.control.upgrade()).await?;
    let status = match report.outcome {
        UpgradeOutcome::Upgraded => StatusCode::OK,
        UpgradeOutcome::Failed => StatusCode::UNPROCESSABLE_ENTITY,
    };
    Ok(pretty(status, &serde_json::to_value(&report).expect("a report has string keys only")))
}

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct OrderQuery {
    timeout: Option<String>,
}

type Queried = Result<Query<OrderQuery>, QueryRejection>;

/// Parts of the path, or why there are none.
type InPath<T> = Result<Path<T>, PathRejection>;

fn not_utf8(_: PathRejection) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, "the path is not UTF-8 where it is percent-encoded")
}

async fn order_pool(
    Shared(server): Shared<Server>,
    path: InPath<(String, String)>,
    query: Queried,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let Path((pool, order)) = path.map_err(not_utf8)?;
    set_admin(&server, pool, None, &order, query, &headers).await
}

async fn order_upstream(
    Shared(server): Shared<Server>,
    path: InPath<(String, String, String)>,
    query: Queried,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let Path((pool, address, order)) = path.map_err(not_utf8)?;
    set_admin(&server, pool, Some(address), &order, query, &headers).await
}

async fn set_admin(
    server: &Server,
    pool: String,
    address: Option<String>,
    order: &str,
    query: Queried,
    headers: &HeaderMap,
) -> Result<Response, Refusal> {
    let state = match order {
        "drain" => AdminState::Draining,
        "disable" => AdminState::Disabled,
        "enable" => AdminState::Enabled,
        _ => {
            let error = format!("no order {order:?}; orders: drain, disable, enable");
            return Err(Refusal::new(StatusCode::NOT_FOUND, error));
        }
    };
    let timeout = order_timeout(query, state)?;
    let order = SetAdmin { pool: pool.clone(), address, state, timeout, by: by(headers).to_owned() };
    let reply = answer(server.state.control.set_admin(order)).await?.map_err(|error| match error {
        SetAdminError::UnknownPool { .. } | SetAdminError::UnknownUpstream { .. } => {
            Refusal::new(StatusCode::NOT_FOUND, error.to_string())
        }
    })?;
    let upstream = |(address, open): &(_, u64)| json!({ "address": address, "open": open });
    let upstreams: Vec<Value> = reply.upstreams.iter().map(upstream).collect();
    Ok(pretty(StatusCode::OK, &json!({ "pool": pool, "admin": state, "upstreams": upstreams })))
}

/// Who orders.
fn by(headers: &HeaderMap) -> &'static str {
    let is_command_line = headers.get(header::USER_AGENT).is_some_and(|agent| agent == COMMAND_LINE_AGENT);
    if is_command_line { "command line" } else { "admin api" }
}

fn order_timeout(query: Queried, state: AdminState) -> Result<Option<Duration>, Refusal> {
    let refused = |error: String| Refusal::new(StatusCode::BAD_REQUEST, error);
    let Query(query) = query.map_err(|_| refused("the only parameter is timeout, once: ?timeout=30s".to_owned()))?;
    let Some(text) = query.timeout else { return Ok(None) };
    if state != AdminState::Draining {
        return Err(refused("only drain has a timeout: disable resets at once, enable resets nothing".to_owned()));
    }
    let timeout = humantime::parse_duration(&text)
        .map_err(|error| refused(format!("{text:?} is not a time ({error}); write 30s or 1h30m")))?;
    if timeout > ORDER_TIMEOUT_MAX {
        return Err(refused(format!("{text:?} is longer than a year; leave timeout out to drain without a deadline")));
    }
    Ok(Some(timeout))
}

/// Wait for the control thread, but not for ever.
async fn answer<T>(asked: impl Future<Output = Result<T, Stopped>>) -> Result<T, Refusal> {
    match timeout(ANSWER_TIMEOUT, asked).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(Stopped)) => Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "the process is stopping")),
        Err(_) => {
            let error = "the control thread has not answered for 20 s and may yet carry this out; see /livez";
            Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, error))
        }
    }
}

/// JSON that reads well in a terminal.
fn pretty(status: StatusCode, value: &Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], format!("{value:#}\n")).into_response()
}

#[cfg(test)]
mod tests;
